import operator
import os
import pickle
import sys
import zipfile

import pytest
import torch
from helpers import assert_near, trained_like
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from runners import TinyClassifier, logits_of, make_runner
from torch import nn

from mmorepa import switch_to_deploy
from mmorepa.converters import (
    allow_mmengine_checkpoints,
    deploy_checkpoint,
    load_strictly,
    load_training_form,
    read_checkpoint,
    write_checkpoint,
)
from mmorepa.layers import OREPAConv2d, build_conv
from mmorepa.utils.errors import CheckpointError


@pytest.fixture(scope='module')
def runner(tmp_path_factory):
    """A runner that has trained, and saved its last and its best checkpoint."""
    runner = make_runner(
        tmp_path_factory.mktemp('trained'),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=6, by_epoch=False),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, save_best='accuracy')
        ),
    )
    runner.train()
    return runner


@pytest.fixture
def saved(runner):
    return os.path.join(runner.work_dir, 'epoch_2.pth')


@pytest.fixture
def nothing_allowed():
    """The list of safe globals, empty until the test is over."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        """What is called must be callable when it is written, too."""


class TestSafeLoading:
    def test_reads_what_a_runner_saved(self, nothing_allowed, saved):
        with pytest.raises(pickle.UnpicklingError, match='HistoryBuffer'):
            torch.load(saved, weights_only=True)
        allow_mmengine_checkpoints()
        checkpoint = torch.load(saved, weights_only=True)
        losses = checkpoint['message_hub']['log_scalars']['train/loss']
        assert isinstance(losses, HistoryBuffer)
        assert len(losses.data[0]) == 6  # Two epochs of three iterations.
        assert losses.current() == losses.data[0][-1] > 0
        assert losses.min() == losses.data[0].min() < losses.max()
        assert losses.mean(2) == pytest.approx(losses.data[0][-2:].mean())

    def test_numbers_and_arrays_of_numpy(self, tmp_path):
        import numpy as np

        values = [np.float64(1.5), np.int64(3), np.bool_(True), np.arange(4.0)]
        torch.save({'state_dict': {}, 'values': values}, tmp_path / 'a.pth')
        found = read_checkpoint(str(tmp_path / 'a.pth'))['values']
        assert [str(v) for v in found] == [str(v) for v in values]
        assert [v.dtype for v in found] == [v.dtype for v in values]

    @pytest.mark.parametrize(
        'call',
        [
            lambda path: Call(os.system, f'touch {path}'),
            # The way around: a method of an allowed class, called in a second step.
            lambda path: Call(Call(getattr, torch.Tensor, 'numpy'), torch.ones(1)),
            lambda path: Call(getattr, torch._utils._rebuild_tensor_v2, '__globals__'),
            lambda path: Call(getattr, HistoryBuffer, '__init__'),
            lambda path: Call(operator.attrgetter, 'mean'),
        ],
    )
    def test_refuses_everything_else(self, tmp_path, call):
        trace, path = tmp_path / 'trace', str(tmp_path / 'bad.pth')
        state = {'state_dict': {'weight': torch.ones(2)}, 'message_hub': call(trace)}
        torch.save(state, path)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
        with pytest.raises(CheckpointError, match='cannot be read') as info:
            read_checkpoint(path)
        assert repr(path) in str(info.value)
        # PyTorch's own words propose to trust the file.
        assert 'weights_only' not in str(info.value)
        assert not trace.exists()

    @pytest.mark.parametrize('name', ['mean', 'current'])
    def test_getattr_serves_the_four_names(self, tmp_path, nothing_allowed, name):
        allow_mmengine_checkpoints()
        path = tmp_path / 'a.pth'
        torch.save(Call(getattr, HistoryBuffer, name), path)
        assert torch.load(path, weights_only=True) is getattr(HistoryBuffer, name)
        torch.save(Call(getattr, HistoryBuffer([1.0], [1]), name), path)
        with pytest.raises(pickle.UnpicklingError, match=f"attribute '{name}'"):
            torch.load(path, weights_only=True)


class TestRead:
    def write(self, tmp_path, content):
        path = tmp_path / 'a.pth'
        torch.save(content, path)
        return str(path)

    def test_runner_checkpoint(self, runner, saved):
        checkpoint = read_checkpoint(saved)
        own = runner.model.state_dict()
        assert checkpoint['state_dict'].keys() == own.keys()
        assert all(torch.equal(checkpoint['state_dict'][k], v) for k, v in own.items())
        assert checkpoint['meta']['iter'] == 6
        assert {'optimizer', 'param_schedulers', 'message_hub'} <= checkpoint.keys()

    def test_bare_state_dict(self, tmp_path):
        state = TinyClassifier().state_dict()
        checkpoint = read_checkpoint(self.write(tmp_path, state))
        assert list(checkpoint) == ['state_dict']
        assert checkpoint['state_dict'].keys() == state.keys()

    def test_prefix_of_data_parallel(self, tmp_path):
        model = TinyClassifier()
        path = self.write(tmp_path, nn.DataParallel(model).state_dict())
        model.load_state_dict(read_checkpoint(path)['state_dict'])

    def test_legacy_format(self, tmp_path):
        path = tmp_path / 'a.pth'
        state = {'a': torch.ones(2)}
        torch.save(state, path, _use_new_zipfile_serialization=False)
        assert read_checkpoint(str(path))['state_dict'].keys() == state.keys()

    @pytest.mark.parametrize(
        'content, words',
        [
            ([torch.ones(2)], 'holds a list'),
            (torch.ones(2), 'holds a Tensor'),
            ({'model': {'a': torch.ones(2)}}, 'no state dict of tensors'),
            ({'state_dict': [torch.ones(2)]}, 'no state dict of tensors'),
            ({'state_dict': {'a': 1}}, 'no state dict of tensors'),
        ],
    )
    def test_something_else(self, tmp_path, content, words):
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(self.write(tmp_path, content))

    def test_zeros_in_an_archive(self, tmp_path):
        """As a disk leaves them that lost a block: the archive's checksums tell."""
        path = tmp_path / 'a.pth'
        torch.save({'a': torch.ones(10000), 'b': torch.ones(10000)}, path)
        whole = path.read_bytes()
        at = whole.index(torch.ones(1000).numpy().tobytes()) + 4000
        path.write_bytes(whole[:at] + bytes(4096) + whole[at + 4096 :])
        assert not torch.load(path)['a'].all()
        with pytest.raises(CheckpointError, match="'a/data/0' does not have its check"):
            read_checkpoint(str(path))

    def test_larger_than_its_file(self, tmp_path):
        path = tmp_path / 'a.pth'
        torch.save({'a': torch.zeros(100000)}, path)
        with zipfile.ZipFile(path) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        with pytest.raises(CheckpointError, match='larger than its file'):
            read_checkpoint(str(path))
        huge = torch.zeros(1).expand(1 << 40)
        path = self.write(tmp_path, {'a': huge})
        with pytest.raises(CheckpointError, match="'a', .* is larger than the file"):
            read_checkpoint(path)

    @pytest.mark.parametrize(
        'key, value, words',
        [
            (3, torch.ones(2), 'the key 3 is no string'),
            ('a.weight', torch.tensor([1.0, float('nan')]), "'a.weight' holds NaN"),
            ('a.weight', torch.tensor([1.0, -float('inf')]), "'a.weight' holds Inf"),
            ('a.running_var', torch.tensor([1.0, -1e-9]), 'holds a negative variance'),
            ('a.bias', torch.ones(2, dtype=torch.int8), 'holds torch.int8, where'),
            ('a.weight', torch.ones(2).to_sparse(), "'a.weight' is sparse, quant"),
            ('a.weight', torch.ones(2, device='meta'), "'a.weight' is sparse, quant"),
        ],
    )
    def test_impossible_entries(self, tmp_path, key, value, words):
        """Named by file and entry, by MMEngine's loading as well."""
        path = self.write(tmp_path, {'state_dict': {'good': torch.ones(2), key: value}})
        for read in (read_checkpoint, CheckpointLoader.load_checkpoint):
            with pytest.raises(CheckpointError, match=words) as info:
                read(path)
            assert repr(path) in str(info.value)

    def test_unusual_entries(self, tmp_path):
        """All of these are found in sound checkpoints."""
        state = {
            'half.weight': torch.ones(2, dtype=torch.float16),
            'bfloat.weight': torch.ones(2, dtype=torch.bfloat16),
            'double.weight': torch.ones(2, dtype=torch.float64),
            'transposed.weight': torch.ones(2, 3).T,
            'zero.running_var': torch.zeros(2),
            'num_batches_tracked': torch.tensor(3),
            'relative_position_index': torch.arange(3),
            'attn_mask': torch.tensor([0.0, -float('inf')]),
            'empty.weight': torch.ones(0, 3),
            # A sixth row that the published code leaves as the memory was.
            'stage1.0.rbr_dense.vector': torch.tensor([[1.0]] * 5 + [[float('nan')]]),
        }
        found = read_checkpoint(self.write(tmp_path, state))['state_dict']
        for key, value in state.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key].nan_to_num(), value.nan_to_num())

    def test_reads_what_is_no_longer_allowed(self, saved, nothing_allowed):
        """The end of a scope, as OneDL's loading opens one, allows nothing."""
        torch.serialization.add_safe_globals([Call])
        checkpoint = read_checkpoint(saved)
        losses = checkpoint['message_hub']['log_scalars']['train/loss']
        assert isinstance(losses, HistoryBuffer)
        assert Call in torch.serialization.get_safe_globals()

    def test_no_code_by_the_way_of_mmengine(self, tmp_path, monkeypatch):
        """Even where PyTorch would run it."""
        monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
        trace = tmp_path / 'trace'
        path = self.write(tmp_path, {'state_dict': {}, 'a': Call(os.mkdir, str(trace))})
        torch.load(path)
        trace.rmdir()
        with pytest.raises(CheckpointError, match='for safety'):
            load_checkpoint(TinyClassifier(), path)
        assert not trace.exists()

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at '.*none\.pth'"):
            read_checkpoint(str(tmp_path / 'none.pth'))
        with pytest.raises(FileNotFoundError, match='no checkpoint at'):
            read_checkpoint(str(tmp_path))


