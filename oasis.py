"""OASIS, the GAN baseline: generator, discriminator, LabelMix, and the official checkpoints.

Sushko et al., "You Only Need Adversarial Supervision for Semantic Image Synthesis", ICLR 2021 (arXiv 2012.04781); the
published networks are those of boschresearch/OASIS. What is computed here is the same, with less work:

- The generator's label input is never a one-hot map. A 3 x 3 convolution of one is the sum of nine rows of its
  weights, one for each neighbor's class; noise that is constant over a region is nine more rows.
- In the discriminator, a 3 x 3 convolution followed by 2 x 2 average pooling is one 4 x 4 convolution of stride 2, and
  one that follows nearest upsampling is one 4 x 4 transposed convolution of stride 2.

Label maps hold classes 0..C-1 and C for void. OASIS's cross-entropy is that of losses.py with gamma 0.
"""

import re
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = 6          # residual blocks in the generator, and down and up in the discriminator
SPADE_HIDDEN = 128  # channels between the label map and a SPADE layer's scale and shift


def _neighborhoods(label_map: Tensor, noise_ids: Tensor, num_classes: int) -> Tensor:
    """What the label branches at one resolution look up, int64 (B, h, w, 18): rows of `LabelConv`'s table, nine neighbors'
    classes and their noise. label_map and noise_ids (rows of the noise vectors): int64 (B, h, w)."""
    # The table's blocks of nine rows: 0 = outside (zeros), then the classes and void, then the noise vectors.
    blocks = F.pad(torch.stack([label_map + 1, noise_ids + num_classes + 2]), (1, 1, 1, 1))
    windows = blocks.unfold(2, 3, 1).unfold(3, 3, 1).movedim(0, 3).flatten(3)
    return 9 * windows + torch.arange(9, device=windows.device).repeat(2)


class LabelConv(nn.Conv2d):
    """3 x 3 convolution of [noise, one-hot label map] without building that input; weight: (features, z_dim + C + 1,
    3, 3), noise channels first, then classes 0..C-1, then void."""

    def __init__(self, z_dim: int, num_classes: int, features: int):
        super().__init__(z_dim + num_classes + 1, features, 3, padding=1)
        self.z_dim = z_dim

    def forward(self, near: Tensor, z: Tensor) -> Tensor:
        """near: of `_neighborhoods`. z: (V, z_dim), the noise vectors. -> (B, h, w, features)."""
        by_channel = self.weight.permute(1, 2, 3, 0)
        by_noise = z @ by_channel[:self.z_dim].flatten(1)
        blocks = [by_channel.new_zeros(9, self.out_channels), by_channel[self.z_dim:].flatten(0, 2),
                  by_noise.to(by_channel.dtype).view(-1, self.out_channels)]
        features = F.embedding_bag(near.flatten(0, 2), torch.cat(blocks), mode="sum") + self.bias
        return features.unflatten(0, near.shape[:3])


def _channels_second(features: Tensor, like: Tensor) -> Tensor:
    """(B, h, w, features) -> (B, features, h, w), in memory as `like` is: channels last or not."""
    features = features.permute(0, 3, 1, 2)
    return features if like.is_contiguous(memory_format=torch.channels_last) else features.contiguous()


