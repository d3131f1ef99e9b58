"""Whole detectors and segmenters in MMEngine's runner, on real images."""

import copy
import itertools

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from runners import build_runner
from scenes import NAMES, load
from torch.nn.modules.batchnorm import _BatchNorm

from mmorepa import is_switchable
from mmorepa.layers import ReparamConv2d
from mmorepa.runs import use_amp

DETECTORS = ['faster-rcnn_r18-slim-orepa_fpn', 'retinanet_r18-slim-orepa_fpn']
SEGMENTERS = ['pspnet_r18-slim-orepa', 'deeplabv3plus_r18-slim-orepa']
_numbers = itertools.count()


def read(path, work_dir, **options):
    """The config, with options merged into it, for a runner of its own."""
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options)
    cfg.work_dir = str(work_dir)
    cfg.launcher = 'none'
    cfg.experiment_name = f'transfer-{next(_numbers)}'
    load_scope(cfg)
    return cfg


def load_scope(cfg):
    """Registers the toolbox, or skips the test where it is missing."""
    name = 'faster-rcnn' if cfg.default_scope == 'mmdet' else 'pspnet'
    load(next(n for n in NAMES if name in n))


class Watch(Hook):
    """Calls a function before every iteration of the training."""

    priority = 'VERY_LOW'

    def __init__(self, before_iter=None, after_iter=None):
        self.before, self.after = before_iter, after_iter

    def before_train_iter(self, runner, *args, **kwargs):
        if self.before:
            self.before(runner)

    def after_train_iter(self, runner, *args, **kwargs):
        if self.after:
            self.after(runner)


@pytest.fixture(scope='module')
def trained(short_config, tmp_path_factory):
    """Trains each model once: the config, the checkpoint, the metrics."""
    results = {}

    def train(name):
        if name not in results:
            work_dir = tmp_path_factory.mktemp('work')
            path = short_config(name)
            torch.manual_seed(0)
            runner = Runner.from_cfg(read(path, work_dir))
            runner.train()
            results[name] = path, (work_dir / 'last_checkpoint').read_text()
        return results[name]

    return train


@pytest.mark.slow
@pytest.mark.parametrize('name', DETECTORS + SEGMENTERS)
def test_equal_through_the_hook(name, trained, tmp_path):
    """The metrics and every prediction, with and without the switch."""
    path, checkpoint = trained(name)
    predictions = []

    class Keep(Hook):
        def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            kept.extend(copy.deepcopy(outputs))
            assert is_switchable(runner.model) == (not hooks)

    for hooks in ([], [dict(type='SwitchToDeployHook')]):
        kept = []
        cfg = read(path, tmp_path, load_from=checkpoint, custom_hooks=hooks)
        runner = build_runner(cfg, ('test',))
        runner.register_hook(Keep())
        metrics = runner.test()
        predictions.append((metrics, kept))
    (metrics, before), (metrics_deployed, after) = predictions
    assert len(before) == len(after) == 3
    assert metrics.keys() == metrics_deployed.keys()
    for key, value in metrics.items():
        if isinstance(value, (int, float)):
            assert value == pytest.approx(metrics_deployed[key], abs=0.1, nan_ok=True)
    for a, b in zip(before, after):
        if name in SEGMENTERS:
            logits = a.seg_logits.data
            assert logits.std() > 0
            largest = logits.abs().max().item()
            assert torch.allclose(logits, b.seg_logits.data, atol=1e-4 * largest)
        else:
            # Of the last boxes, some may come or go with the rounding.
            first, second = (x.pred_instances.scores[:20] for x in (a, b))
            assert len(first) == len(second) == 20
            assert first.max() > 1e-3
            assert torch.allclose(first, second, atol=1e-4)


OPTIONS = {
    # Without statistics of a pretraining, only small steps keep the numbers finite.
    'norm_eval': {
        'model.backbone.norm_eval': True,
        'optim_wrapper.optimizer.lr': 1e-5,
    },
    'frozen_stages': {
        'model.backbone.frozen_stages': 1,
    },
    'with_cp': {'model.backbone.with_cp': True},
    'SyncBN': {'model.backbone.norm_cfg': dict(type='SyncBN', requires_grad=True)},
    'accumulation': {'optim_wrapper.accumulative_counts': 2},
    'EMA': {'custom_hooks': [dict(type='EMAHook'), dict(type='SwitchToDeployHook')]},
    'amp': {},
}


@pytest.mark.slow
@pytest.mark.parametrize('name', [DETECTORS[1], SEGMENTERS[0]])
@pytest.mark.parametrize('option', OPTIONS)
def test_options_of_training(name, option, short_config, tmp_path):
    options = OPTIONS[option]
    cfg = read(short_config(name), tmp_path, **options)
    if option == 'frozen_stages':
        # A multiplier for a frozen stem is an error.
        cfg.optim_wrapper.paramwise_cfg = {}
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if option == 'amp':
        use_amp(cfg)
    runner = build_runner(cfg, ('train',))
    backbone = runner.model.backbone
    folds, moves, states = [], [], []
    conv = backbone.layer2[0].conv1
    conv.branches.register_forward_hook(lambda *_: folds.append(1))

    def before(runner):
        folds.clear()
        states.append({k: v.clone() for k, v in backbone.state_dict().items()})
        norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
        training = [m.training for m in norms]
        if option == 'norm_eval':
            assert not any(training)
        elif option == 'frozen_stages':
            assert not backbone.stem.training and not backbone.layer1.training
            assert backbone.layer2.training
        else:
            assert all(training)

    def after(runner):
        moves.append(
            {
                k
                for k, v in backbone.state_dict().items()
                if not torch.equal(v, states[-1][k])
            }
        )

    runner.register_hook(Watch(before, after))
    runner.train()
    assert runner.iter >= 2
    changed = set().union(*moves)
    params = {k for k, _ in backbone.named_parameters()}
    if option == 'accumulation':
        assert not moves[0] & params and moves[1] & params
    if option == 'norm_eval':
        assert not any('running' in key for key in changed)
    if option == 'frozen_stages':
        frozen = ('stem.', 'layer1.')
        assert not any(key.startswith(frozen) for key in changed)
    else:
        assert any(key.startswith('stem.') for key in changed)
    last = f'{backbone.stage_names[-1]}.'
    assert any(key.startswith(last) for key in changed)
    assert all(torch.isfinite(p).all() for p in backbone.parameters())
    convs = [m for m in backbone.modules() if isinstance(m, ReparamConv2d)]
    assert convs and not any(m.deployed for m in convs)
    if option == 'EMA':
        runner.load_checkpoint((tmp_path / 'last_checkpoint').read_text())
        cfg = read(short_config(name), tmp_path, **options)
        cfg.load_from = (tmp_path / 'last_checkpoint').read_text()
        runner = build_runner(cfg, ('test',))
        runner.test()
        assert not is_switchable(runner.model)
