"""DP-SIMS, OASIS and SDM behind the interface of interface.py, and the table that names them.

Here settings become networks; nothing else in the project asks which system it holds.
"""

import inspect
import pkgutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

import diffusion
from backbones import Backbone
from config import Settings, UserError
from denoising import Diffusion
from gan import GAN
from interface import System, Trainer, complete, noise, sample_seed
from metrics import to_uint8
from models import Discriminator, Generator
from oasis import OASISDiscriminator, OASISGenerator, load_official
from sdm import SDMUNet

# generator.name -> "module:class". A system of your own is one new file, and one line here.
SYSTEMS = {
    "dp_sims": "systems:DPSIMS",
    "oasis": "systems:OASIS",
    "sdm": "systems:SDM",
}
DISCRIMINATORS = {"backbone": Discriminator, "oasis": OASISDiscriminator}
TRUNCATIONS = 0.5, 0.7, 1.0, 1.3, 1.7, 2.2  # factors of the noise that the painting page offers, beside the model's
WALK = 21  # pictures from one noise to another on that page


def system_for(settings: Settings, num_classes: int) -> System:
    """The system that `settings.generator.name` names. Raises UserError for settings that it cannot have."""
    system = pkgutil.resolve_name(named(SYSTEMS, settings, "generator"))(settings, num_classes)
    if settings.eval.truncation != 1 and "truncation" not in system.options:
        raise UserError(f"eval.truncation is {settings.eval.truncation}; {settings.generator.name} has no noise to "
                        f"multiply, set it to 1")
    if settings.data.instances and "instances" not in system.options:
        raise UserError("data.instances is true; only sdm with generator.instance_edges=true uses instance maps")
    return system


def named(table: dict, settings: Settings, section: str):
    """The entry of a table that a section's name stands for. Raises UserError."""
    name = getattr(settings, section).name
    if name not in table:
        raise UserError(f"{section}.name is {name!r}; there are {', '.join(table)}")
    return table[name]


class Adversarial(System):
    """A generator(label_map, z, z2, region) with one noise vector an image, trained against a discriminator.

    z2 is the noise where `region` is True, see `models.Generator.forward`.
    """

    options = frozenset({"resample", "interpolate", "truncation"})
    changes = {"truncation": "eval"}
    generator_class: type[nn.Module]

    def __init__(self, settings: Settings, num_classes: int):
        discriminator = named(DISCRIMINATORS, settings, "discriminator")
        super().__init__(complete(complete(settings, "generator", self.generator_class), "discriminator", discriminator),
                         num_classes)

    def build(self) -> nn.Module:
        return self.generator_class(self.num_classes, **self.settings.generator.arguments)

    def trainer(self, device: torch.device) -> Trainer:
        settings = self.settings
        torch.manual_seed(settings.seed)
        backbone, discriminator_class = None, DISCRIMINATORS[settings.discriminator.name]
        wants_features = "feature_channels" in inspect.signature(discriminator_class).parameters
        if wants_features or settings.loss.contrastive or settings.loss.perceptual:
            backbone = Backbone(**settings.backbone.model_dump(), bf16=device.type == "cuda")
        generator = self.build()
        needed = [self.num_classes, backbone.channels] if wants_features else [self.num_classes]
        discriminator = discriminator_class(*needed, **settings.discriminator.arguments)
        return GAN(generator, discriminator, backbone, settings, device)

    def generate(self, generator: nn.Module, label_map: Tensor, seeds: list[int], k: int, preview=None) -> Tensor:
        return generator(label_map, self.noise(generator, [(seed, k) for seed in seeds]))

    def draw(self, generator: nn.Module, maps: list[Tensor], key: tuple[int, int], options: Namespace,
             numbers: Iterable[int] | None = None, preview=None) -> Iterator[Tensor]:
        plan, z = self.plan_noise(generator, maps[0], key, options), None
        for given in plan if numbers is None else map(plan.__getitem__, numbers):
            image = to_uint8(generator(maps[0], **given))[0]
            if "region" in given:
                if z is not given["z"]:
                    z = given["z"]
                    kept = to_uint8(generator(maps[0], z=z))[0]
                image = torch.where(given["region"], image, kept)
            yield image

    def plan_noise(self, generator: nn.Module, label_map: Tensor, key: tuple[int, int], options: Namespace) -> list[dict]:
        """The noise arguments of the generator for each image of one label map (1, H, W).

        Sample k has noise (*key, k); interpolation goes on the sphere from sample 0 to sample 1. Resampling a class,
        `options.resample`, keeps sample 0 or each place of the interpolation, and takes the region's noise, which is
        another for each k, from another stream.
        """
        zs = [self.noise(generator, [(*key, k, 0)]) for k in range(2 if options.interpolate else options.num)]
        if options.interpolate:
            angle = torch.acos(torch.cosine_similarity(*zs))
            zs = [(torch.sin((1 - t) * angle) * zs[0] + torch.sin(t * angle) * zs[1]) / torch.sin(angle)
                  for t in torch.linspace(0, 1, options.interpolate, device=angle.device)]
        if options.resample is None:
            return [{"z": z} for z in zs]
        others = [self.noise(generator, [(*key, k, 1)]) for k in range(options.num)]
        return [{"z": z, "z2": z2, "region": label_map == options.resample} for z2 in others
                for z in (zs if options.interpolate else zs[:1])]

    def noise(self, generator: nn.Module, keys: list[tuple[int, ...]]) -> Tensor:
        """A noise vector for each key, (len(keys), z_dim)."""
        return self.settings.eval.truncation * noise(keys, generator.z_dim, next(generator.parameters()).device)


