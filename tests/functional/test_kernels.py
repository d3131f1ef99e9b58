"""The formulas, against loops over their indices."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import gradcheck

from mmorepa.functional import (
    average_kernel,
    compose_1x1_kxk,
    compose_deep_linear,
    constant_response,
    depthwise_separable_kernel,
    embed_1x1,
    filtered_kernel,
    frequency_prior,
    identity_1x1,
    scaled_sum,
)

pytestmark = pytest.mark.usefixtures('float64')


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize('k', [1, 3, 5])
def test_embed_1x1(k):
    weight = leaf(4, 3, 1, 1)
    kernel = embed_1x1(weight, k)
    expected = torch.zeros(4, 3, k, k)
    expected[:, :, k // 2, k // 2] = weight.detach()[:, :, 0, 0]
    assert torch.equal(kernel, expected)
    assert gradcheck(lambda w: embed_1x1(w, k), weight)


@pytest.mark.parametrize('k', [3, 5])
def test_average_kernel(k):
    weight = leaf(4, 3, 1, 1)
    kernel = average_kernel(weight, k)
    assert kernel.shape == (4, 3, k, k)
    x = torch.randn(2, 3, 8, 8)
    expected = F.avg_pool2d(F.conv2d(x, weight), k, stride=1)
    torch.testing.assert_close(F.conv2d(x, kernel), expected)
    assert gradcheck(lambda w: average_kernel(w, k), weight)


@pytest.mark.parametrize('channels', [1, 2, 5, 8])
@pytest.mark.parametrize('k', [3, 5])
def test_frequency_prior_is_the_formula(channels, k):
    prior = frequency_prior(channels, k)
    assert prior.shape == (channels, k, k)
    for o in range(channels):
        for h in range(k):
            for w in range(k):
                if o < channels / 2:
                    value = math.cos(math.pi * (h + 0.5) * (o + 1) / k)
                else:
                    value = math.cos(math.pi * (w + 0.5) * (o + 1 - channels / 2) / k)
                assert prior[o, h, w] == pytest.approx(value, abs=1e-14)


def test_frequency_prior_takes_dtype_and_device():
    prior = frequency_prior(4, 3, dtype=torch.float16, device=torch.device('meta'))
    assert prior.dtype == torch.float16 and prior.is_meta


def test_filtered_kernel():
    weight, filters = leaf(4, 3, 1, 1), leaf(4, 3, 3)
    x = torch.randn(2, 3, 8, 8)
    expected = F.conv2d(F.conv2d(x, weight), filters[:, None], groups=4)
    torch.testing.assert_close(F.conv2d(x, filtered_kernel(weight, filters)), expected)
    assert gradcheck(filtered_kernel, (weight, filters))


@pytest.mark.parametrize(('rows', 'columns'), [(3, 3), (6, 3), (8, 2), (4, 1)])
def test_identity_1x1(rows, columns):
    eye = identity_1x1(rows, columns)
    assert eye.shape == (rows, columns, 1, 1)
    for t in range(rows):
        for i in range(columns):
            assert eye[t, i] == (1 if i == t % columns else 0)


@pytest.mark.parametrize('groups', [1, 2, 3])
def test_identity_1x1_repeats_the_input_of_each_group(groups):
    x = torch.randn(1, 6, 2, 2)
    once = F.conv2d(x, identity_1x1(6, 6 // groups), groups=groups)
    assert torch.equal(once, x)
    twice = F.conv2d(x, identity_1x1(12, 6 // groups), groups=groups)
    by_group = x.reshape(groups, 6 // groups, 2, 2)
    assert torch.equal(twice, torch.cat([by_group] * 2, 1).reshape(1, 12, 2, 2))


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('k', [1, 3])
def test_compose_1x1_kxk(groups, k):
    first, second = leaf(12, 8 // groups, 1, 1), leaf(4, 12 // groups, k, k)
    x = torch.randn(2, 8, 6, 6)
    expected = F.conv2d(F.conv2d(x, first, groups=groups), second, groups=groups)
    kernel = compose_1x1_kxk(first, second, groups)
    torch.testing.assert_close(F.conv2d(x, kernel, groups=groups), expected)
    assert gradcheck(lambda a, b: compose_1x1_kxk(a, b, groups), (first, second))


@pytest.mark.parametrize('expansion', [1, 3, 8])
@pytest.mark.parametrize('groups', [1, 2, 6])
def test_depthwise_separable_kernel(groups, expansion):
    outputs, inputs = 12, 6
    per_group = inputs // groups
    dw = leaf(expansion * inputs, 1, 3, 3)
    pw = leaf(outputs, expansion * per_group, 1, 1)
    expected = torch.zeros(outputs, per_group, 3, 3)
    for n in range(outputs):
        c = n // (outputs // groups)
        for i in range(per_group):
            for t in range(expansion):
                row = dw[(c * per_group + i) * expansion + t, 0]
                expected[n, i] += (pw[n, i * expansion + t] * row).detach()
    kernel = depthwise_separable_kernel(dw, pw, groups, expansion)
    torch.testing.assert_close(kernel.detach(), expected)
    assert gradcheck(
        lambda a, b: depthwise_separable_kernel(a, b, groups, expansion), (dw, pw)
    )


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize(('j', 'k'), [(3, 3), (5, 3), (3, 5)])
def test_compose_deep_linear(groups, j, k):
    inputs, mid, outputs = 4 // groups, 4, 6
    first, second = leaf(mid, inputs, j, j), leaf(outputs, mid // groups, k, k)
    expected = torch.zeros(outputs, inputs, j + k - 1, j + k - 1)
    for o in range(outputs):
        group = o // (outputs // groups)
        for i in range(inputs):
            for m in range(mid // groups):
                row = first[group * (mid // groups) + m, i].detach()
                # Full cross-correlation: `second` slides over a padded `first`.
                image = F.pad(row, [k - 1] * 4)
                for y in range(j + k - 1):
                    for x in range(j + k - 1):
                        window = image[y : y + k, x : x + k]
                        expected[o, i, y, x] += (window * second[o, m].detach()).sum()
    kernel = compose_deep_linear(first, second, groups)
    torch.testing.assert_close(kernel.detach(), expected)
    assert gradcheck(lambda a, b: compose_deep_linear(a, b, groups), (first, second))


@pytest.mark.parametrize('groups', [1, 2])
def test_constant_response(groups):
    kernel, constants = leaf(6, 4 // groups, 3, 3), leaf(4)
    x = constants[None, :, None, None].expand(1, 4, 5, 5)
    expected = F.conv2d(x, kernel, groups=groups)[0, :, 1, 1]
    response = constant_response(kernel, constants, groups)
    torch.testing.assert_close(response, expected)
    assert gradcheck(lambda a, b: constant_response(a, b, groups), (kernel, constants))


def test_scaled_sum():
    kernels, scales = [leaf(4, 3, 3, 3) for _ in range(3)], leaf(3, 4)
    kernel = scaled_sum(kernels, scales)
    for o in range(4):
        expected = sum(scales[b, o] * kernels[b][o] for b in range(3))
        torch.testing.assert_close(kernel[o], expected)
    assert gradcheck(lambda s, *k: scaled_sum(k, s), (scales, *kernels))