class SpectralConv2d(nn.Conv2d):
    """Convolution whose weight matrix (out, in * k * k) is divided by its largest singular value, as estimated by
    one power iteration at each forward in training mode. torch's parametrization takes the iteration's two halves
    in the other order, so official vectors u and v would not go on in it as in the published networks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, size in (("u", self.weight.shape[0]), ("v", self.weight[0].numel())):
            self.register_buffer(name, F.normalize(torch.randn(size), dim=0))

    def normalized_weight(self) -> Tensor:
        """weight / (u' weight v), in float32 whatever autocast says; in training after v <- W' u and u <- W v."""
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            if self.training:
                with torch.no_grad():
                    self.v.copy_(F.normalize(matrix.T @ self.u, dim=0, eps=1e-12))
                    self.u.copy_(F.normalize(matrix @ self.v, dim=0, eps=1e-12))
            # Copies, because a second forward before backward changes u and v in place.
            return self.weight / torch.dot(self.u.clone(), matrix @ self.v.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normalized_weight(), self.bias)


def _check_size(height: int, width: int, step: int, network: str) -> None:
    if height % step or width % step:
        raise ValueError(f"image size {height} x {width}: OASIS's {network} needs multiples of {step}")


@torch.no_grad()
def _initialize(network: nn.Module, gain: float) -> None:
    """Xavier normal weights and zero biases; settled spectral norms, as torch's are."""
    for parameter in network.parameters():
        nn.init.xavier_normal_(parameter, gain) if parameter.ndim == 4 else nn.init.zeros_(parameter)
    for module in [module for module in network.modules() if isinstance(module, SpectralConv2d)] * 15:
        module.normalized_weight()


class SPADE(nn.Module):
    """norm(x) * (1 + gamma) + beta, gamma and beta from the noise and the label map; norm has no affine."""

    def __init__(self, features: int, z_dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(features, affine=False)
        self.shared = LabelConv(z_dim, num_classes, SPADE_HIDDEN)
        self.gamma = nn.Conv2d(SPADE_HIDDEN, features, 3, padding=1)
        self.beta = nn.Conv2d(SPADE_HIDDEN, features, 3, padding=1)

    def forward(self, x: Tensor, near: Tensor, z: Tensor) -> Tensor:
        """x: (B, features, h, w) -> the same shape."""
        hidden = _channels_second(F.relu(self.shared(near, z)), like=x)
        scale, shift = 1 + self.gamma(hidden), self.beta(hidden)
        return torch.addcmul(shift, self.norm(x), scale)


class GeneratorBlock(nn.Module):
    """Residual block whose normalizations are SPADE layers."""

    def __init__(self, features_in: int, features_out: int, z_dim: int, num_classes: int):
        super().__init__()
        middle = min(features_in, features_out)
        self.conv_0 = SpectralConv2d(features_in, middle, 3, padding=1)
        self.conv_1 = SpectralConv2d(middle, features_out, 3, padding=1)
        self.norm_0 = SPADE(features_in, z_dim, num_classes)
        self.norm_1 = SPADE(middle, z_dim, num_classes)
        self.learned_shortcut = features_in != features_out
        if self.learned_shortcut:
            self.conv_s = SpectralConv2d(features_in, features_out, 1, bias=False)
            self.norm_s = SPADE(features_in, z_dim, num_classes)

    def forward(self, x: Tensor, near: Tensor, z: Tensor) -> Tensor:
        shortcut = self.conv_s(self.norm_s(x, near, z)) if self.learned_shortcut else x
        x = self.conv_0(F.leaky_relu(self.norm_0(x, near, z), 0.2, inplace=True))
        x = self.conv_1(F.leaky_relu(self.norm_1(x, near, z), 0.2, inplace=True))
        return shortcut + x


class OASISGenerator(nn.Module):
    """Label map and noise -> image.

    Args:
        num_classes: C.
        channels: width of the last block (64 as published, 74.3 M parameters at C = 150).
        z_dim: length of a noise vector (64 as published).
        gain: of the Xavier normal initialization (0.02 as published).

    For training on several GPUs convert with `nn.SyncBatchNorm.convert_sync_batchnorm`, as published. It refuses CPU
    tensors: several CPU processes each normalize by their own share of the batch, which only approximates one process.
    """

    divisor = 2 ** (BLOCKS - 1)  # of image sides
    # In training: weight gradients of channels-last convolutions are slow on a CPU.
    cpu_format = torch.contiguous_format

    def __init__(self, num_classes: int, channels: int = 64, z_dim: int = 64, gain: float = 0.02):
        super().__init__()
        self.num_classes, self.z_dim = num_classes, z_dim
        features = [channels * factor for factor in (16, 16, 16, 8, 4, 2, 1)]
        self.first = LabelConv(z_dim, num_classes, features[0])
        self.blocks = nn.ModuleList(GeneratorBlock(*pair, z_dim, num_classes) for pair in pairwise(features))
        self.to_rgb = nn.Conv2d(channels, 3, 3, padding=1)
        _initialize(self, gain)

    def forward(self, label_map: Tensor, z: Tensor, z2: Tensor | None = None, region: Tensor | None = None) -> Tensor:
        """Generate images (K * B, 3, H, W) in [-1, 1].

        Args:
            label_map: int64 (B, H, W) in 0..C, H and W multiples of 32 (ValueError).
            z: (K * B, z_dim), the noise of each image, the same in all its pixels; row k * B + i is the k-th sample
                of map i.
            z2: (K * B, z_dim), the noise where `region`, bool (K * B, H, W), is True instead.
        """
        _check_size(*label_map.shape[1:], self.divisor, "generator")
        label_map = label_map.repeat(len(z) // len(label_map), 1, 1)
        noise_ids = torch.arange(len(z), device=z.device).view(-1, 1, 1).expand_as(label_map)
        if z2 is not None:
            z, noise_ids = torch.cat([z, z2]), noise_ids + len(z) * region
        x = None
        for i, block in enumerate(self.blocks):
            stride = 2 ** (BLOCKS - 1 - i)  # nearest resizing by a whole factor keeps every stride-th pixel
            labels, ids = (full[:, ::stride, ::stride] for full in (label_map, noise_ids))
            near = _neighborhoods(labels, ids, self.num_classes)
            x = _channels_second(self.first(near, z), self.to_rgb.weight) if x is None else F.interpolate(x, scale_factor=2)
            x = block(x, near, z)
        return torch.tanh(self.to_rgb(F.leaky_relu(x, 0.2)))


def _box(weight: Tensor) -> Tensor:
    """(..., 3, 3) kernels convolved with a 2 x 2 box of ones: (..., 4, 4)."""
    return sum(F.pad(weight, (left, 1 - left, top, 1 - top)) for left in (0, 1) for top in (0, 1))


def conv_then_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """avg_pool2d(conv2d(x, weight, bias, padding=1), 2); on large maps as one 4 x 4 convolution, 4/9 of the work."""
    if weight.numel() > 4 * x.numel():  # the larger kernel would cost more than it saves, memory above all
        return F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)
    return F.conv2d(x, _box(weight) / 4, bias, stride=2, padding=1)


def upsample_then_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv2d(nearest-upsampled x, weight, bias, padding=1); on large maps as one 4 x 4 one, likewise."""
    if weight.numel() > 4 * x.numel():
        return F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)
    return F.conv_transpose2d(x, _box(weight.flip(2, 3)).transpose(0, 1), bias, stride=2, padding=1)


class DiscriminatorBlock(nn.Module):
    """Residual block that halves (`up` False) or doubles (`up` True) the resolution."""

    def __init__(self, features_in: int, features_out: int, up: bool, first: bool = False):
        super().__init__()
        self.up, self.first = up, first
        self.conv_1 = SpectralConv2d(features_in, features_out, 3, padding=1)
        self.conv_2 = SpectralConv2d(features_out, features_out, 3, padding=1)
        self.conv_s = SpectralConv2d(features_in, features_out, 1) if features_in != features_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # A 1 x 1 convolution commutes with pooling and with upsampling: it runs at the lower resolution.
        shortcut = self.conv_s(x if self.up else F.avg_pool2d(x, 2))
        x = x if self.first else F.leaky_relu(x, 0.2)
        if self.up:
            x = upsample_then_conv(x, self.conv_1.normalized_weight(), self.conv_1.bias)
            return self.conv_2(F.leaky_relu(x, 0.2, inplace=True)) + F.interpolate(shortcut, scale_factor=2)
        x = F.leaky_relu(self.conv_1(x), 0.2, inplace=True)
        return conv_then_pool(x, self.conv_2.normalized_weight(), self.conv_2.bias) + shortcut


class OASISDiscriminator(nn.Module):
    """Image -> class logits of every pixel, a U-Net. `channels`: half the width of the first block (64 as published,
    22.3 M parameters at C = 150). `gain`: as the generator's.

    The C + 2 logits are the C classes, unknown (channel C, void's id) and, last, fake. Published OASIS has the unknown
    channel too: it is never a target that counts, but takes part in the softmax."""

    divisor = 2**BLOCKS
    cpu_format = torch.contiguous_format

    def __init__(self, num_classes: int, channels: int = 64, gain: float = 0.02):
        super().__init__()
        widths = [channels * factor for factor in (2, 2, 4, 4, 8, 8)]
        self.down = nn.ModuleList(
            DiscriminatorBlock(*pair, up=False, first=pair[0] == 3) for pair in pairwise([3, *widths]))
        inputs = [widths[-1]] + [2 * width for width in widths[-2::-1]]  # all but the first see a skip beside
        self.up = nn.ModuleList(DiscriminatorBlock(*pair, up=True) for pair in zip(inputs, [*widths[-2::-1], channels]))
        self.to_logits = nn.Conv2d(channels, num_classes + 2, 1)
        _initialize(self, gain)

    def forward(self, images: Tensor, features: list[Tensor] = ()) -> Tensor:
        """images: (B, 3, H, W) in [-1, 1], H and W multiples of 64 (ValueError) -> logits (B, C + 2, H, W).

        `features`, which other discriminators see, are not used."""
        _check_size(*images.shape[2:], self.divisor, "discriminator")
        skips = [images]
        for block in self.down:
            skips.append(block(skips[-1]))
        x = self.up[0](skips[-1])
        for block, skip in zip(self.up[1:], skips[-2:0:-1]):
            x = block(torch.cat([skip, x], dim=1))
        return self.to_logits(x)


# Our parameter names -> theirs, as regular expressions applied in this order.
_OFFICIAL_NAMES = (
    (r"^first\.", "fc."), (r"^to_rgb\.", "conv_img."), (r"^blocks\.", "body."), (r"\.norm\.", ".first_norm."),
    (r"\.shared\.", ".mlp_shared.0."), (r"\.(gamma|beta)\.", r".mlp_\1."),
    (r"^down\.0\.conv_1\.", "down.0.conv1.0."), (r"^down\.(\d)\.conv_1\.", r"down.\1.conv1.1."),
    (r"^up\.(\d)\.conv_1\.", r"up.\1.conv1.2."), (r"\.conv_2\.", ".conv2.1."), (r"^(down|up)\.", r"body_\1."),
    (r"^to_logits\.", "layer_up_last."),
    # The spectrally normalized convolutions.
    (r"(conv_[01s]|conv[12]\.[012])\.weight$", r"\1.weight_orig"), (r"\.([uv])$", r".weight_\1"))


def official_name(name: str) -> str:
    """The official state dict's key for an entry of ours, of either network."""
    for ours, theirs in _OFFICIAL_NAMES:
        name = re.sub(ours, theirs, name)
    return name


def _in_our_order(name: str, tensor: Tensor, network: nn.Module) -> Tensor:
    """Reorder the label channels of an official tensor. Generator: [noise], unknown, classes -> [noise], classes,
    void. Discriminator: fake, unknown, classes -> classes, unknown, fake."""
    if name == "first.weight" or name.endswith(".shared.weight"):
        return torch.cat([tensor[:, :network.z_dim], tensor[:, network.z_dim:].roll(-1, dims=1)], dim=1)
    return torch.cat([tensor[2:], tensor[:2].flip(0)]) if name.startswith("to_logits.") else tensor


def load_official(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load an official state dict (`best_EMA.pth`, `*_G.pth`, `*_D.pth`) into an OASISGenerator or -Discriminator.

    Their label channel 0 is unknown, our void; their channel c + 1 is our class c. That is ADE20K's png id
    c + 1 (C = 150), COCO-Stuff's png id c (C = 182) and Cityscapes' labelId c + 1 (C = 34; the last is unused).
    Raises RuntimeError, which names them, for missing, unknown or differently shaped entries.
    """
    ours = {official_name(name): name for name in network.state_dict()}
    renamed = {ours.get(name, name): tensor for name, tensor in state.items()}
    network.load_state_dict({name: _in_our_order(name, tensor, network) for name, tensor in renamed.items()})