class DPSIMS(Adversarial):
    """Berrada et al., CVPR 2024; networks in models.py."""

    generator_class = Generator


class OASIS(Adversarial):
    """Sushko et al., ICLR 2021; networks in oasis.py."""

    generator_class = OASISGenerator

    def load_official(self, generator: nn.Module, state: dict[str, Tensor]) -> None:
        load_official(generator, state)


class SDM(System):
    """Wang et al., 2022; network in sdm.py, mathematics in diffusion.py."""

    changes = {"steps": "diffusion", "guidance": "diffusion"}

    def __init__(self, settings: Settings, num_classes: int):
        super().__init__(complete(settings, "generator", SDMUNet), num_classes)
        edges = self.settings.generator.arguments["instance_edges"]
        self.options = frozenset({"steps", "guidance", *(["instances"] if edges else [])})

    def build(self) -> nn.Module:
        return SDMUNet(self.num_classes, **self.settings.generator.arguments)

    def trainer(self, device: torch.device) -> Trainer:
        torch.manual_seed(self.settings.seed)
        return Diffusion(self.build(), self.settings, device)

    def generate(self, generator: nn.Module, label_map: Tensor, seeds: list[int], k: int, *instances: Tensor,
                 preview: Callable[[Tensor], None] | None = None) -> Tensor:
        given = self.settings.diffusion
        noises = diffusion.seeded_noise([sample_seed(seed, k) for seed in seeds], label_map.shape[1:])
        alone = not dist.is_initialized() or dist.get_rank() == 0
        return diffusion.sample(generator, label_map, noises, given.steps, given.guidance, given.sampler, *instances,
                                preview=preview, progress=preview is None and alone)

    def load_official(self, generator: nn.Module, state: dict[str, Tensor]) -> None:
        generator.load_official(state)

    def cost(self, measure: Callable[[Callable], float], generator: nn.Module, label_map: Tensor) -> float:
        """Extrapolated: the label encoding and one step, both passes of guidance, are measured; all steps are counted."""
        given, device = self.settings.diffusion, label_map.device
        guided = given.guidance != 1
        noisy = torch.randn(len(label_map), 3, *label_map.shape[1:], device=device)
        t = torch.zeros(len(label_map), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            encoding = measure(lambda: generator.encode_labels(label_map, guided=guided))
            features = generator.encode_labels(label_map, guided=guided)
            return encoding + given.steps * measure(lambda: generator(noisy, t, features))

    def protocol(self) -> dict:
        return {"diffusion": self.settings.diffusion.model_dump(mode="json")}
