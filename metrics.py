"""Metrics of semantic image synthesis: Frechet distance, KID, mIoU, diversity, mean color per class.

`evaluate_generator` measures all of them in one pass over a data set; images go to the metrics in memory, and each
real image is decoded once. EVALUATION.md is the protocol, judges.py has the networks.
"""

import hashlib
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import diffusion
from checkpoint import save_checkpoint
from config import UserError
from data import evenly_spaced, leave_signals_to_parent
from gan import noise
from judges import FeatureNetwork, PerceptualNetwork, feature_network
from sdm import SDMUNet

CACHE_VERSION = 1  # raise it when what `RealCache` keeps changes


class FeatureStatistics:
    """Mean and covariance of feature vectors, accumulated in float64 in one pass."""

    def __init__(self):
        self.count, self.total, self.outer = 0, 0.0, 0.0

    def update(self, features: torch.Tensor) -> None:
        """Add features (B, D)."""
        x = features.detach().cpu().double()
        self.count += len(x)
        self.total = self.total + x.sum(0)
        self.outer = self.outer + x.T @ x

    def merge(self, other: "FeatureStatistics") -> None:
        """Add what another process has seen."""
        self.count, self.total, self.outer = self.count + other.count, self.total + other.total, self.outer + other.outer

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(D,) mean and (D, D) unbiased covariance, float64. Raises UserError below two images."""
        if self.count < 2:
            raise UserError(f"{self.count} images: the Frechet distance needs at least 2; raise eval.num_images")
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(mean1: torch.Tensor, cov1: torch.Tensor, mean2: torch.Tensor, cov2: torch.Tensor) -> float:
    """|mean1 - mean2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), FID where features are Inception's [Heusel 2017].

    The trace of the root is the sum of the roots of the eigenvalues of A^T cov2 A, with cov1 = A A^T: symmetric,
    so stable for the singular covariances of few images, where a matrix square root is not. Float64, (D,) and (D, D).
    """
    values, vectors = torch.linalg.eigh(cov1)
    keep = values > values.max() * len(values) * torch.finfo(torch.float64).eps
    root = vectors[:, keep] * values[keep].sqrt()
    trace_root = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp_min(0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_root)


def kernel_distance(x: np.ndarray, y: np.ndarray, subsets: int, subset_size: int, seed: int = 2020) -> tuple[float, float]:
    """Unbiased squared MMD under the kernel (a.b / D + 1)^3, KID where features are Inception's [Binkowski 2018].

    Args:
        x, y: features (N, D) and (M, D).
        subsets, subset_size: mean over this many random subsets, drawn as torch-fidelity draws them; a set smaller
            than subset_size is used whole.

    Returns:
        mean and standard deviation over the subsets.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise UserError(f"{size} images: KID needs at least 2; raise eval.num_images")
    random = np.random.RandomState(seed)
    estimates = []
    for _ in range(1 if size == len(x) == len(y) else subsets):  # every subset would be the whole set
        a = x[random.choice(len(x), size, replace=False)].astype(np.float64)
        b = y[random.choice(len(y), size, replace=False)].astype(np.float64)
        aa, ab, bb = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (a, b), (b, b)))
        within = (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (size * (size - 1))
        estimates.append(within - 2 * ab.mean())
    return float(np.mean(estimates)), float(np.std(estimates))


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
    seen = [value for value in iou if value is not None]
    return {
        "miou": sum(seen) / len(seen) if seen else None,
        "pixel_accuracy": hits.sum().item() / labelled.sum().item() if seen else None,
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

    A color cast shows here, class by class. Classes without pixels are None and not part of the mean.
    """
    difference = (sums[:, :3] / sums[:, 3:] - sums_real[:, :3] / sums_real[:, 3:]).abs().mean(1)
    errors = [None if np.isnan(value) else value for value in difference.tolist()]
    seen = [value for value in errors if value is not None]
    return {"color_error": sum(seen) / len(seen) if seen else None, "class_color_error": dict(zip(class_names, errors))}


def metric_names(eval_config: dict) -> list[str]:
    """The metrics that can pick the best checkpoint, given the judges of the config's `eval` section."""
    name = eval_config["features"]
    distances = ["fid", "kid"] if name == "inception" else [f"fd_{name}", f"kid_{name}"]
    network = eval_config["diversity_network"]
    diversity = ["lpips" if network.startswith("lpips") else network] if eval_config["diversity_samples"] > 1 else []
    return [*distances, "miou", "pixel_accuracy", *(f"{d}_diversity" for d in diversity), "color_error"]


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of this metric is the better model: mIoU, accuracy and diversity, not distances."""
    return metric in ("miou", "pixel_accuracy") or metric.endswith("_diversity")


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, rounded to nearest."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def sampler_for(network: torch.nn.Module, config: dict, progress: bool = False):
    """The `generate` of `evaluate_generator` for the generator that a config names; `progress` shows diffusion's steps."""
    if not isinstance(network, SDMUNet):
        return gan_sampler(network)
    settings = config["diffusion"]

    def generate(label_map: torch.Tensor, sample_seeds: list[int], k: int, instances=None) -> torch.Tensor:
        noises = diffusion.seeded_noise([sample_seed(seed, k) for seed in sample_seeds], label_map.shape[1:])
        return to_uint8(diffusion.sample(network, label_map, noises, settings["steps"], settings["guidance"],
                                         settings["sampler"], instances, progress))

    return generate


def gan_sampler(generator: torch.nn.Module):
    """The `generate` of `evaluate_generator` for a generator(label_map, z) with images in [-1, 1]."""

    @torch.no_grad()
    def generate(label_map: torch.Tensor, sample_seeds: list[int], k: int) -> torch.Tensor:
        z = noise([(seed, k) for seed in sample_seeds], generator.z_dim, label_map.device)
        return to_uint8(generator(label_map, z))

    return generate


class Tally:
    """What a set of images is judged by: features, confusion with the labels, color sums.

    Tallies of several processes add up to the same as one process's over all images.
    """

    def __init__(self, network: FeatureNetwork, segmenter, num_classes: int):
        self.network, self.segmenter, self.num_classes = network, segmenter, num_classes
        self.positions: list[int] = []
        self.features: list[torch.Tensor] = []
        self.statistics = FeatureStatistics()
        self.confusion = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.colors = torch.zeros(num_classes, 4, dtype=torch.float64)

    def update(self, positions: list[int], images: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images (B, 3, H, W) uint8 with their labels (B, H, W) int64, at these places in the set."""
        features = self.network(images).cpu()
        self.positions += positions
        self.features.append(features)
        self.statistics.update(features)
        self.colors += class_color_sums(images, labels, self.num_classes)
        if self.segmenter:
            judged = torch.where(self.segmenter.judges.to(labels.device)[labels], labels, self.num_classes)
            self.confusion += confusion_matrix(judged, self.segmenter(images), self.num_classes)

    def gather(self) -> None:
        """Take in the tallies of all processes; features come in the order of the positions."""
        parts = gather((self.positions, torch.cat(self.features) if self.features else None, self.statistics,
                        self.confusion, self.colors))
        order = np.argsort([place for part in parts for place in part[0]])
        self.features = [torch.cat([part[1] for part in parts if part[0]])[torch.from_numpy(order)]]
        self.statistics = FeatureStatistics()
        for part in parts:
            self.statistics.merge(part[2])
        self.confusion, self.colors = sum(part[3] for part in parts), sum(part[4] for part in parts)

    def save(self, path: Path) -> None:
        """Write a gathered tally, whole or not at all. Raises UserError."""
        save_checkpoint({"features": self.features[0], "confusion": self.confusion, "colors": self.colors}, path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote. Raises UserError."""
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:  # torch raises many kinds of errors on damaged files
            raise UserError(f"{path}: damaged ({type(error).__name__}); delete it, and it is measured again") from error
        self.features, self.confusion, self.colors = [state["features"]], state["confusion"], state["colors"]
        self.statistics.update(state["features"])


def gather(value) -> list:
    """The values of all processes, in the order of their ranks; [value] where there is one."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def data_key(dataset: Dataset, indices: list[int]) -> str:
    """Hash of what makes the pairs `indices` of a data set: files (name, size, time), image size, split, label ids.

    A data set without files (`scenes`) is known by the pixels of its first pairs.
    """
    digest = hashlib.sha256(repr((CACHE_VERSION, dataset.split, dataset.size, indices)).encode())
    digest.update(dataset.form.ids.tobytes() + dataset.palette.tobytes())
    if dataset.pairs is None:
        for index in indices[:4]:
            for tensor in dataset[index]:
                digest.update(tensor.numpy().tobytes())
    else:
        for index in indices:
            for path in dataset.pairs[index]:
                stat = path.stat()
                digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()


class _Shard(Dataset):
    def __init__(self, dataset: Dataset, places: list[tuple[int, int]]):
        self.dataset, self.places = dataset, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int):
        position, index = self.places[i]
        return position, index, *self.dataset[index]


def evaluate_generator(generate, dataset: Dataset, eval_config: dict, device: torch.device | str, cache_dir: str | Path,
                       segmenter=None, seed: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0) -> dict:
    """Measure a generator against the real images of a data set.

    Args:
        generate: (label_map int64 (B, H, W) on the device, sample_seeds list of B ints, k) -> uint8 (B, 3, H, W):
            the k-th sample of each map. Its noise may depend on sample_seeds[i] and k alone; sample_seeds[i] is
            made from `seed` and the index of the image in the data set. Where the data set has instance maps, they
            are a fourth argument.
        dataset: of `data.build_dataset`.
        eval_config: the config's `eval` section.
        cache_dir: keeps what the real images give, under a key of their files, size, network and segmenter.
        segmenter: judge of mIoU (`segmenter.Segmenter`), or None for none.
        rank, world_size: the images are shared out over the processes of torch.distributed.
        workers: loading processes.

    Returns:
        The metrics, the same in every process, and under `protocol` what was measured and how.
    """
    network = feature_network(eval_config["features"], eval_config["features_weights"], device,
                              eval_config["features_size"])
    perceptual = None
    if eval_config["diversity_samples"] > 1:
        perceptual = PerceptualNetwork(eval_config["diversity_network"], eval_config["diversity_weights"],
                                       eval_config["diversity_size"]).to(device)
    indices = evenly_spaced(len(dataset), eval_config["num_images"])
    diverse = {indices[i] for i in evenly_spaced(len(indices), eval_config["diversity_maps"])}
    fake = Tally(network, segmenter, dataset.num_classes)
    real = Tally(network, segmenter, dataset.num_classes)
    key = repr((data_key(dataset, indices), network.description, segmenter and segmenter.description))
    cache = Path(cache_dir) / f"real-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    cached = gather(cache.is_file())[0]  # one process's view of the disk, so that all do the same

    shard = _Shard(dataset, list(enumerate(indices))[rank::world_size])
    loader = DataLoader(shard, eval_config["batch_size"], num_workers=workers, worker_init_fn=leave_signals_to_parent)
    distances = []
    with tqdm(total=len(shard), desc="evaluate", unit="image", disable=rank != 0, leave=False) as bar:
        for positions, places, images, labels, *instances in loader:
            labels, instances = labels.to(device).long(), [ids.to(device) for ids in instances]
            if not cached:
                real.update(positions.tolist(), images.to(device), labels)
            seeds = [sample_seed(seed, index) for index in places.tolist()]
            fakes = generate(labels, seeds, 0, *instances)
            fake.update(positions.tolist(), fakes, labels)
            if perceptual:
                chosen = [i for i, index in enumerate(places.tolist()) if index in diverse]
                distances += _diversity(generate, perceptual, fakes, labels, seeds, chosen,
                                        eval_config["diversity_samples"], *instances)
            bar.update(len(labels))

    fake.gather()
    if cached:
        real.load(cache)
    else:
        real.gather()
        if rank == 0:
            real.save(cache)
    distances = sum(gather(distances), [])
    metrics = summarize(fake, real, dataset, distances, perceptual, eval_config) if rank == 0 else None
    metrics = gather(metrics)[0]
    metrics["protocol"] = describe(dataset, len(indices), network, segmenter, perceptual, eval_config, seed)
    return metrics


def sample_seed(seed: int, index: int) -> int:
    """The seed from which the noise of image `index` of the data set follows, whatever its batch or process."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _diversity(generate, perceptual, first, labels, seeds, chosen, samples, *instances) -> list[float]:
    if not chosen:
        return []
    labels, seeds, instances = labels[chosen], [seeds[i] for i in chosen], [ids[chosen] for ids in instances]
    sets = torch.stack([first[chosen]] + [generate(labels, seeds, k, *instances) for k in range(1, samples)], dim=1)
    return [perceptual.mean_pair_distance(images) for images in sets]


def summarize(fake: Tally, real: Tally, dataset: Dataset, distances: list[float],
              perceptual: PerceptualNetwork | None, eval_config: dict) -> dict:
    """The metrics of gathered tallies, under the names that EVALUATION.md explains."""
    name = fake.network.name
    distance, kernel = ("fid", "kid") if name == "inception" else (f"fd_{name}", f"kid_{name}")
    metrics = {"num_images": fake.statistics.count}
    metrics[distance] = frechet_distance(*fake.statistics.mean_and_covariance(), *real.statistics.mean_and_covariance())
    metrics[kernel], metrics[f"{kernel}_std"] = kernel_distance(
        fake.features[0].numpy(), real.features[0].numpy(), eval_config["kid_subsets"], eval_config["kid_subset_size"])
    if fake.segmenter:
        metrics |= segmentation_scores(fake.confusion, dataset.class_names)
        scores = segmentation_scores(real.confusion, dataset.class_names)
        metrics |= {f"{key}_real": value for key, value in scores.items()}
    if perceptual:
        label = "lpips" if perceptual.name.startswith("lpips") else perceptual.name
        metrics[f"{label}_diversity"] = float(np.mean(distances))
    return metrics | class_color_errors(fake.colors, real.colors, dataset.class_names)


def describe(dataset: Dataset, num_images: int, network: FeatureNetwork, segmenter,
             perceptual: PerceptualNetwork | None, eval_config: dict, seed: int) -> dict:
    """What a result file must say for the result to be reproduced."""
    packages = ("torch", "torchvision", "numpy", "pillow", "timm", "lpips", "stlpips-pytorch", "pytorch-fid")
    return {
        "num_images": num_images,
        "split": dataset.split,
        "size": list(dataset.size),
        "real_image_resize": "bicubic, antialiased, reducing_gap 2; JPEG by draft decoding (Pillow)",
        "label_resize": "nearest",
        "features": network.description,
        "kid": {key: eval_config[f"kid_{key}"] for key in ("subsets", "subset_size")},
        "segmenter": segmenter.description if segmenter else None,
        "diversity": perceptual and perceptual.description | {
            "maps": min(eval_config["diversity_maps"], num_images), "samples": eval_config["diversity_samples"]},
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "platform": sys.platform,
    }
