"""Re-parameterised convolutions, and what folds and deploys them."""

from .blocks import BLOCKS, build_conv
from .dbb import DBBConv2d
from .deep_linear import DeepLinearConv2d, DeepLinearKernel
from .folded_kernel import FoldedKernel
from .holding import HeldKernel, backward_to_branches, folded, held
from .memory_format import faster_in_channels_last, set_channels_last
from .multi_branch import MultiBranchConv2d
from .orepa import (
    OREPAConv2d,
    OREPADeepLinearKernel,
    OREPAKernel,
    OREPAPointwiseKernel,
)
from .param_groups import param_groups
from .plain import PlainConv2d, PlainKernel
from .plain_start import build_reparameterized, log_plain_starts, reparameterize
from .reparam_conv import ReparamConv2d
from .repvgg import OREPARepVGGConv2d, RepVGGConv2d
from .switch import ConvAct2d, is_switchable, outermost, switch_to_deploy

# Their older names.
pull_back, tell_plain_starts = backward_to_branches, log_plain_starts

__all__ = [
    'BLOCKS',
    'ConvAct2d',
    'DBBConv2d',
    'DeepLinearConv2d',
    'DeepLinearKernel',
    'FoldedKernel',
    'HeldKernel',
    'MultiBranchConv2d',
    'OREPAConv2d',
    'OREPADeepLinearKernel',
    'OREPAKernel',
    'OREPAPointwiseKernel',
    'OREPARepVGGConv2d',
    'PlainConv2d',
    'PlainKernel',
    'RepVGGConv2d',
    'ReparamConv2d',
    'build_conv',
    'build_reparameterized',
    'faster_in_channels_last',
    'folded',
    'held',
    'is_switchable',
    'outermost',
    'param_groups',
    'backward_to_branches',
    'reparameterize',
    'set_channels_last',
    'switch_to_deploy',
    'log_plain_starts',
]
