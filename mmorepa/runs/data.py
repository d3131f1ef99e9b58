"""Checks the data of a config, and reads them; one line for each mistake."""

import copy
import functools
import inspect
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..utils.errors import DataError

_DATASET = re.compile(r'\.(dataset|datasets\[\d+\])$')
# The heads that tell classes apart. An RPN tells objects from the background.
_HEAD = re.compile(r'\.(head|bbox_head|mask_head)(\[\d+\])*$')
# Bytes of annotations; to read more would take too long for a check.
_LARGE = 100_000_000


def innermost(dataset: dict) -> dict:
    """The config of a dataset without its wrappers."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def build_loader(cfg: Config, phase: str) -> DataLoader:
    """The data of a phase, read by this process in the same order each time.

    Nothing is downloaded: only training and testing do that.

    Raises:
        FileNotFoundError: If data are missing, even if they could be downloaded.
        ValueError: If the config has no data for the phase, or as
            :func:`check_data_folders`.
    """
    if cfg.get(f'{phase}_dataloader') is None:
        raise ValueError(f'the config has no {phase}_dataloader')
    cfg, scope = copy.deepcopy(cfg), cfg.get('default_scope', 'mmengine')
    loader = cfg[f'{phase}_dataloader']
    downloads = [d for d in _datasets(loader) if _argument(cfg, d, 'download')]
    for dataset in downloads:
        dataset['download'] = False
    check_data_folders(cfg, (phase,))
    init_default_scope(scope)
    loader.update(num_workers=0, persistent_workers=False)
    if scope == 'mmpretrain':
        loader.setdefault('collate_fn', dict(type='default_collate'))
    try:
        return Runner.build_dataloader(loader, seed=0)
    except RuntimeError as error:
        if not downloads:
            raise
        # The toolbox's own message advises download=True, which was just turned off.
        raise FileNotFoundError(
            f'the data below {downloads[0].get("data_root")!r} are missing or damaged; '
            'only train and test download them'
        ) from error


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


def check_data_folders(cfg: Config, phases: tuple[str, ...]) -> None:
    """Checks that the data of these phases are there, or will be downloaded.

    It also checks the classes of MMPretrain's ``CustomDataset`` with a folder for each
    class, and of MMDetection's ``CocoDataset`` unless its annotations are large.

    Args:
        cfg (Config): Its ``data_preparation``, if any, is the advice of the error.
        phases (tuple[str, ...]): Out of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        FileNotFoundError: If a folder or a file of a dataset is missing.
        ValueError: If the classes are not those of the model, or of the other datasets,
            or a class has no image to train with.
    """
    places: dict[tuple[str, ...], str] = {}  # By classes, a file or folder with them.
    empties: list[set[str]] = []  # Classes without images, by dataset to train with.
    for phase in phases:
        for dataset in _datasets(cfg.get(f'{phase}_dataloader')):
            kind = str(dataset.get('type')).rpartition('.')[-1]
            is_folder = not dataset.get('ann_file') and dataset.get('with_label', True)
            if not _is_here(cfg, dataset):
                continue
            if kind == 'CocoDataset':
                path, classes = _classes_of_coco(cfg, dataset)
                places.setdefault(classes, path)
            elif kind == 'CustomDataset' and is_folder:
                path, classes = _classes_of_folder(cfg, dataset)
                places.setdefault(classes, path)
                if phase == 'train':
                    # To validate or to test with, a class may be without images.
                    empties.append(_empty_classes(cfg, dataset, path, classes))
    # This comes before their number, since no number would be right for both.
    if len(places) > 1:
        texts = (f'{_some(names)} for {path!r}' for names, path in places.items())
        raise ValueError(f'the datasets have different classes: {"; ".join(texts)}')
    for classes, path in places.items():
        empty = sorted(set.intersection(*empties)) if empties else []
        if empty:
            raise ValueError(
                f'no images in these folders of {path!r}: {_some(empty)}; each is a '
                'class, and has to have some, or to be removed'
            )
        for where, node in walk(cfg.get('model'), 'model'):
            number = node.get('num_classes') if _HEAD.search(where) else None
            if number is not None and number != len(classes):
                raise ValueError(
                    f'{path!r} is used with {len(classes)} classes ({_some(classes)}), '
                    f'and {where} has num_classes={number}; set '
                    f'{where}.num_classes={len(classes)}'
                )


def _is_here(cfg: Config, dataset: dict) -> bool:
    """Whether data are on this machine, or False if they need not be."""
    root = dataset.get('data_root') or ''
    if '://' in root:
        return False
    if root and not os.path.isdir(root):
        if not cfg.get('data_preparation') and _argument(cfg, dataset, 'download'):
            return False
        _existing(cfg, root)
    return True


def walk(node: Any, where: str) -> Iterator[tuple[str, dict]]:
    """Yields all dicts in a part of a config, with places such as 'model.neck[1]'."""
    if isinstance(node, dict):
        yield where, node
        for key, value in node.items():
            yield from walk(value, f'{where}.{key}')
    elif isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from walk(item, f'{where}[{i}]')


def _datasets(loader: Any) -> list[dict]:
    """All dataset configs of a dataloader: wrappers, and wrapped ones."""
    nodes = walk(loader, 'loader')
    return [node for where, node in nodes if _DATASET.search(where)]


def _argument(cfg: Config, dataset: dict, name: str) -> Any:
    """The value of an argument of a dataset; None if its class has no such argument."""
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            kind = registry.get(kind)
    known = inspect.signature(kind).parameters.get(name) if kind else None
    return None if known is None else dataset.get(name, known.default)


def _classes_of_folder(cfg: Config, dataset: dict) -> tuple[str, tuple[str, ...]]:
    """The folder of a dataset, and its classes."""
    prefix = dataset.get('data_prefix') or ''
    if isinstance(prefix, dict):
        prefix = prefix.get('img_path', '')
    folder = _existing(cfg, os.path.join(dataset.get('data_root') or '', prefix))
    classes = tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir()))
    if not classes:
        raise ValueError(f'{folder!r} has no folders in it, which are the classes')
    return folder, classes


def _empty_classes(
    cfg: Config, dataset: dict, folder: str, classes: tuple[str, ...]
) -> set[str]:
    """The classes whose folders have no files that the dataset reads as images."""
    extensions = _argument(cfg, dataset, 'extensions') or ('',)
    endings = tuple(extension.lower() for extension in extensions)
    empty = set()
    for name in classes:
        path = os.path.join(folder, name)
        files = list_dir_or_file(path, list_dir=False, recursive=True)
        if not any(file.lower().endswith(endings) for file in files):
            empty.add(name)
    return empty


def _classes_of_coco(cfg: Config, dataset: dict) -> tuple[str, tuple[str, ...]]:
    """The annotations of a dataset, and its classes, which they have to have."""
    root = dataset.get('data_root') or ''
    path = _existing(cfg, os.path.join(root, dataset.get('ann_file') or ''))
    images = (dataset.get('data_prefix') or {}).get('img', '')
    _existing(cfg, os.path.join(root, images))
    classes = (dataset.get('metainfo') or {}).get('classes')
    if classes is None:
        with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            classes = registry.get(dataset['type']).METAINFO['classes']
    if isinstance(classes, str):
        raise ValueError(f'metainfo.classes is {classes!r}, and has to be a tuple')
    if os.path.getsize(path) > _LARGE:
        return path, tuple(classes)
    try:
        categories = json.loads(Path(path).read_text(encoding='utf-8'))['categories']
        known = [category['name'] for category in categories]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path!r} has no annotations in COCO's format ({error!r})"
        ) from error
    missing = [name for name in classes if name not in known]
    if missing:
        raise ValueError(
            f'{_some(missing)}: no such class in {path!r}, which has '
            f'{_some(known)}; set metainfo=dict(classes=(...)) of every dataset'
        )
    # MMDetection numbers the classes in the order of the file.
    in_order = [name for name in known if name in classes]
    if in_order != list(classes):
        raise ValueError(
            f'metainfo.classes has another order than {path!r}, so that MMDetection '
            f'would give the boxes wrong names; write ({_some(in_order)})'
        )
    return path, tuple(classes)


def _existing(cfg: Config, path: str) -> str:
    if os.path.exists(path):
        return path
    parent = os.path.dirname(path.rstrip('/')) or '.'
    there = sorted(os.listdir(parent)) if os.path.isdir(parent) else []
    advice = cfg.get('data_preparation', 'set data_root to where it is')
    raise FileNotFoundError(
        f'{path!r} is missing; {parent!r} has {_some(there) or "nothing"}; {advice}'
    )


def _some(names: Sequence[str]) -> str:
    return ', '.join(names[:6]) + (', …' if len(names) > 6 else '')
