"""Variables at the top of a config, which MMEngine does not apply to its bases."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config

# Variables that people set at the top of a config, and the settings that they mean.
_SETTINGS = {
    'data_root': 'train_dataloader.dataset.data_root',
    'classes': 'train_dataloader.dataset.metainfo.classes',
    'num_classes': 'model.head.num_classes',
    'max_epochs': 'train_cfg.max_epochs',
    'pretrained': 'model.backbone.init_cfg.checkpoint',
}


def apply_variables(cfg: Config, names: Iterable[str]) -> None:
    """Copies variables of a config to the settings that its base lists for them.

    The bases for your own data have a table ``variables``, with settings and factors
    for each name. A variable that is copied is removed from the config.

    Args:
        cfg (Config): Changed in place.
        names (Iterable[str]): The names that the file, or the command line, has set.
    """
    table = cfg.get('variables') or {}
    for name in [name for name in names if name in table]:
        value = cfg.pop(name)
        for setting, factor in table[name].items():
            scaled = value if factor == 1 else round(value * factor)
            cfg.merge_from_dict({setting: scaled})


def check_variables(cfg: Config, options: Optional[dict] = None) -> None:
    """Raises ValueError for a variable at the top of a config that has no effect.

    It checks ``data_root``, ``classes``, ``num_classes``, ``max_epochs`` and
    ``pretrained``. A variable has no effect if no setting has its value.

    Args:
        cfg (Config): After :func:`apply_variables`.
        options (dict, optional): Checks the variables in these ``--cfg-options``.
            Defaults to None, for those in the file of the config, if it has a base.
    """
    leaves = [
        leaf
        for key, node in cfg.items()
        if key in ('model', 'load_from', 'train_cfg')
        or key.endswith(('_dataloader', '_evaluator'))
        for leaf in _leaves(key, node)
    ]
    for name in _unused_names(cfg.filename) if options is None else options:
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


def _unused_names(path: Optional[str]) -> list[str]:
    """The variables that a config with a base sets and does not use itself."""
    if path is None or not path.endswith('.py'):
        return []
    tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    return sorted(assigned - used) if '_base_' in assigned else []


def _leaves(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """The values in a part of a config with their keys; also lists, as tuples."""
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
    if isinstance(value, str):  # It may be a part of a path, under any key.
        return any(isinstance(leaf, str) and value in leaf for _, leaf in leaves)
    value = tuple(value) if isinstance(value, list) else value
    same_key = [leaf for key, leaf in leaves if key == name]
    # Without such a key, the config may have computed something from the value.
    return not same_key or value in same_key
