import json
from pathlib import Path

import mmcv
import numpy as np
import pytest
from tool_runs import run_here, tool

pytest.importorskip('sklearn')
TOOL = 'dataset_converters/digits.py'


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(tool(TOOL), 'NUM_SCENES', dict(train=3, val=2))


def contents(folder):
    """Files by path, relative to ``folder``."""
    files = (path for path in Path(folder).rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def convert(out):
    return run_here(TOOL, '--out', out)


class TestImages:
    def test_split(self, digits):
        paths = [*digits.glob('train/*/*.png'), *digits.glob('val/*/*.png')]
        # Names are the numbers of the images: no image is in both, and none is lost.
        assert sorted(int(path.stem) for path in paths) == list(range(1797))
        for label in range(10):
            train, val = (
                len(list((digits / split / str(label)).iterdir()))
                for split in ('train', 'val')
            )
            assert val == (train + val) // 5

    def test_pixels_and_labels(self, digits):
        from sklearn.datasets import load_digits

        data = load_digits()
        paths = sorted(digits.glob('train/*/*.png')) + sorted(
            digits.glob('val/*/*.png')
        )
        for path in paths[::50]:
            number = int(path.stem)
            assert path.parent.name == str(data.target[number])
            image = mmcv.imread(str(path), flag='unchanged')
            assert image.shape == (8, 8) and image.dtype == np.uint8
            assert np.abs(image / 255 * 16 - data.images[number]).max() < 0.05


class TestScenes:
    def test_boxes_hold_the_digits(self):
        """Each is tight about what is labelled as its digit; nothing else is."""
        module = tool(TOOL)
        splits = module.split_digits()
        rng = np.random.default_rng(0)
        counts = []
        for _ in range(30):
            scene = module.make_scene(splits['train'], rng)
            assert scene.image.shape == (128, 192, 3) and scene.image.dtype == np.uint8
            found = np.zeros_like(scene.labels)
            for label, x, y, width, height in scene.boxes:
                inside = scene.labels[y : y + height, x : x + width]
                assert inside.shape == (height, width)
                assert set(np.unique(inside)) <= {0, 1 + label}
                for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                    assert edge.any()
                found[y : y + height, x : x + width] = inside
            assert np.array_equal(found, scene.labels)
            counts.append(len(scene.boxes))
        # Fewer than two only where the first leaves no room.
        assert {2, 3, 4} <= set(counts) <= {1, 2, 3, 4} and counts.count(1) < 5

    def test_splits_share_no_digit(self, monkeypatch, few_scenes):
        module = tool(TOOL)
        used = {}
        monkeypatch.setattr(
            module,
            'make_scene',
            lambda digits, rng: used.setdefault(len(digits), {d.index for d in digits}),
        )
        for seed in (0, 1):
            list(module.make_scenes(module.split_digits(), seed))
        assert set(used) == {1442, 355} and not used[1442] & used[355]

    def test_coco(self, digits):
        for split in ('train', 'val'):
            path = digits / f'coco/annotations/instances_{split}2017.json'
            data = json.loads(path.read_text())
            names = {image['file_name'] for image in data['images']}
            assert names == {p.name for p in (digits / f'coco/{split}2017').iterdir()}
            assert len(names) == len({image['id'] for image in data['images']})
            assert [c['name'] for c in data['categories']] == list('0123456789')
            for annotation in data['annotations']:
                x, y, width, height = annotation['bbox']
                assert 0 <= x < x + width <= 192 and 0 <= y < y + height <= 128
                assert annotation['area'] == width * height

    def test_cityscapes(self, digits):
        root = digits / 'cityscapes'
        for split in ('train', 'val'):
            images = {p.name for p in (root / 'leftImg8bit' / split).glob('*/*.png')}
            labels = sorted((root / 'gtFine' / split).glob('*/*_labelTrainIds.png'))
            name = 'gtFine_labelTrainIds'
            assert images == {p.name.replace(name, 'leftImg8bit') for p in labels}
            for path in labels[::40]:
                mask = mmcv.imread(str(path), flag='unchanged')
                assert mask.shape == (128, 192) and mask.dtype == np.uint8
                assert mask.any() and set(np.unique(mask)) <= set(range(11))


@pytest.mark.usefixtures('few_scenes')
class TestRerun:
    def test_replaces(self, tmp_path, capsys):
        convert(tmp_path)
        assert '1442 training and 355 validation images' in capsys.readouterr().out
        (tmp_path / 'notes.txt').write_text('mine')
        first = contents(tmp_path)
        (tmp_path / 'train' / '0' / 'stale.png').touch()
        (tmp_path / 'train' / '0' / '0000.png').unlink()
        convert(tmp_path)
        assert contents(tmp_path) == first

    def test_completes_what_was_broken_off(self, tmp_path):
        """Between the removal of a folder and its replacement."""
        convert(tmp_path)
        first = contents(tmp_path)
        (tmp_path / 'val').rename(tmp_path.parent / 'gone')
        convert(tmp_path)
        assert contents(tmp_path) == first


@pytest.mark.usefixtures('few_scenes')
class TestErrors:
    @pytest.mark.parametrize('folder', ['train', 'coco'])
    def test_folder_of_somebody_else(self, tmp_path, folder):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'mine.png').write_bytes(b'mine')
        before = contents(tmp_path)
        with pytest.raises(SystemExit, match='^error: .*not written by this tool'):
            convert(tmp_path)
        assert contents(tmp_path) == before
