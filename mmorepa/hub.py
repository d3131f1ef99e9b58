"""Configs, tools and models by name, the same in a clone and when installed."""

import difflib
import fnmatch
import os
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Optional, Union

from mmengine.config import Config

from .utils.files import root
from .utils.variables import apply_variables, check_variables


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

    ``name`` is a path, which takes precedence; or a name in this package,
    ``FOLDER/NAME`` or ``NAME``, with or without ``.py`` and ``mmorepa::``; or a name in
    a toolbox, such as ``mmpretrain::NAME``. FileNotFoundError has similar names.
    """
    name = str(name)
    if '::' not in name and os.path.isfile(name):
        return Path(name)
    package, _, wanted = name.rpartition('::')
    package, wanted = package or 'mmorepa', wanted.removesuffix('.py')
    folder = root() / 'configs' if package == 'mmorepa' else _configs_of(package)
    # Files below _base_ have no names, and are found by their paths.
    path = folder / f'{wanted}.py'
    if wanted and os.path.isfile(path):
        return path
    names = _names(folder)
    matches = [known for known in names if known.endswith(f'/{wanted}')]
    if len(matches) == 1:
        return folder / f'{matches[0]}.py'
    # Both NAME and FOLDER/NAME may be misspelt.
    by_spelling = {known.rpartition('/')[2]: known for known in names}
    by_spelling.update(zip(names, names))
    close = difflib.get_close_matches(wanted, by_spelling, n=4)
    advice = f'{str(folder)!r} has the others'
    if close:
        similar = dict.fromkeys(by_spelling[spelling] for spelling in close)
        advice = f'close are: {", ".join(similar)}'
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
        options (dict, optional): Settings that override those of the config, as
            ``--cfg-options`` does. Defaults to None.

    Returns:
        Config: ``cfg.dump(FILE)`` writes it as one file that needs no base.

    Raises:
        FileNotFoundError: If there is no such config. The message has similar names.
        ValueError: If the file is not Python, YAML or JSON, or has no model; or if it
            or an option sets a variable that has no effect. The message says what to
            write instead.

    Examples:
        >>> cfg = mmorepa.get_config('imagenet/resnet50-orepa_4xb64_in1k')
        >>> cfg.model.backbone.type
        'OREPAResNet'
    """
    path = find_config(name)
    if path.suffix not in ('.py', '.yml', '.yaml', '.json'):
        raise ValueError(
            f'{str(path)!r} is no config: configs are .py, .yml or .json files'
        )
    try:
        cfg = Config.fromfile(path)
    except SyntaxError as error:
        # It may be in a base, whose path is `filename` in MMEngine's functions, or in a
        # module that the config imports.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = [*(frame.f_locals.get('filename') for frame in frames), error.filename]
        file = [name for name in map(str, names) if name.endswith('.py')][-1]
        raise ValueError(f'{file!r}, line {error.lineno}: {error.msg}') from error
    apply_variables(cfg, list(cfg))
    check_variables(cfg)
    if options is not None:
        merge_options(cfg, options)
    if not isinstance(cfg.get('model'), dict):
        raise ValueError(
            f"{str(path)!r} has no 'model', which is what a config describes"
        )
    return cfg


def merge_options(cfg: Config, options: dict) -> None:
    """Applies ``--cfg-options`` in place, or raises ValueError if one has no effect."""
    cfg.merge_from_dict(options)
    apply_variables(cfg, list(options))
    check_variables(cfg, options)


def register_scheme() -> None:
    """Lets ``_base_ = 'mmorepa::FOLDER/NAME.py'`` name a config of this package."""
    original = Config._get_cfg_path

    def _get_cfg_path(cfg_path: str, filename: str) -> tuple[str, Optional[str]]:
        if cfg_path.startswith('mmorepa::'):
            return str(find_config(cfg_path)), None
        return original(cfg_path, filename)

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
