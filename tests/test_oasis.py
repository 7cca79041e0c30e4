"""OASIS against a plain reference: one-hot maps, ordinary convolutions, the official state dict's names."""

import pytest
import torch
import torch.nn.functional as F

import losses
import oasis
from gan import refresh_batch_norm

C, Z, WIDTH = 5, 3, 2
HEIGHT, LENGTH = 64, 128


class Reference:
    """Both networks as the paper states them, over a state dict with the official names."""

    def __init__(self, state: dict):
        self.state, self.training = {name: value.clone() for name, value in state.items()}, True

    def conv(self, x, name, padding=1):
        return F.conv2d(x, self.state[name + ".weight"], self.state[name + ".bias"], padding=padding)

    def spectral_conv(self, x, name, padding=1):
        weight = self.state[name + ".weight_orig"]
        matrix, u, v = weight.flatten(1), self.state[name + ".weight_u"], self.state[name + ".weight_v"]
        if self.training:
            v = F.normalize(matrix.detach().T @ u, dim=0)
            u = F.normalize(matrix.detach() @ v, dim=0)
            self.state.update({name + ".weight_u": u, name + ".weight_v": v})
        return F.conv2d(x, weight / (u @ matrix @ v), self.state.get(name + ".bias"), padding=padding)

    def shortcut(self, x, block):
        return self.spectral_conv(x, block + "conv_s", padding=0) if block + "conv_s.weight_orig" in self.state else x

    def spade(self, x, seg, name):
        mean, var = (self.state[f"{name}.first_norm.running_{kind}"] for kind in ("mean", "var"))
        x = F.batch_norm(x, mean, var, training=self.training)
        hidden = F.relu(self.conv(F.interpolate(seg, size=x.shape[2:]), name + ".mlp_shared.0"))
        return x * (1 + self.conv(hidden, name + ".mlp_gamma")) + self.conv(hidden, name + ".mlp_beta")

    def generate(self, label_map, noise):
        """noise: (B, Z, H, W)."""
        channels = torch.where(label_map == C, 0, label_map + 1)  # theirs: unknown first
        seg = torch.cat([noise, F.one_hot(channels, C + 1).permute(0, 3, 1, 2).to(noise.dtype)], 1)
        x = self.conv(F.interpolate(seg, size=[side // 32 for side in label_map.shape[1:]]), "fc")
        for i in range(6):
            block = f"body.{i}."
            x = F.interpolate(x, scale_factor=2) if i else x
            normed = self.spade(x, seg, block + "norm_s") if block + "norm_s.mlp_beta.bias" in self.state else x
            shortcut = self.shortcut(normed, block)
            x = self.spectral_conv(F.leaky_relu(self.spade(x, seg, block + "norm_0"), 0.2), block + "conv_0")
            x = self.spectral_conv(F.leaky_relu(self.spade(x, seg, block + "norm_1"), 0.2), block + "conv_1") + shortcut
        return torch.tanh(self.conv(F.leaky_relu(x, 0.2), "conv_img"))

    def discriminate(self, x):
        skips = []
        for i in range(6):
            block = f"body_down.{i}."
            y = self.spectral_conv(F.leaky_relu(x, 0.2) if i else x, block + ("conv1.1" if i else "conv1.0"))
            y = self.spectral_conv(F.leaky_relu(y, 0.2), block + "conv2.1")
            skips.append(x := F.avg_pool2d(self.shortcut(x, block) + y, 2))
        for i in range(6):
            block = f"body_up.{i}."
            x = torch.cat([skips[5 - i], x], 1) if i else x
            y = self.spectral_conv(F.interpolate(F.leaky_relu(x, 0.2), scale_factor=2), block + "conv1.2")
            y = self.spectral_conv(F.leaky_relu(y, 0.2), block + "conv2.1")
            x = self.shortcut(F.interpolate(x, scale_factor=2), block) + y
        # Theirs: fake, unknown, classes; ours: classes, unknown, fake.
        return self.conv(x, "layer_up_last", padding=0)[:, [*range(2, C + 2), 1, 0]]


@pytest.fixture
def networks(monkeypatch):
    """Generator and discriminator in float64, each with its reference; random weights, as after some training."""
    monkeypatch.setattr(oasis, "SPADE_HIDDEN", 8)
    ours = [oasis.OASISGenerator(C, WIDTH, Z).double(), oasis.OASISDiscriminator(C, WIDTH).double()]
    pairs = []
    for network in ours:
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and not name.endswith((".u", ".v")):
                value.normal_(std=(value[0].numel() if value.ndim > 1 else len(value)) ** -0.5)
        for module in [module for module in network.modules() if isinstance(module, oasis.SpectralConv2d)] * 3:
            module.normalized_weight()  # u and v have begun to converge
        reference = Reference({oasis.official_name(name): value for name, value in network.state_dict().items()})
        oasis.load_official(network, reference.state)  # which puts the label channels into our order
        pairs.append((network, reference))
    return pairs


def label_maps(seed: int = 1) -> torch.Tensor:
    """Two label maps in which every neighborhood is another; half of the first is one region."""
    label_map = torch.randint(C + 1, (2, HEIGHT, LENGTH), generator=torch.Generator().manual_seed(seed))
    label_map[0, 20:, 13:90] = 3
    return label_map


@torch.no_grad()
def test_drawing_equals_the_one_hot_reference(networks):
    """With noise that is one for the image, or another in a region."""
    (generator, plain_generator), (discriminator, plain_discriminator) = networks
    torch.nn.ModuleList([generator, discriminator]).eval()
    plain_generator.training = plain_discriminator.training = False
    label_map, z = label_maps(), torch.randn(4, Z, dtype=torch.float64)
    image_ids = torch.arange(2)[:, None, None].expand_as(label_map)
    for arguments, noise_ids in [((z[:2],), image_ids), ((z[:2], z[2:], label_map == 3), image_ids + 2 * (label_map == 3))]:
        expected = plain_generator.generate(label_map, z[noise_ids].permute(0, 3, 1, 2))
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.testing.assert_close(generator.to(memory_format=layout)(label_map, *arguments), expected)
    logits = plain_discriminator.discriminate(expected)
    torch.testing.assert_close(discriminator(expected), logits)
    assert expected.shape == (2, 3, HEIGHT, LENGTH) and expected.std() > 0.05 and logits.std() > 0.05


def test_training_equals_the_reference(networks):
    """Batch statistics, a power iteration at each forward, and every gradient."""
    ours, plain = zip(*networks)
    for reference in plain:
        for name, value in reference.state.items():
            value.requires_grad_(name.endswith(("weight", "bias", "orig")))
    label_map, z = label_maps(), torch.randn(2, Z, dtype=torch.float64)
    logits = ours[1](ours[0](label_map, z))
    expected = plain[1].discriminate(plain[0].generate(label_map, z[:, :, None, None].expand(-1, -1, HEIGHT, LENGTH)))
    torch.testing.assert_close(logits, expected)
    logits.square().mean().backward()
    expected.square().mean().backward()
    for network, reference in zip(ours, plain):
        for name, parameter in network.named_parameters():
            gradient = oasis._in_our_order(name, reference.state[oasis.official_name(name)].grad, network)
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-9, rtol=1e-5)
        for name, value in network.named_buffers():
            if name.endswith((".u", ".v")):
                torch.testing.assert_close(value, reference.state[oasis.official_name(name)])


def test_first_weights_are_xavier_normal_of_the_gain():
    for network in (oasis.OASISGenerator(C, 8, Z, gain=0.5), oasis.OASISDiscriminator(C, 8, gain=0.5)):
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                assert not parameter.any()
            elif parameter.numel() > 9000:  # 4 standard deviations of the estimate are below 3%
                fans = sum(parameter.shape[:2]) * parameter[0, 0].numel()
                assert parameter.std().item() == pytest.approx(0.5 * (2 / fans) ** 0.5, rel=0.03), name


def test_labelmix_masks_draw_each_class_on_its_own():
    label_map = label_maps()
    masks = [losses.labelmix_mask(label_map, C, torch.Generator().manual_seed(seed)) for seed in range(200)]
    shares = torch.tensor([[mask[:, 0][label_map == c].float().mean() for c in range(C + 1)] for mask in masks])
    assert set(shares.flatten().tolist()) == {0.0, 1.0}  # one value for all pixels of a class, in both images
    assert (shares.mean(0) - 0.5).abs().max() < 0.15
    assert (torch.corrcoef(shares.T) - torch.eye(C + 1)).abs().max() < 0.3  # classes 0 and 1 are independent


def test_refresh_measures_the_mean_over_batches(networks):
    network, seen = networks[0][0], []
    vectors = {name: value.clone() for name, value in network.named_buffers() if name.endswith((".u", ".v"))}
    norm = network.blocks[2].norm_1.norm
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    refresh_batch_norm(network, [(label_maps(seed), torch.randn(2, Z).double()) for seed in range(3)])
    torch.testing.assert_close(norm.running_mean, sum(x.mean((0, 2, 3)) for x in seen) / 3)
    torch.testing.assert_close(norm.running_var, sum(x.var((0, 2, 3)) for x in seen) / 3)
    assert len(seen) == 3 and not network.training
    assert all(torch.equal(network.get_buffer(name), value) for name, value in vectors.items())
