"""Weight decay of the equivalent kernels, in real runners."""

import copy

import pytest
import torch
from helpers import assert_near, counted_folds
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from runners import Colours, TinyClassifier, make_runner
from torch import distributed, nn
from torch.nn import functional as F

from mmorepa.backbones import OREPARepVGG, OREPAResNet
from mmorepa.engine import EquivalentKernelDecayHook
from mmorepa.layers import ReparamConv2d

DECAY = 0.05
LR = 0.1


class Classifier(BaseModel):
    """A backbone and a linear layer."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.feat_dim, 4)

    def forward(self, inputs, labels=None, mode='tensor'):
        # Large enough for maps of more than a pixel: of smaller ones, PyTorch's
        # bfloat16 convs give the gradients of memory that nobody has written.
        inputs = F.interpolate(inputs.to(self.head.weight.dtype), (32, 32))
        logits = self.head(self.backbone(inputs)[-1].mean(dim=(2, 3)))
        if mode == 'loss':
            return dict(loss_cls=F.cross_entropy(logits, labels))
        return logits


ARCH = dict(num_blocks=(2, 1, 1, 1), widths=(0.125, 0.125, 0.125, 0.125))


# In float64: a BatchNorm over eight values amplifies what rounding leaves, and a ReLU
# passes a gradient or not by the last bit of a sum.
def resnet(block, **options):
    torch.manual_seed(1)
    return Classifier(OREPAResNet(18, block, base_channels=4, **options)).double()


def repvgg(block):
    torch.manual_seed(1)
    return Classifier(OREPARepVGG(ARCH, block)).double()


NETWORKS = {
    'plain': lambda: resnet('plain'),
    'orepa': lambda: resnet('orepa'),
    'dbb': lambda: resnet('dbb'),
    'repvgg': lambda: repvgg('repvgg'),
    'orepa_repvgg': lambda: repvgg('orepa'),
}


class Recorder(Hook):
    """Keeps what every step returns, and copies of the model before and after."""

    def __init__(self):
        self.losses, self.models = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.models.append(copy.deepcopy(runner.model))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({name: float(value) for name, value in outputs.items()})


def run(tmp_path, model, iterations=1, hook=True, hooks=(), wrapper=None, **options):
    """Trains; the runner and what it recorded."""
    recorder = Recorder()
    decay = dict(type='EquivalentKernelDecayHook', weight_decay=DECAY)
    hooks = [*([decay] if hook else []), *hooks]
    runner = make_runner(
        tmp_path,
        model,
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        val_dataloader=None,
        val_cfg=None,
        val_evaluator=None,
        custom_hooks=[*hooks, recorder],
        optim_wrapper={'optimizer': dict(type='SGD', lr=LR), **(wrapper or {})},
        **options,
    )
    runner.train()
    return runner, recorder


def batch(number=0):
    data = Colours(24)
    part = slice(8 * number, 8 * (number + 1))
    return data.images[part], data.labels[part]


def trained_convs(model):
    """Outermost re-parameterised convs, found by their names."""
    names = [n for n, m in model.named_modules() if isinstance(m, ReparamConv2d)]
    return [
        model.get_submodule(name)
        for name in names
        if not any(name.startswith(f'{other}.') for other in names)
    ]


def step_by_hand(model, decay=DECAY):
    """One step of SGD with the term written out; the losses and the new weights."""
    model = copy.deepcopy(model).train()
    cls = model(*batch(), mode='loss')['loss_cls']
    term = sum(c.regularized_kernel().square().sum() for c in trained_convs(model))
    term = 0.5 * decay * term
    (cls + term).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LR * parameter.grad
    return model, dict(
        loss=float(cls + term), loss_cls=float(cls), loss_kernel_decay=float(term)
    )


def assert_same_weights(actual, expected, tolerance=1e-9):
    """Compares how far the weights are, relative to the largest of each tensor."""
    expected = dict(expected.named_parameters())
    assert dict(actual.named_parameters()).keys() == expected.keys()
    for name, value in actual.named_parameters():
        if value.any() or expected[name].any():
            assert_near(value, expected[name], tolerance)


def moved(before, after):
    """The names of the parameters that differ."""
    others = dict(after.named_parameters())
    return {n for n, p in before.named_parameters() if not torch.equal(p, others[n])}


@pytest.mark.parametrize('network', NETWORKS)
def test_one_step(tmp_path, network):
    model = NETWORKS[network]()
    before = copy.deepcopy(model)
    runner, recorder = run(tmp_path, model)
    expected, losses = step_by_hand(before)
    assert losses['loss_kernel_decay'] > 0.01 * losses['loss']
    assert recorder.losses == [pytest.approx(losses, rel=1e-5)]
    assert_same_weights(runner.model, expected)
    # The term matters: without it the step is another one.
    without, _ = step_by_hand(before, decay=0.0)
    assert moved(expected, without) > {
        name for name, p in expected.named_parameters() if 'weight_origin' in name
    }


def test_is_logged(tmp_path):
    run(tmp_path, resnet('orepa'))
    (log,) = tmp_path.glob('*/*.log')
    assert 'loss_kernel_decay: ' in log.read_text()


def test_default_is_that_of_the_recipe():
    assert EquivalentKernelDecayHook().weight_decay == 1e-4


def test_plain_net_decays_as_with_sgd(tmp_path):
    """On plain kernels the term is what the optimizer's own decay does."""

    def wrapper(**paramwise):
        return dict(
            optimizer=dict(type='SGD', lr=LR, momentum=0.9, weight_decay=DECAY),
            constructor='OREPAOptimWrapperConstructor',
            paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, **paramwise),
        )

    start = resnet('plain')
    with_hook, recorder = run(
        tmp_path / 'hook',
        copy.deepcopy(start),
        iterations=3,
        wrapper=wrapper(branch_decay_mult=0.0),
    )
    ordinary, _ = run(
        tmp_path / 'sgd',
        copy.deepcopy(start),
        iterations=3,
        hook=False,
        wrapper=wrapper(),
    )
    neither, _ = run(
        tmp_path / 'neither',
        copy.deepcopy(start),
        iterations=3,
        hook=False,
        wrapper=wrapper(branch_decay_mult=0.0),
    )
    assert_same_weights(with_hook.model, ordinary.model)
    name = 'backbone.layer1.0.conv1.branches.weight'
    weights = [
        dict(r.model.named_parameters())[name] for r in (with_hook, ordinary, neither)
    ]
    assert (weights[1] - weights[2]).abs().max() > 1e-3 * weights[1].abs().max()
    # It is the kernels' alone: the linear layer keeps the optimizer's decay.
    groups = with_hook.optim_wrapper.optimizer.param_groups
    decays = {
        id(parameter): group['weight_decay']
        for group in groups
        for parameter in group['params']
    }
    assert decays[id(with_hook.model.head.weight)] == DECAY
    assert decays[id(dict(with_hook.model.named_parameters())[name])] == 0.0


