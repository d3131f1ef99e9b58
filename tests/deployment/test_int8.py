import numpy as np
import pytest
import torch
from helpers import assert_near, import_models, trained_like
from mmengine.config import Config
from torch import nn

from mmorepa.deployment.int8 import (
    calibration_images,
    evaluation_phase,
    layer_losses,
    prepare,
    quantize_onnx,
)
from mmorepa.deployment.onnx_files import OnnxNetwork, export_onnx
from mmorepa.utils.requirements import require


@pytest.fixture(autouse=True)
def onnx():
    for package in ('onnx', 'onnxruntime'):
        pytest.importorskip(package)
    return require('onnx')


class Chain(nn.Module):
    """Convs with ReLUs between them; the channels of the first differ in range."""

    def __init__(self, outlier=1.0):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.three = nn.Conv2d(8, 4, 1, groups=4)
        self.fc = nn.Linear(4, 5)
        trained_like(self)
        with torch.no_grad():
            self.one.weight[0] *= outlier
            self.one.bias[0] *= outlier
            self.two.weight[:, 0] /= outlier

    def forward(self, images, mode):
        x = self.two(self.one(images).relu()).relu()
        return self.fc(self.three(x).mean(dim=(2, 3)))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, 16, 16, generator=generator) for _ in range(8)]


@pytest.fixture
def files(tmp_path):
    return [tmp_path / f'{name}.onnx' for name in ('exported', 'float', 'int8')]


def quantized(model, images, files, equalized=False, **options):
    """The networks, and what INT8 costs the layers of the model, by name."""
    exported, source, target = files
    export_onnx(model.eval(), images[0], exported, metadata=dict(mean=[1.0]))
    pairs = prepare(exported, source, equalized)
    # Of the ranges of noise, which cuts nothing off.
    options = {'calibration': 'minmax', **options}
    quantize_onnx(source, target, images, **options)
    losses = {loss.name: loss for loss in layer_losses(source, target, images)}
    return OnnxNetwork(source), OnnxNetwork(target), losses, pairs


def error(model, network, images):
    with torch.no_grad():
        expected = torch.cat([model(x, 'tensor') for x in images])
    found = torch.cat([network(x)[0] for x in images])
    return ((found - expected).norm() / expected.norm()).item()


def test_close_to_float(images, files, onnx):
    model = Chain()
    source, target, losses, pairs = quantized(model, images, files)
    assert pairs == 0
    assert error(model, source, images) < 1e-5
    assert 1e-4 < error(model, target, images) < 0.05
    assert list(losses) == ['one', 'two', 'three', 'fc']
    for name, loss in losses.items():
        weight = getattr(model, name).weight.detach()
        channels = weight.abs().flatten(1).amax(1)
        assert loss.weight_range == pytest.approx(channels.max().item())
        middle = np.median(channels.numpy())
        assert loss.outlier == pytest.approx(channels.max().item() / middle, rel=1e-5)
        assert 30 < loss.kernel_snr < 60 and 20 < loss.output_snr < 60
    written = onnx.load(files[2])
    stored = {t.name: t for t in written.graph.initializer}
    assert stored['model.one.weight_quantized'].data_type == onnx.TensorProto.INT8
    assert len(stored['model.one.weight_scale'].float_data or [0] * 8) == 8
    assert [p.value for p in written.metadata_props if p.key == 'mean'] == ['[1.0]']
    # Any number of images, as before.
    assert target(torch.cat(images))[0].shape == (8, 5)


def test_outlier_and_its_remedies(images, files):
    """One scale for a kernel with one wide channel: what equalization is for."""
    model = Chain(outlier=50.0)
    errors = {}
    for name, options in dict(
        tensor=dict(per_channel=False),
        channel=dict(),
        equalized=dict(per_channel=False, equalized=True),
    ).items():
        source, target, losses, pairs = quantized(model, images, files, **options)
        assert error(model, source, images) < 1e-5  # Exact, equalized or not.
        errors[name] = error(model, target, images)
        if name == 'tensor':
            assert losses['one'].outlier > 20
            assert losses['one'].output_snr < 20
        if name == 'equalized':
            # Not the third: a grouped conv takes other channels.
            assert pairs == 1 and losses['one'].outlier < 5
    assert errors['equalized'] < errors['tensor'] / 3


