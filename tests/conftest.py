import pytest
import torch

from mmorepa.layers import branch_by_branch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _training_forms_run_branch_by_branch(request):
    """So that what is compared with a fold is not a fold itself: see test_eval_form.

    Whole runs are as everywhere else; what compares forms in them sees to it itself.
    """
    if {'engine', 'transfer', 'tools'} & {*request.path.parts}:
        yield
        return
    with branch_by_branch():
        yield


@pytest.fixture
def float64():
    """Builds everything in float64, where rounding hides no mistake."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
