"""Re-parameterised convolutions: parameters, and the life that they share."""

from .blocks import BLOCKS, BlockType, build_conv
from .orepa import (
    OREPAConv2d,
    OREPADeepLinearKernel,
    OREPAKernel,
    OREPAPointwiseKernel,
)
from .plain import PlainConv2d, PlainKernel
from .reparam_conv import ReparamConv2d
from .switch import is_switchable, switch_to_deploy

__all__ = [
    'BLOCKS',
    'BlockType',
    'OREPAConv2d',
    'OREPADeepLinearKernel',
    'OREPAKernel',
    'OREPAPointwiseKernel',
    'PlainConv2d',
    'PlainKernel',
    'ReparamConv2d',
    'build_conv',
    'is_switchable',
    'switch_to_deploy',
]
