"""From data to a deployed network, and every flag on the way."""

import json

import pytest
import torch
from helpers import assert_near_states
from mmengine.config import Config
from tool_runs import (
    ROOT,
    SWITCH,
    command,
    run_apart,
    run_here,
    run_name,
    run_runner,
    run_tool_of,
    skip_timing,
)

from mmorepa.converters import read_checkpoint

pytestmark = pytest.mark.slow

EPOCHS, ITERATIONS, DIGITS = 4, 15, 119
# Of the accuracy in percent: one digit that is as good as undecided.
CLOSE = 1.01 * 100 / DIGITS
DEPLOY = ['model.backbone.deploy=True']


def records(work_dir):
    """What the last run in a folder has logged: (training, validation)."""
    (*_, path) = sorted(work_dir.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return (
        [line for line in lines if 'loss' in line],
        [line for line in lines if 'accuracy/top1' in line],
    )


def weights(path):
    return read_checkpoint(str(path))['state_dict']


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    skip_timing(monkeypatch)


@pytest.fixture
def metrics_of(tmp_path):
    """Calls tools/test.py; the accuracy, as it is returned and written."""

    def test(config, checkpoint, *flags, options=()):
        out = tmp_path / 'metrics.json'
        out.unlink(missing_ok=True)
        flags = ['--work-dir', tmp_path / 'test', '--out', out, *flags]
        line = [config, checkpoint, '--out-item', 'metrics', *flags]
        returned = run_runner('test.py', *line, options=options)
        assert json.loads(out.read_text()) == returned
        return returned['accuracy/top1']

    return test


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory):
    """The folder of a training that nothing has interrupted."""
    work_dir = tmp_path_factory.mktemp('trained')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_runner('train.py', config, '--work-dir', work_dir)
    torch.set_num_threads(threads)
    return work_dir


@pytest.fixture(scope='module')
def checkpoint(trained):
    return trained / f'epoch_{EPOCHS}.pth'


@pytest.fixture(scope='module')
def deployed(config, checkpoint, tmp_path_factory):
    """A deployed checkpoint, and the figures that were written with it."""
    folder = tmp_path_factory.mktemp('deployed')
    files = folder / 'deployed.pth', folder / 'figures.json'
    with pytest.MonkeyPatch.context() as patch:
        skip_timing(patch)
        run_here(SWITCH, config, checkpoint, files[0], '--json', files[1])
    return files


class TestTraining:
    def test_learns(self, trained):
        training, validation = records(trained)
        assert [r['iter'] for r in training] == list(range(1, EPOCHS * ITERATIONS + 1))
        assert [r['step'] for r in validation] == list(range(1, EPOCHS + 1))
        losses = [r['loss'] for r in training]
        assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
        assert validation[-1]['accuracy/top1'] > 50  # Chance is at 10.

    def test_resume_from_a_file(self, config, trained, checkpoint, tmp_path):
        start = trained / f'epoch_{EPOCHS - 1}.pth'
        run_runner('train.py', config, '--work-dir', tmp_path, '--resume', start)
        training, _ = records(tmp_path)
        expected = records(trained)[0][-ITERATIONS:]
        for key in ('iter', 'lr', 'loss'):
            assert [r[key] for r in training] == [r[key] for r in expected]
        found = weights(tmp_path / checkpoint.name)
        assert_near_states(found, weights(checkpoint), 1e-6)

    def test_flags(self, config, tmp_path):
        flags = ['--amp', '--no-validate', '--auto-scale-lr']
        flags += ['--no-persistent-workers', '--no-pin-memory']
        options = ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=32']
        line = [config, '--work-dir', tmp_path, *flags]
        run_runner('train.py', *line, options=options)
        training, validation = records(tmp_path)
        assert len(training) == 2 and validation == []
        cfg = Config.fromfile(tmp_path / config.name)
        assert cfg.optim_wrapper.type == 'BFloat16OptimWrapper'
        assert cfg.train_dataloader.persistent_workers is False
        assert cfg.train_dataloader.pin_memory is False
        # A quarter of the batch that the learning rate is meant for; warm-up takes 0.2.
        assert training[0]['lr'] == pytest.approx(0.2 * 0.02 * 16 / 64)
        for value in weights(tmp_path / 'epoch_1.pth').values():
            assert value.dtype != torch.bfloat16 and torch.isfinite(value).all()


