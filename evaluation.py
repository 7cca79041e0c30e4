"""The evaluation of a generator: every metric in one pass over a data set, in memory, each real image decoded once.

EVALUATION.md is the protocol, metrics.py has the formulas, judges.py and segmenter.py the networks.
"""

import hashlib
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
from config import EvalSettings
from dataset import LabeledImages, evenly_spaced, leave_signals_to_parent
from distributed import from_first_process, gather
from interface import sample_seed
from judges import FeatureNetwork, PerceptualNetwork, feature_network

CACHE_VERSION = 1  # raise it when what is kept of the real images changes
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "timm", "lpips", "stlpips-pytorch", "pytorch-fid")


def metric_names(settings: EvalSettings) -> list[str]:
    """The metrics that can pick the best checkpoint, given these judges; the distances first, diversity last."""
    network = settings.features
    distances = ["fid", "kid"] if network == "inception" else [f"fd_{network}", f"kid_{network}"]
    judge = "lpips" if settings.diversity_network.startswith("lpips") else settings.diversity_network
    diversity = [f"{judge}_diversity"] if settings.diversity_samples > 1 else []
    return [*distances, "miou", "pixel_accuracy", "color_error", *diversity]


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of this metric is the better model: mIoU, accuracy and diversity, not distances."""
    return metric in ("miou", "pixel_accuracy") or metric.endswith("_diversity")


class Tally:
    """What a set of images is judged by. Tallies of several processes add up to that of one over all images.

    Attributes:
        indices: of the images in the data set. features: (B, D) of each batch.
        confusion: (C, C + 1) pixels, see `confusion_matrix`. colors: (C, 4), see `class_color_sums`.
    """

    def __init__(self, network: FeatureNetwork, segmenter, num_classes: int):
        self.network, self.segmenter, self.num_classes = network, segmenter, num_classes
        self.indices: list[int] = []
        self.features: list[torch.Tensor] = []
        self.confusion = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.colors = torch.zeros(num_classes, 4, dtype=torch.float64)

    def update(self, indices: list[int], images: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images (B, 3, H, W) uint8 with their labels (B, H, W) int64."""
        self.indices += indices
        self.features.append(self.network(images).cpu())
        self.colors += formulas.class_color_sums(images, labels, self.num_classes)
        judged = torch.where(self.segmenter.judges.to(labels.device)[labels], labels, self.num_classes)
        self.confusion += formulas.confusion_matrix(judged, self.segmenter(images), self.num_classes)

    def gather(self) -> None:
        """Take in the tallies of all processes; features come in the order of the indices."""
        indices, batches, confusions, colors = zip(*gather((self.indices, self.features, self.confusion, self.colors)))
        batches, order = sum(batches, []), torch.tensor(sum(indices, [])).argsort()
        self.features = list(torch.cat(batches)[order].split([len(batch) for batch in batches]))
        self.confusion, self.colors = sum(confusions), sum(colors)


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


