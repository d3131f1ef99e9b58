"""Measures seconds, bytes and operations of a training step and of its parts."""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Optional

import pandas as pd
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from mmorepa import set_channels_last, switch_to_deploy
from mmorepa.analysis.timing import Clock, in_turn
from mmorepa.deployment.onnx_files import OnnxNetwork, export_onnx
from mmorepa.engine import FoldedDistributedDataParallel, FoldedOptimWrapper
from mmorepa.functional import compose_deep_linear
from mmorepa.layers import (
    BranchKernel,
    OREPAConv2d,
    OREPAKernel,
    OREPAPointwiseKernel,
    backward_to_branches,
    folded,
    held,
)


def quartiles(values: pd.Series) -> list[float]:
    """The median, and the quartiles below and above it."""
    return values.quantile([0.5, 0.25, 0.75]).tolist()


def measure_seconds(
    functions: dict[str, Callable[[], object]],
    reference: str,
    rounds: int,
    what: str,
    clock: Clock,
    before: Callable[[], object] = lambda: None,
) -> dict[str, dict]:
    """Seconds of each function, in turn, and over those of ``reference``.

    ``before`` is called before each, and not counted.
    """

    def timed(function: Callable[[], object]) -> float:
        before()
        return clock.seconds(function)

    named = {name: functools.partial(timed, f) for name, f in functions.items()}
    seconds = pd.DataFrame(in_turn(named, clock, rounds, what=what))
    # Within each round, since a machine's speed changes between rounds.
    ratio = seconds.div(seconds[reference], axis=0)
    return {
        name: dict(seconds=quartiles(seconds[name]), ratio=quartiles(ratio[name]))
        for name in functions
    }


class Variant(NamedTuple):
    """One way to train."""

    # The block type; empty for the network of MMPretrain.
    block: str
    # Whether the fold is outside of the graph.
    folded: bool = False
    # Whether every pass differentiates the plain formulas.
    naive: bool = False
    channels_last: bool = True
    # The block type of the stem, where it is another one.
    stem: str = ''
    # Whether CUDA graphs replay the folds.
    capture: bool = False


VARIANTS = {
    'stock': Variant('', channels_last=False),
    'plain, default layout': Variant('plain', channels_last=False),
    'plain': Variant('plain'),
    'plain, OREPA stem': Variant('plain', folded=True, stem='orepa'),
    'DBB': Variant('dbb'),
    'OREPA, naive': Variant('orepa', naive=True),
    'OREPA, online': Variant('orepa'),
    'OREPA, folded, default layout': Variant('orepa', True, channels_last=False),
    'OREPA, folded': Variant('orepa', folded=True),
    'OREPA, captured': Variant('orepa', folded=True, capture=True),
}
# What a user has today, and what others are compared with; the same network with the
# layout of this package's; and the result.
STOCK, PLAIN, OREPA = 'stock', 'plain', 'OREPA, folded'


class Trainer:
    """A variant of an OREPA classifier with its optimizer, one step at a time."""

    def __init__(
        self, cfg: Config, variant: Variant, device: str, amp: Optional[str] = None
    ) -> None:
        torch.manual_seed(0)
        model = copy.deepcopy(cfg.model)
        options = copy.deepcopy(cfg.optim_wrapper)
        if variant.block:
            model.backbone.block = variant.block
            if variant.stem:
                model.backbone.stem_block = variant.stem
            options.update(folded=variant.folded, channels_last=variant.channels_last)
            options.update(capture=variant.capture)
        else:
            model.backbone = stock_backbone(model.backbone)
            options = dict(optimizer=options.optimizer)
        if amp:
            is_cpu = device == 'cpu' and amp == 'bfloat16'
            kind = dict(type='BFloat16OptimWrapper')
            options.update(kind if is_cpu else dict(type='AmpOptimWrapper', dtype=amp))
        self.network = MODELS.build(model).to(device).train()
        self.model: nn.Module = self.network
        if variant.naive:
            for conv in folded_convs(self.network):
                conv.kernel = functools.partial(naive_kernel, conv.branches)
        self.wrapper: OptimWrapper = build_optim_wrapper(self.network, options)

    def forward(self, inputs: Tensor, samples: list) -> Tensor:
        with self.wrapper.optim_context(self.model):
            losses = self.model(inputs, samples, mode='loss')
        loss, _ = self.network.parse_losses(losses)
        return self.wrapper.scale_loss(loss)

    def forward_backward(self, inputs: Tensor, samples: list) -> None:
        self.wrapper.backward(self.forward(inputs, samples))

    def optimize(self) -> None:
        self.wrapper.step()
        self.wrapper.zero_grad()

    def step(self, inputs: Tensor, samples: list) -> None:
        self.forward_backward(inputs, samples)
        self.optimize()

    def parameters(self) -> list[Tensor]:
        """All that forward passes and the optimizer need: held kernels too."""
        parameters = list(self.network.parameters())
        if isinstance(self.wrapper, FoldedOptimWrapper):
            convs = folded_convs(self.network)
            leaves = (conv.training_scope for conv in convs)
            parameters += [leaf.leaf for leaf in leaves if leaf]
        return parameters

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]


