"""OREPA: online convolutional re-parameterisation for OpenMMLab.

Importing this package registers its layers, networks, hooks and optimizer
constructor with MMEngine, so that ``custom_imports = dict(imports=['mmorepa'])``
is all that a config needs. Since PyTorch 2.6, MMEngine 0.10 cannot read the checkpoints
of its own runner: importing this allows ``torch.load`` the class of its logs (see
:func:`mmorepa.converters.allow_mmengine_checkpoints`). And it replaces two functions of
MMEngine:

- ``Config._get_cfg_path``, so that ``_base_ = 'mmorepa::FOLDER/NAME.py'`` names a
  config of this package. MMEngine's own table of packages would give the parts of such
  a config the scope of the package, where it looks for ``LinearClsHead`` and the like.
- The loader of local checkpoints (``init_cfg``, ``load_from``, resuming), which checks
  nothing, and in OneDL's fork runs the code in them.

:func:`register_models` tells MMPretrain's model index of our classifiers.
"""

import os
import sys

from .version import __version__


def _is_command() -> bool:
    """True while ``python -m mmorepa`` or ``mmorepa`` starts.

    A command runs a tool in a process of its own, and its help should not take the
    seconds that PyTorch needs. ``sys.argv[0]`` is '-m' as long as Python looks for the
    module to run.
    """
    if os.path.basename(sys.argv[0]) in ('mmorepa', 'mmorepa.exe'):
        return True
    line = ' '.join([*sys.orig_argv, '']).replace('-m ', '-m')
    return sys.argv[0] == '-m' and f'-m{__name__} ' in line


if not _is_command():
    from .utils.requirements import check_requirements

    check_requirements()

    from . import analysis, backbones, converters, engine, functional, hub, layers
    from .hub import get_config, list_configs, register_models
    from .layers import (
        add_branches,
        folded,
        is_switchable,
        param_groups,
        set_channels_last,
        switch_to_deploy,
    )

    hub.register_scheme()
    converters.allow_mmengine_checkpoints()


__all__ = [
    '__version__',
    'add_branches',
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
    'register_models',
    'set_channels_last',
    'switch_to_deploy',
]
