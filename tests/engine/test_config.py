import importlib
import os
from pathlib import Path

import pytest
import torch
from helpers import counted_folds, import_models
from mmengine.config import Config, ConfigDict
from mmengine.hooks import EMAHook
from mmengine.model.wrappers import MMDistributedDataParallel
from mmengine.registry import DefaultScope
from mmengine.utils import digit_version
from runners import Probe, TinyClassifier
from torch import distributed

import mmorepa.engine.config as config_module
from mmorepa import switch_to_deploy
from mmorepa.cli import one_line_errors
from mmorepa.converters import write_checkpoint
from mmorepa.engine import BFloat16OptimWrapper
from mmorepa.engine.config import (
    add_hook,
    build_runner,
    check_data_folders,
    use_amp,
    use_tta,
    use_visualization,
)
from mmorepa.utils.errors import CheckpointError, OutputError


class TestAmp:
    def config(self, **wrapper):
        return Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD'), **wrapper)))

    @pytest.mark.parametrize('device', ['cpu', 'mps'])
    @pytest.mark.parametrize('folded', ['', 'Folded'])
    def test_without_accelerator(self, monkeypatch, device, folded):
        monkeypatch.setattr(config_module, 'get_device', lambda: device)
        cfg = self.config(type=f'{folded}OptimWrapper')
        use_amp(cfg)
        assert cfg.optim_wrapper.type == f'{folded}BFloat16OptimWrapper'
        assert 'loss_scale' not in cfg.optim_wrapper

    @pytest.mark.parametrize('device', ['cuda', 'npu', 'mlu', 'musa'])
    @pytest.mark.parametrize('folded', ['', 'Folded'])
    def test_with_accelerator(self, monkeypatch, device, folded):
        monkeypatch.setattr(config_module, 'get_device', lambda: device)
        cfg = self.config(type=f'{folded}OptimWrapper', clip_grad=dict(max_norm=1))
        use_amp(cfg)
        assert cfg.optim_wrapper.type == f'{folded}AmpOptimWrapper'
        assert cfg.optim_wrapper.loss_scale == 'dynamic'
        assert cfg.optim_wrapper.clip_grad == dict(max_norm=1)
        cfg = self.config(loss_scale=512.0)
        use_amp(cfg)
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert cfg.optim_wrapper.loss_scale == 512.0

    @pytest.mark.parametrize('folded', ['', 'Folded'])
    @pytest.mark.parametrize('kind', ['AmpOptimWrapper', 'BFloat16OptimWrapper'])
    def test_on_already(self, folded, kind):
        cfg = self.config(type=folded + kind)
        use_amp(cfg)
        assert cfg.to_dict() == self.config(type=folded + kind).to_dict()

    @pytest.mark.parametrize(
        'name, module',
        [('OptimWrapper', 'mmengine.optim'), ('FoldedOptimWrapper', 'mmorepa.engine')],
    )
    def test_class(self, tmp_path, name, module):
        """As configs that import what they name hold it."""
        path = tmp_path / 'lazy.py'
        path.write_text(
            f'from {module} import {name}\n'
            f'optim_wrapper = dict(type={name}, optimizer=dict(type="SGD", lr=0.1))\n'
        )
        cfg = Config.fromfile(path)
        assert cfg.optim_wrapper.type is getattr(importlib.import_module(module), name)
        use_amp(cfg)
        expected = self.config(type=name)
        use_amp(expected)
        assert cfg.optim_wrapper.type == expected.optim_wrapper.type

    def test_scope(self):
        cfg = self.config(type='mmengine.OptimWrapper')
        use_amp(cfg)
        assert cfg.optim_wrapper.type in ('AmpOptimWrapper', 'BFloat16OptimWrapper')

    def test_other_wrapper(self):
        with pytest.raises(ValueError, match="found 'ApexOptimWrapper'"):
            use_amp(self.config(type='ApexOptimWrapper'))

    def test_bfloat16(self):
        """The convolution runs in half precision; fold and weights do not."""
        model = TinyClassifier()
        wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.5))
        before = {k: v.clone() for k, v in model.named_parameters()}
        seen = {}
        model.conv2.register_forward_pre_hook(
            lambda _, args: seen.update(input=args[0].dtype)
        )
        data = [torch.randn(4, 3, 8, 8), torch.arange(4)]
        with counted_folds(model.conv1) as folds:
            losses = [model.train_step(data, wrapper)['loss'].item() for _ in range(10)]
        assert seen == dict(input=torch.bfloat16)
        assert folds == [torch.float32] * 10
        assert losses[-1] < 0.9 * losses[0]
        for name, param in model.named_parameters():
            assert param.dtype == torch.float32 and torch.isfinite(param).all()
            assert not torch.equal(param, before[name]), name
        # Off again afterwards.
        assert model(data[0]).dtype == torch.float32

    def test_bfloat16_accumulates(self):
        """The rest is MMEngine's wrapper."""
        model = TinyClassifier()
        wrapper = BFloat16OptimWrapper(
            torch.optim.SGD(model.parameters(), lr=0.5), accumulative_counts=2
        )
        wrapper.initialize_count_status(model, 0, 4)
        data = [torch.randn(4, 3, 8, 8), torch.arange(4)]
        before = model.head.weight.clone()
        model.train_step(data, wrapper)
        assert torch.equal(model.head.weight, before)
        model.train_step(data, wrapper)
        assert not torch.equal(model.head.weight, before)


