"""SDM's network against a plain restatement of it under official names, and against cases worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sdm import SPADE, SDMUNet, instance_edges, timestep_embedding

TINY = dict(num_classes=3, base_channels=32, multipliers=(1, 2), num_res_blocks=1, attention_strides=(2,),
            head_channels=32)


def tiny_unet(**changes) -> SDMUNet:
    """A small network in which no layer is at its zero initialization."""
    torch.manual_seed(0)
    unet = SDMUNet(**{**TINY, **changes})
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return unet


def label_maps() -> torch.Tensor:
    return torch.randint(0, 4, (2, 8, 8), generator=torch.Generator().manual_seed(1))


def official_state_dict() -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of an official checkpoint of TINY's size."""
    shapes = {"time_embed.0": (128, 32), "time_embed.2": (128, 128), "input_blocks.0.0": (32, 3, 3, 3),
              "out.0": (32,), "out.2": (6, 32, 3, 3)}

    def block(name: str, channels: int, out: int, spade: bool) -> None:
        first, second = (1, 2) if spade else (2, 3)
        shapes[f"{name}.in_layers.{first}"] = (out, channels, 3, 3)
        shapes[f"{name}.emb_layers.1"] = (2 * out, 128)
        shapes[f"{name}.out_layers.{second}"] = (out, out, 3, 3)
        if channels != out:
            shapes[f"{name}.skip_connection"] = (out, channels, 1, 1)
        if spade:
            for part, width in (("in_norm", channels), ("out_norm", out)):
                shapes[f"{name}.{part}.mlp_shared.0"] = (128, 4, 3, 3)
                shapes[f"{name}.{part}.mlp_gamma"] = shapes[f"{name}.{part}.mlp_beta"] = (width, 128, 3, 3)
        else:
            shapes[f"{name}.in_layers.0"], shapes[f"{name}.out_layers.0"] = (channels,), (out,)

    for name, channels, out in (("input_blocks.1.0", 32, 32), ("input_blocks.2.0", 32, 32),
                                ("input_blocks.3.0", 32, 64)):
        block(name, channels, out, spade=False)
    for name, channels, out in (("middle_block.0", 64, 64), ("middle_block.2", 64, 64), ("output_blocks.0.0", 128, 64),
                                ("output_blocks.1.0", 96, 64), ("output_blocks.1.2", 64, 64),
                                ("output_blocks.2.0", 96, 32), ("output_blocks.3.0", 64, 32)):
        block(name, channels, out, spade=True)
    for name in ("input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"):
        shapes |= {f"{name}.norm": (64,), f"{name}.qkv": (192, 64, 1), f"{name}.proj_out": (64, 64, 1)}
    generator = torch.Generator().manual_seed(2)
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return state


