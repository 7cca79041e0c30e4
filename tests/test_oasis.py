"""OASIS against a plain reference: one-hot maps, ordinary convolutions, the official state dict's names."""

import copy

import numpy as np
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

    def __init__(self, state: dict, training: bool):
        self.state, self.training = {name: value.clone() for name, value in state.items()}, training

    def conv(self, x, name, padding=1):
        return F.conv2d(x, self.state[name + ".weight"], self.state[name + ".bias"], padding=padding)

    def spectral_conv(self, x, name, padding=1):
        weight = self.state[name + ".weight_orig"]
        matrix, u, v = weight.flatten(1), self.state[name + ".weight_u"], self.state[name + ".weight_v"]
        if self.training:
            with torch.no_grad():
                v = matrix.T @ u / (matrix.T @ u).norm()
                u = matrix @ v / (matrix @ v).norm()
            self.state.update({name + ".weight_u": u, name + ".weight_v": v})
        return F.conv2d(x, weight / (u @ matrix @ v), self.state.get(name + ".bias"), padding=padding)

    def spade(self, x, seg, name):
        mean, var = self.state[name + ".first_norm.running_mean"], self.state[name + ".first_norm.running_var"]
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
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
            shortcut = x
            if block + "conv_s.weight_orig" in self.state:
                shortcut = self.spectral_conv(self.spade(x, seg, block + "norm_s"), block + "conv_s", padding=0)
            x = self.spectral_conv(F.leaky_relu(self.spade(x, seg, block + "norm_0"), 0.2), block + "conv_0")
            x = self.spectral_conv(F.leaky_relu(self.spade(x, seg, block + "norm_1"), 0.2), block + "conv_1") + shortcut
        return torch.tanh(self.conv(F.leaky_relu(x, 0.2), "conv_img"))

    def discriminate(self, x):
        skips = []
        for i in range(6):
            block = f"body_down.{i}."
            y = self.spectral_conv(F.leaky_relu(x, 0.2) if i else x, block + ("conv1.1" if i else "conv1.0"))
            y = self.spectral_conv(F.leaky_relu(y, 0.2), block + "conv2.1")
            if block + "conv_s.weight_orig" in self.state:
                x = self.spectral_conv(x, block + "conv_s", padding=0)
            skips.append(x := F.avg_pool2d(x + y, 2))
        for i in range(6):
            block = f"body_up.{i}."
            x = torch.cat([skips[5 - i], x], 1) if i else x
            y = self.spectral_conv(F.interpolate(F.leaky_relu(x, 0.2), scale_factor=2), block + "conv1.2")
            y = self.spectral_conv(F.leaky_relu(y, 0.2), block + "conv2.1")
            x = F.interpolate(x, scale_factor=2)
            if block + "conv_s.weight_orig" in self.state:
                x = self.spectral_conv(x, block + "conv_s", padding=0)
            x = x + y
        return self.conv(x, "layer_up_last", padding=0)


def official(network):
    """A state dict with the official names, shapes and channel order, all weights drawn at random."""
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, value in network.state_dict().items():
        name, positive = oasis.official_name(name), name.endswith("running_var")
        if value.dtype == torch.int64:
            state[name] = torch.tensor(7)
        else:
            value = torch.randn(value.shape, generator=draw, dtype=value.dtype)
            value = F.normalize(value, dim=0) if value.ndim == 1 else value / value[0].numel() ** 0.5
            state[name] = value.abs() + 0.5 if positive else value
    for stem in [name.removesuffix("_u") for name in state if name.endswith("weight_u")]:
        matrix = state[stem + "_orig"].flatten(1)
        for _ in range(3):  # as after some training: u and v have begun to converge
            state[stem + "_v"] = F.normalize(matrix.T @ state[stem + "_u"], dim=0)
            state[stem + "_u"] = F.normalize(matrix @ state[stem + "_v"], dim=0)
    return state


@pytest.fixture(scope="module")
def generator():
    network = oasis.OASISGenerator(C, HEIGHT, LENGTH, WIDTH, Z)
    oasis.load_official(network, official(network))
    return network


@pytest.fixture(scope="module")
def discriminator():
    network = oasis.OASISDiscriminator(C, WIDTH)
    oasis.load_official(network, official(network))
    return network


def label_maps(seed: int = 1) -> torch.Tensor:
    """Two label maps in which every neighborhood is another; half of the first is one region."""
    label_map = torch.randint(C + 1, (2, HEIGHT, LENGTH), generator=torch.Generator().manual_seed(seed))
    label_map[0, 20:, 13:90] = 3
    return label_map


