"""Data sets, label conventions, errors, and the commands of data.py, on miniature trees."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import data_tools
import labels
from config import UserError, one_line

ROOT = Path(__file__).parent.parent
RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
FOLDERS = {"folder": ("{}/images/{}.jpg", "{}/labels/{}.png", "train", "val"),
           "ade20k": ("images/{}/{}.jpg", "annotations/{}/{}.png", "training", "validation"),
           "coco_stuff": ("{}_img/{}.jpg", "{}_label/{}.png", "train", "val"),
           "cityscapes": ("leftImg8bit/{}/ulm/ulm_{}_leftImg8bit.png", "gtFine/{}/ulm/ulm_{}_gtFine_labelIds.png", "train", "val"),
           "celebamask_hq": ("{}_img/{}.jpg", "{}_label/{}.png", "train", "test")}


def settings(root, name="folder", **changes):
    return {"name": name, "root": root and str(root), "size": [6, 8], "classes": 3 if name == "folder" else None, "void": None,
            "palette": None, "load_scale": 1.0, "flip": False, "workers": 0, "skip_broken": False, "instances": False} | changes


def put(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path


def tree(root, label, name="folder", image=RGB, stems=("a", "b")):
    image_path, label_path, *splits = FOLDERS[name]
    for split in splits:
        for stem in stems:
            put(root / image_path.format(split, stem), image)
            put(root / label_path.format(split, stem), label)
    return root


def ids(*values):
    """A 6 x 8 label map that begins with these ids and goes on with the first."""
    label = np.full(48, values[0], np.uint8)
    label[:len(values)] = values
    return label.reshape(6, 8)


# --- label conventions ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, file_ids, classes, count, known", [
    ("ade20k", [1, 2, 3, 150, 0, 75], [0, 1, 2, 149, 150, 74], 150, {2: "sky", 20: "car", 149: "flag"}),
    ("coco_stuff", [0, 2, 156, 181, 255], [0, 2, 156, 181, 182], 182, {2: "car", 156: "sky-other", 181: "wood"}),
    ("cityscapes", [0, 1, 7, 26, 33, 255], [34, 0, 6, 25, 32, 33], 34, {6: "road", 25: "car", 33: "license plate"}),
    ("celebamask_hq", [0, 1, 13, 18], [0, 1, 13, 18], 19, {1: "skin", 13: "hair", 18: "cloth"})])
def test_published_layouts(tmp_path, name, file_ids, classes, count, known):
    image = np.repeat(np.repeat(RGB, 2, 0), 2, 1) if name == "celebamask_hq" else RGB
    tree(tmp_path, ids(*file_ids), name, image)
    for split in ("train", "val"):
        dataset = data.build_dataset(settings(tmp_path, name), split)
        image, label = dataset[0]
        assert len(dataset) == 2 and dataset.num_classes == count and dataset.palette.shape == (count + 1, 3)
        assert label.dtype == torch.uint8 and np.array_equal(label.numpy(), ids(*classes))
        assert image.dtype == torch.uint8 and image.shape == (3, 6, 8)
        assert {i: dataset.class_names[i] for i in known} == known
        assert [dataset.stem(i) for i in range(2)] == (["ulm_a", "ulm_b"] if name == "cityscapes" else ["a", "b"])


@pytest.mark.parametrize("name, bad", [("ade20k", 151), ("coco_stuff", 182), ("cityscapes", 34), ("celebamask_hq", 19)])
def test_published_layouts_refuse_other_ids(tmp_path, name, bad):
    tree(tmp_path, ids(1, bad), name)
    with pytest.raises(UserError, match=rf"a.*\.png: id {bad} is out of range"):
        data.build_dataset(settings(tmp_path, name), "train")[0]


def test_celebamask_also_reads_the_other_published_layout(tmp_path):
    for split in ("train", "test"):
        put(tmp_path / split / "images" / "0.jpg", RGB)
        put(tmp_path / split / "labels" / "0.png", np.repeat(ids(0, 7, 18)[..., None], 3, 2))  # ids in three equal channels
    for split in ("train", "val"):
        assert np.array_equal(data.build_dataset(settings(tmp_path, "celebamask_hq"), split)[0][1], ids(0, 7, 18))


@pytest.mark.parametrize("name", ["ade20k", "coco_stuff", "cityscapes", "celebamask_hq"])
def test_class_tables_name_each_class_and_color_once(name):
    form = labels.label_format(settings("", name))
    assert len(set(form.class_names)) == form.num_classes
    assert len({tuple(color) for color in form.palette[:-1].tolist()}) == form.num_classes
    assert (form.palette[-1] == 0).all()


@pytest.mark.parametrize("changes, file_ids, classes", [
    ({}, [0, 1, 2], [0, 1, 2]),
    ({"void": 3}, [0, 1, 2, 3], [0, 1, 2, 3]),
    ({"void": 255}, [0, 2, 255], [0, 2, 3]),
    ({"void": 0}, [0, 1, 2, 3], [3, 0, 1, 2]),
    ({"void": 1}, [0, 1, 2, 3], [0, 3, 1, 2]),
    ({"classes": ["x", "y"], "void": 9}, [0, 1, 9], [0, 1, 2])])
def test_folder_ids(tmp_path, changes, file_ids, classes):
    tree(tmp_path, ids(*file_ids))
    dataset = data.build_dataset(settings(tmp_path, **changes), "train")
    assert np.array_equal(dataset[0][1], ids(*classes))
    everything = np.arange(dataset.num_classes + ("void" in changes), dtype=np.uint8)
    assert np.array_equal(dataset.form.ids[dataset.form.encode(everything)], everything)


def palette_picture(label):
    picture = Image.fromarray(label).convert("P")
    picture.putdata(label.ravel().tolist())
    picture.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    return picture


@pytest.mark.parametrize("make", [
    palette_picture,
    lambda label: np.repeat(label[..., None], 3, 2),  # gray saved as RGB
    lambda label: Image.merge("LA", [Image.fromarray(label)] * 2),
    lambda label: label.astype(np.uint16)])
def test_ids_in_any_gray_mode(tmp_path, make):
    tree(tmp_path, make(ids(0, 1, 2)))
    assert np.array_equal(data.build_dataset(settings(tmp_path), "train")[0][1], ids(0, 1, 2))


COLORS = [[255, 0, 0], [0, 255, 0], [7, 7, 7]]


@pytest.mark.parametrize("palette, void_color", [(COLORS, [0, 0, 0]), (COLORS + [[255, 255, 255]], [255, 255, 255])])
@pytest.mark.parametrize("alpha", [False, True])
def test_rgb_labels(tmp_path, palette, void_color, alpha):
    picture = np.array(COLORS + [void_color], np.uint8)[ids(2, 0, 1, 3)]
    tree(tmp_path, np.dstack([picture, np.full((6, 8), 255, np.uint8)]) if alpha else picture)
    dataset = data.build_dataset(settings(tmp_path, palette=palette), "train")
    assert np.array_equal(dataset[0][1], ids(2, 0, 1, 3))
    assert np.array_equal(labels.colorize(dataset[0][1].numpy(), dataset.palette), picture)


@pytest.mark.parametrize("make", [lambda mask: mask * 255, lambda mask: Image.fromarray(mask * 255).convert("1"),
                                  lambda mask: np.repeat(mask[..., None] * 255, 3, 2)])
@pytest.mark.parametrize("palette", [[[0, 0, 0], [255, 255, 255]], [[255, 255, 255], [0, 0, 0]]])
def test_masks(tmp_path, make, palette):
    tree(tmp_path, make(ids(1, 0).astype(np.uint8)))
    dataset = data.build_dataset(settings(tmp_path, classes=2, palette=palette), "train")
    white = palette.index([255, 255, 255])
    assert np.array_equal(dataset[0][1], np.where(ids(1, 0) == 1, white, 1 - white))
    assert np.array_equal(dataset.form.encode(dataset[0][1].numpy()), ids(1, 0) * 255)


def test_read_label_file(tmp_path):
    palette = np.array(COLORS + [[0, 0, 0]], np.uint8)
    gray = put(tmp_path / "gray.png", ids(3, 0, 1, 2))
    color = put(tmp_path / "color.png", palette[ids(3, 0, 1, 2)])
    for path in (gray, color):
        assert np.array_equal(labels.read_label_file(path, 3, palette), ids(3, 0, 1, 2))
    table = labels.label_format(settings("", "ade20k"))
    assert np.array_equal(labels.read_label_file(gray, 150, table.palette, ids=table.ids), ids(2, 150, 0, 1))
    assert np.array_equal(labels.read_label_file(gray, 3, palette, void=0), ids(2, 3, 0, 1))
    with pytest.raises(UserError, match="no such file"):
        labels.read_label_file(tmp_path / "none.png", 3, palette)


def test_class_table_of_ones_own(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("id,name,r,g,b\n7,void,1,1,1\n40,cat,255,0,0\n20,dog,0,255,0\n9,void,2,2,2\n")
    tree(tmp_path, ids(40, 20, 7, 9))
    dataset = data.build_dataset(settings(tmp_path, classes=str(table)), "train")
    assert dataset.class_names == ["cat", "dog"] and np.array_equal(dataset[0][1], ids(0, 1, 2, 2))


def test_default_palette_is_the_voc_map():
    assert labels.default_palette(4).tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [0, 0, 0]]
    assert len(np.unique(labels.default_palette(254), axis=0)) == 255


# --- images and augmentation ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, value, expected", [
    ("RGB", (10, 20, 30), (10, 20, 30)), ("L", 77, (77,) * 3), ("LA", (77, 0), (77,) * 3), ("1", 1, (255,) * 3),
    ("RGBA", (10, 20, 30, 128), (10, 20, 30)), ("P", 0, (9, 8, 7)), ("I;16", 0x4D00, (77,) * 3)])
def test_images_of_any_mode(tmp_path, mode, value, expected):
    picture = Image.new(mode, (8, 6), value)
    if mode == "P":
        picture.putpalette([9, 8, 7])
    path = put(tmp_path / "x.png", picture)
    assert np.array_equal(data.read_image(path), np.full((6, 8, 3), expected, np.uint8))
    assert np.array_equal(data.read_image(path, (3, 5)), np.full((3, 5, 3), expected, np.uint8))


def test_cmyk_jpeg(tmp_path):
    path = put(tmp_path / "x.jpg", Image.new("RGB", (64, 64), (200, 30, 30)).convert("CMYK"), quality=95)
    assert np.abs(data.read_image(path, (16, 16)).astype(int) - (200, 30, 30)).max() < 6


@pytest.mark.parametrize("suffix", [".png", ".webp", ".JPEG", ".bmp"])
def test_image_suffixes(tmp_path, suffix):
    put(tmp_path / f"train/images/a{suffix}", RGB)
    put(tmp_path / "train/labels/a.png", ids(0))
    assert len(data.build_dataset(settings(tmp_path), "train")) == 1


def smooth_picture(height, width):
    y, x = np.mgrid[0:height, 0:width] / 40
    return ((np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1) + 1) * 127).astype(np.uint8)


def test_evaluation_resizes_to_the_size(tmp_path):
    label = np.random.default_rng(1).integers(0, 3, (90, 120)).astype(np.uint8)
    tree(tmp_path, label, image=smooth_picture(90, 120))
    image, result = data.build_dataset(settings(tmp_path, size=[60, 80]), "train")[0]
    with Image.open(tmp_path / "train/images/a.jpg") as file:
        assert np.array_equal(image.permute(1, 2, 0), file.resize((80, 60), Image.Resampling.BICUBIC))
    rows, columns = (((np.arange(count) + 0.5) * 1.5).astype(int) for count in (60, 80))
    assert np.array_equal(result, label[rows][:, columns])


def test_reduced_decoding_stays_close_to_the_whole(tmp_path):
    picture = smooth_picture(800, 1000)
    path = put(tmp_path / "x.jpg", picture, quality=95)
    exact = np.asarray(Image.fromarray(picture).resize((64, 50), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(data.read_image(path, (50, 64)).astype(int) - exact).mean() < 1


def test_augmentation_follows_seed_and_draw_alone(tmp_path):
    tree(tmp_path, ids(0, 1, 2))
    config = settings(tmp_path, size=[4, 4], load_scale=1.5, flip=True)
    build = lambda seed, augment=True: data.build_dataset(config, "train", seed, augment)
    same = lambda a, b: torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    dataset = build(3)
    pairs = [dataset[0, draw] for draw in range(20)]
    assert all(same(pair, build(3)[0, draw]) for draw, pair in reversed(list(enumerate(pairs))))
    assert len({pair[0].numpy().tobytes() for pair in pairs}) > 5
    assert not all(same(pair, build(4)[0, draw]) for draw, pair in enumerate(pairs))
    assert same(dataset[0], build(3, augment=False)[0, 5])


def test_instance_maps_share_crop_and_flip_with_their_labels(tmp_path):
    label = (np.arange(48) % 34).astype(np.uint8).reshape(6, 8)
    tree(tmp_path, label, "cityscapes")
    paths = [put(tmp_path / f"gtFine/train/ulm/ulm_{stem}_gtFine_instanceIds.png", label.astype(np.uint16) * 1000 + 3)
             for stem in "ab"]
    options = settings(tmp_path, "cityscapes", instances=True, load_scale=1.5, flip=True)
    dataset = data.build_dataset(options, "train", augment=True)
    for draw in range(8):
        image, classes, instances = dataset[0, draw]
        assert instances.dtype == torch.int32 and np.array_equal(dataset.form.ids[instances // 1000], classes)
    assert not any(dataset.inspect(i)[2] for i in range(2))
    put(paths[0], RGB)
    paths[1].unlink()
    for i, message in enumerate(("a_gtFine_instanceIds.png: damaged", "b_gtFine_instanceIds.png: no such file")):
        assert message in str(dataset.inspect(i)[2][0])
        with pytest.raises(UserError, match=message):
            dataset[i]


def test_crops_cover_the_picture_and_flips_are_fair(tmp_path):
    label = np.arange(200, dtype=np.uint8).reshape(10, 20)
    picture = np.repeat(label[..., None], 3, 2)
    put(tmp_path / "train/images/a.png", picture)
    put(tmp_path / "train/labels/a.png", label)
    config = settings(tmp_path, classes=200, size=[5, 10], load_scale=2.0, flip=True)
    dataset = data.build_dataset(config, "train", 0, augment=True)
    corners, flips = set(), 0
    for draw in range(300):
        image, result = (a.numpy().astype(int) for a in dataset[0, draw])
        flipped = result[0, 0] > result[0, -1]
        flips += flipped
        result = result[:, ::-1] if flipped else result
        expected = result[0, 0] + np.arange(5)[:, None] * 20 + np.arange(10)  # a 5 x 10 window of the 10 x 20 map
        assert np.array_equal(result, expected)
        inner = image[0][1:-1, 1:-1]  # cropped at a fraction of a pixel, so up to one row (20) and column (1) away
        assert np.abs((inner[:, ::-1] if flipped else inner) - result[1:-1, 1:-1]).max() <= 22
        corners.add(int(result[0, 0]))
    assert 110 < flips < 190 and len(corners) > 40 and 0 in corners and max(corners) == 5 * 20 + 10


def test_scenes_data_set():
    config = settings(None, "scenes", size=[24, 32], load_scale=1.25, flip=True)
    dataset = data.build_dataset(config, "val", 1, augment=True)
    image, label = dataset[7, 3]
    assert len(dataset) == 500 and image.shape == (3, 24, 32) and label.shape == (24, 32) and dataset.stem(7) == "val_00007"
    assert torch.equal(image, data.build_dataset(config, "val", 1, augment=True)[7, 3][0])
    assert dataset.num_classes == len(dataset.class_names) == 12 and dataset.palette.shape == (13, 3)
    with pytest.raises(IndexError):
        dataset[500]


# --- errors ---------------------------------------------------------------------------------------------------------

def cut(path, keep=0.6):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])


def remove(pattern):
    return lambda root: (root / pattern).unlink()


@pytest.mark.parametrize("spoil, message", [
    (remove("train/labels/b.png"), r"images/b.jpg: no label map .*labels/b.png"),
    (remove("train/images/b.jpg"), r"labels/b.png: no image .*images/b"),
    (lambda root: put(root / "train/images/a.png", RGB), r"images/a.png: a second file of the name .*a.jpg"),
    (lambda root: [path.unlink() for path in (root / "train").rglob("*.*")], r"images: empty"),
    (lambda root: (root / "train").rename(root / "Train"), r"train/images: no such folder; set data.root")])
def test_folder_errors_at_construction(tmp_path, spoil, message):
    spoil(tree(tmp_path, ids(0)))
    with pytest.raises(UserError, match=message) as error:
        data.build_dataset(settings(tmp_path), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil, changes, message", [
    (lambda root: cut(put(root / "train/images/b.jpg", np.repeat(np.repeat(RGB, 40, 0), 40, 1))) or
     put(root / "train/labels/b.png", np.zeros((240, 320), np.uint8)), {}, r"images/b.jpg: damaged.*replace or remove"),
    (lambda root: (root / "train/images/b.jpg").write_text("hello"), {}, r"images/b.jpg: damaged"),
    (lambda root: cut(root / "train/labels/b.png"), {}, r"labels/b.png: damaged"),
    (lambda root: put(root / "train/labels/b.png", np.zeros((8, 6), np.uint8)), {},
     r"labels/b.png: 6 x 8, but .*b.jpg is 8 x 6; make both the same size"),
    (lambda root: put(root / "train/labels/b.png", ids(0, 5)), {}, r"labels/b.png: id 5 is out of range \(3 classes, ids 0 to 2\)"),
    (lambda root: put(root / "train/labels/b.png", ids(0, 5).astype(np.uint16) * 200), {}, r"id 1000 is out of range"),
    (lambda root: put(root / "train/labels/b.png", ids(0, 255)), {}, r"0/255 mask; set data.classes=2 and data.palette="),
    (lambda root: put(root / "train/labels/b.png", RGB), {}, r"b.png: RGB colors .*set data.palette"),
    (lambda root: put(root / "train/labels/b.png", RGB), {"palette": COLORS}, r"b.png: color \[.*\] is not in the palette")])
def test_file_errors(tmp_path, spoil, changes, message):
    spoil(tree(tmp_path, np.array(COLORS, np.uint8)[ids(0)] if changes else ids(0)))
    dataset = data.build_dataset(settings(tmp_path, **changes), "train")
    dataset[0]
    for act in (lambda: dataset[1], lambda: data.quick_check(dataset)):
        with pytest.raises(UserError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes, message", [
    ({"root": None}, "data.root: null"), ({"classes": None}, "data.classes: None; a folder"),
    ({"classes": 255}, "255 classes"), ({"classes": ["a", "a"]}, "a is there twice"), ({"classes": [1, 2]}, "class names"),
    ({"void": 256}, "data.void: 256"), ({"palette": [[0, 0, 0]]}, "data.palette"), ({"palette": [[0, 0], [1], 2]}, "data.palette"),
    ({"palette": [[0, 0, 0], [0, 0, 1], [0, 0, 256]]}, "data.palette"), ({"classes": "none.csv"}, "none.csv: no such class table")])
def test_setting_errors(tmp_path, changes, message):
    tree(tmp_path, ids(0))
    with pytest.raises(UserError, match=message):
        data.build_dataset(settings(**{"root": tmp_path} | changes), "train")


@pytest.mark.parametrize("text", ["", "id,name\n1,a\n", "id,name,r,g,b\nx,a,1,2,3\n", "id,name,r,g,b\n1,a,1,2,300\n",
                                  "id,name,r,g,b\n1,a,1,2,3\n1,b,1,2,4\n", "id,name,r,g,b\n1,a,1,2,3\n2,a,1,2,4\n"])
def test_class_table_errors(tmp_path, text):
    table = tmp_path / "mine.csv"
    table.write_text(text)
    with pytest.raises(UserError, match="mine.csv"):
        labels.read_class_table(table)


def test_skip_broken(tmp_path, capfd):
    tree(tmp_path, ids(0), stems="abcdefgh")
    cut(tmp_path / "train/labels/c.png")
    (tmp_path / "train/images/e.jpg").write_text("")
    (tmp_path / "train/labels/h.png").unlink()
    build = lambda: data.build_dataset(settings(tmp_path, skip_broken=True), "train", seed=1)
    dataset = build()
    assert len(dataset) == 7  # h has no partner
    first = [dataset[index][0] for index in range(7)]
    assert dataset.num_broken == 2
    assert all(torch.equal(a, build()[i][0]) for i, a in enumerate(first))
    named = capfd.readouterr().err
    assert named.count("c.png") >= 1 and "h.jpg" in named
    loader = torch.utils.data.DataLoader(build(), batch_size=2, num_workers=2)
    counted = loader.dataset
    capfd.readouterr()
    data.say_once.cache_clear()
    for _ in range(2):
        assert torch.equal(torch.cat([images for images, _ in loader]), torch.stack(first))
    assert counted.num_broken == 2  # found in the loading processes
    assert capfd.readouterr().err.count("c.png") == 1


def test_errors_in_loading_processes_keep_their_line(tmp_path):
    tree(tmp_path, ids(7))
    loader = torch.utils.data.DataLoader(data.build_dataset(settings(tmp_path), "train"), num_workers=1)
    with pytest.raises(UserError) as error:
        next(iter(loader))
    assert "a.png: id 7 is out of range" in str(error.value).splitlines()[-1]


def test_nothing_but_broken_files(tmp_path):
    tree(tmp_path, ids(9))
    with pytest.raises(UserError, match="100 broken files in a row"):
        data.build_dataset(settings(tmp_path, skip_broken=True), "train")[0]
    (tmp_path / "val/labels/a.png").unlink()
    (tmp_path / "val/images/b.jpg").unlink()
    with pytest.raises(UserError, match="no label map"):
        data.build_dataset(settings(tmp_path, skip_broken=True), "val")


# --- commands -------------------------------------------------------------------------------------------------------

def run(monkeypatch, *arguments):
    """Exit status of `python data.py ...`."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    try:
        data_tools.main(data.__doc__)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code
    return 0


