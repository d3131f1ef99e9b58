"""From branches to a kernel: for a forward pass, and in float64 for deployment."""

from collections.abc import Collection, Sequence
from operator import is_
from typing import Optional

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import fuse_bn
from ..utils.autocast import HALF_DTYPES, no_autocast


def fold(branches: nn.Module, memory_format: torch.memory_format) -> Tensor:
    """The kernel, (O, Ig, k, k), of a module whose ``forward()`` returns it.

    In float32 or better whatever the context says, and returned in the dtype of the
    branches: the sum of several branches loses digits in half precision, and costs
    nothing compared with the convolution itself.
    """
    tensors = list(branches.parameters()) or list(branches.buffers())
    if not tensors:  # A wrapper has put other tensors in the parameters' place.
        return branches()
    check_is_whole(tensors)
    like = tensors[0]
    with no_autocast(like.device.type):
        if like.dtype not in HALF_DTYPES:
            kernel = branches()
        else:
            wide = {k: v.float() for k, v in named_tensors(branches).items()}
            kernel = functional_call(branches, wide, ()).to(like.dtype)
        return in_memory_format(kernel, memory_format)


def fold_exactly(branches: nn.Module) -> Tensor:
    """As :func:`fold`, in float64."""
    tensors = named_tensors(branches)
    check_is_whole(tensors.values())
    wide = {name: double(tensor) for name, tensor in tensors.items()}
    return functional_call(branches, wide, ())


def in_memory_format(kernel: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A kernel by whose strides a conv gives its output this format.

    ``torch.channels_last`` has no effect where a side of 1 leaves the choice to the
    conv's input.
    """
    if memory_format == torch.channels_last:
        return kernel.contiguous(memory_format=memory_format)
    # Flat in between: with a side of 1, memory counts as contiguous although the
    # strides are those of channels last, and the output would have channels last.
    return kernel.reshape(-1).view(kernel.shape)


def is_fusible(norm: Optional[nn.Module]) -> bool:
    """Whether a normalisation layer is linear in eval mode: BatchNorm, as a rule."""
    # Without running statistics the normalisation depends on the batch.
    return isinstance(norm, _BatchNorm) and norm.track_running_stats


def fuse_norm(
    kernel: Tensor, bias: Optional[Tensor], norm: _BatchNorm
) -> tuple[Tensor, Tensor]:
    """Kernel and bias, in float64, with a norm that :func:`is_fusible` in them."""
    mean, var = double(norm.running_mean), double(norm.running_var)
    affine = (double(norm.weight), double(norm.bias)) if norm.affine else (None, None)
    return fuse_bn(kernel, bias, mean, var, *affine, norm.eps)


def norm_scale(norm: nn.Module) -> Tensor:
    """``γ/√(σ²+ε)`` of a norm that :func:`is_fusible`, (O,), without a gradient."""
    scale = (norm.running_var + norm.eps).rsqrt()
    return scale * norm.weight.detach() if norm.affine else scale


def is_sharded(tensors: Collection[Tensor]) -> bool:
    """Whether FSDP has sharded all of some parameters."""
    # By fully_shard(), or by FullyShardedDataParallel, which flattens what it shards.
    return all(
        hasattr(t, 'full_tensor') or (t.dim() < 2 and hasattr(t, '_fsdp_flattened'))
        for t in tensors
    )


def check_is_whole(tensors: Collection[Tensor]) -> None:
    """Raises a RuntimeError if FSDP has sharded these tensors of branches."""
    if is_sharded(tensors):
        raise RuntimeError(
            'the branches are sharded (FSDP) and each process has a part of them, '
            'which has no fold: gather them by torch.distributed.checkpoint.state_dict.'
            'get_model_state_dict with StateDictOptions(full_state_dict=True), and '
            'load that into a model without FSDP'
        )


def are_the_same(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether two sequences hold the same objects, and not just equal ones."""
    return len(some) == len(others) and all(map(is_, some, others))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64, without a gradient."""
    # Apple's GPUs have no float64.
    device = 'cpu' if tensor.device.type == 'mps' else tensor.device
    return tensor.detach().to(device, torch.float64)
