"""Label files: ids, colors, masks, class tables, and what is wrong with them."""

import itertools

import numpy as np
import pytest
from conftest import put
from PIL import Image
from test_dataset import RGB, ids, settings, tree

from config import UserError
from dataset import build_dataset
from labels import label_format, read_class_table

COLORS = [[255, 0, 0], [0, 255, 0], [7, 7, 7]]


@pytest.mark.parametrize("changes, file_ids, classes", [
    ({}, [0, 1, 2], [0, 1, 2]),
    ({"void": 255}, [0, 2, 255], [0, 2, 3]),
    ({"void": 0}, [0, 1, 2, 3], [3, 0, 1, 2]),
    ({"void": 65535}, [0, 2, 65535], [0, 2, 3])])
def test_folder_ids(tmp_path, changes, file_ids, classes):
    tree(tmp_path, ids(*file_ids))
    dataset = build_dataset(settings(tmp_path, **changes), "train")
    assert np.array_equal(dataset[0][1], ids(*classes))
    everything = np.arange(dataset.num_classes + ("void" in changes))
    assert np.array_equal(dataset.form.ids[dataset.form.encode(everything)], everything)


@pytest.mark.parametrize("mode", ["P", "RGB", "LA", "I;16"])
def test_ids_in_any_gray_mode(tmp_path, mode):
    picture = Image.fromarray(ids(0, 1, 2)).convert(mode)
    if mode == "P":
        picture.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])  # which means nothing
    tree(tmp_path, picture)
    assert np.array_equal(build_dataset(settings(tmp_path), "train")[0][1], ids(0, 1, 2))


@pytest.mark.parametrize("changes, label, message", [
    ({}, ids(0, 3), "id 3 is none of the ids of 3 classes, 0 to 2, nor void"), ({}, ids(0, 1000), "id 1000 is none of"),
    ({"void": 999}, ids(0, 65535), "id 65535 is none of the ids of 3 classes, 0 to 2, nor void"),
    ({}, ids(0, 255), r"id 255, as in a 0/255 mask; set data.classes=2 and data.palette="),
    ({}, RGB, "RGB colors .*set data.palette"), ({"palette": COLORS}, RGB, r"color \[.*\] is not in the palette"),
    ({}, ids(0, 1) / np.float32(2), "has floating-point values")])
def test_values_that_mean_nothing(tmp_path, changes, label, message):
    tree(tmp_path, ids(0))
    put(tmp_path / "train/labels/a.png", label, **{"format": "TIFF"} if label.dtype == np.float32 else {})
    with pytest.raises(UserError, match=f"^[^\n]*train/labels/a.png: {message}[^\n]*$"):
        build_dataset(settings(tmp_path, **changes), "train")[0]


@pytest.mark.parametrize("palette, mode", [
    (COLORS, "RGB"), (COLORS, "RGBA"), (COLORS + [[255, 255, 255]], "RGB"),
    *itertools.product(([[0, 0, 0], [255, 255, 255]], [[255, 255, 255], [0, 0, 0]]), ("RGB", "L", "1"))])
def test_colors(tmp_path, palette, mode):
    """Void is black or has the last color; files of gray colors, such as masks, have any mode."""
    classes = min(len(palette), 3)
    label = ids(2, 0, 1, 3) if classes == 3 else ids(1, 0)
    picture = np.array([*palette, [0, 0, 0]], np.uint8)[label]  # of the masks, without void
    tree(tmp_path, Image.fromarray(picture).convert(mode))
    dataset = build_dataset(settings(tmp_path, classes=classes, palette=palette), "train")
    assert np.array_equal(dataset[0][1], label) and np.array_equal(dataset.palette[label], picture)
    assert classes == 3 or np.array_equal(dataset.form.encode(label), picture[..., 0])


@pytest.mark.parametrize("dog", [20, 300, 65535])  # the last two need 16 bits
def test_class_table_of_ones_own(tmp_path, dog):
    table = tmp_path / "mine.csv"
    table.write_text(f"id,name,r,g,b\n7,void,1,1,1\n40,cat,255,0,0\n{dog},dog,0,255,0\n9,void,2,2,2\n")
    tree(tmp_path, ids(40, dog, 7, 9))
    dataset = build_dataset(settings(tmp_path, classes=str(table)), "train")
    assert dataset.class_names == ["cat", "dog"] and np.array_equal(dataset[0][1], ids(0, 1, 2, 2))
    assert np.array_equal(dataset.form.encode(dataset[0][1].numpy()), ids(40, dog, 7, 7))
    assert dataset.palette[-1].tolist() == [1, 1, 1]  # of the first row of void
    table.write_text("\ufeff" + table.read_text())  # as spreadsheets write it
    form = label_format(settings(tmp_path, classes=str(table), void=65535))  # one more
    assert form.ids[[40, dog, 7, 65535 if dog < 65535 else 9]].tolist() == [0, 1 if dog < 65535 else 2, 2, 2]


def test_a_file_has_one_meaning(tmp_path):
    """A table gives the ids of gray files, whatever its colors; a palette of grays gives these; other palettes the ids in
    order, and where the colors of a file with a palette of its own say otherwise, that is an error."""
    table, black, white = tmp_path / "mine.csv", [0, 0, 0], [255, 255, 255]
    table.write_text("id,name,r,g,b\n0,background,0,0,0\n1,lesion,255,255,255\n255,void,128,0,0\n")
    read = lambda **changes: build_dataset(settings(tmp_path, **changes), "train")[0][1]
    tree(tmp_path, ids(0, 255))  # no lesion, and unlabelled pixels
    assert np.array_equal(read(classes=str(table)), ids(0, 2))
    assert np.array_equal(read(classes=2, palette=[black, white]), ids(0, 1))
    assert label_format(settings("", classes=2, palette=[black, white])).palette[2].tolist() == [127, 127, 127]  # void
    with pytest.raises(UserError, match="data.void is 255, and so is the gray of class 1 in data.palette"):
        read(classes=2, palette=[black, white], void=255)
    picture = Image.fromarray(ids(0, 1))
    picture.putpalette([255, 0, 0, 0, 0, 0])
    tree(tmp_path, picture)
    with pytest.raises(UserError, match="a.png: its own palette shows other classes than its indices"):
        read(classes=2, palette=[black, [255, 0, 0]])


@pytest.mark.parametrize("changes, message", [
    ({"classes": None}, "data.classes: 0 classes; give 1 to 254"), ({"classes": 255}, "255 classes"),
    ({"classes": ["a", "a"]}, "a is there twice"), ({"classes": "none.csv"}, "none.csv: .*a class table is"),
    ({"palette": [[0, 0, 0]]}, "data.palette: 1 colors for 3 classes")])
def test_setting_errors(changes, message):
    with pytest.raises(UserError, match=message):
        label_format(settings("", **changes))


@pytest.mark.parametrize("text", ["id,name\n1,a\n", "id,name,r,g,b\n1,a,1,2,300\n", "id,name,r,g,b\n65536,a,1,2,3\n",
    "id,name,r,g,b\nx,a,1,2,3\n", "id,name,r,g,b\n1,a,1,2,3\n1,b,1,2,4\n", "id,name,r,g,b\n1,a,1,2,3\n2,b,1,2,3\n"])
def test_class_table_errors(tmp_path, text):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(UserError, match="mine.csv"):
        read_class_table(tmp_path / "mine.csv")
