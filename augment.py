"""Differentiable augmentation of what a discriminator sees, so that it cannot learn a few hundred images by heart.

Every pair of image and label map is moved and recolored at random, real and generated images alike [Zhao et al.,
"Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020]. What belongs together moves together: a real
image, its label map, and the images generated from that map share one row of `draws`. The generator's own images stay as
they are, so that nothing of it shows in samples.
"""

import torch

DRAWS = 5  # numbers an image: shift down and right, brightness, saturation, contrast
SHIFT = 1 / 8  # the largest shift, as a share of the side


def shift(x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Move pictures (B, ..., H, W) by up to an eighth of each side and repeat the edge; draws (B, 5) in [-1, 1]."""
    for dim, draw in ((-2, draws[:, 0]), (-1, draws[:, 1])):
        side = x.shape[dim]
        source = torch.arange(side, device=x.device) + (draw * SHIFT * side).round().long()[:, None]
        shape = [len(x)] + [1] * (x.ndim - 1)
        shape[dim] = side
        x = x.gather(dim, source.clamp(0, side - 1).view(shape).expand_as(x))
    return x


def recolor(image: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Change brightness by up to 0.5, saturation by a factor of 0 to 2, and contrast by one of 0.5 to 1.5.

    image: (B, 3, H, W), in [-1, 1]; the result may leave that range. draws: (B, 5) in [-1, 1].
    """
    brightness, saturation, contrast = draws[:, 2:, None, None, None].unbind(1)
    gray = image.mean(1, keepdim=True)
    image = gray + (image - gray) * (1 + saturation) + 0.5 * brightness
    mean = image.mean((1, 2, 3), keepdim=True)
    return mean + (image - mean) * (1 + 0.5 * contrast)
