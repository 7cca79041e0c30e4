"""The losses of DP-SIMS, each as its equation. Class ids are 0..C-1, void = C; logits have C + 1 channels, C is "fake"."""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


def class_counts(label_map: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Pixels of every id of (B, H, W) maps: float64 (num_ids,). torch.bincount would make the host wait for a GPU."""
    ids = label_map.flatten().long()
    return torch.zeros(num_ids, dtype=torch.float64, device=ids.device).scatter_add_(
        0, ids, torch.ones(1, dtype=torch.float64, device=ids.device).expand(len(ids)))


def class_weights(counts: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """Class weights alpha_c proportional to count_c ** -power, 0 for absent classes, so scaled that all pixels average 1.

    With power 1, alpha_c = (pixels / present classes) / count_c [OASIS]; with 0 all classes weigh the same.

    Args:
        counts: (C + 1,) pixels of every class and, last, void over the whole batch. Void pixels count in the average.

    Returns:
        (C + 1,) float weights; the last, void's, is 0.
    """
    counts = counts.double()
    weights = counts[:-1].clamp_min(1) ** -power * (counts[:-1] > 0)
    weights = weights * counts.sum() / (weights * counts[:-1]).sum().clamp_min(1e-12)
    return F.pad(weights.float(), (0, 1))


def focal_loss(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, gamma: float) -> torch.Tensor:
    """- mean over pixels of alpha_t (1 - p_t)^gamma log p_t, p = softmax(logits) [DP-SIMS]; gamma 0 is cross-entropy.

    Void pixels weigh 0 and count in the mean's denominator, as in OASIS.

    Args:
        logits: (B, C + 1, H, W).
        target: (B, H, W) int64 in 0..C, the class a pixel has or should have; C = void.
        weights: (C + 1,) as `class_weights` gives them.
    """
    log_p = F.log_softmax(logits.float(), dim=1).gather(1, target[:, None]).squeeze(1)
    return -(weights[target] * (1 - log_p.exp()) ** gamma * log_p).mean()


def fake_loss(logits: torch.Tensor, gamma: float) -> torch.Tensor:
    """- mean over all pixels of (1 - p_fake)^gamma log p_fake, p_fake the last channel of softmax(logits) [DP-SIMS]."""
    log_p = F.log_softmax(logits.float(), dim=1)[:, -1]
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


class PatchContrast(nn.Module):
    """Patch contrastive loss (InfoNCE) on backbone features [DP-SIMS, as in CUT].

    A patch of the generated image should match the patch of the real image at the same place, against the other
    patches of that image: - mean_i log( exp(f_i . r_i / T) / sum_j exp(f_i . r_j / T) ), f and r of unit length
    after a two-layer head of each scale's own. Its heads train with the generator.

    Args:
        feature_channels: channels of the scales that are compared.
        num_patches: places an image and scale, drawn without replacement; the same for every image of a batch.
    """

    def __init__(self, feature_channels: list[int], num_patches: int = 64, temperature: float = 0.3, width: int = 128):
        super().__init__()
        self.num_patches, self.temperature = num_patches, temperature
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(c, width), nn.ReLU(), nn.Linear(width, width)) for c in feature_channels)

    def forward(self, fake: list[torch.Tensor], real: list[torch.Tensor], draw: torch.Generator) -> torch.Tensor:
        """Features of fake and real images, (B, C_l, h_l, w_l) a scale; `draw` picks the places."""
        loss = 0
        for head, f, r in zip(self.heads, fake, real):
            places = torch.randperm(f.shape[2] * f.shape[3], generator=draw)[: self.num_patches]
            places = places.to(f.device, non_blocking=True)
            f, r = (F.normalize(head(x.flatten(2)[:, :, places].transpose(1, 2)).float(), dim=-1) for x in (f, r))
            similarity = f @ r.transpose(1, 2) / self.temperature
            target = torch.arange(len(places), device=f.device).expand(len(f), -1)
            loss = loss + F.cross_entropy(similarity.flatten(0, 1), target.flatten())
        return loss / len(self.heads)


def perceptual_loss(fake: list[torch.Tensor], real: list[torch.Tensor]) -> torch.Tensor:
    """Mean L1 distance of two lists of features, (B, C_l, h_l, w_l) a scale, averaged over scales."""
    return sum((f - r).abs().float().mean() for f, r in zip(fake, real)) / len(fake)


def diversity_views(image: torch.Tensor) -> list[torch.Tensor]:
    """What two samples may differ in: coarse brightness, coarse color, detail [ours]; (B, 3, H, W) -> maps of half its size."""
    fine = F.avg_pool2d(image, 2)
    coarse = F.interpolate(F.avg_pool2d(fine, 4, ceil_mode=True), size=fine.shape[2:], mode="bilinear")
    brightness = coarse.mean(1, keepdim=True)
    return [brightness, coarse - brightness, fine - coarse]


def diversity_distances(image1: torch.Tensor, image2: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How far two images differ in each of the `diversity_views`, averaged with `weight` (B, 1, H, W) >= 0 -> (B, 3).

    L1 distance in brightness and color. In detail the L1 distance as a share of what both images have of it, which more
    contrast does not raise: 0 if equal, 0.7 for independent Gaussian textures, 1 if opposite.
    """
    weight = F.avg_pool2d(weight, 2)
    mean = lambda x: (x.abs().mean(1, keepdim=True) * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1e-6)
    views1, views2 = diversity_views(image1), diversity_views(image2)
    brightness, color, detail = (mean(a - b) for a, b in zip(views1, views2))
    return torch.stack([brightness, color, detail / (mean(views1[2]) + mean(views2[2])).clamp_min(1e-3)], dim=1)


def diversity_loss(image1: torch.Tensor, image2: torch.Tensor, region: torch.Tensor,
                   margins: torch.Tensor) -> torch.Tensor:
    """s times the mean over views of max(0, 1 - d / margin), d the mean distance of the s (0..1) of the pairs that have a
    region: two noises must give different images, but no more [DP-SIMS]. A margin for every pair alone would drive
    one-dimensional things, such as brightness, to two extremes.

    Args:
        image1, image2: (B, 3, H, W) in [-1, 1], from one label map and two noises.
        region: (B, H, W) bool, where the noises differ.
        margins: (3,) required mean distance in each of the `diversity_views`.
    """
    counts = region.flatten(1).any(1)[:, None]
    distances = (diversity_distances(image1.float(), image2.float(), region[:, None].float()) * counts).sum(0)
    sums = torch.cat([distances.detach(), counts.sum(0)])
    if dist.is_initialized():  # the batch is that of all processes
        dist.all_reduce(sums)
    short = sums[:3] < sums[3] * margins
    return ((counts.sum() - distances / margins) * short).mean() / len(counts)


def locality_loss(image1: torch.Tensor, image2: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Mean over images of outside / (inside + 0.02): the mean L1 change of the pixels outside and inside the region
    where the noises differ, (B, H, W) bool; no gradient through the latter, and 0 without pixels outside [ours]."""
    change = (image1 - image2).float().abs().mean(1)
    mean_in = lambda mask: (change * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1)
    return (mean_in(~region) / (mean_in(region).detach() + 0.02)).mean()


def labelmix_mask(label_map: torch.Tensor, num_classes: int, draw: torch.Generator) -> torch.Tensor:
    """LabelMix's mask [OASIS]: a fair coin for each class (void too), one for the whole batch; bool (B, 1, H, W), True = real.

    The published code writes coins into the map that it still searches, so that ids 0 and 1 can be drawn twice; here the
    map is only read. `draw` is on the CPU.
    """
    coins = torch.randint(2, (num_classes + 1,), generator=draw).bool().to(label_map.device, non_blocking=True)
    return coins[label_map].unsqueeze(1)


def labelmix_loss(mixed_logits: torch.Tensor, real_logits: torch.Tensor, fake_logits: torch.Tensor,
                  mask: torch.Tensor) -> torch.Tensor:
    """mean of (D(mix(real, fake)) - mix(D(real), D(fake)))^2, mix(a, b) = mask a + (1 - mask) b [OASIS, equation 3].

    Logits (B, K, H, W), mask bool (B, 1, H, W). The gradient flows into all three logits, as published.
    """
    return F.mse_loss(torch.where(mask, real_logits, fake_logits), mixed_logits)
