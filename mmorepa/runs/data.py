"""Checks the data of a config, and reads them; one line for each mistake."""

import copy
import inspect
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

_DATASET = re.compile(r'\.(dataset|datasets\[\d+\])$')
# Those that tell classes apart; an RPN tells objects from none.
_HEAD = re.compile(r'\.(head|bbox_head|mask_head)(\[\d+\])*$')
# Larger annotations would take longer to read than a mistake is worth.
_LARGE = 100_000_000


def innermost(dataset: dict) -> dict:
    """The config of the dataset that a config's wrappers hold, or itself."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def build_loader(cfg: Config, phase: str) -> DataLoader:
    """The data of a phase, read by this process in the same order each time.

    Nothing is downloaded: only training and testing do that.

    Raises:
        FileNotFoundError: If data are missing, also those that could be downloaded.
        ValueError: If the config has none, or as :func:`check_data_folders`.
    """
    if cfg.get(f'{phase}_dataloader') is None:
        raise ValueError(f'the config has no {phase}_dataloader')
    cfg, scope = copy.deepcopy(cfg), cfg.get('default_scope', 'mmengine')
    loader = cfg[f'{phase}_dataloader']
    downloads = [d for d in _datasets(loader) if _is_downloaded(cfg, d)]
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
        # The toolbox's own words advise a setting that was just turned off.
        raise FileNotFoundError(
            f'the data below {downloads[0].get("data_root")!r} are missing or damaged; '
            'only train and test download them'
        ) from error


def check_data_folders(cfg: Config, phases: tuple[str, ...]) -> None:
    """Checks that the data of these phases are there, or will be downloaded.

    Of MMPretrain's ``CustomDataset`` with a folder for each class, and MMDetection's
    ``CocoDataset``, it also looks at the classes; not in large annotations.

    Args:
        cfg (Config): Its ``data_preparation``, if any, is the advice of the error.
        phases (tuple[str, ...]): Out of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        FileNotFoundError: If a folder or a file of a dataset is missing.
        ValueError: If the classes are not those of the model, or of the other phases.
    """
    classes: dict[str, tuple[str, ...]] = {}
    for phase in phases:
        for dataset in _datasets(cfg.get(f'{phase}_dataloader')):
            kind = str(dataset.get('type')).rpartition('.')[-1]
            is_folder = not dataset.get('ann_file') and dataset.get('with_label', True)
            if not _is_here(cfg, dataset):
                continue
            if kind == 'CocoDataset':
                classes[phase] = _classes_of_coco(cfg, dataset)
            elif kind == 'CustomDataset' and is_folder:
                classes[phase] = _classes_of_folder(cfg, dataset)
    # Before their number: no number would be right for both. The order counts, too.
    if len({*classes.values()}) > 1:
        texts = (f'{_some(names)} for {phase}' for phase, names in classes.items())
        raise ValueError(f'the phases have different classes: {"; ".join(texts)}')
    for names in {*classes.values()}:
        for where, node in walk(cfg.get('model'), 'model'):
            number = node.get('num_classes') if _HEAD.search(where) else None
            if number is not None and number != len(names):
                raise ValueError(
                    f'the data have {len(names)} classes ({_some(names)}), and {where} '
                    f'has num_classes={number}; set {where}.num_classes={len(names)}'
                )


def _is_here(cfg: Config, dataset: dict) -> bool:
    """False for data that are not on this machine, and need not be."""
    root = dataset.get('data_root') or ''
    if '://' in root:
        return False
    if root and not os.path.isdir(root):
        if not cfg.get('data_preparation') and _is_downloaded(cfg, dataset):
            return False
        _existing(cfg, root)
    return True


def walk(node: Any, where: str) -> Iterator[tuple[str, dict]]:
    """All dicts in a part of a config, with their places, as ``'model.neck[1]'``."""
    if isinstance(node, dict):
        yield where, node
        for key, value in node.items():
            yield from walk(value, f'{where}.{key}')
    elif isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from walk(item, f'{where}[{i}]')


def _datasets(loader: Any) -> list[dict]:
    """All dataset configs of a dataloader: wrappers, and wrapped ones."""
    found = walk(loader, 'loader')
    return [node for where, node in found if _DATASET.search(where)]


def _is_downloaded(cfg: Config, dataset: dict) -> bool:
    """Whether a dataset gets its data by itself."""
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            kind = registry.get(kind)
    known = inspect.signature(kind).parameters.get('download') if kind else None
    return known is not None and dataset.get('download', known.default)


def _classes_of_folder(cfg: Config, dataset: dict) -> tuple[str, ...]:
    prefix = dataset.get('data_prefix') or ''
    if isinstance(prefix, dict):
        prefix = prefix.get('img_path', '')
    folder = _existing(cfg, os.path.join(dataset.get('data_root') or '', prefix))
    classes = tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir()))
    if not classes:
        raise ValueError(f'{folder!r} has no folders in it, which are the classes')
    return classes


def _classes_of_coco(cfg: Config, dataset: dict) -> tuple[str, ...]:
    """The classes of a dataset, which its annotations have to have."""
    root = dataset.get('data_root') or ''
    path = _existing(cfg, os.path.join(root, dataset.get('ann_file') or ''))
    images = (dataset.get('data_prefix') or {}).get('img', '')
    _existing(cfg, os.path.join(root, images))
    classes = (dataset.get('metainfo') or {}).get('classes')
    if classes is None:
        with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            classes = registry.get(dataset['type']).METAINFO['classes']
    if os.path.getsize(path) > _LARGE:
        return tuple(classes)
    try:
        categories = json.loads(Path(path).read_text(encoding='utf-8'))['categories']
        known = [category['name'] for category in categories]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path!r} has no annotations in COCO's format ({error!r})"
        ) from error
    # MMDetection numbers those that it finds, in the order of the file.
    if [name for name in known if name in classes] != list(classes):
        raise ValueError(
            'metainfo=dict(classes=...) of every dataset is a tuple of classes of '
            f'{path!r}, in its order ({_some(known)}); found {classes!r}'
        )
    return tuple(classes)


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
