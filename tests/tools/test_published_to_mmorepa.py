import re

import pytest
import torch
from golden_networks import (
    NAMES,
    golden_input,
    golden_outputs,
    golden_state,
)
from helpers import assert_near, deployed_twin, import_models
from published_layout import (
    assert_same_bits,
    cheap_state,
    network,
    repvgg,
    resnet,
    trained_state,
)
from tool_runs import ROOT, command, run_apart, run_here

from mmorepa.backbones import OREPAResNet
from mmorepa.converters import from_published, read_checkpoint
from mmorepa.utils.errors import CheckpointError

TOOL = 'model_converters/published_to_mmorepa.py'
BASIC = ((2, 2, 2, 2), False, 4, 1, 64)
VGG = ((2, 2, 2, 1), (4, 4, 8, 12, 20), 1, False)


def small(prefix='module.', deployed=False, block='orepa'):
    return trained_state(resnet(*BASIC, block, deployed=deployed, classes=7), prefix)


def published_file(state):
    """As the training code saves it at the end of an epoch."""
    momenta = {
        i: dict(momentum_buffer=torch.ones(2)) for i, _ in enumerate(list(state)[:5])
    }
    return dict(
        epoch=119,
        arch='ResNet-18',
        state_dict=state,
        best_acc1=torch.tensor(72.13),
        optimizer=dict(state=momenta, param_groups=[dict(lr=0.1, params=[0, 1])]),
        scheduler=dict(T_max=120, base_lrs=[0.1, 0.2], _step_count=3, last_epoch=119),
    )


@pytest.fixture
def files(tmp_path):
    """Writes a checkpoint; the paths of IN and OUT."""
    source, out = tmp_path / 'in' / 'last.pth.tar', tmp_path / 'out' / 'ours.pth'
    source.parent.mkdir()

    def write(content):
        torch.save(content, source)
        return source, out

    return write


def read(path):
    return torch.load(path, weights_only=True)


def fails(*args):
    """The message of a run that ends with one."""
    with pytest.raises(SystemExit) as caught:
        run_here(TOOL, *args)
    message = caught.value.code
    assert isinstance(message, str) and message.startswith('error: ')
    assert '\n' not in message
    return message.removeprefix('error: ')


class TestTraining:
    def test_file_of_the_training_code(self, files, capsys):
        state = small()
        source, out = files(published_file(state))
        before = source.read_bytes()
        run_here(TOOL, source, out)
        assert source.read_bytes() == before
        ours = read(out)
        assert ours.keys() == {'meta', 'state_dict'}
        expected = from_published(state)
        assert_same_bits(ours['state_dict'], expected['state_dict'])
        noted = ours['meta'].pop('published')
        assert ours['meta'] == expected['meta']
        assert (noted['epoch'], noted['arch']) == (119, 'ResNet-18')
        assert noted['best_acc1'] == torch.tensor(72.13)
        assert noted.keys().isdisjoint({'optimizer', 'scheduler'})
        text = capsys.readouterr().out
        assert (
            f'Wrote custom (training form) to {out}: {len(expected["state_dict"])} '
            in text
        )
        assert "'base_channels': 4" in text

    @pytest.mark.parametrize(
        ('prefix', 'bare', 'deployed'),
        [('', True, False), ('', False, True), ('module.', True, True)],
    )
    def test_forms_of_files(self, files, prefix, bare, deployed, capsys):
        state = small(prefix, deployed)
        source, out = files(state if bare else published_file(state))
        run_here(TOOL, source, out)
        form = 'deployed' if deployed else 'training form'
        assert f'({form})' in capsys.readouterr().out
        assert_same_bits(read(out)['state_dict'], from_published(state)['state_dict'])

    def test_safetensors(self, files, tmp_path):
        pytest.importorskip('safetensors')
        state = trained_state(repvgg(*VGG, 'orepa', classes=7))
        source, _ = files(published_file(state))
        out = tmp_path / 'ours.safetensors'
        run_here(TOOL, source, out)
        expected = from_published(state)['state_dict']
        assert_same_bits(read_checkpoint(str(out))['state_dict'], expected)

    def test_damaged_values(self, files):
        state = small()
        key = 'module.stage2.0.conv1.weight_orepa_origin'
        state[key][1, 1] = float('nan')
        source, out = files(published_file(state))
        message = fails(source, out)
        assert repr(key) in message and str(source) in message
        assert not out.exists()

    def test_network_that_is_named(self, files, capsys):
        state = cheap_state(network('ResNet-18', 'orepa', True), '')
        source, out = files(state)
        run_here(TOOL, source, out, '--arch', 'resnet-18', '--block', 'orepa')
        assert 'Wrote ResNet-18 (deployed)' in capsys.readouterr().out


