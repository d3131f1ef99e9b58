"""Formulas for kernels of linear branches and their compositions, and an inverse.

Every kernel is a cross-correlation weight as :func:`torch.nn.functional.conv2d`
takes it. Shapes use ``O``/``I`` for output/input channels, ``g`` for groups,
``Ig = I / g`` and ``k`` for the (square) kernel size. All functions are
differentiable, keep the dtype and device of their arguments, and hold no state.

The formulas are those of "Online Convolutional Re-parameterization" (Hu et al.,
CVPR 2022), sections 3.2 and 3.3.
"""

import math
from collections.abc import Callable, Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_constants: dict[tuple, Tensor] = {}


def cached_constant(make: Callable[..., Tensor], *args, like: Tensor) -> Tensor:
    """``make(*args, dtype, device)``, cached. Do not write to the result.

    A buffer of a module would not do for constants: ``to_empty()`` would not write its
    values, and ``half()`` would round them for good.

    Args:
        make (Callable): Takes a dtype and a device after its other arguments.
        *args: The other arguments of ``make``.
        like (Tensor): A tensor with the wanted dtype and device.
    """
    # Do not cache for fake tensors. A compiler must trace how the constant is made,
    # because PyTorch 2.6 cannot read the cache. The second run of torch.jit.trace must
    # record the same operations as the first.
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if type(like) not in (Tensor, nn.Parameter) or is_traced:
        return make(*args, like.dtype, like.device)
    key = (make, args, like.dtype, like.device)
    made = _constants.get(key)
    if made is None:
        with torch.inference_mode(False), torch.no_grad():
            made = make(*args, like.dtype, like.device)
        if type(made) is Tensor:  # A fake mode would make a fake tensor.
            _constants[key] = made
    return made


