"""Folds branches into a kernel: for a forward pass, or in float64 for deployment."""

from collections.abc import Collection, Sequence
from operator import is_
from typing import Optional

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..utils.autocast import HALF_DTYPES, no_autocast


def fold(branches: nn.Module, memory_format: torch.memory_format) -> Tensor:
    """The kernel, (O, Ig, k, k), of a module whose ``forward()`` returns it.

    It is computed in float32 or float64, also under autocast, and returned in the dtype
    of the branches. In half precision, a sum of several branches loses digits, and the
    fold costs little compared with the convolution.
    """
    tensors = list(branches.parameters()) or list(branches.buffers())
    if not tensors:  # A wrapper has replaced the parameters by other tensors.
        return branches()
    check_not_sharded(tensors)
    like = tensors[0]
    with no_autocast(like.device.type):
        if like.dtype not in HALF_DTYPES:
            kernel = branches()
        else:
            wide = {k: v.float() for k, v in named_tensors(branches).items()}
            kernel = functional_call(branches, wide, ()).to(like.dtype)
        return in_memory_format(kernel, memory_format)


def fold_exactly(branches: nn.Module) -> Tensor:
    """The kernel in float64, (O, Ig, k, k), without a gradient."""
    tensors = named_tensors(branches)
    check_not_sharded(tensors.values())
    wide = {name: to_float64(tensor) for name, tensor in tensors.items()}
    return functional_call(branches, wide, ())


def in_memory_format(kernel: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The kernel with strides that make a conv give its output this format.

    ``torch.channels_last`` has no effect on a kernel with a side of 1 if the strides
    fit both formats: then the conv follows its input.
    """
    if memory_format == torch.channels_last:
        return kernel.contiguous(memory_format=memory_format)
    # With a side of 1, strides of channels last count as contiguous too, and the output
    # would have channels last. A flat view in between gives the default strides.
    return kernel.reshape(-1).view(kernel.shape)


def is_fusible(norm: Optional[nn.Module]) -> bool:
    """Whether a normalisation layer is linear in eval mode: BatchNorm, as a rule."""
    # A norm without running statistics depends on the batch.
    return isinstance(norm, _BatchNorm) and norm.track_running_stats


def fuse_norm(
    kernel: Tensor, bias: Optional[Tensor], norm: _BatchNorm
) -> tuple[Tensor, Tensor]:
    """Kernel and bias in float64 after fusing a norm that :func:`is_fusible`."""
    statistics = to_float64(norm.running_mean), to_float64(norm.running_var), norm.eps
    affine = [p if p is None else to_float64(p) for p in (norm.weight, norm.bias)]
    kernel, bias = fuse_conv_bn_weights(kernel, bias, *statistics, *affine)
    return kernel.detach(), bias.detach()


def norm_scale(norm: nn.Module) -> Tensor:
    """``γ/√(σ²+ε)`` of a norm that :func:`is_fusible`, (O,), without a gradient."""
    scale = (norm.running_var + norm.eps).rsqrt()
    return scale * norm.weight.detach() if norm.affine else scale


def is_sharded(tensors: Collection[Tensor]) -> bool:
    """Whether FSDP has sharded all of these parameters."""
    # fully_shard() makes DTensors, and FullyShardedDataParallel makes flat parameters.
    return all(
        hasattr(t, 'full_tensor') or (t.dim() < 2 and hasattr(t, '_fsdp_flattened'))
        for t in tensors
    )


def check_not_sharded(tensors: Collection[Tensor]) -> None:
    """Raises a RuntimeError if FSDP has sharded these tensors of branches."""
    if is_sharded(tensors):
        raise RuntimeError(
            'the branches are sharded (FSDP) and each process has a part of them, '
            'which has no fold: gather them by torch.distributed.checkpoint.state_dict.'
            'get_model_state_dict with StateDictOptions(full_state_dict=True), and '
            'load that into a model without FSDP'
        )


def same_objects(first: Sequence[object], second: Sequence[object]) -> bool:
    """Whether two sequences hold the same objects, and not just equal ones."""
    return len(first) == len(second) and all(map(is_, first, second))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, without a gradient."""
    # Apple's GPUs have no float64.
    device = 'cpu' if tensor.device.type == 'mps' else tensor.device
    return tensor.detach().to(device, torch.float64)
