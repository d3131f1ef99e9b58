import pytest
import torch
from helpers import assert_near
from test_onnx_files import deployed

from mmorepa.deployment.networks import DeployedNetwork
from mmorepa.deployment.pt2e import ProgramNetwork, export_program, quantize_program


@pytest.fixture
def images():
    """Of a colour each, which tells their outputs apart."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(4, 3, 1, 1, generator=generator)
    return colours + torch.randn(4, 3, 64, 64, generator=generator)


def distance(one, other):
    """The mean square of the difference, relative to the other."""
    return ((one - other).square().mean() / other.square().mean()).item()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['classifier', 'segmenter'])
def test_close_to_float(name, images, tmp_path):
    pytest.importorskip('torchao')
    model = deployed(name)
    with torch.no_grad():
        expected = DeployedNetwork(model)(images)
    program = export_program(model, images[:1])
    assert_near(ProgramNetwork(program, model, images[:1])(images), expected)

    quantized = quantize_program(program, images.split(1))
    path = tmp_path / 'a.pt2'
    torch.export.save(quantized, path)
    network = ProgramNetwork(torch.export.load(path), model, images[:1])
    found = network(images)
    for alone, several, exact in zip(network(images[:1]), found, expected):
        noise = distance(several, exact)
        assert 1e-7 < noise < 0.05
        # The last bits of a sum depend on the batch, and near an edge the step that it
        # is rounded to depends on them: the noise of INT8 once more.
        assert distance(alone, several[:1]) < 4 * noise
        assert distance(several[1:2], several[:1]) > 8 * noise, 'images too similar'
    # Kernels are there once, as INT8.
    tensors = quantized.state_dict.values()
    sizes = {tensor.dtype: 0 for tensor in tensors}
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.numel()
    assert sizes[torch.int8] > 5 * sizes[torch.float32]
    assert sizes[torch.int8] > 0.8 * sum(p.numel() for p in model.parameters())


def test_convs_that_run_several_times(images):
    pytest.importorskip('torchao')
    model = deployed('retinanet')
    program = export_program(model, images[:1])
    with torch.no_grad():
        expected = DeployedNetwork(model)(images)
    assert_near(ProgramNetwork(program, model, images[:1])(images), expected)
    with pytest.raises(ValueError, match='levels of a pyramid; let ONNX Runtime'):
        quantize_program(program, images.split(1))
