"""The rendered data set."""

import numpy as np

import scenes


def test_a_scene_follows_from_split_and_index_alone():
    keys = [(split, index) for split in ("train", "val") for index in range(4)]
    for part in (0, 1):  # image, label map
        pictures, again = ([scenes.render(*key, (32, 48))[part].tobytes() for key in order] for order in (keys, keys[::-1]))
        assert len(set(pictures)) == 8 and again == pictures[::-1]


def test_size_changes_the_resolution_not_the_scene():
    agreement = []
    for index in range(20):
        small, large = (scenes.render("train", index, (side, side))[1] for side in (64, 192))
        agreement.append((small == large[1::3, 1::3]).mean())
    assert np.mean(agreement) > 0.96
    for size in ((17, 23), (96, 32), (2, 2)):
        image, label = scenes.render("train", 1, size)
        assert (image.shape, label.shape) == ((*size, 3), size) and label.max() <= scenes.VOID


def test_every_class_occurs_and_looks_like_itself():
    images, labels = map(np.stack, zip(*(scenes.render("train", index, (64, 64)) for index in range(150))))
    share = np.bincount(labels.ravel(), minlength=scenes.VOID + 1) / labels.size
    assert (share[:-1] > 0.01).all() and share[:-1].max() < 0.35 and 0.001 < share[scenes.VOID] < 0.03
    assert min((labels == c).any((1, 2)).mean() for c in range(scenes.VOID)) > 0.15
    sky, road, grass = (images[labels == c].mean(0) for c in (scenes.SKY, scenes.ROAD, scenes.GRASS))
    assert sky[2] > sky[0] and sky.mean() > road.mean() + 30 and grass[1] > grass[2] + 20
