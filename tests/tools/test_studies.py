import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import import_models
from scipy import stats
from tool_runs import ROOT, run_here, tool

from mmorepa.layers import build_conv

tool('benchmarks/plain_start.py')
studies, trainings = (sys.modules[name] for name in ('studies', 'trainings'))
KEY, VALUES = ('name', 'seed'), ('value',)


class TestDifferences:
    def test_is_that_of_a_paired_t_test(self):
        first, second = np.random.default_rng(0).normal(size=(2, 7))
        seeds = [*'0123456']
        # Pairs are found by seed, not by order.
        found = studies.paired_differences(
            pd.Series(first, seeds), pd.Series(second, seeds)[::-1]
        )
        low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
        assert len(found) == 7
        reach = studies.reach_of(found)
        assert found.mean() == pytest.approx((first - second).mean())
        assert found.mean() - reach == pytest.approx(low)
        assert found.mean() + reach == pytest.approx(high)

    def test_pairs(self):
        """Seeds that only one has are left out, and trainings that diverged."""
        values = pd.Series(dict(a=3.0, b=5.0, c=100.0, e=math.nan))

        def text(values, reference):
            each = studies.paired_differences(values, reference)
            return studies.mean_and_interval(each)

        reference = pd.Series(dict(b=1.0, a=1.0, d=-100.0, e=1.0))
        assert text(values, reference) == '+3.00 [-9.71, +15.71]'
        assert text(values, pd.Series(dict(d=1.0))) == ''
        assert text(values[:1], values[:1] + 1.5) == '-1.50'

    @pytest.mark.parametrize(
        'values, text',
        [
            ([1.0, 3.0], '2.00 ± 1.41'),
            ([1.0], '1.00'),
            ([3.0, math.nan, 5.0], '4.00 ± 1.41 (1 diverged)'),
            ([math.nan], '(1 diverged)'),
        ],
    )
    def test_mean_and_deviation(self, values, text):
        assert studies.mean_and_deviation(pd.Series(values)) == text


def values_of(key):
    if key['name'] == 'odd':
        raise ValueError('it is odd')
    return dict(value=f'{key["name"]}!')


def run_jobs(names, results, processes=1):
    keys = [dict(name=name, seed='0') for name in names]
    return studies.run_jobs(keys, values_of, results, processes)


class TestJobs:
    @pytest.mark.parametrize('processes', [1, 2])
    def test_go_on_where_they_were(self, tmp_path, capsys, processes):
        path = tmp_path / 'new' / 'results.csv'
        results = studies.Results(path, KEY, VALUES)
        failures = run_jobs(['odd', 'a'], results, processes)
        assert failures == ['name odd, seed 0: it is odd']
        assert path.read_text() == 'name,seed,value\na,0,a!\n'
        results = studies.Results(path, KEY, VALUES)
        assert not run_jobs('ab', results, processes)
        assert path.read_text() == 'name,seed,value\na,0,a!\nb,0,b!\n'
        assert capsys.readouterr().out.splitlines()[-2:] == [
            '1 of 2 jobs to do.',
            '1 of 1: name b, seed 0, value b!. About 0 min left',
        ]

    def test_one_process_a_folder(self, tmp_path):
        path = tmp_path / 'results.csv'
        first, second = (studies.Results(path, KEY, VALUES) for _ in range(2))
        with first.locked():
            with pytest.raises(OSError, match='could not be acquired'):
                run_jobs('a', second)
            with pytest.raises(OSError, match='could not be acquired'):
                second.merge([])
            first.add(dict(name='b', seed='0', value='1'))
        # It sees what the other one wrote.
        run_jobs('ab', second)
        assert [*second.rows.name] == ['b', 'a']


class TestTrain:
    @pytest.fixture(autouse=True)
    def _mmpretrain(self):
        import_models('mmpretrain')

    def test_a_training_that_fails(self, tmp_path):
        config = ROOT / 'configs/digits/resnet18-slim_1xb64_digits.py'
        nowhere = dict.fromkeys(
            ('train_dataloader.dataset.data_root', 'val_dataloader.dataset.data_root'),
            str(tmp_path / 'nowhere'),
        )
        with pytest.raises(RuntimeError) as failed:
            trainings.train(config, nowhere, tmp_path / 'run', 'accuracy/top1')
        message = str(failed.value)
        assert message.startswith(f'a training of {config.name} failed')
        assert 'is missing; ' in message and '\n' not in message


@pytest.mark.parametrize(
    'study, folder, document',
    [
        ('accuracy', '.', 'evidence.md'),
        ('int8', 'int8', 'int8.md'),
        ('plain_start', 'plain_start', 'plain_start.md'),
        ('plain_start', 'detector_stems', 'evidence.md'),
        ('stem_lr_sweep', 'stem_lr_sweep', 'transfer.md'),
        ('compatibility', 'compatibility', 'compatibility.md'),
    ],
)
def test_documents_have_these_figures(study, folder, document, tmp_path, capsys):
    """They are made of the rows beside them."""
    rows = ROOT / 'docs/evidence' / folder / 'results.csv'
    (tmp_path / 'results.csv').write_bytes(rows.read_bytes())
    run_here(f'benchmarks/{study}.py', '--report-only', '--out', tmp_path)
    text = (ROOT / 'docs' / document).read_text()
    _, *parts = (tmp_path / 'tables.md').read_text().split('### ')
    assert parts
    for part in parts:
        assert part.partition('\n\n')[2].strip() in text


def test_dynamics_of_a_stem():
    """Of a plain kernel the rate is one, of others that of a step of the branches."""
    measure = tool('benchmarks/stem_dynamics.py').measure
    torch.manual_seed(0)
    gradient = torch.randn(4, 2, 7, 7, dtype=torch.float64)
    options = dict(padding=3, bias=False, norm_cfg=dict(type='BN'))
    plain = build_conv('plain', 2, 4, 7, **options)
    assert measure(plain, gradient)['rate'] == pytest.approx(1)
    conv = build_conv('deep_linear', 2, 4, 7, **options).double()
    parameters = list(conv.branches.parameters())
    kernel = conv.folded_kernel()
    steps = torch.autograd.grad(kernel, parameters, gradient)
    with torch.no_grad():
        for parameter, step in zip(parameters, steps):
            parameter.add_(step, alpha=1e-7)
    moved = (conv.folded_kernel() - kernel) / 1e-7
    expected = (gradient * moved).sum() / gradient.square().sum()
    assert measure(conv, gradient)['rate'] == pytest.approx(expected.item(), rel=1e-3)
