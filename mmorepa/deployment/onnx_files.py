"""Deployed models as ONNX files, and ONNX files in the place of networks."""

import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Optional, Union

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..utils.files import PathLike

EXPORTERS = ('torchscript', 'dynamo')
# The lowest that both exporters write.
OPSET = 18
INPUT = 'images'

Outputs = dict[str, Union[Tensor, list[Tensor]]]


def require(name: str) -> ModuleType:
    """Imports an optional package.

    Args:
        name (str): Of the module, such as ``'onnxruntime.quantization'``.

    Returns:
        ModuleType: The module.

    Raises:
        ImportError: If the package is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition('.')[0]
        raise ImportError(
            f'this needs the package {package}, which is missing: pip install {package}'
        ) from error


def named_outputs(model: nn.Module, images: Tensor) -> Outputs:
    """What a network computes of images, before any post-processing.

    Args:
        model (nn.Module): A classifier, segmenter or detector of the toolboxes.
        images (Tensor): Shape (N, C, H, W), normalised.

    Returns:
        dict[str, Tensor | list[Tensor]]: ``logits`` of a classifier or a segmenter;
        of dense detectors ``scores``, ``boxes`` and, where a head has them, more maps
        of every level; of two-stage detectors the maps of the first stage and the
        ``features``, from which the second, which is left out, takes its boxes.

    Raises:
        ValueError: If the outputs are none of these.
    """
    rpn_head = getattr(model, 'rpn_head', None)
    if hasattr(rpn_head, 'prior_generator'):
        features = model.extract_feat(images)
        scores, boxes = rpn_head(features)
        return dict(
            features=list(features), rpn_scores=list(scores), rpn_boxes=list(boxes)
        )
    outputs = model(images, mode='tensor')
    if isinstance(outputs, Tensor):
        return dict(logits=outputs)
    if _all(outputs, Tensor):
        return dict(features=list(outputs))
    if _all(outputs, (list, tuple)) and all(_all(maps, Tensor) for maps in outputs):
        names = ['scores', 'boxes', *(f'maps{i}' for i in range(2, len(outputs)))]
        return {name: list(maps) for name, maps in zip(names, outputs)}
    raise ValueError(
        f"the outputs of {type(model).__name__} for mode='tensor' are neither a tensor "
        'nor lists of maps: it is no network that runs without its data samples'
    )


def _all(values: object, kind: Union[type, tuple[type, ...]]) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, kind) for value in values
    )


def flatten(outputs: Outputs) -> dict[str, Tensor]:
    """The outputs by their names in a file: ``scores_0``, ``scores_1``, …

    Args:
        outputs (dict[str, Tensor | list[Tensor]]): See :func:`named_outputs`.

    Returns:
        dict[str, Tensor]: One entry for each tensor.
    """
    flat = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            flat[name] = value
        else:
            flat.update({f'{name}_{i}': tensor for i, tensor in enumerate(value)})
    return flat


class DeployedNetwork(nn.Module):
    """A model as a function of normalised images, for any exporter.

    Args:
        model (nn.Module): Deployed, in eval mode: see :func:`load_deployed`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps (N, C, H, W) to the tensors of :func:`named_outputs`."""
        return tuple(flatten(named_outputs(self.model, images)).values())


def export_onnx(
    model: nn.Module,
    image: Tensor,
    path: PathLike,
    exporter: str = 'torchscript',
    opset: int = OPSET,
    metadata: Optional[dict] = None,
) -> None:
    """Writes a deployed model as an ONNX file, for batches of any length.

    Args:
        model (nn.Module): Deployed, in eval mode.
        image (Tensor): Shape (1, C, H, W), of the size that the file takes.
        path (str | Path): The file to write.
        exporter (str): ``'torchscript'`` or ``'dynamo'``, which needs the package
            ``onnxscript``. Defaults to ``'torchscript'``.
        opset (int): The version of ONNX's operators. Defaults to 18.
        metadata (dict, optional): What the file says of itself, as JSON. Defaults to
            None.

    Raises:
        ImportError: If a package is missing.
        ValueError: If the exporter is not known, or cannot write this model.
    """
    if exporter not in EXPORTERS:
        raise ValueError(f'the exporters are {", ".join(EXPORTERS)}; not {exporter!r}')
    onnx = require('onnx')
    network = DeployedNetwork(model).eval()
    # Not one image: exporters take a length of one for a constant.
    images = image.expand(2, *image.shape[1:]).contiguous()
    with torch.no_grad():
        names = list(flatten(named_outputs(model, images)))
    options = dict(input_names=[INPUT], output_names=names, opset_version=opset)
    stream = io.BytesIO()
    if exporter == 'dynamo':
        require('onnxscript')
        batch = torch.export.Dim('batch')
        options.update(
            dynamo=True, dynamic_shapes=({0: batch},), verbose=False, optimize=True
        )
    else:
        axes = {name: {0: 'batch'} for name in (INPUT, *names)}
        options.update(dynamo=False, dynamic_axes=axes)
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(network, (images,), stream, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(
            f'the exporter {exporter!r} cannot write this model, and the other one may '
            f'({" or ".join(EXPORTERS)}): {reason[0]}'
        ) from error
    exported = onnx.load_from_string(stream.getvalue())
    for key, value in (metadata or {}).items():
        exported.metadata_props.add(key=key, value=json.dumps(value))
    onnx.checker.check_model(exported, full_check=True)
    onnx.save(exported, str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' advice to their developers."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def padded(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images with zeros to the right and below, as detectors pad them.

    Args:
        images (Tensor): Shape (N, C, H, W).
        size (tuple[int, int]): Height and width.

    Returns:
        Tensor: Of this size, or larger where the images are.
    """
    height, width = (max(a - b, 0) for a, b in zip(size, images.shape[-2:]))
    return nn.functional.pad(images, (0, width, 0, height))


