"""Draws what the training form and the deployed form predict, side by side."""

import argparse
import copy
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser, add_config_options, positive


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(
        __doc__, 'my_config.py work_dirs/my_config/epoch_30.pth deployed.pth drawn.png'
    )
    parser.add_argument('config', help='the config of the training')
    parser.add_argument('checkpoint', help='the training checkpoint')
    parser.add_argument('deployed', help='the deployed checkpoint')
    parser.add_argument('out', type=Path, help='the PNG to write')
    parser.add_argument(
        '--images', type=positive, default=4, help='how many test images (default: 4)'
    )
    parser.add_argument(
        '--score', type=float, default=0.5, help='lowest score of a box (default: 0.5)'
    )
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import mmcv
import numpy as np
import torch
from charts import panels, save
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.data import Dataset

from mmorepa import switch_to_deploy
from mmorepa.cli import one_line_errors
from mmorepa.converters import load_strictly, load_training_form, read_checkpoint
from mmorepa.hub import get_config
from mmorepa.runs import check_data_folders
from mmorepa.utils.files import check_outputs

COLUMNS = ('ground truth', 'training form', 'deployed')


def draw(
    cfg: Config,
    models: Sequence[nn.Module],
    dataset: Dataset,
    number: int,
    score: float,
) -> list[list[np.ndarray]]:
    """The images of :data:`COLUMNS`, for the first test images."""
    visualizer = VISUALIZERS.build(
        dict(type=cfg.visualizer.type, name='draw_predictions')
    )
    visualizer.dataset_meta = dataset.metainfo
    # The two toolboxes' visualizers agree on all but this.
    options = dict(pred_score_thr=score) if cfg.default_scope == 'mmdet' else {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = str(Path(folder, 'drawn.png'))

        def drawn(sample: BaseDataElement, is_truth: bool) -> np.ndarray:
            image = mmcv.imread(sample.img_path, channel_order='rgb')
            kind = dict(draw_gt=is_truth, draw_pred=not is_truth)
            visualizer.add_datasample(
                'drawn', image, sample.cpu(), out_file=file, **kind, **options
            )
            return mmcv.imread(file, channel_order='rgb')

        rows = []
        for i in range(min(number, len(dataset))):
            item = dataset[i]
            training, deployed = (
                model.test_step(pseudo_collate([copy.deepcopy(item)]))[0]
                for model in models
            )
            row = [
                drawn(training, True),
                drawn(training, False),
                drawn(deployed, False),
            ]
            rows.append(row)
    return rows


def write(rows: list[list[np.ndarray]], path: Path) -> None:
    """Lays the images out as one picture."""
    height, width = rows[0][0].shape[:2]
    size = 4 * len(COLUMNS), 4 * height / width * len(rows) + 0.4
    figure, grid = panels(len(rows), len(COLUMNS), *size)
    for axes, image in zip(grid.flat, itertools.chain(*rows)):
        axes.imshow(image)
        axes.axis('off')
    for axes, title in zip(grid[0], COLUMNS):
        axes.set_title(title)
    save(figure, path)


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    check_outputs([args.out], [args.config, args.checkpoint, args.deployed])
    cfg = get_config(args.config, args.cfg_options)
    if cfg.get('default_scope') not in ('mmdet', 'mmseg'):
        raise ValueError(
            'this draws detectors and segmenters (default_scope mmdet or mmseg), '
            f'found default_scope={cfg.get("default_scope")!r}'
        )
    check_data_folders(cfg, ('test',))
    init_default_scope(cfg.default_scope)
    training = MODELS.build(cfg.model).eval()
    plain = switch_to_deploy(copy.deepcopy(training))
    load_training_form(training, read_checkpoint(args.checkpoint)['state_dict'])
    load_strictly(plain, read_checkpoint(args.deployed)['state_dict'])
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    write(draw(cfg, (training, plain), dataset, args.images, args.score), args.out)
    print(f'Wrote {args.out}.')


if __name__ == '__main__':
    main()
