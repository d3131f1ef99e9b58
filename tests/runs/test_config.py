import pytest
import torch
from helpers import counted_folds, import_models
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import DefaultScope
from runners import TinyClassifier

import mmorepa.runs.config as config_module
from mmorepa.engine import BFloat16OptimWrapper
from mmorepa.runs import add_hook, use_amp, use_tta, use_visualization


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

    @pytest.mark.parametrize('device', ['cuda', 'npu'])
    @pytest.mark.parametrize('folded', ['', 'Folded'])
    def test_with_accelerator(self, monkeypatch, device, folded):
        monkeypatch.setattr(config_module, 'get_device', lambda: device)
        cfg = self.config(type=f'{folded}OptimWrapper', clip_grad=dict(max_norm=1))
        use_amp(cfg)
        assert cfg.optim_wrapper.type == f'{folded}AmpOptimWrapper'
        assert cfg.optim_wrapper.clip_grad == dict(max_norm=1)
        cfg = self.config(loss_scale=512.0)
        use_amp(cfg)
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert cfg.optim_wrapper.loss_scale == 512.0

    @pytest.mark.parametrize('kind', ['FoldedAmpOptimWrapper', 'BFloat16OptimWrapper'])
    def test_on_already(self, kind):
        cfg = self.config(type=kind)
        use_amp(cfg)
        assert cfg.to_dict() == self.config(type=kind).to_dict()

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

    def test_of_the_config(self):
        own = [dict(type='Own')]
        cfg = self.config('mmdet', tta_model=dict(type='Mine', k=1), tta_pipeline=own)
        cfg.test_dataloader.dataset = dict(
            type='R', dataset=cfg.test_dataloader.dataset
        )
        use_tta(cfg)
        assert cfg.model.to_dict() == dict(
            type='Mine', k=1, module=dict(type='ImageClassifier')
        )
        assert cfg.test_dataloader.dataset.dataset.pipeline == own

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

    @pytest.mark.parametrize(
        'scope, name, expected',
        [
            ('mmpretrain', 'VisualizationHook', dict(enable=True)),
            ('mmdet', 'DetVisualizationHook', dict(draw=True)),
            ('mmseg', 'SegVisualizationHook', dict(draw=True)),
        ],
    )
    def test_folder(self, tmp_path, scope, name, expected):
        """The hook itself knows all of its arguments."""
        cfg = self.config(scope, dict(type=name))
        options = dict(show=False, interval=3, wait_time=1.5)
        use_visualization(cfg, str(tmp_path), **options)
        hook = dict(cfg.default_hooks.visualization)
        if scope == 'mmpretrain':
            expected['out_dir'] = str(tmp_path)
        else:
            assert cfg.visualizer.save_dir == str(tmp_path)
        expected.update(type=name, **options)
        assert hook == expected
        import_models(scope)
        from mmengine.registry import HOOKS
        from mmengine.visualization import Visualizer

        Visualizer.get_instance(f'visualizer-{scope}')
        with DefaultScope.overwrite_default_scope(scope):
            assert HOOKS.build(cfg.default_hooks.visualization).interval == 3

    def test_windows_need_a_display(self, monkeypatch):
        monkeypatch.setattr('sys.platform', 'linux')
        monkeypatch.delenv('DISPLAY', raising=False)
        monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
        cfg = self.config('mmseg', dict(type='SegVisualizationHook'))
        with pytest.raises(ValueError, match='--show needs a display'):
            use_visualization(cfg, None, show=True)

    @pytest.mark.parametrize('hooks', [{}, dict(default_hooks={})])
    def test_missing(self, hooks):
        with pytest.raises(ValueError, match='need a visualization hook'):
            use_visualization(Config(hooks), 'shown', show=False)


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
