"""Fills in docs/model_zoo.md and the metafile: what every ImageNet config costs.

Parameters, GFLOPs and sizes are computed from the models that the configs build.
The accuracies are those of the OREPA paper, and marked as such wherever they appear.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import pandas as pd
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
PAPER = pd.read_csv(ROOT / 'docs/evidence/paper.csv', index_col=0, dtype=str).T


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
        accuracy, memory, seconds = PAPER.get(entry['name'], ('–', '–', '–'))
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
            result['Metrics'] = {'Top 1 Accuracy': float(PAPER[entry['name']].iloc[0])}
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
