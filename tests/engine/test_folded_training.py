"""Folded training gives what online folding gives, at the plain network's price."""

import copy

import pytest
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from runners import BackboneClassifier
from torch import nn

from mmorepa.layers import OREPAConv2d, ReparamConv2d, backward_to_branches, held

SLIM = dict(type='OREPAResNet', depth=18, base_channels=8)
SGD = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-3)


def build(backbone: dict) -> BackboneClassifier:
    torch.manual_seed(0)
    return BackboneClassifier(backbone).double().train()


def batches(count: int = 4, size: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        dict(
            inputs=torch.rand(size, 3, 64, 64, generator=generator).double(),
            data_samples=torch.randint(10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def wrap(model: nn.Module, kind: str, **options):
    cfg = dict(type=kind, optimizer=dict(SGD), **options)
    if 'constructor' in options:
        cfg.update(type='OptimWrapper', folded='Folded' in kind)
    wrapper = build_optim_wrapper(model, cfg)
    wrapper.initialize_count_status(model, 0, len(batches()))
    return wrapper


def train(model: nn.Module, wrapper) -> list[float]:
    return [model.train_step(data, wrapper)['loss'].item() for data in batches()]


def assert_same_states(one: nn.Module, other: nn.Module, tolerance=1e-10) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(
            states[1][key], value, rtol=tolerance, atol=tolerance, msg=key
        )


CONSTRUCTOR = dict(constructor='OREPAOptimWrapperConstructor')
BACKBONES = dict(
    resnet=SLIM,
    frozen=dict(SLIM, frozen_stages=1),
    checkpointed=dict(SLIM, with_cp=True, norm_cfg=dict(type='GN', num_groups=2)),
    ablated=dict(
        SLIM,
        depth=50,
        block_cfg=dict(branches=['origin', 'pointwise_kxk', 'pointwise_pointwise']),
    ),
    grouped=dict(SLIM, depth=50, groups=4),
    deep_linear=dict(SLIM, block='deep_linear'),
    repvgg=dict(type='OREPARepVGG', arch='A0', base_channels=8),
    dbb=dict(SLIM, block='dbb'),
)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        *((name, {}) for name in BACKBONES),
        *((name, CONSTRUCTOR) for name in BACKBONES),
        ('resnet', dict(CONSTRUCTOR, channels_last=True)),
        ('resnet', dict(clip_grad=dict(max_norm=0.5))),
        ('resnet', dict(accumulative_counts=2)),
        ('dbb', dict(accumulative_counts=2)),
    ],
    ids=str,
)
def test_equals_online_folding(name, options):
    online = build(BACKBONES[name])
    folded = copy.deepcopy(online)
    start = copy.deepcopy(online)

    expected = train(online, wrap(online, 'OptimWrapper', **options))
    found = train(folded, wrap(folded, 'FoldedOptimWrapper', **options))

    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert_same_states(online, folded, 1e-8)
    moved = [
        not torch.equal(a, b) for a, b in zip(start.parameters(), folded.parameters())
    ]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        (None, 'FoldedOptimWrapper'),
        ('OptimWrapper', 'FoldedOptimWrapper'),
        (OptimWrapper, 'FoldedOptimWrapper'),
        ('BFloat16OptimWrapper', 'FoldedBFloat16OptimWrapper'),
        ('FoldedOptimWrapper', 'FoldedOptimWrapper'),
    ],
)
def test_is_the_default_of_the_constructor(kind, expected):
    def of(backbone, **options):
        cfg = dict(
            optimizer=dict(SGD),
            constructor='OREPAOptimWrapperConstructor',
            **(dict(type=kind) if kind else {}),
            **options,
        )
        before = copy.deepcopy(cfg)
        wrapper = build_optim_wrapper(build(backbone), cfg)
        assert cfg == before
        return type(wrapper).__name__

    assert of(SLIM) == expected
    if kind != 'FoldedOptimWrapper':
        unfolded = expected.removeprefix('Folded')
        assert of(SLIM, folded=False) == unfolded
        assert of(dict(SLIM, block='plain')) == unfolded
        assert of(dict(SLIM, deploy=True)) == unfolded


def test_resumes_from_the_other_mode():
    online = build(SLIM)
    mixed = copy.deepcopy(online)
    first = wrap(online, 'OptimWrapper')
    train(online, first)
    train(online, first)

    wrapper = wrap(mixed, 'FoldedOptimWrapper')
    train(mixed, wrapper)
    resumed = build(SLIM)
    resumed.load_state_dict(mixed.state_dict())
    second = wrap(resumed, 'OptimWrapper')
    second.load_state_dict(wrapper.state_dict())
    train(resumed, second)
    assert_same_states(online, resumed, 1e-8)


def test_activations_saved_are_those_of_the_plain_network():
    def saved_bytes(model: nn.Module, wrapper) -> int:
        stored = {}

        def pack(tensor):
            stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            wrapper.optim_context(model),
        ):
            loss = model(**batches(1)[0], mode='loss')['loss']
            held = {
                module.kernel().untyped_storage().data_ptr()
                for module in model.modules()
                if isinstance(module, ReparamConv2d) and module.is_held_in_training
            }
        kept = {k: s.nbytes() for k, s in stored.items() if k not in own | held}
        loss.backward()
        return sum(kept.values())

    plain = build(dict(SLIM, block='plain'))
    plain_bytes = saved_bytes(plain, wrap(plain, 'OptimWrapper'))
    orepa = build(dict(SLIM, stem_block='plain'))
    assert saved_bytes(orepa, wrap(orepa, 'FoldedOptimWrapper')) == plain_bytes
    # The factors of the stem are multiplied, and so are in its graph.
    orepa = build(SLIM)
    stem = sum(p.nbytes for p in orepa.backbone.stem.branches.parameters())
    added = saved_bytes(orepa, wrap(orepa, 'FoldedOptimWrapper')) - plain_bytes
    assert 0 < added < stem


def test_conv_that_is_compiled():
    conv = OREPAConv2d(4, 4, 3, padding=1)
    image = torch.rand(1, 4, 8, 8)
    compiled = torch.compile(conv, backend='eager', fullgraph=True)
    with held(conv) as (kernel,):
        torch.testing.assert_close(compiled(image), conv(image))
        kernel.graph.is_deferred = True
        compiled(image).sum().backward()
    assert kernel.parameter.grad is not None
    backward_to_branches([kernel])
    assert conv.branches.weight_origin.grad is not None
    assert kernel.parameter.grad is None
