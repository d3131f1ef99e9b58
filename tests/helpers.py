"""States, comparisons and counters that the tests share."""

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

# Compares a random projection of the Jacobian: a hundred times faster, and as sharp.
gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)


def trained_like(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives ``module`` a state such as training leaves, nothing at its start value.

    What it does not save (fixed filters) is not touched.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        return values * (high - low) + low

    def normal(tensor, std):
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return values * std

    for key, tensor in module.state_dict().items():
        name = key.rsplit('.', 1)[-1]
        if name == 'num_batches_tracked':
            tensor.fill_(100)
        elif name == 'running_var':
            tensor.copy_(uniform(tensor, 0.5, 1.5))
        elif name == 'scale':
            tensor.copy_(uniform(tensor, 0.1, 0.6))
        elif name in ('running_mean', 'bias'):
            tensor.copy_(normal(tensor, 0.2))
        elif tensor.dim() == 1:
            tensor.copy_(uniform(tensor, 0.4, 0.9))
        else:
            tensor.copy_(normal(tensor, tensor[0].numel() ** -0.5))
    return module


def deployed_twin(module: nn.Module) -> nn.Module:
    """A deployed copy; ``module`` stays as it is."""
    from mmorepa import switch_to_deploy

    return switch_to_deploy(copy.deepcopy(module))


def assert_near(actual, expected, tolerance: float = 1e-5) -> None:
    """Compares relative to the largest value, for one tensor or several."""
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            assert_near(one, other, tolerance)
        return
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    largest = expected.abs().max().double()
    assert largest > 0, 'a comparison with zeros shows nothing'
    error = (actual.double() - expected.double()).abs().max() / largest
    assert error <= tolerance, f'relative error {error:.1e}, allowed {tolerance:.0e}'


def assert_near_states(actual: dict, expected: dict, tolerance: float) -> None:
    """Compares what learns of two state dicts, and has the rest equal."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if value.is_floating_point() and value.any():
            assert_near(actual[key], value, tolerance)
        else:
            assert torch.equal(actual[key], value), key


def gradients(output: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a fixed random projection of ``output``, by parameter."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    names, parameters = zip(*module.named_parameters())
    loss = (output * weights.to(output.dtype)).sum()
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def assert_same_gradients(actual, expected, tolerance: float = 1e-5) -> None:
    """Compares two results of :func:`gradients`."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        try:
            assert_near(actual[name], gradient, tolerance)
        except AssertionError as error:
            raise AssertionError(f'gradient of {name}: {error}') from None


def assert_checkpointed(net, twin, conv, x) -> None:
    """Equal gradients, though the twin computes its ``conv`` again for them."""
    twin.load_state_dict(net.state_dict())
    calls, results = [], []
    conv.register_forward_hook(lambda *_: calls.append(1))
    for model in (net, twin):
        torch.manual_seed(1)  # For what is dropped.
        sum(y.square().mean() for y in model(x)).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert len(calls) == 2, 'it was not computed again'
    assert_same_gradients(results[1], results[0], 1e-4)


@torch.no_grad()
def last_map(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of ``layer4``, also in a network of another package."""
    found = []
    handle = net.layer4.register_forward_hook(lambda *args: found.append(args[2]))
    net(x)
    handle.remove()
    return found[0]


@contextmanager
def counted_folds(conv: nn.Module):
    """The dtypes of the kernels that ``conv`` computes from its branches."""
    calls = []
    hook = conv.branches.register_forward_hook(
        lambda *args: calls.append(args[-1].dtype)
    )
    try:
        yield calls
    finally:
        hook.remove()


def settings_by_name(model: nn.Module, wrapper) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter that is optimised."""
    names = {id(param): name for name, param in model.named_parameters()}
    found = {}
    for group in wrapper.optimizer.param_groups:
        for param in group['params']:
            name = names[id(param)]
            assert name not in found, f'{name} is in two groups'
            found[name] = group['lr'], group['weight_decay']
    return found


def classifier_cfg(backbone: dict, channels: int, classes: int, **options) -> dict:
    """The config of a classifier of mmpretrain."""
    return dict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=classes, in_channels=channels),
        **options,
    )


def import_models(package: str):
    """Imports the models of an OpenMMLab package, or skips the test.

    mmdet and mmseg import mmcv's compiled operators, which mmcv-lite lacks.
    """
    return pytest.importorskip(
        f'{package}.models',
        reason=f'{package} needs mmcv with its compiled operators',
        exc_type=ImportError,
    )
