import pytest
import torch
from helpers import assert_near, classifier_cfg, import_models, trained_like
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tool_runs import build_model, run_here

TOOL = 'model_converters/plain_to_mmorepa.py'
SHAPE = ('--shape', 64, 48)
CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict({backbone}, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=7, in_channels={features}),
)
"""
# Narrow, with channels enough for a stem of factors that starts from any kernel.
RESNET18 = "type='OREPAResNet', depth=18, base_channels=24"


@pytest.fixture(autouse=True)
def mmpretrain():
    import_models('mmpretrain')
    init_default_scope('mmpretrain')


@pytest.fixture
def files(tmp_path):
    """Writes a source and a config; the paths of SOURCE, CONFIG and OUT."""

    def write(content, backbone=RESNET18, features=192, name='in.pth'):
        source, config = tmp_path / name, tmp_path / 'config.py'
        torch.save(content, source)
        config.write_text(CONFIG.format(backbone=backbone, features=features))
        return source, config, tmp_path / 'out' / 'out.pth'

    return write


def torchvision_names(plain):
    return {
        name.removeprefix('backbone.').removeprefix('head.'): value
        for name, value in plain.state_dict().items()
    }


def classifier(backbone, features, classes=7):
    """One of mmpretrain alone."""
    cfg = classifier_cfg(backbone, features, classes)
    return trained_like(MODELS.build(cfg)).eval()


def resnet18(classes=7, **options):
    return classifier(
        dict(type='ResNet', depth=18, stem_channels=24, base_channels=24, **options),
        192,
        classes,
    )


def started(config, out, **backbone):
    """The model of the config with the checkpoint in it, every key."""
    cfg = Config.fromfile(config)
    cfg.model.backbone.update(backbone)
    model = build_model(cfg)
    model.load_state_dict(torch.load(out, weights_only=True)['state_dict'])
    return model


def fails(*args):
    with pytest.raises(SystemExit) as caught:
        run_here(TOOL, *args, *SHAPE)
    message = caught.value.code
    assert isinstance(message, str) and message.startswith('error: ')
    assert '\n' not in message
    return message


@torch.no_grad()
def check(plain, config, out):
    x = torch.randn(2, 3, 64, 48)
    model = started(config, out)
    assert_near(model(x), plain(x), 1e-4)
    assert_near(started(config, out, deploy=True)(x), plain(x), 1e-4)


def test_other_names_of_the_same_network(files):
    """timm numbers the convs of stem and shortcuts otherwise than mmpretrain."""
    timm = pytest.importorskip('timm')
    plain = trained_like(timm.create_model('resnet18d', num_classes=7)).eval()
    backbone = "type='OREPAResNet', depth=18, deep_stem=True, avg_down=True"
    paths = files(plain.state_dict(), backbone, 512)
    run_here(TOOL, *paths, *SHAPE)
    check(plain, *paths[1:])


# More, of backbones alone, are in tests/backbones/test_plain_checkpoints.py.
NETWORKS = {
    'eps': (
        dict(type='ResNet', depth=18, norm_cfg=dict(type='BN', eps=0.5))
        | dict(stem_channels=24, base_channels=24),
        f"{RESNET18}, norm_cfg=dict(type='BN', eps=.5)",
        192,
    ),
    'RepVGG with groups and attention': (
        dict(
            type='RepVGG',
            arch=dict(
                num_blocks=(1, 2, 2, 1),
                width_factor=(1, 1, 1, 2),
                group_layer_map={2: 2, 4: 2, 6: 2},
                se_cfg=dict(ratio=16, divisor=1),
            ),
            base_channels=16,
        ),
        "type='OREPARepVGG', base_channels=16, block='repvgg', arch=dict("
        'num_blocks=(1, 2, 2, 1), widths=(1, 1, 1, 2), groups=2, use_se=True)',
        256,
    ),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_of_mmpretrain(files, name):
    theirs, ours, features = NETWORKS[name]
    plain = classifier(theirs, features)
    paths = files(dict(state_dict=plain.state_dict()), ours, features)
    run_here(TOOL, *paths, *SHAPE)
    check(plain, *paths[1:])


@pytest.mark.parametrize('layout', ['torchvision', 'module', 'mmpretrain'])
def test_layouts(files, layout):
    plain = resnet18()
    state = torchvision_names(plain)
    if layout == 'module':
        state = {f'module.backbone.{name}': value for name, value in state.items()}
    elif layout == 'mmpretrain':
        state = {
            f'head.{name}' if name.startswith('fc.') else f'backbone.{name}': value
            for name, value in state.items()
        }
    meta = dict(epoch=3, cfg='...', dataset_meta=dict(classes=list('abcdefg')))
    if layout != 'torchvision':
        state = dict(state_dict=state, meta=meta, optimizer={})
    paths = files(state)
    before = paths[0].read_bytes()
    run_here(TOOL, *paths, *SHAPE)
    check(plain, *paths[1:])
    assert paths[0].read_bytes() == before
    written = torch.load(paths[2], weights_only=True)
    assert written.keys() == {'meta', 'state_dict'}
    expected = None if layout == 'torchvision' else meta['dataset_meta']
    assert written['meta'].get('dataset_meta') == expected
    assert written['meta'].keys().isdisjoint({'epoch', 'cfg'})


def test_deployed(files, capsys):
    plain = resnet18()
    paths = files(torchvision_names(plain), f'{RESNET18}, deploy=True')
    run_here(TOOL, *paths, *SHAPE)
    check(plain, *paths[1:])
    written = torch.load(paths[2], weights_only=True)
    assert written['meta']['deployed'] is True
    assert not [name for name in written['state_dict'] if 'branches' in name]
    assert 'BatchNorm folded in' in capsys.readouterr().out


def without(*names, **more):
    state = torchvision_names(resnet18())
    return {**{key: v for key, v in state.items() if key not in names}, **more}


def deployed():
    state = {'stem.weight': torch.zeros(24, 3, 7, 7), 'stem.bias': torch.zeros(24)}
    return {**state, 'fc.weight': torch.zeros(7, 192), 'fc.bias': torch.zeros(7)}


# A source, a backbone, and what is said.
BAD = {
    'conv': (lambda: without('layer3.1.conv2.weight'), RESNET18, 'layer3.1.conv2'),
    'head': (lambda: without('fc.bias'), RESNET18, 'missing: head.fc.bias'),
    'classes': (
        lambda: torchvision_names(resnet18(classes=9)),
        RESNET18,
        'size mismatch for head.fc',
    ),
    'deployed': (deployed, RESNET18, 'deployed already'),
    'training form': (
        lambda: without(**{'stem.branches.weight': torch.zeros(24, 3, 7, 7)}),
        RESNET18,
        'training form already',
    ),
    'stock': (without, "type='ResNet', depth=18", 'OREPAResNet'),
}


def test_caffe_by_name(files):
    paths = files(torchvision_names(resnet18()), name='resnet18_Caffe-788b.pth')
    assert 'caffe-style' in fails(*paths)
    assert not paths[2].parent.exists()


@pytest.mark.parametrize('name', BAD)
def test_bad_input(files, name):
    make, backbone, words = BAD[name]
    source, config, out = files(make(), backbone)
    assert words in fails(source, config, out)
    assert not out.parent.exists()


def test_outputs_that_differ(files):
    paths = files(torchvision_names(resnet18()))
    message = fails(*paths, '--tolerance', '1e-12')
    assert 'the outputs differ by ' in message and 'nothing was written' in message
    assert not paths[2].parent.exists()
