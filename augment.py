"""Changes to images and label maps: the pairs that a discriminator sees, and the label maps that a generator gets.

A discriminator learns a few hundred images by heart; if every pair of image and label map is moved and recolored at random,
real and generated images alike, it cannot [Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training",
NeurIPS 2020]. What belongs together moves together: a real image, its label map, and the images generated from that map share
one row of `draws`. The generator's own images stay as they are, so that nothing of it shows in samples.

People draw without thin parts and exact edges. `roughen` does so to a label map, in training (the discriminator judges by the
true one) or in evaluation; `fill_void` gives void pixels the nearest label.
"""

import torch
from scipy import ndimage

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


ROUGH = ("downsample", "edges", "random")  # the noisy label maps of Ko et al.


def roughen(label_map: torch.Tensor, kind: str, void: int, seed: int) -> torch.Tensor:
    """A label map as a person draws it or a weak segmenter gives it [Ko et al., "Stochastic Conditional Diffusion Models for
    Robust Semantic Image Synthesis", ICML 2024; their figures for 256 x 256 pixels are taken as shares of the height].

    Args:
        label_map: (H, W) int64 in 0..C. void: C.
        kind: "downsample" to a quarter and enlarge again (nearest); "edges" become void, the pixels beside another class and
            those up to H / 128 away from them; a tenth of the pixels at "random" become void, which follows from the seed.

    Raises ValueError for another kind.
    """
    if kind == "downsample":
        rows, columns = ((torch.arange(side, device=label_map.device) // 4 * 4 + 2).clamp_max(side - 1)
                         for side in label_map.shape)
        return label_map[rows][:, columns]
    if kind == "edges":
        diamond = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), 1 + label_map.shape[0] // 128)
        edges = ndimage.morphological_gradient(label_map.cpu().numpy(), footprint=diamond) > 0
        return label_map.masked_fill(torch.from_numpy(edges).to(label_map.device), void)
    if kind == "random":
        draws = torch.rand(label_map.shape, generator=torch.Generator().manual_seed(seed))
        return label_map.masked_fill((draws < 0.1).to(label_map.device), void)
    raise ValueError(f"{kind!r} is no way to roughen a label map; there are {', '.join(ROUGH)}")


def fill_void(label_map: torch.Tensor, void: int) -> torch.Tensor:
    """Give void pixels the label of the nearest pixel that has one; (H, W) or (1, H, W) int64. A map of void alone stays."""
    empty = (label_map == void).cpu().numpy()
    if empty.all():
        return label_map
    nearest = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
    return label_map[tuple(torch.from_numpy(nearest).long().to(label_map.device))]
