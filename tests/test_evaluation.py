"""evaluation.py: what is kept of the real images, diversity, rough maps. Two processes: test_evaluate.py."""

import itertools

import pytest
import torch

from augment import fill_void, roughen
from config import check_settings
from dataset import build_dataset
from evaluation import build_judges, evaluate_generator, higher_is_better, judge, metric_names, view_distances
from interface import noise, sample_seed
from segmenter import Segmenter

SETTINGS = check_settings({"seed": 5, "data": {"size": [32, 32], "workers": 0}, "eval": {
    "num_images": 10, "batch_size": 4, "features": "stlpips_alex", "features_size": 32, "kid_subsets": 4, "kid_subset_size": 6,
    "diversity_network": "stlpips_alex", "diversity_size": None, "diversity_maps": 3, "diversity_samples": 3}}, "test")
DATASET = build_dataset(SETTINGS.data, "val")
INDICES = range(0, 500, 50)  # 10 of the 500 scenes
BY_BRIGHTNESS = Segmenter(lambda images: (images.float().mean(1) > 100).long(), [0, 1], DATASET.class_names, {"name": "stub"})


def painted(label_map, sample_seeds, k):
    """Class number as brightness, plus noise that follows from (seed, k)."""
    grain = noise([(s, k) for s in sample_seeds], 3 * 32 * 32, label_map.device).view(-1, 3, 32, 32)
    return (label_map[:, None] * 20 + 10 * grain).clamp(0, 255).to(torch.uint8)


def measure(cache, generate=painted, **changes):
    settings = SETTINGS.model_copy(update={"eval": SETTINGS.eval.model_copy(update=changes)})
    judges = build_judges(settings.eval, DATASET, "cpu")
    return evaluate_generator(generate, DATASET, settings, judges, BY_BRIGHTNESS, "cpu", cache)


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


def test_diversity_is_that_of_pairs_of_samples_by_that_of_pairs_of_real_images(tmp_path):
    """What the distance of a pair is: test_losses.py."""
    metrics = measure(tmp_path, batch_size=3)
    assert not {"rough", "fill_void"} & metrics["protocol"].keys()
    between = lambda pairs: view_distances(*map(torch.stack, zip(*pairs))).mean(0)
    real, samples = [DATASET[index][0] for index in INDICES], []
    for index in (0, 150, 300):  # 3 of the 10
        drawn = [painted(DATASET[index][1][None].long(), [sample_seed(5, index)], k)[0] for k in range(3)]
        samples += itertools.combinations(drawn, 2)
    expected = (between(samples) / between(zip(real[:5], real[5:]))).tolist()
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
