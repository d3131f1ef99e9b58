"""Mistakes that people make with data of their own, each told in one line."""

import ast
import functools
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS

from ..utils.errors import DataError

# What people set at the top of a config, and what it takes to have an effect.
_EXAMPLES = {
    'data_root': 'train_dataloader = dict(dataset=dict(data_root=data_root)), and the '
    'same for val_dataloader and test_dataloader',
    'classes': 'train_dataloader = dict(dataset=dict(metainfo=dict(classes=classes))), '
    'and the same for val_dataloader and test_dataloader',
    'num_classes': 'model = dict(head=dict(num_classes=num_classes)) for a classifier',
    'max_epochs': 'train_cfg = dict(max_epochs=max_epochs)',
    'pretrained': 'model = dict(backbone=dict(init_cfg=dict(checkpoint=pretrained)))',
}
# The same on a command line.
_OPTIONS = {
    'data_root': 'train_dataloader.dataset.data_root',
    'classes': 'train_dataloader.dataset.metainfo.classes',
    'num_classes': 'model.head.num_classes',
    'max_epochs': 'train_cfg.max_epochs',
    'pretrained': 'model.backbone.init_cfg.checkpoint',
}
_READ = ('model', 'load_from', 'train_cfg')
# Larger annotations would take longer to read than a mistake is worth.
_LARGE = 100_000_000


def name_broken_images() -> None:
    """Lets MMCV's transform name the image that it cannot read, from now on."""
    original = LoadImageFromFile.transform
    if hasattr(original, '__wrapped__'):
        return

    @functools.wraps(original)
    def transform(self: LoadImageFromFile, results: dict) -> Optional[dict]:
        try:
            return original(self, results)
        except Exception as error:
            raise DataError(
                f'{results.get("img_path")!r} cannot be read as an image; remove it, '
                'or put a whole one in its place'
            ) from error

    LoadImageFromFile.transform = transform


def check_variables(cfg: Config, options: Optional[dict] = None) -> None:
    """Checks that no variable was set for nothing.

    Those of :func:`mmorepa.hub.apply_variables` are gone by then.

    Args:
        cfg (Config): Of a file.
        options (dict, optional): ``--cfg-options``, merged already, to check them
            instead of the file. Defaults to None.

    Raises:
        ValueError: If one of those that people set at the top is set by the file,
            which has a base, or by the options, and nothing has its value.
    """
    leaves = [
        leaf
        for key, node in cfg.items()
        if key in _READ or key.endswith(('_dataloader', '_evaluator'))
        for leaf in _leaves(key, node)
    ]
    for name in _assigned(cfg.filename) if options is None else options:
        value = cfg.get(name)
        if name in _EXAMPLES and value is not None and not _occurs(name, value, leaves):
            if options is not None:
                raise ValueError(
                    f'--cfg-options {name}={value} has no effect; write '
                    f'--cfg-options {_OPTIONS[name]}={value}'
                )
            raise ValueError(
                f'{name} = {value!r} in {cfg.filename} has no effect, since the base '
                f'config does not see it; write {_EXAMPLES[name]}'
            )


def _assigned(path: Optional[str]) -> list[str]:
    """What the file of a child sets and does not use itself.

    One without a base, such as a dump, is whole.
    """
    if path is None or not path.endswith('.py'):
        return []
    tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    targets = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    # Something may be computed from it.
    used = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    return [name for name in names if name not in used] if '_base_' in names else []


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


def check_datasets(cfg: Config, datasets: dict[str, list[dict]]) -> None:
    """Checks what the folders and annotations of the datasets hold.

    Those of MMPretrain's ``CustomDataset`` that are folders of classes, and those of
    MMDetection's ``CocoDataset``, are looked at; none is read twice that is large.

    Args:
        cfg (Config): The config.
        datasets (dict[str, list[dict]]): Those of each phase, whose ``data_root``
            is there.

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        ValueError: If the classes are not those of the model, or of the other phases,
            or one has no image to train with.
    """
    folders, found = {}, {}
    trained: set[str] = set()
    for phase, nodes in datasets.items():
        for node in nodes:
            kind = str(node.get('type')).rpartition('.')[-1]
            if '://' in str(node.get('data_root')):
                continue
            if kind == 'CustomDataset' and not node.get('ann_file'):
                if node.get('with_label', True):
                    folders[phase] = _read_folder(cfg, node)
                    found[phase] = folders[phase][1]
                    if phase == 'train':
                        trained |= _with_images(cfg, node, *folders[phase])
            elif kind == 'CocoDataset':
                found[phase] = _check_coco(cfg, node)
    # First, since a folder may be there by accident. One without images to validate or
    # test with may be meant: the names have to be the same for all phases.
    if 'train' in folders:
        folder, classes = folders['train']
        empty = [name for name in classes if name not in trained]
        if empty:
            raise ValueError(
                f'no images in these folders of {folder!r}: {_some(empty)}; each is a '
                'class, and has to have some, or to be removed'
            )
    # Before their number: no number would be right for both. The order counts, too.
    if len({*found.values()}) > 1:
        texts = (f'{_some(names)} for {key}' for key, names in found.items())
        raise ValueError(f'the phases have different classes: {"; ".join(texts)}')
    for folder, classes in folders.values():
        head = (cfg.model.get('head') or {}) if isinstance(cfg.model, dict) else {}
        _check_number(head.get('num_classes'), classes, folder, 'model.head')


