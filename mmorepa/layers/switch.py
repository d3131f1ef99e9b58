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
    if isinstance(module, ReparamConv2d):
        module.switch_to_deploy()
    else:
        for child in module.children():
            switch_to_deploy(child)
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
