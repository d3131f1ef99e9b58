"""The tutorial's lines for other programs, in processes that have nothing else."""

import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from documents import ROOT, code_blocks
from helpers import assert_near, import_models, trained_like
from mmengine.config import Config
from torch import nn

from mmorepa import switch_to_deploy
from mmorepa.deployment.onnx_files import export_onnx, preprocessing
from mmorepa.deployment.pt2e import ProgramNetwork, export_program, quantize_program
from mmorepa.engine.config import build_model

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


@pytest.mark.parametrize('channels', ['RGB', 'BGR', 'grey'])
def test_without_this_package(channels, tmp_path):
    for package in ('onnx', 'onnxruntime', 'PIL'):
        pytest.importorskip(package)
    import_models('mmpretrain')
    from PIL import Image

    code = code_with("'image.png'")
    lines = [line for line in code.splitlines() if line and 'import' not in line]
    assert len(lines) <= 10

    cfg = Config.fromfile(ROOT / 'configs/digits/resnet18-slim-orepa_1xb64_digits.py')
    cfg.data_preprocessor.update(mean=[10.0, 20.0, 30.0], to_rgb=channels == 'RGB')
    number = 1 if channels == 'grey' else 3
    if number == 1:
        cfg.data_preprocessor.update(mean=[10.0], std=[20.0])
        cfg.model.backbone.in_channels = 1
    model = switch_to_deploy(trained_like(build_model(cfg)))
    image = torch.zeros(1, number, 32, 32)
    about = preprocessing(cfg, number)
    export_onnx(model, image, tmp_path / 'network.onnx', metadata=about)
    shape = (32, 32, number)
    pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(tmp_path / 'image.png')
    done = subprocess.run(
        [sys.executable, '-c', ALONE.format(code)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # As OpenMMLab reads images: BGR.
    bgr = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)[None]
    inputs = model.data_preprocessor(dict(inputs=bgr), False)['inputs']
    with torch.no_grad():
        expected = model(inputs, mode='tensor').numpy()
    found = np.load(tmp_path / 'logits.npy')
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()
    word, number = done.stdout.split()
    assert word == 'class'
    # The best, or one that is as good as equal.
    allowed = 1e-4 * abs(expected).max()
    assert expected[0, int(number)] >= expected.max() - allowed
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
    done = subprocess.run(
        [sys.executable, '-c', COMPILED.format(code_with('network_int8.pt2'))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        # No processes that import PyTorch to compile the little that there is.
        env={**os.environ, 'TORCHINDUCTOR_COMPILE_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['True'], 'no conv is compiled to INT8'
    expected = ProgramNetwork(program, model, images[:1])(images)
    assert_near(torch.load(tmp_path / 'found.pt'), tuple(expected), 0.02)