def spread(z: torch.Tensor) -> torch.Tensor:
    return z[:, :, None, None].expand(-1, -1, HEIGHT, LENGTH)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_generator_equals_the_one_hot_reference(generator, layout, training):
    network = copy.deepcopy(generator).train(training).to(memory_format=layout)
    label_map, z = label_maps(), torch.randn(2, Z)
    reference = Reference(official(network), training)
    with torch.no_grad():
        expected = reference.generate(label_map, spread(z))
        image = network(label_map, z)
    assert image.shape == (2, 3, HEIGHT, LENGTH) and expected.std() > 0.05
    torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)
    for name, value in network.state_dict().items():
        if name.endswith((".u", ".v")):
            torch.testing.assert_close(value, reference.state[oasis.official_name(name)], atol=1e-5, rtol=0)


def test_local_noise_equals_the_reference_with_a_noise_map(generator):
    network, label_map = copy.deepcopy(generator).eval(), label_maps()
    reference = Reference(official(network), training=False)
    z, z2, region = torch.randn(2, Z), torch.randn(2, Z), label_map == 3
    per_class, images = torch.randn(2 * (C + 1), Z), torch.arange(2)[:, None, None]
    per_pixel, pixels = torch.randn(label_map.numel(), Z), torch.arange(label_map.numel()).view_as(label_map)
    class_ids = images * (C + 1) + label_map
    cases = [((z, z2, region), torch.where(region[:, None], spread(z2), spread(z))),
             ((per_class, None, None, class_ids), per_class[class_ids].permute(0, 3, 1, 2)),
             ((per_pixel, None, None, pixels), per_pixel[pixels].permute(0, 3, 1, 2))]
    with torch.no_grad():
        for arguments, noise in cases:
            expected = reference.generate(label_map, noise)
            torch.testing.assert_close(network(label_map, *arguments), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_discriminator_equals_the_reference(discriminator, training):
    network, images = copy.deepcopy(discriminator).train(training), torch.randn(2, 3, HEIGHT, LENGTH)
    with torch.no_grad():
        expected = Reference(official(network), training).discriminate(images)
        logits = network(images)
    assert logits.shape == (2, C + 2, HEIGHT, LENGTH) and expected.std() > 0.05
    # theirs: fake, unknown, classes; ours: classes, unknown, fake
    torch.testing.assert_close(logits, expected[:, [*range(2, C + 2), 1, 0]], atol=1e-4, rtol=0)


def test_gradients_equal_the_reference(generator, discriminator):
    networks = [copy.deepcopy(network).double() for network in (generator, discriminator)]
    label_map, z = label_maps(), torch.randn(2, Z, dtype=torch.float64)
    networks[1](networks[0](label_map, z)).square().mean().backward()
    references = []
    for network in (generator, discriminator):
        references.append(Reference({name: value.double() for name, value in official(network).items()}, training=True))
        for name, value in references[-1].state.items():
            value.requires_grad_(name.endswith(("weight", "bias", "orig")))
    references[1].discriminate(references[0].generate(label_map, spread(z))).square().mean().backward()
    for network, reference in zip(networks, references):
        for name, parameter in network.named_parameters():
            expected = oasis._in_our_order(name, reference.state[oasis.official_name(name)].grad, network)
            torch.testing.assert_close(parameter.grad, expected, atol=1e-9, rtol=1e-5)


def test_published_sizes(monkeypatch):
    monkeypatch.setattr(oasis, "_initialize", lambda *_: None)
    with torch.device("meta"):
        networks = oasis.OASISGenerator(150, 256, 256), oasis.OASISDiscriminator(150)
    sizes = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks]
    assert [round(size, 1) for size in sizes] == [74.3, 22.3]


def test_first_weights_are_xavier_normal_of_the_gain():
    for gain in (0.02, 0.5):
        for network in (oasis.OASISGenerator(C, 64, 64, 8, Z, gain=gain), oasis.OASISDiscriminator(C, 8, gain=gain)):
            for name, parameter in network.named_parameters():
                if parameter.numel() > 9000:  # 4 standard deviations of the estimate are below 3%
                    out, inside, height, width = parameter.shape
                    expected = gain * (2 / ((out + inside) * height * width)) ** 0.5
                    assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
                elif parameter.ndim == 1:
                    assert not parameter.any()


@pytest.mark.parametrize("build, message", [
    (lambda: oasis.OASISGenerator(C, 64, 90), "64 x 90: OASIS's generator needs multiples of 32"),
    (lambda: oasis.OASISDiscriminator(C, 1)(torch.zeros(1, 3, 64, 96)), "discriminator needs multiples of 64"),
    (lambda: oasis.OASISGenerator(C, 64, 64, channels=0), "channels 0, z_dim 64: make both 1 or more"),
    (lambda: oasis.OASISGenerator(C, 64, 64, z_dim=0), "z_dim 0: make both 1 or more"),
    (lambda: oasis.OASISDiscriminator(C, channels=0), "channels 0: make it 1 or more")])
