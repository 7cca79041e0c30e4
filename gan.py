"""One training step of a generator against a discriminator, and the state that goes with it.

The step does no work twice: each fake batch passes generator, backbone and discriminator once, and its logits serve
both losses; each real batch passes the backbone once and serves discriminator and contrastive loss.
"""

import copy

import numpy as np
import torch
import torch.nn as nn
import torch.nn.utils.parametrize as parametrize

import losses
from backbones import Backbone
from config import network_arguments, network_classes
from distributed import all_reduce


def build_network(kind: str, config: dict, num_classes: int, **extra) -> nn.Module:
    """The generator or discriminator that a config names. `extra` holds arguments that not every class takes."""
    cls = network_classes(kind)[config[kind]["name"]]
    arguments = {key: value for key, value in config[kind].items() if key in network_arguments(cls)}
    wanted = cls.__init__.__code__.co_varnames
    return cls(num_classes, **arguments, **{key: value for key, value in extra.items() if key in wanted})


def noise(keys: list[tuple[int, ...]], z_dim: int, device) -> torch.Tensor:
    """Standard normal noise (len(keys), z_dim); each row depends on its key of non-negative integers alone."""
    rows = [np.random.default_rng(key).standard_normal(z_dim, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows)).to(device)


class GAN:
    """Networks, losses and optimisers of one training run.

    Args:
        config: a checked configuration.
        num_classes: C.
        device: where to train; bf16 autocast is on where it is a GPU.
    """

    def __init__(self, config: dict, num_classes: int, device: torch.device):
        self.config, self.num_classes, self.device = config, num_classes, device
        loss, train, backbone = config["loss"], config["train"], config["backbone"]
        torch.manual_seed(config["seed"])
        place = lambda network: network.to(device, memory_format=torch.channels_last)
        self.backbone = place(Backbone(backbone["name"], backbone["pretrained"], backbone["weights"],
                                       backbone["conditioning"], backbone["input_scale"]))
        self.generator = place(build_network("generator", config, num_classes))
        self.discriminator = place(build_network("discriminator", config, num_classes,
                                                 feature_channels=self.backbone.channels))
        strides = [s / backbone["input_scale"] for s in self.backbone.strides]
        usable = [i for i, s in enumerate(strides) if min(config["data"]["size"]) / s >= 4]
        self.contrast_scales = usable[-loss["contrastive_scales"]:]
        self.contrast = losses.PatchContrast([self.backbone.channels[i] for i in self.contrast_scales],
                                             loss["contrastive_patches"], loss["contrastive_temperature"]).to(device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.margins = torch.ones(3, device=device)
        self.g_parameters = [*self.generator.parameters(),
                             *(self.contrast.parameters() if loss["contrastive"] else [])]
        self.d_parameters = list(self.discriminator.parameters())
        adam = lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, betas=tuple(train["betas"]),
                                                       fused=device.type == "cuda")
        self.g_optimizer = adam(self.g_parameters, train["lr_generator"])
        self.d_optimizer = adam(self.d_parameters, train["lr_discriminator"])

    def calibrate(self, images: list[torch.Tensor]) -> None:
        """Measure, on batches of real images (B, 3, H, W) in [-1, 1], the backbone's statistics and the diversity margins."""
        self.backbone.calibrate(images)
        distances = [losses.diversity_distances(x, x.roll(1, 0), torch.ones_like(x[:, :1])) for x in images]
        shares = torch.tensor(self.config["loss"]["diversity_margin"], device=self.device)
        self.margins = shares * torch.cat(distances).mean(0)

    def step(self, image: torch.Tensor, label_map: torch.Tensor, step: int, samples: list[int]) -> dict[str, torch.Tensor]:
        """Update both networks once.

        Args:
            image: (B, 3, H, W) uint8, this process's share of the batch.
            label_map: (B, H, W) uint8 in 0..C.
            step: counts from 0. samples: B numbers, the places of these images in the whole batch.

        Returns:
            Each loss as a scalar tensor on the device, of this process alone.
        """
        loss, train = self.config["loss"], self.config["train"]
        counts = torch.bincount(label_map.flatten().int(), minlength=self.num_classes + 1).double()
        all_reduce([counts], average=False)
        if not loss["class_balancing"]:
            counts = torch.cat([torch.ones_like(counts[:-1]), counts[-1:] * 0])
        weights = losses.class_weights(counts)
        self.g_optimizer.zero_grad()
        self.d_optimizer.zero_grad()
        totals = {}
        rounds = train["accumulation"]
        for part in range(rounds):
            self.discriminator.train(part == 0)  # its spectral norms move once a step, however many rounds
            chosen = slice(part * len(image) // rounds, (part + 1) * len(image) // rounds)
            real = image[chosen].to(memory_format=torch.channels_last).float() / 127.5 - 1
            for name, value in self._round(real, label_map[chosen].long(), weights, step, samples[chosen]).items():
                totals[name] = totals.get(name, 0) + value.detach() / rounds
        for parameters, optimizer in ((self.g_parameters, self.g_optimizer), (self.d_parameters, self.d_optimizer)):
            gradients = [p.grad for p in parameters]
            all_reduce(gradients, average=True)
            torch._foreach_div_(gradients, rounds)
            optimizer.step()
        with torch.no_grad():
            decay = min(train["ema"], (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1 - decay)
        return totals

    def _round(self, real, label_map, weights, step, samples) -> dict[str, torch.Tensor]:
        loss, seed = self.config["loss"], self.config["seed"]
        diverse = bool(loss["diversity"]) and step % loss["diversity_every"] == 0
        z = noise([(seed, step, s, 0) for s in samples], self.generator.z_dim, self.device)
        with (torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
              parametrize.cached()):  # fake and real images see the same normalised weights
            if diverse:
                z2 = noise([(seed, step, s, 1) for s in samples], self.generator.z_dim, self.device)
                region = self._regions(label_map, step, samples)
                fake, fake2 = self.generator(label_map, z.repeat(2, 1), torch.cat([z, z2]), region.repeat(2, 1, 1)).chunk(2)
            else:
                fake = self.generator(label_map, z)
            fake_features = self.backbone(fake)
            fake_logits = self.discriminator(fake, fake_features)
            with torch.no_grad():
                real_features = self.backbone(real)
            real_logits = self.discriminator(real, real_features)

            values = {"g_pixel": losses.focal_loss(fake_logits, label_map, weights, loss["focal_gamma"])}
            total = values["g_pixel"]
            if loss["contrastive"]:
                draw = torch.Generator().manual_seed(hash((seed, step)) % 2 ** 63)
                values["g_contrastive"] = self.contrast(*([f[i] for i in self.contrast_scales] for f in
                                                          (fake_features, real_features)), draw)
                total = total + loss["contrastive"] * values["g_contrastive"]
            if loss["perceptual"]:
                values["g_perceptual"] = losses.perceptual_loss(fake_features, real_features)
                total = total + loss["perceptual"] * values["g_perceptual"]
            if diverse:
                values["g_diversity"] = losses.diversity_loss(fake, fake2, region, self.margins)
                values["g_locality"] = losses.locality_loss(fake, fake2, region)
                total = total + loss["diversity"] * values["g_diversity"] + loss["locality"] * values["g_locality"]
            values["d_real"] = losses.focal_loss(real_logits, label_map, weights, loss["focal_gamma"])
            values["d_fake"] = losses.fake_loss(fake_logits, loss["focal_gamma"])
        total.backward(inputs=self.g_parameters, retain_graph=True)
        (values["d_real"] + values["d_fake"]).backward(inputs=self.d_parameters)
        return values

    def _regions(self, label_map: torch.Tensor, step: int, samples: list[int]) -> torch.Tensor:
        """Where the second noise holds, (B, H, W) bool: in random classes in a share of the images, everywhere in the rest."""
        keep = []
        for s in samples:
            rng = np.random.default_rng((self.config["seed"], step, s, 2))
            regional = rng.random() < self.config["loss"]["diversity_regional"]
            keep.append((rng.random(self.num_classes + 1) < 0.5) | (not regional))
        keep = torch.from_numpy(np.stack(keep)).to(self.device)
        return keep.gather(1, label_map.flatten(1)).view_as(label_map)

    def state_dict(self) -> dict:
        """All that training needs to go on exactly; the frozen backbone is not in it."""
        return {"generator": self.generator.state_dict(), "ema": self.ema.state_dict(),
                "discriminator": self.discriminator.state_dict(), "contrast": self.contrast.state_dict(),
                "g_optimizer": self.g_optimizer.state_dict(), "d_optimizer": self.d_optimizer.state_dict(),
                "statistics": self.backbone.statistics(), "margins": self.margins}

    def load_state_dict(self, state: dict, optimizers: bool = True) -> None:
        """Take over what `state_dict` gave; without the optimisers' state for fine-tuning."""
        for name in ("generator", "ema", "discriminator", "contrast", *(("g_optimizer", "d_optimizer") if optimizers else ())):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, rate in ((self.g_optimizer, "lr_generator"), (self.d_optimizer, "lr_discriminator")):
            for group in optimizer.param_groups:  # a run may go on with other rates than it had
                group["lr"] = self.config["train"][rate]
        self.backbone.load_statistics(state["statistics"])
        self.margins = state["margins"].to(self.device)