class OnnxNetwork:
    """An ONNX file as a function, run by ONNX Runtime on the CPU.

    Args:
        path (str | Path): A file of :func:`export_onnx`, quantized or not.
        pads (bool): Whether smaller images are padded, as those of detectors may be.
            Defaults to False.

    Raises:
        ImportError: If ONNX Runtime is missing.
    """

    def __init__(self, path: PathLike, pads: bool = False) -> None:
        self.pads = pads
        onnxruntime = require('onnxruntime')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on to spin through the turns of others.
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
        self.names: Sequence[str] = [o.name for o in self.session.get_outputs()]
        self.size = tuple(self.session.get_inputs()[0].shape[-2:])

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Maps (N, C, H, W) to the outputs, in the order of the file.

        Raises:
            ValueError: If the images have another size than the file's, or are larger.
        """
        if self.pads:
            images = padded(images, self.size)
        size = tuple(images.shape[-2:])
        if size != self.size:
            raise ValueError(
                f'the file takes images of {self.size[0]}x{self.size[1]}, found '
                f'{size[0]}x{size[1]}: export it for the size of the data (--shape)'
            )
        found = self.session.run(None, {INPUT: images.cpu().numpy()})
        return [torch.from_numpy(array) for array in found]

    def grouped(self, images: Tensor) -> Outputs:
        """As :func:`named_outputs`.

        Args:
            images (Tensor): Shape (N, C, H, W).

        Returns:
            dict[str, Tensor | list[Tensor]]: By name.
        """
        outputs: Outputs = {}
        for name, tensor in zip(self.names, self(images)):
            group, _, index = name.rpartition('_')
            if index.isdigit():
                outputs.setdefault(group, []).append(tensor)
            else:
                outputs[name] = tensor
        return outputs


@contextmanager
def network_from(model: nn.Module, network: OnnxNetwork) -> Iterator[nn.Module]:
    """Lets a model predict from what an ONNX file computes.

    Pre- and post-processing stay the model's, and so does the second stage of a
    two-stage detector.

    Args:
        model (nn.Module): A classifier, segmenter or detector in eval mode.
        network (OnnxNetwork): Of its export.

    Yields:
        nn.Module: The model.

    Raises:
        ValueError: If the model has no head that takes the outputs.
    """
    names = ('rpn_head', 'bbox_head', 'decode_head', 'head')
    heads = [getattr(model, name, None) for name in names]
    head = next((head for head in heads if head is not None), None)
    if head is None:
        raise ValueError(
            f'{type(model).__name__} has none of {", ".join(names)}, which would take '
            'the outputs of the file'
        )
    outputs: Outputs = {}

    def extract_feat(images: Tensor, *args, **kwargs) -> list[Tensor]:
        outputs.update(network.grouped(images))
        return outputs.get('features', [images])

    def forward(*args, **kwargs) -> Union[Tensor, tuple]:
        maps = [value for name, value in outputs.items() if name != 'features']
        return tuple(maps) if 'logits' not in outputs else outputs['logits']

    model.extract_feat, head.forward = extract_feat, forward
    try:
        yield model
    finally:
        del model.extract_feat, head.forward


def preprocessing(cfg: Config) -> dict:
    """How images become what a network takes, for the metadata of a file.

    Args:
        cfg (Config): Of a classifier, segmenter or detector.

    Returns:
        dict: ``mean`` and ``std`` of the channels (0 and 1 without normalisation), and
        ``channels``, their order: ``'RGB'`` or ``'BGR'``.
    """
    found = {
        **(cfg.get('data_preprocessor') or {}),
        **(cfg.model.get('data_preprocessor') or {}),
    }
    # Images are read as BGR.
    swaps = [found.get(name) for name in ('to_rgb', 'bgr_to_rgb', 'rgb_to_bgr')]
    return dict(
        mean=list(found.get('mean') or [0.0] * 3),
        std=list(found.get('std') or [1.0] * 3),
        channels='RGB' if any(swaps) else 'BGR',
    )