class TestSafetensors:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip('safetensors')

    def test_round_trip(self, tmp_path):
        """Weights by the bit, and the meta data as text."""
        state = dict(trained_like(TinyClassifier()).state_dict())
        state['tied'] = state['turned'] = state['head.weight'].T
        meta = dict(epoch=3, rows=dict(a=torch.ones(2)), path=tmp_path)
        path = str(tmp_path / 'a.safetensors')
        write_checkpoint(dict(state_dict=state, meta=meta, optimizer={}), path)
        found = read_checkpoint(path)
        assert found['meta'] == dict(epoch=3, rows=dict(a=[1, 1]), path=str(tmp_path))
        assert found.keys() == {'state_dict', 'meta'}
        assert found['state_dict'].keys() == state.keys()
        assert all(torch.equal(found['state_dict'][k], v) for k, v in state.items())

    def test_of_others(self, tmp_path):
        """Without meta data; MMEngine loads it by the same reader."""
        from safetensors.torch import save_file

        model, path = trained_like(TinyClassifier()), str(tmp_path / 'a.safetensors')
        save_file(model.state_dict(), path)
        assert list(read_checkpoint(path)) == ['state_dict']
        fresh = TinyClassifier()
        load_checkpoint(fresh, path)
        assert_near(logits_of(fresh), logits_of(model))

    def test_not_installed(self, tmp_path, monkeypatch):
        path = tmp_path / 'a.safetensors'
        path.write_text('old')
        monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
        with pytest.raises(CheckpointError, match='pip install .*safetensors'):
            read_checkpoint(str(path))
        with pytest.raises(ImportError, match='pip install .*safetensors'):
            write_checkpoint({'a': torch.ones(1)}, path)
        assert path.read_text() == 'old' and os.listdir(tmp_path) == [path.name]


