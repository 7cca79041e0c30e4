"""The evaluation of a generator: every metric in one pass over a data set, in memory, each real image decoded once.

EVALUATION.md is the protocol, metrics.py has the formulas, judges.py and segmenter.py the networks.
"""

import hashlib
import itertools
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import metrics as formulas
from checkpoint import save_checkpoint
from config import EvalSettings, UserError
from dataset import LabeledImages, evenly_spaced, leave_signals_to_parent
from distributed import from_first_process, gather
from interface import sample_seed
from judges import FeatureNetwork, PerceptualNetwork, feature_network

CACHE_VERSION = 1  # raise it when what `Tally.save` keeps changes
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "timm", "lpips", "stlpips-pytorch", "pytorch-fid")


def metric_names(settings: EvalSettings) -> list[str]:
    """The metrics that can pick the best checkpoint, given these judges; first Frechet and kernel distance."""
    network = settings.features
    distances = ["fid", "kid"] if network == "inception" else [f"fd_{network}", f"kid_{network}"]
    diversity = [diversity_name(settings)] if settings.diversity_samples > 1 else []
    return [*distances, "miou", "pixel_accuracy", *diversity, "color_error"]


def diversity_name(settings: EvalSettings) -> str:
    """What the diversity is called: LPIPS has one name whatever its trunk is, the others have their own."""
    return f"{'lpips' if settings.diversity_network.startswith('lpips') else settings.diversity_network}_diversity"


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of this metric is the better model: mIoU, accuracy and diversity, not distances."""
    return metric in ("miou", "pixel_accuracy") or metric.endswith("_diversity")


class Tally:
    """What a set of images is judged by: features, confusion with the labels, color sums.

    Tallies of several processes add up to the same as one process's over all images.
    """

    def __init__(self, network: FeatureNetwork, segmenter, num_classes: int):
        self.network, self.segmenter, self.num_classes = network, segmenter, num_classes
        self.positions: list[int] = []
        self.features: list[torch.Tensor] = []
        self.statistics = formulas.FeatureStatistics()
        self.confusion = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.colors = torch.zeros(num_classes, 4, dtype=torch.float64)

    def update(self, positions: list[int], images: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images (B, 3, H, W) uint8 with their labels (B, H, W) int64, at these places in the set."""
        features = self.network(images).cpu()
        self.positions += positions
        self.features.append(features)
        self.statistics.update(features)
        self.colors += formulas.class_color_sums(images, labels, self.num_classes)
        if self.segmenter:
            judged = torch.where(self.segmenter.judges.to(labels.device)[labels], labels, self.num_classes)
            self.confusion += formulas.confusion_matrix(judged, self.segmenter(images), self.num_classes)

    def gather(self) -> None:
        """Take in the tallies of all processes; features come in the order of the positions."""
        places, features, statistics, confusions, colors = zip(*gather(
            (self.positions, self.features, self.statistics, self.confusion, self.colors)))
        order = np.argsort(sum(places, []))
        self.features = [torch.cat(sum(features, []))[torch.from_numpy(order)]]
        self.statistics = formulas.FeatureStatistics()
        for part in statistics:
            self.statistics.merge(part)
        self.confusion, self.colors = sum(confusions), sum(colors)

    def save(self, path: Path) -> None:
        """Write a gathered tally, whole or not at all. Raises UserError."""
        save_checkpoint({"features": self.features[0], "confusion": self.confusion, "colors": self.colors}, path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.features, self.confusion, self.colors = [state["features"]], state["confusion"], state["colors"]
        self.statistics.update(state["features"])


def data_key(dataset: LabeledImages, indices: list[int]) -> tuple:
    """What makes the pairs `indices` of a data set: files (name, size, time), image size, split, label ids.

    A data set without files (`scenes`) is known by the pixels of its first pairs.
    """
    if dataset.pairs is None:
        content = [tensor.numpy().tobytes() for index in indices[:4] for tensor in dataset[index]]
    else:
        files = [(path.name, path.stat()) for index in indices for path in dataset.pairs[index]]
        content = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return dataset.split, dataset.size, indices, dataset.form.ids.tobytes(), dataset.palette.tobytes(), content


def cache_file(cache_dir: str | Path, kind: str, *key) -> Path:
    """The file of a cache for what follows from `key` alone: plain values."""
    return Path(cache_dir) / f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pt"


def evaluate_generator(generate: Callable[..., torch.Tensor], dataset: LabeledImages, settings: EvalSettings,
                       device: torch.device | str, cache_dir: str | Path, segmenter=None, seed: int = 0, rank: int = 0,
                       world_size: int = 1, workers: int = 0) -> dict:
    """Measure a generator against the real images of a data set.

    Args:
        generate: (label_map int64 (B, H, W) on the device, sample_seeds list of B ints, k) -> uint8 (B, 3, H, W):
            the k-th sample of each map. Its noise may depend on sample_seeds[i] and k alone; sample_seeds[i] is
            made from `seed` and the index of the image in the data set. Where the data set has instance maps, they
            are a fourth argument.
        cache_dir: keeps what the real images give, under a key of their files, size, network and segmenter.
        segmenter: judge of mIoU (`segmenter.Segmenter`), or None for none.
        rank, world_size: the images are shared out over the processes of torch.distributed.
        workers: loading processes.

    Returns:
        The metrics, the same in every process, and under `protocol` what was measured and how.

    Raises:
        UserError, ValueError: fewer than two images, or a judge that cannot be had.
    """
    network = feature_network(settings.features, settings.features_weights, device, settings.features_size)
    perceptual = None
    if settings.diversity_samples > 1:
        perceptual = PerceptualNetwork(settings.diversity_network, settings.diversity_weights,
                                       settings.diversity_size).to(device)
    indices = evenly_spaced(len(dataset), settings.num_images)
    if len(indices) < 2:
        raise UserError(f"{len(indices)} image to evaluate: the distances need at least 2; raise eval.num_images")
    diverse = {indices[i] for i in evenly_spaced(len(indices), settings.diversity_maps)}
    fake, real = (Tally(network, segmenter, dataset.num_classes) for _ in range(2))
    cache = cache_file(cache_dir, "real", CACHE_VERSION, data_key(dataset, indices), network.description,
                       segmenter and segmenter.description)
    cached = from_first_process(cache.is_file)  # one process's view of the disk, so that all do the same

    shard = list(enumerate(indices))[rank::world_size]
    loader = DataLoader(dataset, settings.batch_size, sampler=[index for _, index in shard], num_workers=workers,
                        worker_init_fn=leave_signals_to_parent)
    waiting, distances = iter(shard), []
    with tqdm(total=len(shard), desc="evaluate", unit="image", disable=rank != 0, leave=False) as bar:
        for images, labels, *instances in loader:
            positions, places = map(list, zip(*itertools.islice(waiting, len(images))))
            labels, instances = labels.to(device).long(), [ids.to(device) for ids in instances]
            if not cached:
                real.update(positions, images.to(device), labels)
            seeds = [sample_seed(seed, index) for index in places]
            fakes = generate(labels, seeds, 0, *instances)
            fake.update(positions, fakes, labels)
            chosen = [i for i, index in enumerate(places) if index in diverse] if perceptual else []
            if chosen:
                maps, instances = labels[chosen], [ids[chosen] for ids in instances]
                more = [generate(maps, [seeds[i] for i in chosen], k, *instances)
                        for k in range(1, settings.diversity_samples)]
                distances += map(perceptual.mean_pair_distance, torch.stack([fakes[chosen], *more], dim=1))
            bar.update(len(labels))

    fake.gather()
    if cached:
        real.load(cache)
    else:
        real.gather()
        if rank == 0:
            real.save(cache)
    distances = sum(gather(distances), [])
    metrics = from_first_process(lambda: summarize(fake, real, distances, dataset.class_names, settings))
    metrics["protocol"] = describe(dataset, len(indices), network, segmenter, perceptual, settings, seed)
    return metrics


def summarize(fake: Tally, real: Tally, distances: list[float], class_names: list[str], settings: EvalSettings) -> dict:
    """The metrics of gathered tallies and distances between samples, under the names that EVALUATION.md explains."""
    distance, kernel = metric_names(settings)[:2]
    gaussian, gaussian_real = (tally.statistics.mean_and_covariance() for tally in (fake, real))
    metrics = {"num_images": fake.statistics.count, distance: formulas.frechet_distance(*gaussian, *gaussian_real)}
    metrics[kernel], metrics[f"{kernel}_std"] = formulas.kernel_distance(
        fake.features[0].numpy(), real.features[0].numpy(), settings.kid_subsets, settings.kid_subset_size)
    if fake.segmenter:
        scores, scores_real = (formulas.segmentation_scores(tally.confusion, class_names) for tally in (fake, real))
        metrics |= scores | {f"{key}_real": value for key, value in scores_real.items()}
    if distances:
        metrics[diversity_name(settings)] = float(np.mean(distances))
    return metrics | formulas.class_color_errors(fake.colors, real.colors, class_names)


def describe(dataset: LabeledImages, num_images: int, network: FeatureNetwork, segmenter,
             perceptual: PerceptualNetwork | None, settings: EvalSettings, seed: int) -> dict:
    """What a result file must say for the result to be reproduced."""
    return {
        "num_images": num_images,
        "split": dataset.split,
        "size": list(dataset.size),
        "real_image_resize": "bicubic, antialiased, reducing_gap 2; JPEG by draft decoding (Pillow)",
        "label_resize": "nearest",
        "features": network.description,
        "kid": {"subsets": settings.kid_subsets, "subset_size": settings.kid_subset_size},
        "segmenter": segmenter.description if segmenter else None,
        "diversity": perceptual and perceptual.description | {
            "maps": min(settings.diversity_maps, num_images), "samples": settings.diversity_samples},
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "platform": sys.platform,
    }
