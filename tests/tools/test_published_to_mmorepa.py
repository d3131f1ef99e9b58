import pytest
import torch
from helpers import assert_near
from published_layout import assert_same_bits, resnet, trained_state
from tool_runs import run_here

from mmorepa.backbones import OREPAResNet
from mmorepa.converters import from_published, read_checkpoint
from mmorepa.utils.errors import CheckpointError

TOOL = 'model_converters/published_to_mmorepa.py'
BASIC = ((2, 2, 2, 2), False, 4, 1, 64)


def small(prefix='module.', deployed=False):
    shapes = resnet(*BASIC, 'orepa', deployed=deployed, classes=7)
    return trained_state(shapes, prefix)


@pytest.mark.parametrize('end', ['pth', 'safetensors'])
def test_file_of_the_training_code(tmp_path, end):
    """As that saves it at the end of an epoch."""
    if end == 'safetensors':
        pytest.importorskip('safetensors')
    state = small()
    source, out = tmp_path / 'last.pth.tar', tmp_path / f'ours.{end}'
    momenta = {i: dict(momentum_buffer=torch.ones(2)) for i in range(5)}
    content = dict(
        epoch=119,
        arch='ResNet-18',
        state_dict=state,
        best_acc1=torch.tensor(72.13),
        optimizer=dict(state=momenta, param_groups=[dict(lr=0.1, params=[0, 1])]),
        scheduler=dict(T_max=120, base_lrs=[0.1, 0.2], _step_count=3, last_epoch=119),
    )
    torch.save(content, source)
    before = source.read_bytes()
    run_here(TOOL, source, out)
    assert source.read_bytes() == before
    ours, expected = read_checkpoint(str(out)), from_published(state)
    assert ours.keys() == {'meta', 'state_dict'}
    assert_same_bits(ours['state_dict'], expected['state_dict'])
    noted = ours['meta'].pop('published')
    assert ours['meta'].keys() == expected['meta'].keys()
    assert (noted['epoch'], noted['arch']) == (119, 'ResNet-18')
    assert noted.keys().isdisjoint({'optimizer', 'scheduler'})


@pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deployed'])
@pytest.mark.parametrize('deployed_file', [False, True])
@torch.no_grad()
def test_backbone_only(tmp_path, deploy, deployed_file, capsys):
    """It loads as the line says that is printed, in any toolbox."""
    source, out = tmp_path / 'in.pth', tmp_path / 'out.pth'
    torch.save(small('', deployed_file), source)
    run_here(TOOL, source, out, '--backbone-only')
    init_cfg = dict(type='Pretrained', checkpoint=str(out))
    assert f'checkpoint={str(out)!r})' in capsys.readouterr().out

    def backbone(deploy):
        net = OREPAResNet(18, base_channels=4, deploy=deploy, init_cfg=init_cfg)
        net.init_weights()
        return net.eval()

    if deployed_file and not deploy:
        with pytest.raises(CheckpointError, match='deployed'):
            backbone(deploy)
        return
    images = torch.randn(1, 3, 64, 48)
    assert_near(backbone(deploy)(images), backbone(deployed_file)(images), 1e-4)
