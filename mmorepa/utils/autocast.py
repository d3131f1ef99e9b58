"""Full precision where the context asks for mixed precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

HALF_DTYPES = (torch.float16, torch.bfloat16)


def no_autocast(device_type: str) -> AbstractContextManager:
    """A context without autocast, for a device as ``tensor.device.type``."""
    if device_type == 'meta':  # It has no autocast.
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
