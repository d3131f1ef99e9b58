"""The trainings of the accuracy study: networks, blocks, variants, and their rows."""

import argparse
import copy
import hashlib
import itertools
import json
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import NamedTuple, Optional

from mmengine.config import Config
from studies import ROOT, Key, Results
from trainings import Point, epochs_options, train

from mmorepa.layers import OREPAKernel

KEY = ('data', 'network', 'block', 'variant', 'lr_factor', 'seed', 'epochs')
VALUES = (
    *('accuracy', 'lr', 'recipe', 'cpu_seconds', 'seconds', 'device'),
    'deployed_parameters',
    # A point for each validation, epoch:accuracy:seconds:cpu_seconds.
    'curve',
)
METRIC = 'accuracy/top1'
# For the curves. Without those of every epoch, which would take a third of the time on
# a CPU: 1, 2, 4, 6, 8, 12, 16, 20.
VALIDATIONS = [(3, 2), (9, 4)]

DATA = {
    '10pct': '10 % of Fashion-MNIST',
    'full': 'Fashion-MNIST',
    '10pct-56px': '10 % of Fashion-MNIST at 56 pixels',
}
_SUFFIX = {'10pct': '1xb64_fashion-mnist-10pct', 'full': '1xb256_fashion-mnist'}
_SUFFIX['10pct-56px'] = _SUFFIX['10pct']
NETWORKS = {
    'resnet18': 'slim ResNet-18',
    'repvgg-a0': 'slim RepVGG-A0',
    'resnet34': 'slim ResNet-34',
    'resnet50': 'slim ResNet-50',
}
BLOCKS = {
    'resnet18': dict(none='plain', dbb='DBB', orepa='OREPA', repvgg='RepVGG'),
    'repvgg-a0': dict(none='plain', repvgg='RepVGG', orepa='OREPA-RepVGG'),
    'resnet34': dict(none='plain', orepa='OREPA'),
    'resnet50': dict(none='plain', orepa='OREPA'),
}
# What a network and a data set change in the config of resnet18 and of 28 pixels.
CHANGES = {
    'resnet34': {'model.backbone.depth': 34},
    'resnet50': {'model.backbone.depth': 50, 'model.head.in_channels': 512},
    '10pct-56px': {
        'train_dataloader.dataset.pipeline': [
            dict(type='Resize', scale=56),
            dict(type='RandomCrop', crop_size=56, padding=4),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
        'val_dataloader.dataset.pipeline': [
            dict(type='Resize', scale=56),
            dict(type='PackInputs'),
        ],
    },
}
REFERENCE = 'none'
FACTORS = ('1/3', '1', '3')


class Variant(NamedTuple):
    """A change to a training."""

    # What it is called in tables.
    text: str
    # What to change in the config.
    options: dict
    # Those that it is for.
    networks: tuple[str, ...] = ('resnet18', 'resnet34', 'resnet50')
    blocks: tuple[str, ...] = ('orepa',)
    # Multiplies the epochs.
    length: Fraction = Fraction(1)

    def epochs(self, standard: int) -> int:
        """How long it trains, where the standard takes so many epochs."""
        return round(standard * self.length)


_PARAMWISE = 'optim_wrapper.paramwise_cfg'
_BLOCK_CFG = 'model.backbone.block_cfg'
_STEM = 'model.backbone.stem_block'
_BRANCHES = tuple(OREPAKernel.INITIAL_SCALES)
_FROZEN = {f'{_PARAMWISE}.scale_lr_mult': 0.0}
_ALL = tuple(NETWORKS)
ALL_BLOCKS = ('none', 'dbb', 'orepa', 'repvgg')
STANDARD = 'standard'
# Trainings that take as long as others of fewer epochs.
LONGER = {'epochs_1.25': Fraction(5, 4), 'epochs_1.5': Fraction(3, 2)}
KERNEL_DECAY, STRONG_DECAY = 'kernel_decay', 'strong_decay'
STRONG_KERNEL_DECAY = 'strong_kernel_decay'
# By itself, with the momentum of 0.9, the recipe's 1e-4 takes 5 % off the weights in
# 1,880 steps, and this 99 %.
STRONG = 0.01
_STRONG_DECAY = {'optim_wrapper.optimizer.weight_decay': STRONG}


def kernel_decay(coefficient: float) -> dict:
    """The options for weight decay of the folded kernels instead of the branches."""
    hook = dict(type='EquivalentKernelDecayHook', weight_decay=coefficient)
    return {'custom_hooks': [hook], f'{_PARAMWISE}.branch_decay_mult': 0.0}


VARIANTS = {
    STANDARD: Variant('', {}, _ALL, ALL_BLOCKS),
    **{
        name: Variant(f'{float(length):g} x the epochs', {}, _ALL, ALL_BLOCKS, length)
        for name, length in LONGER.items()
    },
    # Of a plain kernel, both are the same.
    KERNEL_DECAY: Variant(
        'weight decay of the folded kernels', kernel_decay(1e-4), _ALL, ALL_BLOCKS[1:]
    ),
    STRONG_DECAY: Variant('strong weight decay', _STRONG_DECAY, _ALL, ALL_BLOCKS),
    STRONG_KERNEL_DECAY: Variant(
        'strong weight decay of the folded kernels',
        {**_STRONG_DECAY, **kernel_decay(STRONG)},
        _ALL,
        ALL_BLOCKS[1:],
    ),
    'no_scaling': Variant(
        'no linear scaling (all scales are 1)',
        {**_FROZEN, _BLOCK_CFG: dict(initial_scales=dict.fromkeys(_BRANCHES, 1.0))},
    ),
    'frozen_scales': Variant('initial scales, not trained', _FROZEN),
    **{
        f'without_{branch}': Variant(
            f'without {branch}',
            {_BLOCK_CFG: dict(branches=[b for b in _BRANCHES if b != branch])},
        )
        for branch in _BRANCHES
    },
    'plain_stem': Variant('plain stem', {_STEM: 'plain'}),
    'orepa_stem': Variant('OREPA stem', {_STEM: 'orepa'}, blocks=('none',)),
    'deep_linear_stem': Variant(
        'deep linear stem', {_STEM: 'deep_linear'}, blocks=('none',)
    ),
    'single_init': Variant(
        'single_init', {_BLOCK_CFG: dict(single_init=True)}, blocks=ALL_BLOCKS[1:]
    ),
    **{
        f'stem_lr_{mult:g}': Variant(
            f'stem learning rate x {mult:g}', {f'{_PARAMWISE}.stem_lr_mult': mult}
        )
        for mult in (0.1, 0.3, 3.0)
    },
    'online': Variant('folded online', {'optim_wrapper.folded': False}),
}
DECAYS = (KERNEL_DECAY, STRONG_DECAY, STRONG_KERNEL_DECAY)
STEMS = ('orepa_stem', 'deep_linear_stem')
ABLATIONS = [
    name for name in VARIANTS if name not in (STANDARD, *LONGER, *DECAYS, *STEMS)
]


def config_of(data: str, network: str) -> Path:
    """The config of the network; its blocks, depth and size of images are options."""
    network = 'resnet18' if network in CHANGES else network
    name = f'{network}-slim_{_SUFFIX[data]}.py'
    return ROOT / 'configs/fashion_mnist' / name


@cache
def base_config(data: str, network: str) -> Config:
    """What is in that config, read once; it is left as it is."""
    return Config.fromfile(config_of(data, network))


def standard_epochs(data: str, given: Optional[int]) -> int:
    """How long trainings are, if nothing else is given: as the config says."""
    return given or base_config(data, 'resnet18').train_cfg.max_epochs


def keys_of(args: argparse.Namespace) -> Iterator[Key]:
    """The keys of all rows that are asked for.

    Seed by seed, so that a part of the study is one of fewer seeds, and blocks in turn,
    so that all of them meet the same machine.
    """
    for seed, data, network, name, factor, block in itertools.product(
        *(args.seeds, args.data, args.networks, args.variants, args.lr_factors),
        args.blocks,
    ):
        variant = VARIANTS[name]
        is_asked = block in BLOCKS[network] and block in variant.blocks
        if is_asked and network in variant.networks:
            epochs = variant.epochs(standard_epochs(data, args.epochs))
            parts = (data, network, block, name, factor, str(seed), str(epochs))
            yield dict(zip(KEY, parts))


def options_of(key: Key) -> dict:
    """What the training of a row changes in its config."""
    recipe = base_config(key['data'], key['network']).optim_wrapper.optimizer.lr
    options = {
        **epochs_options(int(key['epochs'])),
        'model.backbone.block': key['block'],
        'optim_wrapper.optimizer.lr': recipe * float(Fraction(key['lr_factor'])),
        'randomness.seed': int(key['seed']),
        **CHANGES.get(key['data'], {}),
        **CHANGES.get(key['network'], {}),
        **VARIANTS[key['variant']].options,
    }
    if (key['variant'], key['lr_factor']) == (STANDARD, '1'):
        # The others are compared at their end alone.
        options['train_cfg.val_interval'] = 1
        options['train_cfg.dynamic_intervals'] = VALIDATIONS
    return options


def recipe_of(key: Key) -> str:
    """A fingerprint of all in its config that changes what a training learns."""
    cfg = copy.deepcopy(base_config(key['data'], key['network']))
    cfg.merge_from_dict(options_of(key))
    loader = cfg.train_dataloader
    dataset = {k: v for k, v in loader.dataset.items() if k != 'data_root'}
    parts = (
        *(cfg.model, cfg.optim_wrapper, cfg.param_scheduler),
        *(cfg.get('custom_hooks', []), cfg.train_cfg.max_epochs, loader.batch_size),
        *(dataset, cfg.val_dataloader.dataset.pipeline),
    )
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def measure(key: Key, runs: Path) -> dict[str, str]:
    """Trains what a row stands for, and gives its other columns."""
    options = options_of(key)
    config = config_of(key['data'], key['network'])
    training = train(config, options, folder_of(key, runs), METRIC)
    return dict(
        accuracy=f'{training.metric:.2f}',
        lr=f'{options["optim_wrapper.optimizer.lr"]:.4g}',
        recipe=recipe_of(key),
        cpu_seconds=f'{training.cpu_seconds:.1f}',
        seconds=f'{training.seconds:.1f}',
        device=training.device,
        deployed_parameters=str(training.deployed_parameters),
        curve=' '.join(
            f'{p.epoch}:{p.metric:.2f}:{p.seconds:.1f}:{p.cpu_seconds:.1f}'
            for p in training.curve
        ),
    )


def check_recipes(results: Results, keys: list[Key]) -> None:
    """Raises a ValueError for rows of these keys that the configs no longer give."""
    for row in results.rows.to_dict('records'):
        key = {name: row[name] for name in KEY}
        if key in keys and row['recipe'] != recipe_of(key):
            raise ValueError(
                f'the configs have changed: the row of {", ".join(key.values())} in '
                f"'{results.path}' was trained with another recipe, {row['recipe']}; "
                'choose another folder, or remove the rows'
            )


def folder_of(key: Key, runs: Path) -> Path:
    """Where the training of a row leaves its logs and its last weights."""
    return runs / '-'.join(key[name] for name in KEY).replace('/', 'of')


def curve_of(row: dict[str, str]) -> list[Point]:
    """The validations of a row."""
    points = [point.split(':') for point in row['curve'].split()]
    return [Point(int(epoch), *map(float, rest)) for epoch, *rest in points]


def training_seconds(row: dict[str, str], point: Optional[Point] = None) -> float:
    """What the epochs of a row took, up to a point or in all.

    The seconds of its cores leave out what other work takes of a CPU, though not that
    it slows this one down. A GPU has none.
    """
    point = point or curve_of(row)[-1]
    return point.cpu_seconds if row['device'] == 'cpu' else point.seconds
