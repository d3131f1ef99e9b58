"""What runs on a GPU gives what runs on a CPU. Skipped where there is none."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_near, assert_same_gradients, deployed_twin, trained_like
from mmengine.optim import build_optim_wrapper
from runners import BackboneClassifier
from torch import nn

from mmorepa import folded
from mmorepa.engine import FoldedDistributedDataParallel
from mmorepa.layers import ReparamConv2d, build_conv, held

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = ['none', 'deep_linear', 'dbb', 'orepa', 'repvgg', 'orepa_repvgg']
NETWORKS = {
    'resnet': dict(type='OREPAResNet', depth=18, base_channels=16),
    'resnext': dict(
        type='OREPAResNet', depth=50, base_channels=16, groups=4, width_per_group=4
    ),
    'dbb': dict(type='OREPAResNet', depth=18, base_channels=16, block='dbb'),
    'repvgg': dict(type='OREPARepVGG', arch='A0', base_channels=8),
}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def build(name: str, dtype: torch.dtype = torch.float64) -> BackboneClassifier:
    torch.manual_seed(0)
    return trained_like(BackboneClassifier(NETWORKS[name])).to(dtype).train()


def batch(dtype: torch.dtype = torch.float64, device: str = 'cpu') -> dict:
    generator = torch.Generator().manual_seed(1)
    return dict(
        inputs=torch.rand(8, 3, 64, 64, generator=generator).to(device, dtype),
        data_samples=torch.randint(10, (8,), generator=generator).to(device),
    )


def wrap(model: nn.Module, kind: str, device: str, **options):
    optimizer = dict(type='SGD', lr=0.005, momentum=0.9, weight_decay=1e-3)
    model.to(device)
    wrapper = build_optim_wrapper(
        model, dict(type=kind, optimizer=optimizer, **options)
    )
    wrapper.initialize_count_status(model, 0, 100)
    return wrapper


def on_cpu(tensors: dict) -> dict:
    return {key: tensor.cpu() for key, tensor in tensors.items()}


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('kernel_size', [1, 3, 7])
@pytest.mark.parametrize('block', BLOCKS)
def test_convs(block, kernel_size, groups):
    conv = build_conv(
        block, 16, 16, kernel_size, padding=kernel_size // 2, groups=groups
    )
    conv = trained_like(conv).double().train()
    twin = copy.deepcopy(conv).cuda()
    inputs = torch.rand(4, 16, 9, 9, dtype=torch.float64)

    def outputs_and_gradients(conv, inputs):
        outputs = conv(inputs)
        weights = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64)
        loss = (outputs * weights.view(outputs.shape).to(outputs.device)).sum()
        found = torch.autograd.grad(loss, list(conv.parameters()))
        return outputs, dict(zip((n for n, _ in conv.named_parameters()), found))

    expected, gradients = outputs_and_gradients(conv, inputs)
    found, others = outputs_and_gradients(twin, inputs.cuda())
    assert_near(found.cpu(), expected, 1e-10)
    assert_same_gradients(on_cpu(others), gradients, 1e-9)
    conv.eval(), twin.eval()
    assert_near(deployed_twin(twin)(inputs.cuda()).cpu(), conv(inputs), 1e-10)
    with torch.no_grad(), folded(twin):
        assert_near(twin(inputs.cuda()).cpu(), conv(inputs), 1e-10)


@pytest.mark.parametrize(
    'options',
    [
        dict(kind='OptimWrapper'),
        dict(kind='FoldedOptimWrapper'),
        # Few parameter groups, and PyTorch's fused update.
        dict(kind='OptimWrapper', constructor='OREPAOptimWrapperConstructor'),
    ],
    ids=['online', 'folded', 'constructor'],
)
@pytest.mark.parametrize('name', NETWORKS)
def test_training_steps(name, options):
    model = build(name)
    twin = copy.deepcopy(model)
    wrapper = wrap(model, 'OptimWrapper', 'cpu')
    twin_wrapper = wrap(twin, device='cuda', **options)
    for _ in range(3):
        expected = model.train_step(batch(), wrapper)['loss']
        found = twin.train_step(batch(device='cuda'), twin_wrapper)['loss']
        assert_near(found.cpu(), expected, 1e-9)
    states = model.state_dict(), on_cpu(twin.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-7, atol=1e-8)
    model.eval(), twin.eval()
    inputs = batch()['inputs']
    with torch.no_grad():
        assert_near(deployed_twin(twin)(inputs.cuda()).cpu(), model(inputs), 1e-7)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('kind', ['AmpOptimWrapper', 'FoldedAmpOptimWrapper'])
@pytest.mark.parametrize('name', NETWORKS)
def test_mixed_precision(name, kind, dtype):
    torch.manual_seed(0)
    model = BackboneClassifier(NETWORKS[name]).train()
    wrapper = wrap(model, kind, 'cuda', dtype=dtype, loss_scale='dynamic')
    data = batch(torch.float32, 'cuda')
    losses = [model.train_step(data, wrapper)['loss'].item() for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    if name in ('dbb', 'repvgg'):  # They have branches that convolve.
        return
    # The fold itself is not in half precision.
    exact = copy.deepcopy(model).double()
    with torch.autocast('cuda', getattr(torch, dtype)), held(model), held(exact):
        for conv, twin in zip(model.modules(), exact.modules()):
            if isinstance(conv, ReparamConv2d):
                assert conv.weight.dtype == torch.float32
                assert_near(conv.weight, twin.weight, 1e-5)


@pytest.mark.parametrize('kind', ['OptimWrapper', 'FoldedOptimWrapper'])
@pytest.mark.parametrize('name', NETWORKS)
def test_a_step_waits_for_nothing(name, kind):
    # A read on the host would leave the GPU idle.
    model = build(name, torch.float32)
    wrapper = wrap(model, kind, 'cuda')
    data = batch(torch.float32, 'cuda')
    model.train_step(data, wrapper)

    def step():
        with wrapper.optim_context(model):
            loss = model(**data, mode='loss')['loss']
        wrapper.update_params(loss)

    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_folded_training_keeps_its_memory():
    model = build('resnet', torch.float32)
    wrapper = wrap(model, 'FoldedOptimWrapper', 'cuda')
    data = batch(torch.float32, 'cuda')
    used = []
    for _ in range(6):
        model.train_step(data, wrapper)
        used.append(torch.cuda.memory_allocated())
    assert used[2] == used[-1]


def freeze_half_way(model: nn.Module, wrapper, step: int) -> None:
    if step in (2, 4):
        model.backbone.layer2.requires_grad_(step == 4)


def evaluate(model: nn.Module, wrapper, step: int) -> None:
    with folded(model.eval()), torch.no_grad():
        model(batch(device='cuda')['inputs'])
    model.train()


def zero_to_zero(model: nn.Module, wrapper, step: int) -> None:
    wrapper.optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize('capture', [True, 'compiled'])
@pytest.mark.parametrize('between', [None, freeze_half_way, evaluate, zero_to_zero])
@pytest.mark.parametrize(
    'options', [{}, dict(accumulative_counts=2), dict(clip_grad=dict(max_norm=0.1))]
)
def test_captured_training(options, between, capture):
    if capture == 'compiled' and (options or between):
        return
    model = build('resnet')
    twin = copy.deepcopy(model)
    wrappers = [
        wrap(model, 'FoldedOptimWrapper', 'cuda', **options),
        wrap(twin, 'FoldedOptimWrapper', 'cuda', capture=capture, **options),
    ]
    for step in range(6):
        for net, wrapper in zip((model, twin), wrappers):
            net.train_step(batch(device='cuda'), wrapper)
            if between:
                between(net, wrapper, step)
    (recorded,) = wrappers[1]._recorded.values()
    assert recorded.count == (3 if between is freeze_half_way else 1)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_captured_mixed_precision(dtype):
    """A step with an overflow is skipped, and the kernels are in half precision."""
    torch.manual_seed(0)
    model = BackboneClassifier(NETWORKS['resnet']).train()
    options = dict(dtype=dtype, loss_scale=2.0**60, capture=True)
    wrapper = wrap(model, 'FoldedAmpOptimWrapper', 'cuda', **options)
    data = batch(torch.float32, 'cuda')
    before = [p.clone() for p in model.parameters()]
    model.train_step(data, wrapper)
    if dtype == 'float16':
        assert all(map(torch.equal, before, model.parameters()))
    (recorded,) = wrapper._recorded.values()
    assert recorded._recording.kernels[0].dtype == getattr(torch, dtype)
    wrapper.loss_scaler.update(128.0)
    losses = [model.train_step(data, wrapper)['loss'].item() for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0] and recorded.count == 1


def test_a_captured_step_waits_for_nothing_and_keeps_its_memory():
    model = build('resnet', torch.float32)
    wrapper = wrap(model, 'FoldedOptimWrapper', 'cuda', capture=True)
    data = batch(torch.float32, 'cuda')
    for _ in range(2):
        model.train_step(data, wrapper)
    used = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3):
            with wrapper.optim_context(model):
                loss = model(**data, mode='loss')['loss']
            wrapper.update_params(loss)
            del loss
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert torch.cuda.memory_allocated() == used


@pytest.fixture
def nccl():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group(
        'nccl', init_method=f'tcp://127.0.0.1:{port}', rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('capture', [False, True])
def test_data_parallel_by_nccl(nccl, capture):
    model = build('resnet')
    twin = copy.deepcopy(model).cuda()
    wrapper = wrap(model, 'OptimWrapper', 'cpu')
    parallel = FoldedDistributedDataParallel(twin, device_ids=[0])
    twin_wrapper = wrap(twin, 'FoldedOptimWrapper', 'cuda', capture=capture)
    for _ in range(3):
        expected = model.train_step(batch(), wrapper)['loss']
        found = parallel.train_step(batch(device='cuda'), twin_wrapper)['loss']
        assert_near(found.cpu(), expected, 1e-9)
    for key, value in on_cpu(twin.state_dict()).items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize('options', [[], ['--amp']], ids=['float32', 'amp'])
def test_tools(tmp_path, options):
    def run(*line):
        paths = filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
        done = subprocess.run(
            [sys.executable, *map(str, line)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    tools = ROOT / 'tools'
    run(tools / 'dataset_converters/digits.py', '--out', 'data/digits')
    config = ROOT / 'configs/digits/resnet18-slim-orepa_1xb64_digits.py'
    changes = ['train_cfg.max_epochs=2', 'train_cfg.val_interval=1']
    run(tools / 'train.py', config, '--work-dir', 'run', *options,
        '--cfg-options', *changes)  # fmt: skip
    checkpoint = tmp_path / 'run/epoch_2.pth'
    run(tools / 'model_converters/switch_to_deploy.py', config, checkpoint, 'out.pth')
    tested = run(tools / 'test.py', config, 'out.pth', '--cfg-options',
                 'model.backbone.deploy=True')  # fmt: skip
    trained = run(tools / 'test.py', config, checkpoint)
    # Kernels are rounded to TF32, and three digits may be as good as undecided.
    assert accuracy(tested) == pytest.approx(accuracy(trained), abs=1)


def accuracy(output: str) -> float:
    return float(output.rpartition('accuracy/top1: ')[2].split()[0])
