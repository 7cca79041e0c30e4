"""Data sets on miniature trees: layouts, names, sizes, augmentation, what is wrong with files."""

import hashlib
import itertools
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import put
from PIL import ExifTags, Image, ImageOps

from config import DataSettings, UserError, check_settings, run_script
from dataset import build_dataset, quick_check, read_image
from labels import UNKNOWN

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
FOLDERS = {
    "folder": ("{}/images/{}.jpg", "{}/labels/{}.png", "train", "val"),
    "ade20k": ("images/{}/{}.jpg", "annotations/{}/{}.png", "training", "validation"),
    "coco_stuff": ("{}_img/{}.jpg", "{}_label/{}.png", "train", "val"),
    "cityscapes": ("leftImg8bit/{}/ulm/ulm_{}_leftImg8bit.png", "gtFine/{}/ulm/ulm_{}_gtFine_labelIds.png", "train", "val"),
    "celebamask_hq": ("{}/images/{}.jpg", "{}/labels/{}.png", "train", "test")}


def settings(root, name="folder", **changes):
    """The section `data` of the settings of such a tree."""
    classes = 3 if name == "folder" else None
    given = {"name": name, "root": root and str(root), "size": [6, 8], "classes": classes, "flip": False} | changes
    return check_settings(given, "test", DataSettings, "data.")


def tree(root, label, name="folder", image=RGB, stems=("a", "b")):
    image_path, label_path, *splits = FOLDERS[name]
    for pair in itertools.product(splits, stems):
        put(root / image_path.format(*pair), image)
        put(root / label_path.format(*pair), label)
    return root


def ids(*values):
    """A 6 x 8 label map that begins with these ids and goes on with the first."""
    return np.array([*values, *values[:1] * (48 - len(values))], np.uint8 if max(values) < 256 else np.uint16).reshape(6, 8)


@pytest.mark.parametrize("name, file_ids, classes, count, known", [
    ("ade20k", [1, 2, 3, 150, 0, 75], [0, 1, 2, 149, 150, 74], 150, {2: "sky", 20: "car", 149: "flag"}),
    ("coco_stuff", [0, 2, 156, 181, 255], [0, 2, 156, 181, 182], 182, {2: "car", 156: "sky-other", 181: "wood"}),
    ("cityscapes", [0, 1, 7, 26, 33, 255], [34, 0, 6, 25, 32, 33], 34, {6: "road", 25: "car", 33: "license plate"}),
    ("celebamask_hq", [0, 1, 13, 18], [0, 1, 13, 18], 19, {1: "skin", 13: "hair", 18: "cloth"})])
def test_published_layouts(tmp_path, name, file_ids, classes, count, known):
    tree(tmp_path, ids(*file_ids), name, image=RGB.repeat(2, axis=0) if name == "celebamask_hq" else RGB)
    for split in ("train", "val"):
        dataset = build_dataset(settings(tmp_path, name), split)
        image, label = dataset[0]
        assert dataset.names == (["ulm_a", "ulm_b"] if name == "cityscapes" else ["a", "b"])
        assert image.dtype == label.dtype == torch.uint8 and image.shape == (3, 6, 8)
        assert np.array_equal(label, ids(*classes)) and dataset.num_classes == count
        assert {i: dataset.class_names[i] for i in known} == known
        assert dataset.form.ids[max({*file_ids} - {255}) + 1] == UNKNOWN  # it is the last one


@pytest.mark.parametrize("mode, value, expected", [
    ("CMYK", (55, 225, 225, 0), (200, 30, 30)), ("L", 77, (77,) * 3), ("LA", (77, 0), (77,) * 3), ("1", 1, (255,) * 3),
    ("RGBA", (10, 20, 30, 128), (10, 20, 30)), ("P", 0, (9, 8, 7)), ("I;16", 0x4D00, (77,) * 3)])
def test_images_of_any_mode(tmp_path, mode, value, expected):
    picture = Image.new(mode, (8, 6), value)
    if mode == "P":
        picture.putpalette([9, 8, 7])
    path = put(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), picture)
    assert np.array_equal(read_image(path), np.full((6, 8, 3), expected, np.uint8))


