import pytest
import torch
import torch.nn.functional as F
from helpers import gradcheck

from mmorepa.functional import fuse_bn

pytestmark = pytest.mark.usefixtures('float64')


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('with_bias', [True, False])
def test_fuse_bn(with_bias, affine):
    kernel = torch.randn(4, 3, 3, 3, requires_grad=True)
    bias = torch.randn(4, requires_grad=True) if with_bias else None
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    gamma = torch.randn(4, requires_grad=True) if affine else None
    beta = torch.randn(4, requires_grad=True) if affine else None
    # As large as the variance, so that a forgotten epsilon shows.
    eps = 0.5

    x = torch.randn(2, 3, 6, 6)
    y = F.conv2d(x, kernel, bias)
    expected = F.batch_norm(y, mean, var, gamma, beta, training=False, eps=eps)
    fused = fuse_bn(kernel, bias, mean, var, gamma, beta, eps)
    torch.testing.assert_close(F.conv2d(x, *fused), expected)
    mean.requires_grad_()
    var.requires_grad_()
    assert gradcheck(
        lambda *tensors: fuse_bn(*tensors, eps), (kernel, bias, mean, var, gamma, beta)
    )
