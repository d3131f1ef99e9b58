import gzip

import numpy as np
import pytest
from helpers import import_models
from idx_files import NAMES, idx, random_arrays
from mmengine.registry import DATASETS, init_default_scope
from tool_runs import run_here

TOOL = 'dataset_converters/fashion_mnist.py'


@pytest.fixture
def arrays():
    return random_arrays(train=5, test=3)


@pytest.fixture
def folder(arrays, tmp_path):
    """As Debian's package has them."""
    path = tmp_path / 'given'
    path.mkdir()
    for name, array in arrays.items():
        (path / f'{name}.gz').write_bytes(gzip.compress(idx(array)))
    return path


def error_of(*args):
    with pytest.raises(SystemExit) as stopped:
        run_here(TOOL, *args)
    message = str(stopped.value)
    assert message.startswith('error: ') and '\n' not in message
    return message


@pytest.mark.parametrize('is_compressed', [True, False])
def test_mmpretrain_reads_it(folder, arrays, tmp_path, is_compressed, capsys):
    if not is_compressed:
        for path in list(folder.iterdir()):
            path.with_suffix('').write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    out = tmp_path / 'new' / 'folder'
    for _ in range(2):  # The second replaces the first.
        run_here(TOOL, folder, '--out', out)
    assert '5 training and 3 test images' in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(NAMES)
    import_models('mmpretrain')
    init_default_scope('mmpretrain')
    for split, name in (('train', 'train'), ('test', 't10k')):
        dataset = DATASETS.build(
            dict(
                type='FashionMNIST',
                data_root=str(out),
                split=split,
                test_mode=split == 'test',
                download=False,
                pipeline=[],
            )
        )
        images = [dataset[i]['img'] for i in range(len(dataset))]
        assert np.array_equal(images, arrays[f'{name}-images-idx3-ubyte'])
        labels = arrays[f'{name}-labels-idx1-ubyte'].tolist()
        assert dataset.get_gt_labels().tolist() == labels


def test_missing(folder, tmp_path):
    (folder / 't10k-labels-idx1-ubyte.gz').unlink()
    message = error_of(folder, '--out', tmp_path / 'out')
    assert 'no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz in' in message
    assert not (tmp_path / 'out').exists()
    assert 'train-images-idx3-ubyte' in error_of(tmp_path / 'nowhere')


@pytest.mark.parametrize(
    'damage, words',
    [
        (lambda data: gzip.compress(data)[:-9], 'not a whole IDX file'),
        (lambda data: b'<html>', 'not a whole IDX file'),
        (lambda data: gzip.compress(data[:-1]), 'not a whole IDX file'),
        (lambda data: gzip.compress(b'\1' + data[1:]), 'it begins'),
        (lambda data: gzip.compress(idx(np.zeros((5, 32, 32)))), 'not a whole'),
        (lambda data: gzip.compress(idx(np.zeros((4, 28, 28)))), '4 images with 5'),
    ],
)
def test_damaged(folder, tmp_path, damage, words):
    path = folder / 'train-images-idx3-ubyte.gz'
    path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    out = tmp_path / 'out'
    assert words in error_of(folder, '--out', out)
    assert not out.exists()


def test_label_that_is_no_class(folder, arrays, tmp_path):
    labels = arrays['t10k-labels-idx1-ubyte'] * 0 + 10
    path = folder / 't10k-labels-idx1-ubyte.gz'
    path.write_bytes(gzip.compress(idx(labels)))
    assert 'labels up to 10' in error_of(folder, '--out', tmp_path / 'out')
