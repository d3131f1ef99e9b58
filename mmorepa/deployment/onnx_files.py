"""Writes deployed models as ONNX files, and runs such files as networks."""

import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from ..runs import innermost
from ..utils.files import PathLike
from ..utils.requirements import require
from ..version import __version__
from .networks import DeployedNetwork, Network, as_batch, output_names

EXPORTERS = ('torchscript', 'dynamo')
# The lowest version that both exporters can write.
OPSET = 18
INPUT = 'images'
_INTERPOLATIONS = dict(
    nearest='INTER_NEAREST',
    bilinear='INTER_LINEAR',
    bicubic='INTER_CUBIC',
    area='INTER_AREA',
    lanczos='INTER_LANCZOS4',
)


def export_onnx(
    model: nn.Module,
    image: Tensor,
    path: PathLike,
    exporter: str = 'torchscript',
    metadata: Optional[dict] = None,
) -> None:
    """Writes a deployed model as an ONNX file, for batches of any length.

    Args:
        model (nn.Module): A deployed model in eval mode.
        image (Tensor): Shape (1, C, H, W). The file will accept this H and W only.
        path (str | Path): The file to write.
        exporter (str): ``'torchscript'`` or ``'dynamo'``, which needs the package
            ``onnxscript``. Defaults to ``'torchscript'``.
        metadata (dict, optional): Entries to store in the file, as JSON. Defaults to
            None.

    Raises:
        ImportError: If a package is missing.
        ValueError: If the exporter is unknown or cannot write this model.
    """
    if exporter not in EXPORTERS:
        raise ValueError(f'the exporters are {", ".join(EXPORTERS)}; not {exporter!r}')
    onnx = require('onnx')
    network = DeployedNetwork(model).eval()
    images = as_batch(image)
    names = output_names(model, images)
    if exporter == 'dynamo':
        require('onnxscript')
        shapes = ({0: torch.export.Dim('batch')},)
        options = dict(dynamo=True, dynamic_shapes=shapes, verbose=False, optimize=True)
    else:
        axes = {name: {0: 'batch'} for name in (INPUT, *names)}
        options = dict(dynamo=False, dynamic_axes=axes)
    stream = io.BytesIO()
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                network,
                (images,),
                stream,
                input_names=[INPUT],
                output_names=names,
                opset_version=OPSET,
                **options,
            )
        exported = onnx.load_from_string(stream.getvalue())
        onnx.checker.check_model(exported, full_check=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(
            f'the exporter {exporter!r} cannot write this model, and another may: '
            f'{reason[0]}'
        ) from error
    for key, value in (metadata or {}).items():
        exported.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(exported, str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides messages of the exporters that are meant for their developers."""
    # PyTorch calls this to print the whole graph if it cannot write the graph.
    graph_log = mock.patch.object(torch._C, '_jit_onnx_log', lambda *args: None)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), graph_log:
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(logging.NOTSET)


def inference_session(model: Union[str, bytes]) -> Any:
    """A session of ONNX Runtime on the CPU, with as many threads as PyTorch has."""
    onnxruntime = require('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Spinning threads would take CPU time from networks that run next.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    return onnxruntime.InferenceSession(
        model, options, providers=['CPUExecutionProvider']
    )


class OnnxNetwork(Network):
    """A file of :func:`export_onnx` that ONNX Runtime runs on the CPU."""

    def __init__(self, path: PathLike, pads: bool = False) -> None:
        self.session = inference_session(str(path))
        names = [output.name for output in self.session.get_outputs()]
        size = tuple(self.session.get_inputs()[0].shape[-2:])
        super().__init__(self._run, names, size, pads)

    def _run(self, images: Tensor) -> Iterator[Tensor]:
        arrays = self.session.run(None, {INPUT: images.cpu().numpy()})
        return map(torch.from_numpy, arrays)


def preprocessing(
    cfg: Config, channels: int = 3, classes: Optional[Sequence[str]] = None
) -> dict:
    """Describes how to prepare images for a network, for the metadata of a file.

    Returns:
        dict: These entries, which JSON can store:

        - ``resize``: (height, width), or the length of the short edge, or None.
        - ``keep_ratio``: True if images keep their ratio inside of ``resize``.
        - ``interpolation``: The name of OpenCV's flag.
        - ``crop``: (height, width) of a crop from the centre, or None.
        - ``mean``, ``std``: For each channel; 0 and 1 without normalisation.
        - ``channels``: ``'grey'``, ``'RGB'`` or ``'BGR'``; None unless there are one or
          three.
        - ``classes``, ``config`` (the name of the config) and ``mmorepa_version``.
    """
    preprocessor = dict(cfg.get('data_preprocessor') or {})
    preprocessor.update(cfg.model.get('data_preprocessor') or {})
    # The toolboxes read images as BGR.
    swaps = [preprocessor.get(name) for name in ('to_rgb', 'bgr_to_rgb', 'rgb_to_bgr')]
    kinds = {1: 'grey', 3: 'RGB' if any(swaps) else 'BGR'}
    return dict(
        **_geometry(cfg),
        mean=list(preprocessor.get('mean') or [0.0] * channels),
        std=list(preprocessor.get('std') or [1.0] * channels),
        channels=kinds.get(channels),
        classes=classes and list(classes),
        config=cfg.filename and Path(cfg.filename).stem,
        mmorepa_version=__version__,
    )


def _geometry(cfg: Config) -> dict:
    """How the test pipeline resizes and crops images."""
    dataset = innermost((cfg.get('test_dataloader') or {}).get('dataset') or {})
    pipeline = dataset.get('pipeline') or ()
    steps = {str(step['type']).rpartition('.')[-1]: step for step in pipeline}
    names = ('ResizeEdge', 'Resize', 'CenterCrop')
    edge, resize, crop = (steps.get(name) for name in names)
    size = None
    if edge and edge.get('edge', 'short') == 'short':
        size = edge['scale']
    elif resize and resize.get('scale'):
        size = list(to_2tuple(resize['scale']))[::-1]
    resize = edge or resize or {}
    return dict(
        resize=size,
        keep_ratio=bool(resize.get('keep_ratio')),
        interpolation=_INTERPOLATIONS[resize.get('interpolation', 'bilinear')],
        crop=crop and list(to_2tuple(crop['crop_size'])),
    )
