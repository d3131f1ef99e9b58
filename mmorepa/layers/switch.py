"""From training form to deployed form, for whole models."""

from torch import nn

from .reparam_conv import ReparamConv2d


def switch_to_deploy(module: nn.Module) -> nn.Module:
    """Switches every re-parameterised conv inside ``module`` to its plain form.

    In place, on any device and dtype; what is deployed already is left alone.
    Works on whole detectors and segmenters, and inside model wrappers.

    Args:
        module (nn.Module): A layer, a backbone, or a whole model.

    Returns:
        nn.Module: ``module`` itself.
    """
    for child in list(module.modules()):
        if isinstance(child, ReparamConv2d):
            child.switch_to_deploy()
    return module


def is_switchable(module: nn.Module) -> bool:
    """Whether anything inside ``module`` is still in training form.

    Args:
        module (nn.Module): Any module.

    Returns:
        bool: True if :func:`switch_to_deploy` would change it.
    """
    return any(
        isinstance(child, ReparamConv2d) and not child.deployed
        for child in module.modules()
    )
