"""metrics.py against pytorch-fid, NumPy and cases worked out by hand."""

import warnings

import numpy as np
import pytest
import torch
from pytorch_fid import fid_score

import metrics


@pytest.mark.parametrize("count", [20, 200])  # fewer and more than dimensions
def test_frechet_distance_equals_the_matrix_square_root(count):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(count, 64)), rng.normal(0.3, 1.5, size=(count + 3, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = fid_score.calculate_frechet_distance(x.mean(0), np.cov(x, rowvar=False),
                                                        y.mean(0), np.cov(y, rowvar=False))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_segmentation_scores_equal_numpy():
    rng = np.random.default_rng(4)
    labels, predictions = rng.integers(0, 6, (2, 3, 9, 7))  # 5 = void, or no class predicted
    labels[labels == 4] = 0  # no label has the last class: it is not part of the mean
    confusion = metrics.confusion_matrix(torch.tensor(labels), torch.tensor(predictions), 5)
    scores = metrics.segmentation_scores(confusion, list("abcde"))
    known = labels != 5
    iou = [np.sum((labels == c) & (predictions == c)) / np.sum(((labels == c) | (predictions == c)) & known)
           for c in range(4)]
    assert list(scores["class_iou"].values()) == [*map(pytest.approx, iou), None]
    assert scores["miou"] == pytest.approx(np.mean(iou))
    assert scores["pixel_accuracy"] == pytest.approx(np.mean((labels == predictions)[known]))
    nothing = metrics.segmentation_scores(0 * confusion, list("abcde"))  # but void
    assert nothing["miou"] is None and nothing["pixel_accuracy"] is None


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
