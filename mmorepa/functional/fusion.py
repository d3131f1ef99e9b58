"""Folding of a normalisation layer into the convolution before it."""

from typing import Optional

from torch import Tensor


def fuse_bn(
    kernel: Tensor,
    bias: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    gamma: Optional[Tensor],
    beta: Optional[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A conv followed by BatchNorm in eval mode, as one conv with bias.

    ``kernel' = kernel · γ/√(σ²+ε)``, ``bias' = β + (bias − μ) · γ/√(σ²+ε)``

    The kernel has the shape (O, Ig, k, k), all others (O,): the running mean μ and
    variance σ², the weight γ (None for ones), and the biases (None for zeros).
    """
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = -mean if bias is None else bias - mean
    fused_bias = shift * scale
    if beta is not None:
        fused_bias = fused_bias + beta
    return kernel * scale[:, None, None, None], fused_bias
