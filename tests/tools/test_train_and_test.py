"""From data to a deployed network, and every flag on the way."""

import json
import pickle
import signal
import socket
import subprocess
import time

import mmpretrain_tools
import pytest
import torch
from helpers import assert_near, import_models, trained_like
from mmengine.config import Config
from tool_runs import (
    ROOT,
    command,
    environment,
    run_apart,
    run_here,
    run_runner,
)
from tool_runs import (
    tool as module_of,
)

from mmorepa.converters import read_checkpoint, write_checkpoint
from mmorepa.runs import build_model

pytestmark = pytest.mark.slow

EPOCHS, ITERATIONS, DIGITS = 4, 15, 355
# Of the accuracy in percent: one digit that is as good as undecided.
CLOSE = 1.01 * 100 / DIGITS
SWITCH = 'model_converters/switch_to_deploy.py'


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


def assert_same_weights(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value.is_floating_point() and value.any():
            assert_near(found[key], value, tolerance)
        else:
            assert torch.equal(found[key], value), key


def metrics_of(config, checkpoint, tmp_path, *flags, options=()):
    """Accuracy, as tools/test.py returns and writes it."""
    out = tmp_path / 'metrics.json'
    flags = ['--work-dir', tmp_path / 'test', '--out', out, *flags]
    found = run_runner(
        'test.py',
        config,
        checkpoint,
        '--out-item',
        'metrics',
        *flags,
        options=options,
    )
    assert json.loads(out.read_text()) == found
    out.unlink()
    return found


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
    run_here(SWITCH, config, checkpoint, files[0], '--json', files[1])
    return files


class TestTraining:
    def test_learns(self, trained):
        training, validation = records(trained)
        assert [r['iter'] for r in training] == list(range(1, EPOCHS * ITERATIONS + 1))
        assert [r['epoch'] for r in training[::ITERATIONS]] == list(
            range(1, EPOCHS + 1)
        )
        assert [r['step'] for r in validation] == list(range(1, EPOCHS + 1))
        losses = [r['loss'] for r in training]
        assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
        assert validation[-1]['accuracy/top1'] > 50  # Chance is at 10.
        assert (trained / f'epoch_{EPOCHS}.pth').is_file()

    def test_can_be_repeated(self, config, trained, tmp_path):
        options = ['train_cfg.max_epochs=1']
        run_runner('train.py', config, '--work-dir', tmp_path, options=options)
        assert_same_weights(
            weights(tmp_path / 'epoch_1.pth'), weights(trained / 'epoch_1.pth'), 0
        )

    def test_killed_and_resumed(self, config, trained, tmp_path):
        """What is lost is the epoch that was under way, and nothing else."""
        line = command('train.py', config, '--work-dir', tmp_path)
        process = subprocess.Popen(
            line,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                logged = list(tmp_path.glob('*/vis_data/scalars.json'))
                # In the middle of the second epoch.
                if logged and '"epoch": 2' in logged[0].read_text():
                    break
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL
        last = (tmp_path / 'last_checkpoint').read_text()
        epoch = int(last[-5])
        assert last == str(tmp_path / f'epoch_{epoch}.pth')
        assert epoch in (1, 2, 3)  # Kills do not always come at the moment.

        time.sleep(1)  # Folders of logs are named by the second.
        run_runner('train.py', config, '--work-dir', tmp_path, '--resume')
        training, validation = records(tmp_path)
        assert (training[0]['epoch'], training[0]['iter']) == (
            epoch + 1,
            epoch * ITERATIONS + 1,
        )
        # What was saved is not validated yet, as far as the checkpoint knows.
        assert [r['step'] for r in validation] == list(range(epoch, EPOCHS + 1))
        expected, expected_validation = records(trained)
        assert [r['lr'] for r in training] == [
            r['lr'] for r in expected[epoch * ITERATIONS :]
        ]
        assert [r['loss'] for r in training] == [
            r['loss'] for r in expected[epoch * ITERATIONS :]
        ]
        assert validation[-1]['accuracy/top1'] == pytest.approx(
            expected_validation[-1]['accuracy/top1'], abs=CLOSE
        )
        name = f'epoch_{EPOCHS}.pth'
        assert_same_weights(weights(tmp_path / name), weights(trained / name))

    def test_resume_from_a_file(self, config, trained, tmp_path):
        run_runner(
            'train.py',
            config,
            '--work-dir',
            tmp_path,
            '--resume',
            trained / 'epoch_3.pth',
        )
        training, _ = records(tmp_path)
        assert training[0]['iter'] == 3 * ITERATIONS + 1
        name = f'epoch_{EPOCHS}.pth'
        assert_same_weights(weights(tmp_path / name), weights(trained / name))

    def test_flags(self, config, tmp_path):
        run_runner(
            'train.py',
            config,
            '--work-dir',
            tmp_path,
            '--amp',
            '--no-validate',
            '--auto-scale-lr',
            '--no-persistent-workers',
            '--no-pin-memory',
            options=['train_cfg.max_epochs=1'],
        )
        training, validation = records(tmp_path)
        assert len(training) == ITERATIONS and validation == []
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
        self, config, trained, checkpoint, deployed, tmp_path
    ):
        expected = metrics_of(config, checkpoint, tmp_path)
        assert expected['accuracy/top1'] == pytest.approx(
            records(trained)[1][-1]['accuracy/top1'], abs=CLOSE
        )
        deploy = ['model.backbone.deploy=True']
        for file, flags, options in (
            (checkpoint, ['--deploy'], []),
            (deployed[0], [], deploy),
            (deployed[0], ['--deploy'], deploy),
            (checkpoint, [], deploy),  # Folds while loading.
        ):
            found = metrics_of(config, file, tmp_path, *flags, options=options)
            assert found == pytest.approx(expected, abs=CLOSE)

    def test_config_beside_the_checkpoint(self, config, checkpoint, deployed, tmp_path):
        """It needs no flag, no base, and builds the same again when it is read."""
        written = deployed[0].with_name('deployed_config.py')
        assert '_base_' not in written.read_text()
        expected = metrics_of(config, checkpoint, tmp_path)
        found = metrics_of(written, deployed[0], tmp_path)
        assert found == pytest.approx(expected, abs=CLOSE)
        before = written.read_text()
        run_here(SWITCH, config, checkpoint, deployed[0])  # It may be written again.
        assert written.read_text() == before

    def test_config_of_the_users_own(self, config, checkpoint, tmp_path):
        own = tmp_path / 'a_config.py'
        own.write_text('x = 1\n')
        with pytest.raises(SystemExit, match='^error: .*a_config.py.* which is yours'):
            run_here(SWITCH, config, checkpoint, tmp_path / 'a.pth')
        assert [p.name for p in tmp_path.iterdir()] == ['a_config.py']
        assert own.read_text() == 'x = 1\n'

    def test_without_a_config_for_the_deployed_form(
        self, config, tmp_path, capsys, monkeypatch
    ):
        own = tmp_path / 'own.py'
        own.write_text(f"""
_base_ = {str(config)!r}

plain = dict(type='ResNet', depth=18, stem_channels=8, base_channels=8)
model = dict(
    backbone=dict(_delete_=True, type='Reparameterized', block='dbb', module=plain)
)
""")
        state = trained_like(build_model(Config.fromfile(own))).state_dict()
        write_checkpoint(dict(state_dict=state), tmp_path / 'a.pth')
        monkeypatch.setattr(
            module_of(SWITCH), 'least_seconds', lambda f: ([0.0 for _ in f], 1.0)
        )
        run_here(SWITCH, own, tmp_path / 'a.pth', tmp_path / 'b.pth')
        words = 'and no config: no config builds the deployed form'
        assert words in capsys.readouterr().out
        assert not (tmp_path / 'b_config.py').exists()

    def test_predictions(self, config, checkpoint, tmp_path):
        files = [tmp_path / 'train.pkl', tmp_path / 'deploy.pkl']
        for out, flags in zip(files, ([], ['--deploy'])):
            run_runner(
                'test.py',
                config,
                checkpoint,
                '--work-dir',
                tmp_path,
                '--out',
                out,
                *flags,
            )
        scores = [
            torch.stack([s['pred_score'] for s in pickle.loads(file.read_bytes())])
            for file in files
        ]
        assert scores[0].shape == (DIGITS, 10)
        assert_near(scores[1], scores[0])
        assert not torch.equal(*scores)

    def test_figures(self, checkpoint, deployed):
        figures = json.loads(deployed[1].read_text())
        before, after = figures['training_form'], figures['deployed']
        state, folded = weights(checkpoint), weights(deployed[0])
        assert after['params'] == sum(v.numel() for v in folded.values())
        assert before['params'] > 2 * after['params']
        size = sum(v.numel() * v.element_size() for v in state.values())
        assert before['megabytes'] == pytest.approx(size / 1e6)
        assert after['megabytes'] == pytest.approx(4 * after['params'] / 1e6)
        # The same convs on the same image, and the BatchNorms that are gone.
        assert after['gflops'] < before['gflops'] < 1.05 * after['gflops']
        assert before['latency_ms'] > 0 and after['latency_ms'] > 0
        assert set(figures['differences']) == {'random input', 'test images'}
        for difference in figures['differences'].values():
            assert 0 < difference['relative'] < 1e-5
            assert 0 < difference['absolute'] < 1e-3

    def test_checkpoint_keeps_meta(self, checkpoint, deployed):
        before, after = (read_checkpoint(str(p)) for p in (checkpoint, deployed[0]))
        assert set(after) == {'meta', 'state_dict'}
        assert after['meta']['cfg'] == before['meta']['cfg']
        assert after['meta']['epoch'] == EPOCHS and after['meta']['deployed'] is True
        assert deployed[0].stat().st_size < checkpoint.stat().st_size / 2

    def test_without_the_data(self, config, checkpoint, tmp_path):
        options = ['--cfg-options', 'test_dataloader.dataset.data_root=/none']
        figures = run_here(
            SWITCH,
            config,
            checkpoint,
            tmp_path / 'a.pth',
            '--shape',
            '64',
            '96',
            *options,
        )
        assert set(figures['differences']) == {'random input'}
        assert (tmp_path / 'a.pth').is_file()

    def test_tolerance(self, config, checkpoint, tmp_path):
        with pytest.raises(SystemExit, match='^error: the deployed form differs'):
            run_here(
                SWITCH, config, checkpoint, tmp_path / 'a.pth', '--tolerance', '1e-12'
            )
        assert not list(tmp_path.iterdir())

    def test_augmentation_and_amp(self, config, checkpoint, tmp_path):
        plain = metrics_of(config, checkpoint, tmp_path)['accuracy/top1']
        amp = metrics_of(config, checkpoint, tmp_path, '--deploy', '--amp')
        assert amp['accuracy/top1'] == pytest.approx(plain, abs=5)
        flips = metrics_of(config, checkpoint, tmp_path, '--deploy', '--tta')
        # A mirror image of a digit is often none.
        assert 10 < flips['accuracy/top1'] < plain
        other = metrics_of(config, checkpoint, tmp_path, '--tta')
        assert flips == pytest.approx(other, abs=CLOSE)

    def test_images(self, config, checkpoint, tmp_path):
        shown = tmp_path / 'shown'
        metrics_of(
            config, checkpoint, tmp_path, '--show-dir', shown, '--interval', '100'
        )
        # mmpretrain miscounts in the last, shorter batch.
        assert 4 <= len(list(shown.glob('*.png'))) <= 6

    def test_hook_of_the_config_is_not_doubled(self, config, checkpoint, tmp_path):
        """Its tolerance, in particular, is kept."""
        own = tmp_path / 'own.py'
        own.write_text(
            f'_base_ = {str(config)!r}\n'
            "custom_hooks = [dict(type='SwitchToDeployHook', tolerance=1e-12)]\n"
        )
        with pytest.raises(RuntimeError, match='differs from the training form'):
            metrics_of(own, checkpoint, tmp_path, '--deploy')

    @pytest.mark.parametrize(
        'flags', [['--out-item', 'pred'], ['--out', 'a.json'], ['--out', 'a.txt']]
    )
    def test_flags_that_do_not_go_together(self, config, checkpoint, flags, capsys):
        with pytest.raises(SystemExit) as info:
            run_here('test.py', config, checkpoint, *flags)
        assert info.value.code == 2 and 'error:' in capsys.readouterr().err


class TestErrors:
    """One line for what a user can mend, and nothing written."""

    def assert_error(self, words, tool, *args, options=(), written=()):
        with pytest.raises(SystemExit) as info:
            if tool == SWITCH:
                run_here(tool, *args, *(['--cfg-options', *options] if options else []))
            else:
                run_runner(tool, *args, options=options)
        text = info.value.code
        assert text.startswith('error: ') and '\n' not in text
        assert words in text
        for path in written:
            assert not path.exists()

    @pytest.fixture
    def out(self, tmp_path):
        return tmp_path / 'out.pth'

    @pytest.fixture
    def work(self, tmp_path):
        return tmp_path / 'work'

    @pytest.mark.parametrize(
        'option, words',
        [
            ('model.backbone.block=nothing', "unknown block 'nothing'; choose one of"),
            ('model.backbone.depth=19', 'unknown depth 19 of OREPAResNet; choose one'),
            ('model.backbone.type=Nothing', "type='Nothing' is not in the"),
        ],
    )
    def test_network(self, config, checkpoint, work, out, option, words):
        flags = ['--work-dir', work]
        self.assert_error(words, 'train.py', config, *flags, options=[option])
        self.assert_error(
            words, 'test.py', config, checkpoint, *flags, options=[option]
        )
        assert not list(work.glob('**/*.pth'))
        self.assert_error(
            words, SWITCH, config, checkpoint, out, options=[option], written=[out]
        )

    def test_data(self, config, checkpoint, work):
        words = "the data folder '/none' is missing; run: python tools/dataset_conv"
        for phase, tool, args in (
            ('train', 'train.py', [config]),
            ('val', 'train.py', [config]),
            ('test', 'test.py', [config, checkpoint]),
        ):
            options = [f'{phase}_dataloader.dataset.data_root=/none']
            self.assert_error(
                words, tool, *args, '--work-dir', work, options=options, written=[work]
            )

    def test_config(self, checkpoint, work, out):
        words = "no config at 'none.py'"
        flags = ['--work-dir', work]
        self.assert_error(words, 'train.py', 'none.py', *flags, written=[work])
        self.assert_error(
            words, 'test.py', 'none.py', checkpoint, *flags, written=[work]
        )
        self.assert_error(words, SWITCH, 'none.py', checkpoint, out, written=[out])

    def test_missing_checkpoint(self, config, work, out):
        words, flags = "no checkpoint at 'none.pth'", ['--work-dir', work]
        self.assert_error(
            words, 'train.py', config, '--resume', 'none.pth', *flags, written=[work]
        )
        self.assert_error(words, 'test.py', config, 'none.pth', *flags, written=[work])
        self.assert_error(words, SWITCH, config, 'none.pth', out, written=[out])

    def test_no_checkpoint(self, config, work, out):
        """A file of another kind."""
        flags = ['--work-dir', work]
        words = 'cannot be read as a checkpoint'
        self.assert_error(words, 'test.py', config, config, *flags)
        self.assert_error(words, 'train.py', config, '--resume', config, *flags)
        self.assert_error(words, SWITCH, config, config, out, written=[out])

    def test_deployed_into_the_training_form(self, config, deployed, work, out):
        flags = ['--work-dir', work]
        for words in (
            'Build the model with deploy=True',
            '--cfg-options model.backbone.deploy=True',
            'NAME_config.py',
        ):
            self.assert_error(words, 'test.py', config, deployed[0], *flags)
        words = 'holds weights but not the state of a training run'
        self.assert_error(words, 'train.py', config, '--resume', deployed[0], *flags)
        assert not list(work.glob('**/*.pth'))
        self.assert_error(
            'deployed already', SWITCH, config, deployed[0], out, written=[out]
        )

    def test_weights_to_start_from_are_deployed(self, config, deployed, work):
        """Found when the runner loads them, after it is built."""
        self.assert_error(
            'Build the model with deploy=True',
            'train.py',
            config,
            '--work-dir',
            work,
            options=[f'load_from={deployed[0]}'],
        )
        assert not list(work.glob('**/*.pth'))

    @pytest.mark.parametrize('depth', [34, 50])
    def test_another_architecture(self, config, checkpoint, work, out, depth):
        options = [f'model.backbone.depth={depth}']
        if depth == 50:
            options.append('model.head.in_channels=256')
        words = 'the checkpoint does not fit the config: '
        flags = ['--work-dir', work]
        self.assert_error(words, 'test.py', config, checkpoint, *flags, options=options)
        self.assert_error(
            words, 'train.py', config, '--resume', checkpoint, *flags, options=options
        )
        assert not list(work.glob('**/*.pth'))
        self.assert_error(
            words, SWITCH, config, checkpoint, out, options=options, written=[out]
        )

    def test_another_block(self, config, checkpoint, work):
        """Plain kernels in the place of branches: the deployed form looks so."""
        self.assert_error(
            'does not fit',
            'test.py',
            config,
            checkpoint,
            '--work-dir',
            work,
            options=['model.backbone.block=plain'],
        )

    def test_converter_of_a_deployed_network(self, config, checkpoint, out):
        self.assert_error(
            'no re-parameterised conv in training form',
            SWITCH,
            config,
            checkpoint,
            out,
            options=['model.backbone.deploy=True'],
            written=[out],
        )

    def test_output(self, config, checkpoint, tmp_path):
        before = checkpoint.read_bytes()
        self.assert_error(
            'write to another file', SWITCH, config, checkpoint, checkpoint
        )
        assert checkpoint.read_bytes() == before
        self.assert_error('is a folder', SWITCH, config, checkpoint, tmp_path)
        (tmp_path / 'file').touch()
        self.assert_error('file', SWITCH, config, checkpoint, tmp_path / 'file' / 'a')

    def test_scaling_without_a_base(self, config, work, tmp_path):
        own = tmp_path / 'own.py'
        own.write_text(f'_base_ = {str(config)!r}\nauto_scale_lr = None\n')
        self.assert_error(
            '--auto-scale-lr needs auto_scale_lr',
            'train.py',
            own,
            '--work-dir',
            work,
            '--auto-scale-lr',
            written=[work],
        )

    def test_on_the_command_line(self, config, checkpoint, tmp_path):
        done = run_apart(
            *command('test.py', config, checkpoint, '--work-dir', tmp_path),
            '--cfg-options',
            'model.backbone.depth=34',
        )
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if 'Warning' not in line]
        assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
        assert 'Traceback' not in done.stderr
        assert 'does not fit the config' in lines[-1]


