"""What the scripts ask of a system: how it trains (`Trainer`) and how its generator is built and drawn from (`System`).

A system of your own is a subclass of each in a file of its own, and one line in the table of systems.py.
"""

import copy
import inspect
import typing
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from pydantic import ConfigDict, create_model
from torch import Tensor, nn

from config import Settings, UserError, check_settings
from metrics import to_uint8


def noise(keys: list[tuple[int, ...]], z_dim: int, device: torch.device | str) -> Tensor:
    """Standard normal noise (len(keys), z_dim); each row depends on its key of non-negative integers alone."""
    rows = [np.random.default_rng(key).standard_normal(z_dim, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows)).to(device, non_blocking=True)


def sample_seed(seed: int, index: int) -> int:
    """The seed from which the noise of image `index` follows, whatever its batch or process."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def complete(settings: Settings, section: str, cls: type[nn.Module]) -> Settings:
    """The settings with all that a section may say of a network class: its arguments that have a default.

    Raises UserError: unknown argument (the nearest right one is named) or wrong type.
    """
    given, hints = getattr(settings, section), typing.get_type_hints(cls.__init__)
    fields = {p.name: (hints.get(p.name, typing.Any), p.default) for p in inspect.signature(cls).parameters.values()
              if p.default is not p.empty}
    model = create_model(cls.__name__, __config__=ConfigDict(extra="forbid"), **fields)
    arguments = check_settings(given.arguments, section, model, f"{section}.").model_dump()
    return settings.model_copy(update={section: type(given)(name=given.name, **arguments)})


class Trainer:
    """Networks, losses and optimisers of one training run.

    A subclass sets these attributes in its constructor and writes `step` and `sheet`:
        num_classes: C. device: where it trains.
        generator, ema: the network that learns, and the moving average that is sampled and evaluated. Image sides must
            be multiples of the attribute `divisor` of the generator, and of `discriminator` if there is one; networks
            without that attribute take every size.
        parts: names of the attributes (networks, optimisers) whose state dicts make up a checkpoint. "ema" must be one:
            scripts load no other network.
        rates: name of an optimiser -> (its key in the settings' `train`, its learning rate).
    train.py sets `fine_tuned` where ema started as that of another run (init_from): it keeps its weight then.
    """

    fine_tuned = False

    def step(self, image: Tensor, label_map: Tensor, step: int, samples: list[int], *instances: Tensor) -> dict[str, Tensor]:
        """Update every network once. Nothing is done around it, so it must itself

        - split its images into the settings' `train.accumulation` rounds of forward and backward,
        - average the gradients over the processes, with `distributed.all_reduce`, before an optimiser's step,
        - call `update_ema` at its end.

        Args:
            image: (B, 3, H, W) uint8, this process's share of the batch.
            label_map: (B, H, W) uint8 in 0..C.
            step: counts from 0. samples: B numbers, the places of these images in the whole batch; whatever is drawn
                at random follows from the seed, step and place.
            instances: int32 (B, H, W), where the data set has instance maps.

        Returns:
            Each loss as a scalar tensor on the device, of this process alone.
        """
        raise NotImplementedError

    def calibrate(self, images: list[Tensor]) -> None:
        """Before the first step: measure what is needed on batches of real images (B, 3, H, W) in [-1, 1]."""

    def refresh(self, label_maps: list[Tensor]) -> None:
        """Before `ema` is used: measure what it needs, such as batch-norm statistics, on label maps (B, H, W)."""

    def sheet(self, label_map: Tensor, palette: Tensor, *instances: Tensor) -> list[Tensor]:
        """Rows of a sample sheet for label maps (B, H, W), each (B, 3, H, W) in [0, 1]; palette (C + 1, 3) uint8."""
        raise NotImplementedError

    @torch.no_grad()
    def update_ema(self, decay: float, step: int) -> None:
        """ema <- d ema + (1 - d) generator; d is the decay, or (1 + step) / (10 + step) if that is less, as the first
        weights of a run are worth little."""
        tensors = [[t for t in network.state_dict().values() if t.is_floating_point()]
                   for network in (self.ema, self.generator)]
        torch._foreach_lerp_(*tensors, 1 - (decay if self.fine_tuned else min(decay, (1 + step) / (10 + step))))

    def state_dict(self) -> dict:
        """All that training needs to go on exactly."""
        return {name: getattr(self, name).state_dict() for name in self.parts}

    def load_state_dict(self, state: dict, optimizers: bool = True) -> None:
        """Take over what `state_dict` gave; without the optimisers' state for fine-tuning.

        Raises KeyError, RuntimeError or ValueError where the networks are others.
        """
        for name in self.parts:
            if optimizers or name not in self.rates:
                getattr(self, name).load_state_dict(state[name])
        for optimizer in (getattr(self, name) for name in self.rates):
            for group in optimizer.param_groups:  # a run may go on with other rates and betas than it had
                group.update(optimizer.defaults)


class System:
    """A kind of generator, with how it is trained and drawn from.

    Attributes:
        settings: of the run. num_classes: C.
        options: the options of sample.py that it has, beside those that every system has.
        changes: those of them that change a setting of the same name -> the section of that setting.
    """

    options: frozenset[str] = frozenset()
    changes: dict[str, str] = {}

    def __init__(self, settings: Settings, num_classes: int):
        self.settings, self.num_classes = settings, num_classes

    def build(self) -> nn.Module:
        """The generator with fresh weights. Raises UserError for arguments that its class does not take."""
        raise NotImplementedError

    def trainer(self, device: torch.device) -> Trainer:
        """What trains a generator as the settings say; the seed decides its first weights. Raises UserError."""
        raise NotImplementedError

    def generate(self, generator: nn.Module, label_map: Tensor, seeds: list[int], k: int, *instances: Tensor,
                 preview: Callable[[Tensor], None] | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of label maps (B, H, W): sample k of each. Noise follows from seeds[i] and k.

        preview: called on the way with what the images look like so far, by systems that take many steps.
        """
        raise NotImplementedError

    def sampler(self, generator: nn.Module) -> Callable[..., Tensor]:
        """`generate` as `evaluation.evaluate_generator` calls it, with images in uint8."""
        @torch.no_grad()
        def sample(label_map: Tensor, seeds: list[int], k: int, *instances: Tensor) -> Tensor:
            return to_uint8(self.generate(generator, label_map, seeds, k, *instances))

        return sample

    def draw(self, generator: nn.Module, maps: list[Tensor], key: tuple[int, int], options: Namespace,
             numbers: Iterable[int] | None = None, preview: Callable[[Tensor], None] | None = None) -> Iterator[Tensor]:
        """The images of one label map in turn, uint8 (3, H, W), for sample.py and paint.py.

        Args:
            maps: the label map (1, H, W) int64, and its instance map if there is one.
            key: the seed, and a number that stands for the map's name.
            options: those of sample.py. numbers: which of the images that they ask for; all of them by default.
            preview: as in `generate`, with uint8 (3, H, W).
        """
        more = {"preview": lambda images: preview(to_uint8(images)[0])} if preview else {}  # a system may do without
        for k in range(options.num) if numbers is None else numbers:
            yield to_uint8(self.generate(generator, maps[0], [sample_seed(*key)], k, *maps[1:], **more))[0]

    def with_options(self, options: Namespace) -> "System":
        """This system with the settings that options of sample.py change, those that are not None. Raises UserError."""
        given, chosen = self.settings.model_dump(), copy.copy(self)
        for option, section in self.changes.items():
            if (value := getattr(options, option, None)) is not None:
                given[section][option] = value
        chosen.settings = check_settings(given, ", ".join(f"--{option}" for option in self.changes))
        return chosen

    def load_official(self, generator: nn.Module, state: dict[str, Tensor]) -> None:
        """Load the published code's state dict. Raises RuntimeError where it does not fit, UserError where there is none."""
        raise UserError(f"checkpoints of {self.settings.generator.name} carry their configuration; leave --config out, or "
                        f"name that of an official checkpoint")

    def cost(self, measure: Callable[[Callable], float], generator: nn.Module, label_map: Tensor) -> float:
        """What images of label maps (B, H, W) cost, in what `measure(call)` measures of a call."""
        return measure(lambda: self.generate(generator, label_map, list(range(len(label_map))), 0))

    def protocol(self) -> dict:
        """What the result of an evaluation must say of how the images were made."""
        return {}