def evaluate_generator(generate: Callable[..., torch.Tensor], dataset: LabeledImages, settings: EvalSettings,
                       device: torch.device | str, cache_dir: str | Path, segmenter, seed: int = 0, rank: int = 0,
                       world_size: int = 1, workers: int = 0) -> dict:
    """Measure a generator against the real images of a data set.

    Args:
        generate: (label_map int64 (B, H, W) on the device, sample_seeds list of B ints, k) -> uint8 (B, 3, H, W):
            the k-th sample of each map. Its noise may depend on sample_seeds[i] and k alone; sample_seeds[i] is
            made from `seed` and the index of the image in the data set. Where the data set has instance maps, they
            are a fourth argument.
        cache_dir: keeps what the real images give, under a key of their files, size, network and segmenter.
        segmenter: judge of mIoU, `segmenter.Segmenter`.
        rank, world_size: the images are shared out over the processes of torch.distributed.
        workers: loading processes.

    Returns:
        The metrics, the same in every process, and under `protocol` what was measured and how.

    Raises:
        ValueError: fewer than two images, or a judge that cannot be had.
    """
    network = feature_network(settings.features, settings.features_weights, settings.features_size).to(device)
    indices = evenly_spaced(len(dataset), settings.num_images)
    perceptual, diverse = None, set()
    if settings.diversity_samples > 1:
        perceptual = PerceptualNetwork(settings.diversity_network, settings.diversity_weights,
                                       settings.diversity_size).to(device)
        diverse = {indices[i] for i in evenly_spaced(len(indices), settings.diversity_maps)}
    fake, real = (Tally(network, segmenter, dataset.num_classes) for _ in range(2))
    cache = cache_file(cache_dir, "real", CACHE_VERSION, dataset, indices, network.description, segmenter.description)
    cached = from_first_process(cache.is_file)  # one process's view of the disk, so that all do the same

    shard, distances = indices[rank::world_size], []
    batches = [shard[i:i + settings.batch_size] for i in range(0, len(shard), settings.batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=leave_signals_to_parent)
    loader = tqdm(loader, desc="evaluate", unit="batch", disable=rank != 0, leave=False)
    for (images, labels, *instances), places in zip(loader, batches):
        labels, instances = labels.to(device).long(), [ids.to(device) for ids in instances]
        if not cached:
            real.update(places, images.to(device), labels)
        seeds = [sample_seed(seed, index) for index in places]
        fakes = generate(labels, seeds, 0, *instances)
        fake.update(places, fakes, labels)
        chosen = [i for i, index in enumerate(places) if index in diverse]
        if chosen:
            maps, instances = labels[chosen], [ids[chosen] for ids in instances]
            more = [generate(maps, [seeds[i] for i in chosen], k, *instances)
                    for k in range(1, settings.diversity_samples)]
            distances += map(perceptual.mean_pair_distance, torch.stack([fakes[chosen], *more], dim=1))

    fake.gather()
    if cached:
        state = torch.load(cache, weights_only=True)
        real.features, real.confusion, real.colors = [state["features"]], state["confusion"], state["colors"]
    else:
        real.gather()
        state = {"features": torch.cat(real.features), "confusion": real.confusion, "colors": real.colors}
        if rank == 0:
            save_checkpoint(state, cache)
    distances = sum(gather(distances), [])
    return from_first_process(lambda: summarize(fake, real, distances, dataset, perceptual, settings, seed))


def summarize(fake: Tally, real: Tally, distances: list[float], dataset: LabeledImages,
              perceptual: PerceptualNetwork | None, settings: EvalSettings, seed: int) -> dict:
    """The metrics of gathered tallies and distances between samples, under the names that EVALUATION.md explains.

    Under `protocol` is what a result file must say for the result to be reproduced.
    """
    distance, kernel, *_, diversity = metric_names(settings)
    gaussian, gaussian_real = (formulas.mean_and_covariance(tally.features) for tally in (fake, real))
    features, features_real = (torch.cat(tally.features).numpy() for tally in (fake, real))
    metrics = {"num_images": len(features), distance: formulas.frechet_distance(*gaussian, *gaussian_real)}
    metrics[kernel], metrics[f"{kernel}_std"] = formulas.kernel_distance(
        features, features_real, settings.kid_subsets, settings.kid_subset_size)
    scores, scores_real = (formulas.segmentation_scores(tally.confusion, dataset.class_names) for tally in (fake, real))
    metrics |= scores | {f"{key}_real": value for key, value in scores_real.items()}
    if distances:
        metrics[diversity] = float(np.mean(distances))
    metrics |= formulas.class_color_errors(fake.colors, real.colors, dataset.class_names)
    return metrics | {"protocol": {
        "num_images": len(features),
        "split": dataset.split,
        "size": list(dataset.size),
        "real_image_resize": "bicubic, antialiased, reducing_gap 2; JPEG by draft decoding (Pillow)",
        "label_resize": "nearest",
        "features": fake.network.description,
        "kid": {"subsets": settings.kid_subsets, "subset_size": settings.kid_subset_size},
        "segmenter": fake.segmenter.description,
        "diversity": perceptual and perceptual.description | {
            "maps": len(distances), "samples": settings.diversity_samples},
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "platform": sys.platform,
    }}
