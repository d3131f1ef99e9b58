import json
import shutil

import pytest
from helpers import import_models
from mmengine.config import Config

from mmorepa.hub import get_config
from mmorepa.runs import check_data_folders

FOLDER = 'custom/resnet18-orepa_1xb32_folder'
COCO = 'custom/faster-rcnn_r50-orepa_fpn_1xb2_coco-format'


class TestDataFolders:
    def check(self, phases=('train',), **loaders):
        check_data_folders(Config(loaders), phases)

    def missing(self, dataset, **options):
        with pytest.raises(FileNotFoundError, match="'none' is missing"):
            self.check(train_dataloader=dict(dataset=dataset), **options)

    NONE = dict(type='A', data_root='none')

    def test_there(self, tmp_path):
        for root in (str(tmp_path), 's3://bucket', '', None):
            self.check(train_dataloader=dict(dataset=dict(data_root=root)))
        self.check(train_dataloader=dict(dataset=dict(type='Random')))
        self.check(train_dataloader=None)
        self.check()

    def test_missing(self):
        self.missing(self.NONE)

    def test_downloaded(self):
        import_models('mmpretrain')
        cifar = dict(type='CIFAR10', data_root='none')
        options = dict(default_scope='mmpretrain')
        self.check(train_dataloader=dict(dataset=cifar), **options)
        self.missing(dict(cifar, download=False), **options)
        self.missing(dict(cifar, type='ImageNet'), **options)
        loaders = dict(train_dataloader=dict(dataset=cifar), data_preparation='run: it')
        with pytest.raises(FileNotFoundError, match='is missing; .*; run: it$'):
            self.check(**options, **loaders)

    def test_wrapped(self, tmp_path):
        there = dict(type='B', data_root=str(tmp_path))
        self.missing(dict(type='RepeatDataset', times=2, dataset=self.NONE))
        self.missing(dict(dataset=dict(dataset=self.NONE)))
        self.missing(dict(type='ConcatDataset', datasets=[there, self.NONE]))
        self.missing(dict(dataset=dict(datasets=[there, dict(dataset=self.NONE)])))
        self.check(train_dataloader=dict(dataset=dict(datasets=[there, there])))

    def test_only_what_is_read(self):
        loader = dict(dataset=self.NONE)
        self.check(('train', 'val'), test_dataloader=loader)
        with pytest.raises(FileNotFoundError):
            self.check(('test',), test_dataloader=loader)


@pytest.fixture
def folder(tmp_path):
    """A folder of three classes, and its config."""
    import_models('mmpretrain')
    for split in ('train', 'val'):
        for name in ('daisy', 'rose', 'tulip'):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / '1.JPG').touch()
    cfg = get_config(FOLDER, {'model.head.num_classes': 3})
    for phase in ('train', 'val', 'test'):
        cfg[f'{phase}_dataloader'].dataset.data_root = str(tmp_path)
    return cfg


def convert_image(cfg, root):
    """To a format that MMPretrain does not take for an image."""
    path = root / 'train/rose/1.JPG'
    path.rename(path.with_suffix('.heic'))


# What is wrong, and what is said.
WRONG_FOLDERS = [
    (lambda cfg, root: (root / 'val').rename(root / 'valid'), 'has train, valid'),
    (lambda cfg, root: cfg.model.head.update(num_classes=9), 'num_classes=3'),
    (lambda cfg, root: (root / 'val/rose').rename(root / 'val/roses'), 'roses'),
    (lambda cfg, root: [shutil.rmtree(p) for p in root.glob('train/*')], 'no folders'),
    (lambda cfg, root: (root / 'train/rose/1.JPG').unlink(), 'no images.*rose'),
    (convert_image, 'no images.*rose'),
]


