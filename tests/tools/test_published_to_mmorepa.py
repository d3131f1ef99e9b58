import os
import pickle
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
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings
from published_layout import (
    assert_same_bits,
    cheap_state,
    network,
    repvgg,
    resnet,
    trained_state,
)
from tool_runs import ROOT, command, run_apart, run_here

from mmorepa.analysis import network_outputs
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

    @pytest.mark.parametrize('prefix', ['', 'module.'])
    @pytest.mark.parametrize('bare', [True, False])
    @pytest.mark.parametrize('deployed', [True, False])
    def test_forms_of_files(self, files, prefix, bare, deployed, capsys):
        state = small(prefix, deployed)
        source, out = files(state if bare else published_file(state))
        run_here(TOOL, source, out)
        form = 'deployed' if deployed else 'training form'
        assert f'({form})' in capsys.readouterr().out
        assert_same_bits(read(out)['state_dict'], from_published(state)['state_dict'])

    @pytest.mark.parametrize('backbone_only', [False, True])
    def test_safetensors(self, files, tmp_path, backbone_only):
        pytest.importorskip('safetensors')
        state = trained_state(repvgg(*VGG, 'orepa', classes=7))
        source, out = files(published_file(state))
        flags = ['--backbone-only'] if backbone_only else []
        run_here(TOOL, source, out, *flags)
        other = tmp_path / 'ours.safetensors'
        run_here(TOOL, source, other, *flags)
        expected = read(out)['state_dict']
        assert_same_bits(read_checkpoint(str(other))['state_dict'], expected)

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_damaged_values(self, files, value):
        state = small()
        key = 'module.stage2.0.conv1.weight_orepa_origin'
        state[key][1, 1] = value
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
    @pytest.mark.parametrize(
        'args',
        [
            ('--arch', 'ResNet-18'),
            ('--block', 'orepa'),
            ('--arch', 'ResNet-18', '--block', 'none of these'),
        ],
    )
    def test_flags(self, files, args, capsys):
        with pytest.raises(SystemExit) as caught:
            run_here(TOOL, *files(small()), *args)
        assert caught.value.code == 2
        assert 'error: ' in capsys.readouterr().err

    def test_no_file(self, tmp_path):
        assert 'no checkpoint at' in fails(tmp_path / 'a.pth', tmp_path / 'b.pth')

    def test_unknown_network(self, files):
        message = fails(*files(small()), '--arch', 'VGG', '--block', 'orepa')
        assert "unknown architecture 'VGG'; choose one of ResNet-18" in message

    @pytest.mark.parametrize('wrapped', [True, False])
    def test_code(self, tmp_path, wrapped):
        """What a pickle would run is not run, and the reason is said."""
        trace = tmp_path / 'was here'

        class Code:
            def __reduce__(self):
                return os.mkdir, (str(trace),)

        state = dict(small(), code=Code()) if wrapped else Code()
        source, out = tmp_path / 'in.pth.tar', tmp_path / 'out.pth'
        torch.save(published_file(state) if wrapped else state, source)
        message = fails(source, out)
        assert 'nothing else is loaded for safety' in message
        assert 'mkdir' in message
        assert sorted(os.listdir(tmp_path)) == ['in.pth.tar']

    def test_plain_pickle_with_code(self, tmp_path):
        class Code:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / 'was here'),)

        source = tmp_path / 'in.pth.tar'
        source.write_bytes(pickle.dumps(Code()))
        assert 'for safety' in fails(source, tmp_path / 'out.pth')
        assert os.listdir(tmp_path) == ['in.pth.tar']

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
        assert 'no ResNet has stages of (2, 2, 1, 2) basic blocks' in fails(source, out)
        message = fails(source, out, '--arch', 'ResNet-18', '--block', 'orepa')
        found = set(re.findall(r'\bstage[\w.]+', message))
        named = {key.removeprefix('module.') for key in (*missing, *extra, misshapen)}
        assert named <= found
        assert len(missing) == 34
        assert not out.parent.exists()

    def test_fixed_entry_with_other_values(self, files):
        state = small()
        state['module.stage1.0.conv1.weight_orepa_prior'].neg_()
        source, out = files(published_file(state))
        message = fails(source, out)
        assert message.endswith('other values: stage1.0.conv1.weight_orepa_prior')
        assert not out.parent.exists()

    def test_another_kind_of_file(self, files):
        source, out = files(dict(state_dict={'conv1.weight': torch.zeros(1)}))
        assert 'this is no published OREPA checkpoint' in fails(source, out)
        assert not out.parent.exists()

    def test_source_is_kept(self, files):
        source, _ = files(published_file(small()))
        before = source.read_bytes()
        assert 'would take the place of' in fails(source, source)
        assert source.read_bytes() == before

    def test_folder_in_the_way(self, files, tmp_path):
        source, _ = files(small())
        assert 'is a folder' in fails(source, tmp_path)

    def test_disk_that_is_full(self, files, monkeypatch):
        """A half-written file never stands where a whole one is expected."""
        source, out = files(small())
        out.parent.mkdir()
        out.write_bytes(b'of before')

        def save(checkpoint, file):
            file.write(b'a half')
            raise OSError('No space left on device')

        monkeypatch.setattr(torch, 'save', save)
        assert 'No space left' in fails(source, out)
        assert out.read_bytes() == b'of before'
        assert os.listdir(out.parent) == [out.name]


