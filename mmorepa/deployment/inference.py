"""Inferencers of the toolboxes for configs and checkpoints of this package."""

from importlib import import_module
from typing import Any, Optional, Union

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS
from torch import nn

from ..converters import read_checkpoint
from ..hub import get_config
from ..runs import innermost
from ..utils.files import PathLike
from .models import load_deployed

_INFERENCERS = {
    'mmpretrain': 'ImageClassificationInferencer',
    'mmdet': 'DetInferencer',
    'mmseg': 'MMSegInferencer',
}


def build_inferencer(
    config: Union[PathLike, Config], checkpoint: PathLike, device: Optional[str] = None
) -> Any:
    """Builds the inferencer of a config's toolbox, with the deployed form of the model.

    Args:
        config (str | Path | Config): Config of a classifier, detector or segmenter.
        checkpoint (str | Path): Checkpoint in training form or deployed form.
        device (str, optional): The device to run on. Defaults to MMEngine's choice.

    Returns:
        ImageClassificationInferencer | DetInferencer | MMSegInferencer: See the manual
        of the toolbox. A process can use inferencers of one toolbox only.

    Raises:
        CheckpointError: If the checkpoint is damaged, or does not fit the config.
        ValueError: If ``default_scope`` is none of the three toolboxes.

    Examples:
        >>> inferencer = build_inferencer('flowers.py', 'flowers.pth')
        >>> inferencer('rose.jpg')[0]['pred_class']
        'rose'
    """
    cfg = config if isinstance(config, Config) else get_config(config)
    scope = cfg.get('default_scope')
    if scope not in _INFERENCERS:
        raise ValueError(
            f'default_scope is one of {", ".join(_INFERENCERS)}, found {scope!r}'
        )
    kind = getattr(import_module(f'{scope}.apis'), _INFERENCERS[scope])
    device = device or get_device()
    loaded = read_checkpoint(str(checkpoint))
    model = load_deployed(cfg, loaded).to(device)
    meta = dataset_meta(cfg, loaded)
    if scope == 'mmpretrain':
        model._config = cfg
        return kind(model, classes=meta.get('classes'))
    # The inferencers of mmdet and mmseg accept no model: they would build one, load the
    # checkpoint, and ignore entries that do not fit.
    deployed = dict(meta=dict(dataset_meta=meta), state_dict=model.state_dict())

    class Inferencer(kind):
        def _init_model(self, cfg: Config, weights: None, device: str) -> nn.Module:
            self._load_weights_to_model(model, deployed, cfg)
            model.cfg = cfg
            return model

    names = () if scope == 'mmdet' else ('classes', 'palette')
    options = {name: meta.get(name) for name in names}
    inferencer = Inferencer(cfg, device=device, **options)
    inferencer.show_progress = False
    return inferencer


def dataset_meta(cfg: Config, checkpoint: dict) -> dict:
    """``classes`` and similar entries from the checkpoint, or from the test data."""
    stored = (checkpoint.get('meta') or {}).get('dataset_meta')
    if stored or cfg.get('test_dataloader') is None:
        return stored or {}
    dataset = innermost(cfg.test_dataloader.dataset)
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        return registry.build({**dataset, 'lazy_init': True}).metainfo
