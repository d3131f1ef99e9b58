"""The two scopes: what they serve, until when, and what they leave behind: nothing."""

import copy
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_near,
    assert_same_gradients,
    counted_folds,
    deployed_twin,
    trained_like,
)
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mmorepa import folded, switch_to_deploy
from mmorepa.layers import (
    DBBConv2d,
    OREPAConv2d,
    OREPARepVGGConv2d,
    ReparamConv2d,
    backward_to_branches,
    held,
)

BN = dict(type='BN')
RELU = dict(type='ReLU')
CONVS = {
    'orepa': lambda: OREPAConv2d(4, 4, 3, padding=1, norm_cfg=BN, act_cfg=RELU),
    'deep_linear': lambda: OREPAConv2d(4, 4, 7, padding=3, bias=False, norm_cfg=BN),
    'group_norm': lambda: OREPAConv2d(
        4, 4, 3, padding=1, norm_cfg=dict(type='GN', num_groups=2)
    ),
    'no_statistics': lambda: OREPAConv2d(
        4, 4, 3, padding=1, norm_cfg=dict(type='BN', track_running_stats=False)
    ),
    'not_affine': lambda: OREPAConv2d(4, 4, 1, norm_cfg=dict(type='BN', affine=False)),
    'grouped': lambda: OREPAConv2d(4, 4, 3, padding=1, groups=2, norm_cfg=BN),
    'dbb': lambda: DBBConv2d(4, 4, 3, padding=1),
    'orepa_repvgg': lambda: OREPARepVGGConv2d(4, 4, 3, padding=1),
}


def image():
    return torch.randn(2, 4, 9, 9)


@pytest.fixture(params=CONVS)
def conv(request, float64):
    return trained_like(CONVS[request.param]()).eval()


@pytest.fixture
def orepa(float64):
    return trained_like(CONVS['orepa']()).eval()


def network():
    return trained_like(nn.Sequential(*(CONVS[k]() for k in ('orepa', 'grouped'))))


@pytest.fixture
def convolutions(monkeypatch):
    """Counts the convolutions that run, whoever calls for them."""
    calls, conv2d = [], F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda *a, **k: calls.append(1) or conv2d(*a, **k))
    return calls


