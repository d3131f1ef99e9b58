import pytest
import torch
from helpers import import_models
from tool_runs import ROOT, run_here


@pytest.fixture(autouse=True)
def like_a_process_of_its_own(monkeypatch):
    """Results that are compared with those of subprocesses, bit by bit."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """The folder of the handwritten digits."""
    pytest.importorskip('sklearn')
    out = tmp_path_factory.mktemp('data') / 'digits'
    run_here('dataset_converters/digits.py', '--out', out)
    return out


@pytest.fixture(scope='session')
def config(digits, tmp_path_factory):
    """A config to train within seconds, on a part of the digits."""
    import_models('mmpretrain')
    base = ROOT / 'configs/digits/resnet18-slim-orepa_1xb64_digits.py'
    path = tmp_path_factory.mktemp('config') / 'small.py'
    path.write_text(f"""
_base_ = {str(base)!r}

# Statistics that follow the weights of the last of so few steps.
norm_cfg = dict(type='BN', momentum=0.5)
model = dict(
    backbone=dict(base_channels=8, norm_cfg=norm_cfg), head=dict(in_channels=64)
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=32, interpolation='bicubic'),
    dict(type='RandomCrop', crop_size=32, padding=1),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root={str(digits)!r}, indices=list(range(0, 1440, 6)), pipeline=pipeline
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root={str(digits)!r}, indices=list(range(0, 355, 3))),
)
test_dataloader = val_dataloader
param_scheduler = [dict(type='LinearLR', start_factor=0.2, by_epoch=False, end=5)]
optim_wrapper = dict(optimizer=dict(lr=0.02))
train_cfg = dict(max_epochs=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=-1))
""")
    return path
