import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model.wrappers import MMDistributedDataParallel
from mmengine.utils import digit_version
from runners import Probe, TinyClassifier, build_runner, tiny_config
from torch import distributed

import mmorepa.runs.config as config_module
import mmorepa.runs.runner as runner_module
from mmorepa import switch_to_deploy
from mmorepa.cli import one_line_errors
from mmorepa.converters import write_checkpoint
from mmorepa.runs import set_up_distributed_cpu
from mmorepa.utils.errors import CheckpointError, OutputError


class TestBuildRunner:
    def checkpoint(self, tmp_path, state=None, **content):
        path = str(tmp_path / 'given.pth')
        state = TinyClassifier().state_dict() if state is None else state
        write_checkpoint(dict(state_dict=state, **content), path)
        return path

    @pytest.mark.parametrize('phase', ['train', 'test'])
    def test_missing_checkpoint(self, tmp_path, phase):
        work_dir = tmp_path / 'work'
        cfg = tiny_config(work_dir, load_from='none.pth')
        with pytest.raises(FileNotFoundError, match="no checkpoint at 'none.pth'"):
            build_runner(cfg, (phase,))
        assert not work_dir.exists()

    def test_test_of_another_network(self, tmp_path):
        """MMEngine would test what its random weights give."""
        path = self.checkpoint(tmp_path, TinyClassifier(width=4).state_dict())
        cfg = tiny_config(tmp_path / 'work', load_from=path)
        with pytest.raises(CheckpointError, match='does not fit the config'):
            build_runner(cfg, ('test',))
        # Training from the weights of another network is everybody's right.
        build_runner(cfg, ('train',))

    def test_test_of_a_deployed_checkpoint(self, tmp_path):
        path = self.checkpoint(
            tmp_path, switch_to_deploy(TinyClassifier()).state_dict()
        )
        cfg = tiny_config(tmp_path / 'work', load_from=path)
        with pytest.raises(CheckpointError, match='deploy=True'):
            build_runner(cfg, ('test',))
        cfg.model.deploy = True
        build_runner(cfg, ('test',)).test()

    def test_resumes(self, tmp_path):
        runner = build_runner(tiny_config(tmp_path), ('train',))
        runner.train()
        cfg = tiny_config(tmp_path, resume=True)
        cfg.train_cfg.max_epochs = 3
        resumed = build_runner(cfg, ('train',))
        resumed.train()
        assert (resumed.epoch, resumed.iter) == (3, 9)
        assert (tmp_path / 'epoch_3.pth').is_file()

    def test_resume_from_another_network(self, tmp_path):
        build_runner(tiny_config(tmp_path), ('train',)).train()
        cfg = tiny_config(
            tmp_path, resume=True, model=dict(type='TinyClassifier', width=4)
        )
        with pytest.raises(CheckpointError, match='does not fit the config'):
            build_runner(cfg, ('train',))
        cfg.load_from = str(tmp_path / 'epoch_1.pth')
        with pytest.raises(CheckpointError, match='does not fit the config'):
            build_runner(cfg, ('train',))

    @pytest.mark.parametrize('phase', ['train', 'test'])
    def test_errors_in_a_loop(self, tmp_path, phase):
        """What breaks in the midst of it is nothing that a line explains."""

        def fail(runner):
            raise error

        runner = build_runner(tiny_config(tmp_path), (phase,))
        runner.register_hook(Probe(**{f'before_{phase}_epoch': fail}))
        for error, expected in (
            (ValueError('a mistake of theirs'), ValueError),
            (CheckpointError('a checkpoint'), SystemExit),
            (OutputError('an output'), SystemExit),
        ):
            with pytest.raises(expected, match=str(error)), one_line_errors():
                getattr(runner, phase)()

    def test_resume_takes_the_seed_along(self, tmp_path):
        cfg = tiny_config(tmp_path, randomness=dict(seed=None))
        drawn = build_runner(cfg, ('train',))
        drawn.train()
        cfg = tiny_config(tmp_path, resume=True, randomness=dict(seed=None))
        assert build_runner(cfg, ('train',)).seed == drawn.seed
        path = str(tmp_path / 'epoch_1.pth')
        cfg = tiny_config(tmp_path, resume=True, load_from=path, randomness=None)
        assert build_runner(cfg, ('train',)).seed == drawn.seed
        cfg = tiny_config(tmp_path, resume=True, randomness=dict(seed=7))
        assert build_runner(cfg, ('train',)).seed == 7

    def test_runner_type(self, tmp_path, monkeypatch):
        from mmengine.registry import RUNNERS
        from mmengine.runner import Runner

        class Special(Runner):
            pass

        monkeypatch.setitem(RUNNERS.module_dict, 'Special', Special)
        runner = build_runner(tiny_config(tmp_path, runner_type='Special'), ('train',))
        assert type(runner) is Special


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """As a process of torchrun, the only one, on a machine without a GPU."""
    monkeypatch.setattr(config_module, 'get_device', lambda: 'cpu')
    for name, value in dict(
        RANK='0',
        LOCAL_RANK='0',
        WORLD_SIZE='1',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT='0',
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('MKL_NUM_THREADS', '1')
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def threads():
    return {path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')}


class TestDistributedWithoutGPU:
    def norms(self):
        return dict(
            type='EncoderDecoder',
            backbone=dict(norm_cfg=dict(type='SyncBN', requires_grad=True)),
            decode_head=[dict(norm_cfg=dict(type='SyncBN')) for _ in range(3)],
            auxiliary_head=(dict(norm_cfg=dict(type='SyncBN')), dict(act_cfg=None)),
            neck=dict(norm_cfg=dict(type='GN', num_groups=2)),
        )

    def test_replaces_every_sync_bn(self, launched):
        cfg = Config(dict(model=self.norms(), launcher='pytorch'))
        set_up_distributed_cpu(cfg)
        model = cfg.model
        assert 'SyncBN' not in repr(model)
        assert repr(model).count("'BN'") == 5
        assert model.neck.norm_cfg == dict(type='GN', num_groups=2)
        assert model.backbone.norm_cfg.requires_grad is True

    def test_runs(self, launched, tmp_path):
        cfg = tiny_config(tmp_path, launcher='pytorch')
        runner = build_runner(cfg, ('train',))
        assert isinstance(runner.model, MMDistributedDataParallel)
        assert distributed.get_backend() == 'gloo'
        assert not runner.model.find_unused_parameters
        runner.train()
        assert runner.iter == 6
        if digit_version(torch.__version__) > digit_version('2.6'):  # It has no names.
            assert 'pt_gloo_runloop' in threads()
        del runner
        runner_module._leave_process_group()
        assert 'pt_gloo_runloop' not in threads(), 'they abort a process that ends'

    @pytest.mark.parametrize('device', ['cuda', 'npu'])
    def test_accelerators_are_left_to_mmengine(self, monkeypatch, tmp_path, device):
        monkeypatch.setattr(config_module, 'get_device', lambda: device)
        monkeypatch.setattr(runner_module.Runner, 'from_cfg', lambda cfg: cfg)
        cfg = tiny_config(tmp_path, launcher='pytorch', model=self.norms())
        build_runner(cfg, ())
        assert not distributed.is_initialized()
        assert 'model_wrapper_cfg' not in cfg and 'SyncBN' in cfg.pretty_text

    def test_ranks_of_open_mpi(self, monkeypatch):
        monkeypatch.setattr(os, 'environ', {'MASTER_ADDR': 'here'})
        with pytest.raises(ValueError, match='OMPI_COMM_WORLD_RANK is not set'):
            runner_module._name_ranks_as_torchrun('mpi')
        theirs = dict(RANK='3', LOCAL_RANK='1', SIZE='4')
        os.environ.update({f'OMPI_COMM_WORLD_{k}': v for k, v in theirs.items()})
        runner_module._name_ranks_as_torchrun('mpi')
        expected = dict(RANK='3', LOCAL_RANK='1', WORLD_SIZE='4', MASTER_ADDR='here')
        assert os.environ.items() > expected.items()

    def test_says_so(self, launched, capsys):
        cfg = Config(dict(model=self.norms(), launcher='pytorch'))
        set_up_distributed_cpu(cfg)
        assert 'SyncBN needs GPUs' in capsys.readouterr().out
        assert 'SyncBN' not in cfg.pretty_text
