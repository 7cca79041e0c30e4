"""The mathematics of Gaussian diffusion as SDM uses it: linear schedule, hybrid loss with learned variance, samplers.

Steps are numbered t = 0..999 as in the official code: alpha_bar[t] is what is left of the image's variance after t + 1
noisings. Equations (n) are those of Nichol and Dhariwal, 2021 (arXiv 2102.09672), unless another paper is named.

A network `unet` is called as unet(noisy, t, label_map, instances, dropped), like sdm.py's. Its output is
(B, 6, H, W): the noise estimate eps, then v, which places the log variance of a reverse step between its lower
(v = -1) and upper (v = 1) bound. For `sample` it also has the method encode_labels(label_map, instances, guided=BOOL),
whose result unet(noisy, t, result) takes in the label map's place; guided, it then gives (2B, 6, H, W): the outputs
with the label map, then those without.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

TRAIN_STEPS = 1000
SAMPLERS = ("ancestral", "ddim")


class Schedule(NamedTuple):
    """Constants of a chain of S steps, index 0 the least noisy; float32 (S,), computed in float64."""

    t: Tensor  # int64: the time step the network was trained with
    signal: Tensor  # sqrt(alpha_bar)
    sigma: Tensor  # sqrt(1 - alpha_bar)
    next_signal: Tensor  # the same two at the next, less noisy step; 1 and 0 at index 0
    next_sigma: Tensor
    mean_image: Tensor  # posterior mean = mean_image * image + mean_noisy * noisy
    mean_noisy: Tensor
    log_variance_min: Tensor  # log of the posterior's variance (at index 0, where that is 0: of index 1)
    log_variance_max: Tensor  # log beta


@lru_cache
def schedule(steps: int = TRAIN_STEPS, device: torch.device | str = "cpu") -> Schedule:
    """The linear schedule over 1000 steps, or over `steps` of them, evenly spaced from 0 to 999 (rounded).

    A shorter chain keeps alpha_bar at its steps and has betas of its own: 1 - alpha_bar[i] / alpha_bar[i - 1].
    Raises ValueError unless 2 <= steps <= 1000.
    """
    if not 2 <= steps <= TRAIN_STEPS:
        raise ValueError(f"steps {steps}: choose 2 to {TRAIN_STEPS}")
    t = np.linspace(0, TRAIN_STEPS - 1, steps).round().astype(np.int64)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, TRAIN_STEPS))[t]
    next_alpha_bar = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / next_alpha_bar
    variance = beta * (1 - next_alpha_bar) / (1 - alpha_bar)
    constants = (
        np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), np.sqrt(next_alpha_bar), np.sqrt(1 - next_alpha_bar),
        beta * np.sqrt(next_alpha_bar) / (1 - alpha_bar),  # equation (11), the image's share
        (1 - next_alpha_bar) * np.sqrt(1 - beta) / (1 - alpha_bar),  # and the noisy image's
        np.log(np.append(variance[1], variance[1:])), np.log(beta),
    )
    return Schedule(torch.from_numpy(t).to(device), *(torch.from_numpy(c).float().to(device) for c in constants))


def predict_image(noisy: Tensor, eps: Tensor, index: int | Tensor, s: Schedule) -> Tensor:
    """The image of which `noisy` is a draw if its noise was eps."""
    return (noisy - s.sigma[index] * eps) / s.signal[index]


def reverse_step(noisy: Tensor, image: Tensor, v: Tensor, index: int | Tensor, s: Schedule) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the next, less noisy image: equations (11) and (15). All (B, 3, H, W)."""
    mean = s.mean_image[index] * image + s.mean_noisy[index] * noisy
    fraction = (v + 1) / 2
    return mean, fraction * s.log_variance_max[index] + (1 - fraction) * s.log_variance_min[index]


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, element by element."""
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def pixel_nll(image: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the Gaussian's mass on the pixel's 8-bit bin, in nats (Ho et al., 2020, equation (13)).

    image in [-1, 1], bins of width 2/255, the outermost reaching to infinity. The normal distribution function is
    approximated by a tanh, as in the code of that paper and its successors: their losses are to be compared with ours.
    """
    def mass_below(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    deviation = (0.5 * log_variance).exp()
    below_upper = mass_below((image - mean + 1 / 255) / deviation)
    below_lower = mass_below((image - mean - 1 / 255) / deviation)
    inside = torch.where(image < -0.999, below_upper,
                         torch.where(image > 0.999, 1 - below_lower, below_upper - below_lower))
    return -inside.clamp(min=1e-12).log()


def training_loss(unet: nn.Module, image: Tensor, label_map: Tensor, t: Tensor, noise: Tensor,
                  dropped: Tensor | None = None, instances: Tensor | None = None) -> dict[str, Tensor]:
    """The hybrid loss of equation (16): simple + vb, with weight 1 for vb, the term of one step in bits a value.

      simple = mean |noise - eps|^2
      vb     = mean KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) / ln 2, at t = 0 the pixels' NLL / ln 2

    vb trains only the variance: no gradient flows from it into eps. t is drawn uniformly from 0..999.
    image: (B, 3, H, W) in [-1, 1]. label_map: int64 (B, H, W) in 0..C. t: int64 (B,). noise: (B, 3, H, W), standard
    normal. dropped: bool (B,), True where the label map is withheld (20% in SDM's fine-tuning). instances: integer
    (B, H, W), instance ids where the network takes them.
    Returns {"simple": (B,), "vb": (B,)}; the loss of a batch is the mean of their sum.
    """
    s, index = schedule(device=image.device), t[:, None, None, None]
    noisy = s.signal[index] * image + s.sigma[index] * noise  # equation (8)
    eps, v = unet(noisy, t, label_map, instances, dropped).float().chunk(2, dim=1)

    true_mean = s.mean_image[index] * image + s.mean_noisy[index] * noisy
    mean, log_variance = reverse_step(noisy, predict_image(noisy, eps.detach(), index, s), v, index, s)
    kl = gaussian_kl(true_mean, s.log_variance_min[index], mean, log_variance)
    bits = torch.where(index == 0, pixel_nll(image, mean, log_variance), kl) / math.log(2)
    return {"simple": (noise - eps).square().mean(dim=(1, 2, 3)), "vb": bits.mean(dim=(1, 2, 3))}


def ancestral_step(noisy: Tensor, output: Tensor, index: int, noise: Tensor, s: Schedule) -> Tensor:
    """A draw of the next, less noisy image. output: (B, 6, H, W). At index 0 no noise is added."""
    eps, v = output.float().chunk(2, dim=1)
    image = predict_image(noisy, eps, index, s).clamp(-1, 1)
    mean, log_variance = reverse_step(noisy, image, v, index, s)
    return mean + (0.5 * log_variance).exp() * noise if index > 0 else mean


def ddim_step(noisy: Tensor, output: Tensor, index: int, s: Schedule) -> Tensor:
    """The deterministic next image (Song et al., 2021, equation (12) with sigma = 0).

    The noise is taken again from the clipped image, so that image and noise still add up to `noisy`.
    """
    image = predict_image(noisy, output[:, :3].float(), index, s).clamp(-1, 1)
    eps = (noisy - s.signal[index] * image) / s.sigma[index]
    return s.next_signal[index] * image + s.next_sigma[index] * eps


def seeded_noise(seeds: Sequence[int], size: Sequence[int]) -> Iterator[Tensor]:
    """Endless standard normal noise (B, 3, H, W); image i's comes from seeds[i] alone, whatever the device or batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(3, *size, generator=generator) for generator in generators])


@torch.no_grad()
def sample(unet: nn.Module, label_map: Tensor, noise: Iterator[Tensor], steps: int = TRAIN_STEPS, guidance: float = 1.5,
           sampler: str = "ancestral", instances: Tensor | None = None, progress: bool = False,
           preview: Callable[[Tensor], None] | None = None) -> Tensor:
    """Images of a label map, on the label map's device.

    label_map: int64 (B, H, W) in 0..C. noise: gives (B, 3, H, W) at a time, such as `seeded_noise(seeds, (H, W))`.
    steps: 2..1000. guidance: 1 is the conditional model, 0 the unconditional, 1.5 published; other than 1 wants a
    network trained with dropped label maps. sampler: "ancestral" (a draw each step, the learned variance; the official
    chain at 1000 steps) or "ddim" (the first noise decides the image). instances: integer (B, H, W), instance ids where
    the network takes them. progress: show a bar. preview: called at each step with the image
    (B, 3, H, W) in [-1, 1] that the noisy one is taken for.
    On a GPU the network runs in bf16. Returns (B, 3, H, W) in [-1, 1]. Raises ValueError on steps or sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    s = schedule(steps, label_map.device)
    half = torch.autocast(label_map.device.type, torch.bfloat16, enabled=label_map.device.type == "cuda")
    with half:
        features = unet.encode_labels(label_map, instances, guided=guidance != 1)
    x = next(noise).to(label_map.device, non_blocking=True)
    for index in tqdm(range(steps - 1, -1, -1), desc="sampling", unit="step", leave=False, disable=not progress):
        with half:
            output = unet(x, s.t[index].expand(len(x)), features)
        if guidance != 1:  # eps_uncond + guidance * (eps_cond - eps_uncond), v of the conditional pass
            output, unconditional = output.chunk(2)
            output = torch.cat([torch.lerp(unconditional[:, :3], output[:, :3], guidance), output[:, 3:]], dim=1)
        if preview is not None:
            preview(predict_image(x, output[:, :3].float(), index, s).clamp(-1, 1))
        if sampler == "ddim":
            x = ddim_step(x, output, index, s)
        else:
            x = ancestral_step(x, output, index, next(noise).to(x.device, non_blocking=True), s)
    return x
