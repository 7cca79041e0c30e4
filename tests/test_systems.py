"""The table of systems: one of a stranger's, every generator with every discriminator, OASIS in the scripts."""

import copy
import json
from zlib import crc32

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import TINY, trainer_of
from test_gan import batch

import losses
import oasis
import scenes
import sdm
import systems
from interface import System, Trainer, noise

OASIS = {**TINY, "data": {**TINY["data"], "size": [64, 64]}, "generator": {"name": "oasis", "channels": 2, "z_dim": 8},
         "discriminator": {"name": "oasis", "channels": 2},
         "loss": {"focal_gamma": 0.0, "class_balancing": 1.0, "labelmix": 10.0, "contrastive": 0, "diversity": 0},
         "train": {**TINY["train"], "fresh_fakes": True, "betas": [0.0, 0.999]}}


class Painter(torch.nn.Embedding):
    """Paints each class in a color that it learns."""
    def forward(self, label_map):
        return super().forward(label_map).tanh().permute(0, 3, 1, 2)


class ToyTrainer(Trainer):
    parts = ("generator", "ema", "optimizer")

    def __init__(self, system, device):
        self.num_classes, self.device, rate = system.num_classes, device, system.settings.train.lr_generator
        self.generator, self.ema = system.build(), system.build()
        self.optimizer = torch.optim.Adam(self.generator.parameters(), rate)
        self.rates = {"optimizer": ("lr_generator", rate)}

    def step(self, image, label_map, step, samples):
        loss = F.mse_loss(self.generator(label_map.long()), image.float() / 127.5 - 1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.update_ema(0.5, step)
        return {"l2": loss.detach()}

    def sheet(self, label_map, palette):
        return [self.ema(label_map) / 2 + 0.5]


class Toy(System):
    def build(self):
        return Painter(self.num_classes + 1, 3)

    def trainer(self, device):
        return ToyTrainer(self, device)

    def generate(self, generator, label_map, seeds, k):
        return generator(label_map)


def test_a_fourth_system_is_a_file_and_a_line(train, tiny_config, call, sample, tmp_path, monkeypatch):
    """It trains, resumes, samples and is evaluated by the scripts as they are; its colors come to be the mean colors."""
    monkeypatch.setitem(systems.SYSTEMS, "toy", "test_systems:Toy")
    given = tiny_config, "generator={name: toy}", "discriminator={}", "train.lr_generator=0.2", "train.save_every=0"
    train(*given, "train.steps=10")
    train(*given, "train.steps=40", resume=True)
    label = scenes.render("val", 0, (32, 32))[1]
    [drawn] = sample(label)
    assert all(len(np.unique(drawn[label == c], axis=0)) == 1 for c in np.unique(label))
    with pytest.raises(SystemExit, match="--resample: this model's generator, toy, does not have it; it has none"):
        sample(label, "--resample", "sky")
    call("evaluate.py", "--checkpoint", "runs/tiny/checkpoints/latest.pt")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["color_error"] < 30 and metrics["num_images"] == 4  # noise would be near 64


@pytest.mark.parametrize("changed", [{"generator": TINY["generator"]}, {"discriminator": TINY["discriminator"]}])
def test_each_generator_trains_with_the_discriminator_of_the_other(changed):
    (image, label_map), gan = batch(2, 64), trainer_of({**OASIS, "loss": {"labelmix": 10.0}, **changed})
    gan.calibrate([image.float() / 127.5 - 1])
    before = copy.deepcopy([list(gan.generator.parameters()), list(gan.discriminator.parameters())])
    assert all(torch.isfinite(value) for value in gan.step(image, label_map, 0, [0, 1]).values())
    for old, network in zip(before, (gan.generator, gan.discriminator)):
        assert all(not torch.equal(a, b) for a, b in zip(old, network.parameters()) if b.grad.abs().max() > 0)
    gan.refresh([label_map.long()])
    assert [row.shape for row in gan.sheet(label_map.long(), torch.zeros(13, 3))] == [(2, 3, 64, 64)] * 6


def test_fresh_fakes_is_the_published_step():
    """G's update, then D's on fakes of the new G, as written out here with plain autograd and torch's own cross-entropy."""
    (image, label_map), gan = batch(2, 64), trainer_of(OASIS)
    classes, labels, real = gan.num_classes, label_map.long(), image.float() / 127.5 - 1
    g, d = copy.deepcopy(gan.generator), copy.deepcopy(gan.discriminator)
    g_optimizer = torch.optim.Adam(g.parameters(), lr=4e-4, betas=(0.0, 0.999))
    d_optimizer = torch.optim.Adam(d.parameters(), lr=4e-4, betas=(0.0, 0.999))
    values = gan.step(image, label_map, 0, [0, 1])

    z = [noise([(0, 0, s, stream) for s in (0, 1)], 8, "cpu") for stream in (0, 3)]
    count = torch.bincount(labels.flatten(), minlength=classes + 1)[:classes].float()
    weights = torch.where(count > 0, labels.numel() / (count.clamp(1) * (count > 0).sum()), 0)
    balanced = lambda logits: (F.cross_entropy(logits, labels, F.pad(weights, (0, 2)), reduction="none")).mean()
    g_loss = balanced(d(g(labels, z[0])))
    g_loss.backward()
    g_optimizer.step()
    d_optimizer.zero_grad()
    with torch.no_grad():
        fake = g(labels, z[1])
    fake_logits, real_logits = d(fake), d(real)
    mask = losses.labelmix_mask(labels, classes, torch.Generator().manual_seed(hash((0, 0, 1)) % 2 ** 63))
    mixed = d(mask * real + ~mask * fake)
    consistency = (mixed - (mask * real_logits + ~mask * fake_logits)).square().mean()
    d_fake = F.cross_entropy(fake_logits, torch.full_like(labels, classes + 1))
    (balanced(real_logits) + d_fake + 10 * consistency).backward()
    d_optimizer.step()

    assert torch.isclose(values["g_pixel"], g_loss, rtol=1e-5) and torch.isclose(values["d_fake"], d_fake, rtol=1e-4)
    assert torch.isclose(values["d_labelmix"], consistency, rtol=1e-3)
    for ours, plain in ((gan.generator, g), (gan.discriminator, d)):
        for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
            if b.grad.abs().max() > 1e-6:  # Adam's first step is the sign of the gradient, rounding alone decides below
                close = torch.isclose(a.grad, b.grad, rtol=1e-2, atol=1e-3 * b.grad.abs().max().item())
                assert close.float().mean() > 0.99, name


def test_statistics_are_measured_for_the_average_and_evaluate_py_gives_what_train_py_logged(train, call, tmp_path):
    (tmp_path / "oasis.yaml").write_text(yaml.safe_dump(OASIS))
    train(tmp_path / "oasis.yaml", "train.steps=1")
    ema = torch.load("runs/tiny/checkpoints/latest.pt", weights_only=True)["ema"]
    assert {value.item() for name, value in ema.items() if name.endswith("num_batches_tracked")} == {1}  # 16 label maps
    call("evaluate.py", "--checkpoint", "runs/tiny/checkpoints/latest.pt")
    written, logged = (json.loads((tmp_path / name).read_text()) for name in ("metrics.json", "runs/tiny/metrics.jsonl"))
    assert np.isclose(written["miou"], logged["miou"])


@pytest.mark.parametrize("network, size", [
    (oasis.OASISGenerator, 74.3), (oasis.OASISDiscriminator, 22.3), (sdm.SDMUNet, 660.6)])
def test_networks_have_the_published_size(network, size, monkeypatch):
    monkeypatch.setattr(oasis, "_initialize", lambda *_: None)
    with torch.device("meta"):
        assert round(sum(parameter.numel() for parameter in network(150).parameters()) / 1e6, 1) == size


def test_sample_reads_official_checkpoints(sample, tmp_path):
    """A file like the official best_EMA.pth with random weights."""
    network = oasis.OASISGenerator(12, channels=2, z_dim=8).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    reorder = lambda name, t: torch.cat([t[:, :8], t[:, 8:].roll(1, 1)], 1) if t.ndim == 4 and t.shape[1] == 21 else t
    torch.save({oasis.official_name(name): reorder(name, value) for name, value in network.state_dict().items()},
               tmp_path / "best_EMA.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "oasis.yaml").write_text(yaml.safe_dump(OASIS))
    label = scenes.render("val", 0, (64, 64))[1]
    with pytest.raises(SystemExit, match="best_EMA.pth.* needs --config"):
        sample(label, "--checkpoint", "best_EMA.pth")
    image = sample(label, "--checkpoint", "best_EMA.pth", "--config", "oasis.yaml")[0].astype(int)
    with torch.no_grad():
        expected = network(torch.from_numpy(label)[None].long(), noise([(0, crc32(b"painted"), 0, 0)], 8, "cpu"))[0]
    assert np.abs(image - ((expected + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 0.51
