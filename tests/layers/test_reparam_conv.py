"""The life of a re-parameterised conv: training form, deployed form, loading."""

import copy
import pickle

import mmengine.runner.checkpoint as mmengine_checkpoint
import pytest
import torch
from helpers import assert_near, deployed_twin, trained_like
from torch import nn

from mmorepa import is_switchable, switch_to_deploy
from mmorepa.layers import OREPAConv2d, PlainConv2d

BN = dict(type='BN')
RELU = dict(type='ReLU', inplace=True)


def make(*args, **kwargs):
    return trained_like(OREPAConv2d(*args, **kwargs)).eval()


FORMS = [
    # in, out, k and the rest
    (4, 6, 3, dict()),
    (4, 6, 3, dict(stride=2, padding=1)),
    (4, 6, 3, dict(stride=(2, 1), padding=(0, 2), dilation=(1, 2))),
    (4, 6, (3, 3), dict(padding='same', dilation=2, norm_cfg=BN)),
    (4, 6, 3, dict(padding='valid', norm_cfg=BN, act_cfg=RELU)),
    (4, 6, 3, dict(padding=1, bias=False)),
    (4, 6, 3, dict(padding=1, bias=False, norm_cfg=BN)),
    (4, 6, 3, dict(padding=1, bias=False, norm_cfg=dict(type='BN', eps=0.5))),
    (4, 6, 3, dict(padding=1, bias=True, norm_cfg=dict(type='BN', affine=False))),
    (4, 6, 3, dict(padding=1, bias=False, norm_cfg=BN, act_cfg=dict(type='PReLU'))),
    (4, 6, 3, dict(bias=False, norm_cfg=dict(type='GN', num_groups=3), act_cfg=RELU)),
    (4, 6, 3, dict(bias=True, norm_cfg=dict(type='BN', track_running_stats=False))),
    (8, 12, 3, dict(groups=4, padding=1, norm_cfg=BN)),
    (6, 6, 3, dict(groups=6, padding=1, norm_cfg=BN)),
    (6, 4, 5, dict(groups=2, padding=2, stride=2, norm_cfg=BN)),
    (4, 6, 1, dict(stride=2, norm_cfg=BN, act_cfg=RELU)),
    (6, 4, 1, dict(groups=2)),
    (3, 4, 7, dict(stride=2, padding=3, bias=False, norm_cfg=BN, act_cfg=RELU)),
    (3, 4, 9, dict(padding=4, dilation=2)),
]


@pytest.mark.parametrize(('in_channels', 'out_channels', 'k', 'options'), FORMS)
@pytest.mark.parametrize('kind', [OREPAConv2d, PlainConv2d])
def test_deployed_equals_training_form(kind, in_channels, out_channels, k, options):
    conv = trained_like(kind(in_channels, out_channels, k, **options)).eval()
    plain = deployed_twin(conv)
    for dtype, tolerance in [
        (torch.bfloat16, 3e-2),
        (torch.float64, 1e-11),
        (torch.float32, 1e-5),
    ]:
        # What is fixed (the cosines) is rounded too: half precision goes by a copy.
        in_dtype = copy.deepcopy(conv).to(dtype)
        twin = deployed_twin(in_dtype)
        x = torch.randn(2, in_channels, 19, 17, dtype=dtype)
        assert twin.weight.dtype == dtype
        assert_near(twin(x), in_dtype(x), tolerance)

    norm = options.get('norm_cfg', {})
    folds = norm.get('type') == 'BN' and norm.get('track_running_stats', True)
    names = {'weight', 'bias'} if options.get('bias', True) or folds else {'weight'}
    if norm and not folds:
        names |= {f'norm.{name}' for name in conv.norm.state_dict()}
    if conv.act is not None:
        names |= {f'act.{name}' for name in conv.act.state_dict()}
    assert set(plain.state_dict()) == names

    built = kind(in_channels, out_channels, k, deploy=True, **options)
    assert {n: v.shape for n, v in built.state_dict().items()} == {
        n: v.shape for n, v in plain.state_dict().items()
    }
    assert [n for n, _ in built.named_parameters()] == [
        n for n, _ in plain.named_parameters()
    ]


