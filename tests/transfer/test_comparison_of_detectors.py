"""What the comparison of two forms looks at, beyond the features."""

import copy

import pytest
import torch
from scenes import batch, build, load, shrink

from mmorepa import switch_to_deploy
from mmorepa.analysis import largest_difference, network_outputs, raw_outputs


def detector(name='digits/faster-rcnn_r18-slim-orepa_fpn_1xb2-10e_digits.py'):
    return build(shrink(load(name))).eval()


@pytest.mark.parametrize('part', ['rpn_head.rpn_reg', 'roi_head.bbox_head.fc_reg'])
def test_a_change_of_either_stage_is_seen(part):
    model = detector()
    data = batch('mmdet', 10)
    before = raw_outputs(model, data)
    assert largest_difference(before, raw_outputs(model, data)).absolute == 0
    with torch.no_grad():
        model.get_submodule(part).bias.add_(1.0)
    assert largest_difference(before, raw_outputs(model, data)).absolute > 0.5


def test_equal_after_the_switch():
    model = detector()
    data = batch('mmdet', 10)
    deployed = switch_to_deploy(copy.deepcopy(model))
    for outputs in (
        raw_outputs,
        lambda m, d: network_outputs(m, torch.rand(2, 3, 64, 96)),
    ):
        torch.manual_seed(0)
        before = outputs(model, data)
        torch.manual_seed(0)
        difference = largest_difference(before, outputs(deployed, data))
        assert difference.relative < 1e-4
    # Five levels of features and of each of the RPN's outputs, classes and boxes.
    assert len(before) == 3 * 5 + 2
    assert before[-2].shape == (2 * (64 + 16 + 4), 11)
