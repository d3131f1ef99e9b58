"""What a re-parameterised network costs in training, and what it costs deployed.

For each config, the plain network, DBB, and OREPA with a naive fold, with online
folding and with folded training are trained in turn, one step each in every round, so
that all of them meet the same machine; figures are medians over the rounds. Prints
tables, and writes them as JSON and as a chart. Nothing is learned: the images are
noise.
"""

import argparse
import copy
import functools
import io
import json
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional
from unittest import mock

import matplotlib
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from mmorepa import switch_to_deploy
from mmorepa.cli import one_line_errors, positive
from mmorepa.engine import FoldedDistributedDataParallel, FoldedOptimWrapper
from mmorepa.engine.config import read_config
from mmorepa.functional import compiled, compose_deep_linear
from mmorepa.layers import (
    FoldedKernel,
    OREPAConv2d,
    OREPAKernel,
    OREPAPointwiseKernel,
    backward_to_branches,
    folded,
    held,
)
from mmorepa.utils.files import atomic_write, check_outputs
from mmorepa.utils.tables import format_table

ROOT = Path(__file__).resolve().parents[2]
# The networks that this is about, with as many images as suit a small machine.
DEFAULT = (
    ('configs/imagenet/resnet18-orepa_4xb64_in1k.py', 16),
    ('configs/imagenet/resnet50-orepa_4xb64_in1k.py', 8),
)
MEGABYTE = 1e6
# The batch of the paper, for each GPU.
PAPER_BATCH = 64


class Variant(NamedTuple):
    """One way to train.

    Args:
        block (str): The block type.
        folded (bool): Whether the fold is outside of the graph.
        naive (bool): Whether every pass differentiates the plain formulas.
    """

    block: str
    folded: bool = False
    naive: bool = False


VARIANTS = {
    'plain': Variant('plain'),
    'DBB': Variant('dbb'),
    'OREPA, naive': Variant('orepa', naive=True),
    'OREPA, online': Variant('orepa'),
    'OREPA, folded': Variant('orepa', folded=True),
}
OREPA = 'OREPA, folded'


def device(text: str) -> str:
    """A device that is there, as the type of an argument."""
    try:
        torch.empty(0, device=text)
    except Exception as error:
        raise argparse.ArgumentTypeError(f'{text!r} cannot be used: {error}') from error
    return text


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Measures what training a re-parameterised network costs.'
    )
    parser.add_argument(
        'configs',
        nargs='*',
        help='configs of OREPA classifiers; ResNet-18 and ResNet-50 by default',
    )
    parser.add_argument(
        '--batch-size',
        type=positive,
        nargs='+',
        help='images a step: one figure, or one for each config; default 16, but 8 '
        'for the default ResNet-50',
    )
    parser.add_argument('--size', type=positive, default=224, help='of the images')
    parser.add_argument('--rounds', type=positive, default=15)
    parser.add_argument('--threads', type=positive, default=2, help='of the CPU')
    parser.add_argument(
        '--device', type=device, default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/train_cost'))
    args = parser.parse_args(argv)
    defaults = DEFAULT if not args.configs else [(c, 16) for c in args.configs]
    sizes = args.batch_size or [size for _, size in defaults]
    if len(sizes) == 1:
        sizes = sizes * len(defaults)
    if len(sizes) != len(defaults):
        parser.error(
            f'--batch-size takes one figure, or one for each of the {len(defaults)} '
            f'configs; found {len(sizes)}'
        )
    args.runs = [(config, size) for (config, _), size in zip(defaults, sizes)]
    return args


# What a fold and its derivative spend their time on, by operator.
PARTS = {
    'the products of the floor': ('aten::mm', 'aten::addmm', 'aten::addmm_'),
    'passes over memory': (
        # Their own time, without that of the products in them.
        *('mmorepa::fold', 'mmorepa::fold_gradients'),
        # What they are made of where they are not compiled, and the deep linear stem.
        *('aten::bmm', 'aten::baddbmm_', 'aten::mul', 'aten::mul_', 'aten::add'),
        *('aten::add_', 'aten::addcmul_', 'aten::sum', 'aten::copy_', 'aten::zero_'),
        *('aten::fill_', 'aten::mkldnn_convolution', 'aten::convolution_backward'),
    ),
}
REST = 'calling all these'


class Trainer:
    """A model with its optimizer, one step at a time.

    Args:
        cfg (Config): A config with an OREPA classifier.
        variant (Variant): What to make of it.
        device (str): Where to.
    """

    def __init__(self, cfg: Config, variant: Variant, device: str) -> None:
        torch.manual_seed(0)
        model = copy.deepcopy(cfg.model)
        model.backbone.block = variant.block
        self.network = MODELS.build(model).to(device).train()
        self.model: nn.Module = self.network
        if variant.naive:
            for conv in folded_convs(self.network):
                conv.kernel = functools.partial(naive_kernel, conv.branches)
        options = copy.deepcopy(cfg.optim_wrapper)
        options.folded = variant.folded
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

    def parameters(self) -> list[Tensor]:
        """All that forward passes and the optimizer need: held kernels too."""
        parameters = list(self.network.parameters())
        if isinstance(self.wrapper, FoldedOptimWrapper):
            convs = folded_convs(self.network)
            parameters += [conv.held.leaf for conv in convs if conv.held]
        return parameters

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]


