"""``compile`` in a config: MMEngine hands the whole training step to torch.compile."""

import pytest
import torch
from helpers import classifier_cfg, import_models, trained_like
from mmengine.hooks import Hook
from mmengine.registry import MODELS, init_default_scope
from runners import colours_loader, make_runner
from torch import _dynamo
from torch.utils.data import Dataset

from mmorepa.engine import FoldedOptimWrapper

EPOCHS, STEPS, CONVS = 3, 3, 5
SMALL = dict(depth=18, base_channels=8, num_stages=1, out_indices=(0,))
SMALL.update(strides=(1,), dilations=(1,))
PLAIN = dict(type='ResNet', stem_channels=8, **SMALL)
OREPA = dict(type='OREPAResNet', **SMALL)


class Images(Dataset):
    def __len__(self):
        return 8 * STEPS

    def __getitem__(self, i):
        from mmpretrain.structures import DataSample

        generator = torch.Generator().manual_seed(i)
        image = torch.randint(0, 255, (3, 32, 32), generator=generator)
        # A new one each time: the model writes its predictions into it.
        sample = DataSample().set_gt_label(i % 4)
        return dict(inputs=image.to(torch.uint8), data_samples=sample)


class Losses(Hook):
    def __init__(self):
        self.found = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.found.append(outputs['loss'].item())


def train(folder, backbone, compiled):
    """The losses of a training with validation in between, and the wrapper's class."""
    import_models('mmpretrain')
    init_default_scope('mmpretrain')
    preprocessor = dict(mean=[127.0] * 3, std=[60.0] * 3, num_classes=4)
    cfg = classifier_cfg(backbone, 8, 4, data_preprocessor=preprocessor)
    model = MODELS.build(cfg)
    losses = Losses()
    loader = colours_loader(dataset=Images(), collate_fn=dict(type='pseudo_collate'))
    runner = make_runner(
        folder,
        trained_like(model),
        cfg=dict(compile=compiled),
        train_dataloader=loader,
        val_dataloader=dict(loader),
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS, val_interval=1),
        val_evaluator=dict(type='Accuracy'),
        optim_wrapper=dict(
            constructor='OREPAOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.01, momentum=0.9),
        ),
        default_scope='mmpretrain',
        custom_hooks=[losses, dict(type='FoldedEvaluationHook')],
    )
    runner.train()
    assert len(losses.found) == EPOCHS * STEPS
    return losses.found, type(runner.optim_wrapper)


@pytest.fixture
def graphs():
    """The operations of every graph that is compiled."""
    found = []

    @_dynamo.register_backend(name='counted')
    def counted(graph, inputs):
        calls = ('call_function', 'call_method', 'call_module')
        found.append([str(n.target) for n in graph.graph.nodes if n.op in calls])
        return _dynamo.lookup_backend('aot_eager')(graph, inputs)

    _dynamo.reset()
    yield found
    _dynamo.reset()
    _dynamo.backends.registry._BACKENDS.pop('counted')


@pytest.mark.slow
def test_compiled_steps(graphs, tmp_path):
    """One graph, as that of a plain network; the fold stays outside of it."""
    eager, wrapper = train(tmp_path, OREPA, False)
    assert wrapper is FoldedOptimWrapper
    found = []
    for backbone in (PLAIN, OREPA):
        _dynamo.reset(), graphs.clear()
        # Raises where a training would warn and go on without a graph.
        with _dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            losses, _ = train(tmp_path, backbone, dict(backend='counted'))
        networks = [g for g in graphs if any('conv' in op for op in g)]
        assert all(sum('conv' in op for op in g) == CONVS for g in networks)
        found.append((len(networks), max(map(len, networks))))
    assert losses == pytest.approx(eager, rel=1e-4)
    assert found[1] == found[0]
