"""Tests which stock models take re-parameterised convs, and what changes then.

Two tables, from models as they come with the toolboxes:

- ``conv_cfg``: a config of mmdet, mmseg or mmpretrain with ``OREPAConv2d`` wherever a
  ``conv_cfg`` is taken. It loads the state dict of the plain model, computes the same,
  trains three steps, is deployed, and the plain model loads what is left.
- ``add_branches``: the same for classes of torchvision and timm, which take none.

Kernels are random and BatchNorm statistics are like trained ones: nothing is
downloaded. A stopped run goes on where it was.
"""

import argparse
import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

import pandas as pd
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from studies import ROOT, Key, Report, Results, markdown_table, run_study, study_parser
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import mmorepa
from mmorepa.analysis import largest_difference, raw_outputs
from mmorepa.cli import one_line_errors
from mmorepa.layers import ReparamConv2d

# Of the largest output, in float32.
TOLERANCE = 1e-3

# The rows of the documented tables name their models.
DOCUMENTED = ROOT / 'docs/evidence/compatibility/results.csv'
KEY = ('table', 'model')
COLUMNS = dict(
    convs='convs turned',
    start='difference at the start',
    deployed='difference deployed',
    note='note',
)


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = study_parser(__doc__, 'compatibility')
    parser.add_argument(
        '--models',
        nargs='+',
        default=pd.read_csv(DOCUMENTED).model.tolist(),
        metavar='MODEL',
        help="such as 'mmdet:ssd/ssd300_coco.py', 'torchvision:vgg11' or 'timm:dla34' "
        '(default: those of docs/compatibility.md)',
    )
    return parser.parse_args(argv)


def stock_config(name: str) -> Config:
    """A config of a toolbox, ``toolbox:path``, without weights from elsewhere."""
    toolbox, path = name.split(':')
    package = importlib.import_module(f'{toolbox}.models').__file__
    cfg = Config.fromfile(Path(package).parents[1] / '.mim/configs' / path)
    init_default_scope(toolbox)
    for node in _dicts(cfg.model):
        node.pop('pretrained', None)
        if 'checkpoint' in str(node.get('init_cfg')):
            node['init_cfg'] = None
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
    return cfg


def _dicts(node: object) -> Iterator[dict]:
    if isinstance(node, dict):
        yield node
    if isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _dicts(child)


def set_conv_cfg(model: dict) -> None:
    """Sets ``conv_cfg`` wherever a class takes it and the config does not use it."""
    with MODELS.switch_scope_and_registry(None) as registry:
        for node in _dicts(model):
            kind = node.get('type')
            cls = registry.get(kind) if isinstance(kind, str) else None
            if cls and not node.get('conv_cfg') and _takes_conv_cfg(cls):
                node['conv_cfg'] = dict(type='OREPAConv2d')


def _takes_conv_cfg(cls: type) -> bool:
    """Whether a class takes it, or passes it on to a parent that does."""
    for parent in getattr(cls, '__mro__', ()):
        if '__init__' in vars(parent):
            parameters = inspect.signature(parent.__init__).parameters.values()
            if any(p.name == 'conv_cfg' for p in parameters):
                return True
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                return False
    return False