def test_arguments_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_official_files_that_do_not_fit_are_refused(generator, discriminator):
    state = official(generator)
    without = {name: value for name, value in state.items() if name != "body.3.conv_s.weight_u"}
    other = oasis.OASISGenerator(C + 1, HEIGHT, LENGTH, WIDTH, Z)
    for network, file, message in [(copy.deepcopy(generator), without, r"Missing key.*blocks\.3\.conv_s\.u"),
                                   (copy.deepcopy(generator), state | {"more.weight": torch.zeros(1)}, "Unexpected key.*more"),
                                   (copy.deepcopy(generator), official(discriminator), "Missing key"),
                                   (other, state, "size mismatch for first.weight")]:
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            oasis.load_official(network, file)


def test_cross_entropy_by_its_formula():
    """losses.py with gamma 0 is OASIS's loss, on logits in its discriminator's order."""
    rng = np.random.default_rng(0)
    logits, label_map = rng.normal(size=(2, C + 2, 4, 6)), rng.integers(0, C + 1, (2, 4, 6))
    label_map[label_map == 2] = 1  # one class absent
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    classes = [c for c in range(C) if (label_map == c).any()]
    expected = 0.0
    for b, y, x in np.ndindex(label_map.shape):
        if (c := label_map[b, y, x]) < C:
            weight = label_map.size / (len(classes) * (label_map == c).sum())
            expected -= weight * log_p[b, c, y, x] / label_map.size
    logits, label_map = torch.from_numpy(logits), torch.from_numpy(label_map)
    weights = losses.class_weights(torch.bincount(label_map.flatten(), minlength=C + 1).double())
    assert losses.focal_loss(logits, label_map, weights, 0.0).item() == pytest.approx(expected, rel=1e-6)
    assert losses.fake_loss(logits, 0.0).item() == pytest.approx(-log_p[:, -1].mean(), rel=1e-6)


def test_labelmix():
    label_map = label_maps()
    masks = [losses.labelmix_mask(label_map, C, torch.Generator().manual_seed(seed)) for seed in range(200)]
    shares = torch.tensor([[mask[:, 0][label_map == c].float().mean() for c in range(C + 1)] for mask in masks])
    assert set(shares.flatten().tolist()) == {0.0, 1.0}  # one value for all pixels of a class, in both images
    assert (shares.mean(0) - 0.5).abs().max() < 0.15
    assert np.abs(np.corrcoef(shares.T.numpy()) - np.eye(C + 1)).max() < 0.3  # classes 0 and 1 are independent
    assert torch.equal(masks[0], losses.labelmix_mask(label_map, C, torch.Generator().manual_seed(0)))
    mixed, real, fake = torch.randn(3, 2, C + 2, HEIGHT, LENGTH)
    m = masks[0].numpy()
    expected = ((m * real.numpy() + (1 - m) * fake.numpy() - mixed.numpy()) ** 2).mean()
    assert losses.labelmix_loss(mixed, real, fake, masks[0]).item() == pytest.approx(expected, rel=1e-6)


def test_refresh_measures_the_mean_over_batches(generator):
    network, seen = copy.deepcopy(generator).train(), []
    vectors = {name: value.clone() for name, value in network.state_dict().items() if name.endswith((".u", ".v"))}
    norm = network.blocks[2].norm_1.norm
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    refresh_batch_norm(network, [(label_maps(seed), torch.randn(2, Z)) for seed in range(3)])
    means, variances = zip(*((x.numpy().mean((0, 2, 3)), x.numpy().var((0, 2, 3), ddof=1)) for x in seen))
    np.testing.assert_allclose(norm.running_mean.numpy(), np.mean(means, axis=0), atol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), np.mean(variances, axis=0), rtol=1e-4)
    assert len(seen) == 3 and not network.training and not norm.training and norm.momentum == 0.1
    assert all(torch.equal(value, vectors[name]) for name, value in network.state_dict().items() if name in vectors)


def test_bfloat16_autocast(generator, discriminator):
    label_map, z = label_maps(), torch.randn(2, Z)
    network = copy.deepcopy(generator).eval()
    with torch.no_grad():
        expected = network(label_map, z)
        with torch.autocast("cpu", torch.bfloat16):
            image = network(label_map, z)
            logits = discriminator(image)
    assert (image - expected).abs().mean() < 0.05 and logits.isfinite().all()