class TestDataFolders:
    def check(self, phases=('train',), **loaders):
        check_data_folders(Config(loaders), phases)

    def missing(self, dataset, **options):
        with pytest.raises(FileNotFoundError, match="data folder 'none' is missing"):
            self.check(train_dataloader=dict(dataset=dataset), **options)

    NONE = dict(type='A', data_root='none')

    def test_there(self, tmp_path):
        for root in (str(tmp_path), 's3://bucket', '', None):
            self.check(train_dataloader=dict(dataset=dict(data_root=root)))
        self.check(train_dataloader=dict(dataset=dict(type='Random')))
        self.check(train_dataloader=None)
        self.check()

    def test_missing(self, tmp_path):
        self.missing(self.NONE)
        (tmp_path / 'file').touch()
        with pytest.raises(FileNotFoundError):
            root = str(tmp_path / 'file')
            self.check(train_dataloader=dict(dataset=dict(data_root=root)))

    def test_downloaded(self):
        import_models('mmpretrain')
        cifar = dict(type='CIFAR10', data_root='none')
        options = dict(default_scope='mmpretrain')
        self.check(train_dataloader=dict(dataset=cifar), **options)
        self.missing(dict(cifar, download=False), **options)
        self.missing(dict(cifar, type='ImageNet'), **options)
        loaders = dict(train_dataloader=dict(dataset=cifar), data_preparation='run: it')
        with pytest.raises(FileNotFoundError, match='is missing; run: it$'):
            self.check(**options, **loaders)

    def test_wrapped(self, tmp_path):
        there = dict(type='B', data_root=str(tmp_path))
        self.missing(dict(type='RepeatDataset', times=2, dataset=self.NONE))
        self.missing(dict(dataset=dict(dataset=self.NONE)))
        self.missing(dict(type='ConcatDataset', datasets=[there, self.NONE]))
        self.missing(dict(dataset=dict(datasets=[there, dict(dataset=self.NONE)])))
        self.check(train_dataloader=dict(dataset=dict(datasets=[there, there])))

    def test_only_what_is_read(self):
        loader = dict(dataset=self.NONE)
        self.check(('train', 'val'), test_dataloader=loader)
        with pytest.raises(FileNotFoundError):
            self.check(('test',), test_dataloader=loader)

    def test_advice(self):
        with pytest.raises(FileNotFoundError, match='is missing; set data_root'):
            self.check(train_dataloader=dict(dataset=self.NONE))
        with pytest.raises(FileNotFoundError, match='is missing; run: it$'):
            self.check(
                train_dataloader=dict(dataset=self.NONE), data_preparation='run: it'
            )


