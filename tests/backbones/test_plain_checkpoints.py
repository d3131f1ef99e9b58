"""Networks that start from the checkpoints of plain ones."""

from functools import lru_cache

import pytest
import torch
import torchvision
from helpers import assert_near, import_models, last_map, trained_like
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn

from mmorepa import switch_to_deploy
from mmorepa.backbones import OREPARepVGG, OREPAResNet
from mmorepa.utils.errors import CheckpointError

BLOCKS = ['plain', 'deep_linear', 'dbb', 'orepa', 'repvgg', 'orepa_repvgg']
RESNETS = {
    'resnet18': dict(depth=18),
    'resnet50': dict(depth=50),
    'resnext50_32x4d': dict(depth=50, groups=32, width_per_group=4),
    'wide_resnet50_2': dict(depth=50, width_per_group=128),
}


def torchvision_net(name):
    return trained_like(getattr(torchvision.models, name)()).eval()


def mm_net(kind, **options):
    import_models('mmpretrain')
    init_default_scope('mmpretrain')
    net = trained_like(MODELS.build(dict(type=f'mmpretrain.{kind}', **options)))
    net.eval()  # Returns None in some of them.
    return net


def image(dtype=torch.float32):
    return torch.randn(2, 3, 48, 48, dtype=dtype)


