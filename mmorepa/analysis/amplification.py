"""How much further a training step moves a folded kernel than a plain one."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import geometric_mean
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..backbones import StagedBackbone
from ..layers import MultiBranchConv2d, ReparamConv2d, folded


class LayerAmplification(NamedTuple):
    """The amplification of one conv.

    Args:
        name (str): The conv's name in its network.
        kernel_size (int): k.
        is_stem (bool): Whether it belongs to the stem.
        is_plain (bool): Whether its kernel is a parameter, so that the
            amplification is 1 by definition.
        amplification (float): See :func:`amplification`.
        relative (float): The geometric mean of ``each``.
        each (tuple[float, ...]): What :func:`relative_amplifications` found for each
            gradient.
    """

    name: str
    kernel_size: int
    is_stem: bool
    is_plain: bool
    amplification: float
    relative: float
    each: tuple[float, ...]


def amplification(
    conv: ReparamConv2d, gradients: Sequence[Tensor] | int, seed: int = 0
) -> float:
    """How much further than a plain conv's an SGD step moves this conv's kernel.

    With ``W = fold(θ)``, a step ``−lr·Jᵀ·G`` on θ, where J is the Jacobian of the
    fold and G the gradient with respect to W, moves W by ``−lr·J·Jᵀ·G`` to first
    order; a plain conv's moves by ``−lr·G``. The result is the part of it along G,

    Equation: ``⟨G, J·Jᵀ·G⟩ / ⟨G, G⟩ = ‖Jᵀ·G‖² / ‖G‖²``,

    as the quotient of the sums over all G. For random G it estimates
    ``trace(J·Jᵀ) / dim(W)``, the mean over all directions.

    Args:
        conv (ReparamConv2d): In training form, with branches that are folded, not
            run on the feature map.
        gradients (Sequence[Tensor] | int): Gradients G, each of the kernel's shape,
            or how many Gaussian ones to draw.
        seed (int): Of these draws. Defaults to 0.

    Returns:
        float: 1 for a plain conv.

    Raises:
        ValueError: If the conv is deployed, or there is no gradient but zero.
    """
    _check_has_branches(conv)
    if isinstance(gradients, int):
        gradients = _draws(conv, gradients, seed)
    total = sum(gradient.double().square().sum() for gradient in gradients)
    if not total > 0:
        raise ValueError('amplification needs a gradient that is not zero')
    return (sum(_squares(conv, gradients)) / total).item()


def relative_amplifications(
    conv: ReparamConv2d, gradients: Sequence[Tensor] | int, seed: int = 0
) -> list[float]:
    """How fast a network learns through this conv, whatever the scale of its kernel.

    A BatchNorm after the conv undoes the scale of each output channel: the network
    sees ``w_o = W_o / ‖W_o‖``, and the gradient with respect to that is
    ``g_o = ‖W_o‖ · G_o``. An SGD step lowers the loss by ``lr · ‖Jᵀ·G‖²`` to first
    order, and one on w itself would by ``lr · ‖g‖²``. The result is their quotient, the
    effective learning rate of w over that of the optimizer:

    Equation: ``‖Jᵀ·G‖² / Σ_o ‖W_o‖²·‖G_o‖²``,

    for a plain conv an average of ``1 / ‖W_o‖²`` over its output channels.

    Args:
        conv (ReparamConv2d): As for :func:`amplification`.
        gradients (Sequence[Tensor] | int): Gradients G, each of the kernel's shape, or
            how many random ones to draw, which are Gaussian in g.
        seed (int): Of these draws. Defaults to 0.

    Returns:
        list[float]: One for each gradient.

    Raises:
        ValueError: If the conv is deployed, or a gradient is zero.
    """
    _check_has_branches(conv)
    sizes = conv.folded_kernel().detach().double().square().flatten(1).sum(1)
    if isinstance(gradients, int):
        factors = sizes.clamp_min(1e-30).rsqrt()[:, None, None, None]
        gradients = [g * factors.to(g) for g in _draws(conv, gradients, seed)]
    totals = [
        (sizes * gradient.double().square().flatten(1).sum(1)).sum()
        for gradient in gradients
    ]
    if not all(total > 0 for total in totals):
        raise ValueError('amplification needs gradients that are not zero')
    moved = _squares(conv, gradients)
    return [(one / total).item() for one, total in zip(moved, totals)]


def _check_has_branches(conv: ReparamConv2d) -> None:
    if conv.deployed:
        raise ValueError(
            'a deployed conv has no branches; measure the training form of the network'
        )


def _draws(conv: ReparamConv2d, number: int, seed: int) -> list[Tensor]:
    """Gaussian gradients of the kernel's shape."""
    like = next(conv.branches.parameters())
    shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(like) for _ in range(number)]


