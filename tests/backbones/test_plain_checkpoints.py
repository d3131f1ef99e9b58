"""Networks that start from the checkpoints of plain ones."""

import pytest
import torch
import torchvision
from helpers import assert_near, import_models, trained_like
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmorepa import switch_to_deploy
from mmorepa.backbones import OREPARepVGG, OREPAResNet

BLOCKS = ['none', 'deep_linear', 'dbb', 'orepa', 'repvgg', 'orepa_repvgg']
RESNETS = {
    'resnet18': dict(depth=18),
    'resnet50': dict(depth=50),
    'resnext50_32x4d': dict(depth=50, groups=32, width_per_group=4),
    'wide_resnet50_2': dict(depth=50, width_per_group=128),
}


def torchvision_net(name):
    return trained_like(getattr(torchvision.models, name)()).eval()


def features(net, x):
    """The last map of a ResNet of torchvision."""
    found = []
    handle = net.layer4.register_forward_hook(lambda *args: found.append(args[2]))
    net(x)
    handle.remove()
    return found[0]


def mm_net(kind, **options):
    import_models('mmpretrain')
    init_default_scope('mmpretrain')
    net = trained_like(MODELS.build(dict(type=f'mmpretrain.{kind}', **options)))
    net.eval()  # Returns None in some of them.
    return net


def image(dtype=torch.float32):
    return torch.randn(2, 3, 48, 48, dtype=dtype)


def train(net, x, steps=3):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for _ in range(steps):
        loss = net(x)[-1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('name', RESNETS)
def test_torchvision(name, block, tmp_path):
    plain, x = torchvision_net(name), image()
    path = str(tmp_path / 'plain.pth')
    torch.save(plain.state_dict(), path)
    with torch.no_grad():
        expected = features(plain, x)
    for deploy in (False, True):
        net = OREPAResNet(
            block=block,
            deploy=deploy,
            init_cfg=dict(type='Pretrained', checkpoint=path),
            **RESNETS[name],
        )
        net.init_weights()
        with torch.no_grad():
            assert_near(net.eval()(x)[-1], expected, 1e-4)
        if not deploy and name == 'resnet18':
            train(net, x)
            with torch.no_grad():
                trained = net(x)[-1]
                assert (trained - expected).abs().max() > 1e-3
                assert_near(switch_to_deploy(net)(x)[-1], trained, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('depth', [34, 101, 152])
def test_torchvision_of_other_depths(depth):
    plain, x = torchvision_net(f'resnet{depth}'), image()
    net = OREPAResNet(depth).eval()
    assert not net.load_state_dict(plain.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        assert_near(net(x)[-1], features(plain, x), 1e-4)


@pytest.mark.parametrize('start', ['quiet', 'balanced'])
def test_in_float64(start):
    plain, x = torchvision_net('resnet18').double(), image(torch.float64)
    net = OREPAResNet(18, block_cfg=dict(start=start)).double().eval()
    net.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert_near(net(x)[-1], features(plain, x), 1e-10)


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
    net.load_state_dict(state, strict=False)
    assert log == [
        'OREPAResNet: 53 re-parameterised convs start from the plain kernels of the '
        'checkpoint (quiet start)'
    ]
    x = image()
    net = net['backbone'] if is_whole else net
    with torch.no_grad():
        assert_near(net(x)[-1], plain(x)[-1], 1e-4)


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('block', ['repvgg', 'orepa'])
@pytest.mark.parametrize('arch', ['A0', 'D2se'])
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


def test_fewer_stages():
    plain, x = torchvision_net('resnet18'), image()
    net = OREPAResNet(18, num_stages=2, out_indices=(1,)).eval()
    net.load_state_dict(plain.state_dict(), strict=False)
    plain.layer4, plain.layer3 = plain.layer2, nn.Identity()
    plain.avgpool, plain.fc = nn.AdaptiveAvgPool2d(1), nn.Identity()
    plain.layer4, plain.layer2 = plain.layer2, nn.Identity()
    with torch.no_grad():
        assert_near(net(x)[-1], features(plain, x), 1e-4)


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize(
    ('net', 'plain', 'message'),
    [
        (
            dict(depth=34),
            'resnet18',
            'plain network, and another one than this OREPAResNet. Convs 16 keys '
            r'missing: layer1.2.conv1, layer1.2.conv2, layer2.2.conv1 and 13 more',
        ),
        (dict(depth=18), 'resnet34', '16 keys left over: layer1.2.conv1'),
        (dict(depth=50), 'resnet18', r'conv1 \(64, 64, 3, 3\), not \(64, 64, 1, 1\)'),
        (dict(depth=50), 'resnext50_32x4d', r'\(128, 4, 3, 3\), not \(64, 64, 3, 3\)'),
        (dict(depth=18, in_channels=1), 'resnet18', r'stem \(64, 3, 7, 7\), not'),
        (dict(depth=18), 'vgg11', 'nothing in the checkpoint belongs to .* features.0'),
        (dict(depth=18), 'densenet121', 'nothing in the checkpoint belongs to'),
    ],
)
def test_another_network(net, plain, message, deploy):
    """Never half of it."""
    state = getattr(torchvision.models, plain)().state_dict()
    net = OREPAResNet(**net, deploy=deploy)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=message) as error:
        net.load_state_dict(state, strict=False)
    assert '\n' not in str(error.value)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_missing_entries():
    state = torchvision_net('resnet18').state_dict()
    del state['layer2.0.bn1.running_mean']
    message = "'layer2.0.conv1.weight': its norm has weight, bias, running_var"
    with pytest.raises(RuntimeError, match=message):
        OREPAResNet(18).load_state_dict(state, strict=False)
    del state['layer1.1.conv1.weight']
    with pytest.raises(RuntimeError, match='1 key missing: layer1.1.conv1'):
        OREPAResNet(18).load_state_dict(state, strict=False)


@pytest.mark.parametrize('block', ['none', 'dbb'])
def test_repvgg_into_other_blocks(block):
    plain = mm_net('RepVGG', arch='A0')
    message = "branches are those of block='repvgg' and 'orepa', found"
    with pytest.raises(RuntimeError, match=message):
        OREPARepVGG('A0', block).load_state_dict(plain.state_dict(), strict=False)


def test_resnet_into_repvgg():
    state = torchvision_net('resnet18').state_dict()
    with pytest.raises(RuntimeError, match='nothing in the checkpoint belongs to'):
        OREPARepVGG('A0').load_state_dict(state, strict=False)