class TestDeployment:
    def test_same_accuracy_in_every_form(
        self, config, trained, checkpoint, deployed, metrics_of
    ):
        expected = pytest.approx(metrics_of(config, checkpoint), abs=CLOSE)
        assert records(trained)[1][-1]['accuracy/top1'] == expected
        written = deployed[0].with_name('deployed_config.py')
        assert '_base_' not in written.read_text()
        assert metrics_of(written, deployed[0]) == expected
        assert metrics_of(config, checkpoint, '--deploy') == expected
        assert metrics_of(config, deployed[0], options=DEPLOY) == expected
        # Folds while loading.
        assert metrics_of(config, checkpoint, options=DEPLOY) == expected

    def test_figures(self, checkpoint, deployed):
        figures = json.loads(deployed[1].read_text())
        before, after = figures['training_form'], figures['deployed']
        state, folded = weights(checkpoint), weights(deployed[0])
        assert after['params'] == sum(v.numel() for v in folded.values())
        assert before['params'] > 2 * after['params']
        size = sum(v.numel() * v.element_size() for v in state.values())
        assert before['megabytes'] == pytest.approx(size / 1e6)
        # The same convs on the same image, and the BatchNorms that are gone.
        assert after['gflops'] < before['gflops'] < 1.05 * after['gflops']
        assert set(figures['differences']) == {'random input', 'test images'}
        for difference in figures['differences'].values():
            assert 0 < difference['relative'] < 1e-5

    def test_without_the_data(self, config, checkpoint, tmp_path):
        line = [config, checkpoint, tmp_path / 'a.pth', '--shape', '64', '96']
        options = ['--cfg-options', 'test_dataloader.dataset.data_root=/none']
        figures = run_here(SWITCH, *line, *options)
        assert set(figures['differences']) == {'random input'}
        assert (tmp_path / 'a.pth').is_file()

    def test_tolerance(self, config, checkpoint, tmp_path):
        line = [config, checkpoint, tmp_path / 'a.pth', '--tolerance', '1e-12']
        with pytest.raises(SystemExit, match='^error: the deployed form differs'):
            run_here(SWITCH, *line)
        assert not list(tmp_path.iterdir())

    def test_augmentation_amp_and_images(
        self, config, checkpoint, metrics_of, tmp_path
    ):
        plain = metrics_of(config, checkpoint)
        shown = ['--show-dir', tmp_path / 'shown', '--interval', '100']
        amp = metrics_of(config, checkpoint, '--deploy', '--amp', *shown)
        assert amp == pytest.approx(plain, abs=5)
        assert list((tmp_path / 'shown').glob('*.png'))
        # A mirror image of a digit is often none.
        assert 10 < metrics_of(config, checkpoint, '--deploy', '--tta') < plain


class TestErrors:
    """One line for what a user can mend, and nothing written.

    Others are in test_bad_command_lines.py, which have nothing trained.
    """

    def error(self, tool, *args, options=()):
        with pytest.raises(SystemExit) as info:
            if tool == SWITCH:
                run_here(tool, *args, *(['--cfg-options', *options] if options else []))
            else:
                run_runner(tool, *args, options=options)
        text = info.value.code
        assert text.startswith('error: ') and '\n' not in text
        return text

    def test_deployed_into_the_training_form(self, config, deployed, tmp_path):
        flags = ['--work-dir', tmp_path / 'work']
        text = self.error('test.py', config, deployed[0], *flags)
        assert 'deploy=True' in text and 'NAME_config.py' in text
        text = self.error('train.py', config, '--resume', deployed[0], *flags)
        assert 'not the state of a training run' in text
        options = [f'load_from={deployed[0]}']
        text = self.error('train.py', config, *flags, options=options)
        assert 'deploy=True' in text
        text = self.error(SWITCH, config, deployed[0], tmp_path / 'a.pth')
        assert 'deployed already' in text
        assert not list(tmp_path.glob('**/*.pth'))

    def test_on_the_command_line(self, config, checkpoint, tmp_path):
        done = run_apart(
            *command('test.py', config, checkpoint, '--work-dir', tmp_path),
            *('--cfg-options', 'model.backbone.depth=34'),
        )
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if 'Warning' not in line]
        assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
        assert 'Traceback' not in done.stderr


class TestOtherTools:
    """Those of mmpretrain, with our configs and without a line of ours."""

    def run(self, name, *args):
        # Their defaults ask for workers that persist.
        phases = ('train', 'val', 'test')
        workers = [f'{phase}_dataloader.persistent_workers=False' for phase in phases]
        run_tool_of('mmpretrain', name, *args, *workers, run_name())

    def test_of_mmpretrain(self, config, checkpoint, trained, tmp_path):
        line = [config, '--work-dir', tmp_path, '--cfg-options']
        self.run('train.py', *line, 'train_cfg.max_epochs=1')
        ours = weights(trained / 'epoch_1.pth')
        assert_near_states(weights(tmp_path / 'epoch_1.pth'), ours, 1e-6)
        out = tmp_path / 'out.json'
        line = [config, checkpoint, '--work-dir', tmp_path, '--out', out]
        self.run('test.py', *line, '--out-item', 'metrics', '--cfg-options')
        assert json.loads(out.read_text())['accuracy/top1'] == pytest.approx(
            records(trained)[1][-1]['accuracy/top1'], abs=CLOSE
        )


@pytest.mark.parametrize('name', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_usage(name):
    done = run_apart('bash', ROOT / 'tools' / name, 'a')
    assert done.returncode == 2 and done.stderr.startswith('Usage: ')
