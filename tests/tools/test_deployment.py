"""A network leaves PyTorch: ONNX files in float32 and in INT8."""

import json
import sys

import pytest
import torch
from tool_runs import EXPORT, QUANTIZE, SWITCH, run_here, run_runner, skip_timing

from mmorepa.converters import read_checkpoint, write_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for package in ('onnx', 'onnxruntime'):
        pytest.importorskip(package)
    skip_timing(monkeypatch, core_share=0.3)


@pytest.fixture(scope='module')
def checkpoint(config, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('trained')
    torch.set_num_threads(1)
    run_runner('train.py', config, '--work-dir', work_dir, '--no-validate')
    return work_dir / 'epoch_4.pth'


@pytest.fixture(scope='module')
def expected(config, checkpoint, tmp_path_factory):
    """The accuracy of the training form."""
    folder = tmp_path_factory.mktemp('test')
    return run_runner('test.py', config, checkpoint, '--work-dir', folder)[
        'accuracy/top1'
    ]


class TestExport:
    def test_both_forms_of_a_checkpoint(self, config, checkpoint, tmp_path, capsys):
        deployed = tmp_path / 'deployed.pth'
        assert run_here(SWITCH, config, checkpoint, deployed)['core_share'] == 0.3
        assert 'had a core for 30%' in capsys.readouterr().out
        for pair in (
            (config, checkpoint),
            (tmp_path / 'deployed_config.py', deployed),
        ):
            out, figures = tmp_path / 'a.onnx', tmp_path / 'a.json'
            found = run_here(EXPORT, *pair, out, '--json', figures)
            assert json.loads(figures.read_text()) == found
            assert 'had a core for 30%' in capsys.readouterr().out
            assert set(found['differences']) == {
                *('one random image', 'three random images', 'test images')
            }
            for difference in found['differences'].values():
                assert difference['relative'] < 1e-5
            assert found['outputs'] == ['logits']
            size = found['forms']['ONNX Runtime']['megabytes']
            assert size == pytest.approx(out.stat().st_size / 1e6)

    def test_dynamo(self, config, checkpoint, tmp_path):
        pytest.importorskip('onnxscript')
        out = tmp_path / 'a.onnx'
        flags = ['--exporter', 'dynamo', '--shape', '64', '32']
        found = run_here(EXPORT, config, checkpoint, out, *flags)
        # The test images have another size.
        assert set(found['differences']) == {'one random image', 'three random images'}
        assert out.is_file()

    def test_tolerance(self, config, checkpoint, tmp_path):
        line = [config, checkpoint, tmp_path / 'a.onnx', '--tolerance', '1e-12']
        with pytest.raises(SystemExit, match='^error: ONNX Runtime differs'):
            run_here(EXPORT, *line)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize('name', [EXPORT, QUANTIZE])
    def test_missing_package(self, config, checkpoint, tmp_path, monkeypatch, name):
        monkeypatch.setitem(sys.modules, 'onnxruntime', None)
        with pytest.raises(SystemExit, match='pip install onnxruntime'):
            run_here(name, config, checkpoint, tmp_path / 'a.onnx')


class TestQuantize:
    FEW = ('--cfg-options', 'val_dataloader.dataset.indices=16')

    def test_accuracy_and_layers(self, config, checkpoint, expected, tmp_path, capsys):
        out, figures = tmp_path / 'a.onnx', tmp_path / 'a.json'
        flags = ['--images', '64', '--json', figures]
        found = run_here(QUANTIZE, config, checkpoint, out, *flags)
        assert json.loads(figures.read_text()) == found
        text = capsys.readouterr().out
        assert 'had a core for 30%' in text
        metrics = {k: v['accuracy/top1'] for k, v in found['metrics'].items()}
        assert metrics['float32'] == pytest.approx(expected, abs=0.9)
        # A network of eight channels, four epochs old, has many close calls.
        assert metrics['INT8'] == pytest.approx(metrics['float32'], abs=8)
        names = [layer['name'] for layer in found['layers']]
        assert names[0] == 'backbone.stem' and names[-1] == 'head.fc'
        for layer in found['layers']:
            assert layer['outlier'] >= 1 and layer['kernel_snr'] > 25
        worst = sorted(found['layers'], key=lambda layer: layer['output_snr'])
        assert worst[0]['name'] in text and worst[-1]['name'] not in text
        assert found['megabytes']['INT8'] < found['megabytes']['float32'] / 2

    def test_outputs_of_zeros(self, config, checkpoint, tmp_path):
        weights = read_checkpoint(str(checkpoint))['state_dict']
        weights['backbone.layer1.0.conv1.norm.bias'].fill_(-100)
        path, figures = tmp_path / 'a.pth', tmp_path / 'a.json'
        write_checkpoint(dict(state_dict=weights), path)
        flags = ['--images', '4', '--json', figures, *self.FEW]
        found = run_here(QUANTIZE, config, path, tmp_path / 'a.onnx', *flags)
        assert 'NaN' not in figures.read_text()
        dead = [loss['name'] for loss in found['layers'] if loss['output_snr'] is None]
        assert dead == ['backbone.layer1.0.conv1']

    def test_flags(self, config, checkpoint, tmp_path, capsys):
        flags = ['--per-tensor', '--equalize', '--images', '16', '--reduce-range']
        line = [config, checkpoint, tmp_path / 'a.onnx', *flags, *self.FEW]
        found = run_here(QUANTIZE, *line)
        assert found['equalized_pairs'] == 8  # One in each block.
        text = capsys.readouterr().out
        assert 'one scale a kernel, calibrated with 16 images' in text
