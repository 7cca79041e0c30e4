import zlib
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import scenes
from checkpoint import label_state, load_generator, save_checkpoint
from config import UserError, check_settings
from interface import noise
from labels import label_format
from metrics import to_uint8
from systems import system_for


def make_checkpoint(folder, data):
    """runs/tiny/checkpoints/latest.pt of a generator with random weights, as train.py writes it."""
    settings = check_settings(TINY | {"data": TINY["data"] | data}, "tiny")
    form = label_format(settings.data)
    generator = system_for(settings, form.num_classes).build()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_checkpoint({"config": settings.model_dump(mode="json"), **label_state(form), "step": 1,
                     "ema": generator.state_dict()}, folder / "runs/tiny/checkpoints/latest.pt")


@pytest.fixture
def model(tmp_path):
    """A checkpoint, and a folder of three label maps as ids."""
    make_checkpoint(tmp_path, {})
    (tmp_path / "labels").mkdir()
    for i in range(3):
        Image.fromarray(scenes.render("val", i, (32, 32))[1]).save(tmp_path / "labels" / f"map{i}.png")
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_same_seed_same_image_whatever_else_is_in_the_folder(call, model):
    call("sample.py", "--labels", "labels", "--out", "all", "--grid")
    assert sorted(p.name for p in (model / "all").iterdir()) == ["grid.png", *(f"map{i}.png" for i in range(3))]
    (model / "one").mkdir()
    (model / "labels" / "map2.png").rename(model / "one" / "map2.png")
    call("sample.py", "--labels", "one", "--out", "alone", "--num", 2)
    assert np.array_equal(pixels(model / "all/map2.png"), pixels(model / "alone/map2_0.png"))
    assert not np.array_equal(pixels(model / "alone/map2_0.png"), pixels(model / "alone/map2_1.png"))
    call("sample.py", "--labels", "one", "--out", "other", "--seed", 1)
    assert not np.array_equal(pixels(model / "all/map2.png"), pixels(model / "other/map2.png"))
    with pytest.raises(SystemExit, match="^error: other/map2.png exists; choose another --out"):
        call("sample.py", "--labels", "one", "--out", "other")


@torch.no_grad()
def test_truncation_multiplies_the_noise(call, model):
    """In sample.py, and in evaluations, whose noise follows from the seed of an image and the number of its sample."""
    call("sample.py", "--labels", "labels", "--out", "wide", "--truncation", 2.5)
    system, generator, _ = load_generator(model / "runs/tiny/checkpoints/latest.pt")
    label_map = torch.from_numpy(np.array(Image.open(model / "labels/map0.png"))).long()[None]
    drawn = generator(label_map, 2.5 * noise([(0, zlib.crc32(b"map0"), 0, 0)], 8, "cpu"))
    assert np.array_equal(pixels(model / "wide/map0.png"), to_uint8(drawn)[0].permute(1, 2, 0))
    evaluated = system.with_options(Namespace(truncation=2.5)).generate(generator, label_map, [7], 1)
    assert torch.equal(evaluated, generator(label_map, 2.5 * noise([(7, 1)], 8, "cpu")))
    with pytest.raises(SystemExit, match=r"^error: --truncation: eval.truncation is 0.0; .*greater than 0"):
        call("sample.py", "--labels", "labels", "--out", "none", "--truncation", 0)
    with pytest.raises(UserError, match="^eval.truncation is 2.0; sdm has no noise to multiply"):
        system_for(check_settings({"generator": {"name": "sdm"}, "eval": {"truncation": 2}}, "sdm"), 3)


