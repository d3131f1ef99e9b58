"""Reads configs, and changes them as flags of a command line ask."""

import ast
import copy
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..hub import apply_variables, find_config
from .data import innermost

# The metric that is the best checkpoint's, by the evaluator; 'auto' is its first.
_BEST = dict(Accuracy='auto', CocoMetric='auto', VOCMetric='auto', IoUMetric='mIoU')
# Variables that people set at the top of a config, and the settings that they mean.
_SETTINGS = {
    'data_root': 'train_dataloader.dataset.data_root',
    'classes': 'train_dataloader.dataset.metainfo.classes',
    'num_classes': 'model.head.num_classes',
    'max_epochs': 'train_cfg.max_epochs',
    'pretrained': 'model.backbone.init_cfg.checkpoint',
}
_READ = ('model', 'load_from', 'train_cfg')


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """Reads and checks a config.

    Args:
        path (str): The file, or the name of a config of this package.
        options (dict, optional): ``--cfg-options``. Defaults to None.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not Python, YAML or JSON, or has no model.
    """
    path = str(find_config(path))
    if Path(path).suffix not in ('.py', '.yml', '.yaml', '.json'):
        raise ValueError(f'{path!r} is no config: these are .py, .yml or .json files')
    try:
        cfg = Config.fromfile(path)
    except SyntaxError as error:
        # It may be in a base. MMEngine's functions call a config 'filename'.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = [frame.f_locals.get('filename') for frame in frames]
        name = [name for name in names if str(name).endswith('.py')][-1]
        raise ValueError(f'{str(name)!r}, line {error.lineno}: {error.msg}') from error
    apply_variables(cfg, list(cfg))
    check_variables(cfg)
    if options is not None:
        merge_options(cfg, options)
    if not isinstance(cfg.get('model'), dict):
        raise ValueError(f"{path!r} has no 'model', which is what a config describes")
    return cfg


def merge_options(cfg: Config, options: dict) -> None:
    """Applies ``--cfg-options`` in place, or raises ValueError if one has no effect."""
    cfg.merge_from_dict(options)
    apply_variables(cfg, options)
    check_variables(cfg, options)


def check_variables(cfg: Config, options: Optional[dict] = None) -> None:
    """Raises ValueError for a variable at the top of a config that has no effect.

    That is one of ``data_root``, ``classes``, ``num_classes``, ``max_epochs`` and
    ``pretrained`` that the file, if it has a base, or ``options`` set, and whose value
    no setting has. Comes after :func:`mmorepa.hub.apply_variables`.
    """
    leaves = [
        leaf
        for key, node in cfg.items()
        if key in _READ or key.endswith(('_dataloader', '_evaluator'))
        for leaf in _leaves(key, node)
    ]
    for name in _assigned(cfg.filename) if options is None else options:
        value, setting = cfg.get(name), _SETTINGS.get(name)
        if setting is None or value is None or _occurs(name, value, leaves):
            continue
        if options is not None:
            raise ValueError(
                f'--cfg-options {name}={value} has no effect; write '
                f'--cfg-options {setting}={value}'
            )
        first, *keys = setting.split('.')
        text = ''.join(f'dict({key}=' for key in keys) + name + ')' * len(keys)
        if first == 'train_dataloader':
            text += ', and the same for val_dataloader and test_dataloader'
        raise ValueError(
            f'{name} = {value!r} in {cfg.filename} has no effect, since the base '
            f'config does not see it; write {first} = {text}'
        )


def _assigned(path: Optional[str]) -> list[str]:
    """What the file of a child sets and does not use; one without a base is whole."""
    if path is None or not path.endswith('.py'):
        return []
    tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assigned = [node.id for node in names if isinstance(node.ctx, ast.Store)]
    # Something may be computed from it.
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    if '_base_' not in assigned:
        return []
    return [name for name in assigned if name not in used]


