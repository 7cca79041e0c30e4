"""evaluate.py from the command line: a checkpoint, folders of images, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from conftest import TINY, error_line
from config import UserError
from evaluate import image_samples, paired_folders


@pytest.fixture
def folders(tmp_path, folder_data):
    """real/, labels/ and a config: the val half of the folder data set at its own size."""
    shutil.copytree(folder_data / "val" / "images", tmp_path / "real")
    shutil.copytree(folder_data / "val" / "labels", tmp_path / "labels")
    data = {"name": "folder", "root": str(folder_data), "size": [40, 48], "classes": 3, "void": 255, "workers": 0}
    judges = TINY["eval"] | {"features": "stlpips_alex", "metric": "fd_stlpips_alex", "segmenter_steps": 30}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY | {"data": data, "eval": judges}))
    return tmp_path


def arguments(folders, images="images"):
    return ["--images", folders / images, "--labels", folders / "labels", "--real", folders / "real",
            "--config", folders / "config.yaml", "--out", folders / "metrics.json"]


def test_real_images_against_themselves(folders, run):
    result = run("evaluate.py", *arguments(folders, "real"), processes=2)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((folders / "metrics.json").read_text())
    assert metrics["num_images"] == 6
    assert metrics["fd_stlpips_alex"] == pytest.approx(0, abs=1e-4)
    assert metrics["miou"] == pytest.approx(metrics["miou_real"]) and metrics["color_error"] == pytest.approx(0)
    assert "fid" not in metrics and "stlpips_alex_diversity" not in metrics  # one sample of each map
    assert metrics["protocol"]["size"] == [40, 48] and len(metrics["protocol"]["features"]["weights_sha256"]) == 64
    assert metrics["protocol"]["segmenter"]["mapping"] == [0, 1, 2]
    assert "miou" in result.stdout and "class 2" in result.stdout


def test_checkpoint(tiny_config, train, run, tmp_path):
    train(tiny_config, "eval.features=stlpips_alex", "eval.metric=fd_stlpips_alex", "train.steps=1", "eval.segmenter_steps=2")
    checkpoint = tmp_path / "runs" / "tiny" / "checkpoints" / "latest.pt"
    result = run("evaluate.py", "--checkpoint", checkpoint, "eval.num_images=5", "eval.diversity_samples=3")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_images"] == 5 and metrics["stlpips_alex_diversity"] >= 0
    assert metrics["protocol"]["diversity"]["samples"] == 3 and metrics["protocol"]["source"]["step"] == 1
    assert "did you mean eval.num_images" in error_line(run("evaluate.py", "--checkpoint", checkpoint, "eval.num_image=5"))


def test_refuses_in_one_line(folders, run):
    assert "no such checkpoint" in error_line(run("evaluate.py", "--checkpoint", "absent.pt"))
    assert "either --checkpoint" in error_line(run("evaluate.py", "--images", "here"))


def prepared(folders, images):
    config = {"seed": 0, "data": {"name": "folder", "size": [40, 48], "classes": 3, "void": 255, "palette": None}}
    dataset, names = paired_folders(folders / "labels", folders / "real", config)
    return image_samples(folders / images, names, folders / "labels", config)


def test_several_samples_of_a_label_map(folders):
    (folders / "images").mkdir()
    for name in range(6):
        for k in range(2):
            Image.new("RGB", (48, 40)).save(folders / "images" / f"{name}_{k}.png")
    samples = prepared(folders, "images")
    assert [path.name for path in samples[4]] == ["4_0.png", "4_1.png"]
    (folders / "images" / "4_1.png").unlink()
    with pytest.raises(UserError, match="1 samples of 4, but 2 of 0"):
        prepared(folders, "images")


def test_wrong_folders_are_named(folders):
    images = folders / "images"
    cases = [("3.png missing", lambda: (images / "3.png").unlink(), "3.png: missing .6 label maps"),
             ("one too many", lambda: Image.new("RGB", (48, 40)).save(images / "more.png"), "more.png: no label map of that name"),
             ("wrong size", lambda: Image.new("RGB", (8, 6)).save(images / "2.png"), r"2.png: 8 x 6, .* data.size=\[6,8\]"),
             ("not an image", lambda: (images / "2.png").write_text("x"), "2.png"),
             ("no real image", lambda: (folders / "real" / "5.png").unlink(), "5.png: no file of that name in"),
             ("empty", lambda: [path.unlink() for path in images.iterdir()], "images: no images in it"),
             ("no folder", lambda: shutil.rmtree(images), "images: no such folder")]
    for _, spoil, message in cases:
        shutil.rmtree(images, ignore_errors=True)
        shutil.copytree(folders / "real", images)
        backup = np.array(Image.open(folders / "real" / "5.png"))
        spoil()
        with pytest.raises(UserError, match=message) as error:
            prepared(folders, "images")
        assert "\n" not in str(error.value)
        Image.fromarray(backup).save(folders / "real" / "5.png")
