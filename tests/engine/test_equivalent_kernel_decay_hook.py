"""Weight decay of the equivalent kernels, in real runners."""

import copy

import pytest
import torch
from helpers import assert_near, assert_near_states
from mmengine.hooks import Hook
from runners import Colours, TinyClassifier, make_runner
from torch import nn

from mmorepa.backbones import OREPARepVGG, OREPAResNet
from mmorepa.engine import EquivalentKernelDecayHook
from mmorepa.layers import outermost

DECAY, LR = 0.05, 0.1
HOOK = dict(type='EquivalentKernelDecayHook', weight_decay=DECAY)
SLIM = dict(num_blocks=(1, 1, 1, 1), widths=(0.0625,) * 4)


class Classifier(TinyClassifier):
    """A backbone in the place of the convs, in float64."""

    def __init__(self, backbone):
        super().__init__()
        self.conv1, self.conv2 = backbone, nn.Identity()
        self.head = nn.Linear(backbone.feat_dim, 4)
        self.double()

    def forward(self, inputs, labels=None, mode='tensor'):
        x = nn.functional.interpolate(inputs.to(self.head.weight.dtype), (32, 32))
        logits = self.head(self.conv1(x)[-1].mean(dim=(2, 3)))
        if mode == 'loss':
            return dict(loss_cls=nn.functional.cross_entropy(logits, labels))
        return logits


NETWORKS = {
    'plain': lambda: OREPAResNet(18, 'plain', base_channels=4),
    'orepa': lambda: OREPAResNet(18, base_channels=4),
    'dbb': lambda: OREPAResNet(18, 'dbb', base_channels=4),
    'orepa_repvgg': lambda: OREPARepVGG(SLIM),
    'frozen': lambda: OREPAResNet(18, base_channels=4, frozen_stages=2),
    'deployed': lambda: OREPAResNet(18, base_channels=4, deploy=True),
}


def network(name):
    torch.manual_seed(1)
    return Classifier(NETWORKS[name]())


def run(work_dir, model, iterations=1, hooks=(HOOK,), wrapper=None):
    runner = make_runner(
        work_dir,
        model,
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        **dict.fromkeys(('val_dataloader', 'val_cfg', 'val_evaluator')),
        custom_hooks=[*hooks],
        optim_wrapper={'optimizer': dict(type='SGD', lr=LR), **(wrapper or {})},
    )
    runner.train()
    return runner.model


def batch():
    data = Colours(24)
    return data.images[:8], data.labels[:8]


def step_by_hand(model):
    """One step of SGD with the term written out."""
    model = copy.deepcopy(model).train()
    convs = [
        conv
        for _, conv in outermost(model)
        if any(p.requires_grad and p.dim() > 1 for p in conv.parameters())
    ]
    loss = model(*batch(), mode='loss')['loss_cls']  # First: it moves statistics.
    squares = sum(conv.regularized_kernel().square().sum() for conv in convs)
    (loss + 0.5 * DECAY * squares).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LR * parameter.grad
    return model


def assert_same_weights(actual, expected):
    states = (dict(model.named_parameters()) for model in (actual, expected))
    assert_near_states(*states, 1e-9)


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('kind', ['OptimWrapper', 'FoldedOptimWrapper'])
def test_one_step(tmp_path, name, kind):
    model = network(name)
    expected = step_by_hand(model)
    trained = run(tmp_path, copy.deepcopy(model), wrapper=dict(type=kind))
    assert_same_weights(trained, expected)
    assert not trained._forward_hooks


def test_plain_net_decays_as_with_sgd(tmp_path):
    """On plain kernels the term is what the optimizer's own decay does."""

    def trained(hooks, **paramwise):
        wrapper = dict(
            optimizer=dict(type='SGD', lr=LR, momentum=0.9, weight_decay=DECAY),
            constructor='OREPAOptimWrapperConstructor',
            paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, **paramwise),
        )
        return run(tmp_path, network('plain'), 3, hooks, wrapper)

    assert_same_weights(trained([HOOK], branch_decay_mult=0.0), trained([]))


def test_gradient_accumulation_and_mixed_precision(tmp_path):
    """Two half steps hold the term once, in float32."""
    model = network('orepa').float()
    wrapper = dict(type='BFloat16OptimWrapper', accumulative_counts=2)
    with_term, without = (
        run(tmp_path, copy.deepcopy(model), 2, hooks, wrapper) for hooks in ([HOOK], [])
    )
    squares = sum(c.regularized_kernel().square().sum() for _, c in outermost(model))
    (0.5 * DECAY * squares).backward()
    others = dict(without.named_parameters())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, value in with_term.named_parameters():
        if gradients[name] is not None and gradients[name].any():
            assert_near(others[name] - value, LR * gradients[name], 1e-3)


def test_only_the_loss_while_it_trains(tmp_path):
    """Also in a second training, after one that was cut off."""

    class Probe(Hook):
        def before_train_iter(self, runner, *args, **kwargs):
            assert len(runner.model._forward_hooks) == 1
            model, (images, labels) = copy.deepcopy(runner.model), batch()
            assert isinstance(model(images, mode='tensor'), torch.Tensor)
            losses = model(images, labels, mode='loss')
            assert losses.keys() == {'loss_cls', 'loss_kernel_decay'}
            raise KeyboardInterrupt

    model, hook = network('orepa'), EquivalentKernelDecayHook()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, model, hooks=[hook, Probe()])
    run(tmp_path, model, hooks=[hook])
    assert model(*batch(), mode='loss').keys() == {'loss_cls'}


def test_nothing_to_decay(tmp_path):
    model = Classifier(OREPAResNet(18, base_channels=4, frozen_stages=4))
    with pytest.raises(ValueError, match='has no effect'):
        run(tmp_path, model)
