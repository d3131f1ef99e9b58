import os

import pytest
import torch
from helpers import assert_near, trained_like
from mmengine.hooks import EMAHook
from runners import (
    Colours,
    Probe,
    TinyClassifier,
    TinyTTA,
    colours_loader,
    logits_of,
    logits_tested,
    make_runner,
    make_test_runner,
)

from mmorepa import is_switchable
from mmorepa.converters import read_checkpoint
from mmorepa.layers import OREPAConv2d

HOOK = dict(type='SwitchToDeployHook')
EMA = dict(type='EMAHook', momentum=0.5)
SAVING = dict(checkpoint=dict(type='CheckpointHook', interval=1))


def trained_state(tmp_path, **options):
    """Checkpoint of a short training, its path, and the runner that wrote it."""
    runner = make_runner(tmp_path / 'train', default_hooks=SAVING, **options)
    runner.train()
    path = os.path.join(runner.work_dir, 'epoch_2.pth')
    return read_checkpoint(path), path, runner


class TestTest:
    def test_switches(self, tmp_path, log):
        model = trained_like(TinyClassifier())
        expected = logits_of(model)
        runner = make_test_runner(tmp_path, model, custom_hooks=[HOOK])
        runner.test()
        assert not is_switchable(model)
        assert_near(logits_tested(runner), expected)
        # It is the folded kernels that were used: float64 folds round differently.
        assert not torch.equal(logits_tested(runner), expected)
        assert torch.equal(logits_tested(runner), logits_of(model))
        (text,) = [t for t in log if t.startswith('Switched the model')]
        assert 'absolute' in text and 'relative' in text

    def test_deployed_already(self, tmp_path, log):
        """Said, since who asks for a switch and gets none should know."""
        model = TinyClassifier(deploy=True)
        make_test_runner(tmp_path, model, custom_hooks=[HOOK]).test()
        assert [text for text in log if 'Nothing to switch' in text]

    def test_after_training_in_the_same_process(self, tmp_path):
        runner = make_runner(tmp_path, custom_hooks=[HOOK])
        runner.train()
        expected = logits_of(runner.model)
        runner.test()
        assert not is_switchable(runner.model)
        assert_near(logits_tested(runner), expected)


class TestTraining:
    def test_validation_switches_nothing(self, tmp_path):
        with_hook, without = (
            make_runner(tmp_path / f'{len(hooks)}', custom_hooks=hooks)
            for hooks in ([HOOK], [])
        )
        seen = []
        with_hook.register_hook(
            Probe(after_val_epoch=lambda r: seen.append(is_switchable(r.model)))
        )
        with_hook.train()
        without.train()
        assert seen == [True, True]
        assert is_switchable(with_hook.model)
        expected = without.model.state_dict()
        found = with_hook.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