@pytest.mark.slow
def test_command_line(files):
    source, out = files(published_file(small()))
    done = run_apart(*command(TOOL, source, out))
    assert done.returncode == 0
    assert f'to {out}' in done.stdout
    assert out.is_file()

    broken = small()
    del broken['module.linear.bias']
    files(published_file(broken))
    out.unlink()
    done = run_apart(*command(TOOL, source, out))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-1].startswith('error: the checkpoint does not fit')
    assert not any('Traceback' in line for line in lines)
    assert not out.exists()


# A detector's and a segmenter's config around the network that small() is.
DETECTOR = """
default_scope = 'mmdet'
model = dict(
    type='RetinaNet',
    backbone=dict(
        type='OREPAResNet',
        depth=18,
        base_channels=4,
        init_cfg=dict(type='Pretrained', checkpoint={checkpoint!r}),
    ),
    neck=dict(type='FPN', in_channels=[4, 8, 16, 32], out_channels=8, num_outs=5),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=1,
            ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
    ),
)
"""
SEGMENTER = """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='OREPAResNet',
        depth=18,
        base_channels=4,
        init_cfg=dict(type='Pretrained', checkpoint={checkpoint!r}),
    ),
    decode_head=dict(
        type='FCNHead', in_channels=32, in_index=3, channels=8, num_classes=4
    ),
    test_cfg=dict(mode='whole'),
)
"""


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
class TestBackboneOnly:
    def build(self, scope, tmp_path, checkpoint, deploy):
        import_models(scope)
        path = tmp_path / f'{scope}.py'
        text = DETECTOR if scope == 'mmdet' else SEGMENTER
        path.write_text(text.format(checkpoint=str(checkpoint)))
        cfg = Config.fromfile(path)
        cfg.model.backbone.deploy = deploy
        with DefaultScope.overwrite_default_scope(scope):
            models = import_modules_from_strings(f'{scope}.registry').MODELS
            model = models.build(cfg.model)
            model.init_weights()
        return model.eval()

    @pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deployed'])
    @pytest.mark.parametrize('deployed_file', [False, True])
    @torch.no_grad()
    def test_loads(self, scope, files, tmp_path, deploy, deployed_file, capsys):
        state = small('', deployed_file)
        source, out = files(state)
        run_here(TOOL, source, out, '--backbone-only')
        advice = f"init_cfg=dict(type='Pretrained', checkpoint={str(out)!r})"
        assert advice in capsys.readouterr().out
        if deployed_file and not deploy:
            with pytest.raises(CheckpointError, match='a deployed checkpoint'):
                self.build(scope, tmp_path, out, deploy)
            return
        model = self.build(scope, tmp_path, out, deploy)
        converted = from_published(state)['state_dict']
        expected = {
            key.removeprefix('backbone.'): value
            for key, value in converted.items()
            if key.startswith('backbone.')
        }
        if deploy == deployed_file:
            assert_same_bits(dict(model.backbone.state_dict()), expected)
        images = torch.randn(1, 3, 128, 96)
        whole = self.build(scope, tmp_path, out, deployed_file)
        assert_near(model.backbone(images), whole.backbone(images), 1e-4)
        assert len(network_outputs(model, images)) > 0


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
