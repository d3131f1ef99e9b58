"""The base class of networks with a stem and stages."""

import logging
import os
import re
from collections.abc import Collection, Sequence
from typing import Optional, Union

from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import ConvAct2d, ReparamConv2d, log_plain_starts, switch_to_deploy
from ..utils.errors import CheckpointError, describe_misfit


class StagedBackbone(BaseModule):
    """A stem and up to four stages, with the options that OpenMMLab users expect.

    A subclass calls this constructor first, sets :attr:`stem`, calls
    :meth:`add_stage` for each stage and :meth:`freeze_stages` in the end.

    Args:
        num_stages (int): Stages to build, 1 to 4.
        strides (Sequence[int]): Stride of the first block of each stage.
        dilations (Sequence[int]): Dilation of each stage.
        out_indices (Sequence[int]): Stages whose output is returned.
        frozen_stages (int): 0 freezes the stem, n the stages up to the n-th as
            well: no gradient and BatchNorm in eval mode. -1 freezes nothing.
        norm_eval (bool): Whether BatchNorm stays in eval mode while training.
        init_cfg (dict | list[dict], optional): See
            :class:`mmengine.model.BaseModule`. Defaults to None.

    Raises:
        ValueError: If an argument has no meaning for this number of stages.
    """

    stem: nn.Module
    # The keys of a plain network's checkpoint, as patterns, and what they are here;
    # and the kernel that every conv has there.
    PLAIN_KEYS: tuple[tuple[str, str], ...] = ()
    PLAIN_KERNEL = r'(.+)\.weight'
    # Whether a state dict has to have all convs of the network, and no other.
    must_fit = False
    _has_told = False

    def __init__(
        self,
        num_stages: int,
        strides: Sequence[int],
        dilations: Sequence[int],
        out_indices: Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
        init_cfg: Union[dict, list[dict], None] = None,
    ) -> None:
        super().__init__(init_cfg)
        if not 1 <= num_stages <= 4:
            raise ValueError(f'num_stages is 1 to 4, found {num_stages}')
        if len(strides) < num_stages or len(dilations) < num_stages:
            raise ValueError(
                f'strides and dilations need a value for each of the {num_stages} '
                f'stages, found strides={strides}, dilations={dilations}'
            )
        if not all(0 <= i < num_stages for i in out_indices):
            raise ValueError(
                f'out_indices counts the stages from 0 to {num_stages - 1}, found '
                f'{tuple(out_indices)}'
            )
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(
                f'frozen_stages is -1 (none), 0 (stem) or up to {num_stages}, found '
                f'{frozen_stages}'
            )
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.stage_names: list[str] = []
        self.register_load_state_dict_post_hook(_after_loading)

    def add_stage(self, *blocks: nn.Module) -> None:
        """Appends a stage as ``layer1``, ``layer2``, ….

        Args:
            *blocks (nn.Module): Its blocks, in order.
        """
        name = f'layer{len(self.stage_names) + 1}'
        self.add_module(name, nn.Sequential(*blocks))
        self.stage_names.append(name)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages, in order."""
        return [getattr(self, name) for name in self.stage_names]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs of the stages in ``out_indices``.

        Args:
            x (Tensor): Shape (N, in_channels, H, W).

        Returns:
            tuple[Tensor, ...]: Each of shape (N, C_i, H_i, W_i).
        """
        x = self.forward_stem(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Runs the stem."""
        return self.stem(x)

    def train(self, mode: bool = True) -> 'StagedBackbone':
        """Sets the mode; frozen stages, and BatchNorm with ``norm_eval``, stay."""
        super().train(mode)
        self.freeze_stages()
        if mode and self.norm_eval:
            norms = [m for m in self.modules() if isinstance(m, _BatchNorm)]
            for norm in norms:
                norm.eval()
            if not self._has_told and norms and all(map(_is_fresh, norms)):
                self._has_told = True
                print_log(
                    'norm_eval=True keeps BatchNorm statistics that nothing has '
                    'trained: outputs grow from stage to stage, and the training is '
                    'likely to diverge. Start from pretrained weights, or set '
                    'model.backbone.norm_eval=False',
                    logger='current',
                    level=logging.WARNING,
                )
        return self

    def freeze_stages(self) -> None:
        """Freezes the stem and the stages that ``frozen_stages`` covers."""
        if self.frozen_stages < 0:
            return
        for module in [self.stem, *self.stages[: self.frozen_stages]]:
            module.eval()
            module.requires_grad_(False)

    def switch_to_deploy(self) -> None:
        """Calls :func:`mmorepa.switch_to_deploy`, for mmpretrain's tool."""
        switch_to_deploy(self)

    def init_weights(self) -> None:
        """Initialises as ``init_cfg`` says.

        Raises:
            CheckpointError: If the checkpoint of a ``Pretrained`` ``init_cfg`` is a
                local file that is not there, is damaged, is not that of this network,
                or is of another ``style`` by its name.
        """
        configs = self.init_cfg or []
        for cfg in [configs] if isinstance(configs, dict) else configs:
            if cfg.get('type') == 'Pretrained':
                _check_is_there(cfg['checkpoint'])
                check_style(self, cfg['checkpoint'])
        self.must_fit, before = True, self.must_fit
        try:
            super().init_weights()
        finally:
            self.must_fit = before

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if not prefix:
            _strip(state_dict, 'backbone.')
        self._translate_plain(state_dict, prefix)
        # MMEngine only warns when nothing fits, and training would go on from
        # random weights.
        convs = tuple(
            f'{name}.'
            for name, module in self.named_modules()
            if isinstance(module, (nn.Conv2d, ConvAct2d))
        )
        names = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
        if (names or self.must_fit) and not any(n.startswith(convs) for n in names):
            advice = ''
            if not names:
                advice = (
                    f". It has nothing under '{prefix}': weights of a backbone alone "
                    "go into its init_cfg=dict(type='Pretrained', checkpoint=...)"
                )
            raise CheckpointError(
                f'nothing in the checkpoint belongs to a {type(self).__name__}: it has '
                f'{", ".join(names[:3] or [*state_dict][:3])}, …{advice}'
            )
        if self.must_fit:
            self._check_fits(state_dict, prefix)
        # Here and not in the convs, of which each knows of itself alone.
        if any(
            isinstance(module, ReparamConv2d)
            and module.deployed
            and any(key.startswith(f'{prefix}{name}.branches.') for key in state_dict)
            for name, module in self.named_modules()
        ):
            print_log(
                'The checkpoint holds the training form and the model is deployed: '
                'folding the branches while loading.',
                logger='current',
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_fits(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Raises for weights that do not fit, which MMEngine would leave at random."""
        parts = tuple(f'{prefix}{name}.' for name in ('stem', *self.stage_names))
        own, found = state_shapes(self), {}
        for key, value in state_dict.items():
            if key.startswith(parts) and not key.endswith('num_batches_tracked'):
                found[key.removeprefix(prefix)] = tuple(value.shape)
        for name, module in self.named_modules():
            if not isinstance(module, ReparamConv2d):
                continue
            entries = {k for k in found if k.startswith(f'{name}.')}
            kinds = {key[len(name) + 1 :].split('.')[0] for key in entries}
            kernel = f'{name}.branches.weight'  # The training form of a plain conv.
            if module.deployed:
                is_same = 'branches' not in kinds and 'norm' not in kinds
            else:
                is_same = 'branches' in kinds and (kernel in own or kernel not in found)
            if entries and not is_same:  # It takes this form, or says why not.
                for key in [k for k in {*own, *found} if k.startswith(f'{name}.')]:
                    own.pop(key, None)
                    found.pop(key, None)
        problems = describe_misfit(own, found, 3)
        if problems:
            raise CheckpointError(
                f'the checkpoint does not fit this {type(self).__name__}: {problems}'
            )

    def _translate_plain(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Gives the entries of a plain network the names that they have here."""
        renamed = {}
        names = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
        for name in names:
            ours = self.plain_name(name, names)
            if ours is not None:
                renamed[prefix + name] = prefix + ours
        if not renamed:
            return
        for key, ours in renamed.items():
            state_dict[ours] = state_dict.pop(key)
        self._check_plain(
            {
                key.removeprefix(prefix): tuple(value.shape)
                for key, value in state_dict.items()
                if key.startswith(prefix)
            }
        )

    def plain_name(self, name: str, names: Collection[str]) -> Optional[str]:
        """The name here of an entry of a plain network's checkpoint.

        Args:
            name (str): Its name there.
            names (Collection[str]): Those of all entries.

        Returns:
            str | None: None if it has the same name, or none.
        """
        for pattern, ours in self.PLAIN_KEYS:
            match = re.fullmatch(pattern, name)
            if match:
                return match.expand(ours)
        return None

    def _check_plain(self, found: dict[str, tuple[int, ...]]) -> None:
        """Checks, before anything is loaded, that the network is exactly this one."""
        is_folded = not any(name.endswith('.running_var') for name in found)
        own, parts = self.state_dict(), dict(self.named_children())
        expected = {
            f'{name}.{entry}': shape
            for name, module in self.named_modules()
            if '.branches' not in name
            for entry, shape in self._plain_shapes(module, is_folded).items()
        }
        for name, shape in list(found.items()):
            part = name.split('.')[0]
            is_other = part not in parts and len(shape) < 4  # Such as a classifier.
            is_unbuilt = re.fullmatch(r'layer\d', part) and part not in parts
            is_extra = name in own and name not in expected
            is_count = name.endswith('.num_batches_tracked')
            if is_other or is_unbuilt or is_extra or is_count:
                del found[name]
        # Where kernels differ, their names say it all.
        kernels = (self._kernels(expected), self._kernels(found))
        problems = describe_misfit(*kernels, 3)
        what = 'Convs' if problems else 'Entries'
        problems = problems or describe_misfit(expected, found, 3)
        if problems:
            raise CheckpointError(
                'the checkpoint is that of a plain network, and another one than this '
                f'{type(self).__name__}. {what} {problems}'
            )

    def _kernels(
        self, shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        matches = ((re.fullmatch(self.PLAIN_KERNEL, name), name) for name in shapes)
        return {
            m[1]: shapes[name] for m, name in matches if m and len(shapes[name]) > 3
        }

    def _plain_shapes(
        self, module: nn.Module, is_folded: bool
    ) -> dict[str, tuple[int, ...]]:
        """The entries that a module has in a plain network's checkpoint.

        Args:
            module (nn.Module): Any module of this network.
            is_folded (bool): Whether the plain network's BatchNorms are folded.
        """
        if not isinstance(module, ReparamConv2d):
            return {}
        outputs = module.out_channels
        kernel = (outputs, module.in_channels // module.groups, *module.kernel_size)
        if is_folded:
            return dict(weight=kernel, bias=(outputs,))
        norm = build_norm_layer(module.norm_cfg, outputs)[1]
        return dict(weight=kernel, **state_shapes(norm, 'norm.'))


def state_shapes(module: nn.Module, prefix: str = '') -> dict[str, tuple[int, ...]]:
    """The shapes of what a module saves, without the number of batches."""
    return {
        prefix + name: tuple(value.shape)
        for name, value in module.state_dict().items()
        if not name.endswith('num_batches_tracked')
    }


def _strip(state_dict: dict[str, Tensor], start: str) -> None:
    """Keeps one part of a whole model's state dict, if it has that part."""
    if any(key.startswith(start) for key in state_dict):
        for key in list(state_dict):
            value = state_dict.pop(key)
            if key.startswith(start):
                state_dict[key.removeprefix(start)] = value


def _after_loading(module: nn.Module, incompatible_keys: object) -> None:
    log_plain_starts(module)


def _check_is_there(checkpoint: str) -> None:
    # Other paths, such as https://… and torchvision://…, are fetched by MMEngine.
    if '://' in checkpoint or os.path.isfile(checkpoint):
        return
    raise CheckpointError(
        f'no pretrained weights at {checkpoint!r} (init_cfg of the backbone). Start '
        "from a plain network, as the configs with '-from-plain' in their names do; or "
        'train these weights with the ImageNet config of that name (tools/train.py '
        'configs/imagenet/...); or convert a published checkpoint '
        '(tools/model_converters/published_to_mmorepa.py). Set the path in a config '
        'by model=dict(backbone=dict(init_cfg=dict(checkpoint=...))) or by '
        '--cfg-options model.backbone.init_cfg.checkpoint=...; to start from random '
        'weights: '
        'model.backbone.init_cfg=None model.backbone.norm_eval=False'
    )


def check_style(backbone: nn.Module, checkpoint: str) -> None:
    """Refuses a checkpoint whose name says that its network has another style.

    Args:
        backbone (nn.Module): With a ``style``, or of the usual one.
        checkpoint (str): The path or address of what it starts from.

    Raises:
        CheckpointError: If the file's name has caffe or msra in it and the style is
            another one, or it is torchvision's and the style is caffe's.
    """
    name = checkpoint.rpartition('/')[-1]
    style = getattr(backbone, 'style', 'pytorch')
    found = re.search('caffe|msra', name, re.IGNORECASE)
    if found and style != 'caffe':
        raise CheckpointError(
            f'{name!r} is of a caffe-style network by its name ({found[0]}), with the '
            "stride on the first 1x1 conv: the keys of style='pytorch', and another "
            "network. Set style='caffe', and the data_preprocessor that goes with it; "
            'or take weights of this style, such as torchvision://resnet50 '
            '(rename the file if its name is wrong)'
        )
    if checkpoint.startswith('torchvision://') and style == 'caffe':
        raise CheckpointError(
            f"{checkpoint!r} has the stride on the 3x3 conv: set style='pytorch', or "
            'take weights of a caffe-style network, such as '
            'open-mmlab://detectron2/resnet50_caffe'
        )


def _is_fresh(norm: _BatchNorm) -> bool:
    mean = norm.running_mean
    return mean is not None and not mean.is_meta and not mean.any()


def scaled_channels(channels: int, factor: float, name: str) -> int:
    """``channels`` times a width multiplier, rounded down.

    Args:
        channels (int): Channels at width one.
        factor (float): The multiplier.
        name (str): What is scaled, for the error.

    Returns:
        int: At least one.

    Raises:
        ValueError: If nothing is left.
    """
    scaled = int(channels * factor)
    if scaled < 1:
        raise ValueError(
            f'{name} needs at least one channel, found {channels} times {factor}'
        )
    return scaled