def test_gradient_accumulation(tmp_path):
    """Two half steps hold the term once, not twice."""
    start = resnet('orepa', norm_eval=True)
    runner, recorder = run(
        tmp_path,
        copy.deepcopy(start),
        iterations=2,
        wrapper=dict(accumulative_counts=2),
    )
    expected = copy.deepcopy(start).train()
    cls = sum(expected(*batch(i), mode='loss')['loss_cls'] for i in range(2)) / 2
    squares = sum(
        conv.regularized_kernel().square().sum() for conv in trained_convs(expected)
    )
    (cls + 0.5 * DECAY * squares).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= LR * parameter.grad
    # The step is done after the second micro-batch.
    assert not moved(recorder.models[1], recorder.models[0])
    assert_same_weights(runner.model, expected)


def test_mixed_precision(tmp_path):
    """The term and its gradient are float32's; the network runs in bfloat16."""
    start = resnet('orepa').float()
    wrapper = dict(type='BFloat16OptimWrapper')
    runner, recorder = run(tmp_path / 'on', copy.deepcopy(start), wrapper=wrapper)
    without, _ = run(
        tmp_path / 'off', copy.deepcopy(start), wrapper=wrapper, hook=False
    )
    _, losses = step_by_hand(start)
    (found,) = recorder.losses
    assert found['loss_cls'] == pytest.approx(losses['loss_cls'], rel=0.05)
    assert found['loss_cls'] != losses['loss_cls']
    term = losses['loss_kernel_decay']
    assert found['loss_kernel_decay'] == pytest.approx(term, rel=1e-6)

    squares = sum(c.branches().square().sum() for c in trained_convs(start))
    (0.5 * DECAY * squares).backward()
    others = dict(without.model.named_parameters())
    expected = dict(start.named_parameters())
    for name, value in runner.model.named_parameters():
        assert value.dtype == torch.float32
        gradient = expected[name].grad
        if gradient is not None and gradient.any():
            assert_near(others[name] - value, LR * gradient, 1e-3)
        else:
            assert torch.equal(others[name], value), name