def stock_backbone(backbone: dict) -> dict:
    """The config of MMPretrain's own network for one of this package's."""
    stock = {k: v for k, v in backbone.items() if k not in ('block', 'block_cfg')}
    stock['type'] = 'mmpretrain.' + backbone['type'].removeprefix('OREPA')
    if 'base_channels' in stock:
        stock['stem_channels'] = stock['base_channels']
    return stock


def folded_convs(network: nn.Module) -> list[OREPAConv2d]:
    return [m for m in network.modules() if isinstance(m, OREPAConv2d)]


def naive_kernel(branches: nn.Module) -> Tensor:
    """The fold by the plain formulas, whose every term autograd keeps."""
    if isinstance(branches, BranchKernel):
        return branches.branch_sum.kernel(*branches.tensors())
    kernel, *others = (naive_kernel(factor) for factor in branches.factors)
    for other in others:
        kernel = compose_deep_linear(kernel, other, branches.groups)
    return kernel


def measure_steps(
    trainers: dict[str, Trainer], batch: tuple, rounds: int, clock: Clock
) -> dict[str, dict]:
    """Seconds of a step, and of its two phases."""

    def step_of(trainer: Trainer) -> Callable[[], tuple[float, float]]:
        return lambda: (
            clock.seconds(lambda: trainer.forward_backward(*batch)),
            clock.seconds(trainer.optimize),
        )

    steps = {name: step_of(trainer) for name, trainer in trainers.items()}
    phases = in_turn(steps, clock, rounds, what='steps')
    forward_backward, optimizer = (
        pd.DataFrame({name: [pair[i] for pair in phases[name]] for name in phases})
        for i in (0, 1)
    )
    step = forward_backward + optimizer
    measured = dict(
        step=step,
        forward_backward=forward_backward,
        optimizer=optimizer,
        ratio=step.div(step[STOCK], axis=0),
        added=step.sub(step[PLAIN], axis=0),
    )
    return {
        name: {kind: quartiles(frame[name]) for kind, frame in measured.items()}
        for name in trainers
    }


def measure_bytes(trainer: Trainer, batch: tuple) -> dict[str, int]:
    """What a step keeps: exact, and the same on every machine."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):  # not a parameter's own
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in trainer.network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.forward(*batch)
    trainer.wrapper.backward(loss)
    gradients = nbytes(trainer.gradients())
    trainer.wrapper.step()
    gradients = max(gradients, nbytes(trainer.gradients()))
    trainer.wrapper.zero_grad()
    states = trainer.wrapper.optimizer.state.values()
    return dict(
        saved_bytes=sum(n for pointer, n in saved.items() if pointer not in parameters),
        parameter_bytes=nbytes(trainer.parameters()),
        gradient_bytes=gradients,
        optimizer_bytes=nbytes(
            value
            for state in states
            for value in state.values()
            if isinstance(value, Tensor)
        ),
    )


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def measure_all_reduced(trainer: Trainer, batch: tuple) -> int:
    """The bytes that data parallelism would send, counted where it sends them."""
    sent = []

    def hook(
        state: object, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    is_folded = isinstance(trainer.wrapper, FoldedOptimWrapper)
    wrap = FoldedDistributedDataParallel if is_folded else MMDistributedDataParallel
    trainer.model = wrap(trainer.network)
    trainer.model.register_comm_hook(None, hook)
    try:
        trainer.step(*batch)
    finally:
        trainer.model = trainer.network
    return sum(sent)


@contextmanager
def process_group(device: str) -> Iterator[None]:
    backend = 'nccl' if torch.device(device).type == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure_peak_memory(trainer: Trainer, batch: tuple) -> int:
    """What a step allocates on a GPU beyond what is there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.step(*batch)
    return torch.cuda.max_memory_allocated() - before


