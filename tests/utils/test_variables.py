"""What people set at the top of a config of their own."""

import pytest

from mmorepa.hub import get_config, list_configs

FOLDER = 'custom/resnet18-orepa_1xb32_folder'
COCO = 'custom/faster-rcnn_r50-orepa_fpn_1xb2_coco-format'


def child(path, lines, base=FOLDER):
    path.write_text(f"_base_ = 'mmorepa::{base}.py'\n{lines}\n")
    return str(path)


@pytest.mark.parametrize(
    'line',
    [
        "data_root = 'data/flowers'",
        "pretrained = 'resnet18.pth'",
        'num_classes = 3',
        "data_root = 'data/flowers'\nval_dataloader = dict(batch_size=1)",
        # A number of another meaning, and one that begins as the base's.
        'num_classes = 32',
        'num_classes = 100',
    ],
)
def test_without_effect(tmp_path, line):
    name = line.partition(' ')[0]
    words = f'{name} = .* in .*own.py has no effect.* write .*={name}'
    with pytest.raises(ValueError, match=words):
        get_config(child(tmp_path / 'own.py', line))


def test_classes_without_effect(tmp_path):
    train = "train_dataloader = dict(dataset=dict(metainfo=dict(classes=('cat',))))"
    path = child(tmp_path / 'own.py', f"classes = ('dog',)\n{train}", COCO)
    with pytest.raises(ValueError, match='classes = .*dog.* has no effect'):
        get_config(path)
    child(tmp_path / 'own.py', f"classes = ['cat']\n{train}", COCO)
    get_config(path)


def test_with_effect(tmp_path):
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
    cfg = get_config(path, {'train_cfg.max_epochs': 2})
    assert cfg.train_cfg.max_epochs == 2
    # What is written as a whole has variables that its bases once had.
    cfg.data_root = 'elsewhere'
    cfg.dump(tmp_path / 'whole.py')
    get_config(str(tmp_path / 'whole.py'))


def test_options_without_effect():
    words = '--cfg-options max_epochs=7 has no effect; write --cfg-options train_cfg'
    with pytest.raises(ValueError, match=words):
        get_config('digits/resnet18-slim-orepa_1xb64_digits', {'max_epochs': 7})


def test_handed_on(tmp_path):
    path = child(tmp_path / 'own.py', 'max_epochs = 7\nimage_size = 64')
    cfg = get_config(path)
    assert cfg.train_cfg.max_epochs == 7
    assert cfg.train_dataloader.dataset.pipeline[1].scale == 64
    for phase in ('val', 'test'):
        steps = cfg[f'{phase}_dataloader'].dataset.pipeline
        assert (steps[1].scale, steps[2].crop_size) == (73, 64)
    for options in ({'max_epochs': 2}, {'train_cfg.max_epochs': 2}):
        assert get_config(path, options).train_cfg.max_epochs == 2
    path = child(tmp_path / 'own.py', 'image_size = (192, 128)', COCO)
    cfg = get_config(path)
    for phase, i in (('train', 2), ('val', 1), ('test', 1)):
        step = cfg[f'{phase}_dataloader'].dataset.pipeline[i]
        assert (step.type, step.scale) == ('Resize', (192, 128))


def test_the_best_is_kept():
    for name in list_configs('custom/*'):
        hook = get_config(name).default_hooks.checkpoint
        assert (hook.save_best, hook.max_keep_ckpts) == ('auto', 3)
