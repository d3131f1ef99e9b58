import logging

import pytest
import torch
from mmengine.logging import MMLogger


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
