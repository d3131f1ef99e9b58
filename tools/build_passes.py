"""Compiles the passes of the fold for this CPU, once; about 20 seconds."""

import argparse

from mmorepa.functional import compiled_passes


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(compiled_passes.build())


if __name__ == '__main__':
    main()
