"""Makes a checkpoint of a classifier of ours from that of a plain one."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from mmengine.config import Config, DictAction

from mmorepa import __version__
from mmorepa.backbones.staged_backbone import check_style
from mmorepa.converters import plain_twin, start_from_plain, twin_entries
from mmorepa.engine import read_checkpoint, write_checkpoint
from mmorepa.engine.checkpoint import load_strictly
from mmorepa.engine.comparison import largest_difference, network_outputs
from mmorepa.engine.config import build_model, one_line_errors
from mmorepa.layers import is_switchable
from mmorepa.layers.reparam_conv import STARTS


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Writes a checkpoint that computes what a plain ResNet, ResNeXt or '
        'RepVGG computes, classifier included, for a config whose convs are '
        're-parameterised. Only tensors and plain containers are read.'
    )
    parser.add_argument(
        'source',
        metavar='SOURCE',
        help='the checkpoint file of the plain network: of torchvision, timm or '
        'mmpretrain',
    )
    parser.add_argument(
        'config',
        metavar='CONFIG',
        help='the config of the classifier; deploy=True in its backbone gives a '
        'deployed checkpoint',
    )
    parser.add_argument('out', metavar='OUT', help='the checkpoint to write')
    parser.add_argument(
        '--start',
        choices=STARTS,
        help='how plain kernels are split into branches: quiet (the first step moves '
        "them as far as a plain conv's) or balanced (all branches learn from the first "
        'step); by default what the config says, or quiet',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(224, 224),
        metavar=('HEIGHT', 'WIDTH'),
        help='image size of the check with random input (default: 224 224)',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help='largest difference, relative to the largest output (default: 1e-4)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings that override the config',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        if not Path(args.config).is_file():
            raise FileNotFoundError(f'no config at {args.config!r}')
        cfg = Config.fromfile(args.config)
        if args.cfg_options is not None:
            cfg.merge_from_dict(args.cfg_options)
        checkpoint = read_checkpoint(args.source)
        if Path(args.out).is_file() and Path(args.out).samefile(args.source):
            raise FileExistsError(
                f'{args.out!r} is the plain checkpoint, which cannot be made again '
                'from what would take its place; write to another file'
            )
        model = build_model(cfg)
        count = start_from_plain(model, checkpoint['state_dict'], args.start)
        check_style(model.backbone, args.source)
        cfg.model = plain_twin(cfg.model)
        twin = build_model(cfg)
        entries = twin_entries(twin, model.backbone, checkpoint['state_dict'])
        load_strictly(twin, entries)

    channels = cfg.model.backbone.get('in_channels', 3)
    image = torch.randn(2, channels, *args.shape)
    difference = largest_difference(
        network_outputs(twin, image), network_outputs(model, image)
    )
    if not difference.relative <= args.tolerance:
        raise SystemExit(
            f'error: the outputs differ by {difference.relative:.2e} of the largest, '
            f'tolerance {args.tolerance:.0e}; nothing was written. Are the running '
            'variances of the checkpoint near zero, or its weights in half precision?'
        )
    meta = checkpoint.get('meta') or {}
    # The rest tells of the training of the plain network.
    meta = {key: meta[key] for key in ('dataset_meta', 'CLASSES') if key in meta}
    deployed = not is_switchable(model)
    meta.update(mmorepa_version=__version__, deployed=deployed)
    result = dict(meta=meta, state_dict=model.state_dict())
    with one_line_errors((OSError,)):
        write_checkpoint(result, args.out)
    if deployed:
        print(f'{count} convs took plain kernels, BatchNorm folded in.')
    else:
        print(f'{count} convs start from plain kernels.')
    print(
        f'Largest difference for random input of {args.shape[0]}x{args.shape[1]}: '
        f'{difference.absolute:.2e} absolute, {difference.relative:.2e} relative.'
    )
    print(f'Wrote {args.out}.')


if __name__ == '__main__':
    main()