def test_ids_colors_palette_files_and_other_sizes_give_the_same_image(call, model):
    label = np.asarray(Image.open(model / "labels/map0.png"))
    palette = np.array([color for _, color in scenes.CLASSES] + [(0, 0, 0)], np.uint8)
    variants = {"ids": Image.fromarray(label), "rgb": Image.fromarray(palette[label]), "indexed": Image.fromarray(label),
                "large": Image.fromarray(label).resize((96, 96), Image.Resampling.NEAREST)}
    variants["indexed"].putpalette(palette.flatten().tolist())
    for name, image in variants.items():
        (model / name).mkdir()
        image.save(model / name / "scene.png")
        call("sample.py", "--labels", name, "--out", f"{name}_out")
        assert np.array_equal(pixels(model / f"{name}_out/scene.png"), pixels(model / "ids_out/scene.png"))


def test_void_is_filled_where_asked(call, model):
    """A map with a hole of void gives, with --fill-void, the image of the map without the hole."""
    label = np.full((64, 64), scenes.GRASS, np.uint8)
    for name, hole in (("whole", scenes.GRASS), ("hole", scenes.VOID)):
        (model / name).mkdir()
        label[20:30, 8:50] = hole
        Image.fromarray(label).save(model / name / "scene.png")
    for name, *options in (("whole",), ("hole", "--fill-void"), ("hole",)):
        call("sample.py", "--labels", name, "--out", f"{name}_{len(options)}", *options)
    assert np.array_equal(pixels(model / "whole_0/scene.png"), pixels(model / "hole_1/scene.png"))
    assert not np.array_equal(pixels(model / "whole_0/scene.png"), pixels(model / "hole_0/scene.png"))


def test_a_class_table_travels_in_the_checkpoint(call, tmp_path):
    """Ids are those of a file that is gone."""
    table = tmp_path / "mine.csv"
    table.write_text("id,name,r,g,b\n40,cat,255,0,0\n20,dog,0,255,0\n7,fox,0,0,255\n255,void,0,0,0\n")
    make_checkpoint(tmp_path, {"name": "folder", "root": "gone", "classes": str(table)})
    table.unlink()
    (tmp_path / "labels").mkdir()
    ids = np.array([[40, 20], [7, 255]], np.uint8).repeat(16, 0).repeat(16, 1)
    Image.fromarray(ids).save(tmp_path / "labels/map.png")
    call("sample.py", "--labels", "labels", "--out", "out", "--grid")
    colors = pixels(tmp_path / "out/grid.png")[::16, :32:16]  # left of the image: the label map
    assert colors.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]


def test_interpolation_goes_from_the_first_sample_to_the_second(call, model):
    call("sample.py", "--labels", "labels", "--out", "ends", "--num", 2)
    call("sample.py", "--labels", "labels", "--out", "path", "--interpolate", 5)
    for end, place in ((0, 0), (1, 4)):
        assert np.abs(pixels(model / f"path/map1_{place}.png") - pixels(model / f"ends/map1_{end}.png")).max() <= 1


def test_resampling_keeps_the_rest(call, model):
    """What the class shows changes, nothing else does; a map without the class stays as it is."""
    label = np.zeros((32, 32), np.uint8)
    label[:, 16:] = 2
    (model / "flat").mkdir()
    Image.fromarray(label).save(model / "flat/flat.png")
    call("sample.py", "--labels", "flat", "--out", "base")
    for number, changes in ((0, True), (1, False)):
        call("sample.py", "--labels", "flat", "--out", number, "--resample", scenes.CLASSES[number][0])
        changed = (pixels(model / f"{number}/flat.png") != pixels(model / "base/flat.png")).any(-1)
        assert changed[:, :16].any() == changes and not changed[:, 16:].any()


def test_bad_input_is_one_line(call, model):
    whole = (model / "runs/tiny/checkpoints/latest.pt").read_bytes()
    (model / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (model / "maps").mkdir()
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(model / "maps/bad.png")
    for arguments, message in [
            (["no_such"], "no_such: no label maps"), (["labels", "--resample", "unicorn"], "unicorn: no such class"),
            (["labels", "--checkpoint", "cut.pt"], "cut.pt: cut short, altered .* name another one beside it"),
            (["maps", "--out", "none"], "bad.png.* 77")]:
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            call("sample.py", "--labels", *arguments)
    assert not (model / "none").exists()