def test_fold_uses_the_running_statistics():
    """Without them, the test above would pass for a fold that ignores BatchNorm."""
    conv = make(4, 6, 3, norm_cfg=BN)
    kernel, bias = conv.equivalent_kernel_bias()
    deviation = (conv.norm.running_var.double() + conv.norm.eps).sqrt()
    factor = conv.norm.weight.double() / deviation
    assert_near(kernel, conv.branches().double() * factor[:, None, None, None], 1e-6)
    shift = conv.bias.double() - conv.norm.running_mean.double()
    assert_near(bias, conv.norm.bias.double() + shift * factor, 1e-12)
    assert kernel.dtype == bias.dtype == torch.float64
    assert not kernel.requires_grad and not bias.requires_grad


def test_switch_is_idempotent():
    conv = make(4, 6, 3, norm_cfg=BN)
    conv.switch_to_deploy()
    weight, bias = conv.weight, conv.bias
    before = weight.clone()
    conv.switch_to_deploy()
    assert conv.weight is weight and conv.bias is bias
    assert torch.equal(conv.weight, before)


def test_switch_inside_inference_mode():
    conv = make(4, 6, 3, norm_cfg=BN)
    x = torch.randn(2, 4, 9, 9)
    with torch.inference_mode():
        expected = conv(x)
        conv.switch_to_deploy()
        assert_near(conv(x), expected)
    assert not conv.weight.is_inference()
    conv(x).sum().backward()
    assert conv.weight.grad.any() and conv.bias.grad.any()


def test_switch_takes_no_random_numbers():
    """A copy that is switched to be validated leaves the training as it was."""
    conv = make(4, 6, 3, norm_cfg=BN)
    before = torch.get_rng_state()
    conv.switch_to_deploy()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('deployed', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_copies(deployed, training):
    """With a kernel in the cache, gradient and all."""
    conv = make(4, 6, 3, bias=False, norm_cfg=BN).train(training)
    if deployed:
        conv.switch_to_deploy()
    x = torch.randn(2, 4, 9, 9)
    conv(x)
    for copied in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert copied.training == training
        assert_near(copied(x), conv(x), 1e-6)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1)
        assert (copied(x) - conv(x)).abs().max() > 0.1


def test_building_needs_no_kernel_of_the_plain_conv():
    """The training form has no second set of weights; readers get the fold."""
    conv = OREPAConv2d(4, 6, 3, bias=False)
    assert_near(conv.weight, conv.branches())
    assert conv.weight.requires_grad and conv.bias is None
    with pytest.raises(TypeError, match='folded from its branches, .* is no parameter'):
        conv.weight = nn.Parameter(torch.zeros(6, 4, 3, 3))
    assert all(name.startswith('branches.') for name in conv.state_dict())


# Loading


def torch_load(model, state):
    model.load_state_dict(state, strict=True)


def torch_assign(model, state):
    model.load_state_dict(state, strict=True, assign=True)


def mmengine_load(model, state):
    mmengine_checkpoint.load_state_dict(model, state, strict=True)


def mmengine_lenient(model, state):
    mmengine_checkpoint.load_state_dict(model, state, strict=False, logger='current')


def mmengine_file(model, state, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(state_dict=state), path)
    mmengine_checkpoint.load_checkpoint(
        model, str(path), map_location='cpu', strict=True, logger='current'
    )


LOADERS = [torch_load, torch_assign, mmengine_load, mmengine_lenient, mmengine_file]


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__)
def load(request, tmp_path):
    if request.param is mmengine_file:
        return lambda model, state: mmengine_file(model, state, tmp_path)
    return request.param


