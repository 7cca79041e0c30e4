"""The network of the Semantic Diffusion Model (SDM; Wang et al., 2022, arXiv 2207.00050).

A diffusion U-Net whose encoder sees only the noisy image. The label map enters the middle and the decoder, where every
group normalization is a SPADE: its scale and shift are maps computed from the one-hot label map. Three facts follow that
sampling can use, at equal mathematics: those maps do not depend on the step, so `encode_labels` computes them once an
image; without a label map they are constant but for the outermost pixels, so 3 x 3 values hold them, which saves 4 GiB
at the published size; and the encoder's result is the same with and without the label map, so guidance runs it once.

Schedule, loss and samplers are in diffusion.py.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_GROUPS = 32

# What `SPADE.encode` gives, (scale, shift), for each SPADE in the order in which the network meets them; for guidance
# followed by the same two of no label map.
LabelFeatures = list[tuple[Tensor, ...]]

# Our parameter names -> those of the official state dict, applied in this order.
OFFICIAL_NAMES = (
    (r"^time_mlp\.", "time_embed."),
    (r"^encoder\.", "input_blocks."),
    (r"^middle\.", "middle_block."),
    (r"^decoder\.", "output_blocks."),
    (r"\.time\.", ".emb_layers.1."),
    (r"\.skip\.", ".skip_connection."),
    (r"\.projection\.", ".proj_out."),
    (r"\.norm1\.(gamma|beta)\.", r".in_norm.mlp_\1."),
    (r"\.norm2\.(gamma|beta)\.", r".out_norm.mlp_\1."),
    (r"\.norm1\.shared\.", ".in_norm.mlp_shared.0."),
    (r"\.norm2\.shared\.", ".out_norm.mlp_shared.0."),
    # In the encoder's blocks the norms are part of the two chains of layers, which shifts the convolutions' indices.
    (r"^(input_blocks.*)\.norm1\.", r"\1.in_layers.0."),
    (r"^(input_blocks.*)\.norm2\.", r"\1.out_layers.0."),
    (r"^(input_blocks.*)\.conv1\.", r"\1.in_layers.2."),
    (r"^(input_blocks.*)\.conv2\.", r"\1.out_layers.3."),
    (r"\.conv1\.", ".in_layers.1."),
    (r"\.conv2\.", ".out_layers.2."),
)


def official_name(name: str) -> str:
    """The official state dict's key for one of our parameters."""
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def instance_edges(instance_map: Tensor) -> Tensor:
    """True where a pixel's instance id differs from that of a neighbor (left, right, above, below).

    instance_map: integer (B, H, W). Returns bool (B, H, W). Same as pix2pixHD's edge map, which SDM uses.
    """
    across, down = instance_map.diff(dim=2) != 0, instance_map.diff(dim=1) != 0
    return F.pad(across, (1, 0)) | F.pad(across, (0, 1)) | F.pad(down, (0, 0, 1, 0)) | F.pad(down, (0, 0, 0, 1))


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of t at geometric frequencies from 1 to 1/10000. t: (B,). Returns float32 (B, channels)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def tile(x: Tensor, copies: int) -> Tensor:
    """The batch `copies` times over, one after the other; no copy is made of a single one."""
    return x.expand(copies, *x.shape).flatten(0, 1)