def measure_fold(network: nn.Module, rounds: int, clock: Clock) -> dict[str, dict]:
    """Seconds of all folds of a network with their derivatives, and of their floor.

    The floor is what no fold can do without: for each product of two weights, itself
    and the two products of its derivative.
    """
    convs = folded_convs(network)
    grads = [torch.randn_like(conv.kernel()).detach() for conv in convs]
    products = [
        factors(module)
        for conv in convs
        for module in conv.branches.modules()
        if isinstance(module, (OREPAKernel, OREPAPointwiseKernel))
    ]
    products = [(a, b, torch.randn_like(a @ b)) for a, b in products]

    @torch.no_grad()
    def floor() -> None:
        for second, first, grad in products:
            second @ first
            grad @ first.mT
            second.mT @ grad

    def naive() -> None:
        torch.autograd.backward([naive_kernel(c.branches) for c in convs], grads)

    def online() -> None:
        torch.autograd.backward([conv.kernel() for conv in convs], grads)

    def fold_and_backward() -> None:
        with held(network) as kernels:
            for kernel, grad in zip(kernels, grads):
                kernel.leaf.grad = grad
            backward_to_branches(kernels)

    functions = dict(floor=floor, naive=naive, online=online, folded=fold_and_backward)
    figures = measure_seconds(
        functions, 'floor', rounds, 'folds', clock, before=network.zero_grad
    )
    network.zero_grad()
    return figures


@torch.no_grad()
def factors(kernel: nn.Module) -> tuple[Tensor, Tensor]:
    """The two matrices, one pair for each group, whose product a kernel contains."""
    groups = kernel.branch_sum.groups
    if isinstance(kernel, OREPAPointwiseKernel):
        second, first = kernel.weight_second, kernel.weight_first
        second = second.reshape(groups, -1, second.shape[1])
    else:
        second, first = kernel.weight_pointwise_kxk_2, kernel.weight_pointwise_kxk_1
        second = second.reshape(groups, -1, second.shape[-1])
    first = first.reshape(groups, -1, first.shape[1])
    pair = second.detach(), first.detach()
    return tuple(x.squeeze(0) for x in pair)


@torch.no_grad()
def measure_inference(
    cfg: Config, images: Tensor, rounds: int, clock: Clock
) -> dict[str, dict]:
    """Seconds of a forward pass in eval mode, over the plain network's folded one."""
    device = str(images.device)

    def build(block: str, channels_last: bool) -> nn.Module:
        torch.manual_seed(0)
        model = copy.deepcopy(cfg.model)
        model.backbone.block = block
        model = MODELS.build(model).to(device).eval()
        return set_channels_last(model, channels_last)

    reference, networks, in_blocks = 'plain, BatchNorm folded', {}, []
    for layout, channels_last in (('', False), (', channels last', True)):
        plain, orepa = build('plain', channels_last), build('orepa', channels_last)
        in_blocks.append(copy.deepcopy(orepa))
        networks |= {
            reference + layout: switch_to_deploy(copy.deepcopy(plain)),
            'plain' + layout: plain,
            'OREPA, training form' + layout: orepa,
            'OREPA, in a folded() block' + layout: in_blocks[-1],
            'OREPA, deployed' + layout: switch_to_deploy(copy.deepcopy(orepa)),
        }
    functions = {n: lambda net=net: net(images) for n, net in networks.items()}
    if find_spec('onnx') and find_spec('onnxruntime') and not images.is_cuda:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'network.onnx')
            export_onnx(networks['OREPA, deployed'], images[:1], path)
            network = OnnxNetwork(path)
        functions['OREPA, deployed, ONNX Runtime'] = lambda: network(images)
    with folded(in_blocks[0]), folded(in_blocks[1]):
        return measure_seconds(functions, reference, rounds, 'inference', clock)