def network(deploy=False):
    gn = dict(type='GN', num_groups=2)
    return nn.Sequential(
        OREPAConv2d(
            3, 4, 7, bias=False, norm_cfg=BN, act_cfg=dict(type='PReLU'), deploy=deploy
        ),
        nn.Sequential(
            OREPAConv2d(4, 6, 3, padding=1, norm_cfg=gn, deploy=deploy),
            nn.Conv2d(6, 6, 1),
            OREPAConv2d(6, 8, 1, bias=False, deploy=deploy),
        ),
        nn.BatchNorm2d(8),
        PlainConv2d(8, 4, 3, norm_cfg=BN, deploy=deploy),
    )


def test_training_checkpoint_into_deployed_model(load, log):
    trained = trained_like(network()).eval()
    state = copy.deepcopy(trained.state_dict())
    model = network(deploy=True).eval()
    rng = torch.get_rng_state()
    load(model, state)
    assert torch.equal(torch.get_rng_state(), rng)

    x = torch.randn(2, 3, 12, 12)
    assert_near(model(x), trained(x))
    assert not is_switchable(model)
    assert not [line for line in log if 'match' in line], 'a warning about keys'
    # The caller's dict is not touched.
    assert list(state) == list(trained.state_dict())


@pytest.mark.parametrize('deploy', [False, True])
def test_each_form_into_itself(load, deploy):
    trained = trained_like(network()).eval()
    if deploy:
        switch_to_deploy(trained)
    model = network(deploy).eval()
    load(model, trained.state_dict())
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(model(x), trained(x))


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda state: {}, 'Missing key'),
        (lambda state: {**state, 'branches.other': torch.zeros(1)}, 'branches.other'),
        (lambda state: OREPAConv2d(4, 8, 3).state_dict(), 'size mismatch'),
    ],
)
def test_keys_that_do_not_fit(deploy, change, words):
    state = change(OREPAConv2d(4, 6, 3).state_dict())
    with pytest.raises(RuntimeError, match=words):
        OREPAConv2d(4, 6, 3, deploy=deploy).load_state_dict(state)


def test_folding_keeps_the_precision_of_the_checkpoint():
    trained = trained_like(network()).double().eval()
    model = network(deploy=True).double().eval()
    model.load_state_dict(trained.state_dict())
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert_near(model(x), trained(x), 1e-12)

    # Rounded once, after the fold, as the weights of the training form are exact.
    trained = trained.float()
    half = network(deploy=True).bfloat16()
    half.load_state_dict(trained.state_dict())
    expected = deployed_twin(trained).bfloat16().state_dict()
    for name, value in half.state_dict().items():
        # To a step of bfloat16, which the last bit of a fold may decide.
        torch.testing.assert_close(value, expected[name], rtol=2**-7, atol=0)


def test_deployed_checkpoint_into_training_form(load):
    state = deployed_twin(trained_like(network())).state_dict()
    message = r"OREPAConv2d cannot start from '0\.weight': it has a bias.*a deployed"
    with pytest.raises(RuntimeError, match=message) as error:
        load(network(), state)
    assert 'deploy=True' in str(error.value)


def test_incomplete_training_checkpoint(load):
    state = trained_like(network()).state_dict()
    del state['1.0.branches.weight_average'], state['1.0.norm.bias']
    with pytest.raises(RuntimeError) as error:
        load(network(deploy=True), state)
    message = str(error.value)
    assert "the training form under '1.0.' cannot be folded" in message
    assert '"branches.weight_average"' in message and '"norm.bias"' in message


# Bad input


@pytest.mark.parametrize(
    ('k', 'options', 'message'),
    [
        (2, dict(), 'OREPAConv2d takes an odd, square kernel .*kernel_size=2'),
        ((3, 1), dict(), 'odd, square'),
        (-1, dict(), 'odd, square'),
        (3, dict(padding_mode='reflect'), "padding_mode='zeros' only"),
    ],
)
def test_what_has_no_fold(k, options, message):
    with pytest.raises(ValueError, match=message):
        OREPAConv2d(4, 4, k, **options)
