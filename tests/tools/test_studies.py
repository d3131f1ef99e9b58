import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import import_models
from scipy import stats
from tool_runs import ROOT, tool

from mmorepa.utils.errors import OutputError

tool('benchmarks/int8.py')
studies, reports = (sys.modules[n] for n in ('studies', 'study_reports'))
KEY, VALUES = ('name', 'seed'), ('value',)


class TestDifferences:
    def test_is_that_of_a_paired_t_test(self):
        rng = np.random.default_rng(0)
        first, second = rng.normal(size=(2, 7))
        found = reports.paired_difference(
            {str(i): value for i, value in enumerate(first)},
            # Pairs are found by seed, not by order.
            {str(i): second[i] for i in reversed(range(7))},
        )
        expected = stats.ttest_rel(first, second).confidence_interval(0.95)
        assert found.pairs == 7
        assert found.mean == pytest.approx((first - second).mean())
        assert (found.low, found.high) == pytest.approx(tuple(expected))

    def test_seeds_that_only_one_has(self):
        found = reports.paired_difference(
            dict(a=3.0, b=5.0, c=100.0), dict(b=1.0, a=1.0, d=-100.0)
        )
        assert found.mean == 3 and found.pairs == 2
        assert str(found) == '+3.00 [-9.71, +15.71]'

    def test_too_few(self):
        assert reports.paired_difference(dict(a=1.0), dict(b=1.0)) is None
        found = reports.paired_difference(dict(a=1.0), dict(a=2.5))
        assert str(found) == '-1.50' and math.isnan(found.low)

    def test_mean_and_deviation(self):
        assert reports.mean_and_deviation([1.0, 3.0]) == '2.00 ± 1.41'
        assert reports.mean_and_deviation([1.0]) == '1.00'


def jobs(names, done, fails_at=None):
    def job(name):
        def run():
            if name == fails_at:
                raise KeyboardInterrupt
            done.append(name)
            return dict(value=f'{name}!')

        return studies.Job(dict(name=name, seed='0'), run)

    return [job(name) for name in names]


class TestResume:
    def test_goes_on_where_it_was(self, tmp_path, capsys):
        path, done = tmp_path / 'new' / 'results.csv', []
        with pytest.raises(SystemExit, match='Stopped. The same line goes on'):
            studies.run_jobs(
                jobs('abc', done, fails_at='b'), studies.Results(path, KEY, VALUES)
            )
        assert done == ['a']
        studies.run_jobs(jobs('abc', done), studies.Results(path, KEY, VALUES))
        assert done == ['a', 'b', 'c']
        with path.open(newline='') as file:
            rows = list(csv.DictReader(file))
        assert rows == [dict(name=n, seed='0', value=f'{n}!') for n in 'abc']
        assert [p.name for p in path.parent.iterdir()] == ['results.csv']
        printed = capsys.readouterr().out.splitlines()
        assert printed[-3:] == [
            '2 of 3 jobs to do.',
            '1 of 2: name b, seed 0, value b!. About 0 min left',
            '2 of 2: name c, seed 0, value c!. About 0 min left',
        ]

    @pytest.mark.parametrize('processes', [1, 2])
    def test_goes_on_after_any_error(self, tmp_path, processes):
        def fail():
            raise ValueError('odd')

        results = studies.Results(tmp_path / 'results.csv', KEY, VALUES)
        bad = studies.Job(dict(name='x', seed='0'), fail)
        failures = studies.run_jobs([bad, *jobs('ab', [])], results, processes)
        assert failures == ['name x, seed 0: odd']
        assert sorted(row['name'] for row in results.rows) == ['a', 'b']

    def test_one_process_a_folder(self, tmp_path):
        path = tmp_path / 'results.csv'
        first, second = (studies.Results(path, KEY, VALUES) for _ in range(2))
        with first.locked():
            with pytest.raises(OutputError, match='another process works in'):
                studies.run_jobs(jobs('a', []), second)
            with pytest.raises(OutputError, match='another process works in'):
                second.merge()
            first.add(dict(name='b', seed='0', value='1'))
        # It sees what the other one wrote.
        studies.run_jobs(jobs('ab', []), second)
        assert [row['name'] for row in second.rows] == ['b', 'a']
        assert [p.name for p in tmp_path.iterdir()] == ['results.csv']

    def test_merge(self, tmp_path, capsys):
        def file(name, *rows):
            results = studies.Results(tmp_path / name / 'results.csv', KEY, VALUES)
            results.add(*(dict(zip((*KEY, *VALUES), row)) for row in rows))
            return results

        ours = file('a', ('x', '0', '1'))
        other = file('b', ('x', '0', '2'), ('y', '0', '3'), ('y', '0', '3'))
        before = ours.path.read_text()
        with pytest.raises(FileNotFoundError, match="no results at 'gone.csv'"):
            ours.merge(other.path, Path('gone.csv'))
        assert ours.path.read_text() == before
        ours.merge(other.path)
        assert [tuple(row.values()) for row in ours.rows] == [
            ('x', '0', '1'),
            ('y', '0', '3'),
        ]
        printed = capsys.readouterr().out
        assert '1 rows are new' in printed and '1 others have other values' in printed

    def test_another_study(self, tmp_path):
        path = tmp_path / 'results.csv'
        studies.Results(path, KEY, VALUES).add(dict(name='a', seed='0', value='1'))
        with pytest.raises(ValueError, match=r"not those of this study, \['name', "):
            studies.Results(path, KEY, ('other',))


def test_diverged():
    values = dict(a=3.0, b=math.nan, c=5.0)
    assert reports.mean_and_deviation([*values.values()]) == '4.00 ± 1.41 (1 diverged)'
    assert reports.mean_and_deviation([math.nan]) == '(1 diverged)'
    assert reports.paired_difference(values, dict(a=1.0, b=1.0)).pairs == 1
    assert reports.paired_difference(dict(b=math.nan), dict(b=1.0)) is None


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
            studies.train(config, nowhere, tmp_path / 'run', 'accuracy/top1')
        message = str(failed.value)
        assert message.startswith(f'a training of {config.name} failed')
        assert 'error: the data folder' in message and 'digits.py' in message
        assert '\n' not in message

    def test_options_of_a_recipe(self):
        """The recipe's schedule with another length, and nothing else of it."""
        config = ROOT / 'configs/digits/resnet18-slim_1xb64_digits.py'
        cfg = studies.merged(config, studies.epochs_options(3))
        assert cfg.train_cfg.max_epochs == cfg.train_cfg.val_interval == 3
        warm_up, cosine = cfg.param_scheduler
        before = studies.merged(config, {}).param_scheduler
        assert warm_up == before[0]
        assert cosine == dict(before[1], T_max=3, end=3)
        assert cosine.type == 'CosineAnnealingLR'


def test_markdown_table():
    assert reports.markdown_table(('', 'x'), [('a', '1'), ('b', '2')]) == (
        '|  | x |\n| --- | --: |\n| a | 1 |\n| b | 2 |'
    )
