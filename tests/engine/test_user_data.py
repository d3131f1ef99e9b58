import json
import shutil

import pytest
from helpers import import_models

import mmorepa
from mmorepa.engine.config import check_data_folders, read_config
from mmorepa.hub import list_configs

FOLDER = 'custom/resnet18-orepa_1xb32_folder'
COCO = 'custom/faster-rcnn_r50-orepa_fpn_1xb2_coco-format'


def child(path, lines, base=FOLDER):
    path.write_text(f"_base_ = 'mmorepa::{base}.py'\n{lines}\n")
    return str(path)


class TestVariables:
    @pytest.mark.parametrize(
        'line',
        [
            "data_root = 'data/flowers'",
            "pretrained = 'resnet18.pth'",
            'num_classes = 3',
            "data_root = 'data/flowers'\nval_dataloader = dict(batch_size=1)",
            # A number of another meaning.
            'num_classes = 32',
        ],
    )
    def test_without_effect(self, tmp_path, line):
        name = line.partition(' ')[0]
        words = f'{name} = .* in .*own.py has no effect.* write .*={name}'
        with pytest.raises(ValueError, match=words):
            read_config(child(tmp_path / 'own.py', line))

    def test_classes_without_effect(self, tmp_path):
        train = "train_dataloader = dict(dataset=dict(metainfo=dict(classes=('cat',))))"
        path = child(tmp_path / 'own.py', f"classes = ('dog',)\n{train}", COCO)
        with pytest.raises(ValueError, match='classes = .*dog.* has no effect'):
            read_config(path)
        child(tmp_path / 'own.py', f"classes = ['cat']\n{train}", COCO)
        read_config(path)

    def test_with_effect(self, tmp_path):
        lines = """
data_root = 'data/flowers'
max_epochs = 7
num_classes = 3
pretrained = 'resnet18.pth'
train_dataloader = dict(dataset=dict(data_root=data_root + '/part'))
model = dict(
    backbone=dict(init_cfg=dict(checkpoint=pretrained)),
    head=dict(num_classes=num_classes),
)
train_cfg = dict(max_epochs=max_epochs)
"""
        path = child(tmp_path / 'own.py', lines)
        # Even where an option takes its place.
        cfg = read_config(path, {'train_cfg.max_epochs': 2})
        assert cfg.train_cfg.max_epochs == 2
        # What is written as a whole has variables that its bases once had.
        cfg.data_root = 'elsewhere'
        cfg.dump(tmp_path / 'whole.py')
        read_config(str(tmp_path / 'whole.py'))

    def test_computed_from(self, tmp_path):
        lines = 'num_classes = 2\nmodel = dict(head=dict(num_classes=num_classes + 1))'
        cfg = read_config(child(tmp_path / 'own.py', lines))
        assert cfg.model.head.num_classes == 3

    def test_options_without_effect(self):
        words = (
            '--cfg-options max_epochs=7 has no effect; write --cfg-options train_cfg'
        )
        with pytest.raises(ValueError, match=words):
            read_config('digits/resnet18-slim-orepa_1xb64_digits', {'max_epochs': 7})

    def test_handed_on(self, tmp_path):
        path = child(tmp_path / 'own.py', 'max_epochs = 7\nimage_size = 64')
        for cfg in (read_config(path), mmorepa.get_config(path)):
            assert cfg.train_cfg.max_epochs == 7
            assert cfg.train_dataloader.dataset.pipeline[1].scale == 64
            for phase in ('val', 'test'):
                steps = cfg[f'{phase}_dataloader'].dataset.pipeline
                assert (steps[1].scale, steps[2].crop_size) == (73, 64)
        for options in ({'max_epochs': 2}, {'train_cfg.max_epochs': 2}):
            assert read_config(path, options).train_cfg.max_epochs == 2
        path = child(tmp_path / 'own.py', 'image_size = (192, 128)', COCO)
        cfg = read_config(path)
        for phase, i in (('train', 2), ('val', 1), ('test', 1)):
            step = cfg[f'{phase}_dataloader'].dataset.pipeline[i]
            assert (step.type, step.scale) == ('Resize', (192, 128))

    def test_the_best_is_kept(self):
        for name in list_configs('custom/*'):
            hook = read_config(name).default_hooks.checkpoint
            assert (hook.save_best, hook.max_keep_ckpts) == ('auto', 3)

    def test_none_of_our_configs(self):
        for name in list_configs():
            read_config(name)


@pytest.fixture
def folder(tmp_path):
    """A folder of three classes, and its config."""
    import_models('mmpretrain')
    for split in ('train', 'val'):
        for name in ('daisy', 'rose', 'tulip'):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / '1.JPG').touch()
    cfg = read_config(FOLDER, {'model.head.num_classes': 3})
    for phase in ('train', 'val', 'test'):
        cfg[f'{phase}_dataloader'].dataset.data_root = str(tmp_path)
    return cfg


