"""evaluation.py: the same figures however the images are shared out, what is kept of the real ones, diversity, rough maps."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import together

from augment import fill_void, roughen
from config import UserError, check_settings
from dataset import build_dataset
from evaluation import build_judges, evaluate_generator, higher_is_better, judge, metric_names
from interface import noise, sample_seed

GIVEN = {"seed": 5, "data": {"size": [32, 32], "workers": 0},
         "eval": {"num_images": 10, "batch_size": 4, "features": "stlpips_alex", "features_size": 32, "kid_subsets": 4,
                  "kid_subset_size": 6, "diversity_network": "stlpips_alex", "diversity_size": None,
                  "diversity_maps": 3, "diversity_samples": 3}}
SETTINGS = check_settings(GIVEN, "test")
DATASET = build_dataset(SETTINGS.data, "val")
INDICES = range(0, 500, 50)  # 10 of the 500 scenes


class BlackIsZero:
    """A judge that calls dark pixels class 0 and all others class 1."""

    judges = torch.tensor([True] * 12 + [False])
    description = {"name": "black is zero"}

    def __call__(self, images):
        return (images.float().mean(1) > 100).long()


def painted(label_map, sample_seeds, k):
    """Class number as brightness, plus noise that follows from (seed, k)."""
    grain = noise([(s, k) for s in sample_seeds], 3 * 32 * 32, label_map.device).view(-1, 3, 32, 32)
    return (label_map[:, None] * 20 + 10 * grain).clamp(0, 255).to(torch.uint8)


def measure(cache, rank=0, world_size=1, generate=painted, **changes):
    settings = SETTINGS.model_copy(update={"eval": SETTINGS.eval.model_copy(update=changes)})
    return evaluate_generator(generate, DATASET, settings, build_judges(settings.eval, DATASET, "cpu"), BlackIsZero(), "cpu",
                              cache, rank, world_size)


def measure_together(folder):
    dist.init_process_group("gloo")
    torch.save(measure(folder / "cache2", dist.get_rank(), 2), folder / f"metrics{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    one = {key: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
           for key, value in measure(tmp_path / "cache1").items()}
    together(tmp_path, 2, measure_together, tmp_path)
    for rank in range(2):
        assert torch.load(tmp_path / f"metrics{rank}.pt", weights_only=True) == one


def test_real_images_are_cached_under_their_own_key(tmp_path, monkeypatch):
    first, judged = measure(tmp_path), []
    monkeypatch.setattr("evaluation.judge", lambda *args: judged.append(args) or judge(*args))
    assert measure(tmp_path) == first
    assert len(judged) == 3  # batches of generated images only
    other = measure(tmp_path, features_size=40, diversity_samples=0, kid_subset_size=10)
    assert len(judged) == 3 + 6  # another size: the real images are looked at again
    for metrics, samples in ((first, 3), (other, 0)):
        names = metric_names(SETTINGS.eval.model_copy(update={"diversity_samples": samples}))
        measured = {key for key, value in metrics.items() if isinstance(value, float)}
        spread = {"kid_stlpips_alex_std"} if samples else set()  # the other's subsets are all of the images
        assert measured == {*names, *spread, "miou_real", "pixel_accuracy_real"}
        assert [name for name in names if not higher_is_better(name)] == ["fd_stlpips_alex", "kid_stlpips_alex", "color_error"]


def views_in_numpy(image):
    """Coarse brightness (1, 16, 16), coarse color and detail (3, 16, 16) of an image (3, 32, 32) in [-1, 1]."""
    fine = image.reshape(3, 16, 2, 16, 2).mean((2, 4))
    blocks = fine.reshape(3, 4, 4, 4, 4).mean((2, 4))
    place = ((np.arange(16) + 0.5) / 4 - 0.5).clip(0, 3)
    weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(4)))  # linear interpolation between block centers
    coarse = weights @ blocks @ weights.T
    brightness = coarse.mean(0, keepdims=True)
    return brightness, coarse - brightness, fine - coarse


def distances_in_numpy(images):
    """(3,) of a pair of images uint8."""
    (b1, c1, d1), (b2, c2, d2) = (views_in_numpy(np.asarray(image) / 127.5 - 1) for image in images)
    return [np.abs(b1 - b2).mean(), np.abs(c1 - c2).mean(), np.abs(d1 - d2).mean() / (np.abs(d1).mean() + np.abs(d2).mean())]


def test_diversity_in_brightness_color_and_detail_equals_numpy(tmp_path):
    metrics = measure(tmp_path, batch_size=3)
    assert not {"rough", "fill_void"} & metrics["protocol"].keys()
    real = [DATASET[index][0] for index in INDICES]
    between_real = np.mean([distances_in_numpy(pair) for pair in zip(real[:5], real[5:])], axis=0)
    between_samples = []
    for index in (0, 150, 300):  # 3 of the 10
        samples = [painted(DATASET[index][1][None].long(), [sample_seed(5, index)], k)[0] for k in range(3)]
        between_samples += [distances_in_numpy(pair) for pair in itertools.combinations(samples, 2)]
    expected = np.mean(between_samples, axis=0) / between_real
    assert [metrics[f"diversity_{view}"] for view in ("brightness", "color", "detail")] == pytest.approx(expected, rel=1e-4)


def test_rough_label_maps_are_for_the_generator_alone(tmp_path, monkeypatch):
    """It gets them in every sample; its images are judged against the true ones."""
    got, judged = [], []
    monkeypatch.setattr("evaluation.judge", lambda images, labels, *more: judged.append(labels) or judge(images, labels, *more))
    spy = lambda label_map, seeds, k: got.append((label_map, seeds, k)) or painted(label_map, seeds, k)
    true = {sample_seed(5, index): DATASET[index][1].long() for index in INDICES}
    protocol = measure(tmp_path, rough="random", fill_void=True, generate=spy)["protocol"]
    assert protocol["rough"] == "random" and protocol["fill_void"] and {k for *_, k in got} == {0, 1, 2}
    for maps, seeds, _ in got:
        assert torch.equal(maps, torch.stack([fill_void(roughen(true[seed], "random", 12, seed), 12) for seed in seeds]))
    assert torch.equal(torch.cat(judged[1::2]), torch.stack(list(true.values())))  # in turns with the real images


def test_one_image_is_too_few(tmp_path):
    with pytest.raises(UserError, match="eval.num_images is 1, val has 500: distances need at least 2"):
        measure(tmp_path, num_images=1)
