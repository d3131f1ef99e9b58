"""Post-training quantization to INT8 by ONNX Runtime, and the loss of each layer."""

import copy
import io
import itertools
import logging
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from torch import Tensor, nn

from ..runs import build_loader, innermost
from ..utils.files import PathLike
from ..utils.requirements import require
from .onnx_files import INPUT

ACTIVATIONS = {'uint8': 'QUInt8', 'int8': 'QInt8', 'uint16': 'QUInt16'}
# ONNX Runtime's method and its options, by name. 'Entropy' is left out: it has as many
# bins as steps, so it gives the same ranges as MinMax.
CALIBRATIONS = dict(
    average=('MinMax', dict(CalibMovingAverage=True)),
    minmax=('MinMax', {}),
    percentile=('Percentile', dict(CalibPercentile=99.99)),
)
_CONVS = ('Conv', 'Gemm')
# ONNX Runtime computes these activations together with the conv before them.
_ACTS = ('Relu', 'Clip', 'LeakyRelu', 'Sigmoid', 'HardSigmoid')


class LayerLoss(NamedTuple):
    """The loss of a layer by INT8.

    Args:
        name (str): Name of the module.
        weight_range (float): The largest weight of the kernel, in magnitude.
        outlier (float): ``weight_range`` over the median range of an output channel.
        kernel_snr (float): Power of the kernel over the power of its error, in dB, the
            mean over output channels.
        output_snr (float): The same for the layer's output, which also has the errors
            of all layers before; NaN if the output is zero or not quantized.
    """

    name: str
    weight_range: float
    outlier: float
    kernel_snr: float
    output_snr: float


def calibration_images(cfg: Config, model: nn.Module, number: int) -> list[Tensor]:
    """Training images from the test pipeline, since augmentation changes the ranges.

    Each batch holds one normalised image. The order is the same each time.
    """
    cfg = copy.deepcopy(cfg)
    loader = cfg.get('train_dataloader')
    if loader is None:
        raise ValueError('the config has no train_dataloader to calibrate with')
    if cfg.get('test_dataloader') is not None:
        pipeline = innermost(cfg.test_dataloader.dataset).get('pipeline')
        if pipeline:
            loader.dataset = _with_pipeline(loader.dataset, pipeline)
    loader.batch_size = 1
    # Samplers of detectors group images by shape and would wait for a second image.
    loader.pop('batch_sampler', None)
    batches = itertools.islice(build_loader(cfg, 'train'), number)
    return [model.data_preprocessor(batch, False)['inputs'] for batch in batches]


def _with_pipeline(dataset: dict, pipeline: list) -> dict:
    """The dataset without wrappers that repeat or mix images, with this pipeline."""
    dataset = innermost(dataset)
    if 'datasets' in dataset:
        parts = [_with_pipeline(part, pipeline) for part in dataset['datasets']]
        dataset['datasets'] = parts
    elif 'pipeline' in dataset:
        dataset['pipeline'] = pipeline
    return dataset


def prepare(source: PathLike, target: PathLike, equalized: bool = False) -> int:
    """Prepares an exported file for quantization: infers shapes and folds BatchNorms.

    Returns the number of pairs of convs that were equalized, see :func:`equalize`.
    """
    onnx = require('onnx')
    shapes = require('onnxruntime.quantization.shape_inference')
    shapes.quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    _keep_metadata(source, target)
    if not equalized:
        return 0
    model = onnx.load(str(target))
    pairs = equalize(model)
    onnx.save(model, str(target))
    return pairs


def _keep_metadata(source: PathLike, target: PathLike) -> None:
    """Copies the metadata of the source to the file that ONNX Runtime made of it."""
    onnx = require('onnx')
    model = onnx.load(str(target))
    keys = {entry.key for entry in model.metadata_props}
    metadata = onnx.load(str(source)).metadata_props
    model.metadata_props.extend(entry for entry in metadata if entry.key not in keys)
    onnx.save(model, str(target))