def smooth_picture(height, width):
    y, x = np.mgrid[0:height, 0:width] / 40
    return ((np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1) + 1) * 127).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_images_upright(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = put(tmp_path / f"x{suffix}", smooth_picture(80, 120), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    assert np.array_equal(read_image(path), upright)
    small = upright.resize((20, 10), Image.Resampling.BICUBIC)  # ours is decoded at a fraction of the size
    assert np.abs(read_image(path, (10, 20)) - np.asarray(small, float)).mean() < 1


def test_sub_folders_and_suffixes(tmp_path):
    for name in ("ulm/1.webp", "ulm/2.JPEG", "bonn/old/1.bmp", "3.png"):
        image = put(tmp_path / "train/images" / name, RGB)
        label = put((tmp_path / "train/labels" / name).with_suffix(".png"), ids(0))
    put(tmp_path / "train/images/.hidden/x.jpg", RGB)
    dataset = build_dataset(settings(tmp_path), "train")
    assert dataset.names == ["3", "bonn/old/1", "ulm/1", "ulm/2"] and dataset.pairs[0] == (image, label)


def test_holdout_follows_from_names(tmp_path):
    names = [f"{city}/{i:02d}" for city in ("bonn", "ulm") for i in range(20)]
    tree(tmp_path, ids(0), stems=names)
    part = lambda split, **changes: build_dataset(settings(tmp_path, **changes), split).names
    assert part("train", holdout=0.25) == part("val", holdout=0.25) == names  # there is a val folder
    shutil.rmtree(tmp_path / "val")
    held_out = [name for name in names if hashlib.sha256(name.encode()).digest()[0] < 64]  # a quarter of 256
    assert part("val", holdout=0.25) == held_out and 3 < len(held_out) < 17
    assert part("train", holdout=0.25) == sorted(set(names) - set(held_out)) and part("train") == names
    with pytest.raises(UserError, match="val/images and val/labels .*data.holdout=0.1"):
        part("val")


def test_evaluation_resizes_to_the_size(tmp_path):
    label = np.random.default_rng(1).integers(0, 3, (90, 120)).astype(np.uint8)
    tree(tmp_path, label, image=smooth_picture(90, 120))
    image, result = build_dataset(settings(tmp_path, size=[60, 80]), "train")[0]
    with Image.open(tmp_path / "train/images/a.jpg") as file:
        assert np.array_equal(image.permute(1, 2, 0), file.resize((80, 60), Image.Resampling.BICUBIC))
    rows, columns = (((np.arange(count) + 0.5) * 1.5).astype(int) for count in (60, 80))
    assert np.array_equal(result, label[rows][:, columns])


def test_instance_maps_share_crop_and_flip_with_their_labels(tmp_path):
    label = (np.arange(48) % 34).astype(np.uint8).reshape(6, 8)
    tree(tmp_path, label, "cityscapes", stems=["a"])
    put(tmp_path / "gtFine/train/ulm/ulm_a_gtFine_instanceIds.png", label.astype(np.uint16) * 1000 + 3)
    dataset = build_dataset(settings(tmp_path, "cityscapes", instances=True, load_scale=1.5, flip=True), "train")
    for draw in range(8):
        image, classes, instances = dataset[0, draw]
        assert instances.dtype == torch.int32 and np.array_equal(dataset.form.ids[instances // 1000], classes)


def test_crops_cover_the_picture_and_flips_are_fair(tmp_path):
    label = np.arange(200, dtype=np.uint8).reshape(10, 20)
    put(tmp_path / "train/images/a.png", np.repeat(label[..., None], 3, 2))
    put(tmp_path / "train/labels/a.png", label)
    dataset = build_dataset(settings(tmp_path, classes=200, size=[5, 10], load_scale=2.0, flip=True), "train")
    corners, flips = set(), 0
    for draw in range(300):
        image, result = (a.numpy().astype(int) for a in dataset[0, draw])
        flipped = result[0, 0] > result[0, -1]
        flips += flipped
        image, result = (a[..., ::-1] if flipped else a for a in (image[0], result))
        expected = result[0, 0] + np.arange(5)[:, None] * 20 + np.arange(10)  # a 5 x 10 window of the 10 x 20 map
        assert np.array_equal(result, expected)
        # the image is cropped at a fraction of a pixel, so up to one row (20) and column (1) away
        assert np.abs(image - result)[1:-1, 1:-1].max() <= 22
        corners.add(int(result[0, 0]))
    assert 110 < flips < 190 and len(corners) > 40 and 0 in corners and max(corners) == 5 * 20 + 10
    look = lambda seed: [build_dataset(dataset.data, "train", seed)[0, draw][1].tolist() for draw in range(9)]
    assert look(0) == [dataset[0, draw][1].tolist() for draw in reversed(range(9))][::-1] != look(1)


@pytest.mark.parametrize("spoil, message", [
    (lambda train: [path.unlink() for path in train.glob("labels/*")], r"a.jpg: no label .* \(1 more such files\)"),
    (lambda train: (train / "labels/b.png").rename(train / "labels/b.jpg"),
     r"images/b.jpg: no label map .*labels/b.png \(PNG, as JPEG changes ids\)"),
    (lambda train: put(train / "images/b.png", RGB), r"images/b.jpg and .*images/b.png are both called b; remove"),
    (lambda train: train.rename(train.parent / "Train"), r"no folders train/images and train/labels .*set data.root"),
    (lambda train: os.truncate(train / "images/b.jpg", 400), r"images/b.jpg: damaged.*replace or remove"),
    (lambda train: put(train / "labels/b.png", ids(0).T), r"labels/b.png: 6 x 8, but .*b.jpg is 8 x 6; make both the same")])
def test_what_is_wrong_with_files_is_one_line(tmp_path, spoil, message):
    spoil(tree(tmp_path, ids(0)) / "train")
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        quick_check(build_dataset(settings(tmp_path), "train"))


def test_errors_in_loading_processes_keep_their_line(tmp_path):
    tree(tmp_path, ids(7), stems=["a"])
    with pytest.raises(SystemExit, match=f"^error: {tmp_path / 'train/labels/a.png'}: id 7 is none of the ids"):
        run_script(lambda: list(torch.utils.data.DataLoader(build_dataset(settings(tmp_path), "train"), num_workers=1)))