class TestOtherTools:
    """Those of mmpretrain, with our configs and without a line of ours."""

    def test_of_mmpretrain(self, config, checkpoint, trained, tmp_path):
        mmpretrain_tools.run(
            'train.py',
            config,
            '--work-dir',
            tmp_path,
            '--cfg-options',
            'train_cfg.max_epochs=1',
            *mmpretrain_tools.NO_WORKERS,
        )
        assert_same_weights(
            weights(tmp_path / 'epoch_1.pth'), weights(trained / 'epoch_1.pth')
        )
        out = tmp_path / 'out.json'
        mmpretrain_tools.run(
            'test.py',
            config,
            checkpoint,
            '--work-dir',
            tmp_path,
            '--out',
            out,
            '--out-item',
            'metrics',
            '--cfg-options',
            *mmpretrain_tools.NO_WORKERS,
        )
        assert json.loads(out.read_text())['accuracy/top1'] == pytest.approx(
            records(trained)[1][-1]['accuracy/top1'], abs=CLOSE
        )

    def test_conversion_of_mmpretrain(self, config, checkpoint, tmp_path):
        theirs, ours = tmp_path / 'theirs.pth', tmp_path / 'ours.pth'
        mmpretrain_tools.run(
            'model_converters/reparameterize_model.py', config, checkpoint, theirs
        )
        run_here(SWITCH, config, checkpoint, ours)
        assert_same_weights(weights(theirs), weights(ours))

    def test_of_a_stock_resnet(self, config, digits, tmp_path):
        """mmpretrain's own ResNet, trained with OREPA convs, and deployed."""
        own = tmp_path / 'stock.py'
        own.write_text(f"""
_base_ = {str(config)!r}

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        stem_channels=8,
        base_channels=8,
        conv_cfg=dict(type='OREPAConv2d'),
    )
)
""")
        options = ['train_cfg.max_epochs=3']
        run_runner('train.py', own, '--work-dir', tmp_path / 'a', options=options)
        checkpoint = tmp_path / 'a' / 'epoch_3.pth'
        state = weights(checkpoint)
        assert 'backbone.layer4.1.conv2.branches.weight_pointwise_kxk_2' in state
        # The norms stay modules of the ResNet.
        assert 'backbone.layer4.1.bn2.running_var' in state
        losses = [r['loss'] for r in records(tmp_path / 'a')[0]]
        assert losses[-1] < 0.9 * losses[0]

        expected = metrics_of(own, checkpoint, tmp_path)
        expected = pytest.approx(expected, abs=CLOSE)
        assert metrics_of(own, checkpoint, tmp_path, '--deploy') == expected

        out = tmp_path / 'deployed.pth'
        figures = run_here(SWITCH, own, checkpoint, out)
        assert figures['deployed']['params'] < figures['training_form']['params'] / 2
        plain = ['model.backbone.conv_cfg.type=Conv2d']
        assert metrics_of(own, out, tmp_path, options=plain) == expected


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


