"""The inverses of the folds, against the folds."""

import pytest
import torch
from helpers import assert_near

from mmorepa.functional import compose_deep_linear, solve_deep_linear


@pytest.mark.parametrize(
    ('inputs', 'hidden', 'outputs', 'groups', 'size'),
    [(3, 32, 8, 1, 7), (3, 64, 5, 1, 7), (2, 8, 6, 1, 5), (4, 64, 8, 2, 7)],
)
def test_deep_linear(inputs, hidden, outputs, groups, size):
    first = torch.randn(hidden, inputs // groups, size - 2, size - 2)
    kernel = torch.randn(outputs, inputs // groups, size, size)
    second = solve_deep_linear(kernel, first, groups)
    assert second.shape == (outputs, hidden // groups, 3, 3)
    assert second.dtype == torch.float64
    found = compose_deep_linear(first.double(), second, groups)
    assert_near(found, kernel.double(), 1e-9)


def test_the_smallest_solution():
    """What does not change the kernel is not in it."""
    first = torch.randn(32, 3, 5, 5, dtype=torch.float64)
    any_other = torch.randn(4, 32, 3, 3, dtype=torch.float64)
    kernel = compose_deep_linear(first, any_other)
    found = solve_deep_linear(kernel, first)
    assert found.norm() < any_other.norm()
    assert_near(compose_deep_linear(first, found), kernel, 1e-9)
    difference = (any_other - found).flatten(1)
    inner = (difference * found.flatten(1)).sum()
    assert abs(inner) < 1e-8 * any_other.norm() ** 2


@pytest.mark.parametrize(('hidden', 'groups'), [(16, 1), (3, 3)])
def test_no_solution(hidden, groups):
    """The chain is too narrow; one channel for each group is a depthwise conv."""
    first = torch.randn(hidden, 3 // groups, 5, 5)
    kernel = torch.randn(6, 3 // groups, 7, 7)
    with pytest.raises(
        ValueError, match=rf'{hidden // groups} channels in a group.* chosen freely'
    ):
        solve_deep_linear(kernel, first, groups)