def _squares(conv: ReparamConv2d, gradients: Sequence[Tensor]) -> list[Tensor]:
    """``‖Jᵀ·G‖²`` of each gradient, in float64."""
    params = [p for p in conv.branches.parameters() if p.requires_grad]
    with torch.enable_grad():
        kernel = conv.branches()
    return [
        sum(
            part.double().square().sum()
            for part in torch.autograd.grad(kernel, params, g, retain_graph=True)
        )
        for g in gradients
    ]


def backbone_amplifications(
    backbone: StagedBackbone,
    draws: int,
    gradients: Optional[dict[str, list[Tensor]]] = None,
) -> list[LayerAmplification]:
    """The amplification of every conv of a backbone.

    Args:
        backbone (StagedBackbone): In training form.
        draws (int): Gaussian gradients for each conv.
        gradients (dict[str, list[Tensor]], optional): Those to use in their place,
            by the conv's name. Defaults to None.

    Returns:
        list[LayerAmplification]: In the order of the network. Blocks that run their
        branches on the feature map are left out, since no kernel is folded; the
        convs in their branches are there.
    """
    layers = []
    for name, conv in folded_convs(backbone):
        own = draws if gradients is None else gradients[name]
        each = relative_amplifications(conv, own)
        layers.append(
            LayerAmplification(
                name,
                conv.kernel_size[0],
                name.split('.')[0] == 'stem',
                is_plain(conv),
                amplification(conv, own),
                geometric_mean(each),
                tuple(each),
            )
        )
    return layers


def folded_convs(network: nn.Module) -> list[tuple[str, ReparamConv2d]]:
    """Names and convs whose kernel is folded from parameters."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, ReparamConv2d)
        and not isinstance(module, MultiBranchConv2d)
    ]


def is_plain(conv: ReparamConv2d) -> bool:
    """Whether the kernel is itself the only parameter."""
    params = list(conv.branches.parameters())
    return len(params) == 1 and params[0] is conv.branches()


def kernel_gradients(
    model: nn.Module, batches: Iterable[Any]
) -> Iterator[dict[str, Tensor]]:
    """The gradients of the training loss with respect to folded kernels.

    Args:
        model (nn.Module): A whole model in training form with a ``backbone``. Its
            BatchNorm statistics move, as in training.
        batches (Iterable): Batches as the training dataloader yields them.

    Yields:
        dict[str, Tensor]: By the conv's name in the backbone, for each batch.
    """
    # The mode first: setting it empties what folded() serves.
    model.train()
    convs = folded_convs(model.backbone)
    for batch in batches:
        model.zero_grad()
        with folded(model):
            kernels = {name: conv.kernel() for name, conv in convs}
            for kernel in kernels.values():
                kernel.retain_grad()
            data = model.data_preprocessor(batch, True)
            losses = model(**data, mode='loss')
            model.parse_losses(losses)[0].backward()
        yield {name: kernel.grad.clone() for name, kernel in kernels.items()}


class Distribution(NamedTuple):
    """Statistics of the weights of a kernel.

    Args:
        std (float): Standard deviation.
        kurtosis (float): Excess kurtosis: 0 for Gaussian, more for heavier tails.
        largest (float): The largest absolute value.
    """

    std: float
    kurtosis: float
    largest: float


def distribution(weights: Tensor) -> Distribution:
    """Describes the distribution of all entries of a tensor.

    Args:
        weights (Tensor): Any shape.

    Returns:
        Distribution: Its statistics.
    """
    weights = weights.detach().double().flatten()
    centred = weights - weights.mean()
    variance = centred.square().mean()
    return Distribution(
        variance.sqrt().item(),
        (centred.pow(4).mean() / variance.square() - 3).item(),
        weights.abs().max().item(),
    )
