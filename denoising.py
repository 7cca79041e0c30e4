"""One training step of a diffusion model, and the state that goes with it. The mathematics is in diffusion.py."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import diffusion
from config import Settings
from distributed import all_reduce
from interface import Trainer


class Diffusion(Trainer):
    """Network, loss and optimiser of one training run.

    The optimiser is Adam, which the official AdamW without weight decay is too.

    Args:
        generator: a denoiser as `diffusion.training_loss` takes it.
        settings: of the run.
        device: where to train; bf16 autocast is on where it is a GPU.
    """

    parts = ("generator", "ema", "optimizer")

    def __init__(self, generator: nn.Module, settings: Settings, device: torch.device):
        train = settings.train
        self.seed, self.sampling, self.rounds, self.decay = settings.seed, settings.diffusion, train.accumulation, train.ema
        self.num_classes, self.device = generator.num_classes, device
        self.generator = generator.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        if train.compile:
            self.generator.compile()
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=train.lr_generator, betas=train.betas, fused=True)
        self.rates = {"optimizer": ("lr_generator", train.lr_generator)}

    def step(self, image: Tensor, label_map: Tensor, step: int, samples: list[int],
             instances: Tensor | None = None) -> dict[str, Tensor]:
        """See `Trainer.step`. Returns {"simple", "vb"}: both terms of the loss."""
        totals = {}
        self.optimizer.zero_grad()
        for part in range(self.rounds):
            chosen = slice(part * len(image) // self.rounds, (part + 1) * len(image) // self.rounds)
            t, dropped, noise = self._draw(step, samples[chosen], image.shape[2:])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                terms = diffusion.training_loss(
                    self.generator, image[chosen].float() / 127.5 - 1, label_map[chosen].long(), t, noise, dropped,
                    None if instances is None else instances[chosen])
            terms = {name: values.mean() / self.rounds for name, values in terms.items()}
            sum(terms.values()).backward()
            totals = {name: totals.get(name, 0) + value.detach() for name, value in terms.items()}
        all_reduce([p.grad for p in self.generator.parameters()], average=True)
        self.optimizer.step()
        self.update_ema(self.decay, step)
        return totals

    def _draw(self, step: int, samples: list[int], size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Time steps (B,), which label maps are withheld (B,) bool, noise (B, 3, H, W)."""
        drawn = []
        for place in samples:
            rng = np.random.default_rng((self.seed, step, place))
            drawn.append((rng.integers(diffusion.TRAIN_STEPS), rng.random() < self.sampling.drop_labels,
                          rng.standard_normal((3, *size), dtype=np.float32)))
        return tuple(torch.from_numpy(np.stack(column)).to(self.device, non_blocking=True) for column in zip(*drawn))

    def sheet(self, label_map: Tensor, palette: Tensor, instances: Tensor | None = None) -> list[Tensor]:
        """See `Trainer.sheet`: two samples, in diffusion.sheet_steps steps."""
        rows, count, given = [], len(label_map), self.sampling
        for k in range(2):
            noise = diffusion.seeded_noise(range(k * count, (k + 1) * count), label_map.shape[1:])
            rows.append(diffusion.sample(self.ema, label_map, noise, given.sheet_steps, given.guidance, given.sampler,
                                         instances) / 2 + 0.5)
        return rows