def config_file(tmp_path, **changes):
    path = tmp_path / "config.yaml"
    given = settings(tmp_path, **changes)
    path.write_text("data: " + str(given).replace("None", "null").replace("True", "true").replace("False", "false"))
    return path


def test_check_passes(tmp_path, monkeypatch, capsys):
    tree(tmp_path, ids(0, 1, 1, 3))
    assert run(monkeypatch, "check", "--config", config_file(tmp_path, void=3)) == 0
    report = capsys.readouterr().out
    assert "train: 2 pairs" in report and "8 x 6 (2)" in report and "ready" in report
    assert "  0   93.750%  class 0" in report and "  1    4.167%" in report and "void    2.083%" in report
    assert "1 of 3 classes have no pixel" in report


def test_check_names_every_problem(tmp_path, monkeypatch, capsys):
    tree(tmp_path, ids(0), stems="abcdef")
    put(tmp_path / "train/labels/a.png", ids(0, 255))
    put(tmp_path / "train/labels/b.png", RGB)
    put(tmp_path / "train/labels/c.png", np.zeros((3, 4), np.uint8))
    cut(tmp_path / "train/images/d.jpg")
    (tmp_path / "train/images/e.jpg").unlink()
    config = config_file(tmp_path)
    assert run(monkeypatch, "check", "--config", config) == 1
    out, error = capsys.readouterr()
    assert "without partner 1, unreadable 1, of unequal size 1, with unknown ids or colors 2" in out
    for name in ("a.png: id 255, as in a 0/255 mask", "b.png: RGB", "c.png: 4 x 3", "d.jpg: damaged", "e.png: no image"):
        assert name in out
    assert "cannot be trained on" in error
    assert run(monkeypatch, "check", "--config", config, "data.skip_broken=true") == 0
    assert run(monkeypatch, "check", "--config", config, f"data.root={tmp_path / 'train'}") == 1
    assert "set data.root" in capsys.readouterr().out