def quantize_onnx(
    source: PathLike,
    target: PathLike,
    images: Sequence[Tensor],
    per_channel: bool = True,
    activations: str = 'uint8',
    calibration: str = 'average',
    reduce_range: bool = False,
) -> None:
    """Quantizes weights and activations to 8 bits, as QuantizeLinear pairs (QDQ).

    Args:
        source (str | Path): A file that :func:`prepare` wrote.
        target (str | Path): The file to write.
        images (Sequence[Tensor]): Batches of real images.
        per_channel (bool): Whether each output channel of a kernel has its own scale.
            Defaults to True.
        activations (str): ``'uint8'`` suits x86, ``'int8'`` suits ARM and GPUs, and
            ``'uint16'`` loses less. Weights are int8. Defaults to ``'uint8'``.
        calibration (str): The range of activations. ``'average'``: the mean over the
            ranges of the images. ``'minmax'``: the range of all values.
            ``'percentile'``: without one in 10,000 values. Defaults to ``'average'``.
        reduce_range (bool): Whether weights have 7 bits. Use it on x86 without VNNI,
            where sums of products saturate. Defaults to False.
    """
    ort = require('onnxruntime.quantization')
    method, options = CALIBRATIONS[calibration]
    with redirect_stdout(io.StringIO()):  # Calibrators print their bins.
        ort.quantize_static(
            str(source),
            str(target),
            _reader(images),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=getattr(ort.QuantType, ACTIVATIONS[activations]),
            weight_type=ort.QuantType.QInt8,
            calibrate_method=getattr(ort.CalibrationMethod, method),
            extra_options=options,
        )
    _keep_metadata(source, target)


def _reader(images: Sequence[Tensor]) -> Any:
    batches = iter(images)

    class Reader(require('onnxruntime.quantization').CalibrationDataReader):
        def get_next(self) -> Optional[dict[str, np.ndarray]]:
            batch = next(batches, None)
            return None if batch is None else {INPUT: batch.cpu().numpy()}

    return Reader()


def evaluation_phase(cfg: Config) -> str:
    """``'val'``, or ``'test'`` for a config without validation data and evaluator."""
    for phase in ('val', 'test'):
        if cfg.get(f'{phase}_dataloader') and cfg.get(f'{phase}_evaluator'):
            return phase
    raise ValueError(
        'the config has no data to test with: it needs val_dataloader and '
        'val_evaluator, or test_dataloader and test_evaluator'
    )


@torch.no_grad()
def evaluate(cfg: Config, model: nn.Module) -> dict[str, float]:
    """The metrics of the config's evaluator on validation data, or on test data."""
    phase = evaluation_phase(cfg)
    loader = build_loader(cfg, phase)
    evaluator = Evaluator(cfg[f'{phase}_evaluator'])
    evaluator.dataset_meta = getattr(loader.dataset, 'metainfo', None)
    for batch in loader:
        evaluator.process(model.val_step(batch), batch)
    metrics = evaluator.evaluate(len(loader.dataset))
    numbers = (int, float, np.number)
    return {key: float(v) for key, v in metrics.items() if isinstance(v, numbers)}


def layer_losses(
    source: PathLike, quantized: PathLike, images: Sequence[Tensor]
) -> list[LayerLoss]:
    """The loss of each conv and each linear layer, in the order of the file.

    If a layer runs several times, as on the levels of a pyramid, its worst output
    counts. Batches hold one image each. Memory must hold all outputs of all layers.
    """
    debug = require('onnxruntime.quantization.qdq_loss_debug')
    graph = require('onnx').load(str(source)).graph
    logging.disable(logging.ERROR)  # It would report biases that layers share.
    try:
        weights = debug.create_weight_matching(str(source), str(quantized))
    finally:
        logging.disable(logging.NOTSET)
    outputs = debug.create_activation_matching(
        *(_activations(path, images) for path in (quantized, source))
    )
    losses: dict[str, LayerLoss] = {}
    for node in graph.node:
        match = weights.get(node.input[1]) if node.op_type in _CONVS else None
        if match is None:
            continue
        kernel, dequantized = match['float'], match['dequantized']
        if node.op_type == 'Gemm' and not _attribute(node, 'transB', 0):
            kernel, dequantized = kernel.T, dequantized.T
        channels = np.abs(kernel.reshape(len(kernel), -1)).max(axis=1)
        output = outputs.get(_output_of(graph, node), {})
        output_snr = float('nan')
        if 'float' in output:
            output_snr = _snr(output['float'], output['post_qdq'], len(kernel))
        loss = LayerLoss(
            _layer_name(node),
            float(channels.max()),
            float(channels.max() / max(np.median(channels), 1e-12)),
            _snr([kernel], [dequantized], len(kernel)),
            output_snr,
        )
        worst = losses.get(node.input[1])
        if worst is None or not loss.output_snr >= worst.output_snr:
            losses[node.input[1]] = loss
    return list(losses.values())


