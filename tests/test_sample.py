import zlib
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import TINY, put, together, write_checkpoint
from PIL import Image

import scenes
from checkpoint import load_checkpoint, load_generator
from interface import noise
from metrics import to_uint8

LATEST = "runs/tiny/checkpoints/latest.pt"


@pytest.fixture
def model(tmp_path):
    """A checkpoint, and three label maps as ids."""
    write_checkpoint(tmp_path / LATEST)
    for i in range(3):
        put(tmp_path / f"labels/map{i}.png", scenes.render("val", i, (32, 32))[1])
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_same_seed_same_image_whatever_else_is_in_the_folder(call, model):
    """Such as sub folders, and --out itself."""
    (model / "labels/city").mkdir()
    (model / "labels/map2.png").rename(model / "labels/city/map1.png")
    call("sample.py", "--labels", "labels", "--out", "labels/all", "--grid")
    assert sorted(path.relative_to(model / "labels/all").as_posix() for path in (model / "labels/all").rglob("*.png")) == [
        "city/map1.png", "grid.png", "map0.png", "map1.png"]
    (model / "one").mkdir()
    (model / "labels/map1.png").rename(model / "one/map1.png")
    call("sample.py", "--labels", "one", "--out", "alone", "--num", 2)
    assert np.array_equal(pixels(model / "labels/all/map1.png"), pixels(model / "alone/map1_0.png"))
    call("sample.py", "--labels", "one", "--out", "other", "--seed", 1)
    assert not np.array_equal(pixels(model / "alone/map1_0.png"), pixels(model / "other/map1.png"))
    with pytest.raises(SystemExit, match="^error: other/map1.png exists; choose another --out"):
        call("sample.py", "--labels", "one", "--out", "other")


def test_of_cityscapes_own_folder_the_label_ids_are_taken(call, tmp_path):
    write_checkpoint(tmp_path / LATEST, data=TINY["data"] | {"name": "cityscapes"})
    for kind, value in (("labelIds", 7), ("instanceIds", 26001), ("labelTrainIds", 26001)):
        put(tmp_path / f"gtFine/a_gtFine_{kind}.png", np.full((32, 32), value, np.uint16))
    call("sample.py", "--labels", "gtFine", "--out", "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_gtFine_labelIds.png"]


@torch.no_grad()
def test_truncation_multiplies_the_noise(call, model):
    """In sample.py, and in evaluations, whose noise follows from the seed of an image and the number of its sample."""
    call("sample.py", "--labels", "labels", "--out", "wide", "--truncation", 2.5)
    system, generator, _ = load_generator(model / LATEST)
    label_map = torch.from_numpy(np.array(Image.open(model / "labels/map0.png"))).long()[None]
    drawn = generator(label_map, 2.5 * noise([(0, zlib.crc32(b"map0"), 0, 0)], 8, "cpu"))
    assert np.array_equal(pixels(model / "wide/map0.png"), to_uint8(drawn)[0].permute(1, 2, 0))
    evaluated = system.with_options(Namespace(truncation=2.5)).generate(generator, label_map, [7], 1)
    assert torch.equal(evaluated, generator(label_map, 2.5 * noise([(7, 1)], 8, "cpu")))


def test_a_class_table_travels_in_the_checkpoint(sample, tmp_path):
    """Ids are those of a file that is gone."""
    table = tmp_path / "mine.csv"
    table.write_text("id,name,r,g,b\n40,cat,255,0,0\n20,dog,0,255,0\n7,fox,0,0,255\n255,void,0,0,0\n")
    write_checkpoint(tmp_path / LATEST, data=TINY["data"] | {"name": "folder", "root": "gone", "classes": str(table)})
    table.unlink()
    grid, _ = sample(np.array([[40, 20], [7, 255]], np.uint8).repeat(16, 0).repeat(16, 1), "--grid")
    colors = grid[::16, :32:16]  # left of the image: the label map
    assert colors.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]


def test_interpolation_goes_from_the_first_sample_to_the_second(sample, model):
    label = scenes.render("val", 0, (32, 32))[1]
    ends, way = sample(label, "--num", 2), sample(label, "--interpolate", 5)
    assert len(way) == 5 and np.abs(np.int16(ends) - [way[0], way[4]]).max() <= 1


def test_processes_share_label_maps_with_identical_images(call, model):
    """Three maps over four processes, so that one has none."""
    arguments = "--labels", "labels", "--num", 2, "--grid", "--out"
    call("sample.py", *arguments, "one")
    together(model, 4, call, "sample.py", *arguments, "four")
    names = sorted(path.name for path in (model / "one").iterdir())
    assert len(names) == 7 and names == sorted(path.name for path in (model / "four").iterdir())
    assert all((model / "one" / name).read_bytes() == (model / "four" / name).read_bytes() for name in names)


def test_bad_input_is_one_line(call, model):
    whole, weights = (model / LATEST).read_bytes(), load_checkpoint(model / LATEST)["ema"].values()
    place = whole.index(max(weights, key=torch.numel).numpy().tobytes()) + 1000
    (model / "bit.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    put(model / "maps/bad.png", np.full((8, 8), 77, np.uint8))
    for arguments, message in [
            (["no_such"], "no_such: no label maps"), (["labels", "--resample", "unicorn"], "unicorn: no such class"),
            (["labels", "--checkpoint", "bit.pt"], "bit.pt: cut short, altered .* name another one beside it"),
            (["maps", "--out", "none"], "bad.png.* 77")]:
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            call("sample.py", "--labels", *arguments)
    assert not (model / "none").exists()
