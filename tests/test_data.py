"""The commands of data.py."""

import os

import numpy as np
import pytest
import yaml
from conftest import put
from PIL import Image
from test_dataset import ids, settings, tree

from dataset import build_dataset
from labels import label_format


def config_file(tmp_path, **changes):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"data": settings(tmp_path, **changes).model_dump(mode="json")}))
    return path


def test_check_counts_pixels_and_names_every_problem(tmp_path, call, capsys):
    tree(tmp_path, ids(0, 1, 1, 3), stems="abcdef")
    arguments = "data.py", "check", "--config", config_file(tmp_path, void=3)
    call(*arguments)
    report = capsys.readouterr().out
    assert "train: 6 pairs" in report and "8 x 6 (6)" in report and "ready" in report
    assert "  0   93.750%  class 0" in report and "  1    4.167%" in report and "  3    2.083%  void" in report
    put(tmp_path / "train/labels/a.png", ids(0, 255))
    os.truncate(tmp_path / "train/images/d.jpg", 300)
    (tmp_path / "train/images/e.jpg").unlink()
    with pytest.raises(SystemExit, match="^error: this data set cannot be trained on"):
        call(*arguments)
    report = capsys.readouterr().out
    assert "train: 5 pairs; 3 files cannot be used" in report and "val: 6 pairs; 0 files" in report
    assert "a.png: id 255, as in a 0/255" in report and "d.jpg: damaged" in report and "e.png: no image" in report


def test_export_spells_labels_as_the_data_set_does(tmp_path, call):
    tree(tmp_path, ids(0, 1, 150), "ade20k", stems=("a", "old/a"))
    out = tmp_path / "out"
    arguments = ("export", "--config", config_file(tmp_path, name="ade20k"), "--out", out)
    call("data.py", *arguments, "--count", 0, "data.size=[12, 16]")
    assert sorted((out / "images").rglob("*.png")) == [out / "images/a.png", out / "images/old/a.png"]
    assert np.array_equal(Image.open(out / "labels/a.png"), np.kron(ids(0, 1, 150), np.ones((2, 2), np.uint8)))
    dataset = build_dataset(settings(tmp_path, "ade20k", size=[12, 16]), "val")
    assert np.array_equal(Image.open(out / "images/a.png"), dataset[0][0].permute(1, 2, 0))
    with pytest.raises(SystemExit, match="exists; remove it or choose another --out"):
        call("data.py", *arguments)
    tree(tmp_path / "city", ids(0, 7), "cityscapes", stems="a")
    instances = ids(0, 26001)
    put(tmp_path / "city/gtFine/val/ulm/ulm_a_gtFine_instanceIds.png", instances)
    config = config_file(tmp_path / "city", name="cityscapes", instances=True)
    call("data.py", "export", "--config", config, "--out", tmp_path / "with")
    assert np.array_equal(Image.open(tmp_path / "with/instances/ulm_a.png"), instances)


def test_show_draws_pairs_and_legend(tmp_path, call):
    tree(tmp_path, ids(0, 1, 2))
    out = tmp_path / "new/sheet.png"
    call("data.py", "show", "--config", config_file(tmp_path, classes=["cat", "dog", "cow"]), "--out", out, "--count", 2)
    sheet = np.asarray(Image.open(out).convert("RGB"))
    for color in label_format(settings("", classes=3)).palette:
        assert (sheet == color).all(-1).any()
