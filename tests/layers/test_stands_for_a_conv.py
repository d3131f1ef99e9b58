"""What other people's code does to a plain conv, done to a training form."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, import_models, trained_like
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmengine.model import MMFullyShardedDataParallel, normal_init
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmorepa import switch_to_deploy
from mmorepa.layers import DBBConv2d, OREPAConv2d

OREPA = dict(type='OREPAConv2d')
DEPLOYED = dict(type='OREPAConv2d', deploy=True)


def training_form(kind=OREPAConv2d, **kwargs):
    return trained_like(kind(4, 6, 3, padding=1, **kwargs))


def test_readers_get_the_fold_with_its_gradient():
    conv = training_form()
    assert_near(conv.weight.detach(), conv.kernel().detach())
    direction = torch.randn(6, 4, 3, 3)
    found = []
    for kernel in (conv.weight, conv.kernel()):
        loss = F.conv2d(torch.ones(1, 4, 3, 3), kernel * direction).sum()
        found.append(torch.autograd.grad(loss, list(conv.branches.parameters())))
    assert_near(*found)
    # Parts, copies and results are tensors like any other.
    assert type(conv.weight.clone()) is type(conv.weight.detach()) is torch.Tensor
    plain = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    with torch.no_grad():
        plain.weight.copy_(conv.weight)
    assert_near(plain.weight, conv.kernel())
    nn.Parameter(conv.weight.detach()).data.zero_()


@pytest.mark.parametrize(
    'write',
    [
        lambda conv: setattr(conv, 'weight', nn.Parameter(torch.ones(6, 4, 3, 3))),
        lambda conv: setattr(conv.weight, 'data', torch.ones(6, 4, 3, 3)),
        lambda conv: prune.l1_unstructured(conv, 'weight', 0.5),
        lambda conv: prune.random_structured(conv, 'weight', 0.5, dim=0),
        lambda conv: fuse_conv_bn(nn.Sequential(conv, nn.BatchNorm2d(6)).eval()),
        lambda conv: fuse_conv_bn_eval(conv.eval(), nn.BatchNorm2d(6).eval()),
    ],
)
def test_writers_are_told_what_to_do(write):
    conv = training_form(bias=False)
    expected = copy.deepcopy(conv.state_dict())
    # PyTorch's own words where a parameter is registered.
    words = r'call conv\.start_from|cannot assign .* object to parameter'
    with torch.no_grad(), pytest.raises(TypeError, match=words):
        write(conv)
    assert conv.state_dict().keys() == expected.keys()
    for name, value in conv.state_dict().items():
        assert torch.equal(value, expected[name])
    with torch.no_grad():
        write(switch_to_deploy(conv))


def pruned(branches):
    prune.ln_structured(branches, 'weight_origin', 0.5, n=2, dim=0)


@pytest.mark.parametrize(
    'wrap',
    [
        pruned,
        lambda branches: spectral_norm(branches, 'weight_origin'),
        lambda branches: parametrizations.weight_norm(branches, 'weight_origin'),
    ],
)
def test_wrapped_weights_of_branches(wrap):
    """They train alike folded and online, and are part of the fold."""
    found = []
    for kind in ('OptimWrapper', 'FoldedOptimWrapper'):
        model = nn.Sequential(OREPAConv2d(4, 4, 3), OREPAConv2d(4, 4, 3))
        trained_like(model)
        torch.manual_seed(0)
        for conv in model:
            wrap(conv.branches)
        cfg = dict(type=kind, optimizer=dict(type='SGD', lr=0.1))
        wrapper = build_optim_wrapper(model, cfg)
        x = torch.randn(2, 4, 7, 7)
        for _ in range(3):
            with wrapper.optim_context(model):
                loss = model(x).square().mean()
            wrapper.update_params(loss)
        model.eval()
        found.append(model(x).detach())
        assert_near(switch_to_deploy(model)(x), found[-1])
    assert_near(*found)


@pytest.mark.parametrize('fuse', [fuse_conv_bn, lambda m: fuse_conv_bn_eval(*m)])
def test_fused_after_deployment(fuse):
    model = trained_like(nn.Sequential(training_form(), nn.BatchNorm2d(6))).eval()
    x = torch.randn(2, 4, 7, 7)
    expected = model(x)
    assert_near(fuse(switch_to_deploy(model))(x), expected)


def test_multi_branch_convs_have_no_weight():
    conv = training_form(DBBConv2d)
    assert not hasattr(conv, 'weight')
    normal_init(conv)
    with pytest.raises(AttributeError, match='has no weight while it trains; call'):
        prune.l1_unstructured(conv, 'weight', 0.5)


def test_efficient_conv_bn_eval():
    norm = dict(type='BN')
    module = ConvModule(4, 6, 3, padding=1, conv_cfg=OREPA, norm_cfg=norm)
    trained_like(module).eval()
    x, found = torch.randn(2, 4, 7, 7), []
    for is_efficient in (False, True):
        module.turn_on_efficient_conv_bn_eval(is_efficient)
        out = module(x)
        grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        found.append([out, *grads])
    assert_near(*found, 1e-4)


@pytest.mark.parametrize(
    'cfg', [dict(type='RepVGG', arch='A0'), dict(type='MobileOne', arch='s0')]
)
def test_networks_that_deploy_on_their_own(cfg):
    """Their own switch builds convs of conv_cfg and sets the weights of these."""
    import_models('mmpretrain')
    init_default_scope('mmpretrain')
    model = MODELS.build(dict(cfg, conv_cfg=OREPA))
    trained_like(model).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    deployed = MODELS.build(dict(cfg, conv_cfg=DEPLOYED))
    deployed.eval()
    deployed.load_state_dict(model.state_dict())
    with pytest.raises(TypeError, match='deploy=True in conv_cfg'):
        model.switch_to_deploy()
    deployed.switch_to_deploy()
    with torch.no_grad():
        assert_near(deployed(x), expected, 1e-4)


def sharded_by_module(model):
    for conv in model:
        fully_shard(conv, mesh=init_device_mesh('cpu', (2,)))
    return fully_shard(model, mesh=init_device_mesh('cpu', (2,)))


def sharded_at_once(model):
    return fully_shard(model, mesh=init_device_mesh('cpu', (2,)))


def flattened(model):
    return FullyShardedDataParallel(model, device_id=torch.device('cpu'))


def flattened_originals(model):
    device = torch.device('cpu')
    return FullyShardedDataParallel(model, device_id=device, use_orig_params=True)


def flattened_by_mmengine(model):
    return MMFullyShardedDataParallel(model, device_id=torch.device('cpu'))


SHARDINGS = [
    sharded_by_module,
    sharded_at_once,
    flattened,
    flattened_originals,
    flattened_by_mmengine,
]


def network():
    norm = dict(type='BN')
    return trained_like(
        nn.Sequential(
            OREPAConv2d(3, 4, 3, norm_cfg=norm, act_cfg=dict(type='ReLU')),
            OREPAConv2d(4, 4, 3, groups=2, norm_cfg=norm),
            DBBConv2d(4, 4, 3, padding=1),
            OREPAConv2d(4, 3, 1),
        )
    )


def trained(model, kind):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)  # The same for each process: averages change nothing.
    cfg = dict(type=kind, optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
    wrapper = build_optim_wrapper(model, cfg)
    for _ in range(3):
        with wrapper.optim_context(model):
            loss = model(x).square().mean()
        wrapper.update_params(loss)
    model.eval()
    with torch.no_grad():
        return model(x)


def sharding_worker(rank, meeting):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{meeting}', rank=rank, world_size=2)
    expected = trained(network(), 'OptimWrapper')
    full = StateDictOptions(full_state_dict=True)
    for shard in SHARDINGS:
        model = shard(network())
        assert_near(trained(model, 'FoldedOptimWrapper'), expected)
        if not isinstance(model, FullyShardedDataParallel):
            model.reshard()  # The root stays whole after a forward pass.
            with pytest.raises(RuntimeError, match='gather them by'):
                _ = model[0].weight
            with pytest.raises(RuntimeError, match='gather them by'):
                model[0].start_from(torch.ones(4, 3, 3, 3))
        with pytest.raises(RuntimeError, match='gather them by'):
            switch_to_deploy(model)
        state = get_model_state_dict(model, options=full)
        whole = network().eval()
        whole.load_state_dict(state)
        torch.manual_seed(0)
        assert_near(switch_to_deploy(whole)(torch.randn(2, 3, 9, 9)), expected)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_trains_and_deploys_when_gathered(tmp_path):
    multiprocessing.spawn(sharding_worker, args=(f'{tmp_path}/meeting',), nprocs=2)
