"""Networks of re-parameterised convs."""

from .orepa_resnet import OREPAResNet

__all__ = ['OREPAResNet']
