"""Compiles OREPA's folds for this CPU, once; about 20 seconds."""

import argparse

from mmorepa.functional import compiled


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(compiled.build())


if __name__ == '__main__':
    main()
