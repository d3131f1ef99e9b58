from pathlib import Path

import pytest
from helpers import import_models
from mmengine.config import Config
from mmengine.registry import MODELS

from mmorepa import switch_to_deploy
from mmorepa.deployment import inputs
from mmorepa.deployment.inputs import image_shape


@pytest.fixture(params=[1, 3])
def classifier(request):
    import_models('mmpretrain')
    name = 'fashion_mnist/resnet18-slim-orepa_1xb64_fashion-mnist-10pct.py'
    cfg = Config.fromfile(Path(__file__).parents[2] / 'configs' / name)
    cfg.model.backbone.in_channels = request.param
    return MODELS.build(dict(cfg.model, _scope_='mmpretrain')), request.param


def test_channels_without_data_are_those_of_the_first_conv(classifier):
    model, channels = classifier
    for form in (model, switch_to_deploy(model)):
        assert image_shape(form, None) == (channels, 224, 224)
        assert image_shape(form, None, [20, 30]) == (channels, 20, 30)


@pytest.mark.parametrize('there', [False, True])
def test_no_data_set_is_downloaded(there, tmp_path, monkeypatch):
    """Neither where its folder is missing nor where that is empty."""
    import_models('mmpretrain')
    from mmpretrain.datasets import cifar

    def download(*args, **kwargs):
        raise AssertionError('a download')

    monkeypatch.setattr(cifar, 'download_and_extract_archive', download)
    root = tmp_path / 'cifar10'
    if there:
        root.mkdir()
    dataset = dict(
        type='CIFAR10', data_root=str(root), split='test', test_mode=True, pipeline=[]
    )
    sampler = dict(type='DefaultSampler', shuffle=False)
    loader = dict(batch_size=1, num_workers=0, dataset=dataset, sampler=sampler)
    cfg = Config(dict(model={}, default_scope='mmpretrain', test_dataloader=loader))
    assert inputs.test_batch(cfg) is None
    assert 'download' not in cfg.test_dataloader.dataset