def embed_1x1(weight: Tensor, kernel_size: int) -> Tensor:
    """Zero-pads a kernel from (O, Ig, 1, 1) to (O, Ig, k, k), with an odd k."""
    return F.pad(weight, [kernel_size // 2] * 4)


def average_kernel(weight: Tensor, kernel_size: int) -> Tensor:
    """A 1×1 conv, shape (O, Ig, 1, 1), then k×k average pooling: (O, Ig, k, k).

    ``K[o, i] = weight[o, i] / k²``
    """
    scaled = weight / kernel_size**2
    return scaled.expand(-1, -1, kernel_size, kernel_size)


def frequency_prior(
    channels: int,
    kernel_size: int,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> Tensor:
    """Fixed cosine filters, one per output channel.

    The first half of the rows varies along the height,
    ``prior[o, h, w] = cos(π (h + ½) (o + 1) / k)``; the second half along the
    width, ``prior[o, h, w] = cos(π (w + ½) (o + 1 − O/2) / k)``. Shape (O, k, k).
    """
    half = channels / 2
    frequencies = [row + 1 - (half if row >= half else 0) for row in range(channels)]
    taps = [tap + 0.5 for tap in range(kernel_size)]
    # Only this order of operations gives the filters in published checkpoints to the
    # last bit.
    waves = [
        [math.cos(math.pi * t * f / kernel_size) for t in taps] for f in frequencies
    ]
    filters = torch.tensor(waves, dtype=torch.float64)
    along_height = filters[:, :, None].expand(-1, -1, kernel_size)
    is_first = torch.arange(channels)[:, None, None] < half
    prior = torch.where(is_first, along_height, along_height.transpose(1, 2))
    return prior.to(dtype=dtype or torch.get_default_dtype(), device=device)


def filtered_kernel(weight: Tensor, filters: Tensor) -> Tensor:
    """A 1×1 conv, shape (O, Ig, 1, 1), then a filter per output, shape (O, k, k).

    ``K[o, i] = weight[o, i] · filters[o]``
    """
    return weight * filters[:, None]


def identity_1x1(
    rows: int,
    columns: int,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> Tensor:
    """A 1×1 kernel that repeats the input of a group: ``E[t, t mod columns] = 1``.

    Returns shape (rows, columns, 1, 1): outputs of all groups, inputs of one group.
    """
    eye = torch.eye(columns, dtype=dtype, device=device)
    return eye.repeat(rows // columns, 1)[:, :, None, None]


def compose_1x1_kxk(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """A 1×1 conv followed by a k×k conv (k = 1 included).

    Within each group, ``K[o, i] = Σ_t second[o, t] · first[t, i]``.

    Args:
        first (Tensor): Shape (T, Ig, 1, 1), the 1×1 conv that runs first.
        second (Tensor): Shape (O, T/g, k, k); the kernel is of (O, Ig, k, k).
        groups (int): g, the groups of both convs. Defaults to 1.
    """
    inputs = first.shape[1]
    outputs, hidden, *taps = second.shape
    kernel = torch.einsum(
        'gotk,gti->goik',
        second.reshape(groups, outputs // groups, hidden, -1),
        first.reshape(groups, hidden, inputs),
    )
    return kernel.reshape(outputs, inputs, *taps)


def depthwise_separable_kernel(
    depthwise: Tensor, pointwise: Tensor, groups: int = 1, expansion: int = 8
) -> Tensor:
    """A depthwise k×k conv that makes m maps of each input, then a 1×1 conv.

    ``K[o, i] = Σ_{t<m} pointwise[o, i·m + t] · depthwise[i·m + t]``. In the columns
    of ``pointwise``, ``i`` counts the inputs of the group of ``o``. In the rows of
    ``depthwise``, ``i`` counts the inputs of all groups.

    Args:
        depthwise (Tensor): Shape (m·I, 1, k, k); the kernel is of (O, Ig, k, k).
        pointwise (Tensor): Shape (O, m·Ig, 1, 1).
        groups (int): g, the groups of the 1×1 conv. Defaults to 1.
        expansion (int): m. Defaults to 8, as in the paper.
    """
    outputs, columns = pointwise.shape[:2]
    taps = depthwise.shape[-2:]
    inputs = columns // expansion
    kernel = torch.einsum(
        'goim,gimk->goik',
        pointwise.reshape(groups, outputs // groups, inputs, expansion),
        depthwise.reshape(groups, inputs, expansion, -1),
    )
    return kernel.reshape(outputs, inputs, *taps)


def compose_deep_linear(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """Composes two kernels into a larger one: one step of a deep linear stem.

    Within each group, ``K[o, i] = Σ_m second[o, m] ⋆ first[m, i]``. Here ``⋆`` is
    the full *cross-correlation* of the two kernels, so ``second`` acts as if it were
    flipped. Published checkpoints use this order.

    Args:
        first (Tensor): Shape (M, Ig, j, j).
        second (Tensor): Shape (O, M/g, k, k). Both give (O, Ig, j + k − 1, j + k − 1).
        groups (int): g, the groups of both convs. Defaults to 1.
    """
    mid, inputs, *size = first.shape
    # The input channels of a group become the batch, and the groups of `first` become
    # the channels of a grouped conv.
    images = first.reshape(groups, mid // groups, inputs, *size)
    images = images.permute(2, 0, 1, 3, 4).reshape(inputs, mid, *size)
    padding = [second.shape[-1] - 1] * 2
    return F.conv2d(images, second, padding=padding, groups=groups).transpose(0, 1)


def solve_deep_linear(kernel: Tensor, first: Tensor, groups: int = 1) -> Tensor:
    """Solves ``compose_deep_linear(first, second, groups) = kernel`` for ``second``.

    Each output channel is a separate linear system. The taps of ``second`` are the
    unknowns, and each tap of ``kernel`` is an equation. Returns the smallest solution
    (least squares, in float64), shape (O, M/g, k − j + 1, k − j + 1).

    Args:
        kernel (Tensor): Shape (O, Ig, k, k).
        first (Tensor): Shape (M, Ig, j, j), j < k.
        groups (int): g, the groups of both convs. Defaults to 1.

    Raises:
        ValueError: If there is no solution, for example because M is small.
    """
    kernel, first = kernel.double(), first.double()
    hidden, size = len(first) // groups, kernel.shape[-1] - first.shape[-1] + 1
    weights, unknowns = kernel[0].numel(), hidden * size**2
    if unknowns < weights:  # Refuse this before minutes of work.
        raise _too_narrow(hidden, weights, unknowns)
    units = torch.eye(unknowns, dtype=torch.float64, device=kernel.device)
    units = units.view(unknowns, hidden, size, size)
    solutions = []
    for first_of_group, wanted in zip(first.chunk(groups), kernel.chunk(groups)):
        system = compose_deep_linear(first_of_group, units).flatten(1)
        # Solve on the CPU: only its solver knows the rank.
        inverse = torch.linalg.pinv(system.cpu()).to(system)
        solution = wanted.flatten(1) @ inverse
        error = (solution @ system - wanted.flatten(1)).abs().max()
        if error > 1e-6 * wanted.abs().max():
            rank = int(torch.linalg.matrix_rank(system.cpu()))
            raise _too_narrow(hidden, weights, min(rank, weights - 1))
        solutions.append(solution.view(-1, hidden, size, size))
    return torch.cat(solutions)


def _too_narrow(hidden: int, weights: int, free: int) -> ValueError:
    return ValueError(
        'a deep linear kernel cannot be any kernel if its factors are narrow '
        f'({hidden} channels in a group): of {weights} weights of an output channel, '
        f'{free} can be chosen freely, and all of them with more inner channels '
        '(inner_mult)'
    )


def constant_response(kernel: Tensor, constants: Tensor, groups: int = 1) -> Tensor:
    """The response of a conv to constant maps, borders included.

    ``r[o] = Σ_i Σ_{h,w} kernel[o, i, h, w] · constants[i]`` within each group, with a
    kernel of shape (O, Ig, k, k) and constants of shape (I,). In this way, the bias of
    one conv passes through the next conv.
    """
    outputs, inputs = kernel.shape[:2]
    weights = kernel.sum(dim=(2, 3)).reshape(groups, outputs // groups, inputs)
    return torch.einsum('goi,gi->go', weights, constants.reshape(groups, -1)).flatten()


def scaled_sum(kernels: Sequence[Tensor], scales: Tensor) -> Tensor:
    """The linear scaling layers: ``K[o] = Σ_b scales[b, o] · kernels[b][o]``."""
    terms = zip(scales[:, :, None, None, None].unbind(), kernels)
    total: Tensor = sum(scale * kernel for scale, kernel in terms)  # type: ignore
    return total
