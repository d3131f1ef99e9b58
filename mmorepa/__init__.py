"""OREPA: online convolutional re-parameterisation for OpenMMLab.

Importing this package registers its layers, networks, hooks and optimizer
constructor with MMEngine, so that ``custom_imports = dict(imports=['mmorepa'])``
is all that a config needs.
"""

import os
import sys

from .version import __version__


def _is_command() -> bool:
    """True while ``python -m mmorepa`` or ``mmorepa`` starts.

    It runs a tool in a process of its own, and needs nothing that loads PyTorch.
    """
    if os.path.basename(sys.argv[0]) in ('mmorepa', 'mmorepa.exe'):
        return True
    # '-m' is there as long as Python looks for the module that it will run.
    line = ' '.join([*sys.orig_argv, '']).replace('-m ', '-m')
    return sys.argv[0] == '-m' and f'-m{__name__} ' in line


if not _is_command():
    from .utils.requirements import check_requirements

    check_requirements()

    from . import (
        analysis,
        backbones,
        converters,
        engine,
        functional,
        hub,
        layers,
    )
    from .hub import get_config, list_configs
    from .layers import (
        add_branches,
        folded,
        is_switchable,
        param_groups,
        reparameterize,
        set_channels_last,
        switch_to_deploy,
    )

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
    'add_branches',
    'reparameterize',
    'set_channels_last',
    'switch_to_deploy',
]
