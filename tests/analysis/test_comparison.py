import copy
import math

import pytest
import torch
from helpers import assert_near, trained_like
from mmengine.model import BaseDataPreprocessor, BaseModel
from runners import Colours, TinyClassifier, TinyTTA
from torch import nn

from mmorepa.analysis import largest_difference, raw_outputs, unwrapped

NAN, INF = math.nan, math.inf


def tensors(*values):
    return [torch.tensor(value) for value in values]


class TestLargestDifference:
    def test_figures(self):
        found = largest_difference(tensors([1.0, -4.0]), tensors([1.5, -4.0]))
        assert found == (0.5, 0.125)

    def test_worst_of_several(self):
        """Absolute and relative, each on its own."""
        found = largest_difference(
            tensors([100.0], [0.1], [1.0]), tensors([101.0], [0.2], [1.0])
        )
        assert found.absolute == 1.0
        assert found.relative == pytest.approx(1.0)

    def test_equal(self):
        assert largest_difference(tensors([2.0, 0.0]), tensors([2.0, 0.0])) == (0, 0)
        assert largest_difference(tensors([0.0]), tensors([0.0])) == (0, 0)
        assert largest_difference([torch.ones(0, 4)], [torch.ones(0, 4)]) == (0, 0)

    def test_something_from_nothing(self):
        assert largest_difference(tensors([0.0]), tensors([1e-9])).relative == INF

    @pytest.mark.parametrize(
        'a, b',
        [
            ([NAN, 1.0], [0.0, 1.0]),
            ([0.0, 1.0], [NAN, 1.0]),
            ([INF, 1.0], [INF, 1.0]),
            ([INF, 1.0], [0.0, 1.0]),
        ],
    )
    def test_not_finite(self, a, b):
        """Seen wherever it is: a comparison with a tolerance must not pass it."""
        expected, found = tensors([1.0, 2.0]), tensors([1.0, 2.0])
        expected.append(torch.tensor(a))
        found.append(torch.tensor(b))
        assert math.isnan(largest_difference(expected, found).relative)

    def test_nothing_to_compare(self):
        with pytest.raises(ValueError, match='no outputs to compare'):
            largest_difference([], [])

    @pytest.mark.parametrize('other', [[], [torch.ones(3)], [torch.ones(2)] * 2])
    def test_other_shapes(self, other):
        with pytest.raises(ValueError, match=r'outputs of shapes \[\(2,\)\] against'):
            largest_difference([torch.ones(2)], other)


class Nested(BaseModel):
    """Outputs as heads give them: nested, with indices among them."""

    def forward(self, image, mode='tensor'):
        assert mode == 'tensor'
        index = torch.arange(3)
        return (image * 1, [image * 2, dict(a=image * 3, b=(index, None, 'x'))])


class TestRawOutputs:
    def test_finds_floating_point_tensors(self):
        image = torch.rand(1, 3)
        for batch in (dict(image=image), [image], (image,)):
            found = raw_outputs(Nested(), batch)
            assert len(found) == 3
            assert all(
                torch.equal(tensor, image * n) for n, tensor in enumerate(found, 1)
            )

    @pytest.mark.parametrize('wrap', [lambda model: model, nn.DataParallel])
    def test_batches_and_wrappers(self, wrap):
        model = trained_like(TinyClassifier()).eval()
        batch = [Colours(8).images, Colours(8).labels]
        before = copy.deepcopy(batch)
        (found,) = raw_outputs(wrap(model), batch)
        assert_near(found, model(batch[0]))
        assert not found.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(batch, before))
        (found,) = raw_outputs(wrap(model), dict(inputs=batch[0], labels=batch[1]))
        assert_near(found, model(batch[0]))

    @pytest.mark.parametrize('wrap', [lambda model: model, nn.DataParallel])
    def test_time_augmentation(self, wrap):
        """The first copy of the images is compared."""
        model = trained_like(TinyClassifier()).eval()
        images, labels = Colours(8).images, Colours(8).labels
        views = [images, images.flip(-1)]
        expected = model(images)
        for batch in (
            [views, [labels, labels]],
            dict(inputs=views, labels=[labels, labels]),
        ):
            (found,) = raw_outputs(wrap(TinyTTA(model)), batch)
            assert_near(found, expected)
        assert unwrapped(wrap(TinyTTA(model))) is model


class InPlace(BaseDataPreprocessor):
    """Some preprocessors write into the batch that they are given."""

    def forward(self, data, training=False):
        data[0].mul_(2)
        return data


def test_batch_stays_for_the_test():
    model = trained_like(TinyClassifier(data_preprocessor=InPlace())).eval()
    batch = [torch.ones(2, 3, 8, 8), torch.arange(2)]
    (first,) = raw_outputs(model, batch)
    (second,) = raw_outputs(model, batch)
    assert torch.equal(first, second)
    assert torch.equal(batch[0], torch.ones(2, 3, 8, 8))