def test_export_spells_labels_as_the_data_set_does(tmp_path, monkeypatch, capsys):
    tree(tmp_path, ids(0, 1, 150), "ade20k")
    out = tmp_path / "out"
    arguments = ("export", "--config", config_file(tmp_path, name="ade20k"), "--split", "val", "--count", 1, "--out", out)
    assert run(monkeypatch, *arguments, "data.size=[12, 16]") == 0
    assert [p.name for p in sorted(out.rglob("*.png"))] == ["a.png", "a.png"]
    exported = Image.open(out / "labels/a.png")
    assert exported.mode == "L" and np.array_equal(exported, np.kron(ids(0, 1, 150), np.ones((2, 2), np.uint8)))
    dataset = data.build_dataset(settings(tmp_path, "ade20k", size=[12, 16]), "val")
    assert np.array_equal(Image.open(out / "images/a.png"), dataset[0][0].permute(1, 2, 0))
    form = dataset.form
    assert np.array_equal(labels.read_label_file(out / "labels/a.png", 150, form.palette, ids=form.ids), dataset[0][1])
    assert run(monkeypatch, *arguments) == 1
    assert "exists; remove it or choose another --out" in capsys.readouterr().err


def test_evenly_spaced():
    assert data.evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert data.evenly_spaced(3, 0) == data.evenly_spaced(3, 9) == [0, 1, 2]


def test_export_takes_the_pairs_that_evaluation_takes(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(monkeypatch, "export", "--config", ROOT / "config.yaml", "--split", "val",
               "--count", 4, "--out", out, "data.size=[16, 16]") == 0
    assert [p.stem for p in sorted((out / "images").iterdir())] == [f"val_{i:05d}" for i in (0, 125, 250, 375)]


def test_show_draws_pairs_and_legend(tmp_path, monkeypatch):
    tree(tmp_path, ids(0, 1, 2))
    config, out = config_file(tmp_path, classes=["cat", "dog", "cow"]), tmp_path / "new" / "sheet.png"
    assert run(monkeypatch, "show", "--config", config, "--out", out, "--count", 2) == 0
    sheet = np.asarray(Image.open(out))
    for color in labels.default_palette(3):
        assert (sheet == color).all(-1).any()
    assert run(monkeypatch, "show", "--config", config, "--out", out) == 1


def test_one_line_of_an_error_from_a_loading_process():
    error = UserError("Caught Unreadable in DataLoader worker process 0.\nTraceback ...\nlabels.Unreadable: a.png: damaged")
    assert one_line(error) == "a.png: damaged" and one_line(UserError("a.png: damaged")) == "a.png: damaged"