def make_trained_like(model: nn.Module) -> nn.Module:
    """Gives BatchNorms statistics and weights such as training leaves."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                norm.running_mean.normal_(0, 0.2, generator=generator)
                norm.running_var.uniform_(0.5, 1.5, generator=generator)
                if norm.affine:
                    norm.weight.uniform_(0.4, 0.9, generator=generator)
                    norm.bias.normal_(0, 0.2, generator=generator)
    return model


def make_batch(toolbox: str, model: dict) -> dict:
    """Two noise images with labels, as a dataloader of the toolbox yields them."""
    # These have a size by definition.
    size = dict(SSDVGG=300, VGG=224).get(model['backbone']['type'], 128)
    if toolbox == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        with_mask = 'mask_head' in model.get('roi_head', {})
        return demo_mm_inputs(2, (3, size, size), [4, 6], 80, with_mask=with_mask)
    torch.manual_seed(0)
    images = torch.randint(256, (2, 3, size, size)).to(torch.uint8)
    if toolbox == 'mmpretrain':
        from mmpretrain.structures import DataSample

        # VGG has its classifier in the backbone.
        classes = {**model['backbone'], **model['head']}['num_classes']
        labels = torch.randint(classes, (2,))
        samples = [DataSample().set_gt_label(label) for label in labels]
        return dict(inputs=images, data_samples=samples)
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    classes = model['decode_head']['num_classes']
    shape = dict(img_shape=(size, size), ori_shape=(size, size))
    samples = [SegDataSample(metainfo=shape) for _ in images]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, size, size)))
    return dict(inputs=[*images], data_samples=samples)


def build(cfg: Config) -> nn.Module:
    torch.manual_seed(0)
    model = copy.deepcopy(cfg.model)
    if 'data_preprocessor' not in model and 'data_preprocessor' in cfg:
        model.data_preprocessor = cfg.data_preprocessor
    return MODELS.build(model)


def compare(
    plain: nn.Module,
    training: nn.Module,
    outputs: Callable[[nn.Module], list[Tensor]],
    step: Callable[[nn.Module], object],
) -> dict:
    """Loads, compares, trains, deploys, compares, and gives the plain model back."""
    convs = sum(isinstance(m, ReparamConv2d) for m in training.modules())
    both = sum(isinstance(m, nn.Conv2d) for m in plain.modules())
    expected = outputs(plain.eval())
    start = largest_difference(expected, outputs(training.eval())).relative
    training.train()
    for _ in range(3):
        step(training)
    trained = outputs(training.eval())
    mmorepa.switch_to_deploy(training)
    plain.load_state_dict(training.state_dict())
    deployed = max(
        largest_difference(trained, outputs(model)).relative
        for model in (training, plain.eval())
    )
    fails = not max(start, deployed) <= TOLERANCE or not convs
    return dict(
        convs=f'{convs} of {both}',
        start=f'{start:.0e}',
        deployed=f'{deployed:.0e}',
        note='outputs differ' if fails else '',
    )


def conv_cfg_row(name: str) -> dict:
    """A stock config, plain and with ``conv_cfg``."""
    cfg = stock_config(name)
    plain = make_trained_like(build(cfg))
    turned = copy.deepcopy(cfg)
    set_conv_cfg(turned.model)
    training = build(turned)
    training.load_state_dict(plain.state_dict())
    batch = make_batch(name.split(':')[0], cfg.model)
    # Adam moves every parameter, however small its gradient.
    adam = dict(optimizer=dict(type='Adam', lr=1e-3))
    wrapper = build_optim_wrapper(training, adam)
    return compare(
        plain,
        training,
        lambda model: raw_outputs(model, batch),
        lambda model: model.train_step(batch, wrapper),
    )


def add_branches_row(name: str) -> dict:
    """A class of torchvision or timm, plain and re-parameterised."""
    library, model = name.split(':')
    torch.manual_seed(0)
    models = importlib.import_module(f'{library}.models')
    plain = getattr(models, model)()
    make_trained_like(plain).eval()
    training = mmorepa.add_branches(copy.deepcopy(plain))
    images = torch.randn(2, 3, 128, 128)
    optimizer = torch.optim.Adam(training.parameters(), 1e-3)

    def step(model: nn.Module) -> None:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    @torch.no_grad()
    def outputs(model: nn.Module) -> list[Tensor]:
        return [model(images)]

    return compare(plain, training, outputs, step)


def table_of(name: str) -> str:
    is_package = name.startswith(('torchvision:', 'timm:'))
    return 'add_branches' if is_package else 'conv_cfg'


def measure(key: Key) -> dict[str, str]:
    """The other columns of a row. What fails is noted in it."""
    MMLogger.get_instance('mmorepa', log_level='ERROR')
    row = add_branches_row if key['table'] == 'add_branches' else conv_cfg_row
    try:
        found = row(key['model'])
    except Exception as error:
        found = dict(note=f'{type(error).__name__}: {" ".join(str(error).split())}')
    return {column: str(found.get(column, ''))[:200] for column in COLUMNS}


def report(rows: pd.DataFrame) -> Report:
    """A table of each kind, with the columns that say something."""
    rows = rows.loc[:, rows.ne('').any()].rename(columns=COLUMNS)
    tables = {
        name: markdown_table(found.drop(columns='table').to_dict('records'))
        for name, found in rows.groupby('table', sort=False)
    }
    return tables, {}


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    results = Results(args.out / 'results.csv', KEY, [*COLUMNS])

    def make_keys() -> list[Key]:
        return [dict(table=table_of(name), model=name) for name in args.models]

    run_study(args, results, make_keys, measure, report)
    failed = results.rows[results.rows.note != ''].model
    if len(failed):
        raise ValueError(f'these have a note: {", ".join(failed)}')


if __name__ == '__main__':
    main()