def folded_convs(network: nn.Module) -> list[OREPAConv2d]:
    return [m for m in network.modules() if isinstance(m, OREPAConv2d)]


def naive_kernel(branches: nn.Module) -> Tensor:
    """The fold by the plain formulas, whose every term autograd keeps."""
    if isinstance(branches, FoldedKernel):
        return branches.branch_sum.kernel(*branches.tensors())
    kernel, *others = (naive_kernel(factor) for factor in branches.factors)
    for other in others:
        kernel = compose_deep_linear(kernel, other, branches.groups)
    return kernel


class Clock:
    """Reads the time of a device, in seconds."""

    def __init__(self, device: str) -> None:
        self.is_cuda = torch.device(device).type == 'cuda'

    def now(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, function: Callable[[], object]) -> float:
        start = self.now()
        function()
        return self.now() - start


def in_turn(
    functions: dict[str, Callable[[], Sequence[float]]], rounds: int, what: str
) -> dict[str, list[tuple[float, ...]]]:
    """Calls all functions once in each round, and returns what they measured.

    Every round begins with another one; two rounds before are not counted.
    """
    names = list(functions)
    measured: dict[str, list] = {name: [] for name in names}
    for index in range(-2, rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            result = functions[name]()
            if index >= 0:
                measured[name].append(tuple(result))
        say(f'{what}: round {max(index + 1, 0)} of {rounds}')
    sys.stderr.write('\n')
    return measured


def say(text: str) -> None:
    end = '' if sys.stderr.isatty() else '\n'
    sys.stderr.write(f'\r{text}{end}')
    sys.stderr.flush()


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        low, median, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(median, low, high)

    def __format__(self, spec: str) -> str:
        low, high = format(self.low, spec), format(self.high, spec)
        return f'{format(self.median, spec)} [{low}, {high}]'


def ratios(measured: Sequence[float], reference: Sequence[float]) -> Spread:
    """Of one round each, since a machine's speed changes from round to round."""
    return Spread.of([a / b for a, b in zip(measured, reference)])


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

    def timed(function: Callable[[], object]) -> Callable[[], tuple[float]]:
        def measure() -> tuple[float]:
            before()
            return (clock.seconds(function),)

        return measure

    measured = in_turn({n: timed(f) for n, f in functions.items()}, rounds, what)
    seconds = {name: [t for (t,) in times] for name, times in measured.items()}
    return {
        name: dict(
            seconds=Spread.of(seconds[name]),
            ratio=ratios(seconds[name], seconds[reference]),
        )
        for name in functions
    }


def measure_steps(
    trainers: dict[str, Trainer], batch: tuple, rounds: int, clock: Clock
) -> dict[str, dict]:
    """Seconds of a step, and of its two phases."""

    def step_of(trainer: Trainer) -> Callable[[], tuple[float, float]]:
        return lambda: (
            clock.seconds(lambda: trainer.forward_backward(*batch)),
            clock.seconds(trainer.optimize),
        )

    phases = in_turn({n: step_of(t) for n, t in trainers.items()}, rounds, 'steps')
    totals = {name: [sum(pair) for pair in pairs] for name, pairs in phases.items()}
    return {
        name: dict(
            step=Spread.of(totals[name]),
            forward_backward=Spread.of([pair[0] for pair in phases[name]]),
            optimizer=Spread.of([pair[1] for pair in phases[name]]),
            ratio=ratios(totals[name], totals['plain']),
            added=Spread.of([a - b for a, b in zip(totals[name], totals['plain'])]),
        )
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


class OperationCounter(TorchDispatchMode):
    """Counts what a GPU would feel: launches of kernels, and reads by the host."""

    # No launch: memory, and marks for a profiler.
    APART = {'empty', 'empty_like', 'new_empty', 'new_empty_strided', '_unsafe_view'}
    HOST_READS = {'equal', '_local_scalar_dense', 'is_nonzero', 'nonzero'}

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.host_reads = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: object = None
    ) -> object:
        name = func.overloadpacket.__name__
        is_apart = name in self.APART or func.namespace == 'profiler'
        self.operations += not (func.is_view or is_apart)
        self.host_reads += name in self.HOST_READS
        return func(*args, **kwargs or {})


def count_operations(trainer: Trainer, batch: tuple) -> dict[str, int]:
    """Operations that are no views in one step, and host reads, folds not compiled."""
    with (
        mock.patch.object(compiled, 'takes', return_value=False),
        OperationCounter() as counter,
    ):
        trainer.forward_backward(*batch)
        trainer.optimize()
    return dict(operations=counter.operations, host_reads=counter.host_reads)


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
        trainer.forward_backward(*batch)
        trainer.optimize()
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
    trainer.forward_backward(*batch)
    trainer.optimize()
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

    def profiled() -> dict[str, float]:
        with profile() as profiler:
            for _ in range(3):
                network.zero_grad()
                fold_and_backward()
        parts = dict.fromkeys([*PARTS, REST], 0.0)
        for event in profiler.key_averages():
            names = [n for n, operators in PARTS.items() if event.key in operators]
            # On a GPU this is the time of the calls, not of the kernels.
            parts[(names or [REST])[0]] += event.self_cpu_time_total
        total = sum(parts.values())
        return {name: part / total for name, part in parts.items()}

    functions = {'floor': floor, 'naive': naive, 'online': online}
    functions['folded'] = fold_and_backward
    figures = measure_seconds(
        functions, 'floor', rounds, 'folds', clock, before=network.zero_grad
    )
    figures['folded']['parts'] = profiled()
    network.zero_grad()
    return figures


@torch.no_grad()
def factors(kernel: nn.Module) -> tuple[Tensor, Tensor]:
    """The two matrices, one pair for each group, whose product a kernel contains."""
    groups = kernel.groups
    if isinstance(kernel, OREPAPointwiseKernel):
        second, first = kernel.weight_second, kernel.weight_first
        second = second.reshape(groups, -1, second.shape[1])
    else:
        second, first = kernel.weight_pointwise_kxk_2, kernel.weight_pointwise_kxk_1
        second = second.reshape(groups, -1, second.shape[-1])
    first = first.reshape(groups, -1, first.shape[1])
    pair = second.detach(), first.detach()
    return tuple(x.squeeze(0) for x in pair)


def measure_optimizers(
    cfg: Config, rounds: int, clock: Clock, device: str
) -> dict[str, dict]:
    """Seconds of the optimizer alone on the OREPA network."""
    settings = copy.deepcopy(cfg.optim_wrapper)
    # MMEngine's constructor does not know this option of ours.
    common = {k: v for k, v in settings.paramwise_cfg.items() if 'norm_bias' not in k}
    one_each = dict(constructor='DefaultOptimWrapperConstructor', paramwise_cfg=common)
    kinds = {
        'one group for each tensor': (one_each, False),
        'few groups': ({}, False),
        'few groups, fused': ({}, True),
    }
    optimizers = {}
    for name, (changes, fused) in kinds.items():
        network = MODELS.build(cfg.model).to(device)
        options = copy.deepcopy(settings)
        options.update(changes)
        options.optimizer.fused = fused
        optimizers[name] = build_optim_wrapper(network, options).optimizer
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
    figures = measure_seconds(
        {name: optimizer.step for name, optimizer in optimizers.items()},
        'one group for each tensor',
        rounds,
        'optimizers',
        clock,
    )
    for name, optimizer in optimizers.items():
        figures[name]['groups'] = len(optimizer.param_groups)
    return figures


@torch.no_grad()
def measure_inference(
    cfg: Config, images: Tensor, rounds: int, clock: Clock
) -> dict[str, dict]:
    """Seconds of a forward pass in eval mode, over the plain network's folded one."""
    in_a_block = 'OREPA, in a folded() block'
    device = str(images.device)

    def build(block: str) -> nn.Module:
        torch.manual_seed(0)
        model = copy.deepcopy(cfg.model)
        model.backbone.block = block
        return MODELS.build(model).to(device).eval()

    deployed = switch_to_deploy(build('orepa'))
    reference = 'plain, BatchNorm folded'
    networks = {
        reference: switch_to_deploy(build('plain')),
        'plain': build('plain'),
        'OREPA, training form': build('orepa'),
        in_a_block: build('orepa'),
        'OREPA, deployed': deployed,
    }
    functions = {n: lambda net=net: net(images) for n, net in networks.items()}
    session = onnx_session(deployed, images)
    if session is not None:
        feed = {session.get_inputs()[0].name: images.cpu().numpy()}
        functions['OREPA, deployed, ONNX Runtime'] = lambda: session.run(None, feed)
    with folded(networks[in_a_block]):
        return measure_seconds(functions, reference, rounds, 'inference', clock)


def onnx_session(model: nn.Module, images: Tensor) -> Optional[object]:
    """The model in ONNX Runtime on the CPU, None where that is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        say('ONNX Runtime is left out: pip install onnx onnxruntime\n')
        return None
    if images.is_cuda:
        return None
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(model, (images,), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on to spin through the others' turns.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    return onnxruntime.InferenceSession(
        file.getvalue(), options, providers=['CPUExecutionProvider']
    )


def load(path: str) -> Config:
    cfg = read_config(str(ROOT / path))
    if (
        cfg.model.get('type') != 'ImageClassifier'
        or cfg.model.backbone.get('block') != 'orepa'
    ):
        raise ValueError(
            f"{path}: this takes classifiers whose backbone has block='orepa'"
        )
    return cfg


def measure(path: str, cfg: Config, batch_size: int, args: argparse.Namespace) -> dict:
    """All figures of one config."""
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    clock = Clock(args.device)
    torch.manual_seed(1)
    images = torch.randn(batch_size, 3, args.size, args.size, device=args.device)
    labels = torch.randint(10, (batch_size,))
    samples = [DataSample().set_gt_label(label).to(args.device) for label in labels]
    batch = (images, samples)

    trainers = {n: Trainer(cfg, v, args.device) for n, v in VARIANTS.items()}
    steps = measure_steps(trainers, batch, args.rounds, clock)
    for name, trainer in trainers.items():
        steps[name].update(measure_bytes(trainer, batch))
        steps[name].update(count_operations(trainer, batch))
        steps[name]['all_reduced_bytes'] = measure_all_reduced(trainer, batch)
        if clock.is_cuda:
            steps[name]['peak_memory_bytes'] = measure_peak_memory(trainer, batch)
    fold = measure_fold(trainers['OREPA, online'].network, args.rounds, clock)
    trainers.clear()
    optimizers = measure_optimizers(cfg, args.rounds, clock, args.device)
    inference = measure_inference(cfg, images, args.rounds, clock)
    plain, added = steps['plain']['step'].median, steps[OREPA]['added'].median
    return dict(
        config=path,
        batch_size=batch_size,
        image_size=args.size,
        rounds=args.rounds,
        steps=steps,
        fold=fold,
        optimizers=optimizers,
        inference=inference,
        added_over_floor=added / fold['floor']['seconds'].median,
        # The fold does not know the batch, and the plain step grows with it.
        ratio_at_64=1 + added / (plain * PAPER_BATCH / batch_size),
    )


def machine(args: argparse.Namespace) -> str:
    if torch.device(args.device).type == 'cuda':
        name = torch.cuda.get_device_name()
    else:
        lines = Path('/proc/cpuinfo')
        text = lines.read_text() if lines.is_file() else ''
        match = re.search(r'model name\s*: (.*)', text)
        name = match[1] if match else platform.processor()
        name += f', {args.threads} threads'
        is_compiled = compiled.is_available()
        name += ', folds compiled' if is_compiled else ', folds not compiled'
    return f'{name}, PyTorch {torch.__version__}'


def print_tables(result: dict) -> None:
    """What :func:`measure` found, for people."""
    steps, fold = result['steps'], result['fold']

    def ms(spread: Spread) -> str:
        return f'{spread.median * 1e3:.1f}'

    def mb(value: int) -> str:
        return f'{value / MEGABYTE:.1f}'

    print(
        f'\n{Path(result["config"]).stem}: {result["batch_size"]} images of '
        f'{result["image_size"]}x{result["image_size"]}, medians over '
        f'{result["rounds"]} rounds in turn, [quartiles]\n'
    )
    rows = [
        (
            name,
            ms(r['step']),
            f'{r["ratio"]:.2f}',
            ms(r['forward_backward']),
            ms(r['optimizer']),
        )
        for name, r in steps.items()
    ]
    head = ('training', 'step (ms)', 'x plain', 'forward+backward', 'optimizer phase')
    print(format_table(head, rows))
    columns = {
        'saved_bytes': 'saved for backward',
        'parameter_bytes': 'parameters',
        'gradient_bytes': 'gradients',
        'optimizer_bytes': 'optimizer',
        'all_reduced_bytes': 'all-reduced',
        'peak_memory_bytes': 'peak of a step',
    }
    columns = {k: title for k, title in columns.items() if k in steps['plain']}
    rows = [(n, *(mb(r[key]) for key in columns)) for n, r in steps.items()]
    print()
    print(format_table(('MB', *columns.values()), rows))
    print()
    rows = [(n, str(r['operations']), str(r['host_reads'])) for n, r in steps.items()]
    head = ('a step without compiled folds', 'operations, views apart', 'host reads')
    print(format_table(head, rows))
    print()
    rows = [(n, ms(r['seconds']), f'{r["ratio"]:.2f}') for n, r in fold.items()]
    print(format_table(('all folds, with derivatives', 'ms', 'x floor'), rows))
    parts = ', '.join(f'{n} {part:.0%}' for n, part in fold['folded']['parts'].items())
    print(f'What folded training spends on it: {parts}.')
    added = steps[OREPA]['added']
    print(
        f'Folded training adds {added.median * 1e3:.1f} ms to the plain step: '
        f'{result["added_over_floor"]:.2f} x the floor. With {PAPER_BATCH} images a '
        f'step, that would be {result["ratio_at_64"]:.3f} x plain.\n'
    )
    rows = [
        (n, str(r['groups']), ms(r['seconds'])) for n, r in result['optimizers'].items()
    ]
    print(format_table(('SGD on OREPA', 'groups', 'ms'), rows))
    print()
    rows = [
        (n, ms(r['seconds']), f'{r["ratio"]:.2f}')
        for n, r in result['inference'].items()
    ]
    print(format_table(('inference', 'ms', 'x plain, folded'), rows))


def plot(results: list[dict], path: Path) -> None:
    """Draws what a step costs over the plain network's, one panel for each budget."""
    panels = {
        'time of a step': lambda r, plain: r['ratio'].median,
        'saved for backward': lambda r, plain: r['saved_bytes'] / plain['saved_bytes'],
        'all-reduced': lambda r, plain: (
            r['all_reduced_bytes'] / plain['all_reduced_bytes']
        ),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.8), layout='constrained')
    width = 0.8 / len(VARIANTS)
    for axis, (title, value) in zip(axes, panels.items()):
        for index, name in enumerate(VARIANTS):
            heights = [value(r['steps'][name], r['steps']['plain']) for r in results]
            places = [
                n + (index - (len(VARIANTS) - 1) / 2) * width
                for n in range(len(results))
            ]
            bars = axis.bar(
                places, heights, width * 0.92, label=name, color=f'C{index}'
            )
            axis.bar_label(bars, fmt='%.2f', fontsize=7, padding=1)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set_title(f'{title}, x plain')
        axis.set_xticks(
            range(len(results)),
            [
                f'{Path(r["config"]).stem.split("-orepa")[0]}\n{r["batch_size"]} images'
                for r in results
            ],
        )
        axis.margins(y=0.12)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=5
    )
    with atomic_write(path) as file:
        figure.savefig(file, dpi=130, format='png')
    plt.close(figure)


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    figures, chart = args.out / 'train_cost.json', args.out / 'train_cost.png'
    check_outputs([figures, chart], [ROOT / path for path, _ in args.runs])
    configs = {path: load(path) for path, _ in args.runs}
    torch.set_num_threads(args.threads)
    # Without the tables of parameter groups.
    MMLogger.get_instance('train_cost', log_level='WARNING')
    results = []
    with process_group(args.device):
        for path, batch_size in args.runs:
            results.append(measure(path, configs[path], batch_size, args))
            print_tables(results[-1])
    document = dict(machine=machine(args), results=results)
    with atomic_write(figures) as file:
        file.write_text(json.dumps(document, indent=2) + '\n')
    plot(results, chart)
    print(f'\n{document["machine"]}')
    print(f'Figures: {figures}   Chart: {chart}')


if __name__ == '__main__':
    main()
