"""The base class of networks with a stem and stages."""

import logging
from collections.abc import Callable, Sequence
from typing import Optional, Union

from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..layers import log_plain_starts, switch_to_deploy
from .checks import check_fits, check_is_known, check_is_there, check_style


class StagedBackbone(BaseModule):
    """A stem and up to four stages, with the options that OpenMMLab users expect.

    A subclass calls this constructor first, sets :attr:`stem`, calls
    :meth:`add_stage` for each stage and :meth:`freeze_stages` in the end.

    The arguments are those of :class:`OREPAResNet`.

    Raises:
        ValueError: If an argument has no meaning for this number of stages.
    """

    stem: nn.Module
    # Called with every state dict before it is loaded, as PyTorch calls them;
    # mmorepa.converters.plain translates those of plain networks.
    load_hooks: list[Callable[..., None]] = []
    _has_warned = False

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
        for hook in (*self.load_hooks, check_is_known):
            self.register_load_state_dict_pre_hook(hook)
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
        """Sets the mode; frozen stages, and BatchNorm with ``norm_eval``, stay."""
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
            CheckpointError: If the checkpoint of a ``Pretrained`` one is a local file
                that is not there or damaged, or is not of this network or of this
                ``style``.
        """
        configs = self.init_cfg or []
        for cfg in [configs] if isinstance(configs, dict) else configs:
            if cfg.get('type') == 'Pretrained':
                check_is_there(cfg['checkpoint'])
                check_style(self, cfg['checkpoint'])
        with self.refuse_misfits():
            super().init_weights()

    def refuse_misfits(self) -> RemovableHandle:
        """Refuses state dicts that leave a conv at random, or have another one.

        PyTorch's ``strict=False`` and MMEngine load what fits, and some load a part of
        the network in that way. ``remove()`` of what it returns allows that again, and
        so does the end of a ``with`` block.
        """
        return self.register_load_state_dict_pre_hook(check_fits)


def _after_loading(module: nn.Module, incompatible_keys: object) -> None:
    log_plain_starts(module)


def _is_fresh(norm: _BatchNorm) -> bool:
    mean = norm.running_mean
    return mean is not None and not mean.is_meta and not mean.any()


def options_of_stem(
    options: dict, stem_block: Optional[str], stem_block_cfg: Optional[dict]
) -> dict:
    """The ``options`` of convs with the stem's own block type, if it has one."""
    if stem_block is not None:
        return {**options, 'block': stem_block, 'block_cfg': stem_block_cfg}
    if stem_block_cfg is not None:
        raise ValueError(
            'stem_block_cfg are arguments of a stem_block, of which there is none: '
            'name it, or use block_cfg'
        )
    return options


def scaled_channels(channels: int, factor: float, name: str) -> int:
    """``channels`` times a width multiplier, rounded down; ``name`` says of what."""
    scaled = int(channels * factor)
    if scaled < 1:
        raise ValueError(
            f'{name} needs at least one channel, found {channels} times {factor}'
        )
    return scaled
