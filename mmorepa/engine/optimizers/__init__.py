"""Optimizer wrappers and their constructor."""

from .bfloat16_optim_wrapper import BFloat16OptimWrapper
from .constructor import OREPAOptimWrapperConstructor

__all__ = ['BFloat16OptimWrapper', 'OREPAOptimWrapperConstructor']
