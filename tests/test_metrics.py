"""metrics.py against pytorch-fid, NumPy and cases worked out by hand."""

import numpy as np
import pytest
import torch
from pytorch_fid import fid_score

import metrics


@pytest.mark.filterwarnings("ignore")  # pytorch-fid's, of a singular product
@pytest.mark.parametrize("count", [20, 200])  # fewer and more than dimensions
def test_frechet_distance_equals_the_matrix_square_root(count):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(count, 64)), rng.normal(0.3, 1.5, size=(count + 3, 64))
    moments = [moment for z in (x, y) for moment in (z.mean(0), np.cov(z, rowvar=False))]
    expected = fid_score.calculate_frechet_distance(*moments)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_segmentation_scores_by_hand():
    """C = 3: the last pixel is void, one is said to be of no class, and no label has the last class."""
    labels, predictions = torch.tensor([[[[0, 0, 0, 0, 1, 1, 1, 3]]], [[[0, 0, 1, 2, 1, 0, 3, 0]]]])
    confusion = metrics.confusion_matrix(labels, predictions, 3)
    assert confusion.tolist() == [[2, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    assert metrics.segmentation_scores(confusion, list("abc")) == {  # hits by pixels that have the class or are said to
        "miou": (2 / 5 + 1 / 4) / 2, "pixel_accuracy": 3 / 7, "class_iou": {"a": 2 / 5, "b": 1 / 4, "c": None}}
    nothing = {"miou": None, "pixel_accuracy": None, "class_iou": {"a": None, "b": None, "c": None}}
    assert metrics.segmentation_scores(0 * confusion, list("abc")) == nothing  # void alone


def test_class_colors_by_hand():
    labels = torch.tensor([[[0, 0], [1, 2]]])  # C = 2: the last pixel is void
    images = torch.tensor([10, 30, 100, 255], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    real = torch.tensor([26, 26, 90, 0], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    sums = metrics.class_color_sums(images, labels, 2)
    assert sums.tolist() == [[40, 40, 40, 2], [100, 100, 100, 1]]
    errors = metrics.class_color_errors(sums, metrics.class_color_sums(real, labels, 2), ["a", "b"])
    assert errors == {"color_error": 8.0, "class_color_error": {"a": 6.0, "b": 10.0}}


def test_to_uint8_rounds_and_undoes_the_scaling_of_training():
    assert metrics.to_uint8(torch.arange(256) / 127.5 - 1).tolist() == list(range(256))
    assert metrics.to_uint8(torch.tensor([-2.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1, 2.0])).tolist() == [0, 0, 1, 255]
