"""Hooks for MMEngine's runner."""

from .equivalent_kernel_decay_hook import EquivalentKernelDecayHook
from .switch_to_deploy_hook import SwitchToDeployHook

__all__ = ['EquivalentKernelDecayHook', 'SwitchToDeployHook']