class TestDeploy:
    def test_keeps_meta_and_drops_the_training(self, runner, saved):
        checkpoint = read_checkpoint(saved)
        before = {k: v.clone() for k, v in checkpoint['state_dict'].items()}
        result = deploy_checkpoint(TinyClassifier(), checkpoint)
        assert set(result) == {'meta', 'state_dict'}
        assert result['meta']['deployed'] is True
        kept = {k: result['meta'][k] for k in checkpoint['meta']}
        assert kept == checkpoint['meta'] and kept['epoch'] == 2
        assert 'deployed' not in checkpoint['meta']
        state = checkpoint['state_dict']
        assert all(torch.equal(state[key], value) for key, value in before.items())
        assert not any('branches' in key for key in result['state_dict'])

        deployed = TinyClassifier(deploy=True)
        deployed.load_state_dict(result['state_dict'])
        assert_near(logits_of(deployed), logits_of(runner.model))

    def test_deployed_already(self):
        state = switch_to_deploy(TinyClassifier()).state_dict()
        with pytest.raises(
            CheckpointError, match="deployed already: it holds 'conv1.weight'"
        ):
            deploy_checkpoint(TinyClassifier(), {'state_dict': state})

    def test_deployed_model(self):
        with pytest.raises(CheckpointError, match='no re-parameterised conv'):
            deploy_checkpoint(TinyClassifier(deploy=True), {'state_dict': {}})

    def test_other_keys(self):
        state = TinyClassifier().state_dict()
        del state['head.bias']
        state['head.extra'] = torch.ones(1)
        with pytest.raises(CheckpointError, match='head.bias.*head.extra'):
            deploy_checkpoint(TinyClassifier(), {'state_dict': state})
        state['head.weight'] = torch.ones(7, 8)
        with pytest.raises(CheckpointError, match='head.weight'):
            deploy_checkpoint(TinyClassifier(), {'state_dict': state})

    def test_other_modules_that_are_named_branches(self):
        """As in HRNet, where convs are found under ``branches``."""
        model = nn.ModuleDict(
            {'branches': nn.Sequential(OREPAConv2d(2, 2, 3), nn.BatchNorm2d(2))}
        )
        state = trained_like(model).state_dict()
        load_training_form(model, state)
        plain = switch_to_deploy(nn.ModuleDict(model)).state_dict()
        fresh = nn.ModuleDict(
            {'branches': nn.Sequential(OREPAConv2d(2, 2, 3), nn.BatchNorm2d(2))}
        )
        with pytest.raises(CheckpointError, match="'branches.0.weight', a plain"):
            load_training_form(fresh, plain)


