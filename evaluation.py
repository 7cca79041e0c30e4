"""The evaluation of a generator: every metric in one pass over a data set, in memory, each real image decoded once.

EVALUATION.md is the protocol, metrics.py has the formulas, judges.py and segmenter.py the networks.
"""

import hashlib
import platform
import sys
from collections.abc import Callable
from functools import reduce
from importlib.metadata import version
from operator import add
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch_fidelity.metric_kid import kid_features_to_metric
from tqdm import tqdm

import metrics as formulas
from augment import fill_void, roughen
from checkpoint import save_checkpoint
from config import EvalSettings, Settings, UserError
from dataset import LabeledImages, evenly_spaced, leave_signals_to_parent
from distributed import from_first_process, gather
from interface import sample_seed
from judges import FeatureNetwork, PerceptualNetwork
from losses import diversity_distances

CACHE_VERSION = 3  # raise it when what is kept of the real images changes
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "timm", "lpips", "stlpips-pytorch", "pytorch-fid",
            "torch-fidelity")
VIEWS = ("diversity_brightness", "diversity_color", "diversity_detail")


def metric_names(settings: EvalSettings) -> list[str]:
    """The metrics that can pick the best checkpoint, given these judges."""
    diversity = [*VIEWS, diversity_name(settings)] if settings.diversity_samples > 1 else []
    return [*distance_names(settings), "miou", "pixel_accuracy", "color_error", *diversity]


def distance_names(settings: EvalSettings) -> tuple[str, str]:
    """Of the Frechet and of the kernel distance: FID and KID only where the network is Inception."""
    network = settings.features
    return ("fid", "kid") if network == "inception" else (f"fd_{network}", f"kid_{network}")


