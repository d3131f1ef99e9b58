"""Measures seconds, bytes and operations of a training step and of its parts."""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

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


def times(seconds: pd.DataFrame, reference: str) -> pd.DataFrame:
    """The median of each column, and the quartiles of its ratio to one of them.

    Ratios are taken within rounds, since a machine's speed changes between them.
    """
    ratio = seconds.div(seconds[reference], axis=0)
    low, middle, high = (ratio.quantile(part) for part in (0.25, 0.5, 0.75))
    columns = dict(seconds=seconds.median(), ratio=middle, low=low, high=high)
    return pd.DataFrame(columns)


_PLAIN, _OREPA = dict(block='plain'), dict(block='orepa')
# What each way to train changes in the backbone and in the optimizer wrapper. What is
# not folded outside of the graph folds online, and naively by the plain formulas.
VARIANTS: dict[str, tuple[dict, dict]] = {
    'stock': ({}, {}),
    'plain, default layout': (_PLAIN, dict(channels_last=False)),
    'plain': (_PLAIN, {}),
    'plain, OREPA stem': (dict(_PLAIN, stem_block='orepa'), dict(folded=True)),
    'DBB': (dict(block='dbb'), {}),
    'OREPA, naive': (_OREPA, {}),
    'OREPA, online': (_OREPA, {}),
    'OREPA, folded, default layout': (_OREPA, dict(folded=True, channels_last=False)),
    'OREPA, folded': (_OREPA, dict(folded=True)),
    # CUDA graphs replay the folds.
    'OREPA, captured': (_OREPA, dict(folded=True, capture=True)),
}
# What a user has today, and what others are compared with; the same network with the
# layout of this package's; and the result.
STOCK, PLAIN, OREPA = 'stock', 'plain', 'OREPA, folded'
NAIVE = 'OREPA, naive'


class Trainer:
    """A variant of an OREPA classifier with its optimizer, one step at a time."""

    def __init__(self, cfg: Config, variant: str, device: str) -> None:
        torch.manual_seed(0)
        model = copy.deepcopy(cfg.model)
        backbone, changes = VARIANTS[variant]
        model.backbone.update(backbone)
        options = copy.deepcopy(cfg.optim_wrapper)
        options.update({'folded': False, 'channels_last': True, **changes})
        if variant == STOCK:
            model.backbone = stock_backbone(model.backbone)
            options = dict(optimizer=options.optimizer)
        self.network = MODELS.build(model).to(device).train()
        self.model: nn.Module = self.network
        if variant == NAIVE:
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
            parameters += [leaf.parameter for leaf in leaves if leaf]
        return parameters

    def gradient_bytes(self) -> int:
        return nbytes(p.grad for p in self.parameters() if p.grad is not None)


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
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Seconds of the two phases of a step: a row for each round."""

    def step_of(trainer: Trainer) -> Callable[[], tuple[float, float]]:
        return lambda: (
            clock.seconds(lambda: trainer.forward_backward(*batch)),
            clock.seconds(trainer.optimize),
        )

    steps = {name: step_of(trainer) for name, trainer in trainers.items()}
    phases = pd.DataFrame(in_turn(steps, clock, rounds, what='steps'))
    return phases.map(lambda pair: pair[0]), phases.map(lambda pair: pair[1])


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
    gradients = trainer.gradient_bytes()
    trainer.wrapper.step()
    gradients = max(gradients, trainer.gradient_bytes())
    trainer.wrapper.zero_grad()
    states = trainer.wrapper.optimizer.state.values()
    values = [value for state in states for value in state.values()]
    return dict(
        saved_bytes=sum(n for pointer, n in saved.items() if pointer not in parameters),
        parameter_bytes=nbytes(trainer.parameters()),
        gradient_bytes=gradients,
        optimizer_bytes=nbytes(v for v in values if isinstance(v, Tensor)),
        all_reduced_bytes=measure_all_reduced(trainer, batch),
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
    trainer.step(*batch)
    trainer.model = trainer.network
    return sum(sent)


def measure_peak_memory(trainer: Trainer, batch: tuple) -> int:
    """What a step allocates on a GPU beyond what is there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.step(*batch)
    return torch.cuda.max_memory_allocated() - before


def measure_fold(network: nn.Module, rounds: int, clock: Clock) -> pd.DataFrame:
    """Times of all folds of a network with their derivatives, and of their floor.

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
                kernel.parameter.grad = grad
            backward_to_branches(kernels)

    def seconds(function: Callable[[], None]) -> float:
        network.zero_grad()
        return clock.seconds(function)

    functions = dict(floor=floor, naive=naive, online=online, folded=fold_and_backward)
    timed = {name: functools.partial(seconds, f) for name, f in functions.items()}
    return times(pd.DataFrame(in_turn(timed, clock, rounds, what='folds')), 'floor')


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
    return second.detach().squeeze(0), first.detach().squeeze(0)


@torch.no_grad()
def measure_inference(
    cfg: Config, images: Tensor, rounds: int, clock: Clock
) -> pd.DataFrame:
    """Times of a forward pass in eval mode, over the plain network's folded one."""
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
    if find_spec('onnx') and find_spec('onnxruntime') and not images.is_cuda:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'network.onnx')
            export_onnx(networks['OREPA, deployed'], images[:1], path)
            networks['OREPA, deployed, ONNX Runtime'] = OnnxNetwork(path)
    timed = {
        name: functools.partial(clock.seconds, functools.partial(network, images))
        for name, network in networks.items()
    }
    with folded(in_blocks[0]), folded(in_blocks[1]):
        seconds = pd.DataFrame(in_turn(timed, clock, rounds, what='inference'))
    return times(seconds, reference)
