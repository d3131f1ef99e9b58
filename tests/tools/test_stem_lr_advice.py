"""What stem_lr.py suggests from the gradients of data."""

import json
import math

import pytest
import torch
from helpers import trained_like
from mmengine.registry import MODELS, init_default_scope
from tool_runs import run_here, tool

from mmorepa.analysis import kernel_gradients
from mmorepa.converters import write_checkpoint
from mmorepa.engine.config import read_config

TOOL = 'analysis_tools/stem_lr.py'
pytest.importorskip('matplotlib')


def advise(folder, config, checkpoint, batches, *options):
    line = [config, checkpoint, '--batches', batches, '--out', folder / 'stem.png']
    options = ['--cfg-options', *options] if options else []
    run_here(TOOL, *line, '--json', folder / 'stem.json', *options)
    return json.loads((folder / 'stem.json').read_text())


def test_settles(config, tmp_path, capsys):
    """The same number of whatever limit, since it stops when it is certain."""
    found = advise(tmp_path, config, 'none', 40)['advice']
    text = capsys.readouterr().out
    assert found['is_settled'] and len(found['each']) < 40
    assert found['high'] / found['value'] <= 1.25
    assert f'stem_lr_mult={found["value"]:.2g} ' in text
    assert advise(tmp_path, config, 'none', 39)['advice'] == found
    assert (tmp_path / 'stem.png').read_bytes().startswith(b'\x89PNG')


def test_cannot_say(config, tmp_path, capsys):
    found = advise(tmp_path, config, 'none', 3)['advice']
    text = capsys.readouterr().out
    assert not found['is_settled'] and len(found['each']) == 3
    assert 'cannot say' in text and 'stem_lr_mult=' not in text


def test_nothing_for_a_plain_stem(config, tmp_path, capsys):
    found = advise(tmp_path, config, 'none', 1, 'model.backbone.block=plain')
    text = capsys.readouterr().out
    assert found['advice'] is None
    assert 'no deep linear one' in text and 'stem_lr_mult=' not in text


def test_of_another_model(config, tmp_path, capsys):
    """A backbone that goes on to other classes: its head is a new one."""
    cfg = read_config(str(config), {'model.head.num_classes': 7})
    init_default_scope(cfg.default_scope)
    path = tmp_path / 'seven.pth'
    write_checkpoint(dict(state_dict=MODELS.build(cfg.model).state_dict()), path)
    found = advise(tmp_path, config, path, 2)
    assert 'all but its backbone is initial' in capsys.readouterr().out
    assert len(found['advice']['each']) == 2


def test_mean_of_batches():
    advise = tool(TOOL).advise
    found = advise([0.5, 2.0] * 8)
    assert found.value == pytest.approx(1)
    assert found.low == pytest.approx(1 / found.high) and not found.is_settled
    assert advise([0.5, 0.51] * 8).is_settled
    # Alike by chance.
    assert not advise([0.5, 0.5]).is_settled
    assert advise([1.0]).high == math.inf


def test_gradients_are_those_of_the_training(config):
    """As far as the branches see: JᵀG is the gradient of the parameters."""
    module = tool(TOOL)
    cfg = read_config(str(config))
    model = trained_like(module.build(cfg, 'none', whole=True))
    batch = next(module.training_batches(cfg))
    (found,) = kernel_gradients(model, [batch])
    stem = model.backbone.stem
    expected = stem.branches.factors[0].weight_origin.grad
    (actual,) = torch.autograd.grad(
        stem.branches(), stem.branches.factors[0].weight_origin, found['stem']
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
