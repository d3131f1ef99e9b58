"""What there is compiled code for, and where it is kept."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import trained_like
from torch._subclasses import FakeTensorMode

from mmorepa.functional import compiled
from mmorepa.layers.orepa import OREPAKernel, OREPAPointwiseKernel

needs_compiled = pytest.mark.skipif(
    not compiled.is_available(), reason='not compiled: run python tools/build_fold.py'
)


@pytest.fixture
def calls(monkeypatch):
    """Whether compiled code was taken, by fold and derivative."""
    results = []

    supports = compiled.supports

    def record(*args):
        results.append(supports(*args))
        return results[-1]

    monkeypatch.setattr(compiled, 'supports', record)
    return results


def fold_and_backward(kernel):
    folded = kernel()
    names, parameters = zip(*kernel.named_parameters())
    grads = torch.autograd.grad(folded, parameters, torch.ones_like(folded))
    return folded, dict(zip(names, grads))


@needs_compiled
@pytest.mark.parametrize(
    'kernel',
    [
        OREPAKernel(4, 5, 3),
        OREPAKernel(4, 5, 3).double(),
        OREPAKernel(4, 5, 5),
        OREPAKernel(4, 5, 3, branches=['origin', 'pointwise_kxk', 'average']),
        OREPAKernel(4, 5, 3, branches=['pointwise']),
        OREPAPointwiseKernel(4, 5),
        OREPAPointwiseKernel(5, 4).double(),
    ],
)
def test_it_is_used(kernel, calls):
    fold_and_backward(kernel)
    assert calls == [True, True]


@pytest.mark.parametrize(
    'kernel',
    [
        OREPAKernel(4, 6, 3, groups=2),
        OREPAKernel(4, 5, 7),
        OREPAKernel(4, 5, 3).bfloat16(),
        OREPAPointwiseKernel(4, 5).half(),
        OREPAKernel(4, 5, 3).to('meta'),
    ],
)
def test_it_declines(kernel, calls):
    folded, found = fold_and_backward(kernel)
    assert not any(calls)
    assert folded.shape == kernel.branch_sum.shape
    assert all(g.shape == kernel.get_parameter(n).shape for n, g in found.items())


def test_it_declines_what_is_not_in_memory(calls):
    """Estimates of memory, and compilers, run models on tensors without contents."""
    with FakeTensorMode():
        folded, _ = fold_and_backward(OREPAKernel(4, 5, 3))
    assert folded.shape == (4, 5, 3, 3) and not any(calls)


@pytest.mark.parametrize('name', OREPAKernel(4, 5, 3).branch_sum.roles)
@pytest.mark.parametrize('shape', [(1,), (4, 5, 3, 2), (0,), (40, 8, 5)])
def test_other_shapes(name, shape):
    """They would be read beyond their end, or as if they were others."""
    kernel = OREPAKernel(4, 5, 3)
    setattr(kernel, name, torch.nn.Parameter(torch.zeros(shape)))
    with pytest.raises(ValueError, match='has the shape'):
        kernel()


@pytest.mark.skipif(not compiled.is_available(), reason='operations of PyTorch crash')
def test_memory_taken_away():
    """As wrappers of modules do for a while."""
    kernel = OREPAKernel(4, 5, 3)
    kernel.weight_origin.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        kernel()


@pytest.mark.parametrize('error', [PermissionError('no'), OSError('no')])
def test_a_library_that_cannot_be_loaded(error, monkeypatch):
    """Is one more reason to do without."""

    def fail(*args):
        raise error

    monkeypatch.setattr(compiled, 'library_path', fail)
    monkeypatch.setattr(torch, 'ops', SimpleNamespace(mmorepa=SimpleNamespace()))
    with pytest.warns(UserWarning, match='cannot be loaded'):
        assert compiled.is_available.__wrapped__() is False


@needs_compiled
def test_build_beside_another(monkeypatch, tmp_path):
    """A process can load one library only."""
    monkeypatch.setenv('MMOREPA_CACHE', str(tmp_path))
    with pytest.raises(RuntimeError, match='in another one'):
        compiled.build()


@needs_compiled
@pytest.mark.parametrize('kernel', [OREPAKernel(4, 5, 3), OREPAPointwiseKernel(4, 5)])
def test_autocast_changes_nothing(kernel, calls):
    expected = fold_and_backward(trained_like(kernel))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = fold_and_backward(kernel)
    assert all(calls)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], g) for name, g in expected[1].items())


def test_the_name_tells_builds_apart(monkeypatch, tmp_path):
    monkeypatch.setenv('MMOREPA_CACHE', str(tmp_path))
    path = compiled.library_path()
    assert path.parent == tmp_path and path == compiled.library_path()
    paths = set()
    for name in ('DEFAULT', 'AVX2', 'AVX512'):
        monkeypatch.setattr(
            torch.backends.cpu, 'get_cpu_capability', lambda name=name: name
        )
        paths.add(compiled.library_path())
    assert len(paths) == 3


@pytest.fixture
def run_tool(tmp_path):
    """Runs ``tools/build_fold.py`` with an empty cache."""

    def run(**environment):
        return subprocess.run(
            [sys.executable, 'tools/build_fold.py'],
            env={**os.environ, 'MMOREPA_CACHE': str(tmp_path), **environment},
            capture_output=True,
            text=True,
        )

    return run


def test_without_a_compiler(run_tool, tmp_path):
    result = run_tool(CXX='/no/such/compiler')
    assert result.returncode == 1
    assert 'takes GCC' in result.stderr and 'Traceback' not in result.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_build(run_tool, tmp_path):
    """Anew, once, and for whoever comes later."""
    result = run_tool()
    if result.returncode:
        pytest.skip(result.stderr)
    (library,) = tmp_path.iterdir()
    assert str(library) in result.stdout
    made = library.stat().st_mtime_ns
    assert run_tool().returncode == 0 and library.stat().st_mtime_ns == made
