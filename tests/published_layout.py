"""State dicts as the published training code writes them, from its key tables.

Nothing here knows the package: names, shapes and fixed entries are written down a
second time, so that the converters are held against something else than themselves.
"""

import math
import zlib
from functools import cache

import torch

NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
FIXED = ('_avg_avg', '_prior', 'id_tensor')

# Blocks a stage, whether they are bottlenecks, width, groups, width of a group.
RESNETS = {
    'ResNet-18': ((2, 2, 2, 2), False, 64, 1, 64),
    'ResNet-34': ((3, 4, 6, 3), False, 64, 1, 64),
    'ResNet-50': ((3, 4, 6, 3), True, 64, 1, 64),
    'ResNet-101': ((3, 4, 23, 3), True, 64, 1, 64),
    'ResNet-18-1.5x': ((2, 2, 2, 2), False, 96, 1, 64),
    'ResNet-18-2x': ((2, 2, 2, 2), False, 128, 1, 64),
    'ResNeXt-50': ((3, 4, 6, 3), True, 64, 32, 4),
}
# Blocks a stage, channels of the stem and the stages, groups, squeeze-excitation.
REPVGGS = {
    'RepVGG-A0': ((2, 4, 14, 1), (48, 48, 96, 192, 1280), 1, False),
    'RepVGG-A1': ((2, 4, 14, 1), (64, 64, 128, 256, 1280), 1, False),
    'RepVGG-A2': ((2, 4, 14, 1), (64, 96, 192, 384, 1408), 1, False),
    'RepVGG-B0': ((4, 6, 16, 1), (64, 64, 128, 256, 1280), 1, False),
    'RepVGG-B1': ((4, 6, 16, 1), (64, 128, 256, 512, 2048), 1, False),
    'RepVGG-B1g2': ((4, 6, 16, 1), (64, 128, 256, 512, 2048), 2, False),
    'RepVGG-B1g4': ((4, 6, 16, 1), (64, 128, 256, 512, 2048), 4, False),
    'RepVGG-B2': ((4, 6, 16, 1), (64, 160, 320, 640, 2560), 1, False),
    'RepVGG-B2g2': ((4, 6, 16, 1), (64, 160, 320, 640, 2560), 2, False),
    'RepVGG-B2g4': ((4, 6, 16, 1), (64, 160, 320, 640, 2560), 4, False),
    'RepVGG-B3': ((4, 6, 16, 1), (64, 192, 384, 768, 2560), 1, False),
    'RepVGG-B3g2': ((4, 6, 16, 1), (64, 192, 384, 768, 2560), 2, False),
    'RepVGG-B3g4': ((4, 6, 16, 1), (64, 192, 384, 768, 2560), 4, False),
    'RepVGG-D2se': ((8, 14, 24, 1), (64, 160, 320, 640, 2560), 1, True),
}


def network(name, block, deployed=False):
    """The shapes of a published network, by key."""
    if name in RESNETS:
        return resnet(*RESNETS[name], block, deployed)
    return repvgg(*REPVGGS[name], block, deployed)


def resnet(
    depths, bottleneck, width, groups, group_width, block, deployed=False, classes=1000
):
    """Keys and shapes of a ResNet of ``block`` plain, dbb or orepa."""
    conv = {'plain': conv_bn, 'dbb': dbb, 'orepa': orepa}[block]
    pointwise = orepa_1x1 if block == 'orepa' else conv_bn
    stem = orepa_large if block == 'orepa' else conv_bn
    shapes = stem('stage0.conv1', width, 3, 7, 1, deployed)
    channels = width
    for stage, depth in enumerate(depths, start=1):
        inner = width * 2 ** (stage - 1)
        outer = 4 * inner if bottleneck else inner
        for i in range(depth):
            name = f'stage{stage}.{i}'
            if i == 0 and (stage > 1 or channels != outer):
                shortcut = pointwise if bottleneck else conv_bn
                shapes |= shortcut(f'{name}.shortcut', outer, channels, 1, 1, deployed)
            if bottleneck:
                middle = inner * group_width * groups // 64
                shapes |= pointwise(f'{name}.conv1', middle, channels, 1, 1, deployed)
                shapes |= conv(f'{name}.conv2', middle, middle, 3, groups, deployed)
                shapes |= pointwise(f'{name}.conv3', outer, middle, 1, 1, deployed)
            else:
                shapes |= conv(f'{name}.conv1', inner, channels, 3, 1, deployed)
                shapes |= conv(f'{name}.conv2', outer, inner, 3, 1, deployed)
            channels = outer
    return shapes | linear(channels, classes)