def check_training(net, x, expected):
    """Two steps lead elsewhere, and the deployed form follows.

    The second moves the weights that have no gradient before the first.
    """
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for _ in range(2):
        loss = net(x)[-1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        trained = net.eval()(x)[-1]
        assert (trained - expected).abs().max() > 1e-3 * expected.abs().max()
        assert_near(switch_to_deploy(net)(x)[-1], trained, 1e-4)


def check_start(net, state, x, expected):
    """In float64, rounded to float32, and after training.

    Args:
        net (nn.Module): Of float32.
        state (dict): Of the plain network, in float64.
        x (Tensor): In float64.
        expected (Tensor): What the plain network makes of it.
    """
    net.eval().double().load_state_dict(state, strict=False)
    with torch.no_grad():
        assert_near(net(x)[-1], expected, 1e-10)
        net.float()
        x, expected = x.float(), expected.float()
        assert_near(net(x)[-1], expected, 1e-4)
    return x, expected


@lru_cache(maxsize=1)
def torchvision_source(name):
    plain, x = torchvision_net(name).double(), image(torch.float64)
    with torch.no_grad():
        return plain.state_dict(), x, last_map(plain, x)


def slow_if(condition, *values):
    return pytest.param(*values, marks=[pytest.mark.slow] if condition else [])


@pytest.mark.parametrize(
    ('name', 'block'),
    [
        *(('resnet18', block) for block in BLOCKS),
        ('resnet50', 'orepa'),
        *(slow_if(True, name, 'orepa') for name in list(RESNETS)[2:]),
    ],
)
def test_torchvision(name, block):
    net = OREPAResNet(block=block, **RESNETS[name])
    start = check_start(net, *torchvision_source(name))
    if name == 'resnet18':  # The steps of larger ones take long, and show the same.
        check_training(net, *start)


@pytest.mark.parametrize('block', BLOCKS)
def test_into_a_deployed_form(block):
    """A conv of each kind folds the norm that it would have had."""
    state, x, expected = torchvision_source('resnet18')
    net = OREPAResNet(18, block, deploy=True).eval().double()
    net.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert_near(net(x)[-1], expected, 1e-10)


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('is_whole', [False, True])
def test_openmmlab(prefix, is_whole, log):
    """mmpretrain's, mmdet's and mmseg's ResNets have the same keys."""
    plain = mm_net('ResNet', depth=50, base_channels=16, stem_channels=16)
    state = {prefix + name: value for name, value in plain.state_dict().items()}
    state['head.fc.weight'] = torch.zeros(2, 4)
    net = OREPAResNet(50, 'dbb', base_channels=16).eval()
    if is_whole:
        if not prefix:
            return
        net = nn.ModuleDict(dict(backbone=net))
    log.clear()  # Of the scope that an earlier test left.
    net.load_state_dict(state, strict=False)
    assert log == [
        'OREPAResNet: 16 re-parameterised convs start from the plain kernels of the '
        'checkpoint (quiet start)'
    ]
    x = image()
    net = net['backbone'] if is_whole else net
    with torch.no_grad():
        assert_near(net(x)[-1], plain(x)[-1], 1e-4)


@pytest.mark.parametrize(
    ('arch', 'block', 'deploy'),
    [('A0', 'repvgg', False), ('A0', 'orepa', True), ('D2se', 'orepa', False)],
)
def test_repvgg(arch, block, deploy):
    cfg = dict(OREPARepVGG.ARCHITECTURES[arch], widths=[0.25, 0.25, 0.25, 0.125])
    theirs = dict(cfg, width_factor=cfg['widths'])
    del theirs['widths']
    use_se = theirs.pop('use_se', False)
    theirs['se_cfg'] = dict(ratio=16, divisor=1) if use_se else None
    groups = theirs.pop('groups', 1)
    plain = mm_net(
        'RepVGG',
        arch=dict(theirs, group_layer_map={2: groups} if groups > 1 else None),
        out_indices=(3,),
    )
    net = OREPARepVGG(cfg, block, deploy=deploy).eval()
    assert not net.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x = image()
    with torch.no_grad():
        assert_near(net(x)[-1], plain(x)[-1], 1e-4)


def test_repvgg_that_is_deployed():
    plain = mm_net('RepVGG', arch='A0', out_indices=(3,))
    x = image()
    with torch.no_grad():
        expected = plain(x)[-1]
    plain.switch_to_deploy()
    net = OREPARepVGG('A0', deploy=True).eval()
    net.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert_near(net(x)[-1], expected, 1e-4)
    with pytest.raises(RuntimeError, match='a deployed checkpoint'):
        OREPARepVGG('A0').load_state_dict(plain.state_dict())


def by_state_dict(net, state, tmp_path):
    net.load_state_dict(state, strict=False)


def by_init_cfg(net, state, tmp_path):
    path = str(tmp_path / 'plain.pth')
    torch.save(state, path)
    net.init_cfg = dict(type='Pretrained', checkpoint=path)
    net.init_weights()


def whole_file(state, tmp_path):
    path = str(tmp_path / 'whole.pth')
    state = {f'backbone.{name}': value for name, value in state.items()}
    torch.save(dict(state_dict=dict(state, **{'head.fc.bias': torch.zeros(2)})), path)
    return path


def by_prefix(net, state, tmp_path):
    path = whole_file(state, tmp_path)
    net.init_cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
    net.init_weights()


def by_load_from(net, state, tmp_path):
    """As MMEngine's runner does it."""
    load_checkpoint(nn.ModuleDict(dict(backbone=net)), whole_file(state, tmp_path))


def without(*names, **options):
    state = mm_net(**options).state_dict()
    for name in [key for key in state if key.startswith(names)]:
        del state[name]
    return state


SLIM = dict(base_channels=8, stem_channels=8)
REPVGG = dict(num_blocks=(1, 2, 1, 1), width_factor=(0.25,) * 4, group_layer_map=None)
REPVGG['se_cfg'] = dict(ratio=16, divisor=1)
# A network, what its checkpoint lacks, and what is named.
BAD = [
    ('ResNetV1c', '-', 'stem'),
    ('ResNet', 'layer1.1.conv1', 'missing: layer1.1.conv1.branches'),
    ('ResNet', 'layer1.1.bn1.', 'missing: layer1.1.conv1.norm.bias'),
    ('ResNet', 'bn1.running_mean', "'(backbone.)?stem.weight': its norm has weight, "),
    ('RepVGG', 'stage_1.0.branch_3x3', 'missing: layer1.0.conv.branches.origin'),
    ('RepVGG', 'stage_2.1.branch_norm', 'layer2.1.conv.branches.identity'),
]


@pytest.mark.parametrize(
    ('kind', 'lacking', 'words', 'load', 'deploy'),
    [
        *((*bad, by_state_dict, False) for bad in BAD),
        *((*BAD[3], load, True) for load in (by_init_cfg, by_prefix, by_load_from)),
    ],
)
def test_bad_input(kind, lacking, words, load, deploy, tmp_path):
    """One clear line."""
    if kind == 'RepVGG':
        arch = dict(num_blocks=(1, 2, 1, 1), widths=(0.25,) * 4, use_se=True)
        net, options = OREPARepVGG(arch, deploy=deploy), dict(arch=REPVGG)
    else:
        net = OREPAResNet(50, 'dbb', base_channels=8, deploy=deploy)
        options = dict(depth=50, **SLIM)
    with pytest.raises(CheckpointError, match=words) as error:
        load(net, without(lacking, kind=kind, **options), tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('block', ['plain', 'dbb'])
def test_repvgg_into_other_blocks(block):
    plain = mm_net('RepVGG', arch='A0')
    with pytest.raises(CheckpointError, match='does not fit this OREPARepVGG'):
        OREPARepVGG('A0', block).load_state_dict(plain.state_dict(), strict=False)


@pytest.mark.parametrize('load', [by_state_dict, by_load_from])
def test_resnet_into_repvgg(load, tmp_path):
    state = without(kind='ResNet', depth=18, **SLIM)
    with pytest.raises(CheckpointError, match='nothing in the checkpoint belongs to'):
        load(OREPARepVGG('A0'), state, tmp_path)


def test_a_backbone_alone_as_the_start_of_a_model(tmp_path):
    """Its names lack the prefix, so that MMEngine would leave all weights at random."""
    path = str(tmp_path / 'backbone.pth')
    torch.save(without(kind='ResNet', depth=18, **SLIM), path)
    net = OREPAResNet(18, base_channels=8)
    model = nn.ModuleDict(dict(backbone=net))
    load_checkpoint(model, path)  # As in a model that holds another network, too.
    net.refuse_misfits()
    with pytest.raises(CheckpointError, match="nothing under 'backbone.*init_cfg"):
        load_checkpoint(model, path)
