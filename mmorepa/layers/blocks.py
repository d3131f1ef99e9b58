"""The block types, and the convs that networks of each block type use."""

from typing import Optional, Union

from mmengine.registry import MODELS, Registry

from .conv import ReparamConv2d


class _Blocks(Registry):
    """Registers a conv under the name of its block type, and for ``conv_cfg``."""

    def _register_module(
        self,
        module: type[ReparamConv2d],
        module_name: Union[str, list[str], None] = None,
        force: bool = False,
    ) -> None:
        # Do this first: if the class name is taken, no block type is registered.
        is_known = MODELS.module_dict.get(module.__name__) is module
        MODELS.register_module(module=module, force=force or is_known)
        super()._register_module(module, module_name, force)


BLOCKS = _Blocks('block', scope='mmorepa')
"""Block types by name, for ``block=...``. Each conv is also a type of ``conv_cfg``.

Examples:
    >>> @BLOCKS.register_module('cross')
    ... class CrossConv2d(ReparamConv2d): ...
"""


def conv_type(block: str, kernel_size: int) -> type[ReparamConv2d]:
    """The class of the convs of one kernel size in networks of a block type.

    Sizes outside of the block type's :attr:`~ReparamConv2d.BLOCK_SIZES` give the plain
    class. Raises a ValueError for an unknown block type.
    """
    types = BLOCKS.module_dict
    if not isinstance(block, str) or block not in types:
        raise ValueError(f'unknown block {block!r}; choose one of {", ".join(types)}')
    return types[block if kernel_size in types[block].BLOCK_SIZES else 'plain']


def build_conv(
    block: str,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    block_cfg: Optional[dict] = None,
    **kwargs,
) -> ReparamConv2d:
    """Builds a conv as networks of a block type use it.

    Args:
        block (str): A name in :data:`BLOCKS`.
        in_channels, out_channels, kernel_size, **kwargs: See :class:`ReparamConv2d`.
        block_cfg (dict, optional): Arguments for convs of this block type, such as
            ``branches`` and ``initial_scales``. Plain convs in its networks do not
            get these. Defaults to None.

    Raises:
        ValueError: If ``block`` is not in :data:`BLOCKS`.
    """
    conv = conv_type(block, kernel_size)
    if conv is not BLOCKS.module_dict['plain']:
        kwargs.update(block_cfg or {})
    return conv(in_channels, out_channels, kernel_size, **kwargs)
