"""Configs, tools and models by name, the same in a clone and when installed."""

import ast
import difflib
import fnmatch
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Optional, Union

from mmengine.config import Config

from .utils.files import root

# Variables that people set at the top of a config, and the settings that they mean.
_SETTINGS = {
    'data_root': 'data_root of the dataset of every dataloader',
    'classes': 'metainfo.classes of the dataset of every dataloader',
    'num_classes': 'model.head.num_classes',
    'max_epochs': 'train_cfg.max_epochs',
    'pretrained': 'model.backbone.init_cfg.checkpoint',
}


def list_configs(pattern: str = '*') -> list[str]:
    """The names of the configs that come with this package, sorted.

    Args:
        pattern (str): With ``*`` for any letters. Defaults to all.

    Examples:
        >>> mmorepa.list_configs('imagenet/resnet18-*')
        ['imagenet/resnet18-1.5x-orepa_4xb64_in1k', ...]
    """
    return fnmatch.filter(_names(root() / 'configs'), pattern)


def find_config(name: Union[str, Path]) -> Path:
    """The file of a config.

    It is given by its path, which goes first; by its name in this package,
    ``FOLDER/NAME`` or ``NAME``, with or without ``.py`` and ``mmorepa::``; or by one in
    a toolbox, such as ``mmpretrain::NAME``. FileNotFoundError has the closest names.
    """
    name = str(name)
    if '::' not in name and os.path.isfile(name):
        return Path(name)
    package, _, wanted = name.rpartition('::')
    package, wanted = package or 'mmorepa', wanted.removesuffix('.py')
    folder = root() / 'configs' if package == 'mmorepa' else _configs_of(package)
    # The pieces below _base_ are found by their paths alone.
    path = folder / f'{wanted}.py'
    if wanted and os.path.isfile(path):
        return path
    names = _names(folder)
    found = [known for known in names if known.endswith(f'/{wanted}')]
    if len(found) == 1:
        return folder / f'{found[0]}.py'
    known = {name.rpartition('/')[2]: name for name in names}
    known.update(zip(names, names))
    close = difflib.get_close_matches(wanted, known, n=4)
    advice = f'{str(folder)!r} has the others'
    if close:
        advice = f'close are: {", ".join(dict.fromkeys(known[c] for c in close))}'
    raise FileNotFoundError(
        f'no config at {name!r}, nor one of that name in {package}; {advice}'
    )


def _names(folder: Path) -> list[str]:
    """The configs in a folder, by their names below it, sorted."""
    return sorted(
        path.relative_to(folder).with_suffix('').as_posix()
        for path in folder.glob('[!_]*/**/*.py')
    )


def _configs_of(package: str) -> Path:
    """The configs that come with a toolbox."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f'no package {package!r}, which {package}::… names')
    return Path(spec.origin).parent / '.mim' / 'configs'


def get_config(name: Union[str, Path], options: Optional[dict] = None) -> Config:
    """A config of this package, or one of your own.

    Args:
        name (str | Path): A file; or a config of this package, ``FOLDER/NAME`` or
            ``NAME``; or one of a toolbox, such as ``mmpretrain::NAME``.
        options (dict, optional): Settings that override it, as ``--cfg-options``.
            Defaults to None.

    Returns:
        Config: Its ``dump(FILE)`` writes it as one file that needs no other.

    Raises:
        FileNotFoundError: If there is none. The message has the closest names.
        ValueError: If it, or an option, sets a variable that has no effect; the message
            says what to set.

    Examples:
        >>> cfg = mmorepa.get_config('imagenet/resnet50-orepa_4xb64_in1k')
        >>> cfg.model.backbone.type
        'OREPAResNet'
    """
    path = find_config(name)
    cfg = Config.fromfile(path)
    _hand_on(cfg, list(cfg))
    _check_variables(cfg, _unused_names(path))
    if options is not None:
        cfg.merge_from_dict(options)
        _hand_on(cfg, list(options))
        _check_variables(cfg, list(options))
    return cfg


def _hand_on(cfg: Config, names: list[str]) -> None:
    """Gives the variables of a config to the settings that its base names for them.

    MMEngine does not hand a child's variable on to what its base made of it. The bases
    for own data have a table ``variables``: for each name, settings and factors.
    ``names`` are those that the file, or the command line, may have set; they are
    removed.
    """
    table = cfg.get('variables') or {}
    for name in [name for name in names if name in table]:
        value = cfg.pop(name)
        for setting, factor in table[name].items():
            scaled = value if factor == 1 else round(value * factor)
            cfg.merge_from_dict({setting: scaled})


def _check_variables(cfg: Config, names: list[str]) -> None:
    """Raises ValueError for a variable whose value no setting has."""
    for name in names:
        value, setting = cfg.get(name), _SETTINGS.get(name)
        if setting is None or value is None:
            continue
        others = repr({k: v for k, v in cfg.to_dict().items() if k != name})
        entry = f"'{name}': {value!r}"
        if f'{entry},' not in others and f'{entry}}}' not in others:
            raise ValueError(
                f'{name} = {value!r} has no effect, since the base config does not '
                f'see it; set {setting}'
            )


def _unused_names(path: Path) -> list[str]:
    """What a config with a base sets, and does not use itself."""
    if path.suffix != '.py':
        return []
    tree = ast.parse(path.read_text(encoding='utf-8'))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    return sorted(assigned - used) if '_base_' in assigned else []


def register_scheme() -> None:
    """Lets ``_base_ = 'mmorepa::FOLDER/NAME.py'`` name a config of this package."""
    others = Config._get_cfg_path

    def _get_cfg_path(cfg_path: str, filename: str) -> tuple[str, Optional[str]]:
        if cfg_path.startswith('mmorepa::'):
            return str(find_config(cfg_path)), None
        return others(cfg_path, filename)

    Config._get_cfg_path = staticmethod(_get_cfg_path)


def register_models() -> None:
    """Lets ``mmpretrain.list_models`` and ``get_model`` know our classifiers.

    Raises:
        ImportError: If MMPretrain is missing.

    Examples:
        >>> mmorepa.register_models()
        >>> mmpretrain.get_model('resnet50-orepa_4xb64_in1k')
    """
    from mmpretrain.apis.model import ModelHub

    if not ModelHub.has('resnet50-orepa_4xb64_in1k'):  # Twice would be an error there.
        ModelHub.register_model_index(root() / 'model-index.yml', config_prefix=root())
