"""Post-training quantization to INT8 by torchao, for networks that run in PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..utils.requirements import require
from .networks import DeployedNetwork, Network, as_batch, output_names


def export_program(model: nn.Module, image: Tensor) -> torch.export.ExportedProgram:
    """Exports a deployed model in eval mode as a program, for batches of any length.

    The program accepts images of the size of ``image``, (1, C, H, W).
    """
    return _export(DeployedNetwork(model).eval(), image)


@torch.no_grad()
def _export(network: nn.Module, image: Tensor) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim('batch')},)
    return torch.export.export(network, (as_batch(image),), dynamic_shapes=shapes)


def quantize_program(
    program: torch.export.ExportedProgram,
    images: Sequence[Tensor],
    reduce_range: bool = False,
) -> torch.export.ExportedProgram:
    """Quantizes a program for x86, with one scale for each output channel.

    Args:
        program (torch.export.ExportedProgram): A result of :func:`export_program`.
        images (Sequence[Tensor]): Batches of real images, for the ranges of the
            activations.
        reduce_range (bool): Whether activations have 7 bits, for x86 without VNNI.

    Returns:
        torch.export.ExportedProgram: It simulates INT8 in float. To run in INT8, import
        ``torchao.quantization.pt2e.quantizer.x86_inductor_quantizer`` and call
        ``torch.compile`` with ``freezing``.
    """
    pt2e = require('torchao.quantization.pt2e.quantize_pt2e')
    x86 = require('torchao.quantization.pt2e.quantizer.x86_inductor_quantizer')
    options = x86.get_default_x86_inductor_quantization_config(
        reduce_range=reduce_range
    )
    quantizer = x86.X86InductorQuantizer().set_global(options)
    with torch.no_grad():
        try:
            prepared = pt2e.prepare_pt2e(program.module(), quantizer)
        except ValueError as error:
            raise ValueError(
                f'torchao cannot quantize this network ({error}): it takes none whose '
                'convs run several times, as on the levels of a pyramid; let ONNX '
                'Runtime quantize it'
            ) from error
        for batch in images:
            prepared(batch)
        converted = pt2e.convert_pt2e(prepared)
    _drop_unused_tensors(converted)
    return _export(converted, images[0])


def _drop_unused_tensors(network: torch.fx.GraphModule) -> None:
    """Deletes unused float kernels, which would make the file larger."""
    used = {node.target for node in network.graph.nodes if node.op == 'get_attr'}
    for name, _ in [*network.named_parameters(), *network.named_buffers()]:
        if name not in used:
            owner, _, last = name.rpartition('.')
            delattr(network.get_submodule(owner), last)


class ProgramNetwork(Network):
    """A program as a function, quantized or not.

    The program accepts images of the size of ``image``, (1, C, H, W). It was exported
    from ``model``.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        model: nn.Module,
        image: Tensor,
        pads: bool = False,
    ) -> None:
        names = output_names(model, image)
        super().__init__(program.module(), names, tuple(image.shape[-2:]), pads)
