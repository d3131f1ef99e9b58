"""Networks as functions of normalised images, for exports and for their use."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Union

import torch
from mmengine.utils import is_seq_of
from torch import Tensor, nn

Outputs = dict[str, Union[Tensor, list[Tensor]]]


def named_outputs(model: nn.Module, images: Tensor) -> Outputs:
    """The outputs of a network for normalised images (N, C, H, W), not post-processed.

    A classifier or segmenter has ``logits``. A dense detector has ``scores``, ``boxes``
    and possibly more maps, each by level. A two-stage detector has the scores and boxes
    of its first stage and the ``features`` for its second. Raises a ValueError for
    other outputs.
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
    if is_seq_of(outputs, Tensor):
        return dict(features=list(outputs))
    if is_seq_of(outputs, Sequence) and all(is_seq_of(m, Tensor) for m in outputs):
        names = ['scores', 'boxes', *(f'maps{i}' for i in range(2, len(outputs)))]
        return {name: list(maps) for name, maps in zip(names, outputs)}
    raise ValueError(
        f"the outputs of {type(model).__name__} for mode='tensor' are neither a tensor "
        'nor lists of maps'
    )


def flatten(outputs: Outputs) -> dict[str, Tensor]:
    """Gives each tensor its name in a file: ``scores_0``, ``scores_1``, …"""
    flat = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            flat[name] = value
        else:
            flat.update({f'{name}_{i}': tensor for i, tensor in enumerate(value)})
    return flat


@torch.no_grad()
def output_names(model: nn.Module, images: Tensor) -> list[str]:
    """The names of the outputs of a model, as :func:`flatten` makes them."""
    return list(flatten(named_outputs(model, images)))


def as_batch(image: Tensor) -> Tensor:
    """Repeats an image (1, C, H, W): exporters would make a length of 1 constant."""
    return image.expand(2, *image.shape[1:]).contiguous()


class DeployedNetwork(nn.Module):
    """A deployed model in eval mode as a function of images, for any exporter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps (N, C, H, W) to the tensors of :func:`named_outputs`."""
        return tuple(flatten(named_outputs(self.model, images)).values())


def padded(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) padded to a size by zeros to the right and below."""
    height, width = (max(a - b, 0) for a, b in zip(size, images.shape[-2:]))
    return nn.functional.pad(images, (0, width, 0, height))


class Network:
    """An exported model as a function of images.

    Args:
        function (Callable): Maps images (N, C, H, W) of the given size to the outputs.
        names (Sequence[str]): Names of the outputs, as :func:`flatten` makes them.
        size (tuple[int, int]): Height and width of the images.
        pads (bool): Whether to pad smaller images, which detectors get. Defaults to
            False.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Iterable[Tensor]],
        names: Sequence[str],
        size: tuple[int, int],
        pads: bool = False,
    ) -> None:
        self.function, self.names, self.size, self.pads = function, names, size, pads

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Maps (N, C, H, W) to the outputs, in the order of the names."""
        if self.pads:
            images = padded(images, self.size)
        size = tuple(images.shape[-2:])
        if size != self.size:
            raise ValueError(
                f'the file takes images of {self.size[0]}x{self.size[1]}, found '
                f'{size[0]}x{size[1]}: export it for the size of the data (--shape)'
            )
        return list(self.function(images))

    def grouped(self, images: Tensor) -> Outputs:
        """The outputs for images (N, C, H, W), in the form of :func:`named_outputs`."""
        outputs: Outputs = {}
        for name, tensor in zip(self.names, self(images)):
            group, _, index = name.rpartition('_')
            if index.isdigit():
                outputs.setdefault(group, []).append(tensor)
            else:
                outputs[name] = tensor
        return outputs


@contextmanager
def network_from(model: nn.Module, network: Network) -> Iterator[nn.Module]:
    """Makes a model predict from the outputs of its export.

    The model itself still runs pre- and post-processing, and the second stage of a
    two-stage detector. Raises a ValueError if the model has no head that can use the
    outputs.
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
