import os
import resource
from contextlib import contextmanager

import pytest
import torch

from mmorepa.converters import write_checkpoint
from mmorepa.utils.errors import OutputError
from mmorepa.utils.files import atomic_write, check_outputs


@contextmanager
def full_disk(left=1000):
    """Files cannot become larger: the system says so in the midst of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def path(tmp_path):
    """A file that is there."""
    path = tmp_path / 'a.txt'
    path.write_text('old')
    return path


class TestAtomicWrite:
    def test_replaces(self, path):
        with atomic_write(path) as file:
            file.write_text('new')
            assert path.read_text() == 'old' and file.suffix == '.txt'
        assert path.read_text() == 'new'
        assert os.listdir(path.parent) == [path.name]

    def test_makes_folders(self, tmp_path):
        with atomic_write(tmp_path / 'b' / 'c' / 'a.txt') as file:
            file.write_text('new')
        assert (tmp_path / 'b' / 'c' / 'a.txt').read_text() == 'new'

    def test_after_an_error(self, path):
        with pytest.raises(RuntimeError), atomic_write(path) as file:
            file.write_text('half')
            raise RuntimeError
        assert path.read_text() == 'old'
        assert os.listdir(path.parent) == [path.name]

    def test_keeps_the_mode(self, path):
        path.chmod(0o600)
        with atomic_write(path) as file:
            file.write_text('new')
        assert path.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize('there', [True, False])
    def test_through_links(self, path, there):
        """The link stays, and what it points to is written."""
        folder = path.parent / 'links'
        folder.mkdir()
        (folder / 'first').symlink_to('second')
        (folder / 'second').symlink_to(path)
        if not there:
            path.unlink()
        with atomic_write(folder / 'first') as file:
            file.write_text('new')
        assert (folder / 'first').is_symlink() and (folder / 'second').is_symlink()
        assert path.read_text() == 'new' and not path.is_symlink()
        assert sorted(os.listdir(folder)) == ['first', 'second']

    @pytest.mark.parametrize('name', ['a.txt', 'a.pth', 'a.safetensors'])
    @pytest.mark.parametrize('left', [0, 1000])
    def test_full_disk(self, tmp_path, name, left):
        if name.endswith('safetensors'):
            pytest.importorskip('safetensors')
        path = tmp_path / name
        path.write_text('old')
        with full_disk(left), pytest.raises(OutputError) as info:
            if name == 'a.txt':
                with atomic_write(path) as file:
                    file.write_text('x' * 10000)
            else:
                write_checkpoint({'a': torch.ones(10000)}, path)
        assert str(info.value) == f'{str(path)!r} cannot be written: File too large'
        assert path.read_text() == 'old'
        assert os.listdir(tmp_path) == [name]


class TestCheckOutputs:
    @pytest.fixture
    def kinds(self, tmp_path):
        (tmp_path / 'file').touch()
        (tmp_path / 'device').symlink_to('/dev/full')
        return tmp_path

    @pytest.mark.parametrize(
        'name, words',
        [
            ('', 'is a folder'),
            ('device', 'is a folder or a device'),
            ('file/a', 'cannot be written'),
            ('x' * 300, 'too long'),
        ],
    )
    def test_no_files(self, kinds, name, words):
        with (
            pytest.raises(OutputError, match=words),
            atomic_write(kinds / name) as file,
        ):
            file.touch()
        assert sorted(os.listdir(kinds)) == ['device', 'file']
        assert not os.path.isfile('/dev/full')

    def test_protected(self, path, monkeypatch):
        # Nothing is, from the user that may be running the tests.
        monkeypatch.setattr(os, 'access', lambda path, mode: mode != os.W_OK)
        with pytest.raises(OutputError, match='is protected'):
            check_outputs([path])

    def test_inputs_and_each_other(self, path, monkeypatch):
        folder = path.parent
        (folder / 'soft').symlink_to(path)
        (folder / 'hard').hardlink_to(path)
        (folder / 'here').symlink_to('.')
        (folder / 'new').symlink_to('not there')
        monkeypatch.chdir(folder)
        for name in (
            'a.txt',
            'soft',
            'hard',
            'here/a.txt',
            f'here/../{folder.name}/a.txt',
        ):
            for one, other in ((path, name), (name, path)):
                with pytest.raises(OutputError, match='write to another file') as info:
                    check_outputs([one], [other])
                assert repr(str(one)) in str(info.value)
                assert repr(str(other)) in str(info.value)
                with pytest.raises(OutputError, match='write to another file'):
                    check_outputs([one, other])
        with pytest.raises(OutputError, match='write to another file'):
            check_outputs(['new', folder / 'here' / 'not there'])

    def test_others(self, path):
        check_outputs([path.parent / 'b', path.parent / 'c', None], [path, path, None])
        check_outputs([path])
        assert path.read_text() == 'old'