def repvgg(depths, widths, groups, use_se, block, deployed=False, classes=1000):
    """Keys and shapes of a RepVGG of ``block`` repvgg or orepa."""
    channels = widths[0]
    shapes = repvgg_block('stage0', channels, 3, 2, 1, use_se, block, deployed)
    number = 0
    for stage, depth in enumerate(depths, start=1):
        for i in range(depth):
            number += 1
            shapes |= repvgg_block(
                f'stage{stage}.{i}',
                widths[stage],
                channels,
                2 if i == 0 else 1,
                groups if number % 2 == 0 else 1,
                use_se,
                block,
                deployed,
            )
            channels = widths[stage]
    return shapes | linear(channels, classes)


def linear(channels, classes):
    return {'linear.weight': (classes, channels), 'linear.bias': (classes,)}


def norm(name, channels):
    return {
        f'{name}.{entry}': () if entry == 'num_batches_tracked' else (channels,)
        for entry in NORM
    }


def plain(name, outputs, inputs, size, groups):
    """A deployed conv."""
    return {
        f'{name}.weight': (outputs, inputs // groups, size, size),
        f'{name}.bias': (outputs,),
    }


def conv_bn(name, outputs, inputs, size, groups=1, deployed=False):
    if deployed:
        return plain(f'{name}.conv', outputs, inputs, size, groups)
    return {
        f'{name}.conv.weight': (outputs, inputs // groups, size, size),
        **norm(f'{name}.bn', outputs),
    }


def orepa_kernel(name, outputs, inputs, groups=1, kind='orepa', rows=6):
    """The entries of section 1; ``kind='rbr'`` has no 1×1 branch."""
    own, hidden = inputs // groups, inputs if groups <= 4 else 2 * inputs
    weight = f'{name}.weight_{kind}_'
    shapes = {
        f'{weight}origin': (outputs, own, 3, 3),
        f'{weight}avg_conv': (outputs, own, 1, 1),
        f'{weight}pfir_conv': (outputs, own, 1, 1),
        f'{weight}1x1_kxk_idconv1': (hidden, own, 1, 1),
        f'{weight}1x1_kxk_conv2': (outputs, hidden // groups, 3, 3),
        f'{weight}gconv_dw': (8 * inputs, 1, 3, 3),
        f'{weight}gconv_pw': (outputs, 8 * inputs // groups, 1, 1),
        f'{name}.vector': (rows, outputs),
        f'{weight}avg_avg': (3, 3),
        f'{weight}prior': (outputs, 3, 3),
        f'{name}.id_tensor': (hidden, own, 1, 1),
    }
    if kind == 'orepa':
        shapes[f'{weight}1x1'] = (outputs, own, 1, 1)
    return shapes


def orepa(name, outputs, inputs, size=3, groups=1, deployed=False):
    if deployed:
        return plain(f'{name}.orepa_reparam', outputs, inputs, size, groups)
    return orepa_kernel(name, outputs, inputs, groups) | norm(f'{name}.bn', outputs)


def orepa_1x1(name, outputs, inputs, size=1, groups=1, deployed=False):
    if deployed:
        return plain(f'{name}.or1x1_reparam', outputs, inputs, 1, 1)
    wider = outputs > inputs
    return {
        f'{name}.weight_or1x1_origin': (outputs, inputs, 1, 1),
        f'{name}.weight_or1x1_l2i_conv1': (inputs if wider else outputs, inputs, 1, 1),
        f'{name}.weight_or1x1_l2i_conv2': (outputs, inputs if wider else outputs, 1, 1),
        f'{name}.vector': (2, outputs),
        **norm(f'{name}.bn', outputs),
    }


def orepa_large(name, outputs, inputs, size=7, groups=1, deployed=False):
    if deployed:
        return plain(f'{name}.or_large_reparam', outputs, inputs, size, 1)
    shapes = norm(f'{name}.bn', outputs)
    for i in range((size - 1) // 2):
        shapes |= orepa_kernel(
            f'{name}.weight{i}', outputs, inputs if i == 0 else outputs
        )
    return shapes


def dbb(name, outputs, inputs, size=3, groups=1, deployed=False):
    if deployed:
        return plain(f'{name}.dbb_reparam', outputs, inputs, size, groups)
    own = inputs // groups
    return {
        **conv_bn(f'{name}.dbb_origin', outputs, inputs, size, groups),
        **conv_bn(f'{name}.dbb_1x1', outputs, inputs, 1, groups),
        f'{name}.dbb_avg.conv.weight': (outputs, own, 1, 1),
        **norm(f'{name}.dbb_avg.bn.bn', outputs),
        **norm(f'{name}.dbb_avg.avgbn', outputs),
        f'{name}.dbb_1x1_kxk.idconv1.conv.weight': (inputs, own, 1, 1),
        **norm(f'{name}.dbb_1x1_kxk.bn1.bn', inputs),
        f'{name}.dbb_1x1_kxk.conv2.weight': (outputs, own, size, size),
        **norm(f'{name}.dbb_1x1_kxk.bn2', outputs),
    }


def repvgg_block(name, outputs, inputs, stride, groups, use_se, block, deployed=False):
    se = {}
    if use_se:
        se = plain(f'{name}.se.down', outputs // 16, outputs, 1, 1)
        se |= plain(f'{name}.se.up', outputs, outputs // 16, 1, 1)
    if deployed:
        return plain(f'{name}.rbr_reparam', outputs, inputs, 3, groups) | se
    has_identity = outputs == inputs and stride == 1
    dense = f'{name}.rbr_dense'
    if block == 'orepa':
        # Where there is an identity branch, the vector has a row that nothing uses.
        shapes = orepa_kernel(dense, outputs, inputs, groups, 'rbr', 5 + has_identity)
        shapes |= norm(f'{dense}.bn', outputs)
    else:
        shapes = conv_bn(dense, outputs, inputs, 3, groups)
    shapes |= conv_bn(f'{name}.rbr_1x1', outputs, inputs, 1, groups)
    if has_identity:
        shapes |= norm(f'{name}.rbr_identity', outputs)
    return shapes | se


@cache
def prior(outputs):
    """The cosine filters of a 3×3 kernel."""
    filters = torch.zeros(outputs, 3, 3)
    half = outputs / 2
    for o in range(outputs):
        for h in range(3):
            for w in range(3):
                angle = (h + 0.5) * (o + 1) if o < half else (w + 0.5) * (o + 1 - half)
                filters[o, h, w] = math.cos(math.pi * angle / 3)
    return filters


def fixed_entry(key, shape):
    """What the published code saves and never trains."""
    if key.endswith('_avg_avg'):
        return torch.full(shape, 1 / 9)
    if key.endswith('_prior'):
        return prior(shape[0]).clone()
    identity = torch.zeros(shape)
    for t in range(shape[0]):
        identity[t, t % shape[1]] = 1
    return identity


def trained_state(shapes, prefix='module.'):
    """Values such as training leaves; the unused rows hold garbage."""
    state = {}
    for key, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        name = key.rsplit('.', 1)[-1]
        noise = torch.randn(shape, generator=generator)
        if name == 'num_batches_tracked':
            value = torch.randint(1, 10**6, (), generator=generator)
        elif key.endswith(FIXED):
            value = fixed_entry(key, shape)
        elif name == 'running_var':
            value = noise.abs() + 0.5
        elif name in ('running_mean', 'bias'):
            value = 0.1 * noise
        elif name == 'vector':
            value = 0.3 + 0.1 * noise
            if '.rbr_dense.' in key and shape[0] == 6:
                value[5] = math.nan
                value[5, 0] = 1e30
        elif len(shape) == 1:
            value = 0.7 + 0.1 * noise
        else:
            value = noise / math.prod(shape[1:]) ** 0.5
        state[prefix + key] = value
    return state


_pool = torch.empty(0)


def cheap_state(shapes, prefix='module.'):
    """As :func:`trained_state` for large networks: windows of one noise tensor."""
    global _pool
    needed = max(math.prod(shape) for shape in shapes.values()) + 1009
    if len(_pool) < needed:
        _pool = torch.randn(needed, generator=torch.Generator().manual_seed(0))
    state = {}
    for key, shape in shapes.items():
        start = zlib.crc32(key.encode()) % 1009
        if key.endswith('num_batches_tracked'):
            state[prefix + key] = torch.tensor(start)
        elif key.endswith(FIXED):
            state[prefix + key] = fixed_entry(key, shape)
        else:
            state[prefix + key] = _pool[start : start + math.prod(shape)].view(shape)
        if key.endswith('rbr_dense.vector') and shape[0] == 6:
            state[prefix + key] = state[prefix + key].clone()
            state[prefix + key][5] = math.nan
    return state


def assert_same_bits(actual, expected):
    """Equal keys, shapes, types and bits, NaN included."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        found = actual[key]
        assert (found.dtype, found.shape) == (value.dtype, value.shape), key
        same = torch.equal(found, value)
        if not same and value.dtype == torch.float32:  # NaN?
            same = torch.equal(found.view(torch.int32), value.view(torch.int32))
        assert same, f'{key} has other values'