class TestEMA:
    def test_averages_are_tested(self, tmp_path):
        checkpoint, path, _ = trained_state(tmp_path, custom_hooks=[EMA])
        averages = logits_of(TinyClassifier(), checkpoint['state_dict'])
        raw = {
            key.removeprefix('module.'): value
            for key, value in checkpoint['ema_state_dict'].items()
            if key.startswith('module.')
        }
        raw = logits_of(TinyClassifier(), {**checkpoint['state_dict'], **raw})
        assert (averages - raw).abs().max() > 1e-2 * averages.abs().max()

        runner = make_test_runner(
            tmp_path / 'test', custom_hooks=[EMA, HOOK], load_from=path
        )
        runner.test()
        assert_near(logits_tested(runner), averages)
        assert not is_switchable(runner.model)
        (hook,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        assert not is_switchable(hook.ema_model)
        # Both are deployed, so that they can go on to be swapped.
        runner.test()
        assert_near(logits_tested(runner), averages)

    @pytest.mark.parametrize('update_buffers', [False, True])
    def test_swap_of_two_states(self, tmp_path, update_buffers):
        """With averages that differ from the weights, which test alone never sees."""
        model = trained_like(TinyClassifier(), seed=1)
        averages = trained_like(TinyClassifier(), seed=2)
        if not update_buffers:  # Then, MMEngine copies the statistics.
            for name, value in averages.named_buffers():
                value.copy_(model.get_buffer(name))
        expected, others = logits_of(averages), logits_of(model)
        assert (expected - others).abs().max() > 1e-2 * expected.abs().max()
        hooks = [HOOK, dict(EMA, update_buffers=update_buffers)]
        runner = make_test_runner(tmp_path, model, custom_hooks=hooks)
        (ema,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        state = averages.state_dict()
        runner.register_hook(
            Probe(before_test=lambda _: ema.ema_model.module.load_state_dict(state))
        )
        runner.test()
        assert_near(logits_tested(runner), expected)
        # After the swap back, each holds its own weights again, folded.
        assert_near(logits_of(model), others)
        assert_near(logits_of(ema.ema_model.module), expected)


class TestWrappers:
    DDP = dict(
        launcher='pytorch',
        cfg=dict(
            model_wrapper_cfg=dict(
                type='MMDistributedDataParallel',
                broadcast_buffers=False,
                device_ids=None,
            )
        ),
    )

    def test_distributed(self, tmp_path, one_process):
        runner = make_runner(
            tmp_path / 'train',
            custom_hooks=[EMA, HOOK],
            default_hooks=SAVING,
            **self.DDP,
        )
        assert isinstance(runner.model, torch.nn.parallel.DistributedDataParallel)
        runner.train()
        path = os.path.join(runner.work_dir, 'epoch_2.pth')
        expected = logits_of(TinyClassifier(), read_checkpoint(path)['state_dict'])

        test = make_test_runner(
            tmp_path / 'test', custom_hooks=[EMA, HOOK], load_from=path, **self.DDP
        )
        test.test()
        assert not is_switchable(test.model)
        assert_near(logits_tested(test), expected)

    def test_test_time_augmentation(self, tmp_path):
        model = trained_like(TinyClassifier())
        images = Colours(24).images
        with torch.no_grad():
            model.eval()
            expected = (model(images) + model(images.flip(-1))) / 2
        runner = make_test_runner(
            tmp_path,
            TinyTTA(model),
            custom_hooks=[HOOK],
            test_dataloader=colours_loader(dataset=Colours(24, flips=True)),
        )
        runner.test()
        assert not is_switchable(model)
        assert_near(logits_tested(runner), expected)


class TestTolerance:
    @pytest.fixture
    def wrong_fold(self, monkeypatch):
        """Makes the folds of a kernel size wrong."""
        right = OREPAConv2d.equivalent_kernel_bias

        def spoil(size):
            def wrong(conv):
                kernel, bias = right(conv)
                return kernel * (1.01 if conv.kernel_size[0] == size else 1), bias

            monkeypatch.setattr(OREPAConv2d, 'equivalent_kernel_bias', wrong)

        return spoil

    @pytest.mark.parametrize(('name', 'size'), [('conv1', 3), ('conv2', 1)])
    def test_names_the_first_layer(self, tmp_path, wrong_fold, name, size):
        """What comes after it sees another input, and is not to blame."""
        wrong_fold(size)
        model = trained_like(TinyClassifier())
        runner = make_test_runner(tmp_path, model, custom_hooks=[HOOK])
        with pytest.raises(RuntimeError, match=f"is '{name}', with [0-9]"):
            runner.test()

    def test_not_a_number_in_a_layer(self, tmp_path):
        model = trained_like(TinyClassifier())
        with torch.no_grad():
            model.conv2.branches.weight_origin[0] = float('nan')
        runner = make_test_runner(tmp_path, model, custom_hooks=[HOOK])
        with pytest.raises(RuntimeError, match="is 'conv2', with nan"):
            runner.test()

    def test_none_compares_nothing(self, tmp_path, wrong_fold, log):
        wrong_fold(3)
        model = trained_like(TinyClassifier())
        runner = make_test_runner(
            tmp_path, model, custom_hooks=[dict(HOOK, tolerance=None)]
        )
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        runner.test()
        assert len(calls) == 3  # And no pass for a comparison.
        assert not is_switchable(model)
        assert 'Switched the model to its deployed form.' in log

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_outputs_that_are_not_numbers(self, tmp_path, value):
        model = trained_like(TinyClassifier())
        with torch.no_grad():
            model.head.bias[0] = value
        runner = make_test_runner(tmp_path, model, custom_hooks=[HOOK])
        with pytest.raises(
            RuntimeError, match='nan of .*no re-parameterised conv is beyond'
        ):
            runner.test()
