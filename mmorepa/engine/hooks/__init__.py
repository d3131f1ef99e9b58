"""Hooks for MMEngine's runner."""

from .branch_statistics_hook import BranchStatisticsHook
from .crash_safe_hook import CrashSafeHook
from .equivalent_kernel_decay_hook import EquivalentKernelDecayHook
from .folded_evaluation_hook import FoldedEvaluationHook
from .progress_hook import ProgressHook
from .switch_to_deploy_hook import SwitchToDeployHook

__all__ = [
    'BranchStatisticsHook',
    'CrashSafeHook',
    'EquivalentKernelDecayHook',
    'FoldedEvaluationHook',
    'ProgressHook',
    'SwitchToDeployHook',
]
