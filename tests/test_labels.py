"""Label files: ids, colors, masks, class tables, and what is wrong with them."""

import numpy as np
import pytest
from PIL import Image
from test_dataset import COLORS, ids, settings, tree

from config import UserError
from dataset import build_dataset
from labels import UNKNOWN, label_format, read_class_table


@pytest.mark.parametrize("name, bad", [("ade20k", 151), ("coco_stuff", 182), ("cityscapes", 34), ("celebamask_hq", 19)])
def test_class_tables_name_each_class_and_color_once(name, bad):
    form = label_format(settings("", name))
    assert len(set(form.class_names)) == len({tuple(color) for color in form.palette[:-1].tolist()}) == form.num_classes
    assert (form.palette[-1] == 0).all() and form.ids[bad] == UNKNOWN != form.ids[bad - 1]


@pytest.mark.parametrize("changes, file_ids, classes", [
    ({}, [0, 1, 2], [0, 1, 2]),
    ({"void": 255}, [0, 2, 255], [0, 2, 3]),
    ({"void": 0}, [0, 1, 2, 3], [3, 0, 1, 2]),
    ({"void": 1}, [0, 1, 2, 3], [0, 3, 1, 2]),
    ({"void": 65535}, [0, 2, 65535], [0, 2, 3]),
    ({"classes": ["x", 2], "void": 9}, [0, 1, 9], [0, 1, 2])])
def test_folder_ids(tmp_path, changes, file_ids, classes):
    tree(tmp_path, ids(*file_ids))
    dataset = build_dataset(settings(tmp_path, **changes), "train")
    assert np.array_equal(dataset[0][1], ids(*classes))
    everything = np.arange(dataset.num_classes + ("void" in changes))
    assert np.array_equal(dataset.form.ids[dataset.form.encode(everything)], everything)


def palette_picture(label):
    picture = Image.frombytes("P", (8, 6), label.tobytes())
    picture.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    return picture


@pytest.mark.parametrize("make", [
    palette_picture,
    lambda label: np.repeat(label[..., None], 3, 2),  # gray saved as RGB
    lambda label: Image.merge("LA", [Image.fromarray(label)] * 2),
    lambda label: label.astype(np.uint16)])
def test_ids_in_any_gray_mode(tmp_path, make):
    tree(tmp_path, make(ids(0, 1, 2)))
    assert np.array_equal(build_dataset(settings(tmp_path), "train")[0][1], ids(0, 1, 2))


@pytest.mark.parametrize("void, bad", [(None, 3), (255, 256), (None, 1000), (999, 65535)])
def test_ids_that_are_too_large(tmp_path, void, bad):
    tree(tmp_path, ids(0, bad))
    with pytest.raises(UserError, match=rf"train/labels/a.png: id {bad} is none of the ids \[0, 1, 2"):
        build_dataset(settings(tmp_path, void=void), "train")[0]


@pytest.mark.parametrize("palette, void_color", [(COLORS, [0, 0, 0]), (COLORS + [[255, 255, 255]], [255, 255, 255])])
@pytest.mark.parametrize("alpha", [False, True])
def test_rgb_labels(tmp_path, palette, void_color, alpha):
    picture = np.array(COLORS + [void_color], np.uint8)[ids(2, 0, 1, 3)]
    tree(tmp_path, np.dstack([picture, np.full((6, 8), 255, np.uint8)]) if alpha else picture)
    dataset = build_dataset(settings(tmp_path, palette=palette), "train")
    assert np.array_equal(dataset[0][1], ids(2, 0, 1, 3))
    assert np.array_equal(dataset.palette[dataset[0][1]], picture)


@pytest.mark.parametrize("make", [lambda mask: mask * 255, lambda mask: Image.fromarray(mask * 255).convert("1"),
                                  lambda mask: np.repeat(mask[..., None] * 255, 3, 2)])
@pytest.mark.parametrize("palette", [[[0, 0, 0], [255, 255, 255]], [[255, 255, 255], [0, 0, 0]]])
def test_masks(tmp_path, make, palette):
    tree(tmp_path, make(ids(1, 0).astype(np.uint8)))
    dataset = build_dataset(settings(tmp_path, classes=2, palette=palette), "train")
    white = palette.index([255, 255, 255])
    assert np.array_equal(dataset[0][1], np.where(ids(1, 0) == 1, white, 1 - white))
    assert np.array_equal(dataset.form.encode(dataset[0][1].numpy()), ids(1, 0) * 255)


@pytest.mark.parametrize("dog", [20, 300, 65535])  # the last two need 16 bits
def test_class_table_of_ones_own(tmp_path, dog):
    table = tmp_path / "mine.csv"
    table.write_text(f"id,name,r,g,b\n7,void,1,1,1\n40,cat,255,0,0\n{dog},dog,0,255,0\n9,void,2,2,2\n")
    tree(tmp_path, ids(40, dog, 7, 9))
    dataset = build_dataset(settings(tmp_path, classes=str(table)), "train")
    assert dataset.class_names == ["cat", "dog"] and np.array_equal(dataset[0][1], ids(0, 1, 2, 2))
    assert np.array_equal(dataset.form.encode(dataset[0][1].numpy()), ids(40, dog, 7, 7))
    assert dataset.palette[-1].tolist() == [1, 1, 1]  # of the first row of void


def test_default_palette_is_the_voc_map():
    palette = label_format(settings("", classes=254)).palette
    assert palette[[0, 1, 2, 3, -1]].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [0, 0, 0]]
    assert len(np.unique(palette, axis=0)) == 255


@pytest.mark.parametrize("changes, message", [
    ({"classes": None}, "data.classes: 0 classes; give 1 to 254"), ({"classes": 255}, "255 classes"),
    ({"classes": ["a", "a"]}, "a is there twice"), ({"classes": "none.csv"}, "none.csv: .*a class table is"),
    ({"void": 65536}, "data.void is 65536"), ({"palette": [[0, 0, 0]]}, "data.palette: 1 colors for 3 classes"),
    ({"palette": [[0, 0, 0], [0, 0, 1], [0, 0, 256]]}, "data.palette is")])
def test_setting_errors(changes, message):
    with pytest.raises(UserError, match=message):
        label_format(settings("", **changes))


@pytest.mark.parametrize("text", ["id,name\n1,a\n", "id,name,r,g,b\n1,a,1,2,300\n", "id,name,r,g,b\n65536,a,1,2,3\n",
                                  "id,name,r,g,b\n1,a,1,2,3\n1,b,1,2,4\n", "id,name,r,g,b\n1,a,1,2,3\n2,a,1,2,4\n"])
def test_class_table_errors(tmp_path, text):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(UserError, match="mine.csv"):
        read_class_table(tmp_path / "mine.csv")
