"""The formulas of the metrics: Frechet distance, mIoU, mean color per class. EVALUATION.md is the protocol."""

import numpy as np
import torch


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """|mean1 - mean2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of features x (N, D) and y (M, D), float64; FID where they
    are Inception's [Heusel 2017].

    The trace of the root is the sum of the roots of the eigenvalues of A^T cov2 A, with cov1 = A A^T: symmetric,
    so stable for the singular covariances of few images, where a matrix square root is not.
    """
    mean1, mean2, cov1, cov2 = x.mean(0), y.mean(0), torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov1)
    keep = values > values.max() * len(values) * torch.finfo(torch.float64).eps
    root = vectors[:, keep] * values[keep].sqrt()
    trace_root = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp_min(0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_root)


def confusion_matrix(labels: torch.Tensor, predictions: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Pixel counts (C, C + 1): row = label, column = prediction, last column = no class of the data set.

    labels: int64 (B, H, W), void = C is left out. predictions: int64 (B, H, W) in 0..C.
    """
    known = labels < num_classes
    cells = labels[known] * (num_classes + 1) + predictions[known]
    return torch.bincount(cells, minlength=num_classes * (num_classes + 1)).view(num_classes, num_classes + 1).cpu()


def segmentation_scores(confusion: torch.Tensor, class_names: list[str]) -> dict:
    """miou, pixel_accuracy and class_iou = {name: TP / (TP + FP + FN)} of a confusion matrix (C, C + 1).

    A class that no label has is None and not part of the mean. Without a labelled pixel all are None.
    """
    hits = confusion.diagonal()
    labelled = confusion.sum(1)
    union = labelled + confusion[:, :-1].sum(0) - hits
    iou = [hit / all_ if present else None
           for hit, all_, present in zip(hits.tolist(), union.tolist(), labelled.tolist())]
    return {
        "miou": mean_of_known(iou),
        "pixel_accuracy": hits.sum().item() / labelled.sum().item() if labelled.any() else None,
        "class_iou": dict(zip(class_names, iou)),
    }


def class_color_sums(images: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Sums of red, green, blue (0..255) and pixel counts of each class, (C, 4) float64.

    images: uint8 (B, 3, H, W). labels: int64 (B, H, W), void = C is left out.
    """
    weights = [images[:, channel].double() for channel in range(3)] + [torch.ones_like(labels, dtype=torch.float64)]
    sums = [torch.bincount(labels.flatten(), w.flatten(), minlength=num_classes + 1)[:num_classes] for w in weights]
    return torch.stack(sums, dim=1).cpu()


def class_color_errors(sums: torch.Tensor, sums_real: torch.Tensor, class_names: list[str]) -> dict:
    """Mean over RGB of |mean color of class c in the images - in the real ones|, in units of 0..255.

    sums, sums_real: (C, 4) of `class_color_sums`. A color cast shows here, class by class. Classes without pixels are
    None and not part of the mean.
    """
    difference = (sums[:, :3] / sums[:, 3:] - sums_real[:, :3] / sums_real[:, 3:]).abs().mean(1)
    errors = [None if np.isnan(value) else value for value in difference.tolist()]
    return {"color_error": mean_of_known(errors), "class_color_error": dict(zip(class_names, errors))}


def mean_of_known(values: list[float | None]) -> float | None:
    """The mean of what is not None; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, rounded to nearest."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
