"""Hooks, optimizer wrappers and a model wrapper for MMEngine's runner."""

from .distributed import FoldedDistributedDataParallel
from .hooks.branch_statistics_hook import BranchStatisticsHook
from .hooks.crash_safe_hook import CrashSafeHook
from .hooks.equivalent_kernel_decay_hook import EquivalentKernelDecayHook
from .hooks.folded_evaluation_hook import FoldedEvaluationHook
from .hooks.progress_hook import ProgressHook
from .hooks.switch_to_deploy_hook import SwitchToDeployHook
from .optimizers.bfloat16_optim_wrapper import BFloat16OptimWrapper
from .optimizers.constructor import OREPAOptimWrapperConstructor
from .optimizers.folded_optim_wrapper import (
    FoldedAmpOptimWrapper,
    FoldedBFloat16OptimWrapper,
    FoldedOptimWrapper,
)

__all__ = [
    'BFloat16OptimWrapper',
    'BranchStatisticsHook',
    'CrashSafeHook',
    'EquivalentKernelDecayHook',
    'FoldedAmpOptimWrapper',
    'FoldedBFloat16OptimWrapper',
    'FoldedDistributedDataParallel',
    'FoldedEvaluationHook',
    'FoldedOptimWrapper',
    'OREPAOptimWrapperConstructor',
    'ProgressHook',
    'SwitchToDeployHook',
]
