import copy

import pytest
import torch
from helpers import trained_like
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from mmorepa.backbones import OREPAResNet
from mmorepa.layers import DBBConv2d, OREPAConv2d

NAN = float('nan')


def convs():
    """Some in a model that is not ours, one of them of convs."""
    options = dict(padding=1, norm_cfg=dict(type='BN'))
    return nn.Sequential(OREPAConv2d(3, 4, 3, **options), DBBConv2d(4, 4, 3, **options))


def backbone():
    return OREPAResNet(18, base_channels=4)


@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_state_dict])
@pytest.mark.parametrize('build', [convs, backbone])
class TestWarning:
    def warnings(self, log, model, state, load):
        log.clear()
        load(model, state)
        return [line for line in log if 'damaged' in line]

    def test_once_a_checkpoint(self, build, load, log):
        model = build()
        good = trained_like(build()).state_dict()
        bad = {key: value * NAN for key, value in good.items()}
        assert self.warnings(log, model, good, load) == []
        for _ in range(2):
            (line,) = self.warnings(log, model, bad, load)
            assert line.endswith("' holds NaN")
        assert self.warnings(log, model, good, load) == []

    @pytest.mark.parametrize(
        'entry, value, words',
        [
            ('running_var', -1.0, 'holds a negative variance'),
            ('weight', float('inf'), 'holds Inf'),
        ],
    )
    def test_names_the_entry(self, build, load, log, entry, value, words):
        state = copy.deepcopy(trained_like(build()).state_dict())
        key = [key for key in state if key.endswith(f'norm.{entry}')][-1]
        state[key][1] = value
        (line,) = self.warnings(log, build(), state, load)
        assert line.endswith(f"'{key}' {words}")


def test_once_where_a_deployed_model_folds(log):
    """Each conv loads its training form apart, of branches with loads of their own."""
    for block in ('orepa', 'dbb'):
        training, deployed = (
            OREPAResNet(18, block=block, base_channels=4, deploy=deploy)
            for deploy in (False, True)
        )
        log.clear()
        deployed.load_state_dict({k: v * NAN for k, v in training.state_dict().items()})
        assert len([line for line in log if 'damaged' in line]) == 1


def test_tensors_without_values(log):
    with torch.device('meta'):
        state = convs().state_dict()
    convs().to('meta').load_state_dict(state, assign=True)
    assert log == []
