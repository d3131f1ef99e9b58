"""Fills in docs/model_zoo.md and the metafile: what every ImageNet config costs.

Parameters, GFLOPs and sizes are computed from the models that the configs build.
The accuracies are those of the OREPA paper, and marked as such wherever they appear.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

sys.path.append(str(Path(__file__).resolve().parents[1] / 'benchmarks'))
from studies import ROOT, fill, markdown_table

from mmorepa import switch_to_deploy
from mmorepa.analysis.complexity import count_bytes, count_gflops, count_parameters
from mmorepa.cli import one_line_errors
from mmorepa.utils.files import atomic_write

CONFIGS = ROOT / 'configs' / 'imagenet'
METAFILE = CONFIGS / 'metafile.yml'
DOCUMENT = ROOT / 'docs' / 'model_zoo.md'
SIZE = 224

# Tables 2 and 4 of the OREPA paper: top-1 accuracy (%), GPU memory (GB) and seconds a
# batch (64 images on a V100) by config name. None of these is a figure of ours.
PAPER = {
    'resnet18': (71.21, 4.2, 0.086),
    'resnet18-dbb': (71.77, 7.5, 0.241),
    'resnet18-orepa': (72.13, 5.2, 0.120),
    'resnet34': (74.13, 5.2, 0.116),
    'resnet34-dbb': (74.83, 11.1, 0.424),
    'resnet34-orepa': (75.04, 6.7, 0.182),
    'resnet50': (76.70, 10.3, 0.204),
    'resnet50-dbb': (76.89, 13.7, 0.380),
    'resnet50-orepa': (77.31, 11.2, 0.252),
    'resnet101': (77.71, 14.5, 0.382),
    'resnet101-dbb': (78.02, 19.7, 0.641),
    'resnet101-orepa': (78.29, 16.1, 0.445),
    'resnext50-32x4d': (77.14, 12.4, 0.286),
    'resnext50-32x4d-orepa': (77.66, 13.0, 0.343),
    'resnet18-1.5x': (73.69, 6.0, 0.121),
    'resnet18-1.5x-orepa': (74.51, 7.4, 0.164),
    'resnet18-2x': (74.74, 7.4, 0.161),
    'resnet18-2x-orepa': (75.61, 10.4, 0.229),
    'repvgg-a0': (72.41, 3.8, 0.100),
    'repvgg-a0-orepa': (73.04, 4.2, 0.136),
    'repvgg-a1': (74.46, 4.8, 0.121),
    'repvgg-a1-orepa': (74.85, 5.5, 0.147),
    'repvgg-a2': (76.48, 5.8, 0.170),
    'repvgg-a2-orepa': (76.72, 7.4, 0.210),
}


def name_of(path: Path) -> str:
    """'resnet18-orepa' for resnet18-orepa_4xb64_in1k.py."""
    return path.stem.split('_')[0]


def measure(path: Path) -> dict:
    """Builds a config's model and computes its figures in both forms."""
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))
    model.eval()
    image = torch.zeros(1, 3, SIZE, SIZE)
    training = dict(params=count_parameters(model), gflops=count_gflops(model, image))
    switch_to_deploy(model)
    return dict(
        name=name_of(path),
        config=path.relative_to(ROOT).as_posix(),
        **training,
        deployed_params=count_parameters(model),
        deployed_gflops=count_gflops(model, image),
        deployed_megabytes=count_bytes(model) / 1e6,
    )


def to_rows(entries: Sequence[dict]) -> list[dict[str, str]]:
    """The rows of the Markdown table, by the head of the column."""
    rows = []
    for entry in entries:
        accuracy, memory, seconds = '–', '–', '–'
        if entry['name'] in PAPER:
            figures = zip(('{:.2f}', '{} G', '{:.3f} s'), PAPER[entry['name']])
            accuracy, memory, seconds = (text.format(x) for text, x in figures)
        rows.append(
            {
                'config': f'[{entry["name"]}](../{entry["config"]})',
                'parameters, training form': f'{entry["params"] / 1e6:.2f} M',
                'GFLOPs': f'{entry["gflops"]:.2f}',
                'parameters, deployed': f'{entry["deployed_params"] / 1e6:.2f} M',
                'GFLOPs, deployed': f'{entry["deployed_gflops"]:.2f}',
                'size, deployed': f'{entry["deployed_megabytes"]:.1f} MB',
                "top-1 (%), paper's": accuracy,
                "GPU memory, paper's": memory,
                "time of a batch, paper's": seconds,
            }
        )
    return rows


def to_models(entries: Sequence[dict]) -> list[dict]:
    """The models of the metafile, in the format that mim and mmpretrain read."""
    models = []
    for entry in entries:
        is_repvgg = entry['name'].startswith('repvgg')
        model = {
            'Name': Path(entry['config']).stem,
            'Metadata': dict(
                FLOPs=round(entry['deployed_gflops'] * 1e9),
                Parameters=entry['deployed_params'],
            ),
            'Config': entry['config'],
            'In Collection': 'OREPARepVGG' if is_repvgg else 'OREPAResNet',
        }
        if entry['name'] in PAPER:
            result = dict(Dataset='ImageNet-1k', Task='Image Classification')
            result['Metrics'] = {'Top 1 Accuracy': PAPER[entry['name']][0]}
            model['Results'] = [result]
        models.append(model)
    return models


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    paths = sorted(CONFIGS.glob('*.py'))
    entries = []
    for i, path in enumerate(paths, 1):
        print(f'[{i}/{len(paths)}] {name_of(path)}', file=sys.stderr)
        entries.append(measure(path))
    document = fill(
        DOCUMENT.read_text(), dict(imagenet=markdown_table(to_rows(entries)))
    )
    # The collections before them stay.
    collections, _, _ = METAFILE.read_text().partition('Models:')
    models = yaml.safe_dump(dict(Models=to_models(entries)), sort_keys=False, width=88)
    for path, text in ((DOCUMENT, document), (METAFILE, collections + models)):
        with atomic_write(path) as file:
            file.write_text(text)
        print(f'Wrote {path}.')


if __name__ == '__main__':
    main()
