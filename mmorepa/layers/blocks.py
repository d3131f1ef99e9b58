"""Which conv a network builds where, by the name of its block."""

from dataclasses import dataclass
from typing import Optional

from .dbb import DBBConv2d
from .deep_linear import DeepLinearConv2d
from .orepa import DEEP_LINEAR_FROM, OREPAConv2d
from .plain import PlainConv2d
from .reparam_conv import ReparamConv2d
from .repvgg import OREPARepVGGConv2d, RepVGGConv2d


@dataclass(frozen=True)
class BlockType:
    """The convs of one kind of network.

    Args:
        kxk (type[ReparamConv2d]): For 3×3 and 5×5 convs.
        pointwise (type[ReparamConv2d]): For 1×1 convs.
        large (type[ReparamConv2d]): For 7×7 convs and larger, the stem.
    """

    kxk: type[ReparamConv2d]
    pointwise: type[ReparamConv2d] = PlainConv2d
    large: type[ReparamConv2d] = PlainConv2d

    def conv(self, kernel_size: int) -> type[ReparamConv2d]:
        """The class for a conv of this kernel size."""
        if kernel_size == 1:
            return self.pointwise
        return self.kxk if kernel_size < DEEP_LINEAR_FROM else self.large


BLOCKS: dict[str, BlockType] = {
    'none': BlockType(PlainConv2d),
    'deep_linear': BlockType(PlainConv2d, large=DeepLinearConv2d),
    'dbb': BlockType(DBBConv2d),
    'orepa': BlockType(OREPAConv2d, OREPAConv2d, OREPAConv2d),
    'orepa_plain_stem': BlockType(OREPAConv2d, OREPAConv2d),
    'repvgg': BlockType(RepVGGConv2d),
    'orepa_repvgg': BlockType(OREPARepVGGConv2d),
}
"""Block types by name; add your own entry to use it as ``block=...``."""


def build_conv(
    block: str,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    block_cfg: Optional[dict] = None,
    **kwargs,
) -> ReparamConv2d:
    """Builds the conv that networks of this block type use.

    Args:
        block (str): A key of :data:`BLOCKS`.
        in_channels (int): I.
        out_channels (int): O.
        kernel_size (int): k.
        block_cfg (dict, optional): Arguments that only convs of this block type
            take, such as ``branches`` and ``initial_scales``; plain convs in its
            networks do without. Defaults to None.
        **kwargs: See :class:`ReparamConv2d`.

    Returns:
        ReparamConv2d: The conv.

    Raises:
        ValueError: If ``block`` is not a key of :data:`BLOCKS`.
    """
    if block not in BLOCKS:
        raise ValueError(f'unknown block {block!r}; choose one of {", ".join(BLOCKS)}')
    conv = BLOCKS[block].conv(kernel_size)
    if conv is not PlainConv2d:
        kwargs.update(block_cfg or {})
    return conv(in_channels, out_channels, kernel_size, **kwargs)
