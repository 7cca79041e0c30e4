"""One training step of a generator against a discriminator, and the state that goes with it.

The step does no work twice: each fake batch passes generator, backbone and discriminator once, and its logits serve
both losses; each real batch passes the backbone once and serves discriminator and contrastive loss. With
train.fresh_fakes the discriminator sees a second fake batch, from the updated generator, as OASIS trains.
"""

import copy
from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

import losses
from augment import DRAWS, ROUGH, recolor, roughen, shift
from backbones import Backbone
from config import Settings, UserError
from distributed import all_reduce
from interface import Trainer, noise


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, in the memory format in which it trains fastest there."""
    on_cpu = getattr(network, "cpu_format", torch.channels_last)
    return network.to(device, memory_format=on_cpu if device.type == "cpu" else torch.channels_last)


@torch.no_grad()
def refresh_batch_norm(generator: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Measure the batch-norm statistics, if any, of an averaged generator (moving average of weights) before it is used.

    They become the plain mean over all batches (about 50 are enough) of label maps (B, H, W) and noise (B, z_dim);
    the published OASIS keeps a running mean of momentum 0.1 over 51. It is in eval mode then.
    Processes that share the model must pass the same batches.
    """
    norms = [module for module in generator.modules() if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    if not norms:
        return
    generator.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        norm.train()
    for batch in batches:
        generator(*batch)
    generator.eval()


class GAN(Trainer):
    """Networks, losses and optimisers of one training run.

    Args:
        generator: (label_map, z, z2, region) -> images, see `models.Generator.forward`.
        discriminator: (image, features) -> logits, see `models.Discriminator.forward`.
        backbone: gives the features; None where neither the discriminator nor a loss wants any.
        settings: of the run.
        device: where to train; bf16 autocast is on where it is a GPU.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, backbone: Backbone | None, settings: Settings,
                 device: torch.device):
        self.seed, self.loss, train = settings.seed, settings.loss, settings.train
        self.rounds, self.fresh_fakes, self.decay = train.accumulation, train.fresh_fakes, train.ema
        self.num_classes, self.device = generator.num_classes, device
        self.backbone = backbone and place(backbone, device)
        self.ema = place(copy.deepcopy(generator), device).eval().requires_grad_(False)
        if device.type == "cuda" and dist.is_initialized():  # on CPUs each process normalises by its share of the batch
            generator = nn.SyncBatchNorm.convert_sync_batchnorm(generator)
        self.generator, self.discriminator = place(generator, device), place(discriminator, device)
        if train.compile:
            torch._functorch.config.donated_buffer = False  # two losses go back through one graph
            self.generator.compile()
            self.discriminator.compile()
        strides = [s / settings.backbone.input_scale for s in backbone.strides] if backbone else []
        usable = [i for i, s in enumerate(strides) if min(settings.data.size) / s >= 4]
        self.contrast_scales = usable[-self.loss.contrastive_scales:]
        self.contrast = losses.PatchContrast(
            [backbone.channels[i] for i in self.contrast_scales], self.loss.contrastive_patches,
            self.loss.contrastive_temperature).to(device)
        self.real_distances = self.margins = torch.ones(3, device=device)
        self.g_parameters = [*self.generator.parameters(), *(self.contrast.parameters() if self.loss.contrastive else [])]
        self.d_parameters = list(self.discriminator.parameters())
        adam = lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, betas=train.betas, fused=True)
        self.g_optimizer = adam(self.g_parameters, train.lr_generator)
        self.d_optimizer = adam(self.d_parameters, train.lr_discriminator)
        self.updates = {"generator": (self.g_optimizer, self.g_parameters),
                        "discriminator": (self.d_optimizer, self.d_parameters)}
        self.parts = ("generator", "ema", "discriminator", "contrast", "g_optimizer", "d_optimizer")
        self.rates = {"g_optimizer": ("lr_generator", train.lr_generator),
                      "d_optimizer": ("lr_discriminator", train.lr_discriminator)}

    def calibrate(self, images: list[Tensor]) -> None:
        """Measure the backbone's statistics and the diversity margins on batches of real images (B, 3, H, W) in [-1, 1]."""
        if self.backbone:
            self.backbone.calibrate(images)
        distances = [losses.diversity_distances(x, x.roll(1, 0), torch.ones_like(x[:, :1])) for x in images if len(x) > 1]
        if distances:
            self._set_margins(torch.cat(distances).mean(0))
        elif self.loss.diversity:
            raise UserError("loss.diversity compares samples with what two real images differ in, and there is one image; "
                            "add training pairs, raise data.calibration_images, or set loss.diversity=0")

    def _set_margins(self, real_distances: Tensor) -> None:
        """What the diversity loss asks for, by how far real images are apart (3,)."""
        self.real_distances = real_distances.to(self.device)
        shares = torch.tensor(self.loss.diversity_margin, device=self.device)
        self.margins = (shares * self.real_distances).clamp_min(1e-6)  # where all images are alike

    def refresh(self, label_maps: list[Tensor]) -> None:
        refresh_batch_norm(self.ema, ((m, noise([(i, k) for k in range(len(m))], self.ema.z_dim, self.device))
                                      for i, m in enumerate(label_maps)))

    def step(self, image: Tensor, label_map: Tensor, step: int, samples: list[int]) -> dict[str, Tensor]:
        counts = losses.class_counts(label_map, self.num_classes + 1)
        all_reduce([counts], average=False)
        weights = losses.class_weights(counts, self.loss.class_balancing)
        image = image.to(memory_format=torch.channels_last)
        self.g_optimizer.zero_grad()
        self.d_optimizer.zero_grad()
        totals, networks = {}, ("generator", "discriminator")
        for trained in ([networks[:1], networks[1:]] if self.fresh_fakes else [networks]):
            for part in range(self.rounds):
                self.discriminator.train(part == 0)  # its spectral norms move once a step, however many rounds
                chosen = slice(part * len(image) // self.rounds, (part + 1) * len(image) // self.rounds)
                values = self._round(image[chosen].float() / 127.5 - 1, label_map[chosen].long(), weights, step,
                                     samples[chosen], *(network in trained for network in networks))
                for name, value in values.items():
                    totals[name] = totals.get(name, 0) + value.detach() / self.rounds
            for network in trained:
                self._update(*self.updates[network])
        self.update_ema(self.decay, step)
        return totals

    def _update(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters]
        all_reduce(gradients, average=True)
        torch._foreach_div_(gradients, self.rounds)
        optimizer.step()

    def _features(self, image: Tensor) -> list[Tensor]:
        return self.backbone(image) if self.backbone else []

    def _round(self, real: Tensor, label_map: Tensor, weights: Tensor, step: int, samples: list[int], generator: bool,
               discriminator: bool) -> dict[str, Tensor]:
        """Add to the gradients of the networks that are asked for. Both share one fake batch; the discriminator alone
        gets a fresh one, from a noise of its own. Where diversity is asked for, the fake batch is two samples of every
        other label map; with an odd number of images here that is one more than the real ones, and then the gradient
        of several processes is not quite that of one."""
        loss, gamma, values = self.loss, self.loss.focal_gamma, {}
        draw = lambda stream: noise([(self.seed, step, s, stream) for s in samples], self.generator.z_dim, self.device)
        diverse = generator and bool(loss.diversity) and step % loss.diversity_every == 0
        with (torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
              parametrize.cached()):  # fake and real images see the same normalised weights
            with torch.set_grad_enabled(generator):
                asked = torch.arange(len(real), device=self.device)  # whose label map each fake image has
                given = self._roughened(label_map, step, samples)
                if diverse:
                    asked = asked[::2].repeat(2)
                    z, region = draw(0)[::2], self._regions(given[::2], step, samples[::2])
                    fake = self.generator(given[::2], z.repeat(2, 1), torch.cat([z, draw(1)[::2]]),
                                          region.repeat(2, 1, 1))
                else:
                    fake = self.generator(given, draw(0 if generator else 3))
                shown = fake  # to backbone and discriminator
                if loss.augment:
                    draws = self._draws(step, samples)
                    real, label_map = recolor(shift(real, draws), draws), shift(label_map, draws)
                    shown = recolor(shift(fake.float(), draws[asked]), draws[asked])
                fake_features = self._features(shown)
            fake_logits = self.discriminator(shown, fake_features)
            if discriminator or loss.contrastive or loss.perceptual:
                with torch.no_grad():
                    real_features = self._features(real)

            if generator:
                values["g_pixel"] = losses.focal_loss(fake_logits, label_map[asked], weights, gamma)
                total = values["g_pixel"]
                if loss.contrastive:
                    places = torch.Generator().manual_seed(hash((self.seed, step)) % 2 ** 63)
                    values["g_contrastive"] = self.contrast([fake_features[i] for i in self.contrast_scales],
                                                            [real_features[i][asked] for i in self.contrast_scales], places)
                    total = total + loss.contrastive * values["g_contrastive"]
                if loss.perceptual:
                    values["g_perceptual"] = losses.perceptual_loss(fake_features, [f[asked] for f in real_features])
                    total = total + loss.perceptual * values["g_perceptual"]
                if diverse:
                    fake1, fake2 = fake.chunk(2)
                    values["g_diversity"] = losses.diversity_loss(fake1, fake2, region, self.margins)
                    values["g_locality"] = losses.locality_loss(fake1, fake2, region)
                    total = total + loss.diversity * values["g_diversity"] + loss.locality * values["g_locality"]
            if discriminator:
                real_logits = self.discriminator(real, real_features)
                values["d_real"] = losses.focal_loss(real_logits, label_map, weights, gamma)
                values["d_fake"] = losses.fake_loss(fake_logits, gamma)
                d_total = values["d_real"] + values["d_fake"]
                if loss.labelmix:
                    coins = torch.Generator().manual_seed(hash((self.seed, step, 1)) % 2 ** 63)
                    mask = losses.labelmix_mask(label_map[asked], self.num_classes, coins)
                    mixed = torch.where(mask, real[asked], shown.detach())
                    with torch.no_grad():
                        mixed_features = self._features(mixed)
                    values["d_labelmix"] = losses.labelmix_loss(
                        self.discriminator(mixed, mixed_features).float(), real_logits[asked].float(), fake_logits.float(),
                        mask)
                    d_total = d_total + loss.labelmix * values["d_labelmix"]
        if generator:
            total.backward(inputs=self.g_parameters, retain_graph=discriminator)
        if discriminator:
            d_total.backward(inputs=self.d_parameters)
        return values

    @torch.no_grad()
    def sheet(self, label_map: Tensor, palette: Tensor) -> list[Tensor]:
        """See `Trainer.sheet`: two samples, and under each what the discriminator believes of it: its class map and how
        fake it thinks every pixel is (white: fake)."""
        rows = []
        self.discriminator.eval()  # or looking would move its spectral norms
        for k in range(2):
            fake = self.ema(label_map, noise([(i, k) for i in range(len(label_map))], self.ema.z_dim, self.device))
            p = self.discriminator(fake, [f.float() for f in self._features(fake)]).softmax(1)
            classes = palette[p[:, :self.num_classes].argmax(1)].permute(0, 3, 1, 2).float() / 255
            rows += [fake.float() / 2 + 0.5, classes, p[:, -1:].expand(-1, 3, -1, -1)]
        self.discriminator.train()
        return rows

    def _draws(self, step: int, samples: list[int]) -> Tensor:
        """What the augmentation of each pair follows from, (B, 5)."""
        rows = [np.random.default_rng((self.seed, step, s, 4)).uniform(-1, 1, DRAWS) for s in samples]
        return torch.from_numpy(np.stack(rows)).float().to(self.device, non_blocking=True) * self.loss.augment

    def _roughened(self, label_map: Tensor, step: int, samples: list[int]) -> Tensor:
        """What the generator gets: a share of the label maps (B, H, W) is roughened, each in one of the ways at random."""
        if not self.loss.rough:
            return label_map
        given = []
        for one, s in zip(label_map, samples):
            rng = np.random.default_rng((self.seed, step, s, 5))
            rough = rng.random() < self.loss.rough
            given.append(roughen(one, rng.choice(ROUGH), self.num_classes, int(rng.integers(2 ** 31))) if rough else one)
        return torch.stack(given)

    def _regions(self, label_map: Tensor, step: int, samples: list[int]) -> Tensor:
        """Where the second noise holds, (B, H, W) bool: in random classes in a share of the images, else everywhere."""
        keep = []
        for s in samples:
            rng = np.random.default_rng((self.seed, step, s, 2))
            regional = rng.random() < self.loss.diversity_regional
            keep.append((rng.random(self.num_classes + 1) < rng.random()) | (not regional))
        keep = torch.from_numpy(np.stack(keep)).to(self.device, non_blocking=True)
        return keep.gather(1, label_map.flatten(1)).view_as(label_map)

    def state_dict(self) -> dict:
        """The frozen backbone is not in it, only what was measured of it."""
        return {**super().state_dict(), "real_distances": self.real_distances,
                "statistics": self.backbone.statistics() if self.backbone else {}}

    def load_state_dict(self, state: dict, optimizers: bool = True) -> None:
        shapes = lambda part: {name: value.shape for name, value in part.items()}
        if not optimizers and shapes(state["contrast"]) != shapes(self.contrast.state_dict()):
            state = {**state, "contrast": self.contrast.state_dict()}  # other scales, as of another size: it starts afresh
        super().load_state_dict(state, optimizers)
        if self.backbone:
            self.backbone.load_statistics(state["statistics"])
        if not optimizers:  # other images, whose distances were measured
            return
        distances = state.get("real_distances")
        if distances is None:  # of an earlier version
            distances = state["margins"].cpu() / torch.tensor(state["config"]["loss"]["diversity_margin"]).clamp_min(1e-6)
        self._set_margins(distances)
