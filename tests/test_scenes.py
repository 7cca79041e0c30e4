"""The rendered data set."""

import numpy as np
import pytest

import scenes


def test_a_scene_follows_from_split_and_index_alone():
    keys = [(split, index) for split in ("train", "val") for index in range(4)]
    for part in (0, 1):  # image, label map
        pictures, again = ([scenes.render(*key, (32, 48))[part].tobytes() for key in order] for order in (keys, keys[::-1]))
        assert len(set(pictures)) == 8 and again == pictures[::-1]


def test_one_label_map_has_many_pictures():
    looks = [scenes.render("val", 3, (64, 64), look) for look in range(6)]
    assert all(np.array_equal(looks[0][1], label) for _, label in looks)
    images = np.stack([image for image, _ in looks]).astype(float)
    assert images.mean((1, 2, 3)).std() > 5  # light
    assert np.mean([np.abs(a - b).mean() for a in images for b in images if a is not b]) > 25


@pytest.mark.parametrize("size", [(96, 32), (17, 23), (2, 2)])
def test_any_size(size):
    image, label = scenes.render("train", 1, size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert label.shape == size and label.dtype == np.uint8 and label.max() <= scenes.VOID


def test_size_changes_the_resolution_not_the_scene():
    agreement = []
    for index in range(20):
        small, large = (scenes.render("train", index, (side, side))[1] for side in (64, 192))
        agreement.append((small == large[1::3, 1::3]).mean())
    assert np.mean(agreement) > 0.96


def test_every_class_occurs_and_few_pixels_are_void():
    labels = np.stack([scenes.render("train", index, (64, 64))[1] for index in range(150)])
    share = np.bincount(labels.ravel(), minlength=scenes.VOID + 1) / labels.size
    assert (share[:-1] > 0.01).all() and share[:-1].max() < 0.35
    assert 0.001 < share[scenes.VOID] < 0.03
    pictures_with = [(labels == c).any((1, 2)).mean() for c in range(scenes.VOID)]
    assert min(pictures_with) > 0.15
    pole = np.pad(labels == scenes.POLE, ((0, 0), (0, 0), (1, 1))).astype(int)
    starts, ends = (np.flatnonzero(np.diff(pole).ravel() == sign) for sign in (1, -1))
    assert np.median(ends - starts) <= 2  # thin things


def test_classes_look_different():
    """A classifier by mean color must do far better than guessing: labels say something of the picture."""
    pairs = [scenes.render("train", index, (32, 32)) for index in range(80)]
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in pairs]).astype(float)
    labels = np.concatenate([label.ravel() for _, label in pairs])
    means = np.stack([pixels[labels == c].mean(0) for c in range(scenes.VOID)])
    sky, road, grass = means[scenes.SKY], means[scenes.ROAD], means[scenes.GRASS]
    assert sky[2] > sky[0] and sky.mean() > road.mean() + 30 and grass[1] > grass[2] + 20
    texture = [image[label == scenes.GRASS].std(0).mean() for image, label in pairs if (label == scenes.GRASS).sum() > 50]
    assert np.mean(texture) > 6
