"""The tutorial's lines for ONNX Runtime, in a process that has nothing else."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from documents import ROOT, code_blocks
from helpers import import_models, trained_like
from mmengine.config import Config

from mmorepa import switch_to_deploy
from mmorepa.deployment.onnx_files import export_onnx, preprocessing
from mmorepa.engine.config import build_model

ALONE = """
import sys
for name in ('torch', 'mmcv', 'mmengine', 'mmpretrain', 'mmorepa'):
    sys.modules[name] = None
{}
np.save('logits.npy', logits)
"""


@pytest.mark.parametrize('channels', ['RGB', 'BGR'])
def test_without_this_package(channels, tmp_path):
    for package in ('onnx', 'onnxruntime', 'PIL'):
        pytest.importorskip(package)
    import_models('mmpretrain')
    from PIL import Image

    text = (ROOT / 'docs/tutorial_onnx.md').read_text()
    (code,) = (c for c in code_blocks(text, 'python') if "'image.png'" in c)
    lines = [line for line in code.splitlines() if line and 'import' not in line]
    assert len(lines) <= 10

    cfg = Config.fromfile(ROOT / 'configs/digits/resnet18-slim-orepa_1xb64_digits.py')
    cfg.data_preprocessor.update(mean=[10.0, 20.0, 30.0], to_rgb=channels == 'RGB')
    model = switch_to_deploy(trained_like(build_model(cfg)))
    image = torch.zeros(1, 3, 32, 32)
    export_onnx(model, image, tmp_path / 'network.onnx', metadata=preprocessing(cfg))
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
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
    assert done.stdout.split() == ['class', str(expected.argmax())]
