"""Extensions of MMEngine's runner: hooks, optimizer wrappers, set-up."""

from .distributed import FoldedDistributedDataParallel
from .hooks import (
    BranchStatisticsHook,
    CrashSafeHook,
    EquivalentKernelDecayHook,
    FoldedEvaluationHook,
    ProgressHook,
    SwitchToDeployHook,
)
from .optimizers import (
    BFloat16OptimWrapper,
    FoldedAmpOptimWrapper,
    FoldedBFloat16OptimWrapper,
    FoldedOptimWrapper,
    OREPAOptimWrapperConstructor,
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