class TestErrors:
    """Others are in test_bad_command_lines.py and tests/converters."""

    def test_block_and_architecture_go_together(self, files, capsys):
        with pytest.raises(SystemExit) as caught:
            run_here(TOOL, *files(small()), '--arch', 'ResNet-18')
        assert caught.value.code == 2
        assert 'error: ' in capsys.readouterr().err

    def test_every_key_is_named(self, files):
        """Also many of them."""
        state = small()
        missing = [key for key in state if key.startswith('module.stage3.1.')]
        for key in missing:
            del state[key]
        extra = [f'module.stage1.0.conv1.weight_orepa_{i}' for i in range(9)]
        state |= {key: torch.zeros(1) for key in extra}
        misshapen = 'module.stage2.0.conv1.bn.weight'
        state[misshapen] = torch.zeros(5)
        source, out = files(published_file(state))
        # With a block missing, the network is not found by itself.
        assert 'no ResNet has stages' in fails(source, out)
        message = fails(source, out, '--arch', 'ResNet-18', '--block', 'orepa')
        found = set(re.findall(r'\bstage[\w.]+', message))
        named = {key.removeprefix('module.') for key in (*missing, *extra, misshapen)}
        assert named <= found
        assert not out.parent.exists()

    def test_fixed_entry_with_other_values(self, files):
        state = small()
        state['module.stage1.0.conv1.weight_orepa_prior'].neg_()
        source, out = files(published_file(state))
        message = fails(source, out)
        assert message.endswith('stage1.0.conv1.weight_orepa_prior')
        assert not out.parent.exists()

    def test_another_kind_of_file(self, files):
        source, out = files(dict(state_dict={'conv1.weight': torch.zeros(1)}))
        assert 'this is no published OREPA checkpoint' in fails(source, out)
        assert not out.parent.exists()


@pytest.mark.slow
def test_command_line(files):
    source, out = files(published_file(small()))
    done = run_apart(*command(TOOL, source, out))
    assert done.returncode == 0 and f'to {out}' in done.stdout
    assert out.is_file()


@pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deployed'])
@pytest.mark.parametrize('deployed_file', [False, True])
@torch.no_grad()
def test_backbone_only(files, deploy, deployed_file, capsys):
    """It loads as the line says that is printed, in any toolbox."""
    source, out = files(small('', deployed_file))
    run_here(TOOL, source, out, '--backbone-only')
    init_cfg = dict(type='Pretrained', checkpoint=str(out))
    assert f"init_cfg=dict(type='Pretrained', checkpoint={str(out)!r})" in (
        capsys.readouterr().out
    )

    def backbone(deploy):
        net = OREPAResNet(18, base_channels=4, deploy=deploy, init_cfg=init_cfg)
        net.init_weights()
        return net.eval()

    if deployed_file and not deploy:
        with pytest.raises(CheckpointError, match='a deployed checkpoint'):
            backbone(deploy)
        return
    images = torch.randn(1, 3, 64, 48)
    assert_near(backbone(deploy)(images), backbone(deployed_file)(images), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_published_outputs(files, tmp_path, name, capsys):
    """The published file, by this tool and the config, in mmpretrain and back."""
    import_models('mmpretrain')
    from mmpretrain.apis import get_model

    state = {f'module.{key}': value for key, value in golden_state(name).items()}
    source, out = files(published_file(state))
    run_here(TOOL, source, out)
    architecture = dict(resnet18='ResNet-18', repvgg='RepVGG-A0')[name.split('-')[0]]
    assert f'Wrote {architecture} (training form)' in capsys.readouterr().out

    config = ROOT / 'configs' / 'imagenet' / f'{name}_4xb64_in1k.py'
    deployed = tmp_path / 'deployed.pth'
    run_here(
        *('model_converters/switch_to_deploy.py', config, out, deployed),
        *('--shape', 32, 32),
    )
    every_stage = dict(out_indices=(0, 1, 2, 3))
    training = get_model(str(config), str(out), backbone=every_stage)
    golden = golden_outputs(name)
    for classifier in (
        training,
        deployed_twin(training),
        get_model(str(config), str(out), backbone=dict(every_stage, deploy=True)),
        get_model(str(config), str(deployed), backbone=dict(every_stage, deploy=True)),
    ):
        outputs = classifier.backbone(golden_input())
        logits = classifier.head(classifier.neck(outputs))
        assert_near([*outputs, logits], golden, 1e-4)
    plain = get_model(str(config), str(out))(golden_input())
    assert_near(plain, golden[-1], 1e-4)
