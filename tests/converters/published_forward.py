"""The published networks, run straight from their state dicts.

Written from the formulas, in float64, with loops over groups and channels, and with
nothing in common with the package.
"""

import torch
import torch.nn.functional as F


class PublishedNetwork:
    """A ResNet or RepVGG of any block type.

    Args:
        state: Published keys, without ``module.``, in training or deployed form.
    """

    def __init__(self, state):
        self.state = {key: value.double() for key, value in state.items()}

    def __call__(self, image):
        """The outputs of the four stages, and the logits."""
        x = image.double()
        if any('.rbr_' in key for key in self.state):
            x = self.repvgg_block('stage0', x, stride=2)
            block = self.repvgg_block
            strides = (2, 2, 2, 2)
        else:
            x = self.conv('stage0.conv1', x, stride=2).relu()
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
            block = self.residual_block
            strides = (1, 2, 2, 2)
        outputs = []
        for stage, stride in enumerate(strides, start=1):
            i = 0
            while self.has(f'stage{stage}.{i}.'):
                x = block(f'stage{stage}.{i}', x, stride if i == 0 else 1)
                i += 1
            outputs.append(x)
        weight, bias = self.state['linear.weight'], self.state['linear.bias']
        return [*outputs, x.mean(dim=(2, 3)) @ weight.T + bias]

    def has(self, prefix):
        return any(key.startswith(prefix) for key in self.state)

    def residual_block(self, name, x, stride):
        shortcut = x
        if self.has(f'{name}.shortcut.'):
            shortcut = self.conv(f'{name}.shortcut', x, stride)
        if self.has(f'{name}.conv3.'):
            x = self.conv(f'{name}.conv1', x).relu()
            x = self.conv(f'{name}.conv2', x, stride).relu()
            x = self.conv(f'{name}.conv3', x)
        else:
            x = self.conv(f'{name}.conv1', x, stride).relu()
            x = self.conv(f'{name}.conv2', x)
        return (x + shortcut).relu()

    def repvgg_block(self, name, x, stride):
        if self.has(f'{name}.rbr_reparam.'):
            y = self.deployed(f'{name}.rbr_reparam', x, stride)
        else:
            y = self.conv(f'{name}.rbr_dense', x, stride)
            y = y + self.conv(f'{name}.rbr_1x1', x, stride)
            if self.has(f'{name}.rbr_identity.'):
                y = y + self.norm(f'{name}.rbr_identity', x)
        if self.has(f'{name}.se.'):
            gate = y.mean(dim=(2, 3), keepdim=True)
            gate = self.deployed(f'{name}.se.down', gate).relu()
            y = y * self.deployed(f'{name}.se.up', gate).sigmoid()
        return y.relu()

    def conv(self, name, x, stride=1):
        """A conv of whatever kind, with its norm."""
        for tail in ('orepa', 'or1x1', 'or_large', 'dbb'):
            if self.has(f'{name}.{tail}_reparam.'):
                return self.deployed(f'{name}.{tail}_reparam', x, stride)
        if f'{name}.conv.bias' in self.state:
            return self.deployed(f'{name}.conv', x, stride)
        if self.has(f'{name}.dbb_origin.'):
            return self.dbb(name, x, stride)
        inputs = x.shape[1]
        if f'{name}.conv.weight' in self.state:
            kernel = self.state[f'{name}.conv.weight']
        elif f'{name}.weight0.vector' in self.state:
            kernel = self.large_kernel(name, inputs)
        elif f'{name}.weight_or1x1_origin' in self.state:
            kernel = self.pointwise_kernel(name)
        else:
            kernel = self.orepa_kernel(name, inputs)
        return self.norm(f'{name}.bn', convolve(x, kernel, stride))

    def deployed(self, name, x, stride=1):
        y = convolve(x, self.state[f'{name}.weight'], stride)
        return y + self.state[f'{name}.bias'][:, None, None]

    def norm(self, name, x):
        mean, var, weight, bias = (
            self.state[f'{name}.{entry}'][:, None, None]
            for entry in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def orepa_kernel(self, name, inputs):
        kind = 'rbr' if f'{name}.weight_rbr_origin' in self.state else 'orepa'

        def entry(tail):
            return self.state[f'{name}.weight_{kind}_{tail}']

        vector = self.state[f'{name}.vector'][:, :, None, None, None]
        origin = entry('origin')
        outputs, own = origin.shape[:2]
        groups = inputs // own
        identity = torch.zeros(entry('1x1_kxk_idconv1').shape, dtype=torch.float64)
        for t in range(len(identity)):
            identity[t, t % own] = 1
        first, second = entry('1x1_kxk_idconv1') + identity, entry('1x1_kxk_conv2')
        depthwise, separable = entry('gconv_dw'), entry('gconv_pw')
        hidden = second.shape[1]  # of a group
        composed, product = torch.zeros_like(origin), torch.zeros_like(origin)
        for group in range(groups):
            here = range(group * outputs // groups, (group + 1) * outputs // groups)
            maps = first[group * hidden : (group + 1) * hidden, :, 0, 0]
            composed[here] = torch.einsum('otyx,ti->oiyx', second[here], maps)
            # The published code interleaves the groups.
            rows = [o * groups + group for o in range(outputs // groups)]
            for t in range(8):
                channels = [(group * own + i) * 8 + t for i in range(own)]
                columns = [i * 8 + t for i in range(own)]
                product[here] += separable[rows][:, columns] * depthwise[channels, 0]
        branches = [
            origin,
            (entry('avg_conv') / 9).expand(-1, -1, 3, 3),
            entry('pfir_conv') * cosines(outputs)[:, None],
            composed,
        ]
        if kind == 'orepa':
            centred = torch.zeros_like(origin)
            centred[:, :, 1, 1] = entry('1x1')[:, :, 0, 0]
            branches.append(centred)
        branches.append(product)
        # zip: a row that belongs to no branch is not used.
        return sum(scale * branch for scale, branch in zip(vector, branches))

    def pointwise_kernel(self, name):
        first = self.state[f'{name}.weight_or1x1_l2i_conv1'][:, :, 0, 0]
        second = self.state[f'{name}.weight_or1x1_l2i_conv2'][:, :, 0, 0]
        scales = self.state[f'{name}.vector'][:, :, None, None, None]
        product = (second @ first)[:, :, None, None]
        return (
            scales[0] * self.state[f'{name}.weight_or1x1_origin'] + scales[1] * product
        )

    def large_kernel(self, name, inputs):
        kernel = self.orepa_kernel(f'{name}.weight0', inputs)
        i = 1
        while self.has(f'{name}.weight{i}.'):
            factor = self.orepa_kernel(f'{name}.weight{i}', kernel.shape[0])
            padded = F.pad(kernel, [2] * 4)
            size = kernel.shape[-1] + 2
            kernel = 0
            for a in range(3):  # Cross-correlation: no tap is flipped.
                for b in range(3):
                    window = padded[:, :, a : a + size, b : b + size]
                    tap = factor[:, :, a, b]
                    kernel = kernel + torch.einsum('om,miyx->oiyx', tap, window)
            i += 1
        return kernel

    def dbb(self, name, x, stride):
        y = self.conv(f'{name}.dbb_origin', x, stride)
        y = y + self.conv(f'{name}.dbb_1x1', x, stride)
        average = convolve(x, self.state[f'{name}.dbb_avg.conv.weight'], 1)
        average = self.norm_and_pad(f'{name}.dbb_avg.bn.bn', average)
        average = F.avg_pool2d(average, 3, stride)
        y = y + self.norm(f'{name}.dbb_avg.avgbn', average)
        first = self.state[f'{name}.dbb_1x1_kxk.idconv1.conv.weight'].clone()
        for t in range(len(first)):
            first[t, t % first.shape[1]] += 1
        middle = self.norm_and_pad(f'{name}.dbb_1x1_kxk.bn1.bn', convolve(x, first, 1))
        second = self.state[f'{name}.dbb_1x1_kxk.conv2.weight']
        middle = convolve(middle, second, stride, padding=0)
        return y + self.norm(f'{name}.dbb_1x1_kxk.bn2', middle)

    def norm_and_pad(self, name, x):
        """BatchNorm of the map with a border of zeros that it normalises as well."""
        return self.norm(name, F.pad(x, [1] * 4))


def convolve(x, kernel, stride, padding=None):
    padding = kernel.shape[-1] // 2 if padding is None else padding
    groups = x.shape[1] // kernel.shape[1]
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=groups)


def cosines(outputs):
    rows = torch.arange(outputs, dtype=torch.float64)
    half = outputs / 2
    taps = torch.arange(3, dtype=torch.float64) + 0.5
    frequency = torch.where(rows < half, rows + 1, rows + 1 - half)
    waves = torch.cos(torch.pi * frequency[:, None] * taps / 3)
    filters = waves[:, None, :].expand(-1, 3, -1).clone()
    first = rows < half
    filters[first] = waves[first][:, :, None].expand(-1, -1, 3)
    return filters
