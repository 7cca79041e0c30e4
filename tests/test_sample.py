import numpy as np
import pytest
import yaml
from conftest import TINY, error_line
from PIL import Image

import scenes


@pytest.fixture
def model(train, tmp_path):
    """A barely trained model and a folder of four label maps, as ids."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    train(config, "train.steps=2")
    (tmp_path / "labels").mkdir()
    for i in range(4):
        Image.fromarray(scenes.render("val", i, (32, 32))[1]).save(tmp_path / "labels" / f"map{i}.png")
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_same_seed_same_image_whatever_else_is_in_the_folder(run, model):
    assert run("sample.py", "--labels", "labels", "--out", "all", "--grid").returncode == 0
    assert sorted(p.name for p in (model / "all").iterdir()) == ["grid.png", *(f"map{i}.png" for i in range(4))]
    (model / "one").mkdir()
    (model / "labels" / "map2.png").rename(model / "one" / "map2.png")
    assert run("sample.py", "--labels", "one", "--out", "alone", "--num", 2).returncode == 0
    assert np.array_equal(pixels(model / "all/map2.png"), pixels(model / "alone/map2_0.png"))
    assert not np.array_equal(pixels(model / "alone/map2_0.png"), pixels(model / "alone/map2_1.png"))
    assert run("sample.py", "--labels", "one", "--out", "other", "--seed", 1).returncode == 0
    assert not np.array_equal(pixels(model / "all/map2.png"), pixels(model / "other/map2.png"))
    line = error_line(run("sample.py", "--labels", "one", "--out", "other"))
    assert "map2.png exists" in line and "--out" in line


def test_ids_colors_palette_files_and_other_sizes_give_the_same_image(run, model):
    label = np.asarray(Image.open(model / "labels/map0.png"))
    palette = np.array([color for _, color in scenes.CLASSES] + [(0, 0, 0)], np.uint8)
    variants = {"ids": Image.fromarray(label), "rgb": Image.fromarray(palette[label]),
                "large": Image.fromarray(label).resize((96, 96), Image.Resampling.NEAREST)}
    variants["indexed"] = Image.fromarray(label)
    variants["indexed"].putpalette(palette.flatten().tolist())
    for name, image in variants.items():
        (model / name).mkdir()
        image.save(model / name / "scene.png")
        done = run("sample.py", "--labels", name, "--out", f"{name}_out")
        assert done.returncode == 0, done.stderr
        assert np.array_equal(pixels(model / f"{name}_out/scene.png"), pixels(model / "ids_out/scene.png"))


def test_a_class_table_travels_in_the_checkpoint(run, train, tmp_path, folder_data):
    """Ids are those of a file that is gone."""
    table = tmp_path / "mine.csv"
    table.write_text("id,name,r,g,b\n40,cat,255,0,0\n20,dog,0,255,0\n7,fox,0,0,255\n255,void,0,0,0\n")
    ids = np.full(256, 255, np.uint8)
    ids[:3] = 40, 20, 7
    for path in folder_data.glob("*/labels/*.png"):
        Image.fromarray(ids[np.asarray(Image.open(path))]).save(path)
    config = tmp_path / "mine.yaml"
    data = TINY["data"] | {"name": "folder", "root": str(folder_data), "classes": str(table)}
    config.write_text(yaml.safe_dump(TINY | {"data": data}))
    train(config, "train.steps=1")
    table.rename(tmp_path / "moved.csv")
    done = run("sample.py", "--labels", folder_data / "val/labels", "--out", "out", "--grid")
    assert done.returncode == 0, done.stderr
    sheet = pixels(tmp_path / "out/grid.png")  # a row a map: its colors, its image
    first = np.asarray(Image.open(folder_data / "val/labels/0.png").resize((32, 32), Image.Resampling.NEAREST))
    assert (sheet[:32, :32][first == 40] == [255, 0, 0]).all() and (sheet[:32, :32][first == 255] == 0).all()


def test_interpolation_goes_from_the_first_sample_to_the_second(run, model):
    assert run("sample.py", "--labels", "labels", "--out", "ends", "--num", 2).returncode == 0
    assert run("sample.py", "--labels", "labels", "--out", "path", "--interpolate", 5).returncode == 0
    assert np.abs(pixels(model / "path/map1_0.png") - pixels(model / "ends/map1_0.png")).max() <= 1
    assert np.abs(pixels(model / "path/map1_4.png") - pixels(model / "ends/map1_1.png")).max() <= 1


def test_resampling_keeps_the_rest(run, model):
    """What the class shows changes, nothing else does; a map without the class stays as it is."""
    label = np.zeros((32, 32), np.uint8)
    label[:, 16:] = 2
    (model / "flat").mkdir()
    Image.fromarray(label).save(model / "flat/flat.png")
    assert run("sample.py", "--labels", "flat", "--out", "base").returncode == 0
    for name, changes in ((scenes.CLASSES[0][0], True), (scenes.CLASSES[1][0], False)):
        assert run("sample.py", "--labels", "flat", "--out", name.replace(" ", "_"), "--resample", name).returncode == 0
        changed = (pixels(model / name.replace(" ", "_") / "flat.png") != pixels(model / "base/flat.png")).any(-1)
        assert changed[:, :16].any() == changes
        assert not changed[:, 16:].any()


def test_bad_input_is_one_line(run, model):
    assert "no_such" in error_line(run("sample.py", "--labels", "no_such"))
    assert "unicorn" in error_line(run("sample.py", "--labels", "labels", "--resample", "unicorn"))
    assert "nothing.pt" in error_line(run("sample.py", "--labels", "labels", "--checkpoint", "nothing.pt"))
    broken = model / "runs/tiny/checkpoints/broken.pt"
    whole = (model / "runs/tiny/checkpoints/latest.pt").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5000] + b"\0" * 4000 + whole[9000:], b"not a checkpoint"):
        broken.write_bytes(content)
        line = error_line(run("sample.py", "--labels", "labels", "--checkpoint", broken))
        assert "broken.pt: cut short, altered" in line and "name another one beside it" in line
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(model / "labels/bad.png")
    line = error_line(run("sample.py", "--labels", "labels", "--out", "none"))
    assert "bad.png" in line and "77" in line and not (model / "none").exists()
