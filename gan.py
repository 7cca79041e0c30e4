"""One training step of a generator against a discriminator, and the state that goes with it.

The step does no work twice: each fake batch passes generator, backbone and discriminator once, and its logits serve
both losses; each real batch passes the backbone once and serves discriminator and contrastive loss. With
train.fresh_fakes the discriminator sees a second fake batch, from the updated generator, as OASIS trains.
"""

import copy
import inspect

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.utils.parametrize as parametrize

import losses
from backbones import Backbone
from config import network_classes
from distributed import all_reduce
from oasis import OASISDiscriminator, OASISGenerator, labelmix_loss, labelmix_mask, refresh_batch_norm


def build_network(kind: str, config: dict, num_classes: int, **extra) -> nn.Module:
    """The generator or discriminator that a config names. `extra` holds arguments that not every class takes."""
    cls = network_classes(kind)[config[kind]["name"]]
    extra |= dict(zip(("height", "width"), config["data"]["size"]))
    arguments = {**config[kind], **extra}
    return cls(num_classes, **{key: arguments[key] for key in inspect.signature(cls).parameters if key in arguments})


def noise(keys: list[tuple[int, ...]], z_dim: int, device) -> torch.Tensor:
    """Standard normal noise (len(keys), z_dim); each row depends on its key of non-negative integers alone."""
    rows = [np.random.default_rng(key).standard_normal(z_dim, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows)).to(device, non_blocking=True)


