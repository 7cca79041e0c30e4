import numpy as np
import pytest
import torch
from scipy.special import softmax

import losses


def numpy_focal(logits, target, weights, gamma):
    p = np.take_along_axis(softmax(logits, 1), target[:, None], 1)[:, 0]
    return np.mean(-weights[target] * (1 - p) ** gamma * np.log(p))


def test_focal_loss_equals_its_formula():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(2, 4, 3, 5)), rng.integers(0, 4, (2, 3, 5))
    weights = np.array([0.5, 2.0, 1.5, 0.0])
    for gamma in (0.0, 1.0, 2.0):
        ours = losses.focal_loss(torch.tensor(logits), torch.tensor(target), torch.tensor(weights), gamma)
        assert np.isclose(ours, numpy_focal(logits, target, weights, gamma), rtol=1e-6)
        fake = losses.fake_loss(torch.tensor(logits), gamma)
        assert np.isclose(fake, numpy_focal(logits, np.full_like(target, 3), np.ones(4), gamma), rtol=1e-6)


def test_class_weights_by_hand():
    """Of 2 pixels, 1, none, and 1 of void; an absent class and void weigh nothing."""
    counts = torch.tensor([2, 1, 0, 1])
    assert losses.class_weights(counts).tolist() == [1, 2, 0, 0]  # 4 pixels / 2 classes / (2, 1)
    assert losses.class_weights(counts, power=0).tolist() == pytest.approx([4 / 3, 4 / 3, 0, 0])  # 4 pixels / 3 labelled


def test_contrastive_loss_equals_its_formula():
    loss = losses.PatchContrast([5], num_patches=12, temperature=0.3)
    fake, real = torch.randn(2, 2, 5, 3, 4)
    ours = loss([fake], [real], torch.Generator().manual_seed(0)).item()
    with torch.no_grad():
        f, r = (loss.heads[0](x.flatten(2).transpose(1, 2)).numpy().astype(np.float64) for x in (fake, real))
    f, r = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (f, r))
    expected = np.mean([-np.log(softmax(f[b] @ r[b].T / 0.3, 1)[i, i]) for b in range(2) for i in range(12)])
    assert np.isclose(ours, expected, rtol=1e-5)  # all 12 places are drawn, so their order does not matter


def views_in_numpy(image):
    """Coarse brightness (1, 16, 16), coarse color and detail (3, 16, 16) of an image (3, 32, 32) in [-1, 1]."""
    fine = image.reshape(3, 16, 2, 16, 2).mean((2, 4))
    blocks = fine.reshape(3, 4, 4, 4, 4).mean((2, 4))
    place = ((np.arange(16) + 0.5) / 4 - 0.5).clip(0, 3)
    weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(4)))  # linear interpolation between block centers
    coarse = weights @ blocks @ weights.T
    brightness = coarse.mean(0, keepdims=True)
    return brightness, coarse - brightness, fine - coarse


def test_diversity_distances_are_means_with_the_weight():
    """Of the left half alone."""
    images, left = torch.rand(2, 1, 3, 32, 32) * 2 - 1, torch.zeros(1, 1, 32, 32)
    left[..., :16] = 1
    views = [[view[..., :8] for view in views_in_numpy(image.numpy()[0])] for image in images]
    brightness, color, detail = (np.abs(a - b).mean() for a, b in zip(*views))
    detail /= sum(np.abs(view[2]).mean() for view in views)
    np.testing.assert_allclose(losses.diversity_distances(*images, left), [[brightness, color, detail]], rtol=1e-5)


def test_diversity_loss_is_a_hinge_inside_the_region():
    image1, margins = torch.zeros(2, 3, 16, 16), torch.tensor([0.2, 0.1, 0.1])
    region = torch.ones(2, 16, 16, dtype=torch.bool)
    loss = lambda difference, region=region: losses.diversity_loss(image1, image1 + difference, region, margins).item()
    assert np.isclose(loss(0.1), (0.5 + 1 + 1) / 3, atol=1e-3)  # half the margin in brightness, nothing in the other views
    one_of_two = torch.tensor([0.1, 0.0]).view(2, 1, 1, 1)
    assert np.isclose(loss(one_of_two), (0.75 + 1 + 1) / 3, atol=1e-3)  # the mean over the batch counts
    assert np.isclose(loss(5 * one_of_two), (0 + 1 + 1) / 3, atol=1e-3)  # beyond the margin: no further pull
    first = region & torch.tensor([True, False]).view(2, 1, 1)
    assert np.isclose(loss(0.1, first), (0.5 + 1 + 1) / 3 / 2, atol=1e-3)  # an image without a region does not count


def test_locality_loss_is_the_change_outside_by_that_inside():
    left = (torch.arange(16) < 8).expand(1, 16, 16)
    image, changed = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.1)
    changed[..., :8] = 0.3
    assert losses.locality_loss(image, changed, left).item() == pytest.approx(0.1 / (0.3 + 0.02))
    assert losses.locality_loss(image, changed, left | True) == 0  # nothing is outside
