"""Configs, tools and models by name, the same in a clone and when installed."""

import difflib
import fnmatch
import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Optional, Union

from mmengine.config import Config

from .utils.files import root

SCHEME = 'mmorepa::'


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
    stems: dict[str, list[str]] = {}
    for known in _names(folder):
        stems.setdefault(known.rpartition('/')[2], []).append(known)
    if len(stems.get(wanted, ())) == 1:
        return folder / f'{stems[wanted][0]}.py'
    close = difflib.get_close_matches(wanted, _names(folder), cutoff=0.7)
    for stem in difflib.get_close_matches(wanted, stems):
        close += stems[stem]
    advice = f'{str(folder)!r} has the others'
    if close:
        advice = f'close are: {", ".join(dict.fromkeys(close[:4]))}'
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

    Examples:
        >>> cfg = mmorepa.get_config('imagenet/resnet50-orepa_4xb64_in1k')
        >>> cfg.model.backbone.type
        'OREPAResNet'
    """
    cfg = Config.fromfile(find_config(name))
    apply_variables(cfg, list(cfg))
    if options is not None:
        cfg.merge_from_dict(options)
        apply_variables(cfg, options)
    return cfg


def apply_variables(cfg: Config, names: Iterable[str]) -> None:
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


def register_scheme() -> None:
    """Lets ``_base_ = 'mmorepa::FOLDER/NAME.py'`` name a config of this package."""
    others = Config._get_cfg_path

    def _get_cfg_path(cfg_path: str, filename: str) -> tuple[str, Optional[str]]:
        if cfg_path.startswith(SCHEME):
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
