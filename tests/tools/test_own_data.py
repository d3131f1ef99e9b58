"""What docs/own_data.md tells a new user to do, done literally but at a small size."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import import_models, trained_like
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.structures import InstanceData
from PIL import Image
from tool_runs import ROOT, run_here, run_runner, skip_timing

import mmorepa
from mmorepa.__main__ import COMMANDS

pytestmark = pytest.mark.slow

TEXT = (ROOT / 'docs' / 'own_data.md').read_text()
FILES = dict(re.findall(r'Write `(\w+)\.py`[^`]*:\n\n```python\n(.*?)```', TEXT, re.S))
COCO = 'custom/faster-rcnn_r50-orepa_fpn_1xb2_coco-format'


def command_lines(name):
    """Those on a file of the document, as arguments of ``python -m mmorepa``."""
    blocks = re.findall(r'```bash\n(.*?)```', TEXT, re.S)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert all(line[:3] == ['python', '-m', 'mmorepa'] for line in lines)
    return [line[3:] for line in lines if f'{name}.py' in line]


def follow(name, epochs, options, shape):
    """Writes the file and runs the commands; returns what testing returns."""
    assert f'max_epochs = {epochs}' in FILES[name]
    text = FILES[name].replace(f'max_epochs = {epochs}', 'max_epochs = 1')
    Path(f'{name}.py').write_text(text.replace('image_size = 224', 'image_size = 64'))
    train, test, predict, deploy = command_lines(name)
    for line in (test, predict, deploy):
        assert f'work_dirs/{name}/epoch_{epochs}.pth' in line
        line[:] = [word.replace(f'epoch_{epochs}', 'epoch_1') for word in line]
    run_runner(COMMANDS[train[0]], *train[1:], options=options)
    metrics = run_runner(COMMANDS[test[0]], *test[1:], options=options)
    Image.new('RGB', shape).save(predict[-1])
    run_here(COMMANDS[predict[0]], *predict[1:], '--cfg-options', *options)
    shape = ['--shape', *shape, '--cfg-options', *options]
    run_here(COMMANDS[deploy[0]], *deploy[1:], *shape)
    return metrics


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to be in."""
    skip_timing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plain_checkpoint(scope, depth):
    """As torchvision's, but narrow; the option that makes a config so narrow."""
    import_models(scope)
    size = dict(depth=depth, stem_channels=24, base_channels=24)
    plain = trained_like(MODELS.build(dict(type=f'{scope}.ResNet', **size)))
    torch.save(plain.state_dict(), f'resnet{depth}.pth')
    return 'model.backbone.base_channels=24'


def test_images_in_folders(folder, digits):
    """Three classes of digits stand for the flowers."""
    for split, number in (('train', 6), ('val', 3)):
        for digit, name in enumerate(('daisy', 'rose', 'tulip')):
            target = folder / 'data' / 'flowers' / split / name
            target.mkdir(parents=True)
            for path in sorted((digits / split / str(digit)).iterdir())[:number]:
                (target / path.name).symlink_to(path)
    small = ('num_workers=0', 'persistent_workers=False', 'batch_size=6')
    options = [f'{p}_dataloader.{o}' for p in ('train', 'val', 'test') for o in small]
    options += [plain_checkpoint('mmpretrain', 18), 'model.head.in_channels=192']
    metrics = follow('flowers', 30, options, (64, 64))
    assert 0 <= metrics['accuracy/top1'] <= 100
    assert (folder / 'flowers.pth').is_file()
    assert list((folder / 'work_dirs/flowers/predictions').iterdir())


@pytest.fixture
def pets(folder, digits):
    """Scenes with three classes of digits stand for the pets."""
    names = ('cat', 'dog', 'bird')
    target = folder / 'data' / 'pets'
    (target / 'annotations').mkdir(parents=True)
    for split, number in (('train2017', 2), ('val2017', 4)):
        name = f'annotations/instances_{split}.json'
        file = json.loads((digits / 'coco' / name).read_text())
        file['categories'] = [dict(id=i, name=name) for i, name in enumerate(names)]
        boxes = [box for box in file['annotations'] if box['category_id'] < 3]
        images = sorted({box['image_id'] for box in boxes})[:number]
        file['annotations'] = [box for box in boxes if box['image_id'] in images]
        file['images'] = [image for image in file['images'] if image['id'] in images]
        (target / name).write_text(json.dumps(file))
        (target / split).symlink_to(digits / 'coco' / split)
    return target


def test_boxes(folder, pets):
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    small = ('num_workers=0', 'persistent_workers=False')
    options = [f'{p}_dataloader.{o}' for p in ('train', 'val', 'test') for o in small]
    for phase, step in (('train', 2), ('val', 1), ('test', 1)):
        options.append(f'{phase}_dataloader.dataset.pipeline.{step}.scale=(96,64)')
    options += [
        'val_dataloader.dataset.indices=2',
        plain_checkpoint('mmdet', 50),
        'model.neck.in_channels=[96,192,384,768]',
        'model.roi_head.bbox_head.fc_out_channels=32',
    ]
    follow('pets', 12, options, (64, 96))
    assert (folder / 'pets.pth').is_file()


def test_evaluation_needs_no_file_of_its_own(folder, pets):
    """The boxes of the dataset give the metrics that those of the file give."""
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    import_models('mmdet')
    cfg = mmorepa.get_config(COCO)
    dataset_cfg = cfg.val_dataloader.dataset
    classes = ('cat', 'dog', 'bird')
    dataset_cfg.update(data_root=str(pets), metainfo=dict(classes=classes))
    with DATASETS.switch_scope_and_registry('mmdet') as registry:
        dataset = registry.build(dataset_cfg)
    path = str(pets / dataset_cfg.ann_file)
    found = []
    for ann_file in (None, path):
        with METRICS.switch_scope_and_registry('mmdet') as registry:
            metric = registry.build({**cfg.val_evaluator, 'ann_file': ann_file})
        metric.dataset_meta = dataset.metainfo
        generator = np.random.default_rng(0)
        for i in range(len(dataset)):
            sample = dataset[i]['data_samples']
            instances = sample.gt_instances
            # Loaded after the images were resized, they are those of the file.
            boxes = instances.bboxes.tensor
            noise = torch.from_numpy(generator.normal(size=boxes.shape)).float()
            sample.pred_instances = InstanceData(
                bboxes=boxes + 3 * noise,
                scores=torch.from_numpy(generator.random(len(boxes))).float(),
                labels=instances.labels.clone(),
            )
            metric.process({}, [sample.to_dict()])
        found.append(metric.evaluate(len(dataset)))
    assert found[0] == found[1]
    assert 0.1 < found[0]['coco/bbox_mAP'] < 0.95