class TestFolder:
    def check(self, cfg, *phases):
        check_data_folders(cfg, phases or ('train', 'val'))

    def test_right(self, folder, tmp_path):
        self.check(folder)
        self.check(folder, 'test')
        (tmp_path / 'train' / 'notes.txt').touch()
        self.check(folder)

    def test_missing_root(self, folder):
        folder.val_dataloader.dataset.data_root = 'nowhere'
        with pytest.raises(
            FileNotFoundError, match="'nowhere' is missing; set data_ro"
        ):
            self.check(folder)

    def test_missing_split(self, folder, tmp_path):
        (tmp_path / 'val').rename(tmp_path / 'valid')
        self.check(folder, 'train')
        words = "val' is missing; .* has train, valid; set data_root"
        with pytest.raises(FileNotFoundError, match=words):
            self.check(folder)

    def test_number(self, folder):
        folder.model.head.num_classes = 1000
        words = '3 classes .daisy, rose, tulip.* set model.head.num_classes=3'
        with pytest.raises(ValueError, match=words):
            self.check(folder, 'test')

    def test_names(self, folder, tmp_path):
        (tmp_path / 'val' / 'rose').rename(tmp_path / 'val' / 'roses')
        self.check(folder, 'val')
        words = 'daisy, rose, tulip for train; daisy, roses, tulip for val'
        with pytest.raises(ValueError, match=words):
            self.check(folder)

    def test_names_go_before_their_number(self, folder, tmp_path):
        (tmp_path / 'val' / 'daisies').mkdir()
        with pytest.raises(ValueError, match='the phases have different classes'):
            self.check(folder)

    def test_no_folders(self, folder, tmp_path):
        for path in (tmp_path / 'train').iterdir():
            shutil.rmtree(path)
        with pytest.raises(ValueError, match='no folders in it, which are the classes'):
            self.check(folder)

    @pytest.mark.parametrize('left', [None, '1.heic', '.1.jpg'])
    def test_no_images_of_a_class(self, folder, tmp_path, left):
        """Nothing in its folder, or nothing that MMPretrain takes for an image."""
        for name in ('daisy', 'tulip'):
            image = tmp_path / 'train' / name / '1.JPG'
            image.rename(image.with_name(left)) if left else image.unlink()
        words = "no images in these folders of '.*train': daisy, tulip; each is a class"
        with pytest.raises(ValueError, match=words):
            self.check(folder)

    def test_no_images_with_these_extensions(self, folder):
        folder.train_dataloader.dataset.extensions = ['.PNG']
        with pytest.raises(ValueError, match="train': daisy, rose, tulip; each"):
            self.check(folder)

    def test_no_images_to_validate_with(self, folder, tmp_path):
        (tmp_path / 'val' / 'rose' / '1.JPG').unlink()
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
    cfg = read_config(COCO, {'model.roi_head.bbox_head.num_classes': 3})
    for phase in ('train', 'val', 'test'):
        dataset = cfg[f'{phase}_dataloader'].dataset
        dataset.update(data_root=str(tmp_path), metainfo=dict(classes=names))
    return cfg


class TestCoco:
    def test_right(self, coco):
        check_data_folders(coco, ('train', 'val'))
        dataset = coco.train_dataloader.dataset
        dataset.metainfo.classes = ('bird', 'cat')
        coco.model.roi_head.bbox_head.num_classes = 2
        check_data_folders(coco, ('train',))

    @pytest.mark.parametrize(
        'name', ['train2017', 'annotations/instances_train2017.json']
    )
    def test_missing(self, coco, tmp_path, name):
        (tmp_path / name).rename(tmp_path / 'elsewhere')
        with pytest.raises(FileNotFoundError, match=f"{name}/?' is missing"):
            check_data_folders(coco, ('train',))

    def test_order_of_classes(self, coco):
        metainfo = coco.val_dataloader.dataset.metainfo
        metainfo.classes = tuple(reversed(metainfo.classes))
        with pytest.raises(ValueError, match='the phases have different classes: '):
            check_data_folders(coco, ('train', 'val'))

    def test_classes(self, coco):
        coco.train_dataloader.dataset.metainfo.classes = ('cat', 'dgo', 'bird')
        words = 'dgo: no such class in .*, which has cat, dog, bird; set metainfo'
        with pytest.raises(ValueError, match=words):
            check_data_folders(coco, ('train',))
        coco.train_dataloader.dataset.metainfo.classes = 'cat'
        with pytest.raises(ValueError, match="is 'cat', and has to be a tuple"):
            check_data_folders(coco, ('train',))

    @pytest.mark.parametrize('text', ['{"images": [', '[]', '{"images": []}'])
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

    def test_number(self, coco):
        coco.model.roi_head.bbox_head.num_classes = 80
        words = 'set model.roi_head.bbox_head.num_classes=3'
        with pytest.raises(ValueError, match=words):
            check_data_folders(coco, ('train',))

    def test_number_of_every_head(self, coco):
        head = coco.model.roi_head.bbox_head
        coco.model.roi_head.bbox_head = [head, dict(head, num_classes=80)]
        with pytest.raises(
            ValueError, match=r'model.roi_head.bbox_head\[1\].num_class'
        ):
            check_data_folders(coco, ('train',))
