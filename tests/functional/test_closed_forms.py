"""The fast folds and their derivatives against the plain formulas.

Both in operations of PyTorch and compiled, where there is compiled code for a kernel.
"""

import pytest
import torch
from helpers import assert_near, gradcheck, trained_like
from torch import nn

from mmorepa.functional import BranchSum, compiled, fold_kernel
from mmorepa.layers import OREPAConv2d, held
from mmorepa.layers.orepa import OREPAKernel, OREPAPointwiseKernel

ALL = tuple(OREPAKernel.INITIAL_SCALES)
KERNELS = {
    'wider': lambda: OREPAKernel(8, 6, 3),
    # More inputs than a vector has, more outputs than are done together.
    'many': lambda: OREPAKernel(9, 37, 3),
    'narrower': lambda: OREPAKernel(5, 7, 3),
    'one_channel': lambda: OREPAKernel(1, 1, 3),
    '5x5': lambda: OREPAKernel(4, 3, 5),
    'grouped': lambda: OREPAKernel(4, 6, 3, groups=2),
    'many_groups': lambda: OREPAKernel(16, 8, 3, groups=8),
    'depthwise': lambda: OREPAKernel(8, 8, 5, groups=8),
    'deep_5x5': lambda: OREPAKernel(7, 35, 5),
    **{f'only_{b}': lambda b=b: OREPAKernel(4, 6, 3, branches=[b]) for b in ALL},
    **{
        f'no_{b}': lambda b=b: OREPAKernel(4, 6, 3, branches=[x for x in ALL if x != b])
        for b in ALL
    },
    '1x1_wider': lambda: OREPAPointwiseKernel(8, 6),
    '1x1_narrower': lambda: OREPAPointwiseKernel(6, 8),
    '1x1_only_product': lambda: OREPAPointwiseKernel(
        6, 8, branches=['pointwise_pointwise']
    ),
    '1x1_grouped': lambda: OREPAPointwiseKernel(6, 8, groups=2),
}


@pytest.fixture(params=['operations', 'compiled'], autouse=True)
def implementation(request, monkeypatch):
    if request.param == 'operations':
        monkeypatch.setattr(compiled, 'is_available', lambda: False)
    elif not compiled.is_available():
        pytest.skip('not compiled: run python tools/build_fold.py')
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return trained_like(KERNELS[request.param]().double())


def formulas(kernel):
    """What autograd makes of the sum of the branches, tensor by tensor."""
    return kernel.branch_sum.kernel(*kernel.tensors())


def transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = {
    'own': lambda t: t,
    'default': lambda t: t.contiguous(),
    # Views of others, with any strides.
    'transposed': transposed,
    'every_second': lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_equals_the_plain_formulas(kernel, layout):
    """Whatever the strides of parameters and gradients are."""
    for t in kernel.parameters():
        t.data = LAYOUTS[layout](t.data)
    expected, actual = formulas(kernel), kernel()
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert actual.requires_grad
    assert_near(actual, expected, 1e-14)
    names, parameters = zip(*kernel.named_parameters())
    for grad in (
        torch.randn(expected.shape, dtype=expected.dtype),
        torch.randn_like(actual),
        transposed(torch.randn_like(actual)),
    ):
        wanted = torch.autograd.grad(expected, parameters, grad, retain_graph=True)
        found = torch.autograd.grad(actual, parameters, grad, retain_graph=True)
        for name, one, other in zip(names, found, wanted):
            try:
                assert_near(one, other, 1e-13)
            except AssertionError as error:
                raise AssertionError(f'{name}: {error}') from None


def test_numerical_derivatives(kernel):
    tensors = kernel.tensors()

    def fold(*tensors):
        return fold_kernel(kernel.branch_sum, *tensors)

    assert gradcheck(fold, tensors)
    assert torch.autograd.gradgradcheck(fold, tensors, fast_mode=True)


def test_trained_in_part(kernel):
    """What is frozen gets no gradient, and changes nothing of the others'."""
    tensors = kernel.tensors()
    for tensor in tensors[:-1]:
        tensor.requires_grad_(False)
    grad = torch.randn(kernel.branch_sum.shape, dtype=torch.float64)
    expected = torch.autograd.grad(formulas(kernel), tensors[-1], grad)
    folded = kernel()
    assert_near(torch.autograd.grad(folded, tensors[-1], grad), expected, 1e-13)


def test_gradients_are_taken_over_as_they_are(kernel):
    """PyTorch copies a gradient whose strides are not those of its parameter."""
    found = {}
    for name, parameter in kernel.named_parameters():
        parameter.register_hook(lambda g, name=name: found.update({name: g.data_ptr()}))
    folded = kernel()
    folded.backward(torch.randn_like(folded))
    assert found == {n: p.grad.data_ptr() for n, p in kernel.named_parameters()}


def test_former_order():
    """Of parameters in earlier checkpoints, and of states of their optimizers."""
    spec = BranchSum(ALL, (6, 4, 3, 3))
    separable, depthwise = torch.randn(6, 32, 1, 1), torch.randn(32, 1, 3, 3)
    second = torch.randn(6, 4, 3, 3)
    former = {
        'weight_separable': (separable, separable),
        'weight_depthwise': (depthwise, depthwise),
        'weight_pointwise_kxk_2': (second, second.permute(0, 2, 3, 1)),
        'weight_origin': (second, second),
    }
    for name, (weight, stored_before) in former.items():
        stored = spec.as_stored(name, weight)
        assert torch.equal(spec.as_conv(name, stored), weight)
        assert torch.equal(spec.from_former(name, stored_before), stored)
        assert spec.from_former(name, stored) is stored


def test_scales_of_zero():
    """A branch that is scaled by zero still learns its scale."""
    kernel = trained_like(OREPAKernel(4, 6, 3).double())
    with torch.no_grad():
        kernel.scale[:, 1] = 0
        kernel.scale[3] = 0
    grad = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(formulas(kernel), kernel.scale, grad)
    (found,) = torch.autograd.grad(kernel(), kernel.scale, grad)
    assert_near(found, expected, 1e-14)


def test_the_graph_keeps_the_parameters_alone(kernel):
    own = {p.untyped_storage().data_ptr() for p in kernel.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, id):
        kernel()
    # PyTorch 2.6 checkpoints with an empty tensor of its own.
    assert {t.untyped_storage().data_ptr() for t in kept if t.numel()} <= own


def test_parameters_that_changed_meanwhile():
    kernel = trained_like(OREPAKernel(4, 6, 3))
    folded = kernel()
    with torch.no_grad():
        kernel.weight_origin.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        folded.sum().backward()


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
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    expected = formulas(kernel)
    grad = torch.randn_like(expected)
    parameters = list(kernel.parameters())
    by_autograd = torch.autograd.grad(expected, parameters, grad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            folded = kernel()
            assert_near(folded, expected, tolerance)
            for one, other in zip(
                torch.autograd.grad(folded, parameters, grad), by_autograd
            ):
                assert_near(one, other, tolerance)
    finally:
        torch.set_num_threads(threads)


class Doubled(OREPAKernel):
    def forward(self):
        return 2 * super().forward()


def test_subclasses_fold_as_they_say():
    convs = nn.Sequential(*(OREPAConv2d(4, 4, 3, padding=1) for _ in range(3)))
    convs[1].branches.__class__ = Doubled
    trained_like(convs.double())
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    expected = convs(x)
    with held(convs):
        assert_near(convs(x), expected, 1e-13)
    assert_near(convs[1].kernel(), 2 * formulas(convs[1].branches), 1e-13)


@pytest.mark.parametrize('k', [1, 3, 7])
def test_it_is_what_a_conv_runs_with(k, monkeypatch):
    """Neither a fold nor its gradient goes through the plain formulas."""
    conv = OREPAConv2d(4, 4, k, padding=k // 2)
    monkeypatch.setattr(BranchSum, 'kernel', None)
    conv(torch.randn(1, 4, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in conv.branches.parameters())
