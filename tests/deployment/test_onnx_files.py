import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import assert_near, import_models, trained_like
from mmengine.config import Config
from torch import nn

import mmorepa
from mmorepa import switch_to_deploy
from mmorepa.deployment import onnx_files
from mmorepa.deployment.networks import (
    DeployedNetwork,
    named_outputs,
    network_from,
)
from mmorepa.deployment.onnx_files import OnnxNetwork, export_onnx, preprocessing
from mmorepa.runs import build_model
from mmorepa.utils.requirements import require

CONFIGS = Path(__file__).parents[2] / 'configs/digits'
FOLDER = 'custom/resnet18-orepa_1xb32_folder.py'
NETWORKS = dict(
    classifier=('mmpretrain', 'resnet18-slim-orepa_1xb64'),
    repvgg=('mmpretrain', 'repvgg-a0-slim-orepa_1xb64'),
    dbb=('mmpretrain', 'resnet18-slim-dbb_1xb64'),
    segmenter=('mmseg', 'deeplabv3plus_r18-slim-orepa-d8_1xb8-2500'),
    retinanet=('mmdet', 'retinanet_r18-slim-orepa_fpn_1xb2-10e'),
    faster_rcnn=('mmdet', 'faster-rcnn_r18-slim-orepa_fpn_1xb2-10e'),
)


def config(name):
    scope, stem = NETWORKS[name]
    import_models(scope)
    return Config.fromfile(CONFIGS / f'{stem}_digits.py')


def deployed(name):
    return switch_to_deploy(trained_like(build_model(config(name))))


@pytest.fixture
def onnx():
    for package in ('onnx', 'onnxruntime'):
        pytest.importorskip(package)
    return require('onnx')


@pytest.fixture
def images():
    """Not as many as the exporter saw."""
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def check(model, images, path, exporter):
    export_onnx(model, images[:1], path, exporter)
    network = OnnxNetwork(path)
    with torch.no_grad():
        expected = DeployedNetwork(model)(images)
    assert_near(network(images), expected)
    assert_near(network(images[:1]), [tensor[:1] for tensor in expected])
    return network


@pytest.mark.parametrize('name', NETWORKS)
def test_torchscript(name, onnx, images, tmp_path):
    network = check(deployed(name), images, tmp_path / 'a.onnx', 'torchscript')
    groups = network.grouped(images)
    if name == 'retinanet':
        assert {k: len(v) for k, v in groups.items()} == dict(scores=5, boxes=5)
    elif name == 'faster_rcnn':
        assert list(groups) == ['features', 'rpn_scores', 'rpn_boxes']
    else:
        assert list(groups) == ['logits']
    nodes = {node.op_type for node in onnx.load(tmp_path / 'a.onnx').graph.node}
    assert 'Conv' in nodes and 'BatchNormalization' not in nodes


@pytest.mark.slow
@pytest.mark.parametrize('name', ['classifier', 'faster_rcnn'])
def test_dynamo(name, onnx, images, tmp_path):
    pytest.importorskip('onnxscript')
    check(deployed(name), images, tmp_path / 'a.onnx', 'dynamo')


@pytest.mark.parametrize('name', ['classifier', 'segmenter'])
def test_other_ways_out(name, images):
    """torch.export and TorchScript."""
    network = DeployedNetwork(deployed(name)).eval()
    with torch.no_grad():
        expected = network(images)
        batch = torch.export.Dim('batch', min=2)
        program = torch.export.export(
            network, (images[:2],), dynamic_shapes=({0: batch},)
        )
        assert_near(program.module()(images), expected)
        traced = torch.jit.trace(network, images[:2])
        assert_near(traced(images), expected)


@pytest.mark.parametrize(
    'name', ['classifier', 'segmenter', 'retinanet', 'faster_rcnn']
)
def test_takes_the_place_of_a_network(name, onnx, images, tmp_path):
    """Predictions come from the file, through the model's own post-processing."""
    model, other = deployed(name), deployed(name)
    with torch.no_grad():
        # The second stage of a detector stays the model's own.
        for parameter in other.backbone.parameters():
            parameter.mul_(1.1)
    export_onnx(other, images[:1], tmp_path / 'a.onnx')
    batch = dict(
        inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)],
        data_samples=samples(name),
    )
    if name == 'classifier':
        batch['inputs'] = torch.stack(batch['inputs'])
    before = predictions(model, batch)
    expected = predictions(other, batch)
    assert not torch.allclose(before, expected, atol=1e-3)
    with network_from(model, OnnxNetwork(tmp_path / 'a.onnx')):
        assert_near(predictions(model, batch), expected, 1e-4)
    assert torch.equal(predictions(model, batch), before)