class Reference:
    """The paper's network at TINY's size, step by step, on a state dict with official names."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = state

    def conv(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def group_norm(self, name: str, x: torch.Tensor, semantics: torch.Tensor) -> torch.Tensor:
        groups = x.reshape(len(x), 32, -1)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        normal = groups.reshape(x.shape)
        if f"{name}.weight" in self.state:
            return normal * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]
        hidden = self.conv(f"{name}.mlp_shared.0", F.interpolate(semantics, x.shape[-2:], mode="nearest")).relu()
        return normal * (1 + self.conv(f"{name}.mlp_gamma", hidden)) + self.conv(f"{name}.mlp_beta", hidden)

    def block(self, name: str, x: torch.Tensor, time: torch.Tensor, y: torch.Tensor, resample=lambda x: x):
        spade = f"{name}.in_norm.mlp_gamma.weight" in self.state
        names = ("in_norm", "in_layers.1", "out_norm", "out_layers.2") if spade else (
            "in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3")
        norm1, conv1, norm2, conv2 = (f"{name}.{part}" for part in names)
        h = self.conv(conv1, resample(F.silu(self.group_norm(norm1, x, y))))
        scale, shift = self.linear(f"{name}.emb_layers.1", F.silu(time)).split(h.shape[1], dim=1)
        h = self.group_norm(norm2, h, y) * (1 + scale[..., None, None]) + shift[..., None, None]
        x = resample(x)
        if f"{name}.skip_connection.weight" in self.state:
            x = self.conv(f"{name}.skip_connection", x)
        return x + self.conv(conv2, F.silu(h))

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        weight, bias = self.state[f"{name}.qkv.weight"][:, :, 0], self.state[f"{name}.qkv.bias"][:, None]
        qkv = weight @ self.group_norm(f"{name}.norm", x, x).reshape(batch, channels, -1) + bias
        heads = []
        for head in range(channels // 32):
            query, key, value = (qkv[:, head * 96 + part * 32:][:, :32] for part in range(3))
            heads.append(value @ (query.mT @ key / math.sqrt(32)).softmax(-1).mT)
        out = self.state[f"{name}.proj_out.weight"][:, :, 0] @ torch.cat(heads, 1)
        return x + (out + self.state[f"{name}.proj_out.bias"][:, None]).reshape(x.shape)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * 10_000.0 ** (-torch.arange(16) / 16)
        time = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))
        time = self.linear("time_embed.2", F.silu(time))

        def block(name: str, x: torch.Tensor, **resample) -> torch.Tensor:
            return self.block(name, x, time, y, **resample)

        def halve(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))

        def double(x: torch.Tensor) -> torch.Tensor:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

        h0 = self.conv("input_blocks.0.0", x)
        h1 = block("input_blocks.1.0", h0)
        h2 = block("input_blocks.2.0", h1, resample=halve)
        h3 = self.attention("input_blocks.3.1", block("input_blocks.3.0", h2))
        h = block("middle_block.2", self.attention("middle_block.1", block("middle_block.0", h3)))
        h = self.attention("output_blocks.0.1", block("output_blocks.0.0", torch.cat([h, h3], 1)))
        h = self.attention("output_blocks.1.1", block("output_blocks.1.0", torch.cat([h, h2], 1)))
        h = block("output_blocks.1.2", h, resample=double)
        h = block("output_blocks.2.0", torch.cat([h, h1], 1))
        h = block("output_blocks.3.0", torch.cat([h, h0], 1))
        return self.conv("out.2", F.silu(self.group_norm("out.0", h, h)))


@pytest.mark.parametrize("instances", [False, True])
def test_official_state_dict_gives_the_reference_output(instances: bool):
    state = official_state_dict()
    void_channel = "none" if instances else "last"  # 4 label channels either way
    unet = SDMUNet(**TINY, void_channel=void_channel, instance_edges=instances)
    unet.load_official(state)
    noisy, t = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 700])
    label_map = torch.randint(0, 3, (2, 8, 16), generator=torch.Generator().manual_seed(4))
    ids, last = torch.zeros(2, 8, 16, dtype=torch.int32), torch.zeros(2, 8, 16, dtype=torch.bool)
    if instances:
        ids[:, 2:5, 3:] = 26001
        last[:, 1:6, 3:] = last[:, 2:5, 2] = True
        last[:, 3, 4:] = False
    semantics = torch.stack([*(label_map == c for c in range(3)), last], dim=1).float()
    with torch.no_grad():
        output = unet(noisy, t, label_map, ids)
        reference = Reference(state)(noisy, t, semantics)
        assert reference.std() > 0.1 and (reference - Reference(state)(noisy, t, 0 * semantics)).abs().max() > 0.1
    torch.testing.assert_close(output, reference, atol=1e-4, rtol=0)


def test_load_official_refuses_what_does_not_fit():
    state = official_state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key.*ghost"):
        SDMUNet(**TINY).load_official({**state, "ghost": torch.zeros(1)})
    del state["out.2.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*out.2.bias"):
        SDMUNet(**TINY).load_official(state)
    with pytest.raises(RuntimeError, match="(?s)size mismatch.*shared.weight"):
        SDMUNet(**{**TINY, "num_classes": 19}).load_official(official_state_dict())


def test_published_size():
    with torch.device("meta"):
        unet = SDMUNet(num_classes=150)
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6, 1) == 660.6


def test_label_channels_by_hand():
    label_map = torch.tensor([[[0, 2], [3, 1]]])  # 3 is void
    expected = torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]])
    with torch.device("meta"):
        unet, without_void = SDMUNet(**TINY), SDMUNet(**TINY, void_channel="none")
        with_edges = SDMUNet(**TINY, instance_edges=True)
        void_first = SDMUNet(**TINY, void_channel="first", instance_edges=True)
    assert torch.equal(unet.semantics(label_map)[0], expected)
    assert torch.equal(without_void.semantics(label_map)[0], expected[:3])
    assert torch.equal(with_edges.semantics(label_map)[0, 4], torch.ones(2, 2))  # every pixel has another neighbor
    instances = torch.tensor([[[7, 7], [7, 7]]], dtype=torch.int32)
    assert not with_edges.semantics(label_map, instances)[0, 4].any()
    # The official Cityscapes channels are labelIds: 0 is void, class c is c + 1; then the edges.
    assert torch.equal(void_first.semantics(label_map)[0], torch.cat([expected[3:], expected[:3], torch.ones(1, 2, 2)]))
    dropped = unet.semantics(label_map.expand(2, -1, -1), dropped=torch.tensor([True, False]))
    assert not dropped[0].any() and torch.equal(dropped[1], expected)


def test_instance_edges_by_hand():
    instances = torch.tensor([[[7, 7, 7, 7], [7, 7, 9, 7], [7, 7, 7, 7]]])
    expected = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(instance_edges(instances)[0], expected)


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
    unet.encoder[0][0].register_forward_hook(lambda module, inputs, output: runs.append(len(output)))
    for module in unet.modules():
        if isinstance(module, SPADE):
            module.shared.register_forward_hook(lambda *_: pytest.fail("label map encoded again"))
    both = unet(noisy, t, features)
    assert runs == [2]  # the encoder serves both halves of a guided pass
    torch.testing.assert_close(both, torch.cat([with_labels, without]), atol=1e-5, rtol=0)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        unet = tiny_unet(checkpointing=checkpointing)
        noisy = torch.ones(2, 3, 8, 8)
        unet(noisy, torch.tensor([5, 900]), label_maps()).square().mean().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-4)


def test_autocast_leaves_the_output_in_float32():
    unet, label_map = tiny_unet().to(memory_format=torch.channels_last), label_maps()
    noisy, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([5, 900])
    with torch.no_grad():
        exact = torch.cat([unet(noisy, t, label_map, dropped=torch.tensor([drop] * 2)) for drop in (False, True)])
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(noisy, t, unet.encode_labels(label_map, guided=True))
    assert output.dtype == torch.float32
    assert (output - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="48 .* is 48: make it a multiple of 32"):
        SDMUNet(3, base_channels=48, multipliers=(1, 2))
    with pytest.raises(ValueError, match="void_channel 'third': choose one of last, first, none"):
        SDMUNet(**TINY, void_channel="third")
    with pytest.raises(ValueError, match="head_channels 48 does not divide the 64 channels"):
        SDMUNet(**{**TINY, "head_channels": 48})
    with pytest.raises(ValueError, match="multiples of 2"):
        tiny_unet()(torch.zeros(1, 3, 7, 8), torch.zeros(1), torch.zeros(1, 7, 8, dtype=torch.int64))


def test_timestep_embedding_against_numpy():
    embedding = timestep_embedding(torch.tensor([0, 1, 999]), 8).numpy()
    angles = np.array([0, 1, 999])[:, None] * np.array([1, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(embedding, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-4)