class TestLoadStrictly:
    def test_folds_into_a_deployed_model(self):
        model = trained_like(TinyClassifier())
        deployed = TinyClassifier(deploy=True)
        load_strictly(deployed, model.state_dict())
        assert_near(logits_of(deployed), logits_of(model))

    def test_another_shape_under_another_name(self):
        """A plain conv's kernel, in training form, for a conv of branches."""
        models = []
        for block, width in (('plain', 4), ('orepa', 8)):
            convs = (build_conv(block, width, width, 3, bias=False) for _ in range(2))
            models.append(nn.Sequential(*convs))
        words = 'does not fit the config: size mismatch for 0.weight.*, and 1 more'
        with pytest.raises(CheckpointError, match=words):
            load_strictly(models[1], models[0].state_dict())

    def test_more_than_the_model_has(self):
        """A deeper network's checkpoint holds all that a flatter one asks for."""
        state = TinyClassifier().state_dict()
        state['conv3.norm.weight'] = torch.ones(8)
        with pytest.raises(CheckpointError, match='left over: conv3.norm.weight'):
            load_strictly(TinyClassifier(), state)

    def test_old_batch_norms_without_a_counter(self):
        state = TinyClassifier().state_dict()
        state = {k: v for k, v in state.items() if 'num_batches_tracked' not in k}
        load_strictly(TinyClassifier(), state)
