import logging
import os

# Thousands of small tensors: a second thread costs them more than it gives, and a
# worker for each core shares the tests out. Before PyTorch is loaded.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope


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
def log():
    """What MMEngine's logger is told."""

    class Handler(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    texts = []
    logger, handler = MMLogger.get_current_instance(), Handler(logging.INFO)
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)
