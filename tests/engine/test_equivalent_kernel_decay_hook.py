import json

import pytest
import torch
from helpers import assert_near
from runners import TinyClassifier, logits_of, make_runner, make_test_runner
from torch import nn

from mmorepa.backbones import OREPAResNet
from mmorepa.engine.hooks import EquivalentKernelDecayHook
from mmorepa.layers import BLOCKS, OREPAConv2d, PlainConv2d, build_conv

DECAY = 0.02
HOOK = dict(type='EquivalentKernelDecayHook', weight_decay=DECAY)


def wrapper(decay=DECAY, **paramwise):
    return dict(
        optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=decay),
        constructor='OREPAOptimWrapperConstructor',
        paramwise_cfg=paramwise,
    )


class PlainTiny(TinyClassifier):
    """The tiny network of plain convs."""

    def __init__(self):
        super().__init__()
        options = dict(bias=False, norm_cfg=dict(type='BN'))
        self.conv1 = PlainConv2d(3, 8, 3, stride=2, padding=1, **options)
        self.conv2 = PlainConv2d(8, 8, 1, **options)


def state_after(tmp_path, name, model, **options):
    torch.manual_seed(3)
    runner = make_runner(tmp_path / name, model(), **options)
    runner.train()
    return runner.model.state_dict()


def test_is_weight_decay_for_plain_convs(tmp_path):
    """The same training, parameter by parameter, as with SGD's own decay."""
    states = [
        state_after(tmp_path, 'sgd', PlainTiny, optim_wrapper=wrapper()),
        state_after(
            tmp_path,
            'hook',
            PlainTiny,
            custom_hooks=[HOOK],
            optim_wrapper=wrapper(branch_decay_mult=0.0),
        ),
        state_after(
            tmp_path, 'none', PlainTiny, optim_wrapper=wrapper(branch_decay_mult=0.0)
        ),
    ]
    for key, value in states[0].items():
        assert torch.allclose(states[1][key], value, rtol=1e-5, atol=1e-7), key
    key = 'conv1.branches.weight'
    assert not torch.allclose(states[2][key], states[0][key], rtol=1e-2)


def losses_of(model, mode='loss'):
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    return model(*batch, mode=mode)


@pytest.fixture
def hooked(tmp_path):
    """A runner whose training has begun, with the hook."""
    runner = make_runner(tmp_path, custom_hooks=[HOOK])
    (hook,) = [h for h in runner.hooks if isinstance(h, EquivalentKernelDecayHook)]
    hook.before_train(runner)
    return runner, hook


def test_adds_the_norm_of_the_kernels(hooked):
    runner, hook = hooked
    model = runner.model
    losses = losses_of(model)
    assert set(losses) == {'loss', 'loss_kernel_decay'}
    squares = sum(c.kernel().square().sum() for c in (model.conv1, model.conv2))
    assert torch.equal(losses['loss_kernel_decay'], 0.5 * DECAY * squares)
    losses['loss_kernel_decay'].backward()
    gradients = {n for n, p in model.named_parameters() if p.grad is not None}
    assert gradients == {n for n, _ in model.named_parameters() if 'branches' in n}
    # Nothing but training is touched.
    assert isinstance(losses_of(model, 'tensor'), torch.Tensor)
    assert isinstance(losses_of(model, 'predict'), list)
    hook.after_train(runner)
    assert set(losses_of(model)) == {'loss'}


def test_kernels_shrink(tmp_path):
    def size(state):
        model = TinyClassifier()
        model.load_state_dict(state)
        return model.conv1.kernel().square().sum().item()

    strong = dict(HOOK, weight_decay=1.0)
    without, with_hook = (
        size(state_after(tmp_path, str(len(hooks)), TinyClassifier, custom_hooks=hooks))
        for hooks in ([], [strong])
    )
    assert with_hook < 0.5 * without


def test_is_logged_and_optimised(tmp_path):
    make_runner(tmp_path, custom_hooks=[HOOK]).train()
    (path,) = tmp_path.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    (first, *_) = [record for record in records if 'loss' in record]
    assert 0 < first['loss_kernel_decay'] < first['loss']


def test_frozen_convs_do_not_count(tmp_path):
    model = TinyClassifier()
    model.conv1.requires_grad_(False)
    runner = make_runner(tmp_path, model, custom_hooks=[HOOK])
    hook = EquivalentKernelDecayHook(DECAY)
    hook.before_train(runner)
    expected = 0.5 * DECAY * model.conv2.kernel().square().sum()
    assert torch.equal(losses_of(model)['loss_kernel_decay'], expected)


@pytest.mark.parametrize('model', [nn.Linear(2, 2), 'frozen', 'deployed'])
def test_nothing_to_decay(tmp_path, model):
    if model == 'frozen':
        model = OREPAConv2d(3, 4, 3).requires_grad_(False)
    if model == 'deployed':
        model = nn.Sequential(OREPAConv2d(3, 4, 3)).requires_grad_(False)
        model[0].switch_to_deploy()

    class Runner:
        pass

    runner = Runner()
    runner.model = model
    with pytest.raises(ValueError, match='EquivalentKernelDecayHook has no effect'):
        EquivalentKernelDecayHook().before_train(runner)


@pytest.mark.parametrize('block', list(BLOCKS))
def test_every_block(block):
    """One kernel a conv, whose branches are not counted a second time."""
    conv = build_conv(block, 4, 4, 3, padding=1, bias=False, norm_cfg=dict(type='BN'))
    model = nn.Sequential(conv)
    hook = EquivalentKernelDecayHook(2.0)
    handle = model.register_forward_hook(hook._add_loss, with_kwargs=True)
    losses = hook._add_loss(model, (), dict(mode='loss'), {})
    handle.remove()
    kernel = conv.regularized_kernel()
    assert kernel.shape == (4, 4, 3, 3)
    assert torch.allclose(losses['loss_kernel_decay'], kernel.square().sum())
    losses['loss_kernel_decay'].backward()
    assert any(p.grad is not None and p.grad.any() for p in conv.parameters())


def test_test_after_training(tmp_path):
    """The deploy hook and the checkpoint find a network without the hook."""
    hooks = [HOOK, dict(type='SwitchToDeployHook', save_after_train=True)]
    saving = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    runner = make_runner(tmp_path, custom_hooks=hooks, default_hooks=saving)
    runner.train()
    expected = logits_of(runner.model)
    path = str(tmp_path / 'epoch_2_deploy.pth')
    model = TinyClassifier(deploy=True)
    make_test_runner(tmp_path / 'test', model, load_from=path).test()
    assert_near(logits_of(model), expected)


def test_network_in_training(tmp_path):
    """A pass with it through a network with a shortcut, as a whole."""
    net = OREPAResNet(18, base_channels=4)
    hook = EquivalentKernelDecayHook(1e-4)
    loss = hook._add_loss(net, (), dict(mode='loss'), {})['loss_kernel_decay']
    loss.backward()
    without = [
        name
        for name, param in net.named_parameters()
        if param.grad is None and 'norm' not in name
    ]
    assert not without
