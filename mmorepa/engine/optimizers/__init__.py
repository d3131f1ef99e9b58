"""Optimizer wrappers and their constructor."""

from .bfloat16_optim_wrapper import BFloat16OptimWrapper
from .constructor import OREPAOptimWrapperConstructor
from .folded_optim_wrapper import (
    FoldedAmpOptimWrapper,
    FoldedBFloat16OptimWrapper,
    FoldedOptimWrapper,
)

__all__ = [
    'BFloat16OptimWrapper',
    'FoldedAmpOptimWrapper',
    'FoldedBFloat16OptimWrapper',
    'FoldedOptimWrapper',
    'OREPAOptimWrapperConstructor',
]