def _leaves(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """The values in a config, each with its key; also sequences, as tuples."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(name, value)
    elif isinstance(node, (list, tuple)):
        yield key, tuple(node)
        for value in node:
            yield from _leaves(key, value)
    else:
        yield key, node


def _occurs(name: str, value: Any, leaves: list[tuple[str, Any]]) -> bool:
    if isinstance(value, str):  # Under any key, and it may be a part of a path.
        return any(isinstance(leaf, str) and value in leaf for _, leaf in leaves)
    value = tuple(value) if isinstance(value, list) else value
    alike = [leaf for key, leaf in leaves if key == name]
    # What is under no such key, something may have been computed from.
    return not alike or value in alike


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, in eval mode on the CPU, without running its init_cfg."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'data_preprocessor' in cfg:  # The runner hands it on in the same way.
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(cfg.model).eval()


def use_amp(cfg: Config) -> None:
    """Turns on mixed-precision training; without an accelerator, in bfloat16.

    Folded wrappers stay folded. ValueError says that the wrapper is another one than
    MMEngine's and ours.
    """
    name = _type_name({'type': 'OptimWrapper', **cfg.optim_wrapper})
    folded = 'Folded' if name.startswith('Folded') else ''
    if name in (f'{folded}AmpOptimWrapper', f'{folded}BFloat16OptimWrapper'):
        return
    if name != f'{folded}OptimWrapper':
        raise ValueError(
            f'--amp replaces OptimWrapper and FoldedOptimWrapper, found {name!r}: set '
            'mixed precision in the config'
        )
    if has_accelerator():
        cfg.optim_wrapper.type = f'{folded}AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    else:
        cfg.optim_wrapper.type = f'{folded}BFloat16OptimWrapper'
        print_log('No accelerator: --amp trains in bfloat16 on the CPU.')


def has_accelerator() -> bool:
    """True if MMEngine's launchers and loss scaling know the device."""
    return get_device() not in ('cpu', 'mps')


def add_hook(cfg: Config, name: str) -> None:
    """Adds a hook with its defaults, unless the config has one of this type."""
    custom = cfg.get('custom_hooks') or []
    hooks = [*custom, *(cfg.get('default_hooks') or {}).values()]
    if not any(_type_name(hook) == name for hook in hooks if hook):
        cfg.custom_hooks = [*custom, dict(type=name)]


def keep_few_checkpoints(cfg: Config) -> None:
    """Keeps the last three checkpoints, and the best where its metric is known.

    MMEngine keeps one of every epoch. A config's ``max_keep_ckpts`` goes first.
    """
    evaluators = cfg.get('val_evaluator') or [{'type': ''}]
    first = evaluators[0] if isinstance(evaluators, list) else evaluators
    for hook in filter(None, (cfg.get('default_hooks') or {}).values()):
        if _type_name(hook) == 'CheckpointHook' and 'max_keep_ckpts' not in hook:
            hook.max_keep_ckpts = 3
            if _type_name(first) in _BEST:
                hook.setdefault('save_best', _BEST[_type_name(first)])


def _type_name(node: dict) -> str:
    """The type in a config, which may be a class or a name with a scope."""
    kind = node['type']
    return kind.__name__ if isinstance(kind, type) else kind.rpartition('.')[-1]


def use_tta(cfg: Config) -> None:
    """Turns on test-time augmentation; by default, classifiers average over flips.

    ValueError says that the config of another toolbox defines none.
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


def use_visualization(
    cfg: Config, show: bool, show_dir: Optional[str], interval: int, wait_time: float
) -> None:
    """Turns on the toolbox's hook that draws predictions, in windows or as files.

    Args:
        cfg (Config): Changed in place.
        show (bool): Whether to open windows.
        show_dir (str, optional): Where to write images.
        interval (int): Draws every so many images.
        wait_time (float): Seconds that a window stays.

    Raises:
        ValueError: If the config has no such hook, or there is no display for windows.
    """
    displays = [os.environ.get(name) for name in ('DISPLAY', 'WAYLAND_DISPLAY')]
    if show and sys.platform == 'linux' and not any(displays):
        # Matplotlib would draw and show nothing, in silence.
        raise ValueError(
            '--show needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set; '
            '--show-dir FOLDER writes files'
        )
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError(
            '--show and --show-dir need a visualization hook in default_hooks'
        )
    hook.update(show=show, wait_time=wait_time, interval=interval)
    if cfg.get('default_scope') == 'mmpretrain':
        hook.update(enable=True, out_dir=show_dir)
    else:
        hook.draw = True
        if show_dir is not None:
            cfg.visualizer.save_dir = show_dir