def _read_folder(cfg: Config, dataset: dict) -> tuple[str, tuple[str, ...]]:
    """The folder of a dataset, and the classes in it."""
    prefix = dataset.get('data_prefix') or ''
    if isinstance(prefix, dict):
        prefix = prefix.get('img_path', '')
    root = dataset.get('data_root') or ''
    folder = _existing(cfg, os.path.join(root, prefix), root)
    classes = tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir()))
    if not classes:
        raise ValueError(f'{folder!r} has no folders in it, which are the classes')
    return folder, classes


def _with_images(
    cfg: Config, dataset: dict, folder: str, classes: tuple[str, ...]
) -> set[str]:
    """The classes whose folders hold what the dataset takes for an image."""
    endings = argument_of(dataset, 'extensions', cfg.get('default_scope'))
    endings = tuple(end.lower() for end in endings or ('',))
    return {
        name
        for name in classes
        if any(
            path.lower().endswith(endings)
            for path in list_dir_or_file(
                os.path.join(folder, name), list_dir=False, recursive=True
            )
        )
    }


def argument_of(dataset: dict, name: str, scope: Optional[str]) -> Any:
    """What a dataset gets for an argument, by its config or by default.

    Args:
        dataset (dict): Its config.
        name (str): The argument.
        scope (str, optional): Where MMEngine looks for its type.

    Returns:
        Any: None if there is no such argument, or no such type.
    """
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    known = inspect.signature(kind).parameters.get(name) if kind else None
    return None if known is None else dataset.get(name, known.default)


def _check_coco(cfg: Config, dataset: dict) -> tuple[str, ...]:
    """The classes of a dataset, which its annotations have to have."""
    root = dataset.get('data_root') or ''
    name = dataset.get('ann_file') or ''
    images = (dataset.get('data_prefix') or {}).get('img', '')
    path = _existing(cfg, os.path.join(root, name), root)
    _existing(cfg, os.path.join(root, images), root)
    classes = (dataset.get('metainfo') or {}).get('classes')
    if classes is None:
        with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            classes = registry.get(dataset['type']).METAINFO['classes']
    if isinstance(classes, str):
        raise ValueError(f'metainfo.classes is {classes!r}, and has to be a tuple')
    if os.path.getsize(path) > _LARGE:
        return tuple(classes)
    try:
        categories = json.loads(Path(path).read_text(encoding='utf-8'))['categories']
        known = [category['name'] for category in categories]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path!r} has no annotations in COCO's format: no JSON with categories, "
            f'each with a name ({type(error).__name__}: {error})'
        ) from error
    missing = [name for name in classes if name not in known]
    if missing:
        raise ValueError(
            f'{_some(missing)}: no such class in {path!r}, which has '
            f'{_some(known)}; set metainfo=dict(classes=(...)) of every dataset'
        )
    for where, head in _heads(cfg.model, 'model'):
        _check_number(head.get('num_classes'), classes, path, where)
    return tuple(classes)


def _heads(node: Any, where: str) -> Iterator[tuple[str, dict]]:
    """The heads that tell classes apart; an RPN tells objects from none."""
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _heads(item, f'{where}[{i}]')
    elif isinstance(node, dict):
        if where.partition('[')[0].endswith(('.bbox_head', '.mask_head')):
            yield where, node
        for key, value in node.items():
            yield from _heads(value, f'{where}.{key}')


def _check_number(
    number: Optional[int], classes: tuple[str, ...], where: str, head: str
) -> None:
    if number is not None and number != len(classes):
        raise ValueError(
            f'{where!r} is used with {len(classes)} classes ({_some(classes)}), and '
            f'{head} has num_classes={number}; set {head}.num_classes={len(classes)}'
        )


def _existing(cfg: Config, path: str, root: str) -> str:
    if os.path.exists(path):
        return path
    there = sorted(os.listdir(root or '.'))
    advice = cfg.get('data_preparation', 'set data_root to where it is')
    raise FileNotFoundError(
        f'{path!r} is missing; {root!r} has {_some(there) or "nothing"}; {advice}'
    )


def _some(names: Any) -> str:
    names = list(map(str, names))
    return ', '.join(names[:6]) + (', …' if len(names) > 6 else '')
