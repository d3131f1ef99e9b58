"""Which checkpoint a training goes on from."""

import os
import shutil

import pytest
import torch

from mmorepa.runs.resume import newest_resumable, read_resumable
from mmorepa.utils.errors import CheckpointError


def save(folder, name, time=None, **content):
    """A checkpoint that says in its meta which file it is."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    state = dict(state_dict=dict(a=torch.ones(3)), message_hub={}, optimizer={})
    torch.save(
        dict(meta=dict(name=name, epoch=1, iter=1), **{**state, **content}), path
    )
    if time is not None:
        os.utime(path, (time, time))
    return path


def point_to(folder, text):
    (folder / 'last_checkpoint').write_text(str(text))


def chosen(folder):
    path, checkpoint = newest_resumable(str(folder))
    assert checkpoint['meta']['name'] == os.path.basename(path)
    return os.path.relpath(path, folder)


@pytest.fixture
def folder(tmp_path):
    """Three whole checkpoints."""
    paths = [save(tmp_path, f'epoch_{n}.pth', time=1000 + n) for n in (1, 2, 3)]
    point_to(tmp_path, paths[-1])
    return tmp_path


def spoil(path, how):
    data = path.read_bytes()
    if how == 'empty':
        path.write_bytes(b'')
    elif how == 'truncated':
        path.write_bytes(data[: len(data) // 2])
    elif how == 'missing':
        path.unlink()


@pytest.mark.parametrize('how', ['truncated', 'missing'])
def test_damaged_ones_are_left_out_and_named(folder, log, how):
    spoil(folder / 'epoch_3.pth', how)
    assert chosen(folder) == 'epoch_2.pth'
    (text,) = log
    assert 'epoch_3.pth' in text and "epoch_2.pth', since" in text
    spoil(folder / 'epoch_2.pth', how)
    assert chosen(folder) == 'epoch_1.pth'


@pytest.mark.parametrize('text', [None, '', '\0' * 20])
def test_empty_pointer(folder, text):
    (folder / 'last_checkpoint').unlink()
    if text is not None:
        point_to(folder, text)
    assert chosen(folder) == 'epoch_3.pth'


def test_files_of_an_earlier_training(folder):
    """They are of later steps, but older."""
    save(folder, 'epoch_300.pth', time=10)
    assert chosen(folder) == 'epoch_3.pth'
    spoil(folder / 'epoch_3.pth', 'empty')
    assert chosen(folder) == 'epoch_2.pth'


def test_copies_in_any_order(folder):
    """Their times say when they were copied."""
    os.utime(folder / 'epoch_1.pth', (9000, 9000))
    assert chosen(folder) == 'epoch_3.pth'


def test_moved_folder(folder, log):
    point_to(folder, '/elsewhere/epoch_3.pth')
    assert chosen(folder) == 'epoch_3.pth'
    assert log == []


def test_copied_folder(folder, tmp_path_factory):
    """Not that of which it is a copy."""
    copy = tmp_path_factory.mktemp('copies') / 'copy'
    shutil.copytree(folder, copy)
    spoil(copy / 'epoch_3.pth', 'empty')
    assert chosen(copy) == 'epoch_2.pth'


def test_other_folder(folder, tmp_path):
    """CheckpointHook may save to one, and tells by the pointer alone."""
    out = tmp_path / 'out'
    point_to(folder, save(out, 'iter_8.pth', time=3000))
    assert chosen(folder) == 'out/iter_8.pth'


def test_other_files(folder, log):
    """What is no checkpoint to resume from, and no reason for a warning either."""
    for name in ('best_top1_epoch_9.pth', '.epoch_4.pth', 'epoch_3_deploy.pth'):
        save(folder, name, time=5000)
    assert chosen(folder) == 'epoch_3.pth'
    assert log == []


def test_weights_alone(folder, log):
    save(folder, 'epoch_3.pth', optimizer=None)
    path = folder / 'epoch_3.pth'
    torch.save(dict(state_dict=dict(a=torch.ones(3))), path)
    assert chosen(folder) == 'epoch_2.pth'
    assert 'not the state of a training run' in log[0]
    with pytest.raises(CheckpointError, match='message_hub, meta, optimizer missing'):
        read_resumable(str(path))


def test_none_is_whole(folder):
    for path in folder.glob('*.pth'):
        spoil(path, 'truncated')
    with pytest.raises(CheckpointError, match='can be resumed from') as error:
        newest_resumable(str(folder))
    assert all(f'epoch_{n}.pth' in str(error.value) for n in (1, 2, 3))


def test_nothing_there(tmp_path, log):
    assert newest_resumable(str(tmp_path / 'none')) == (None, None)
    assert 'training starts anew' in log[0]
