"""A network leaves PyTorch: ONNX files in float32 and in INT8."""

import json
import re

import mmcv
import numpy as np
import pytest
import torch
from helpers import import_models, trained_like
from mmengine.config import Config
from tool_runs import ROOT, run_here, run_runner, tool

from mmorepa.converters import write_checkpoint
from mmorepa.runs import build_model

pytestmark = pytest.mark.slow
EXPORT, QUANTIZE = 'deployment/export_onnx.py', 'deployment/quantize.py'
SWITCH = 'model_converters/switch_to_deploy.py'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for package in ('onnx', 'onnxruntime'):
        pytest.importorskip(package)
    for name in (EXPORT, QUANTIZE, SWITCH):
        monkeypatch.setattr(tool(name), 'least_seconds', on_a_busy_machine)


def on_a_busy_machine(functions):
    return [0.001] * len(functions), 0.3


@pytest.fixture(scope='module')
def checkpoint(config, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('trained')
    torch.set_num_threads(1)
    run_runner('train.py', config, '--work-dir', work_dir)
    return work_dir / 'epoch_4.pth'


def accuracy(path, digits):
    """Of a file on the test images, in percent, without anything of OpenMMLab."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    right = []
    for file in sorted(digits.glob('val/*/*.png')):
        image = mmcv.imresize(mmcv.imread(file), (32, 32), interpolation='bicubic')
        image = ((image.astype(np.float32) - 77) / 95)[..., ::-1].transpose(2, 0, 1)
        (logits,) = session.run(None, {'images': image[None]})
        right.append(logits.argmax() == int(file.parent.name))
    assert len(right) == 355
    return 100 * sum(right) / len(right)


class TestExport:
    def test_both_forms_of_a_checkpoint(
        self, config, checkpoint, digits, tmp_path, capsys
    ):
        deployed = tmp_path / 'deployed.pth'
        found = run_here(SWITCH, config, checkpoint, deployed)
        assert 'had a core for 30%' in capsys.readouterr().out
        assert found['core_share'] == 0.3
        metrics = run_runner('test.py', config, checkpoint, '--work-dir', tmp_path)
        files = []
        for name, pair in dict(
            a=(config, checkpoint),
            b=(config, deployed),
            c=(tmp_path / 'deployed_config.py', deployed),
        ).items():
            files.append(tmp_path / f'{name}.onnx')
            found = run_here(EXPORT, *pair, files[-1], '--json', tmp_path / 'a.json')
            assert json.loads((tmp_path / 'a.json').read_text()) == found
            assert 'had a core for 30%' in capsys.readouterr().out
            assert set(found['differences']) == {
                *('one random image', 'three random images', 'test images')
            }
            for difference in found['differences'].values():
                assert difference['relative'] < 1e-5
            assert found['outputs'] == ['logits']
            size = found['forms']['ONNX Runtime']['megabytes']
            assert size == pytest.approx(files[-1].stat().st_size / 1e6)
        found = accuracy(files[0], digits)
        assert found == pytest.approx(metrics['accuracy/top1'], abs=0.3)

    def test_dynamo(self, config, checkpoint, tmp_path):
        pytest.importorskip('onnxscript')
        out = tmp_path / 'a.onnx'
        flags = ['--exporter', 'dynamo', '--shape', '64', '32']
        found = run_here(EXPORT, config, checkpoint, out, *flags)
        # The test images have another size.
        assert set(found['differences']) == {'one random image', 'three random images'}
        assert out.is_file()

    def test_tolerance(self, config, checkpoint, tmp_path):
        out = tmp_path / 'a.onnx'
        with pytest.raises(SystemExit, match='^error: ONNX Runtime differs .* nothing'):
            run_here(EXPORT, config, checkpoint, out, '--tolerance', '1e-12')
        assert not list(tmp_path.iterdir())

    def test_missing_package(self, config, checkpoint, tmp_path, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, 'onnxruntime', None)
        for name in (EXPORT, QUANTIZE):
            with pytest.raises(SystemExit, match='pip install onnxruntime'):
                run_here(name, config, checkpoint, tmp_path / 'a.onnx')

    def test_detector_and_segmenter(self, tmp_path):
        for scope, name in (
            ('mmdet', 'retinanet_r18-slim-orepa_fpn_1xb2-10e_digits'),
            ('mmseg', 'deeplabv3plus_r18-slim-orepa-d8_1xb8-2500_digits'),
        ):
            import_models(scope)
            config = ROOT / f'configs/digits/{name}.py'
            model = trained_like(build_model(Config.fromfile(config)))
            path = tmp_path / 'a.pth'
            write_checkpoint(dict(state_dict=model.state_dict()), path)
            out = tmp_path / f'{name}.onnx'
            run_here(EXPORT, config, path, out, '--shape', '64', '64')
            assert out.is_file()


class TestQuantize:
    def test_accuracy_and_layers(self, config, checkpoint, digits, tmp_path, capsys):
        out, figures = tmp_path / 'a.onnx', tmp_path / 'a.json'
        flags = ['--images', '64', '--json', figures, '--worst', '3']
        found = run_here(QUANTIZE, config, checkpoint, out, *flags)
        assert json.loads(figures.read_text()) == found
        text = capsys.readouterr().out
        assert 'had a core for 30%' in text
        metrics = {k: v['accuracy/top1'] for k, v in found['metrics'].items()}
        expected = run_runner('test.py', config, checkpoint, '--work-dir', tmp_path)
        assert metrics['float32'] == pytest.approx(expected['accuracy/top1'], abs=0.3)
        # A network of eight channels, four epochs old, has many close calls.
        assert metrics['INT8'] == pytest.approx(metrics['float32'], abs=8)
        # Pixels that are normalised by another formula, in the last bit, are rounded to
        # other steps: as far off as INT8 itself.
        assert accuracy(out, digits) == pytest.approx(metrics['INT8'], abs=8)
        names = [layer['name'] for layer in found['layers']]
        assert names[0] == 'backbone.stem' and names[-1] == 'head.fc'
        assert len(names) == 21
        for layer in found['layers']:
            assert layer['outlier'] >= 1 and layer['kernel_snr'] > 25
        worst = min(found['layers'], key=lambda layer: layer['output_snr'])
        lines = text.splitlines()
        start = lines.index('The layers that lose most, 3 of 21:')
        assert lines[start + 2].startswith(worst['name'])
        assert found['megabytes']['INT8'] < found['megabytes']['float32'] / 2

    def test_outputs_of_zeros(self, config, checkpoint, tmp_path, capsys):
        weights = torch.load(checkpoint)['state_dict']
        weights['backbone.layer1.0.conv1.norm.bias'].fill_(-100)
        path, figures = tmp_path / 'a.pth', tmp_path / 'a.json'
        write_checkpoint(dict(state_dict=weights), path)
        flags = ['--images', '4', '--worst', '99', '--json', figures]
        found = run_here(QUANTIZE, config, path, tmp_path / 'a.onnx', *flags)
        assert 'NaN' not in figures.read_text()
        assert json.loads(figures.read_text()) == found
        dead = [loss['name'] for loss in found['layers'] if loss['output_snr'] is None]
        assert dead == ['backbone.layer1.0.conv1']
        assert 'nan' in capsys.readouterr().out

    def test_flags(self, config, checkpoint, tmp_path, capsys):
        out = tmp_path / 'a.onnx'
        flags = ['--per-tensor', '--equalize', '--images', '16', '--reduce-range']
        found = run_here(QUANTIZE, config, checkpoint, out, *flags)
        assert found['equalized_pairs'] == 8  # One in each block.
        text = capsys.readouterr().out
        assert 'one scale a kernel, calibrated with 16 images' in text
        assert 'on 1 thread:' in text
        assert '8 pairs of convs equalized' in text

    def test_torchao(self, config, checkpoint, tmp_path, capsys):
        pytest.importorskip('torchao')
        out = tmp_path / 'a.pt2'
        flags = ['--backend', 'torchao', '--images', '16']
        found = run_here(QUANTIZE, config, checkpoint, out, *flags)
        text = capsys.readouterr().out
        assert 'INT8 by torchao, one scale a channel' in text
        # Nothing was timed.
        assert 'one image of 32x32:' in text and 'had a core' not in text
        metrics = {k: v['accuracy/top1'] for k, v in found['metrics'].items()}
        assert metrics['INT8'] == pytest.approx(metrics['float32'], abs=3)
        assert found['latency_ms'] == {} and found['layers'] == []
        assert found['megabytes']['INT8'] == pytest.approx(out.stat().st_size / 1e6)
        kinds = {tensor.dtype for tensor in torch.export.load(out).state_dict.values()}
        assert torch.int8 in kinds
        with pytest.raises(SystemExit):
            run_here(QUANTIZE, config, checkpoint, out, *flags, '--per-tensor')
        with pytest.raises(SystemExit, match=r'takes images of 64x64, found 32x32'):
            run_here(QUANTIZE, config, checkpoint, out, *flags, '--shape', '64', '64')

    def test_two_stage_detector(self, digits, tmp_path, capsys):
        import_models('mmdet')
        config = (
            ROOT / 'configs/digits/faster-rcnn_r18-slim-orepa_fpn_1xb2-10e_digits.py'
        )
        model = trained_like(build_model(Config.fromfile(config)))
        path, out = tmp_path / 'a.pth', tmp_path / 'a.onnx'
        write_checkpoint(dict(state_dict=model.state_dict()), path)
        options = [
            f'{phase}_dataloader.dataset.data_root={digits}/coco/'
            for phase in ('train', 'val', 'test')
        ]
        options += ['val_dataloader.dataset.indices=2']
        options += [
            f'val_evaluator.ann_file={digits}/coco/annotations/instances_val2017.json'
        ]
        line = [QUANTIZE, config, path, out, '--images', '1', '--cfg-options', *options]
        found = run_here(*line)
        assert out.is_file() and 'coco/bbox_mAP' in found['metrics']['INT8']
        text = capsys.readouterr().out
        assert 'calibrated with 1 image,' in text
        # Between 0 and 1, where two decimals would say little.
        assert re.search(r'(?m)^coco/bbox_mAP +0\.\d{4} +0\.\d{4} +[-+]0\.\d{4}$', text)

    def test_without_the_data(self, config, checkpoint, tmp_path):
        for phase in ('train', 'val'):
            option = f'{phase}_dataloader.dataset.data_root=/none'
            with pytest.raises(SystemExit, match="data folder '/none' is missing"):
                run_here(
                    *(QUANTIZE, config, checkpoint, tmp_path / 'a.onnx'),
                    *('--cfg-options', option),
                )
        nothing = [f'{phase}_evaluator=None' for phase in ('val', 'test')]
        with pytest.raises(SystemExit, match='error: the config has no data to test'):
            run_here(
                *(QUANTIZE, config, checkpoint, tmp_path / 'a.onnx'),
                *('--cfg-options', *nothing),
            )
        assert not list(tmp_path.iterdir())

    def test_images_of_another_size(self, config, checkpoint, tmp_path):
        out = tmp_path / 'a.onnx'
        with pytest.raises(SystemExit, match=r'takes images of 64x64, found 32x32'):
            run_here(QUANTIZE, config, checkpoint, out, '--shape', '64', '64')
        assert not list(tmp_path.iterdir())
