"""Networks of re-parameterised convs."""

from .orepa_repvgg import OREPARepVGG
from .orepa_resnet import OREPAResNet
from .staged_backbone import StagedBackbone

__all__ = ['OREPARepVGG', 'OREPAResNet', 'StagedBackbone']