class TestFolder:
    def check(self, cfg, *phases):
        check_data_folders(cfg, phases or ('train', 'val'))

    def test_right(self, folder, tmp_path):
        self.check(folder)
        self.check(folder, 'test')
        (tmp_path / 'train' / 'notes.txt').touch()
        self.check(folder)

    @pytest.mark.parametrize(('change', 'words'), WRONG_FOLDERS)
    def test_wrong(self, folder, tmp_path, change, words):
        change(folder, tmp_path)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            self.check(folder)

    def test_images_of_a_class_in_one_of_two_datasets(self, folder, tmp_path):
        shutil.copytree(tmp_path / 'train', tmp_path / 'more')
        (tmp_path / 'train' / 'rose' / '1.JPG').unlink()
        (tmp_path / 'more' / 'tulip' / '1.JPG').unlink()
        (tmp_path / 'more' / 'daisy' / '1.JPG').unlink()
        dataset = folder.train_dataloader.dataset
        datasets = [dataset, dict(dataset, data_prefix='more')]
        folder.train_dataloader.dataset = dict(type='ConcatDataset', datasets=datasets)
        self.check(folder)

    def test_annotations_and_images_alone_are_left_to_mmpretrain(
        self, folder, tmp_path
    ):
        dataset = folder.train_dataloader.dataset
        folder.model.head.num_classes = 4
        dataset.ann_file = 'train.txt'
        self.check(folder, 'train')
        dataset.ann_file, dataset.with_label = '', False
        self.check(folder, 'train')


@pytest.fixture
def coco(tmp_path):
    """Annotations of three classes, without boxes, and their config."""
    (tmp_path / 'annotations').mkdir()
    names = ('cat', 'dog', 'bird')
    text = json.dumps(
        dict(categories=[dict(id=i, name=name) for i, name in enumerate(names)])
    )
    for split in ('train', 'val'):
        (tmp_path / f'{split}2017').mkdir()
        (tmp_path / 'annotations' / f'instances_{split}2017.json').write_text(text)
    cfg = get_config(COCO, {'model.roi_head.bbox_head.num_classes': 3})
    for phase in ('train', 'val', 'test'):
        dataset = cfg[f'{phase}_dataloader'].dataset
        dataset.update(data_root=str(tmp_path), metainfo=dict(classes=names))
    return cfg


WRONG_CLASSES = [
    (('cat', 'dog'), 'different classes'),
    # MMDetection would give the labels other names.
    (('bird', 'dog', 'cat'), 'another order .* write .cat, dog, bird'),
    (('cat', 'dgo', 'bird'), 'dgo.*cat, dog, bird'),
    ('cat', 'tuple'),
]


class TestCoco:
    def test_right(self, coco):
        check_data_folders(coco, ('train', 'val'))
        dataset = coco.train_dataloader.dataset
        dataset.metainfo.classes = ('cat', 'bird')
        coco.model.roi_head.bbox_head.num_classes = 2
        check_data_folders(coco, ('train',))

    @pytest.mark.parametrize(
        'name', ['train2017', 'annotations/instances_train2017.json']
    )
    def test_missing(self, coco, tmp_path, name):
        (tmp_path / name).rename(tmp_path / 'elsewhere')
        with pytest.raises(FileNotFoundError, match=f"{name}/?' is missing"):
            check_data_folders(coco, ('train',))

    @pytest.mark.parametrize(('classes', 'words'), WRONG_CLASSES)
    def test_classes(self, coco, classes, words):
        coco.train_dataloader.dataset.metainfo.classes = classes
        with pytest.raises(ValueError, match=words):
            check_data_folders(coco, ('train', 'val'))

    @pytest.mark.parametrize('text', ['{"images": [', '{"images": []}'])
    def test_damaged(self, coco, tmp_path, text):
        path = tmp_path / 'annotations' / 'instances_train2017.json'
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path.name}' has no annotations in CO"):
            check_data_folders(coco, ('train',))

    def test_classes_left_out(self, coco):
        import_models('mmdet')
        del coco.train_dataloader.dataset['metainfo']
        words = 'person, bicycle, .*…: no such class in .*, which has cat, dog, bird'
        with pytest.raises(ValueError, match=words):
            check_data_folders(coco, ('train',))
