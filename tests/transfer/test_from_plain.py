"""From plain weights to detectors and segmenters with OREPA."""

import pytest
import torch
import torchvision
from helpers import assert_near, import_models, trained_like
from mmengine.registry import MODELS, init_default_scope
from scenes import load

pytestmark = pytest.mark.slow
# One of each backbone.
NAMES = (
    'coco/faster-rcnn_r50-orepa-from-plain_fpn_1x_coco.py',
    'coco/retinanet_repvgg-a0-orepa-from-plain_fpn_1x_coco.py',
    'cityscapes/pspnet_r50-orepa-from-plain-d8_4xb2-40k_cityscapes-512x1024.py',
)


def plain_repvgg(arch):
    import_models('mmpretrain')
    init_default_scope('mmpretrain')
    return MODELS.build(dict(type='mmpretrain.RepVGG', arch=arch, out_indices=(3,)))


@pytest.mark.parametrize('name', NAMES)
def test_starts_as_the_plain_network(name, tmp_path):
    """The backbone of each config, with its checkpoint at another place."""
    cfg = load(name)
    backbone = cfg.model.backbone
    if 'repvgg' in name:
        plain = trained_like(plain_repvgg(backbone.arch))
        state = {f'backbone.{k}': v for k, v in plain.state_dict().items()}
    else:
        # torchvision's last stage begins with the dilation of the one before, as
        # contract_dilation does here.
        dilated = [False, True, True] if 'd8' in name else None
        plain = torchvision.models.resnet50(replace_stride_with_dilation=dilated)
        state = trained_like(plain).state_dict()
        plain.avgpool = plain.fc = torch.nn.Identity()
    torch.save(state, tmp_path / 'plain.pth')
    backbone.init_cfg.checkpoint = str(tmp_path / 'plain.pth')
    backbone.norm_cfg = dict(type='BN')
    init_default_scope(cfg.default_scope)
    net = MODELS.build(backbone)
    net.init_weights()
    net.eval(), plain.eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, found = plain(x), net(x)[-1]
    if isinstance(expected, (tuple, list)):
        expected = expected[-1]
    assert_near(found, expected.reshape(found.shape), 1e-4)