class TestTTA:
    PIPELINE = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]

    def config(self, scope='mmpretrain', **options):
        return Config(
            dict(
                default_scope=scope,
                model=dict(type='ImageClassifier'),
                test_dataloader=dict(dataset=dict(type='A', pipeline=self.PIPELINE)),
                **options,
            )
        )

    def test_flips_by_default(self):
        cfg = self.config()
        use_tta(cfg)
        assert cfg.model.to_dict() == dict(
            type='AverageClsScoreTTA', module=dict(type='ImageClassifier')
        )
        load, tta = cfg.test_dataloader.dataset.pipeline
        assert load == self.PIPELINE[0]
        flips, pack = tta['transforms']
        assert tta['type'] == 'TestTimeAug' and pack == [self.PIPELINE[1]]
        assert sorted(flip['prob'] for flip in flips) == [0.0, 1.0]

    @pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
    def test_of_the_config(self, scope):
        own = [dict(type='Own')]
        cfg = self.config(scope, tta_model=dict(type='Mine', k=1), tta_pipeline=own)
        use_tta(cfg)
        assert cfg.model.to_dict() == dict(
            type='Mine', k=1, module=dict(type='ImageClassifier')
        )
        assert cfg.test_dataloader.dataset.pipeline == own

    def test_inside_of_a_wrapper(self):
        own = [dict(type='Own')]
        cfg = self.config('mmdet', tta_model=dict(type='Mine'), tta_pipeline=own)
        cfg.test_dataloader.dataset = dict(
            type='RepeatDataset', times=2, dataset=cfg.test_dataloader.dataset
        )
        use_tta(cfg)
        assert cfg.test_dataloader.dataset.dataset.pipeline == own
        assert 'pipeline' not in cfg.test_dataloader.dataset

    @pytest.mark.parametrize('options', [{}, dict(tta_model=dict(type='Mine'))])
    def test_missing(self, options):
        with pytest.raises(ValueError, match='--tta needs tta_model and tta_pipeline'):
            use_tta(self.config('mmseg', **options))


class TestVisualization:
    def config(self, scope, hook):
        return Config(
            dict(
                default_scope=scope,
                default_hooks=dict(visualization=hook),
                visualizer=dict(type='V', vis_backends=[dict(type='LocalVisBackend')]),
            )
        )

    def test_classifier(self, tmp_path):
        cfg = self.config('mmpretrain', dict(type='VisualizationHook', enable=False))
        use_visualization(cfg, False, str(tmp_path), 3, 1.5)
        hook = dict(cfg.default_hooks.visualization)
        assert hook.pop('type') == 'VisualizationHook'
        assert hook == dict(
            enable=True, out_dir=str(tmp_path), show=False, interval=3, wait_time=1.5
        )
        self.build('mmpretrain', cfg)

    @pytest.mark.parametrize(
        'scope, name',
        [('mmdet', 'DetVisualizationHook'), ('mmseg', 'SegVisualizationHook')],
    )
    def test_other_toolboxes(self, tmp_path, scope, name):
        cfg = self.config(scope, dict(type=name))
        use_visualization(cfg, False, str(tmp_path), 3, 1.5)
        hook = dict(cfg.default_hooks.visualization)
        assert hook.pop('type') == name
        assert hook == dict(draw=True, show=False, interval=3, wait_time=1.5)
        assert cfg.visualizer.save_dir == str(tmp_path)
        self.build(scope, cfg)

    def build(self, scope, cfg):
        """The hook itself must know all of its arguments."""
        import_models(scope)
        from mmengine.registry import HOOKS
        from mmengine.visualization import Visualizer

        Visualizer.get_instance(f'visualizer-{scope}')
        with DefaultScope.overwrite_default_scope(scope):
            hook = HOOKS.build(cfg.default_hooks.visualization)
        assert hook.interval == 3

    def test_windows_need_a_display(self, monkeypatch):
        monkeypatch.setattr('sys.platform', 'linux')
        monkeypatch.delenv('DISPLAY', raising=False)
        monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
        cfg = self.config('mmseg', dict(type='SegVisualizationHook'))
        with pytest.raises(ValueError, match='--show needs a display'):
            use_visualization(cfg, True, None, 1, 2)

    def test_windows_without_files(self, monkeypatch):
        monkeypatch.setenv('DISPLAY', ':0')
        cfg = self.config('mmseg', dict(type='SegVisualizationHook'))
        use_visualization(cfg, True, None, 1, 2)
        assert cfg.default_hooks.visualization.show is True
        assert 'save_dir' not in cfg.visualizer

    @pytest.mark.parametrize('hooks', [{}, dict(default_hooks={})])
    def test_missing(self, hooks):
        with pytest.raises(ValueError, match='need a visualization hook'):
            use_visualization(Config(hooks), False, 'shown', 1, 2)


def tiny_config(tmp_path, **options):
    """A config of a tiny network, to train on nothing that is on a disk."""
    loader = dict(
        batch_size=8,
        num_workers=0,
        dataset=dict(type='Colours', size=24),
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    base = dict(
        launcher='none',
        model=dict(type='TinyClassifier'),
        work_dir=str(tmp_path),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=2),
        test_dataloader=loader,
        test_cfg=dict(),
        test_evaluator=dict(type='Logits'),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        randomness=dict(seed=0),
        experiment_name=f'config-{tmp_path.name}',
    )
    return Config({**base, **options})


