"""The fast folds and their derivatives against the plain formulas.

Both in operations of PyTorch and compiled, where there is compiled code for a kernel.
"""

import pytest
import torch
from helpers import assert_near, gradcheck, trained_like

from mmorepa.functional import closed_forms, compiled
from mmorepa.layers import OREPAConv2d
from mmorepa.layers.orepa import (
    OREPADeepLinearKernel,
    OREPAKernel,
    OREPAPointwiseKernel,
)

ALL = tuple(OREPAKernel.INITIAL_SCALES)
KERNELS = {
    'wider': lambda: OREPAKernel(8, 6, 3),
    # More inputs than a vector has, more outputs than are done together.
    'many': lambda: OREPAKernel(9, 37, 3),
    'narrower': lambda: OREPAKernel(5, 7, 3),
    '5x5': lambda: OREPAKernel(4, 3, 5),
    **{f'only_{b}': lambda b=b: OREPAKernel(4, 6, 3, branches=[b]) for b in ALL},
    **{
        f'no_{b}': lambda b=b: OREPAKernel(4, 6, 3, branches=[x for x in ALL if x != b])
        for b in ALL
    },
    '1x1_wider': lambda: OREPAPointwiseKernel(8, 6),
    '1x1_narrower': lambda: OREPAPointwiseKernel(6, 8),
    'deep_linear': lambda: OREPADeepLinearKernel(6, 3, 7),
}


@pytest.fixture(params=['operations', 'compiled'], autouse=True)
def implementation(request, monkeypatch):
    if request.param == 'operations':
        monkeypatch.setattr(compiled, '_library', lambda: None)
    elif not compiled.is_available():
        pytest.skip('not compiled: run python tools/build_fold.py')
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return trained_like(KERNELS[request.param]().double())


@pytest.fixture(params=[closed_forms._BLOCK, 60], ids=['one_block', 'blocks'])
def blocks(request, monkeypatch):
    """The kernels here are small: several blocks only where a block is smaller yet.

    For those of the compiled code see :func:`test_large_kernels`.
    """
    monkeypatch.setattr(closed_forms, '_BLOCK', request.param)


def tensors_of(kernel):
    return {**dict(kernel.named_parameters()), **dict(kernel.named_buffers())}


@pytest.mark.parametrize('contiguous', [True, False])
def test_equals_the_plain_formulas(kernel, blocks, contiguous):
    tensors = tensors_of(kernel)
    if not contiguous:
        # As `.to(memory_format=…)` and views of flat parameters leave them.
        tensors = {
            name: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t
            for name, t in tensors.items()
        }
    expected = kernel()
    actual = kernel.fold(tensors)
    assert actual.is_contiguous() and not actual.requires_grad
    assert_near(actual, expected, 1e-14)
    out = torch.full_like(expected, torch.nan)
    assert kernel.fold(tensors, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, actual)

    grad = torch.randn_like(expected)
    names, parameters = zip(*kernel.named_parameters())
    by_autograd = dict(
        zip(names, torch.autograd.grad(expected, parameters, grad, retain_graph=True))
    )
    found = kernel.fold_gradients(tensors, grad)
    assert found.keys() == by_autograd.keys()
    for name, expected_grad in by_autograd.items():
        assert_near(found[name], expected_grad, 1e-13)
    memory = {name: torch.full_like(g, torch.nan) for name, g in found.items()}
    again = kernel.fold_gradients(tensors, grad, memory)
    for name, value in again.items():
        assert value is memory[name] and torch.equal(value, found[name])
    # The gradient of a conv on a GPU or with channels last comes in another order.
    strided = grad.contiguous(memory_format=torch.channels_last)
    for name, value in kernel.fold_gradients(tensors, strided).items():
        assert_near(value, found[name], 1e-14)


def test_numerical_derivatives(kernel, blocks):
    names, parameters = zip(*kernel.named_parameters())
    buffers = dict(kernel.named_buffers())

    class Fold(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):
            ctx.save_for_backward(*values)
            return kernel.fold({**dict(zip(names, values)), **buffers})

        @staticmethod
        def backward(ctx, grad):
            tensors = {**dict(zip(names, ctx.saved_tensors)), **buffers}
            found = kernel.fold_gradients(tensors, grad)
            return tuple(found[name] for name in names)

    assert gradcheck(Fold.apply, parameters)


def test_scales_of_zero():
    """A branch that is scaled by zero still learns its scale."""
    kernel = trained_like(OREPAKernel(4, 6, 3).double())
    with torch.no_grad():
        kernel.scale[:, 1] = 0
        kernel.scale[3] = 0
    grad = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(kernel(), kernel.scale, grad)
    assert_near(
        kernel.fold_gradients(tensors_of(kernel), grad)['scale'], expected, 1e-14
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(
    'build',
    [
        lambda: OREPAKernel(270, 512, 3),
        lambda: OREPAKernel(515, 240, 3),
        lambda: OREPAPointwiseKernel(1030, 1040),
    ],
)
def test_large_kernels(build, dtype):
    """Several blocks, and as many threads as there are."""
    kernel = trained_like(build().to(dtype))
    tensors = tensors_of(kernel)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    expected = kernel()
    out = torch.empty_like(expected)
    assert_near(kernel.fold(tensors, out), expected, tolerance)
    grad = torch.randn_like(expected)
    names, parameters = zip(*kernel.named_parameters())
    by_autograd = torch.autograd.grad(expected, parameters, grad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = kernel.fold_gradients(tensors, grad)
            for name, expected_grad in zip(names, by_autograd):
                assert_near(found[name], expected_grad, tolerance)
            # Whatever the order in which threads finish.
            again = kernel.fold_gradients(tensors, grad)
            assert all(torch.equal(again[name], g) for name, g in found.items())
            assert torch.equal(kernel.fold(tensors), out)
    finally:
        torch.set_num_threads(threads)


class Doubled(OREPAKernel):
    def _average(self):
        return 2 * super()._average()


class Shifted(OREPADeepLinearKernel):
    def forward(self):
        return super().forward() + 1


@pytest.mark.parametrize('kernel', [Doubled(4, 4, 3), Shifted(4, 4, 5)])
def test_subclasses_fold_as_they_say(kernel):
    """A closed form is that of one formula."""
    assert not kernel.has_closed_form


@pytest.mark.parametrize('k', [1, 3, 7])
def test_it_is_what_a_conv_runs_with(k):
    """Neither a fold nor its gradient goes through the plain formulas."""
    conv = OREPAConv2d(4, 4, k, padding=k // 2)
    conv.branches.forward = None
    conv(torch.randn(1, 4, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in conv.branches.parameters())