def compile_networks(networks: list[nn.Module], device: torch.device) -> None:
    """Have torch.compile speed up the forward and backward passes of networks; says so where it cannot and leaves them."""
    try:
        torch.compile(lambda x: x.square() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a missing C++ compiler or Triton, each with errors of its own
        print(f"train.compile: torch.compile does not work here, going on without it ({str(error).strip().splitlines()[0]})")
        return
    torch._functorch.config.donated_buffer = False  # two losses go back through one graph
    for network in networks:
        network.compile()


class GAN:
    """Networks, losses and optimisers of one training run.

    Args:
        config: a checked configuration.
        num_classes: C.
        device: where to train; bf16 autocast is on where it is a GPU.
    """

    rates = ("lr_generator", "lr_discriminator")  # what in the configuration's `train` sets them

    def __init__(self, config: dict, num_classes: int, device: torch.device):
        self.config, self.num_classes, self.device = config, num_classes, device
        loss, train, backbone = config["loss"], config["train"], config["backbone"]
        torch.manual_seed(config["seed"])
        self.backbone, channels = None, []
        if config["discriminator"]["name"] == "backbone" or loss["contrastive"] or loss["perceptual"]:
            self.backbone = self._place(Backbone(backbone["name"], backbone["pretrained"], backbone["weights"],
                                                 backbone["conditioning"], backbone["input_scale"],
                                                 bf16=device.type == "cuda"))
            channels = self.backbone.channels
        generator = build_network("generator", config, num_classes)
        self.ema = self._place(copy.deepcopy(generator)).eval().requires_grad_(False)
        if device.type == "cuda" and dist.is_initialized():  # on CPUs each process normalises by its share of the batch
            generator = nn.SyncBatchNorm.convert_sync_batchnorm(generator)
        self.generator = self._place(generator)
        self.discriminator = self._place(build_network("discriminator", config, num_classes, feature_channels=channels))
        if train["compile"]:
            compile_networks([self.generator, self.discriminator], device)
        strides = [s / backbone["input_scale"] for s in self.backbone.strides] if self.backbone else []
        usable = [i for i, s in enumerate(strides) if min(config["data"]["size"]) / s >= 4]
        self.contrast_scales = usable[-loss["contrastive_scales"]:]
        self.contrast = losses.PatchContrast([channels[i] for i in self.contrast_scales],
                                             loss["contrastive_patches"], loss["contrastive_temperature"]).to(device)
        self.margins = torch.ones(3, device=device)
        self.g_parameters = [*self.generator.parameters(),
                             *(self.contrast.parameters() if loss["contrastive"] else [])]
        self.d_parameters = list(self.discriminator.parameters())
        adam = lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, betas=tuple(map(float, train["betas"])), fused=True)
        self.g_optimizer = adam(self.g_parameters, train["lr_generator"])
        self.d_optimizer = adam(self.d_parameters, train["lr_discriminator"])

    def _place(self, network: nn.Module) -> nn.Module:
        slow = self.device.type == "cpu" and isinstance(network, (OASISGenerator, OASISDiscriminator))
        return network.to(self.device, memory_format=torch.contiguous_format if slow else torch.channels_last)

    def calibrate(self, images: list[torch.Tensor]) -> None:
        """Measure, on batches of real images (B, 3, H, W) in [-1, 1], the backbone's statistics and the diversity margins."""
        if self.backbone:
            self.backbone.calibrate(images)
        distances = [losses.diversity_distances(x, x.roll(1, 0), torch.ones_like(x[:, :1])) for x in images]
        shares = torch.tensor([float(share) for share in self.config["loss"]["diversity_margin"]], device=self.device)
        self.margins = shares * torch.cat(distances).mean(0)

    def refresh(self, maps: list[torch.Tensor]) -> None:
        """Make `ema` ready for use: measure its batch-norm statistics, if it has any, on label maps (B, H, W)."""
        if isinstance(self.ema, OASISGenerator):
            refresh_batch_norm(self.ema, [(m, noise([(i, k) for k in range(len(m))], self.ema.z_dim, self.device))
                                          for i, m in enumerate(maps)])

    def step(self, image: torch.Tensor, label_map: torch.Tensor, step: int, samples: list[int]) -> dict[str, torch.Tensor]:
        """Update both networks once.

        Args:
            image: (B, 3, H, W) uint8, this process's share of the batch.
            label_map: (B, H, W) uint8 in 0..C.
            step: counts from 0. samples: B numbers, the places of these images in the whole batch.

        Returns:
            Each loss as a scalar tensor on the device, of this process alone.
        """
        loss, rounds = self.config["loss"], self.config["train"]["accumulation"]
        counts = losses.class_counts(label_map, self.num_classes + 1)
        all_reduce([counts], average=False)
        weights = losses.class_weights(counts, loss["class_balancing"])
        image = image.to(memory_format=torch.channels_last)
        self.g_optimizer.zero_grad()
        self.d_optimizer.zero_grad()
        totals = {}

        def accumulate(generator: bool, discriminator: bool) -> None:
            for part in range(rounds):
                self.discriminator.train(part == 0)  # its spectral norms move once a step, however many rounds
                chosen = slice(part * len(image) // rounds, (part + 1) * len(image) // rounds)
                values = self._round(image[chosen].float() / 127.5 - 1, label_map[chosen].long(), weights, step,
                                     samples[chosen], generator, discriminator)
                for name, value in values.items():
                    totals[name] = totals.get(name, 0) + value.detach() / rounds

        if self.config["train"]["fresh_fakes"]:
            accumulate(True, False)
            self._update(self.g_optimizer, self.g_parameters, rounds)
            accumulate(False, True)
            self._update(self.d_optimizer, self.d_parameters, rounds)
        else:
            accumulate(True, True)
            self._update(self.g_optimizer, self.g_parameters, rounds)
            self._update(self.d_optimizer, self.d_parameters, rounds)
        with torch.no_grad():
            decay = min(self.config["train"]["ema"], (1 + step) / (10 + step))
            tensors = [[t for t in network.state_dict().values() if t.is_floating_point()]
                       for network in (self.ema, self.generator)]
            torch._foreach_lerp_(*tensors, 1 - decay)
        return totals

    def _update(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rounds: int) -> None:
        gradients = [p.grad for p in parameters]
        all_reduce(gradients, average=True)
        torch._foreach_div_(gradients, rounds)
        optimizer.step()

    def _features(self, image: torch.Tensor) -> list[torch.Tensor]:
        return self.backbone(image) if self.backbone else []

    def _round(self, real, label_map, weights, step, samples, generator: bool, discriminator: bool) -> dict[str, torch.Tensor]:
        """Add to the gradients of the networks that are asked for. Both share one fake batch; the discriminator alone
        gets a fresh one, from a noise of its own. Where diversity is asked for, the fake batch is two samples of every
        other label map; with an odd number of images here that is one more than the real ones, and then the gradient
        of several processes is not quite that of one."""
        loss, seed = self.config["loss"], self.config["seed"]
        draw = lambda stream: noise([(seed, step, s, stream) for s in samples], self.generator.z_dim, self.device)
        diverse = generator and bool(loss["diversity"]) and step % loss["diversity_every"] == 0
        values = {}
        with (torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
              parametrize.cached()):  # fake and real images see the same normalised weights
            with torch.set_grad_enabled(generator):
                asked = torch.arange(len(real), device=self.device)  # whose label map each fake image has
                if diverse:
                    asked = asked[::2].repeat(2)
                    z, region = draw(0)[::2], self._regions(label_map[::2], step, samples[::2])
                    fake = self.generator(label_map[::2], z.repeat(2, 1), torch.cat([z, draw(1)[::2]]),
                                          region.repeat(2, 1, 1))
                else:
                    fake = self.generator(label_map, draw(0 if generator else 3))
                fake_features = self._features(fake)
            fake_logits = self.discriminator(fake, fake_features)
            if discriminator or loss["contrastive"] or loss["perceptual"]:
                with torch.no_grad():
                    real_features = self._features(real)

            if generator:
                values["g_pixel"] = losses.focal_loss(fake_logits, label_map[asked], weights, loss["focal_gamma"])
                total = values["g_pixel"]
                if loss["contrastive"]:
                    places = torch.Generator().manual_seed(hash((seed, step)) % 2 ** 63)
                    values["g_contrastive"] = self.contrast([fake_features[i] for i in self.contrast_scales],
                                                            [real_features[i][asked] for i in self.contrast_scales], places)
                    total = total + loss["contrastive"] * values["g_contrastive"]
                if loss["perceptual"]:
                    values["g_perceptual"] = losses.perceptual_loss(fake_features, [f[asked] for f in real_features])
                    total = total + loss["perceptual"] * values["g_perceptual"]
                if diverse:
                    fake1, fake2 = fake.chunk(2)
                    values["g_diversity"] = losses.diversity_loss(fake1, fake2, region, self.margins)
                    values["g_locality"] = losses.locality_loss(fake1, fake2, region)
                    total = total + loss["diversity"] * values["g_diversity"] + loss["locality"] * values["g_locality"]
            if discriminator:
                real_logits = self.discriminator(real, real_features)
                values["d_real"] = losses.focal_loss(real_logits, label_map, weights, loss["focal_gamma"])
                values["d_fake"] = losses.fake_loss(fake_logits, loss["focal_gamma"])
                d_total = values["d_real"] + values["d_fake"]
                if loss["labelmix"]:
                    coins = torch.Generator().manual_seed(hash((seed, step, 1)) % 2 ** 63)
                    mask = labelmix_mask(label_map[asked], self.num_classes, coins)
                    mixed = torch.where(mask, real[asked], fake.detach())
                    with torch.no_grad():
                        mixed_features = self._features(mixed)
                    values["d_labelmix"] = labelmix_loss(self.discriminator(mixed, mixed_features).float(),
                                                         real_logits[asked].float(), fake_logits.float(), mask)
                    d_total = d_total + loss["labelmix"] * values["d_labelmix"]
        if generator:
            total.backward(inputs=self.g_parameters, retain_graph=discriminator)
        if discriminator:
            d_total.backward(inputs=self.d_parameters)
        return values

    @torch.no_grad()
    def sheet(self, label_map: torch.Tensor, palette: torch.Tensor) -> list[torch.Tensor]:
        """Rows of a sample sheet for label maps (B, H, W), each (B, 3, H, W) in [0, 1]: two samples, and under each what
        the discriminator believes of it: its class map and how fake it thinks every pixel is (white: fake)."""
        rows = []
        self.discriminator.eval()  # or looking would move its spectral norms
        for k in range(2):
            fake = self.ema(label_map, noise([(i, k) for i in range(len(label_map))], self.ema.z_dim, self.device))
            p = self.discriminator(fake, [f.float() for f in self._features(fake)]).softmax(1)
            classes = palette[p[:, :self.num_classes].argmax(1)].permute(0, 3, 1, 2).float() / 255
            rows += [fake.float() / 2 + 0.5, classes, p[:, -1:].expand(-1, 3, -1, -1)]
        self.discriminator.train()
        return rows

    def _regions(self, label_map: torch.Tensor, step: int, samples: list[int]) -> torch.Tensor:
        """Where the second noise holds, (B, H, W) bool: in random classes in a share of the images, everywhere in the rest."""
        keep = []
        for s in samples:
            rng = np.random.default_rng((self.config["seed"], step, s, 2))
            regional = rng.random() < self.config["loss"]["diversity_regional"]
            keep.append((rng.random(self.num_classes + 1) < rng.random()) | (not regional))
        keep = torch.from_numpy(np.stack(keep)).to(self.device, non_blocking=True)
        return keep.gather(1, label_map.flatten(1)).view_as(label_map)

    def state_dict(self) -> dict:
        """All that training needs to go on exactly; the frozen backbone is not in it."""
        return {"generator": self.generator.state_dict(), "ema": self.ema.state_dict(),
                "discriminator": self.discriminator.state_dict(), "contrast": self.contrast.state_dict(),
                "g_optimizer": self.g_optimizer.state_dict(), "d_optimizer": self.d_optimizer.state_dict(),
                "statistics": self.backbone.statistics() if self.backbone else {}, "margins": self.margins}

    def load_state_dict(self, state: dict, optimizers: bool = True) -> None:
        """Take over what `state_dict` gave; without the optimisers' state for fine-tuning."""
        for name in ("generator", "ema", "discriminator", "contrast", *(("g_optimizer", "d_optimizer") if optimizers else ())):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, rate in ((self.g_optimizer, "lr_generator"), (self.d_optimizer, "lr_discriminator")):
            for group in optimizer.param_groups:  # a run may go on with other rates than it had
                group["lr"] = self.config["train"][rate]
        if self.backbone:
            self.backbone.load_statistics(state["statistics"])
        self.margins = state["margins"].to(self.device)