def _snr(
    expected: Sequence[np.ndarray], quantized: Sequence[np.ndarray], channels: int
) -> float:
    """Signal over noise in dB, the mean over channels that have a signal and noise.

    Each array is a kernel or the output for one image, so channels come first.
    """
    differences = [a.astype(np.float64) - b for a, b in zip(expected, quantized)]
    power, noise = (
        sum(np.square(array.reshape(channels, -1)).sum(1) for array in arrays)
        for arrays in (expected, differences)
    )
    alive = (power > 0) & (noise > 0)
    if not alive.any():
        return float('nan')
    return float(np.mean(10 * np.log10(power[alive] / noise[alive])))


def _activations(path: PathLike, images: Sequence[Tensor]) -> dict:
    debug = require('onnxruntime.quantization.qdq_loss_debug')
    with tempfile.TemporaryDirectory() as folder:
        augmented = str(Path(folder, 'augmented.onnx'))
        debug.modify_model_output_intermediate_tensors(str(path), augmented)
        return debug.collect_activations(augmented, _reader(images))


def _attribute(node: Any, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _users(graph: Any, name: str) -> list:
    return [node for node in graph.node if name in node.input]


def _output_of(graph: Any, node: Any) -> str:
    """The tensor that ONNX Runtime quantizes: the output of a layer or activation."""
    users = _users(graph, node.output[0])
    if len(users) == 1 and users[0].op_type in _ACTS:
        return users[0].output[0]
    return node.output[0]


def _layer_name(node: Any) -> str:
    """The module name of a layer: from its kernel, or from its node after a fold."""
    name = node.input[1]
    if '::' in name:
        name = node.name.strip('/').rpartition('/')[0].replace('/', '.')
    return name.removeprefix('model.').removesuffix('.weight').removesuffix('.conv')


def equalize(model: Any, sweeps: int = 20) -> int:
    """Gives both kernels of every conv–ReLU–conv the same range, channel by channel.

    Cross-layer equalization: since ``ReLU(s·x) = s·ReLU(x)`` for ``s > 0``, channel c
    of the first kernel is divided by ``s_c = √(r1_c / r2_c)``, and channel c of the
    second kernel is multiplied by it. Here r1 and r2 are the largest weights of that
    channel in each kernel. A conv may belong to two pairs, so this runs several sweeps
    over all pairs. Returns the number of pairs, and changes the model in place.
    """
    numpy_helper = require('onnx').numpy_helper
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = list(_pairs(model.graph, stored.keys()))
    values = {
        name: numpy_helper.to_array(stored[name]).astype(np.float64)
        for name in itertools.chain(*pairs)
    }
    for _ in range(sweeps):
        for first, *bias, second in pairs:
            r1 = np.abs(values[first]).max(axis=(1, 2, 3))
            r2 = np.abs(values[second]).max(axis=(0, 2, 3))
            # A channel of zeros on either side has no range to share.
            alive = (r1 > 0) & (r2 > 0)
            scale = np.sqrt(np.divide(r1, r2, out=np.ones_like(r1), where=alive))
            values[first] = values[first] / scale[:, None, None, None]
            values[second] = values[second] * scale[:, None, None]
            for name in bias:
                values[name] = values[name] / scale
    for name, value in values.items():
        stored[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    return len(pairs)


def _pairs(graph: Any, stored: Collection[str]) -> Iterator[list[str]]:
    """For two convs with only a ReLU between: kernel, bias (if any), second kernel.

    No other layer uses these tensors.
    """
    outputs = {output.name for output in graph.output}
    for first in graph.node:
        relu = _only_user(graph, first, 'Relu', outputs)
        second = relu and _only_user(graph, relu, 'Conv', outputs)
        if first.op_type != 'Conv' or second is None:
            continue
        tensors = [*first.input[1:], second.input[1]]
        is_unshared = all(n in stored and len(_users(graph, n)) == 1 for n in tensors)
        if is_unshared and _attribute(second, 'group', 1) == 1:
            yield tensors


def _only_user(graph: Any, node: Any, kind: str, outputs: set[str]) -> Optional[Any]:
    """The node that uses the output of a node, if it is the only one and of a kind."""
    users = _users(graph, node.output[0])
    is_one = node.output[0] not in outputs and [u.op_type for u in users] == [kind]
    return users[0] if is_one else None