def test_percentile_and_int8_and_7_bits(images, files):
    model = Chain()
    for options in (
        dict(calibration='percentile'),
        dict(calibration='average'),
        dict(activations='int8'),
        dict(reduce_range=True),
    ):
        _, target, losses, _ = quantized(model, images, files, **options)
        assert error(model, target, images) < 0.1
    # What is left is the error of the weights.
    target = quantized(model, images, files, activations='uint16')[1]
    assert error(model, target, images) < 0.01
    # Half as many steps: 6 dB.
    full = quantized(model, images, files)[2]
    assert losses['two'].kernel_snr == pytest.approx(
        full['two'].kernel_snr - 6, abs=1.5
    )


def test_pairs_that_are_none(images, files):
    """What else uses the channels between two convs would see them change."""

    class Branching(Chain):
        def forward(self, images, mode):
            x = self.one(images).relu()
            return self.two(x).relu() + x

    model = Branching(outlier=50.0)
    source, _, _, pairs = quantized(model, images, files, equalized=True)
    assert pairs == 0
    assert_near(source(images[0])[0], model(images[0], 'tensor').detach())


def test_channels_without_weights(images, files):
    model = Chain()
    with torch.no_grad():
        model.one.weight[1] = 0
        model.two.weight[:, 2] = 0
    source, _, _, pairs = quantized(model, images, files, equalized=True)
    assert pairs == 1 and error(model, source, images) < 1e-5


class Unscaled(nn.Module):
    """The preprocessor of a toolbox, to see the images themselves."""

    def data_preprocessor(self, batch, training):
        assert not training
        return dict(inputs=torch.stack([*batch['inputs']]))


@pytest.fixture
def folder(tmp_path):
    """Images of one value each: 1 and 2 to train with, 3 to test with."""
    import_models('mmpretrain')
    import mmcv

    for value in (1, 2, 3):
        path = tmp_path / f'{value}' / 'class' / 'a.png'
        mmcv.imwrite(np.full((6, 4, 3), value, np.uint8), str(path))

    def dataset(value, *steps):
        pipeline = [dict(type='LoadImageFromFile'), *steps, dict(type='PackInputs')]
        root = str(tmp_path / f'{value}')
        return dict(type='CustomDataset', data_root=root, pipeline=pipeline)

    return dataset


def loader(dataset):
    sampler = dict(type='DefaultSampler', shuffle=False)
    return dict(dataset=dataset, sampler=sampler, batch_size=2)


CROP = dict(type='RandomCrop', crop_size=2)


@pytest.mark.parametrize('around', ['nothing', 'repeat', 'mix', 'concat', 'concat mix'])
def test_calibration_images_are_not_augmented(folder, around):
    """Whatever is around the datasets that read the files."""
    parts = [folder(1, CROP)]
    if 'concat' in around:
        parts.append(folder(2, CROP))
    if 'repeat' in around:
        parts = [dict(type='RepeatDataset', times=2, dataset=part) for part in parts]
    if 'mix' in around:
        # As of MMDetection: its own pipeline takes what the inner one gives.
        mix = dict(type='MultiImageMixDataset', pipeline=[dict(type='Mosaic')])
        parts = [dict(mix, dataset=part) for part in parts]
    dataset = parts[0]
    if 'concat' in around:
        dataset = dict(type='ConcatDataset', datasets=parts)
    test = dict(type='RepeatDataset', times=1, dataset=folder(3))
    cfg = Config(dict(train_dataloader=loader(dataset), test_dataloader=loader(test)))
    cfg.merge_from_dict(dict(default_scope='mmpretrain', model={}))
    before = cfg.pretty_text
    found = calibration_images(cfg, Unscaled(), 5)
    assert cfg.pretty_text == before
    assert [image.shape for image in found] == [(1, 3, 6, 4)] * len(found)
    values = [image.unique().item() for image in found]
    assert values == ([1, 2] if 'concat' in around else [1])


def test_evaluation_phase():
    test = dict(test_dataloader=dict(a=1), test_evaluator=dict(a=1))
    assert evaluation_phase(Config(test)) == 'test'
    val = dict(val_dataloader=dict(a=1), val_evaluator=dict(a=1))
    assert evaluation_phase(Config({**test, **val})) == 'val'
    for part in ({}, dict(val_dataloader=dict(a=1), val_evaluator=None)):
        with pytest.raises(ValueError, match='no data to test with: it needs val_data'):
            evaluation_phase(Config(part))
