"""DP-SIMS [Berrada et al., CVPR 2024]: the generator and the discriminator on frozen backbone features.

Tensors are (B, C, H, W). Label maps are int64 (B, H, W): classes 0..C-1, void = C. Images are in [-1, 1].
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint


def upsample(x: torch.Tensor, size) -> torch.Tensor:
    """Bilinear resize to `size` (H, W)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def pixel_norm(x: torch.Tensor) -> torch.Tensor:
    """Layer norm over the channels of every pixel: no batch or image statistics."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x -> skip(x) + conv(act(conv(act(norm(x))))), (B, in, H, W) -> (B, out, H, W).

    `norm` is `pixel_norm` in the generator and absent in the discriminator, where `conv` is spectrally normalised.
    """

    def __init__(self, in_channels: int, out_channels: int, norm=pixel_norm, wrap=lambda layer: layer):
        super().__init__()
        self.norm = norm
        self.conv1 = wrap(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.conv2 = wrap(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else wrap(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x) if self.norm else x
        h = self.conv1(F.leaky_relu(h, 0.2))
        return self.skip(x) + self.conv2(F.leaky_relu(h, 0.2))


class SelfAttention(nn.Module):
    """Residual multi-head self-attention over the pixels of (B, C, H, W)."""

    def __init__(self, channels: int, head_channels: int = 64):
        super().__init__()
        self.heads = max(1, channels // head_channels)
        if channels % self.heads:
            raise ValueError(f"generator.channels: {channels} at a scale with attention; choose a multiple of "
                             f"{head_channels}")
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        q, k, v = self.to_qkv(pixel_norm(x)).view(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(out.transpose(-1, -2).reshape(b, c, h, w))


class NoiseCrossAttention(nn.Module):
    """Noise by cross-attention: label-map features are the queries, style-modulated tokens the keys and values.

    tokens = learned * (1 + scale(style)) + shift(style); out = x + W softmax(q(x) k(tokens)^T) v(tokens).
    """

    def __init__(self, channels: int, style_dim: int, num_tokens: int, token_dim: int = 64):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(num_tokens, token_dim))
        self.to_modulation = nn.Linear(style_dim, 2 * num_tokens * token_dim)
        self.to_q = nn.Conv2d(channels, channels, 1)
        self.to_kv = nn.Linear(token_dim, 2 * channels)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def attend(self, query: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """Query (B, HW, C), style (B, S) -> (B, HW, C)."""
        scale, shift = self.to_modulation(style).view(-1, 2, *self.tokens.shape).unbind(1)
        keys, values = self.to_kv(self.tokens * (1 + scale) + shift).chunk(2, dim=-1)
        return F.scaled_dot_product_attention(query, keys, values)

    def forward(self, x, style, style2=None, region=None):
        """x (B, C, H, W); style, style2 (B, S); region (B, 1, H, W) in [0, 1], the weight of style2."""
        query = self.to_q(pixel_norm(x)).flatten(2).transpose(1, 2)
        out = self.attend(query, style)
        if region is not None:
            out = torch.lerp(out, self.attend(query, style2), region.flatten(2).transpose(1, 2).to(out.dtype))
        return x + self.to_out(out.transpose(1, 2).reshape(x.shape))


class TextureNoise(nn.Module):
    """Texture for places where a label map is uniform: channel k is a fixed image of white noise, times z_k [ours].

    The images, of 64 x 64 pixels, are drawn once and kept in the checkpoint. A larger size has them side by side, each time
    with the channels moved on by one, so that none of the first Z parts is a copy of another. A convolution knows no places:
    without such noise one label gives one color, or stripes that grow from the borders.
    """

    def __init__(self, z_dim: int):
        super().__init__()
        self.register_buffer("images", torch.randn(z_dim, 64, 64))

    def forward(self, z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Noise (B, Z, 1, 1), or (B, Z, *size) where it differs from place to place -> (B, Z, *size)."""
        rows, columns = (-(-wanted // 64) for wanted in size)
        images = torch.cat([torch.cat([self.images.roll(row * columns + column, 0) for column in range(columns)], 2)
                            for row in range(rows)], 1)[:, :size[0], :size[1]]
        return images * z


class ModulatedBlock(nn.Module):
    """Residual block of the image network: norm(x) * (1 + gamma(m)) + beta(m) before each convolution, m the map features.

    x (B, C, H, W) and m (B, M, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int, map_channels: int):
        super().__init__()
        self.modulate = nn.ModuleList(nn.Conv2d(map_channels, 2 * channels, 1) for _ in range(2))
        self.conv = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor, map_features: torch.Tensor) -> torch.Tensor:
        h = x
        for modulate, conv in zip(self.modulate, self.conv):
            gamma, beta = modulate(map_features).chunk(2, dim=1)
            h = conv(F.leaky_relu(pixel_norm(h) * (1 + gamma) + beta, 0.2))
        return x + h


class Generator(nn.Module):
    """DP-SIMS generator: a U-Net encodes the label map, noise enters its features, they modulate an image network.

    Args:
        num_classes: C; label maps hold 0..C-1 and void = C, which has an embedding row of its own.
        channels: width at each scale, full resolution first; each further scale halves the resolution,
            so H and W must be multiples of 2 ** (len(channels) - 1).
        z_dim: length of the noise vector.
        style_dim: width of the mapping network. num_tokens: style tokens at each scale.
        noise: "cross_attention", "concat" (z joins the label embedding at every pixel, as 3D noise) or "none".
        attention_scales: how many of the coarsest scales have self-attention.
        texture: whether `TextureNoise` joins the map features of each scale; False as published, and with noise "none".
        checkpointing: in training, recompute each block's inner activations in the backward pass instead of keeping them.

    Raises ValueError for arguments that cannot be.
    """

    def __init__(self, num_classes: int, channels: tuple[int, ...] = (64, 128, 256, 512, 512, 512), z_dim: int = 64,
                 style_dim: int = 256, num_tokens: int = 16, noise: str = "cross_attention", attention_scales: int = 2,
                 texture: bool = False, checkpointing: bool = False):
        super().__init__()
        if noise not in ("cross_attention", "concat", "none"):
            raise ValueError(f"generator.noise is {noise!r}; it is cross_attention, concat or none")
        if texture and noise == "none":
            raise ValueError("generator.noise is none, and texture follows from the noise; set generator.texture=false")
        self.num_classes, self.z_dim, self.noise, self.checkpointing = num_classes, z_dim, noise, checkpointing
        self.divisor = 2 ** (len(channels) - 1)
        scales = range(len(channels))
        narrow = list(zip(channels[1:], channels[:-1]))  # (width of the coarser scale, width of the finer)

        self.embedding = nn.Embedding(num_classes + 1, channels[0])
        if noise == "concat":
            self.join_noise = nn.Conv2d(channels[0] + z_dim, channels[0], 1)
        if noise == "cross_attention":
            self.mapping = nn.Sequential(nn.Linear(z_dim, style_dim), nn.LeakyReLU(0.2),
                                         nn.Linear(style_dim, style_dim), nn.LeakyReLU(0.2))
            self.cross_attention = nn.ModuleList(NoiseCrossAttention(c, style_dim, num_tokens) for c in channels)
        self.texture = TextureNoise(z_dim) if texture else None
        self.from_texture = nn.ModuleList(nn.Conv2d(z_dim, c, 1, bias=False) for c in channels if texture)
        attends = [i >= len(channels) - attention_scales for i in scales]
        self.attention = nn.ModuleList(SelfAttention(c) if a else nn.Identity() for c, a in zip(channels, attends))
        self.down = nn.ModuleList(ResidualBlock(fine, coarse) for coarse, fine in narrow)
        self.lateral = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for coarse, fine in narrow)
        self.up = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)

        self.start = nn.Conv2d(channels[-1], channels[-1], 3, padding=1)
        self.narrow = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for coarse, fine in narrow)
        self.image_blocks = nn.ModuleList(ModulatedBlock(c, c) for c in channels)
        self.to_rgb = nn.ModuleList(nn.Conv2d(c, 3, 1) for c in channels)
        for layer in self.to_rgb:  # small, or tanh saturates at the start
            nn.init.normal_(layer.weight, std=0.1 / layer.in_channels ** 0.5)
            nn.init.zeros_(layer.bias)

    def run(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """`block(*inputs)`, without keeping what its backward pass can compute again where that is asked for."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def encode(self, label_map: torch.Tensor, z: torch.Tensor, z2=None, region=None) -> list[torch.Tensor]:
        """U-Net over the label map -> features (B, channels[i], H / 2**i, W / 2**i), full resolution first.

        Noise is used where `noise` is "concat" alone: with cross-attention the features serve any number of samples.
        """
        x = self.embedding(label_map).permute(0, 3, 1, 2)
        if self.noise == "concat":
            noise_map = z[:, :, None, None].expand(-1, -1, *x.shape[2:])
            if region is not None:
                noise_map = torch.where(region[:, None], z2[:, :, None, None], noise_map)
            x = self.join_noise(torch.cat([x, noise_map], dim=1))
        skips = [self.attention[0](x)]
        for down, attention in zip(self.down, self.attention[1:]):
            skips.append(attention(self.run(down, F.avg_pool2d(skips[-1], 2))))
        x, features = skips[-1], []
        for i in reversed(range(len(skips))):
            if i < len(skips) - 1:
                x = skips[i] + upsample(self.lateral[i](x), skips[i].shape[2:])
            x = x + self.up[i](F.leaky_relu(pixel_norm(x), 0.2))
            features.insert(0, x)
        return features

    def forward(self, label_map: torch.Tensor, z: torch.Tensor, z2: torch.Tensor | None = None,
                region: torch.Tensor | None = None) -> torch.Tensor:
        """Label maps to images, one or several samples a map.

        Args:
            label_map: (B, H, W) int64 in 0..C.
            z: (K * B, z_dim) standard normal noise; row k * B + i is the k-th sample of map i.
            z2, region: (K * B, z_dim) noise used where region, (K * B, H, W) bool, is True.

        Returns:
            (K * B, 3, H, W) in [-1, 1].
        """
        samples = len(z) // len(label_map)
        if self.noise == "cross_attention":
            features = [f.repeat(samples, 1, 1, 1) for f in self.encode(label_map, z)]
        else:
            features = self.encode(label_map.repeat(samples, 1, 1), z, z2, region)
        weights = [None if region is None else F.adaptive_avg_pool2d(region[:, None].to(f.dtype), f.shape[2:])
                   for f in features]
        if self.noise == "cross_attention":
            style, style2 = self.mapping(z), None if z2 is None else self.mapping(z2)
            for i, attend in enumerate(self.cross_attention):
                features[i] = attend(features[i], style, style2, weights[i])
        for i, mix in enumerate(self.from_texture):
            local = z[:, :, None, None]
            if region is not None:
                local = torch.lerp(local, z2[:, :, None, None], weights[i].float())
            features[i] = features[i] + mix(self.texture(local, features[i].shape[2:]))
        x, rgb = self.start(features[-1]), 0
        for i in reversed(range(len(features))):
            if i < len(features) - 1:
                x, rgb = (upsample(t, features[i].shape[2:]) for t in (self.narrow[i](x), rgb))
            x = self.run(self.image_blocks[i], x, features[i])
            rgb = rgb + self.to_rgb[i](pixel_norm(x))
        return torch.tanh(rgb)


class Discriminator(nn.Module):
    """DP-SIMS discriminator: the trainable half of a segmentation U-Net whose encoder is a frozen `Backbone`.

    Every conditioned scale passes a residual block; the decoder goes from the coarsest to the finest, concatenating;
    residual blocks on the image itself join at full resolution. Spectral norm on every convolution.

    Args:
        num_classes: C.
        feature_channels: channels of the backbone's features, finest first (`Backbone.channels`).
        channels: width at full resolution; scale l has min(channels * 2 ** (l + 1), 4 * channels).
    """

    def __init__(self, num_classes: int, feature_channels: list[int], channels: int = 64):
        super().__init__()
        widths = [min(channels * 2 ** (i + 1), 4 * channels) for i in range(len(feature_channels))]
        block = lambda c_in, c_out: ResidualBlock(c_in, c_out, norm=None, wrap=spectral_norm)
        self.lateral = nn.ModuleList(block(c, w) for c, w in zip(feature_channels, widths))
        self.decode = nn.ModuleList(block(coarse + w, w) for coarse, w in zip(widths[1:], widths[:-1]))
        self.from_image = nn.Sequential(spectral_norm(nn.Conv2d(3, channels, 3, padding=1)), block(channels, channels))
        self.join = block(widths[0] + channels, channels)
        self.to_logits = spectral_norm(nn.Conv2d(channels, num_classes + 1, 1))

    def forward(self, image: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """Image (B, 3, H, W) in [-1, 1] and its conditioned features -> logits (B, C + 1, H, W); channel C is "fake"."""
        laterals = [block(f) for block, f in zip(self.lateral, features)]
        x = laterals[-1]
        for lateral, decode in zip(laterals[-2::-1], self.decode[::-1]):
            x = decode(torch.cat([upsample(x, lateral.shape[2:]), lateral], dim=1))
        x = torch.cat([upsample(x, image.shape[2:]), self.from_image(image)], dim=1)
        return self.to_logits(F.leaky_relu(self.join(x), 0.2))
