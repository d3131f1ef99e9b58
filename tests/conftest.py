import logging
import os

# Thousands of small tensors: a second thread costs them more than it gives, and a
# worker for each core shares the tests out. Before PyTorch is loaded.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import distributed

from mmorepa.layers import BLOCKS


def pytest_configure():
    """Lets tests fork in any order.

    At its first backward, PyTorch starts a thread for each GPU, and forbids autograd in
    what is forked from then on. An export before it pretends that there is a GPU.
    """
    if not torch.cuda.is_available():
        torch.ones((), requires_grad=True).backward()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_scope_of_others():
    """Forgets the default scope that a runner leaves, by which registries choose."""
    DefaultScope._instance_dict.clear()


@pytest.fixture
def float64():
    """Builds everything in float64, where rounding hides no mistake."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def log(monkeypatch):
    """What MMEngine's loggers are told."""
    texts, handle = [], MMLogger.callHandlers

    def call_handlers(logger, record):
        if record.levelno >= logging.INFO:
            texts.append(record.getMessage())
        handle(logger, record)

    monkeypatch.setattr(MMLogger, 'callHandlers', call_handlers)
    return texts


@pytest.fixture
def registries():
    """Models and blocks are registered as before, after the test."""
    before = [(registry, dict(registry._module_dict)) for registry in (BLOCKS, MODELS)]
    yield
    for registry, modules in before:
        registry._module_dict.clear()
        registry._module_dict.update(modules)


@pytest.fixture
def one_process(monkeypatch):
    """A process group of this process alone."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    # MMEngine would set these, for the tests that follow, too.
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('MKL_NUM_THREADS', '1')
    distributed.init_process_group(
        'gloo', store=distributed.HashStore(), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()
