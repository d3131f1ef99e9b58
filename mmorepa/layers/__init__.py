"""Re-parameterised convolutions, and functions that fold and deploy them."""

from .blocks import BLOCKS, build_conv
from .branch_kernel import BranchKernel
from .capture import RecordedFolds
from .conv import ReparamConv2d
from .dbb import DBBConv2d
from .deep_linear import DeepLinearConv2d, DeepLinearKernel
from .exchange import (
    add_branches,
    build_with_branches,
    log_plain_starts,
    reparameterize,
)
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
from .repvgg import OREPARepVGGConv2d, RepVGGConv2d
from .scopes import KernelLeaf, backward_to_branches, folded, held
from .switch import ConvAct2d, is_switchable, outermost, switch_to_deploy

__all__ = [
    'BLOCKS',
    'ConvAct2d',
    'DBBConv2d',
    'DeepLinearConv2d',
    'DeepLinearKernel',
    'BranchKernel',
    'KernelLeaf',
    'MultiBranchConv2d',
    'OREPAConv2d',
    'OREPADeepLinearKernel',
    'OREPAKernel',
    'OREPAPointwiseKernel',
    'OREPARepVGGConv2d',
    'PlainConv2d',
    'PlainKernel',
    'RepVGGConv2d',
    'RecordedFolds',
    'ReparamConv2d',
    'build_conv',
    'build_with_branches',
    'faster_in_channels_last',
    'folded',
    'held',
    'is_switchable',
    'outermost',
    'param_groups',
    'reparameterize',
    'backward_to_branches',
    'add_branches',
    'set_channels_last',
    'switch_to_deploy',
    'log_plain_starts',
]