@pytest.mark.parametrize('network', ['orepa', 'dbb'])
def test_data_parallel(tmp_path, monkeypatch, network):
    """Wrapped in MMDistributedDataParallel, here of one process."""
    start = NETWORKS[network]()
    # The runner reads the first, and would set the others for the tests to come.
    for name, value in (('LOCAL_RANK', 0), ('OMP_NUM_THREADS', 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv('MKL_NUM_THREADS', '1')
    store = tmp_path / 'store'
    distributed.init_process_group(
        'gloo', init_method=f'file://{store}', rank=0, world_size=1
    )
    try:
        runner, recorder = run(
            tmp_path,
            copy.deepcopy(start),
            launcher='pytorch',
            cfg=dict(
                model_wrapper_cfg=dict(
                    type='MMDistributedDataParallel',
                    broadcast_buffers=False,
                    device_ids=None,
                )
            ),
        )
        assert type(runner.model).__name__ == 'MMDistributedDataParallel'
        model = runner.model.module
    finally:
        distributed.destroy_process_group()
    expected, losses = step_by_hand(start)
    assert recorder.losses == [pytest.approx(losses, rel=1e-5)]
    assert_same_weights(model, expected)


@pytest.mark.parametrize('network', NETWORKS)
def test_folded_training(tmp_path, network):
    """With the fold out of the graph, the decay reaches the branches as well."""
    start = NETWORKS[network]()
    expected, _ = run(tmp_path / 'online', copy.deepcopy(start), iterations=2)
    folded, _ = run(
        tmp_path / 'folded',
        copy.deepcopy(start),
        iterations=2,
        wrapper=dict(type='FoldedOptimWrapper'),
    )
    assert_same_weights(folded.model, expected.model)


@pytest.mark.parametrize('network', ['orepa', 'orepa_repvgg'])
def test_folds_once(tmp_path, network):
    """In folded training, the term is taken of the kernel that is held."""
    counts = {}
    for hook in (True, False):
        model = NETWORKS[network]()
        convs = [
            m
            for m in model.modules()
            if isinstance(m, ReparamConv2d) and hasattr(m.branches, 'scale')
        ]
        assert len(convs) >= 5
        with counted_folds(convs[0]) as first, counted_folds(convs[-1]) as last:
            run(
                tmp_path / str(hook),
                model,
                hook=hook,
                iterations=2,
                wrapper=dict(type='FoldedOptimWrapper'),
            )
        counts[hook] = len(first), len(last)
    assert counts[True] == counts[False]
    # Once a step: the backward pass needs none of the terms.
    assert counts[True] == (2, 2)


def test_frozen_convs(tmp_path):
    """Frozen stages are not a part of the term, and stay as they are."""
    start = resnet('orepa', frozen_stages=2)
    runner, recorder = run(tmp_path, copy.deepcopy(start))
    backbone = start.backbone
    frozen = trained_convs(backbone.stem) or [backbone.stem]
    frozen += trained_convs(backbone.layer1) + trained_convs(backbone.layer2)
    trained = trained_convs(backbone.layer3) + trained_convs(backbone.layer4)
    assert (len(frozen), len(trained)) == (1 + 4 + 5, 5 + 5)
    squares = sum(c.regularized_kernel().square().sum().item() for c in trained)
    (losses,) = recorder.losses
    assert losses['loss_kernel_decay'] == pytest.approx(0.5 * DECAY * squares, rel=1e-5)
    changed = moved(start, runner.model)
    assert changed and not any('stem' in n or 'layer1' in n for n in changed)


def test_conv_of_which_only_the_norm_is_trained(tmp_path):
    model = resnet('orepa')
    stem = model.backbone.stem
    stem.branches.requires_grad_(False)
    squares = sum(
        conv.regularized_kernel().square().sum().item()
        for conv in trained_convs(model)
        if conv is not stem
    )
    _, recorder = run(tmp_path, model)
    (losses,) = recorder.losses
    assert losses['loss_kernel_decay'] == pytest.approx(0.5 * DECAY * squares, rel=1e-5)


def test_deployed_network(tmp_path):
    """Fine-tuned in its deployed form, a network decays as the plain one it is."""
    start = resnet('orepa', deploy=True).eval()
    squares = sum(conv.weight.square().sum().item() for conv in trained_convs(start))
    _, recorder = run(tmp_path, start)
    (losses,) = recorder.losses
    assert losses['loss_kernel_decay'] == pytest.approx(0.5 * DECAY * squares, rel=1e-5)


@pytest.mark.parametrize('kind', ['no such conv', 'all frozen'])
def test_nothing_to_decay(tmp_path, kind):
    if kind == 'all frozen':
        model = resnet('orepa', frozen_stages=4)
    else:
        model = TinyClassifier()
        model.conv1 = nn.Conv2d(3, 8, 3)
        model.conv2 = nn.Conv2d(8, 8, 1)
    with pytest.raises(ValueError, match='EquivalentKernelDecayHook has no effect'):
        run(tmp_path, model)


class TestForwardHook:
    """How it hangs on the model."""

    def test_removed_after_the_training(self, tmp_path):
        model = resnet('orepa')
        runner, recorder = run(tmp_path, model)
        assert 'loss_kernel_decay' in recorder.losses[0]
        assert not runner.model._forward_hooks
        assert model(*batch(), mode='loss').keys() == {'loss_cls'}

    def test_removed_when_the_training_fails(self, tmp_path):
        """A second training of this model adds the term once."""
        model = resnet('orepa')
        start = copy.deepcopy(model)

        class Failing(Hook):
            def before_train_iter(self, runner, batch_idx, data_batch=None):
                raise KeyboardInterrupt

        runner = make_runner(
            tmp_path / 'failing',
            model,
            custom_hooks=[
                dict(type='EquivalentKernelDecayHook', weight_decay=DECAY),
                Failing(),
            ],
        )
        with pytest.raises(KeyboardInterrupt):
            runner.train()
        _, recorder = run(tmp_path / 'again', model)
        _, losses = step_by_hand(start)
        assert recorder.losses == [pytest.approx(losses, rel=1e-5)]

    def test_twice_in_one_runner(self, tmp_path):
        """As when ``train()`` is called again."""
        model = resnet('orepa')
        runner, recorder = run(tmp_path, model)
        hooks = [h for h in runner.hooks if isinstance(h, EquivalentKernelDecayHook)]
        hooks[0].before_train(runner)
        hooks[0].before_train(runner)
        assert len(model._forward_hooks) == 1
        hooks[0].after_train(runner)
        assert not model._forward_hooks

    def test_other_modes(self, tmp_path):
        """Predictions and plain outputs are left as they are, while it trains."""
        seen = []

        class Probe(Hook):
            def after_train_iter(self, runner, *args, **kwargs):
                model = runner.model.eval()
                images, labels = batch()
                seen.append([model(images, mode=m) for m in ('tensor', 'predict')])
                seen.append(model(images, labels, mode='loss'))

        runner = make_runner(
            tmp_path,
            resnet('orepa'),
            custom_hooks=[dict(type='EquivalentKernelDecayHook'), Probe()],
            train_cfg=dict(by_epoch=False, max_iters=1),
            val_dataloader=None,
            val_cfg=None,
            val_evaluator=None,
        )
        runner.train()
        assert all(isinstance(output, torch.Tensor) for output in seen[0])
        assert seen[1].keys() == {'loss_cls', 'loss_kernel_decay'}

    def test_with_averages_and_copies(self, tmp_path):
        """Hooks copy the model while it trains; checkpoints know nothing of it."""
        model = resnet('orepa')
        start = copy.deepcopy(model)
        runner, recorder = run(
            tmp_path,
            model,
            iterations=2,
            hooks=[dict(type='EMAHook', momentum=0.5, begin_iter=0)],
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False),
            ),
        )
        expected, losses = step_by_hand(start)
        assert recorder.losses[0] == pytest.approx(losses, rel=1e-5)
        saved = torch.load(tmp_path / 'iter_1.pth', weights_only=True)
        assert saved['state_dict'].keys() == model.state_dict().keys()
        # Of the first step, the average is a copy.
        for name, parameter in expected.named_parameters():
            if parameter.any():
                assert_near(saved['state_dict'][name], parameter, 1e-5)
        # Copies made by deepcopy work on their own.
        copied = recorder.models[1]
        assert copied(*batch(), mode='loss')['loss_cls'] > 0


def test_built_by_a_detector_config(tmp_path):
    """Its losses are a dict of lists, and the term is one more entry."""
    losses = dict(loss_cls=[torch.zeros(()), torch.zeros(())])

    @MODELS.register_module(force=True)
    class Lists(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = OREPAResNet(18, base_channels=4)

        def forward(self, inputs, labels=None, mode='tensor'):
            return losses if mode == 'loss' else inputs

    model = MODELS.build(dict(type='Lists'))
    _, recorder = run(tmp_path, model)
    squares = sum(
        conv.regularized_kernel().square().sum().item() for conv in trained_convs(model)
    )
    (found,) = recorder.losses
    assert found['loss'] == pytest.approx(found['loss_kernel_decay'])
    # Measured before the step that shrinks the kernels.
    assert found['loss'] > 0.5 * DECAY * squares
    assert losses.keys() == {'loss_cls'}
