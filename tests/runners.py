"""A network, data and a runner small enough to train within a second."""

import copy
import itertools

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from mmorepa import runs
from mmorepa.converters import read_checkpoint
from mmorepa.layers import OREPAConv2d

CLASSES = 4
_numbers = itertools.count()


@MODELS.register_module(force=True)
class TinyClassifier(BaseModel):
    """Two OREPA convs and a linear layer.

    Args:
        width (int): Channels.
        deploy (bool): Whether it is built in deployed form.
        norm_eval (bool): Whether training normalises by fixed statistics, so that a
            batch may be split.
    """

    def __init__(self, width=8, deploy=False, norm_eval=False, **kwargs):
        super().__init__(**kwargs)
        self.norm_eval = norm_eval
        options = dict(bias=False, norm_cfg=dict(type='BN'), deploy=deploy)
        self.conv1 = OREPAConv2d(
            3, width, 3, stride=2, padding=1, act_cfg=dict(type='ReLU'), **options
        )
        self.conv2 = OREPAConv2d(width, width, 1, **options)
        self.head = nn.Linear(width, CLASSES)

    def train(self, mode=True):
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, inputs, labels=None, mode='tensor'):
        logits = self.head(F.relu(self.conv2(self.conv1(inputs))).mean(dim=(2, 3)))
        if mode == 'tensor':
            return logits
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, labels))
        return [dict(logits=a, label=b) for a, b in zip(logits, labels)]


class BackboneClassifier(BaseModel):
    """A linear layer on the last maps of a backbone.

    Args:
        backbone (dict): Its config.
    """

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.fc = nn.Linear(self.backbone.feat_dim, 10)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        logits = self.fc(self.backbone(inputs)[-1].mean(dim=(2, 3)))
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, data_samples))
        return logits


@MODELS.register_module(force=True)
class TinyTTA(BaseTTAModel):
    """Averages the logits."""

    def merge_preds(self, data_samples_list):
        return [
            dict(
                logits=torch.stack([s['logits'] for s in samples]).mean(0),
                label=samples[0]['label'],
            )
            for samples in data_samples_list
        ]


@DATASETS.register_module(force=True)
class Colours(Dataset):
    """Noise about one of four colours, the same at every start.

    Args:
        size (int): Number of images.
        flips (bool): Whether an item holds an image and its mirror image, as
            test-time augmentation has it.
    """

    def __init__(self, size, flips=False):
        generator = torch.Generator().manual_seed(size)
        colours = torch.randn(CLASSES, 3, 1, 1, generator=generator)
        self.labels = torch.arange(size) % CLASSES
        noise = torch.randn(size, 3, 8, 8, generator=generator)
        self.images = colours[self.labels] + noise
        self.flips = flips

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image, label = self.images[i], self.labels[i]
        if self.flips:
            return [image, image.flip(-1)], [label, label]
        return image, label


@METRICS.register_module(force=True)
class Logits(BaseMetric):
    """Accuracy; keeps the logits for the test to look at."""

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        self.logits = torch.stack([r['logits'] for r in results])
        labels = torch.stack([torch.as_tensor(r['label']) for r in results])
        return dict(accuracy=(self.logits.argmax(1) == labels).double().mean().item())


@HOOKS.register_module(force=True)
class Probe(Hook):
    """Calls ``functions[name](runner)`` at the points that are named."""

    priority = 'LOWEST'

    def __init__(self, **functions):
        for name, function in functions.items():
            setattr(self, name, lambda runner, *_, f=function, **__: f(runner))


def colours_loader(**options):
    """The config of a dataloader of :class:`Colours`, or of another dataset."""
    return dict(
        dict(
            batch_size=8,
            num_workers=0,
            dataset=dict(type='Colours', size=24),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        **options,
    )


def make_runner(work_dir, model=None, kind=Runner, **options):
    """A runner of a :class:`TinyClassifier`; ``options`` are the Runner's own."""
    torch.manual_seed(0)
    loader = colours_loader(dataset=Colours(24))
    arguments = dict(
        model=TinyClassifier() if model is None else model,
        work_dir=str(work_dir),
        train_dataloader=loader,
        val_dataloader=copy.deepcopy(loader),
        test_dataloader=copy.deepcopy(loader),
        train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
        val_cfg=dict(),
        test_cfg=dict(),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-4)
        ),
        val_evaluator=dict(type='Logits'),
        test_evaluator=dict(type='Logits'),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        randomness=dict(seed=0),
        # Loggers and message hubs are looked up by this name.
        experiment_name=f'test-{next(_numbers)}',
    )
    arguments.update(options)
    return kind(**arguments)


def tiny_config(work_dir, **options):
    """A config of a tiny network, to train on nothing that is on a disk."""
    loader = colours_loader()
    base = dict(
        launcher='none',
        model=dict(type='TinyClassifier'),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=2),
        test_dataloader=loader,
        test_cfg=dict(),
        test_evaluator=dict(type='Logits'),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        randomness=dict(seed=0),
        experiment_name=f'config-{next(_numbers)}',
    )
    return Config({**base, **options})


def build_runner(cfg, phases, is_verbose=True):
    """The steps of tools/train.py, or of tools/test.py for the phase 'test'."""
    runs.check_data_folders(cfg, phases)
    runs.name_broken_images()
    if 'test' in phases and cfg.get('load_from') and not cfg.get('resume'):
        checkpoint = read_checkpoint(cfg.load_from)
    else:
        checkpoint = runs.find_start(cfg)
    runs.set_up_distributed_cpu(cfg)
    runner = runs.make_runner(cfg, is_verbose)
    runs.check_start(runner, checkpoint)
    return runner


def make_test_runner(work_dir, model=None, **options):
    """As :func:`make_runner`, without what training needs."""
    training = dict.fromkeys(
        f'{phase}_{part}'
        for phase in ('train', 'val')
        for part in ('dataloader', 'cfg', 'evaluator')
        if f'{phase}_{part}' != 'train_evaluator'
    )
    return make_runner(
        work_dir, model, **{**training, 'optim_wrapper': None, **options}
    )


def logits_tested(runner):
    """What the last test of this runner gave."""
    return runner.test_loop.evaluator.metrics[0].logits


@torch.no_grad()
def logits_of(model, state_dict=None):
    """The logits of a :class:`TinyClassifier` for the data that are tested."""
    model = copy.deepcopy(model).eval()
    if state_dict is not None:
        model.load_state_dict(state_dict)
    # In batches as the runner's, since rounding depends on their size.
    return torch.cat([model(images) for images in Colours(24).images.split(8)])
