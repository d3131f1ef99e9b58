import copy

import pytest
import torch
import torchvision
from helpers import classifier_cfg, import_models
from mmengine.registry import MODELS, DefaultScope

from mmorepa import switch_to_deploy
from mmorepa.analysis.complexity import count_bytes, count_gflops, count_parameters


def classifier(**backbone):
    import_models('mmpretrain')
    channels = 8 * backbone.get('base_channels', 64)
    backbone.update(type='OREPAResNet', out_indices=(3,))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(classifier_cfg(backbone, channels, 1000))


def test_resnet18():
    """The figures that everybody quotes: 11.69 M parameters, 1.82 GFLOPs."""
    model = classifier(depth=18, block='plain')
    reference = torchvision.models.resnet18()
    assert count_parameters(model) == 11_689_512 == count_parameters(reference)
    image = torch.zeros(1, 3, 224, 224)
    assert count_gflops(model, image) == pytest.approx(1.82, rel=2e-3)
    # Four bytes each, and eight for each BatchNorm's counter.
    assert count_bytes(model) == count_bytes(reference)
    switch_to_deploy(model)
    # Of the 20 BatchNorms, one bias a channel is left: 4,800 fewer.
    assert count_parameters(model) == 11_689_512 - 4800
    assert count_gflops(model, image) == pytest.approx(1.814, rel=1e-3)
    assert count_bytes(model) == 4 * count_parameters(model)


@pytest.mark.parametrize('block', ['orepa', 'dbb', 'orepa_repvgg'])
def test_fold_is_not_counted(block):
    """A training form computes branches, but OREPA's only once for many images."""
    image = torch.zeros(1, 3, 64, 64)
    plain, model = (
        classifier(depth=18, base_channels=8, block=name) for name in ('plain', block)
    )
    expected = count_gflops(plain, image)
    found = count_gflops(model, image)
    if block == 'orepa':
        assert found == expected
    else:  # Branches that are run one by one.
        assert found > 1.05 * expected
    # The network is as it was: it still folds, and differentiates.
    model(image).sum().backward()
    weight = model.backbone.layer1[0].conv1.branches
    assert all(p.grad is not None for p in weight.parameters())
    deployed = switch_to_deploy(copy.deepcopy(model))
    assert count_gflops(deployed, image) == count_gflops(switch_to_deploy(plain), image)
