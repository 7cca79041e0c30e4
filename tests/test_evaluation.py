"""evaluation.py: the same figures however the images are shared out, and what is kept of the real ones."""

import pytest
import torch
import torch.multiprocessing as mp

from config import check_settings
from dataset import build_dataset
from evaluation import Tally, evaluate_generator, higher_is_better, metric_names
from interface import noise

GIVEN = {"data": {"size": [32, 32], "workers": 0},
         "eval": {"num_images": 10, "batch_size": 4, "features": "stlpips_alex", "features_size": 32, "kid_subsets": 4,
                  "kid_subset_size": 6, "diversity_network": "stlpips_alex", "diversity_size": None,
                  "diversity_maps": 3, "diversity_samples": 2}}
SETTINGS = check_settings(GIVEN, "test")


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


def measure(cache, rank=0, world_size=1, **changes):
    settings = SETTINGS.eval.model_copy(update=changes)
    dataset = build_dataset(SETTINGS.data, "val")
    return evaluate_generator(painted, dataset, settings, "cpu", cache, BlackIsZero(), 5, rank, world_size)


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(measure(folder / "cache2", rank, 2), folder / f"metrics{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    one = measure(tmp_path / "cache1")
    mp.spawn(one_of_two, args=(tmp_path,), nprocs=2)
    for rank in range(2):
        two = torch.load(tmp_path / f"metrics{rank}.pt", weights_only=True)
        assert two.keys() == one.keys()
        for key, value in one.items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert two[key] == expected, key


def test_real_images_are_cached_under_their_own_key(tmp_path, monkeypatch):
    first = measure(tmp_path)
    updates, update = [], Tally.update
    monkeypatch.setattr(Tally, "update", lambda self, *args: updates.append(self) or update(self, *args))
    assert measure(tmp_path)["fd_stlpips_alex"] == pytest.approx(first["fd_stlpips_alex"], rel=1e-9)
    assert len(updates) == 3  # batches of generated images only
    updates.clear()
    measure(tmp_path, features_size=40)
    assert len(updates) == 6  # another size: the real images are looked at again


@pytest.mark.parametrize("changes", [{}, {"diversity_samples": 0}])
def test_metric_names_are_those_measured(tmp_path, changes):
    names = metric_names(SETTINGS.eval.model_copy(update=changes))
    measured = {key for key, value in measure(tmp_path, **changes).items() if isinstance(value, float)}
    assert measured == {*names, "kid_stlpips_alex_std", "miou_real", "pixel_accuracy_real"}
    assert [name for name in names if higher_is_better(name)] == [
        name for name in names if name in ("miou", "pixel_accuracy", "stlpips_alex_diversity")]
