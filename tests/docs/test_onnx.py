"""The tutorial's lines for other programs, in processes that have nothing else."""

import platform
import shutil
import sys

import mmcv
import numpy as np
import pytest
import torch
from documents import code_blocks
from helpers import assert_near, import_models, trained_like
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate
from mmengine.registry import DefaultScope
from tool_runs import ROOT, build_model, run_apart
from torch import nn

from mmorepa import switch_to_deploy
from mmorepa.deployment.onnx_files import export_onnx, preprocessing
from mmorepa.deployment.pt2e import ProgramNetwork, export_program, quantize_program

ALONE = """
import sys
for name in ('torch', 'mmcv', 'mmengine', 'mmpretrain', 'mmorepa'):
    sys.modules[name] = None
{}
np.save('logits.npy', logits)
"""


def code_with(words):
    """The block of the tutorial that has these words."""
    text = (ROOT / 'docs/tutorial_onnx.md').read_text()
    (code,) = (code for code in code_blocks(text, 'python') if words in code)
    return code


# The test pipelines of the digits and of images of one's own, and images of two ratios.
CONFIGS = {
    'resize': 'digits/resnet18-slim-orepa_1xb64_digits.py',
    'edge and crop': 'custom/resnet18-orepa_1xb32_folder.py',
}


@pytest.mark.parametrize(
    ('kind', 'channels'),
    [('resize', 'BGR'), ('edge and crop', 'RGB'), ('edge and crop', 'grey')],
)
def test_without_this_package(kind, channels, tmp_path):
    """The program computes what the model does, with the same resizing and cropping."""
    for package in ('onnx', 'onnxruntime'):
        pytest.importorskip(package)
    import_models('mmpretrain')

    code = code_with("'image.png'")
    cfg = Config.fromfile(ROOT / 'configs' / CONFIGS[kind])
    cfg.model.backbone.update(base_channels=8, init_cfg=None)
    cfg.model.head.update(in_channels=64, num_classes=10)
    cfg.data_preprocessor.update(mean=[10.0, 20.0, 30.0], to_rgb=channels == 'RGB')
    if kind == 'edge and crop':
        # Not as in other places: as it is written here.
        cfg.test_dataloader.dataset.pipeline[1].scale = 48
        cfg.test_dataloader.dataset.pipeline[2].crop_size = 32
    number = 1 if channels == 'grey' else 3
    if number == 1:
        cfg.data_preprocessor.update(mean=[10.0], std=[20.0])
        cfg.model.backbone.in_channels = 1
        cfg.test_dataloader.dataset.pipeline[0].color_type = 'grayscale'
    model = switch_to_deploy(trained_like(build_model(cfg)))
    image = torch.zeros(1, number, 32, 32)
    classes = [f'c{i}' for i in range(10)]
    about = preprocessing(cfg, number, classes)
    export_onnx(model, image, tmp_path / 'network.onnx', metadata=about)
    shape = (50, 70, number)
    pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    mmcv.imwrite(pixels, str(tmp_path / 'image.png'))
    done = run_apart(sys.executable, '-c', ALONE.format(code), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        pipeline = Compose(cfg.test_dataloader.dataset.pipeline)
        item = pipeline(dict(img_path=str(tmp_path / 'image.png')))
    batch = default_collate([item])
    inputs = model.data_preprocessor(batch, False)['inputs']
    with torch.no_grad():
        expected = model(inputs, mode='tensor').numpy()
    found = np.load(tmp_path / 'logits.npy')
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()
    word, name = done.stdout.split()
    assert word == 'class'
    # The best, or one that is as good as equal.
    allowed = 1e-4 * abs(expected).max()
    assert expected[0, classes.index(name)] >= expected.max() - allowed
    assert expected.std() > 10 * allowed


COMPILED = """
import sys
for name in ('mmcv', 'mmengine', 'mmpretrain', 'mmorepa'):
    sys.modules[name] = None
{}
from torch._inductor.utils import run_and_get_code
images = torch.load('images.pt')
with torch.no_grad():
    found, sources = run_and_get_code(network, images)
torch.save(found, 'found.pt')
print('onednn.qconv' in ''.join(sources))
"""


@pytest.mark.slow
def test_compiled_to_int8(tmp_path):
    pytest.importorskip('torchao')
    if platform.machine() not in ('x86_64', 'AMD64') or not shutil.which('g++'):
        pytest.skip('torchao compiles to INT8 for x86')

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, images, mode):
            return self.fc(self.conv(images).relu().mean(dim=(2, 3)))

    model = trained_like(Small()).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    program = quantize_program(export_program(model, images[:1]), images.split(1))
    torch.export.save(program, tmp_path / 'network_int8.pt2')
    torch.save(images, tmp_path / 'images.pt')
    code = COMPILED.format(code_with('network_int8.pt2'))
    # No processes that import PyTorch to compile the little that there is.
    alone = dict(TORCHINDUCTOR_COMPILE_THREADS='1')
    done = run_apart(sys.executable, '-c', code, cwd=tmp_path, **alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['True'], 'no conv is compiled to INT8'
    expected = ProgramNetwork(program, model, images[:1])(images)
    assert_near(torch.load(tmp_path / 'found.pt'), tuple(expected), 0.02)
