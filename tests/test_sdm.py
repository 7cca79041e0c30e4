"""SDM's network against a plain restatement of it under official names, and against cases worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from sdm import SPADE, SDMUNet, instance_edges, official_name

TINY = dict(num_classes=3, base_channels=32, multipliers=(1, 2), num_res_blocks=1, attention_strides=(2,),
            head_channels=32, spade_channels=8)


def tiny_unet(**changes) -> SDMUNet:
    """A small network in which no layer is at its zero initialization."""
    torch.manual_seed(0)
    unet = SDMUNet(**{**TINY, **changes})
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return unet


def label_maps() -> torch.Tensor:
    return torch.randint(0, 4, (2, 8, 8), generator=torch.Generator().manual_seed(1))


class Reference:
    """The paper's network at TINY's size, step by step, on a state dict with official names."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state, self.used = state, set()

    def weights(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        self.used |= {f"{name}.weight", f"{name}.bias"}
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def conv(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights(name)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def group_norm(self, name: str, x: torch.Tensor, semantics: None = None) -> torch.Tensor:
        return F.group_norm(x, 32, *self.weights(name))

    def spade(self, name: str, x: torch.Tensor, semantics: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(f"{name}.mlp_shared.0", F.interpolate(semantics, x.shape[-2:], mode="nearest")).relu()
        return F.group_norm(x, 32) * (1 + self.conv(f"{name}.mlp_gamma", hidden)) + self.conv(f"{name}.mlp_beta", hidden)

    def block(self, name: str, x: torch.Tensor, time: torch.Tensor, y: torch.Tensor, resample=lambda x: x):
        encoder = name.startswith("input_blocks")
        norm1, conv1, norm2, conv2 = (f"{name}.{part}" for part in (
            ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3") if encoder else
            ("in_norm", "in_layers.1", "out_norm", "out_layers.2")))
        norm = self.group_norm if encoder else self.spade
        h = self.conv(conv1, resample(F.silu(norm(norm1, x, y))))
        scale, shift = F.linear(F.silu(time), *self.weights(f"{name}.emb_layers.1")).split(h.shape[1], dim=1)
        h = norm(norm2, h, y) * (1 + scale[..., None, None]) + shift[..., None, None]
        x = resample(x)
        if x.shape[1] != h.shape[1]:
            x = self.conv(f"{name}.skip_connection", x)
        return x + self.conv(conv2, F.silu(h))

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        (weight, bias), (out_weight, out_bias) = self.weights(f"{name}.qkv"), self.weights(f"{name}.proj_out")
        qkv = weight[:, :, 0] @ self.group_norm(f"{name}.norm", x).flatten(2) + bias[:, None]
        query, key, value = qkv.reshape(-1, 3 * 32, qkv.shape[2]).split(32, dim=1)  # a head behind the other
        heads = (value @ (query.mT @ key / math.sqrt(32)).softmax(-1).mT).reshape(*x.shape[:2], -1)
        return x + (out_weight[:, :, 0] @ heads + out_bias[:, None]).reshape(x.shape)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * 10_000.0 ** (-torch.arange(16) / 16)
        time = F.linear(torch.cat([angles.cos(), angles.sin()], 1), *self.weights("time_embed.0"))
        time = F.linear(F.silu(time), *self.weights("time_embed.2"))
        block = lambda name, x, **resample: self.block(name, x, time, y, **resample)
        h0 = self.conv("input_blocks.0.0", x)
        h1 = block("input_blocks.1.0", h0)
        h2 = block("input_blocks.2.0", h1, resample=lambda x: F.avg_pool2d(x, 2))
        h3 = self.attention("input_blocks.3.1", block("input_blocks.3.0", h2))
        h = block("middle_block.2", self.attention("middle_block.1", block("middle_block.0", h3)))
        h = self.attention("output_blocks.0.1", block("output_blocks.0.0", torch.cat([h, h3], 1)))
        h = self.attention("output_blocks.1.1", block("output_blocks.1.0", torch.cat([h, h2], 1)))
        h = block("output_blocks.1.2", h, resample=lambda x: F.interpolate(x, scale_factor=2))
        h = block("output_blocks.2.0", torch.cat([h, h1], 1))
        h = block("output_blocks.3.0", torch.cat([h, h0], 1))
        return self.conv("out.2", F.silu(self.group_norm("out.0", h)))


def test_official_state_dict_gives_the_reference_output():
    unet, state = SDMUNet(**TINY), {}
    for name, value in unet.state_dict().items():
        state[official_name(name)] = torch.randn(value.shape) * (0.1 if value.ndim == 1 else value[0].numel() ** -0.5)
    unet.load_official(state)
    noisy, t, label_map = torch.randn(2, 3, 8, 16), torch.tensor([0, 700]), torch.randint(0, 4, (2, 8, 16))
    semantics = F.one_hot(label_map, 4).movedim(3, 1).float()
    with torch.no_grad():
        output, reference = unet(noisy, t, label_map), Reference(state)
        expected = reference(noisy, t, semantics)
        assert expected.std() > 0.1 and (expected - reference(noisy, t, 0 * semantics)).abs().max() > 0.1
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    assert reference.used == set(state)  # the official file has these entries and no others


def test_label_channels_by_hand():
    label_map = torch.tensor([[[0, 2], [3, 1]]])  # 3 is void
    expected = torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]])
    with torch.device("meta"):
        unet, without_void = SDMUNet(**TINY), SDMUNet(**TINY, void_channel="none")
        void_first = SDMUNet(**TINY, void_channel="first", instance_edges=True)
    assert torch.equal(unet.semantics(label_map)[0], expected)
    assert torch.equal(without_void.semantics(label_map)[0], expected[:3])
    # The official Cityscapes channels are labelIds: 0 is void, class c is c + 1; then the edges, here of the label map.
    assert torch.equal(void_first.semantics(label_map)[0], torch.cat([expected[3:], expected[:3], torch.ones(1, 2, 2)]))
    dropped = unet.semantics(label_map.expand(2, -1, -1), dropped=torch.tensor([True, False]))
    assert not dropped[0].any() and torch.equal(dropped[1], expected)
    instances = torch.tensor([[[7, 7, 7, 7], [7, 7, 9, 7], [7, 7, 7, 7]]])
    assert instance_edges(instances)[0].int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (2, 12)])
def test_label_features_computed_once_give_the_same_output(size):
    unet, label_map = tiny_unet(), torch.randint(0, 4, (2, *size))
    noisy, t = torch.randn(2, 3, *size), torch.tensor([5, 900])
    with_labels = unet(noisy, t, label_map)
    without = unet(noisy, t, label_map, dropped=torch.tensor([True, True]))
    assert (with_labels - without).abs().max() > 1e-3
    torch.testing.assert_close(unet(noisy, t, unet.encode_labels(label_map)), with_labels, atol=1e-5, rtol=0)

    features, runs = unet.encode_labels(label_map, guided=True), []
    with torch.autocast("cpu", torch.bfloat16):
        rounded = unet(noisy, t, features)
    unet.encoder[0][0].register_forward_hook(lambda module, inputs, output: runs.append(len(output)))
    for module in unet.modules():
        if isinstance(module, SPADE):
            module.shared.register_forward_hook(lambda *_: pytest.fail("label map encoded again"))
    both = unet(noisy, t, features)
    assert runs == [2]  # the encoder serves both halves of a guided pass
    torch.testing.assert_close(both, torch.cat([with_labels, without]), atol=1e-5, rtol=0)
    assert rounded.dtype == torch.float32 and 0 < (rounded - both).abs().mean() < 0.03 * both.abs().mean()