def diversity_name(settings: EvalSettings) -> str:
    """Of the perceptual distance between samples."""
    return ("lpips" if settings.diversity_network.startswith("lpips") else settings.diversity_network) + "_diversity"


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of this metric is the better model: mIoU, accuracy and diversity, not distances."""
    return metric in ("miou", "pixel_accuracy") or "diversity" in metric


def build_judges(settings: EvalSettings, dataset: LabeledImages,
                 device: torch.device | str) -> tuple[FeatureNetwork, PerceptualNetwork | None]:
    """The networks of the distances and, where samples are compared, of the diversity.

    Raises ValueError: fewer than two images to judge, or a network that cannot be had.
    """
    if len(evenly_spaced(len(dataset), settings.num_images)) < 2:
        raise UserError(f"eval.num_images is {settings.num_images}, {dataset.split} has {len(dataset)}: distances need at "
                        f"least 2 images")
    features = FeatureNetwork(settings.features, settings.features_size).to(device)
    if settings.diversity_samples < 2:
        return features, None
    return features, PerceptualNetwork(settings.diversity_network, settings.diversity_size).to(device)


def judge(images: torch.Tensor, labels: torch.Tensor, network: FeatureNetwork, segmenter, num_classes: int) -> dict:
    """What images (B, 3, H, W) uint8 with their labels (B, H, W) int64 are judged by.

    Returns: features, a list of (B, D); confusion (C, C + 1), see `confusion_matrix`; colors (C, 4), see `class_color_sums`.
    """
    judged = torch.where(segmenter.judges.to(labels.device)[labels], labels, num_classes)
    return {"features": [network(images).cpu()],
            "confusion": formulas.confusion_matrix(judged, segmenter(images), num_classes),
            "colors": formulas.class_color_sums(images, labels, num_classes)}


def add_up(parts: list[dict]) -> dict:
    """What all images are judged by, from what parts of them are: numbers are added, lists are joined."""
    return {key: reduce(add, (part[key] for part in parts)) for key in parts[0]}


def view_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """`diversity_distances` (N, 3) of pairs of images (N, 3, H, W) uint8."""
    first, second = (images.float() / 127.5 - 1 for images in (first, second))
    return diversity_distances(first, second, torch.ones_like(first[:, :1])).cpu()


def real_view_distances(dataset: LabeledImages, indices: list[int], most: int = 128) -> torch.Tensor:
    """`view_distances` (N, 3) of pairs of real images half the evaluated ones apart, as neighbors may be frames of a video."""
    half = len(indices) // 2
    first, second = (torch.stack([dataset[indices[place + away]][0] for place in evenly_spaced(half, most)])
                     for away in (0, half))
    return view_distances(first, second)


def cache_file(folder: str | Path, kind: str, version: int, dataset: LabeledImages, indices: list[int], *key) -> Path:
    """The file of a cache for what follows from the pairs `indices` of a data set and `key` alone: plain values.

    Pairs are known by their files (name, size, time), image size, split and label ids; those of a data set without
    files (`scenes`) by the pixels of the first ones.
    """
    if dataset.pairs is None:
        content = [tensor.numpy().tobytes() for index in indices[:4] for tensor in dataset[index]]
    else:
        files = [(path.name, path.stat()) for index in indices for path in dataset.pairs[index]]
        content = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    pairs = dataset.split, dataset.size, indices, dataset.form.ids.tobytes(), dataset.palette.tobytes(), content
    digest = hashlib.sha256(repr((version, pairs, *key)).encode()).hexdigest()
    return Path(folder) / f"{kind}-{digest[:16]}.pt"


def evaluate_generator(generate: Callable[..., torch.Tensor], dataset: LabeledImages, settings: Settings, judges: tuple,
                       segmenter, device: torch.device | str, cache_dir: str | Path, rank: int = 0,
                       world_size: int = 1) -> dict:
    """Measure a generator against the real images of a data set.

    Args:
        generate: (label_map int64 (B, H, W) on the device, sample_seeds list of B ints, k) -> uint8 (B, 3, H, W):
            the k-th sample of each map. Its noise may depend on sample_seeds[i] and k alone; sample_seeds[i] is
            made from the seed and the index of the image in the data set. Where the data set has instance maps, they
            are a fourth argument.
        judges: what `build_judges` gave. segmenter: judge of mIoU, `segmenter.Segmenter`.
        cache_dir: keeps what the real images give, under a key of their files, size, network and segmenter.
        rank, world_size: each process of torch.distributed takes a stretch of the images.

    Returns:
        The metrics, the same in every process, and under `protocol` what was measured and how.
    """
    network, perceptual = judges
    given, num_classes = settings.eval, dataset.num_classes
    indices = evenly_spaced(len(dataset), given.num_images)
    diverse = {indices[i] for i in evenly_spaced(len(indices), given.diversity_maps)} if perceptual else set()
    cache = cache_file(cache_dir, "real", CACHE_VERSION, dataset, indices, network.description, segmenter.description)
    cached = from_first_process(cache.is_file)  # one process's view of the disk, so that all do the same

    start, end = (r * len(indices) // world_size for r in (rank, rank + 1))
    batches = [indices[i:min(i + given.batch_size, end)] for i in range(start, end, given.batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=settings.data.workers,
                        worker_init_fn=leave_signals_to_parent)
    loader = tqdm(loader, desc="evaluate", unit="batch", disable=rank != 0, leave=False)
    real, fake, distances = [], [], []
    for (images, labels, *instances), places in zip(loader, batches):
        labels, instances = labels.to(device).long(), [ids.to(device) for ids in instances]
        if not cached:
            real.append(judge(images.to(device), labels, network, segmenter, num_classes))
        seeds, maps = [sample_seed(settings.seed, index) for index in places], labels
        if given.rough != "none":
            maps = torch.stack([roughen(label_map, given.rough, num_classes, s) for label_map, s in zip(labels, seeds)])
        if given.fill_void:
            maps = torch.stack([fill_void(label_map, num_classes) for label_map in maps])
        fakes = generate(maps, seeds, 0, *instances)
        views = []
        chosen = [i for i, index in enumerate(places) if index in diverse]
        if chosen:
            more = [generate(maps[chosen], [seeds[i] for i in chosen], k, *(ids[chosen] for ids in instances))
                    for k in range(1, given.diversity_samples)]
            for samples in torch.stack([fakes[chosen], *more], dim=1):
                first, second = torch.combinations(torch.arange(len(samples))).T
                views.append(view_distances(samples[first], samples[second]))
                distances.append(perceptual.mean_pair_distance(samples))
        fake.append(judge(fakes, labels, network, segmenter, num_classes) | {"views": views})

    fake, distances = add_up(sum(gather(fake), [])), sum(gather(distances), [])
    if cached:
        real = torch.load(cache, weights_only=True)
    else:
        real = add_up(sum(gather(real), []))
        if rank == 0:
            real["views"] = [real_view_distances(dataset, indices)]
            save_checkpoint(real | {"features": [torch.cat(real["features"])]}, cache)
    result = from_first_process(lambda: figures(fake, real, distances, dataset.class_names, given))
    return result | {"protocol": {
        "num_images": len(indices),
        "split": dataset.split,
        "size": list(dataset.size),
        "real_image_resize": "bicubic, antialiased, reducing_gap 2; JPEG by draft decoding (Pillow)",
        "label_resize": "nearest",
        **({} if given.rough == "none" else {"rough": given.rough}),
        **({"fill_void": True} if given.fill_void else {}),
        **({} if given.truncation == 1 else {"truncation": given.truncation}),
        "features": network.description,
        "kid": {"subsets": given.kid_subsets, "subset_size": given.kid_subset_size},
        "segmenter": segmenter.description,
        "diversity": perceptual and perceptual.description | {
            "maps": len(distances), "samples": given.diversity_samples},
        "seed": settings.seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "platform": sys.platform,
    }}


def figures(fake: dict, real: dict, distances: list[float], class_names: list[str], settings: EvalSettings) -> dict:
    """The metrics, under the names that EVALUATION.md explains, of what `judge` and `view_distances` gave for all images and
    the distances between samples."""
    distance, kernel = distance_names(settings)
    features, features_real = (torch.cat(judged["features"]).double() for judged in (fake, real))
    metrics = {"num_images": len(features), distance: formulas.frechet_distance(features, features_real)}
    subset = min(settings.kid_subset_size, len(features))
    kid = kid_features_to_metric(features, features_real, kid_subsets=settings.kid_subsets, verbose=False,
                                 kid_subset_size=subset)
    metrics[kernel] = kid["kernel_inception_distance_mean"]
    metrics[f"{kernel}_std"] = kid["kernel_inception_distance_std"] if subset < len(features) else None  # all are the same
    scores, scores_real = (formulas.segmentation_scores(judged["confusion"], class_names) for judged in (fake, real))
    metrics |= scores | {f"{key}_real": value for key, value in scores_real.items()}
    if distances:
        metrics[diversity_name(settings)] = float(np.mean(distances))
        views, views_real = (torch.cat(judged["views"]).double().mean(0).tolist() for judged in (fake, real))
        for name, between_samples, between_real in zip(VIEWS, views, views_real):
            metrics[name] = between_samples / between_real if between_real > 1e-6 else None  # gray images have no color
    return metrics | formulas.class_color_errors(fake["colors"], real["colors"], class_names)
