"""How much further a training step moves a folded kernel than a plain one."""

from collections.abc import Sequence
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
        relative (float): The same over the mean of ``‖W_o‖²`` over output channels.
            A BatchNorm after the conv undoes the scale of W, and the gradient with
            respect to W shrinks as W grows: a step turns W by an angle that depends
            on this.
    """

    name: str
    kernel_size: int
    is_stem: bool
    is_plain: bool
    amplification: float
    relative: float


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
    if conv.deployed:
        raise ValueError(
            'a deployed conv has no branches; measure the training form of the network'
        )
    params = [p for p in conv.branches.parameters() if p.requires_grad]
    with torch.enable_grad():
        kernel = conv.branches()
    if isinstance(gradients, int):
        generator = torch.Generator().manual_seed(seed)
        gradients = [
            torch.randn(kernel.shape, generator=generator).to(kernel)
            for _ in range(gradients)
        ]
    moved = sum(
        sum(part.double().square().sum() for part in parts)
        for parts in (
            torch.autograd.grad(kernel, params, g, retain_graph=True) for g in gradients
        )
    )
    total = sum(gradient.double().square().sum() for gradient in gradients)
    if not total > 0:
        raise ValueError('amplification needs a gradient that is not zero')
    return (moved / total).item()


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
        found = amplification(conv, draws if gradients is None else gradients[name])
        square = conv.kernel().detach().double().square().flatten(1).sum(1).mean()
        layers.append(
            LayerAmplification(
                name,
                conv.kernel_size[0],
                name.split('.')[0] == 'stem',
                is_plain(conv),
                found,
                found / square.item(),
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
    model: nn.Module, batches: Sequence[Any]
) -> dict[str, list[Tensor]]:
    """The gradients of the training loss with respect to folded kernels.

    Args:
        model (nn.Module): A whole model in training form with a ``backbone``. Its
            BatchNorm statistics move, as in training.
        batches (Sequence): Batches as the training dataloader yields them.

    Returns:
        dict[str, list[Tensor]]: By the conv's name in the backbone, one of each
        batch.
    """
    # The mode first: setting it empties what folded() serves.
    model.train()
    convs = folded_convs(model.backbone)
    found: dict[str, list[Tensor]] = {name: [] for name, _ in convs}
    for batch in batches:
        model.zero_grad()
        with folded(model):
            kernels = [conv.kernel() for _, conv in convs]
            for kernel in kernels:
                kernel.retain_grad()
            data = model.data_preprocessor(batch, True)
            losses = model(**data, mode='loss')
            model.parse_losses(losses)[0].backward()
        for (name, _), kernel in zip(convs, kernels):
            found[name].append(kernel.grad.clone())
    return found


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
