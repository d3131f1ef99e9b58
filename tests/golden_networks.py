"""The published networks in tests/goldens, with weights made up from their keys."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDENS = Path(__file__).parent / 'goldens'
NAMES = ('resnet18-orepa', 'repvgg-a0-orepa')


def golden_shapes(name, form='training'):
    """The shapes of the published checkpoint, by key; or of the ``'deployed'`` one."""
    forms = json.loads((GOLDENS / f'{name}.json').read_text())
    return {key: tuple(shape) for key, shape in forms[form].items()}


def golden_state(name):
    """The training form that the golden outputs belong to."""
    return {key: _entry(key, shape) for key, shape in golden_shapes(name).items()}


def golden_input():
    images = np.random.default_rng(2022).standard_normal((2, 3, 64, 64))
    return torch.from_numpy(images).float()


def golden_outputs(name):
    """The outputs of the four stages, and the logits."""
    outputs = np.load(GOLDENS / f'{name}.npz')
    assert len(outputs) == 5
    names = 'stage1', 'stage2', 'stage3', 'stage4', 'logits'
    return [torch.from_numpy(outputs[name]) for name in names]


def _entry(key, shape):
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    name = key.rsplit('.', 1)[-1]
    if name == 'num_batches_tracked':
        return torch.tensor(100)
    if name.endswith('_avg_avg'):
        value = np.full(shape, 1 / 9)
    elif name.endswith('_prior'):
        o, h, w = np.indices(shape)
        half = shape[0] / 2
        angle = np.where(o < half, (h + 0.5) * (o + 1), (w + 0.5) * (o + 1 - half))
        value = np.cos(math.pi * angle / 3)
    elif name == 'id_tensor':
        value = np.zeros(shape)
        value[np.arange(shape[0]), np.arange(shape[0]) % shape[1]] = 1
    elif name == 'running_var':
        value = rng.uniform(0.5, 1.5, shape)
    elif name in ('running_mean', 'bias'):
        value = 0.1 * rng.standard_normal(shape)
    elif name == 'vector':
        value = rng.uniform(0.1, 0.6, shape)
    elif name == 'weight' and len(shape) == 1:
        value = rng.uniform(0.4, 0.9, shape)
    else:
        value = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(value).float()
