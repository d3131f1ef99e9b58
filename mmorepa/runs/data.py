"""Checks the data of a config, and reads them; one line for each mistake."""

import copy
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
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..utils.errors import DataError

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
    downloads = [d for d in _datasets(loader) if argument_of(d, 'download', scope)]
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

    Of MMPretrain's ``CustomDataset`` with a folder for each class, and MMDetection's
    ``CocoDataset``, it also looks at the classes; not in large annotations.

    Args:
        cfg (Config): Its ``data_preparation``, if any, is the advice of the error.
        phases (tuple[str, ...]): Out of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        FileNotFoundError: If a folder or a file of a dataset is missing.
        ValueError: If the classes are not those of the model, or of the other phases,
            or one has no image to train with.
    """
    classes: dict[str, tuple[str, ...]] = {}
    trained: set[str] = set()
    folder = ''
    for phase in phases:
        for dataset in _datasets(cfg.get(f'{phase}_dataloader')):
            kind = str(dataset.get('type')).rpartition('.')[-1]
            is_folder = not dataset.get('ann_file') and dataset.get('with_label', True)
            if not _is_to_check(cfg, dataset):
                continue
            if kind == 'CocoDataset':
                classes[phase] = _check_coco(cfg, dataset)
            elif kind == 'CustomDataset' and is_folder:
                folder, classes[phase] = _read_folder(cfg, dataset)
                if phase == 'train':
                    trained |= _with_images(cfg, dataset, folder, classes[phase])
        # Those to validate or to test with may be meant: the names have to be the same
        # for all phases.
        empty = [name for name in classes.get(phase, ()) if name not in trained]
        if phase == 'train' and folder and empty:
            raise ValueError(
                f'no images in these folders of {folder!r}: {_some(empty)}; each is a '
                'class, and has to have some, or to be removed'
            )
    # Before their number: no number would be right for both. The order counts, too.
    if len({*classes.values()}) > 1:
        texts = (f'{_some(names)} for {phase}' for phase, names in classes.items())
        raise ValueError(f'the phases have different classes: {"; ".join(texts)}')
    if folder and isinstance(cfg.model, dict):
        number = (cfg.model.get('head') or {}).get('num_classes')
        (names,) = {*classes.values()}
        _check_number(number, names, folder, 'model.head')


def _is_to_check(cfg: Config, dataset: dict) -> bool:
    """False for data that are not on this machine, and need not be."""
    root = dataset.get('data_root') or ''
    if not root or os.path.isdir(root):
        return True
    if '://' in root:
        return False
    advice = cfg.get('data_preparation')
    if advice is None and argument_of(dataset, 'download', cfg.get('default_scope')):
        return False
    raise FileNotFoundError(
        f'the data folder {root!r} is missing; '
        f'{advice or "set data_root to where it is"}'
    )


def _datasets(node: object) -> Iterator[dict]:
    """Yields all dataset configs of a dataloader: wrappers, and wrapped ones."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _datasets(item)
    elif isinstance(node, dict):
        for item in (node.get('dataset'), *(node.get('datasets') or ())):
            if isinstance(item, dict):
                yield item
            yield from _datasets(item)


def argument_of(dataset: dict, name: str, scope: Optional[str]) -> Any:
    """What a dataset gets for an argument; None if it, or the type, is not known."""
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    known = inspect.signature(kind).parameters.get(name) if kind else None
    return None if known is None else dataset.get(name, known.default)


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
    found = set()
    for name in classes:
        path = os.path.join(folder, name)
        files = list_dir_or_file(path, list_dir=False, recursive=True)
        if any(file.lower().endswith(endings) for file in files):
            found.add(name)
    return found


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
