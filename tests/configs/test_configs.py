import math
import os
import re
import subprocess
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from helpers import assert_near, import_models, trained_like
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmorepa import is_switchable
from mmorepa.layers import ReparamConv2d

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
OPENED = sorted(
    path
    for path in CONFIGS.glob('**/*.py')
    if '_base_' not in path.relative_to(CONFIGS).parts
)
NAMES = [str(path.relative_to(CONFIGS)) for path in OPENED]
DEPLOYED = [name for name in NAMES if '/deploy/' in name]
# Those of detectors and segmenters are tested in tests/transfer, and those for data of
# one's own in tests/tools/test_own_data.py.
CLASSIFIERS = [
    name
    for name in NAMES
    if name not in DEPLOYED
    and not name.startswith('custom/')
    and Config.fromfile(CONFIGS / name).default_scope == 'mmpretrain'
]


def load(name):
    """A config by its name under configs/, its classes registered."""
    cfg = Config.fromfile(CONFIGS / name)
    import_models(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    return cfg


def test_there_are_configs():
    assert {'imagenet/resnet18-orepa_4xb64_in1k.py'} < set(NAMES)


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_is_short(name):
    """What a user opens says what is special about it, and little more."""
    assert len((CONFIGS / name).read_text().splitlines()) <= 15


def test_deployed_configs():
    """Of every network with branches, and nothing is changed but the form."""
    expected = {}
    for name in NAMES:
        if not name.startswith('imagenet/') or name in DEPLOYED:
            continue
        cfg = Config.fromfile(CONFIGS / name)
        backbone = cfg.model.backbone
        if 'stem_block' in backbone or backbone.block != 'plain':
            cfg.model.backbone.deploy = True
            stem = Path(name).stem.replace('_4xb64_', '_deploy_')
            expected[f'imagenet/deploy/{stem}.py'] = cfg.to_dict()
    assert expected.keys() == set(DEPLOYED)
    for name, cfg in expected.items():
        assert Config.fromfile(CONFIGS / name).to_dict() == cfg


@pytest.mark.parametrize('network', ['resnet18-orepa', 'resnet18-dbb', 'repvgg-a0'])
def test_deployed_config_takes_training_checkpoints(network):
    name = f'imagenet/{network}_4xb64_in1k.py'
    training = trained_like(MODELS.build(shrink(load(name)).model)).eval()
    name = f'imagenet/deploy/{network}_deploy_in1k.py'
    deployed = MODELS.build(shrink(load(name)).model).eval()
    assert is_switchable(training) and not is_switchable(deployed)
    deployed.load_state_dict(training.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_near(deployed(images), training(images), 1e-4)


def test_every_base_is_used():
    bases = {path.resolve() for path in (CONFIGS / '_base_').glob('**/*.py')}
    used = set()
    for path in [*OPENED, *bases]:
        for name in re.findall(r"'([^']*\.py)'", path.read_text()):
            used.add((path.parent / name).resolve())
    assert bases and bases <= used
    assert all(path.exists() for path in used)


def shrink(cfg):
    """A quarter of the width, for the backbone of a classifier."""
    backbone, head = cfg.model.backbone, cfg.model.head
    before = backbone.get('base_channels', 64)
    backbone.base_channels = 16  # The least that ResNeXt's groups divide.
    head.in_channels = head.in_channels * 16 // before
    return cfg


def classification_batch(size, model):
    from mmpretrain.structures import DataSample

    channels = model.backbone.get('in_channels', 3)
    images = torch.randint(256, (2, channels, size, size), dtype=torch.uint8)
    labels = torch.randint(model.head.num_classes, (2,))
    samples = [DataSample().set_gt_label(label) for label in labels]
    return dict(inputs=images, data_samples=samples)


@pytest.mark.slow
@pytest.mark.parametrize('name', CLASSIFIERS)
def test_trains_and_tests(name):
    cfg = load(name)
    shrink(cfg).model.data_preprocessor = cfg.data_preprocessor
    model = MODELS.build(cfg.model)
    assert any(isinstance(module, ReparamConv2d) for module in model.modules())
    model.init_weights()
    before = {key: value.clone() for key, value in model.named_parameters()}
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = classification_batch(32, cfg.model)
    losses = model.train().train_step(batch, wrapper)
    assert torch.isfinite(losses['loss'])
    still = [k for k, v in model.named_parameters() if torch.equal(v, before[k])]
    # 1x1 convs after dead units, say, may get no gradient from two images, but not
    # whole parts of the network.
    assert len(still) < 0.1 * len(before), still

    results = model.eval().test_step(batch)
    assert [len(r.pred_score) for r in results] == [cfg.model.head.num_classes] * 2
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.process(data_samples=results, data_batch=batch)
    metrics = evaluator.evaluate(2)
    assert 0 <= metrics['accuracy/top1'] <= 100


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_names_tell_the_truth(name):
    """The name of a file is all that many users read of it."""
    cfg = Config.fromfile(CONFIGS / name)
    network, batches, data = Path(name).stem.split('_')
    stem = re.search('-(orepa|deep-linear)-stem', network)
    network = network.replace(stem[0], '') if stem else network
    is_part = data.endswith('-10pct')
    assert (cfg.train_dataloader.dataset.get('indices') == 6000) is is_part
    assert 'indices' not in cfg.val_dataloader.dataset
    backbone = cfg.model.backbone
    assert backbone.get('stem_block') == (stem[1].replace('-', '_') if stem else None)
    blocks = dict(orepa='orepa', dbb='dbb')
    wanted = next((v for k, v in blocks.items() if k in network.split('-')), 'plain')
    if 'repvgg' in network:
        assert backbone.arch.lower() == network.split('-')[1]
        wanted = dict(orepa='orepa_repvgg', plain='repvgg')[wanted]
        assert backbone.block in (wanted, wanted.replace('_repvgg', ''))
    else:
        assert backbone.block == wanted
        assert str(backbone.depth) in network
        grouped = (backbone.get('groups', 1), backbone.get('width_per_group', 64))
        assert grouped == ((32, 4) if '32x4d' in network else (1, 64))
        width = backbone.get('width_mult', 1)
        assert width == float((re.findall(r'-([\d.]+)x(?:-|$)', network) or [1])[0])
    gpus, images = map(int, re.fullmatch(r'(\d+)xb(\d+)', batches).groups())
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr.base_batch_size == gpus * images
    classes = {'in1k': 1000, 'digits': 10, 'fashion-mnist': 10}[
        data.removesuffix('-10pct')
    ]
    assert cfg.model.head.num_classes == classes == cfg.data_preprocessor.num_classes
    assert ('slim' in network) == (backbone.get('base_channels', 64) < 64)


@pytest.mark.parametrize('dataset, shape', [('imagenet', 224), ('digits', 32)])
def test_pipelines(tmp_path, dataset, shape):
    """From an image file to what the network is given."""
    cfg = load(next(name for name in CLASSIFIERS if name.startswith(dataset)))
    size = (8, 8) if dataset == 'digits' else (300, 400)
    image = np.random.default_rng(0).integers(256, size=(*size, 3)).astype(np.uint8)
    path = tmp_path / 'image.png'
    mmcv.imwrite(image, str(path))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        transforms = [TRANSFORMS.build(step) for step in loader.dataset.pipeline]
        packed = Compose(transforms)(dict(img_path=str(path), gt_label=3))
        assert packed['inputs'].shape == (3, shape, shape)
        assert packed['inputs'].dtype == torch.uint8
        assert packed['data_samples'].gt_label.tolist() == [3]
    preprocessor = MODELS.build(
        dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
    )
    normalised = preprocessor(
        dict(inputs=packed['inputs'][None], data_samples=[packed['data_samples']])
    )['inputs'][0]
    mean, std = (
        torch.tensor(cfg.data_preprocessor[name])[:, None, None]
        for name in ('mean', 'std')
    )
    # The means are those of RGB, and OpenCV reads BGR.
    assert torch.allclose(normalised, (packed['inputs'].flip(0) - mean) / std)


def test_pipelines_of_fashion_mnist():
    """From the grey image that the dataset holds; no stage ends at a single pixel."""
    for name in CLASSIFIERS:
        if not name.startswith('fashion'):
            continue
        cfg = load(name)
        image = np.random.default_rng(0).integers(256, size=(28, 28)).astype(np.uint8)
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            transforms = [TRANSFORMS.build(step) for step in loader.dataset.pipeline]
            packed = Compose(transforms)(dict(img=image, gt_label=3))
            assert packed['inputs'].shape == (1, 28, 28)
        # The last pipeline is that of the test, which changes nothing.
        assert np.array_equal(packed['inputs'][0], image)
        preprocessor = MODELS.build(
            dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
        )
        inputs = preprocessor(
            dict(inputs=packed['inputs'][None], data_samples=[packed['data_samples']])
        )['inputs']
        expected = (packed['inputs'] - 72.94) / 90.02
        assert torch.allclose(inputs[0], expected, rtol=1e-5)
        maps = MODELS.build(cfg.model.backbone)(inputs.expand(2, -1, -1, -1))
        assert maps[-1].shape[2:] == (2, 2)


def test_imagenet_is_evaluated_as_in_the_paper():
    """Short side 256, then the centre."""
    cfg = load(next(name for name in NAMES if name.startswith('imagenet')))
    steps = [TRANSFORMS.build(s) for s in cfg.test_dataloader.dataset.pipeline[1:3]]
    image = np.zeros((600, 300, 3), np.uint8)
    resized = steps[0](dict(img=image, img_shape=image.shape[:2]))
    assert resized['img'].shape[:2] == (512, 256)
    resized['img'][144:368, 16:240] = 1
    cropped = steps[1](resized)['img']
    assert cropped.shape[:2] == (224, 224) and (cropped == 1).all()


class Point(BaseModel):
    """One weight and one bias, for a look at learning rates."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.norm(self.linear(inputs)).sum())


class Rates(Hook):
    """The learning rates of each iteration."""

    def __init__(self):
        self.of_weights, self.of_biases = [], []

    def before_train_iter(self, runner, *args, **kwargs):
        groups = runner.optim_wrapper.optimizer.param_groups
        rates = {id(p): group['lr'] for group in groups for p in group['params']}
        self.of_weights.append(rates[id(runner.model.linear.weight)])
        self.of_biases.append(rates[id(runner.model.linear.bias)])


@pytest.mark.parametrize(
    'name, epochs',
    [
        ('imagenet/resnet18-orepa_4xb64_in1k.py', 120),
        ('digits/resnet18-slim-orepa_1xb64_digits.py', 20),
    ],
)
def test_learning_rates(tmp_path, name, epochs):
    """Five steps of warm-up times a cosine that ends, at zero, with the training."""
    cfg = Config.fromfile(CONFIGS / name)
    assert cfg.train_cfg.max_epochs == epochs
    assert not cfg.auto_scale_lr.get('enable', False)
    cfg.train_cfg.val_interval = 1000
    rates, length = Rates(), 3
    Runner(
        model=Point(),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=4,
            dataset=torch.utils.data.TensorDataset(torch.rand(4 * length, 1)),
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=cfg.train_cfg,
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=cfg.param_scheduler,
        custom_hooks=[rates],
        default_hooks=dict(
            checkpoint=None, logger=dict(type='LoggerHook', interval=10**6)
        ),
        log_level='ERROR',
        experiment_name=f'rates-{tmp_path.name}',
    ).train()
    total = epochs * length
    expected = [
        0.1 * min(1, (i + 1) / 5) * (1 + math.cos(math.pi * i / total)) / 2
        for i in range(total)
    ]
    assert rates.of_weights == pytest.approx(expected, rel=1e-6)
    assert rates.of_biases == pytest.approx([2 * rate for rate in expected], rel=1e-6)


def test_batch_and_length_of_the_paper():
    for name in NAMES:
        if name.startswith('imagenet'):
            cfg = Config.fromfile(CONFIGS / name)
            assert cfg.train_cfg.max_epochs == 120
            optimizer = cfg.optim_wrapper.optimizer
            assert optimizer == dict(
                type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4
            )


FRESH = """
import sys
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

cfg = Config.fromfile(sys.argv[1])
toolboxes = {'mmpretrain', 'mmdet', 'mmseg', 'mmpose'} & set(sys.modules)
assert not toolboxes, toolboxes
init_default_scope(cfg.default_scope)
backbone = MODELS.build(cfg.model.backbone)
assert type(backbone).__module__.startswith('mmorepa.'), type(backbone)
assert cfg.default_scope in sys.modules
print('built', type(backbone).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_custom_imports_are_all_that_it_takes(tmp_path, scope):
    import_models(scope)
    config = tmp_path / 'config.py'
    config.write_text(
        "custom_imports = dict(imports=['mmorepa'], allow_failed_imports=False)\n"
        f'default_scope = {scope!r}\n'
        "backbone = dict(type='OREPAResNet', depth=18, base_channels=4)\n"
        'model = dict(backbone=backbone)\n'
    )
    code = FRESH.replace(
        'backbone = MODELS',
        "MODELS.build(dict(type='ReLU'))  # Imports the scope.\nbackbone = MODELS",
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(config)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'built OREPAResNet'


def test_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES[:1] + NAMES[-1:]:
        cfg = Config.fromfile(os.path.relpath(CONFIGS / name))
        assert cfg.custom_imports.imports == ['mmorepa'] and 'model' in cfg
    own = tmp_path / 'own.py'
    own.write_text(
        f'_base_ = {str(CONFIGS / NAMES[0])!r}\nmodel = dict(backbone=dict(a=1))\n'
    )
    assert Config.fromfile('own.py').model.backbone.a == 1