class TestLaunchers:
    def test_two_processes(self, config, trained, checkpoint, tmp_path):
        """Two halves of a batch train as the whole does, without a GPU."""
        import_models('mmpretrain')
        options = [
            'train_cfg.max_epochs=1',
            f'load_from={checkpoint}',
            'model.backbone.norm_eval=True',
            'train_dataloader.dataset.pipeline.2.padding=0',  # Crops nothing.
            'model.backbone.norm_cfg.type=SyncBN',
        ]
        done = run_apart(
            'bash',
            ROOT / 'tools' / 'dist_train.sh',
            config,
            2,
            '--work-dir',
            tmp_path / 'two',
            '--cfg-options',
            'train_dataloader.batch_size=8',
            *options,
            PORT=free_port(),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert 'SyncBN needs GPUs: training with BN' in done.stdout
        options[-1] = 'model.backbone.norm_cfg.type=BN'
        run_runner('train.py', config, '--work-dir', tmp_path / 'one', options=options)
        one, two = (weights(tmp_path / name / 'epoch_1.pth') for name in ('one', 'two'))
        # Rounding grows from step to step.
        assert_same_weights(two, one, 1e-3)
        start = weights(checkpoint)['head.fc.weight']
        assert not torch.allclose(one['head.fc.weight'], start, rtol=1e-2)
        accuracies = [
            records(tmp_path / name)[1][0]['accuracy/top1'] for name in ('one', 'two')
        ]
        # As far apart as the weights may be, more digits are undecided.
        assert accuracies[0] == pytest.approx(accuracies[1], abs=3 * CLOSE)

        out = tmp_path / 'metrics.json'
        done = run_apart(
            'bash',
            ROOT / 'tools' / 'dist_test.sh',
            config,
            checkpoint,
            2,
            '--work-dir',
            tmp_path / 'test',
            '--deploy',
            '--out',
            out,
            '--out-item',
            'metrics',
            PORT=free_port(),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(out.read_text())['accuracy/top1'] == pytest.approx(
            records(trained)[1][-1]['accuracy/top1'], abs=CLOSE
        )

    def test_slurm(self, tmp_path):
        """The line that srun is given."""
        fake = tmp_path / 'srun'
        fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
        fake.chmod(0o755)
        line = ['bash', ROOT / 'tools' / 'slurm_train.sh', 'part', 'job', 'a b.py', 'w']
        path = f'{tmp_path}:{environment()["PATH"]}'
        done = run_apart(*line, '--amp', PATH=path, GPUS='4', SRUN_ARGS='-x n1')
        words = done.stdout.splitlines()
        assert done.returncode == 0
        assert {'--partition=part', '--ntasks=4', '--ntasks-per-node=4'} < set(words)
        assert words[words.index('-x') + 1] == 'n1'
        assert words[words.index('a b.py') :] == [
            'a b.py',
            '--work-dir',
            'w',
            '--launcher',
            'slurm',
            '--amp',
        ]

    @pytest.mark.parametrize(
        'name', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh']
    )
    def test_usage(self, name):
        done = run_apart('bash', ROOT / 'tools' / name, 'a')
        assert done.returncode == 2 and done.stderr.startswith('Usage: ')