class TestFolded:
    @pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
    def test_runs_as_the_plain_conv(self, conv, mode, convolutions):
        x = image()
        with torch.no_grad():
            expected = conv(x)
        with mode(), folded(conv) as model:
            assert model is conv
            assert_near(conv(x), expected, 1e-12)
            del convolutions[:]
            assert_near(conv(x), expected, 1e-12)
        assert len(convolutions) == 1

    def test_folds_once(self, orepa):
        with counted_folds(orepa) as folds:
            with torch.no_grad(), folded(orepa):
                for _ in range(3):
                    orepa(image())
            assert len(folds) == 1
            with folded(orepa):
                orepa(image())
                orepa(image()).sum().backward()
            assert len(folds) == 2
        assert all(p.grad is not None for p in orepa.branches.parameters())

    def test_gradients_are_those_of_folding_twice(self, orepa):
        x, twin = image(), copy.deepcopy(orepa).train()
        orepa.train()
        with folded(orepa):
            (orepa(x) + orepa(2 * x)).square().sum().backward()
        (twin(x) + twin(2 * x)).square().sum().backward()
        assert_same_gradients(grads(orepa), grads(twin), 1e-11)

    def test_replicas_of_a_pass_are_not_kept(self, orepa):
        with torch.no_grad(), folded(orepa):
            for _ in range(2):
                replica = orepa._replicate_for_data_parallel()
                replica._parameters.update(orepa._parameters)
                replica(image())
            assert not orepa.evaluation_scope._folds

    @pytest.mark.parametrize('change', ['load', 'train', 'to'])
    def test_what_a_module_is_told_is_seen_inside(self, orepa, change):
        x = image()
        other = trained_like(copy.deepcopy(orepa), seed=1)
        with torch.no_grad(), folded(orepa):
            before = orepa(x)
            if change == 'load':
                orepa.load_state_dict(other.state_dict())
            else:
                for key, value in orepa.state_dict().items():
                    value.copy_(other.state_dict()[key])
                orepa.train().eval() if change == 'train' else orepa.float().double()
            assert not torch.allclose(orepa(x), before)
            assert_near(orepa(x), other(x), 1e-6)

    @pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
    @pytest.mark.parametrize('is_first', [False, True])
    def test_other_parameters_in_a_call(self, conv, mode, is_first):
        """The kernel is that of the parameters of the call, and of it alone."""
        x = image()
        others = {n: (1.2 * p).detach() for n, p in conv.named_parameters()}
        own, theirs = conv(x), functional_call(conv, others, (x,))
        with mode(), folded(conv):
            if not is_first:
                conv(x)
            assert_near(functional_call(conv, others, (x,)), theirs, 1e-12)
            assert_near(conv(x), own, 1e-12)

    def test_other_statistics_in_a_call(self, conv):
        """The norm that is fused into a kernel is that of the call."""
        x = image()
        others = {n: b + 1 for n, b in conv.named_buffers() if 'running' in n}
        with torch.no_grad():
            own, theirs = conv(x), functional_call(conv, others, (x,))
            with folded(conv):
                assert_near(conv(x), own, 1e-12)
                assert_near(functional_call(conv, others, (x,)), theirs, 1e-12)
                assert_near(conv(x), own, 1e-12)

    def test_nested_and_exceptions(self, orepa):
        model, x = nn.Sequential(orepa), image()
        with torch.no_grad(), counted_folds(orepa) as folds:
            with folded(model):
                with pytest.raises(KeyError), folded(orepa):
                    orepa(x)
                    raise KeyError
                orepa(x)
                assert len(folds) == 1
            orepa(x)
            assert len(folds) == 2
            with pytest.raises(KeyError), folded(model):
                raise KeyError
            orepa(x)
        assert len(folds) == 3

    def test_hooks_are_heard(self, orepa):
        seen = []
        orepa.norm.register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad(), folded(orepa):
            orepa(image())
        assert seen == [1]

    def test_copies_belong_to_no_block(self, conv):
        x = image()
        with torch.no_grad(), folded(conv):
            expected = conv(x)
            for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
                for parameter in twin.parameters():
                    parameter.data.mul_(1.5)
                assert not torch.allclose(twin(x), expected)
            assert_near(conv(x), expected, 1e-12)

    def test_deployment_inside(self, orepa):
        model, x = nn.Sequential(orepa), image()
        with torch.no_grad(), folded(model):
            expected = model(x)
            switch_to_deploy(model)
            assert_near(model(x), expected, 1e-12)

    def test_autocast(self):
        conv, x = trained_like(CONVS['orepa']()).eval(), image()
        with torch.no_grad(), folded(conv):
            with torch.autocast('cpu', torch.bfloat16):
                y = conv(x)
            assert y.dtype == torch.bfloat16
            # What autocast made is not what is kept.
            assert_near(conv(x), deployed_twin(conv)(x))
            assert_near(y.float(), conv(x), 2e-2)

    def test_threads(self, orepa):
        x, found = image(), []
        with torch.no_grad():
            expected = orepa(x)

        def run():
            with torch.no_grad():
                found.append(orepa(x))

        with folded(orepa):
            threads = [threading.Thread(target=run) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(found) == 8
        assert_near(found, [expected] * 8, 1e-12)


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def losses(model, x):
    return model(x).square().mean()


class TestHeld:
    @pytest.fixture
    def twins(self, float64):
        model = network()
        return model, copy.deepcopy(model)

    def check(self, twins):
        model, online = twins
        assert_same_gradients(grads(model), grads(online), 1e-11)

    def test_holds_leaves(self, twins):
        model, _ = twins
        with held(model) as kernels:
            assert len(kernels) == 2
            for kernel, conv in zip(kernels, model):
                assert kernel.parameter.is_leaf and kernel.parameter is conv.kernel()
                with torch.no_grad():
                    assert conv.kernel() is not kernel.parameter
        assert all(conv.kernel().grad_fn is not None for conv in model)

    @pytest.mark.parametrize('is_deferred', [False, True])
    @pytest.mark.parametrize('passes', [1, 2])
    def test_gradients(self, twins, is_deferred, passes):
        model, online = twins
        for _ in range(passes):  # The second adds to the first.
            x = image()
            with held(model) as kernels:
                loss = losses(model, x)
            for kernel in kernels:
                kernel.graph.is_deferred = is_deferred
            loss.backward()
            if is_deferred:
                backward_to_branches(kernels)
            losses(online, x).backward()
        self.check(twins)

    @pytest.mark.parametrize('has_backward', [False, True])
    def test_nothing_is_kept(self, twins, has_backward):
        """One step more leaves no kernel more: they are as large as a model."""
        model, _ = twins
        leaves = []
        for _ in range(3):
            with held(model) as kernels:
                loss = losses(model, image())
            leaves += [weakref.ref(kernel.graph) for kernel in kernels]
            del kernels
            if has_backward:
                loss.backward()
            del loss
        # Those of the last step are taken from the conv by the next one.
        assert [leaf() is None for leaf in leaves] == 4 * [True] + 2 * [False]

    @pytest.mark.parametrize('use_reentrant', [False, True])
    def test_checkpointed(self, twins, use_reentrant):
        model, online = twins
        x = image().requires_grad_()
        with held(model):
            loss = checkpoint(losses, model, x, use_reentrant=use_reentrant)
        loss.backward()
        checkpoint(losses, online, x, use_reentrant=use_reentrant).backward()
        self.check(twins)

    @pytest.mark.parametrize('transform', [False, True])
    def test_other_parameters_in_a_call(self, twins, transform):
        """The kernel is that of the parameters of the call, as online."""
        model, _ = twins
        x = image()
        own = dict(model.eval().named_parameters())

        def loss(others):
            return functional_call(model, others, (x,)).square().mean()

        others = {n: (1.2 * p).detach().requires_grad_() for n, p in own.items()}
        expected = torch.autograd.grad(loss(others), others.values())
        with held(model) as kernels:
            if transform:
                found = torch.func.grad(loss)(others).values()
            else:
                found = torch.autograd.grad(loss(others), others.values())
            assert model[0].kernel() is kernels[0].parameter
        assert_near(list(found), expected, 1e-11)

    def test_changed_kernels_cannot_be_differentiated(self, twins):
        """A graph that used the former numbers must not go on with others."""
        model, _ = twins
        with held(model):
            loss = losses(model, image())
        with torch.no_grad():
            model[0].branches.weight_origin.mul_(2)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            loss.backward()

    def test_model_that_was_told_of_a_change(self, twins):
        """After train(), a load or a move, passes fold anew, block or not."""
        model, online = twins
        x = image()
        with held(model):
            model.load_state_dict(online.state_dict())
            loss = losses(model, x)
        loss.backward()
        losses(online, x).backward()
        self.check(twins)
        assert all(
            m.training_scope is None for m in model if isinstance(m, ReparamConv2d)
        )
