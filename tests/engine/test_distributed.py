"""Data-parallel training has the gradients of training on the whole batch."""

import pytest
import torch
from helpers import assert_near
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from mmorepa.backbones import OREPAResNet
from mmorepa.converters import read_checkpoint
from mmorepa.layers import OREPAConv2d

STEPS, BATCH = 3, 4
FROZEN = (-1, 1)


class Network(nn.Module):
    """Normalises by fixed statistics, so that a batch may be split."""

    def __init__(self, frozen_stages):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = OREPAResNet(
            50,
            base_channels=2,
            num_stages=2,
            strides=(1, 2),
            dilations=(1, 1),
            out_indices=(1,),
            norm_eval=True,
            frozen_stages=frozen_stages,
        )
        width = self.backbone.feat_dim
        self.tower = OREPAConv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        (x,) = self.backbone(x)
        # One conv at two places, as the heads of detectors have them.
        return self.head(self.tower(self.tower(x).relu())).square().log1p().mean()


def train(model, images):
    """A few steps; the gradients of the last are left."""
    wanted = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    for batch in images:
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    return model


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, 3, 16, 16, generator=generator).double()


def result_of(model):
    grads = {
        f'{name}.grad': param.grad
        for name, param in model.named_parameters()
        if param.requires_grad
    }
    return {**model.state_dict(), **grads}


def worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2
    )
    for frozen_stages in FROZEN:
        model = Network(frozen_stages).double().train()
        half = data().chunk(2, dim=1)[rank]
        train(DistributedDataParallel(model, broadcast_buffers=False), half)
        torch.save(result_of(model), f'{folder}/{frozen_stages}-{rank}.pth')
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for frozen_stages in FROZEN:
        start = Network(frozen_stages).double().train()
        before = {k: v.clone() for k, v in start.state_dict().items()}
        expected = result_of(train(start, data()))
        moved = [k for k, v in before.items() if not torch.equal(v, expected[k])]
        learns = {k for k, p in start.named_parameters() if p.requires_grad}
        assert set(moved) == learns  # Every parameter takes part, and no statistic.
        assert ('backbone.stem.norm.bias' in learns) == (frozen_stages == -1)

        first, second = (
            read_checkpoint(f'{tmp_path}/{frozen_stages}-{rank}.pth')['state_dict']
            for rank in (0, 1)
        )
        for name, value in expected.items():
            assert torch.equal(first[name], second[name]), name
            if value.is_floating_point() and value.abs().max() > 0:
                assert_near(first[name], value, 1e-9)
        # The halves differ, so that equality is the work of the exchange.
        half = result_of(train(Network(frozen_stages).double().train(), data()[:, :2]))
        for name in ('head.weight.grad', 'backbone.layer2.0.conv2.branches.scale.grad'):
            assert not torch.allclose(half[name], expected[name], rtol=1e-2)


def long_run(dtype, parts=1, perturbation=0.0):
    """46 steps from a loss of about 50: nothing normalises an untrained network."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(46, 8, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (46, 8), generator=generator)
    torch.manual_seed(0)
    backbone = OREPAResNet(18, base_channels=4, norm_eval=True, out_indices=(3,))
    model = nn.Sequential(Features(backbone), nn.Linear(backbone.feat_dim, 10)).train()
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter += perturbation * noise * parameter
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for batch, label in zip(images.to(dtype), labels):
        optimizer.zero_grad()
        # What the average over processes of a part each is.
        halves = zip(batch.chunk(parts), label.chunk(parts))
        loss = sum(nn.functional.cross_entropy(model(x), y) for x, y in halves) / parts
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach() for p in model.parameters() if p.dim() > 1]


class Features(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)[0].mean((2, 3))


@pytest.mark.slow
def test_long_runs_differ_by_their_sensitivity():
    """By how much a run of several processes is off says nothing about the exchange.

    In float64 nothing is off; in float32 it is no more than what a change of the start
    by a few roundings makes, in one process. Either run may come upon a ReLU that the
    last bit of a sum decides, which leads elsewhere.
    """

    def off(found, expected):
        pairs = zip(found, expected)
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

    losses, whole = long_run(torch.float64)
    assert losses[0] > 10 > losses[-1]
    _, halves = long_run(torch.float64, parts=2)
    assert off(halves, whole) < 1e-10
    _, whole = long_run(torch.float32)
    by_halves = off(long_run(torch.float32, parts=2)[1], whole)
    by_rounding = off(long_run(torch.float32, perturbation=1e-6)[1], whole)
    assert by_halves < 2 * by_rounding, (by_halves, by_rounding, losses)