class TestAddHook:
    def test_adds(self):
        cfg = Config(dict())
        add_hook(cfg, 'EMAHook')
        add_hook(cfg, 'EMAHook')
        assert cfg.custom_hooks == [dict(type='EMAHook')]

    @pytest.mark.parametrize('kind', ['EMAHook', 'mmengine.EMAHook', EMAHook])
    @pytest.mark.parametrize('place', ['custom', 'default'])
    def test_there_already(self, kind, place):
        hook = dict(type=kind, momentum=0.5)
        hooks = dict(
            custom_hooks=[hook] if place == 'custom' else None,
            default_hooks=dict(logger=None, own=hook) if place == 'default' else None,
        )
        cfg = Config(hooks)
        add_hook(cfg, 'EMAHook')
        assert cfg.to_dict() == Config(hooks).to_dict()


class TestBuildRunner:
    @pytest.fixture(autouse=True)
    def dataset(self, monkeypatch):
        from mmengine.registry import DATASETS
        from runners import Colours

        monkeypatch.setitem(DATASETS.module_dict, 'Colours', Colours)

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

    def test_missing_data(self, tmp_path):
        work_dir = tmp_path / 'work'
        cfg = tiny_config(work_dir)
        cfg.train_dataloader.dataset = dict(type='Any', data_root='none')
        with pytest.raises(FileNotFoundError, match="data folder 'none'"):
            build_runner(cfg, ('train',))
        assert not work_dir.exists()

    def test_test_of_another_network(self, tmp_path):
        """MMEngine would test what its random weights give."""
        path = self.checkpoint(tmp_path, TinyClassifier(width=4).state_dict())
        cfg = tiny_config(tmp_path / 'work', load_from=path)
        with pytest.raises(CheckpointError, match='does not fit the config'):
            build_runner(cfg, ('test',))
        # Training from the weights of another network is everybody's right.
        build_runner(cfg, ('train',))

    def test_test_of_a_training_form_in_a_deployed_network(self, tmp_path):
        path = self.checkpoint(tmp_path)
        cfg = tiny_config(
            tmp_path / 'work',
            load_from=path,
            model=dict(type='TinyClassifier', deploy=True),
        )
        build_runner(cfg, ('test',)).test()

    def test_test_of_a_deployed_checkpoint(self, tmp_path):
        path = self.checkpoint(
            tmp_path, switch_to_deploy(TinyClassifier()).state_dict()
        )
        cfg = tiny_config(tmp_path / 'work', load_from=path)
        with pytest.raises(CheckpointError, match='deploy=True'):
            build_runner(cfg, ('test',))
        cfg.model.deploy = True
        build_runner(cfg, ('test',)).test()

    def test_time_augmentation(self, tmp_path):
        """The checkpoint is the module's inside."""
        path = self.checkpoint(tmp_path)
        model = dict(type='TinyTTA', module=dict(type='TinyClassifier'))
        cfg = tiny_config(tmp_path / 'work', load_from=path, model=model)
        cfg.test_dataloader.dataset.flips = True
        build_runner(cfg, ('test',)).test()

    def test_resumes(self, tmp_path):
        runner = build_runner(tiny_config(tmp_path), ('train',))
        runner.train()
        cfg = tiny_config(tmp_path, resume=True)
        cfg.train_cfg.max_epochs = 3
        cfg.experiment_name += '-resumed'
        resumed = build_runner(cfg, ('train',))
        resumed.train()
        assert (resumed.epoch, resumed.iter) == (3, 9)
        assert (tmp_path / 'epoch_3.pth').is_file()

    def test_resume_without_a_checkpoint_starts(self, tmp_path):
        runner = build_runner(tiny_config(tmp_path, resume=True), ('train',))
        runner.train()
        assert runner.iter == 6

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

    def test_resume_from_weights_alone(self, tmp_path):
        path = self.checkpoint(tmp_path)
        cfg = tiny_config(tmp_path / 'work', resume=True, load_from=path)
        words = 'not the state of a training run to resume .message_hub, meta, optimi'
        with pytest.raises(CheckpointError, match=words):
            build_runner(cfg, ('train',))

    def test_resume_leaves_out_what_is_damaged(self, tmp_path):
        build_runner(tiny_config(tmp_path), ('train',)).train()
        (tmp_path / 'epoch_2.pth').write_bytes(b'')
        cfg = tiny_config(tmp_path, resume=True)
        cfg.experiment_name += '-resumed'
        seen = []
        runner = build_runner(cfg, ('train',))
        runner.register_hook(Probe(before_train=lambda r: seen.append(r.iter)))
        runner.train()
        assert seen == [3] and runner.iter == 6
        for path in tmp_path.glob('*.pth'):
            path.write_bytes(b'')
        with pytest.raises(CheckpointError, match='can be resumed from'):
            build_runner(tiny_config(tmp_path, resume=True), ('train',))

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

    @pytest.mark.parametrize(
        'options',
        [
            dict(optim_wrapper=dict(optimizer=dict(type='SGD', rate=0.1))),
            dict(param_scheduler=dict(type='Nothing')),
        ],
    )
    def test_errors_before_a_loop(self, tmp_path, options):
        """MMEngine builds optimizers and schedulers when the training starts."""
        cfg = tiny_config(tmp_path, **options)
        words = 'error: .*(rate|Nothing)'
        with pytest.raises(SystemExit, match=words), one_line_errors():
            build_runner(cfg, ('train',)).train()

    def test_resume_with_an_empty_pointer(self, tmp_path):
        (tmp_path / 'last_checkpoint').write_text('')
        runner = build_runner(tiny_config(tmp_path, resume=True), ('train',))
        runner.train()
        assert runner.iter == 6

    def test_resume_takes_the_seed_along(self, tmp_path):
        cfg = tiny_config(tmp_path, randomness=dict(seed=None))
        drawn = build_runner(cfg, ('train',))
        drawn.train()
        cfg = tiny_config(tmp_path, resume=True, randomness=dict(seed=None))
        cfg.experiment_name += '-resumed'
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

    def test_replaces_every_sync_bn(self):
        model = ConfigDict(self.norms())
        assert config_module._replace_sync_bn(model)
        assert 'SyncBN' not in repr(model)
        assert repr(model).count("'BN'") == 5
        assert model.neck.norm_cfg == dict(type='GN', num_groups=2)
        assert model.backbone.norm_cfg.requires_grad is True

    def test_finds_none(self):
        model = ConfigDict(backbone=dict(norm_cfg=dict(type='BN')), heads=[1, None])
        assert not config_module._replace_sync_bn(model)
        assert not config_module._replace_sync_bn(ConfigDict())

    def test_runs(self, launched, tmp_path, monkeypatch):
        from mmengine.registry import DATASETS
        from runners import Colours

        monkeypatch.setitem(DATASETS.module_dict, 'Colours', Colours)
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
        config_module._leave_process_group()
        assert 'pt_gloo_runloop' not in threads(), 'they abort a process that ends'

    @pytest.mark.parametrize('device', ['cuda', 'npu', 'mlu', 'musa'])
    def test_accelerators_are_left_to_mmengine(self, monkeypatch, tmp_path, device):
        monkeypatch.setattr(config_module, 'get_device', lambda: device)
        monkeypatch.setattr(config_module.Runner, 'from_cfg', lambda cfg: cfg)
        cfg = tiny_config(tmp_path, launcher='pytorch', model=self.norms())
        build_runner(cfg, ())
        assert not distributed.is_initialized()
        assert 'model_wrapper_cfg' not in cfg and 'SyncBN' in cfg.pretty_text

    def test_ranks_of_open_mpi(self, monkeypatch):
        monkeypatch.setattr(os, 'environ', {'MASTER_ADDR': 'here'})
        with pytest.raises(ValueError, match='OMPI_COMM_WORLD_RANK is not set'):
            config_module._name_ranks_as_torchrun('mpi')
        theirs = dict(RANK='3', LOCAL_RANK='1', SIZE='4')
        os.environ.update({f'OMPI_COMM_WORLD_{k}': v for k, v in theirs.items()})
        config_module._name_ranks_as_torchrun('mpi')
        expected = dict(RANK='3', LOCAL_RANK='1', WORLD_SIZE='4', MASTER_ADDR='here')
        assert os.environ.items() > expected.items()

    def test_find_unused_parameters(self, launched, tmp_path):
        cfg = tiny_config(tmp_path, launcher='pytorch', find_unused_parameters=True)
        assert build_runner(cfg, ()).model.find_unused_parameters

    def test_says_so(self, launched, capsys):
        cfg = Config(dict(model=self.norms(), launcher='pytorch'))
        config_module._prepare_distributed_cpu(cfg)
        assert 'SyncBN needs GPUs' in capsys.readouterr().out
        assert 'SyncBN' not in cfg.pretty_text
