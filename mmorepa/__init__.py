"""OREPA: online convolutional re-parameterisation for OpenMMLab.

Importing this package registers its layers, networks, hooks and optimizer
constructor with MMEngine, so that ``custom_imports = dict(imports=['mmorepa'])``
is all that a config needs.
"""

from .utils.requirements import check_requirements

check_requirements()

from . import (  # noqa: E402
    analysis,
    backbones,
    converters,
    engine,
    functional,
    hub,
    layers,
)
from .hub import get_config, list_configs  # noqa: E402
from .layers import (  # noqa: E402
    folded,
    is_switchable,
    param_groups,
    reparameterize,
    set_channels_last,
    switch_to_deploy,
)
from .version import __version__  # noqa: E402

hub.register()

__all__ = [
    '__version__',
    'analysis',
    'backbones',
    'converters',
    'engine',
    'folded',
    'functional',
    'get_config',
    'hub',
    'is_switchable',
    'layers',
    'list_configs',
    'param_groups',
    'reparameterize',
    'set_channels_last',
    'switch_to_deploy',
]
