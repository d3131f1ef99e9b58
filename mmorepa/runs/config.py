"""Changes configs as flags of a command line ask."""

import copy
import os
import sys
from typing import Optional

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from .data import innermost

# By evaluator, the metric that chooses the best checkpoint; 'auto' is its first one.
_BEST = dict(Accuracy='auto', CocoMetric='auto', VOCMetric='auto', IoUMetric='mIoU')


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, in eval mode on the CPU, without running its init_cfg."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'data_preprocessor' in cfg:  # As in MMEngine's runner.
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(cfg.model).eval()


def use_amp(cfg: Config) -> None:
    """Turns on mixed-precision training; without an accelerator, in bfloat16.

    Folded wrappers stay folded. A wrapper that is neither MMEngine's nor of this
    package is a ValueError.
    """
    name = _type_name({'type': 'OptimWrapper', **cfg.optim_wrapper})
    if name.removeprefix('Folded') in ('AmpOptimWrapper', 'BFloat16OptimWrapper'):
        return
    if name not in ('OptimWrapper', 'FoldedOptimWrapper'):
        raise ValueError(
            f'--amp replaces OptimWrapper and FoldedOptimWrapper, found {name!r}: set '
            'mixed precision in the config'
        )
    kind = 'AmpOptimWrapper'
    if not has_accelerator():
        kind = 'BFloat16OptimWrapper'
        print_log('No accelerator: --amp trains in bfloat16 on the CPU.')
    cfg.optim_wrapper.type = name.replace('OptimWrapper', kind)


def has_accelerator() -> bool:
    """True if MMEngine's launchers and loss scaling support the device."""
    return get_device() not in ('cpu', 'mps')


def add_hook(cfg: Config, name: str) -> None:
    """Adds a hook with its defaults, unless the config has one of this type."""
    custom = cfg.get('custom_hooks') or []
    hooks = [*custom, *(cfg.get('default_hooks') or {}).values()]
    if not any(_type_name(hook) == name for hook in hooks if hook):
        cfg.custom_hooks = [*custom, dict(type=name)]


def keep_few_checkpoints(cfg: Config) -> None:
    """Keeps the last three checkpoints, and the best where its metric is known.

    MMEngine keeps one of every epoch. A config with ``max_keep_ckpts`` is unchanged.
    """
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if not hook or 'max_keep_ckpts' in hook:
        return
    hook.max_keep_ckpts = 3
    evaluators = cfg.get('val_evaluator') or dict(type='')
    first = evaluators[0] if isinstance(evaluators, list) else evaluators
    if _type_name(first) in _BEST:
        hook.setdefault('save_best', _BEST[_type_name(first)])


def _type_name(node: dict) -> str:
    """The name of the type in a config, which may be a class or have a scope."""
    kind = node['type']
    return kind.__name__ if isinstance(kind, type) else kind.rpartition('.')[-1]


def use_tta(cfg: Config) -> None:
    """Turns on test-time augmentation; by default, classifiers average over flips.

    Other toolboxes raise ValueError if their config does not define it.
    """
    dataset = innermost(cfg.test_dataloader.dataset)
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        if cfg.get('default_scope') != 'mmpretrain':
            raise ValueError('--tta needs tta_model and tta_pipeline in the config')
        cfg.tta_model = dict(type='AverageClsScoreTTA')
        *steps, pack = copy.deepcopy(dataset.pipeline)
        flips = [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)]
        cfg.tta_pipeline = [
            *steps,
            dict(type='TestTimeAug', transforms=[flips, [pack]]),
        ]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def use_visualization(cfg: Config, show_dir: Optional[str], **options) -> None:
    """Turns on the toolbox's hook that draws predictions, in windows or as files.

    Args:
        cfg (Config): Changed in place.
        show_dir (str, optional): Where to write images.
        **options: Options of the hook: ``show``, ``interval`` and ``wait_time``.

    Raises:
        ValueError: If the config has no such hook, or windows have no display.
    """
    displays = [os.environ.get(name) for name in ('DISPLAY', 'WAYLAND_DISPLAY')]
    if options.get('show') and sys.platform == 'linux' and not any(displays):
        # Matplotlib would draw and show nothing, without a warning.
        raise ValueError(
            '--show needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set; '
            '--show-dir FOLDER writes files'
        )
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError(
            '--show and --show-dir need a visualization hook in default_hooks'
        )
    hook.update(options)
    if cfg.get('default_scope') == 'mmpretrain':
        hook.update(enable=True, out_dir=show_dir)
    else:
        hook.draw = True
        if show_dir is not None:
            cfg.visualizer.save_dir = show_dir