def test_pads_images_of_detectors(onnx, images, tmp_path):
    model = deployed('retinanet')
    export_onnx(model, images[:1], tmp_path / 'a.onnx')
    network = OnnxNetwork(tmp_path / 'a.onnx', pads=True)
    full = images.clone()
    full[..., 40:, :] = full[..., 48:] = 0
    with torch.no_grad():
        expected = DeployedNetwork(model)(full)
    assert_near(network(full[..., :40, :48]), expected)
    with pytest.raises(ValueError, match='takes images of 64x64, found 64x70'):
        network(torch.zeros(1, 3, 8, 70))


def samples(name):
    meta = dict(ori_shape=(64, 64), img_shape=(64, 64), scale_factor=(1.0, 1.0))
    if name == 'classifier':
        from mmpretrain.structures import DataSample as Sample
    elif name == 'segmenter':
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    return [Sample(metainfo=meta) for _ in range(2)]


def predictions(model, batch):
    with torch.no_grad():
        found = model.val_step(copy.deepcopy(batch))
    if hasattr(found[0], 'pred_score'):
        return torch.stack([sample.pred_score for sample in found])
    if hasattr(found[0], 'seg_logits'):
        return torch.stack([sample.seg_logits.data for sample in found])
    return torch.stack([sample.pred_instances.scores[:5] for sample in found])


def test_metadata(onnx, images, tmp_path):
    found = preprocessing(config('classifier'), classes=('a', 'b'))
    assert found == dict(
        resize=[32, 32],
        keep_ratio=False,
        interpolation='INTER_CUBIC',
        crop=None,
        mean=[77.0] * 3,
        std=[95.0] * 3,
        channels='RGB',
        classes=['a', 'b'],
        config='resnet18-slim-orepa_1xb64_digits',
        mmorepa_version=mmorepa.__version__,
    )
    plain = preprocessing(Config(dict(model=dict(type='A'))))
    assert (plain['mean'], plain['std'], plain['channels']) == ([0] * 3, [1] * 3, 'BGR')
    assert plain['resize'] is plain['crop'] is plain['classes'] is None
    grey = preprocessing(Config(dict(model=dict(type='A'))), 1)
    assert (grey['mean'], grey['std'], grey['channels']) == ([0], [1], 'grey')
    assert preprocessing(Config(dict(model=dict(type='A'))), 4)['channels'] is None
    folder = preprocessing(Config.fromfile(CONFIGS.parent / FOLDER))
    assert (folder['resize'], folder['crop']) == (256, [224, 224])
    assert folder['interpolation'] == 'INTER_LINEAR'
    detector = preprocessing(config('retinanet'))
    assert detector['resize'] == [128, 192] and detector['keep_ratio']
    export_onnx(deployed('classifier'), images[:1], tmp_path / 'a.onnx', metadata=found)
    entries = OnnxNetwork(tmp_path / 'a.onnx').session.get_modelmeta()
    read = {k: json.loads(v) for k, v in entries.custom_metadata_map.items()}
    assert read == found


class TestErrors:
    def test_missing_package(self):
        with pytest.raises(ImportError, match='pip install no_such_package'):
            require('no_such_package.part')

    def test_cannot_write(self, onnx, images, tmp_path, capfd, monkeypatch):
        monkeypatch.setattr(onnx_files, 'OPSET', 99)
        with pytest.raises(ValueError, match='torchscript.* cannot .*, and another'):
            export_onnx(deployed('classifier'), images[:1], tmp_path / 'a')
        # Not the graph, nor what else exporters tell their developers.
        assert capfd.readouterr().out == ''
        assert not list(tmp_path.iterdir())

    def test_exporter(self, images, tmp_path):
        with pytest.raises(ValueError, match="torchscript, dynamo; not 'x'"):
            export_onnx(nn.Identity(), images[:1], tmp_path / 'a', 'x')

    def test_training_form(self, onnx, images, tmp_path):
        model = build_model(config('classifier'))
        with pytest.raises(ValueError, match='call mmorepa.switch_to_deploy'):
            export_onnx(model, images[:1], tmp_path / 'a.onnx')
        assert not list(tmp_path.iterdir())

    def test_outputs_that_are_no_maps(self, images):
        class Other(nn.Module):
            def forward(self, inputs, mode):
                return [inputs, dict(x=1)]

        with pytest.raises(ValueError, match='outputs of Other'):
            named_outputs(Other(), images)

    def test_model_without_a_head(self):
        with (
            pytest.raises(ValueError, match='Identity has none of'),
            network_from(nn.Identity(), None),
        ):
            pass
