"""Differences between the outputs of two forms of a model."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..layers import ReparamConv2d


class Difference(NamedTuple):
    """The largest difference between two outputs.

    Args:
        absolute (float): ``max |a − b|``, the largest of all tensors.
        relative (float): ``max |a − b| / max |a|``, the largest of all tensors.
    """

    absolute: float
    relative: float

    def __str__(self) -> str:
        return f'{self.absolute:.2e} absolute, {self.relative:.2e} relative'


@torch.no_grad()
def raw_outputs(model: nn.Module, data_batch: Any) -> list[Tensor]:
    """The raw outputs of the network for a batch, before any post-processing.

    Args:
        model (nn.Module): A model of mmpretrain, mmdet or mmseg, or any MMEngine
            ``BaseModel`` that supports ``mode='tensor'``; wrapped or not.
        data_batch (Any): A batch of the test dataloader.
    """
    data_batch = copy.deepcopy(data_batch)
    if any(isinstance(m, BaseTTAModel) for m in model.modules()):
        # Take the first augmentation of each image.
        if isinstance(data_batch, dict):
            data_batch = {key: value[0] for key, value in data_batch.items()}
        else:
            data_batch = [value[0] for value in data_batch]
    model = unwrapped(model)
    data = model.data_preprocessor(data_batch, False)
    if isinstance(data, dict):
        return network_outputs(model, **data)
    return network_outputs(model, *data)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers for several devices and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


@torch.no_grad()
def network_outputs(model: nn.Module, *args, **kwargs) -> list[Tensor]:
    """As :func:`raw_outputs`, for images that are normalised and batched already.

    Args:
        model (nn.Module): Not wrapped.
        *args, **kwargs: The arguments of the model's ``forward`` for a batch. For the
            toolboxes, ``inputs`` of shape (N, C, H, W) and maybe ``data_samples``.

    Returns:
        list[Tensor]: Logits, feature maps or the outputs of heads. The second stage of
        a two-stage detector runs on a fixed grid of boxes.
    """
    if hasattr(getattr(model, 'rpn_head', None), 'prior_generator'):
        return _two_stage_outputs(model, kwargs['inputs'] if kwargs else args[0])
    return _tensors(model(*args, mode='tensor', **kwargs))


def _two_stage_outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Runs the second stage on fixed boxes, since rounding may swap two proposals."""
    features = model.extract_feat(inputs)
    outputs = [features, model.rpn_head(features)]
    if getattr(model, 'roi_head', None) is not None:
        size = tuple(inputs.shape[-2:])
        boxes = _grid_of_boxes(*size).to(inputs)
        proposals = [InstanceData(bboxes=boxes) for _ in inputs]
        samples = [BaseDataElement(metainfo=dict(img_shape=size)) for _ in inputs]
        outputs.append(model.roi_head(features, proposals, samples))
    return _tensors(outputs)


def _grid_of_boxes(height: int, width: int) -> Tensor:
    """Boxes of an eighth, a quarter and half of the image's size, tiling it."""
    boxes = []
    for parts in (8, 4, 2):
        y, x = torch.meshgrid(torch.arange(parts), torch.arange(parts), indexing='ij')
        corners = torch.stack([x, y, x + 1, y + 1], dim=-1).reshape(-1, 4)
        boxes.append(corners * torch.tensor([width, height, width, height]) / parts)
    return torch.cat(boxes)


def largest_difference(expected: list[Tensor], actual: list[Tensor]) -> Difference:
    """The largest difference between two lists of tensors; NaN if one is not finite.

    Raises:
        ValueError: If there is nothing to compare, or shapes differ.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (expected, actual)]
    if not any(shapes):
        raise ValueError("the model has no outputs to compare for mode='tensor'")
    if shapes[0] != shapes[1]:
        raise ValueError(f'outputs of shapes {shapes[0]} against {shapes[1]}')
    differences = torch.tensor(
        [_difference(a.double(), b.double()) for a, b in zip(expected, actual)]
    )
    # max() of a tensor returns NaN if there is one, unlike Python's max().
    return Difference(*differences.max(dim=0).values.tolist())


@contextmanager
def watched_convs(model: nn.Module) -> Iterator[dict[str, float]]:
    """Compares each re-parameterised conv with its plain form, whenever it runs.

    Both forms get the same input, so that an error of one layer does not count for the
    layers after it.

    Yields:
        dict[str, float]: The largest relative difference by the name of the conv, in
        the order of their first runs. It fills while the model runs, in eval mode.
    """
    differences: dict[str, float] = {}

    def compare(name: str, conv: ReparamConv2d, inputs: tuple, output: Tensor) -> None:
        plain = copy.deepcopy(conv)
        plain.switch_to_deploy()
        # plain() would call the hooks that were copied, such as this one.
        difference = largest_difference([output], [plain.forward(*inputs)]).relative
        if not difference <= differences.setdefault(name, 0.0):  # NaN, too.
            differences[name] = difference

    handles = [
        module.register_forward_hook(functools.partial(compare, name))
        for name, module in model.named_modules()
        if isinstance(module, ReparamConv2d) and not module.deployed
    ]
    try:
        yield differences
    finally:
        for handle in handles:
            handle.remove()


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    absolute = (a - b).abs().max() if a.numel() else 0
    if absolute == 0:
        return 0.0, 0.0
    return absolute.item(), (absolute / a.abs().max()).item()


def _tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors inside nested lists, tuples and dicts."""
    leaves = tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
