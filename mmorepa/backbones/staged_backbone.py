"""The base class of networks with a stem and stages."""

import logging
from collections.abc import Collection, Sequence
from typing import Optional, Union

from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..layers import ReparamConv2d, build_conv, log_plain_starts, switch_to_deploy
from .checks import (
    check_exists,
    check_fits,
    check_is_known,
    check_style,
    require_fit,
)


class StagedBackbone(BaseModule):
    """A stem and up to four stages, with the options that OpenMMLab users expect.

    A subclass calls this constructor first, sets :attr:`stem`, calls
    :meth:`add_stage` for each stage and calls :meth:`freeze_stages` at the end. It
    builds the stem with :attr:`stem_options` and the stages with :attr:`conv_options`.

    For the arguments, see :class:`OREPAResNet`.

    Raises:
        ValueError: If an argument has no meaning for this network.
    """

    stem: nn.Module
    # During a load: the prefix of the keys, the list of errors of the loader, and
    # whether the load must set every weight.
    load_prefix = ''
    load_errors: Sequence[str] = ()
    must_fit = False
    _has_warned = False

    def __init__(
        self,
        block: str,
        block_cfg: Optional[dict] = None,
        stem_block: Optional[str] = None,
        stem_block_cfg: Optional[dict] = None,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_cfg: Optional[dict] = None,
        norm_eval: bool = False,
        act_cfg: Optional[dict] = None,
        deploy: bool = False,
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
        if stem_block is None and stem_block_cfg is not None:
            raise ValueError(
                'stem_block_cfg are arguments of a stem_block, of which there is none: '
                'name it, or use block_cfg'
            )
        self.num_stages = num_stages
        self.strides = strides
        self.dilations = dilations
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.stage_names: list[str] = []
        self.conv_options = dict(
            block=block,
            block_cfg=block_cfg,
            norm_cfg=norm_cfg or dict(type='BN', requires_grad=True),
            act_cfg=act_cfg or dict(type='ReLU', inplace=True),
            deploy=deploy,
        )
        self.stem_options = dict(self.conv_options)
        if stem_block is not None:
            self.stem_options.update(block=stem_block, block_cfg=stem_block_cfg)
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)

    def add_stage(self, *blocks: nn.Module) -> None:
        """Appends a stage of these blocks as ``layer1``, ``layer2``, …."""
        name = f'layer{len(self.stage_names) + 1}'
        self.add_module(name, nn.Sequential(*blocks))
        self.stage_names.append(name)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages, in order."""
        return [getattr(self, name) for name in self.stage_names]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps (N, I, H, W) to the outputs of the stages in ``out_indices``."""
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
        """Sets the mode, but not of frozen stages, nor of norms with ``norm_eval``."""
        super().train(mode)
        self.freeze_stages()
        if mode and self.norm_eval:
            norms = [m for m in self.modules() if isinstance(m, _BatchNorm)]
            for norm in norms:
                norm.eval()
            if not self._has_warned and norms and all(map(_is_fresh, norms)):
                self._has_warned = True
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
        """Freezes the stem and the stages that ``frozen_stages`` names."""
        if self.frozen_stages < 0:
            return
        for module in [self.stem, *self.stages[: self.frozen_stages]]:
            module.eval()
            module.requires_grad_(False)

    def plain_name(self, name: str, names: Collection[str]) -> str:
        """The name here of an entry that a plain network calls ``name``.

        Other entries keep their names. ``names`` are all names in the checkpoint.
        """
        return name

    def switch_to_deploy(self) -> None:
        """Calls :func:`mmorepa.switch_to_deploy`, for mmpretrain's tool."""
        switch_to_deploy(self)

    def init_weights(self) -> None:
        """Initialises as ``init_cfg`` says.

        Raises:
            CheckpointError: If ``init_cfg`` has the type ``Pretrained`` and its
                checkpoint is missing or damaged, or is of another network or
                ``style``.
        """
        configs = self.init_cfg or []
        for cfg in [configs] if isinstance(configs, dict) else configs:
            if cfg.get('type') == 'Pretrained':
                check_exists(cfg['checkpoint'])
                check_style(self, cfg['checkpoint'])
        with self.refuse_misfits():
            super().init_weights()

    def refuse_misfits(self) -> RemovableHandle:
        """Makes the next loads fail unless they set every conv, with the right shape.

        PyTorch's ``strict=False`` and MMEngine would load only the entries that fit. To
        allow partial loads again, call ``remove()`` of the returned handle, or use the
        handle in a ``with`` block.
        """
        return self.register_load_state_dict_pre_hook(require_fit)


def _before_loading(
    backbone: StagedBackbone, state_dict: dict[str, Tensor], prefix: str, *args
) -> None:
    """Renames the entries of a plain network to the names of this network."""
    backbone.load_prefix, backbone.load_errors = prefix, args[-1]
    start = 'backbone.'
    if not prefix and any(key.startswith(start) for key in state_dict):
        for key in list(state_dict):  # The state dict is of a whole model.
            value = state_dict.pop(key)
            if key.startswith(start):
                state_dict[key.removeprefix(start)] = value
    names = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
    ours = {name: backbone.plain_name(name, names) for name in names}
    renamed = {plain: name for plain, name in ours.items() if name != plain}
    for plain, name in renamed.items():
        state_dict[prefix + name] = state_dict.pop(prefix + plain)
    backbone.must_fit = bool(renamed)
    check_is_known(backbone, [*ours.values()])


def _after_loading(module: StagedBackbone, incompatible_keys: object) -> None:
    if module.must_fit:
        check_fits(module, incompatible_keys)
    log_plain_starts(module)


def _is_fresh(norm: _BatchNorm) -> bool:
    mean = norm.running_mean
    return mean is not None and not mean.is_meta and not mean.any()


def build_same_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    has_act: bool = True,
    **options,
) -> ReparamConv2d:
    """Builds a conv without bias whose padding keeps the size, up to the stride."""
    if not has_act:
        options['act_cfg'] = None
    return build_conv(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=False,
        **options,
    )


def scaled_channels(channels: int, factor: float, name: str) -> int:
    """``channels`` times ``factor``, rounded down. Error messages use ``name``."""
    scaled = int(channels * factor)
    if scaled < 1:
        raise ValueError(
            f'{name} needs at least one channel, found {channels} times {factor}'
        )
    return scaled