def spread(edges: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, C, 3, 3) -> (1, C, *size), the middle row and column repeated; sides below 3 are as they are."""
    for dim, side in zip((1, 2), size):
        index = torch.arange(side, device=edges.device).clamp(max=1)
        index[-1] = min(side, 3) - 1
        edges = edges.permute(0, 2, 3, 1).index_select(dim, index).permute(0, 3, 1, 2)  # stays channels last
    return edges


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weight and bias at zero, so that a residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SPADE(nn.Module):
    """Group normalization whose scale and shift are maps made from the label map (Park et al., 2019).

    `stride` is that of x in the image: the one-hot map is reduced to x's size by taking every stride-th pixel.
    """

    def __init__(self, channels: int, label_channels: int, hidden_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.shared = nn.Conv2d(label_channels, hidden_channels, 3, padding=1)
        self.gamma = nn.Conv2d(hidden_channels, channels, 3, padding=1)
        self.beta = nn.Conv2d(hidden_channels, channels, 3, padding=1)

    def encode(self, semantics: Tensor) -> tuple[Tensor, Tensor]:
        """semantics: (B, label_channels, H, W). Returns scale and shift, each (B, channels, H / stride, W / stride)."""
        hidden = F.relu(self.shared(semantics[..., :: self.stride, :: self.stride]))
        return 1 + self.gamma(hidden), self.beta(hidden)

    def encode_nothing(self, semantics: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` gives for zeros of the size of semantics, as (1, channels, 3, 3) for `spread`: hidden is
        constant then, and a zero-padded convolution of a constant has its corners, its sides and one value within."""
        sides = [self.stride * min(3, side // self.stride) for side in semantics.shape[2:]]
        return self.encode(semantics.new_zeros(1, semantics.shape[1], *sides))

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        """labels: the semantics, or what `encode` made of them; with that of `encode_nothing` behind it, the second half
        of x's batch has no label map."""
        scale, shift, *nothing = self.encode(*labels) if len(labels) == 1 else labels
        x = F.group_norm(x, NORM_GROUPS)
        if not nothing:
            return torch.addcmul(shift, x, scale)
        given, withheld = x.chunk(2)
        scale0, shift0 = (spread(m, x.shape[2:]) for m in nothing)
        return torch.cat([torch.addcmul(shift, given, scale), torch.addcmul(shift0, withheld, scale0)])


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the time step scales and shifts after the second norm.

    With label_channels the norms are SPADEs, with spade_channels hidden ones, at `stride` before and after resampling
    ("up" doubles the size, "down" halves it, both between the first SiLU and its convolution).
    """

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, label_channels: int | None = None,
                 spade_channels: int = 128, stride: int = 1, resample: str | None = None):
        super().__init__()
        self.resample = {"up": nn.Upsample(scale_factor=2), "down": nn.AvgPool2d(2), None: nn.Identity()}[resample]

        def norm(channels: int, stride: int) -> nn.Module:
            if label_channels is None:
                return nn.GroupNorm(NORM_GROUPS, channels)
            return SPADE(channels, label_channels, spade_channels, stride)

        self.norm1 = norm(in_channels, stride)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, 2 * out_channels)
        self.norm2 = norm(out_channels, stride // 2 if resample == "up" else stride)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, labels1=(), labels2=()) -> Tensor:
        """x: (B, in_channels, h, w). embedding: (B, time_channels). labels1, labels2: what the two norms take."""
        h = self.conv1(self.resample(F.silu(self.norm1(x, *labels1))))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h, *labels2), 1 + scale)
        return self.skip(self.resample(x)) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Residual self-attention over all pixels, `head_channels` channels a head."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.head_channels = head_channels
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.projection = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # The rows of qkv are ordered head by head, and q, k, v within a head.
        heads = self.qkv(self.norm(x).flatten(2)).unflatten(1, (-1, 3, self.head_channels)).transpose(-1, -2)
        query, key, value = heads.unbind(dim=2)  # (B, heads, h w, head_channels) each
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.projection(attended.transpose(-1, -2).flatten(1, 2)).view_as(x)


class SDMUNet(nn.Module):
    """SDM's denoiser: noisy image, time step and label map -> noise estimate and variance fraction.

    num_classes: C; label maps hold 0..C-1, void = C.
    base_channels, multipliers: the width of level l (stride 2^l) is base_channels * multipliers[l], a multiple of 32.
    num_res_blocks: residual blocks a level in the encoder (one more in the decoder).
    attention_strides: strides with self-attention; 8, 16, 32 are the resolutions 32, 16, 8 of a 256 x 256 image.
    head_channels: channels of one attention head.
    spade_channels: hidden channels of every SPADE.
    void_channel: where void pixels are one-hot. "last": in a channel after the classes, as in the official ADE20K (150
        classes) and COCO-Stuff (182) models; "first": in one before them, so that channel k is labelId k, as the
        official code reads Cityscapes (34); "none": they are zero in every channel (CelebAMask-HQ has no void).
    instance_edges: one more channel, 1 on instance borders, as in the official code for Cityscapes and CelebAMask-HQ.
    checkpointing: in training, recompute each block's inner activations in the backward pass instead of keeping them.

    The defaults are the published size: 660.6 M parameters with 150 classes.
    Raises ValueError for another void_channel and where widths do not divide as they must.
    """

    def __init__(self, num_classes: int, base_channels: int = 256, multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4),
                 num_res_blocks: int = 2, attention_strides: tuple[int, ...] = (8, 16, 32), head_channels: int = 64,
                 spade_channels: int = 128, void_channel: str = "last", instance_edges: bool = False,
                 checkpointing: bool = False):
        super().__init__()
        self.num_classes, self.base_channels = num_classes, base_channels
        self.void_channel, self.instance_edges, self.checkpointing = void_channel, instance_edges, checkpointing
        if void_channel not in ("last", "first", "none"):
            raise ValueError(f"void_channel {void_channel!r}: choose one of last, first, none")
        self.label_channels = num_classes + (void_channel != "none") + instance_edges
        self.divisor = 2 ** (len(multipliers) - 1)  # of image sides
        widths = [base_channels * multiplier for multiplier in multipliers]
        for level, width in enumerate(widths):
            if width % NORM_GROUPS:
                raise ValueError(f"base_channels {base_channels} times multiplier {multipliers[level]} is {width}: "
                                 f"make it a multiple of {NORM_GROUPS}")
            if width % head_channels and (2**level in attention_strides or level == len(widths) - 1):
                raise ValueError(f"head_channels {head_channels} does not divide the {width} channels of the attention "
                                 f"at stride {2**level}: choose a divisor of {width}")

        time_channels = 4 * base_channels
        self.time_mlp = nn.Sequential(nn.Linear(base_channels, time_channels), nn.SiLU(),
                                      nn.Linear(time_channels, time_channels))

        def attention(level: int) -> list[nn.Module]:
            return [SelfAttention(widths[level], head_channels)] if 2**level in attention_strides else []

        def conditional(in_channels: int, out_channels: int, level: int, resample: str | None = None) -> ResidualBlock:
            return ResidualBlock(in_channels, out_channels, time_channels, self.label_channels, spade_channels,
                                 2**level, resample)

        # Each stage is a list of layers run in turn; the decoder's stage i takes the encoder's stage -1 - i beside it.
        channels = widths[0]
        encoder, skip_channels = [[nn.Conv2d(3, channels, 3, padding=1)]], [channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                encoder.append([ResidualBlock(channels, width, time_channels), *attention(level)])
                channels = width
                skip_channels.append(channels)
            if level < len(widths) - 1:
                encoder.append([ResidualBlock(channels, channels, time_channels, resample="down")])
                skip_channels.append(channels)

        last = len(widths) - 1
        middle = [conditional(channels, channels, last), SelfAttention(channels, head_channels),
                  conditional(channels, channels, last)]

        decoder = []
        for level in reversed(range(len(widths))):
            for index in range(num_res_blocks + 1):
                stage = [conditional(channels + skip_channels.pop(), widths[level], level), *attention(level)]
                channels = widths[level]
                if level > 0 and index == num_res_blocks:
                    stage.append(conditional(channels, channels, level, resample="up"))
                decoder.append(stage)

        self.encoder = nn.ModuleList(nn.ModuleList(stage) for stage in encoder)
        self.middle = nn.ModuleList(middle)
        self.decoder = nn.ModuleList(nn.ModuleList(stage) for stage in decoder)
        self.out = nn.Sequential(nn.GroupNorm(NORM_GROUPS, channels), nn.SiLU(),
                                 zeroed(nn.Conv2d(channels, 6, 3, padding=1)))

    def semantics(self, label_map: Tensor, instances: Tensor | None = None, dropped: Tensor | None = None) -> Tensor:
        """The label map as the network's SPADEs see it.

        label_map: int64 (B, H, W) in 0..C. instances: instance ids, integer (B, H, W), whose edges are used with
        instance_edges; by default the label map itself stands for them (as in the official CelebAMask-HQ model, where
        both have the same edges; Cityscapes has instance maps). dropped: bool (B,), True zeroes that image's every
        channel (classifier-free guidance).
        Returns float (B, label_channels, H, W).
        """
        batch, height, width = label_map.shape
        one_hot = torch.zeros(batch, self.num_classes + 1, height, width, device=label_map.device)
        one_hot.scatter_(1, label_map[:, None], 1)
        channels = one_hot[:, : self.num_classes] if self.void_channel == "none" else one_hot
        if self.void_channel == "first":
            channels = channels.roll(1, dims=1)
        if self.instance_edges:
            edges = instance_edges(label_map if instances is None else instances)
            channels = torch.cat([channels, edges[:, None].float()], dim=1)
        return channels if dropped is None else channels * ~dropped[:, None, None, None]

    def encode_labels(self, label_map: Tensor, instances: Tensor | None = None, guided: bool = False) -> LabelFeatures:
        """Everything that forward needs of the label map, to be computed once an image and given to every step.

        label_map, instances: as in `semantics`. guided: add what a dropped label map gives, so that forward also
        returns the unconditional output. At the published size and 256 x 256 this is about 2 GB an image in float32.
        """
        semantics = self.semantics(label_map, instances)
        # Modules are listed in the order of their registration, which is the order of forward.
        return [module.encode(semantics) + (module.encode_nothing(semantics) if guided else ())
                for module in self.modules() if isinstance(module, SPADE)]

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor | LabelFeatures, instances: Tensor | None = None,
                dropped: Tensor | None = None) -> Tensor:
        """noisy: (B, 3, H, W), sides multiples of 2^(levels - 1). t: (B,) in 0..999.

        labels: label map int64 (B, H, W) in 0..C (instances and dropped: see `semantics`), or the features that
        `encode_labels` made of it.
        Returns (B, 6, H, W): the noise estimate, then the variance fraction in about [-1, 1] (see diffusion.py). With
        guided features (2B, 6, H, W): the outputs with the label map, then those without.
        Raises ValueError if the size does not fit the number of levels.
        """
        if any(side % self.divisor for side in noisy.shape[-2:]):
            raise ValueError(f"image size {tuple(noisy.shape[-2:])}: make both sides multiples of {self.divisor}, "
                             "or use fewer multipliers")
        if isinstance(labels, Tensor):
            copies, labels = 1, itertools.repeat((self.semantics(labels, instances, dropped),))
        else:
            copies, labels = len(labels[0]) // 2, iter(labels)  # two copies if guided

        embedding = F.silu(self.time_mlp(timestep_embedding(t, self.base_channels)))
        h, skips = noisy, []
        for stage in self.encoder:
            h = self._run(stage, h, embedding, itertools.repeat(()))
            skips.append(h)
        h, embedding = tile(h, copies), tile(embedding, copies)
        h = self._run(self.middle, h, embedding, labels)
        for stage in self.decoder:
            h = self._run(stage, torch.cat([h, tile(skips.pop(), copies)], dim=1), embedding, labels)
        # The noise estimate is not rounded to half precision: a chain adds up what is lost there.
        with torch.autocast(h.device.type, enabled=False):
            return self.out(h.float())

    def _run(self, stage: nn.ModuleList, h: Tensor, embedding: Tensor, labels: Iterator) -> Tensor:
        """The layers of a stage in turn; each residual block takes the next two items of labels."""
        for layer in stage:
            inputs = (h, embedding, next(labels), next(labels)) if isinstance(layer, ResidualBlock) else (h,)
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                h = layer(*inputs)
        return h

    def load_official(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load an official state dict (`ema_0.9999_best.pt`, `model*.pt`).

        Label channels keep their order, which void_channel must therefore be right about.
        Raises RuntimeError, which names them, for missing, unknown or differently shaped entries.
        """
        ours = {official_name(name): name for name in self.state_dict()}
        self.load_state_dict({ours.get(name, name): tensor for name, tensor in state_dict.items()})
