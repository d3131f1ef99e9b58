"""Counts parameters, bytes and multiply-adds of a network."""

import torch
from mmengine.analysis import FlopAnalyzer
from torch import Tensor, nn

from ..layers import ReparamConv2d, folded
from .comparison import network_outputs


class RawNetwork(nn.Module):
    """A model as a function of an image batch: see :func:`network_outputs`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Maps (N, C, H, W) to the raw outputs."""
        return tuple(network_outputs(self.model, inputs))


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, trained or not."""
    return sum(param.numel() for param in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """The bytes of all tensors in the state dict of a model."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def count_gflops(model: nn.Module, inputs: Tensor) -> float:
    """Multiply-adds of one forward pass in eval mode, in units of 1e9, as in papers.

    ``inputs`` have the shape (1, C, H, W). The fold of a training form is not counted,
    since one fold serves many forward passes.
    """
    analyzer = FlopAnalyzer(RawNetwork(model).eval(), (inputs,))
    # Do not warn of losses, which do not run, or of additions, which nobody counts.
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad(), folded(model, in_traces=True):
        for module in model.modules():
            if isinstance(module, ReparamConv2d) and module.folds_online:
                module.kernel()  # Otherwise the trace would record the fold.
        return analyzer.total() / 1e9
