"""The figures about branches, of small networks of each block type."""

import csv

import mmcv
import pytest
from helpers import import_models, trained_like
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tool_runs import ROOT, run_here

from mmorepa.converters import write_checkpoint

pytest.importorskip('matplotlib')
SIMILARITY = 'analysis_tools/branch_similarity.py'
SHARES = 'analysis_tools/branch_shares.py'
RESNET = ROOT / 'configs/digits/resnet18-slim-orepa_1xb64_digits.py'
REPVGG = ROOT / 'configs/digits/repvgg-a0-slim-orepa_1xb64_digits.py'
NETWORKS = {'orepa': RESNET, 'dbb': RESNET, 'repvgg': REPVGG, 'orepa_repvgg': REPVGG}


def network(folder, block):
    """Config and checkpoint of a network of 4 channels."""
    import_models('mmpretrain')
    cfg = Config.fromfile(NETWORKS[block])
    small = dict(block=block.replace('orepa_repvgg', 'orepa'))
    if 'repvgg' in block:
        small['arch'] = dict(num_blocks=(1, 2, 1, 1), widths=(0.125,) * 4)
        cfg.model.head.in_channels = 64
    else:
        small['base_channels'] = 4
        cfg.model.head.in_channels = 32
    cfg.model.backbone.update(small)
    config = folder / 'small.py'
    cfg.dump(config)
    init_default_scope(cfg.default_scope)
    model = trained_like(MODELS.build(cfg.model))
    checkpoint = folder / 'small.pth'
    write_checkpoint(dict(state_dict=model.state_dict()), checkpoint)
    return config, checkpoint


def rows_of(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def is_drawn(path):
    """Whether there is something on the white."""
    image = mmcv.imread(str(path))
    return image.shape[0] > 200 and (image < 200).mean() > 0.005


@pytest.mark.parametrize('block', NETWORKS)
def test_similarity(tmp_path, capsys, block):
    run_here(SIMILARITY, *network(tmp_path, block), '--out', tmp_path / 'a.png')
    rows = rows_of(tmp_path / 'a.csv')
    names = {row[key] for row in rows for key in 'ab'}
    assert {'origin', 'pointwise'} <= names
    assert ('identity' in names) == ('repvgg' in block)
    assert all(-1 <= float(row['cosine']) <= 1 for row in rows)
    assert is_drawn(tmp_path / 'a.png')
    assert f'Wrote {tmp_path / "a.png"}' in capsys.readouterr().out


@pytest.mark.parametrize('block', NETWORKS)
def test_shares(tmp_path, capsys, block):
    run_here(SHARES, *network(tmp_path, block), '--out', tmp_path / 'a.png')
    rows = rows_of(tmp_path / 'a.csv')
    for kind in ('size', 'projection'):
        sums = {}
        for row in rows:
            sums[row['layer']] = sums.get(row['layer'], 0) + float(row[kind])
        assert len(sums) > 4 and [*sums.values()] == pytest.approx(
            [1] * len(sums), abs=1e-5
        )
    assert all(float(row['scale_median']) > 0 for row in rows)
    for name in ('a.png', 'a_kernels.png'):
        assert is_drawn(tmp_path / name)
    assert 'Means over the layers' in capsys.readouterr().out
