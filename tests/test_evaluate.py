"""evaluate.py on folders of images, and what it refuses; on checkpoints see test_systems.py and test_denoising.py."""

import itertools
import json
import shutil
from argparse import Namespace

import pytest
import torch
import yaml
from conftest import TINY, put, together
from PIL import Image

from config import UserError
from evaluate import from_folders
from interface import sample_seed


@pytest.fixture
def folders(tmp_path, folder_data):
    """real/, labels/ and a config: the val half of the folder data set at its own size."""
    shutil.copytree(folder_data / "val" / "images", tmp_path / "real")
    shutil.copytree(folder_data / "val" / "labels", tmp_path / "labels")
    data = {"name": "folder", "root": str(folder_data), "size": [40, 48], "classes": 3, "void": 255, "workers": 0}
    judges = TINY["eval"] | {"features": "stlpips_alex", "metric": "fd_stlpips_alex", "segmenter_steps": 30,
                             "num_images": 0, "diversity_samples": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY | {"data": data, "eval": judges}))
    return tmp_path


def test_real_images_against_themselves(folders, call):
    """By three processes, of which one has nothing to do, and by one. The first sample of each label map is its real image."""
    (folders / "images").mkdir()
    for i, k in itertools.product(range(6), range(2)):
        shutil.copy(folders / f"real/{(i + k) % 6}.png", folders / f"images/{i}_{k}.png")
    arguments = "--images images --labels labels --real real --config config.yaml eval.num_images=2".split()
    together(folders, 3, call, "evaluate.py", *arguments)
    metrics, shown = json.loads((folders / "metrics.json").read_text()), (folders / "out.txt").read_text()
    assert metrics["num_images"] == 2 and metrics["fd_stlpips_alex"] == pytest.approx(0, abs=1e-4)
    assert metrics["miou"] == pytest.approx(metrics["miou_real"]) and metrics["color_error"] == pytest.approx(0)
    assert metrics["protocol"]["size"] == [40, 48] and len(metrics["protocol"]["features"]["weights_sha256"]) == 64
    assert "miou" in shown and "class 2" in shown and not (folders / "metrics_1.json").exists()
    call("evaluate.py", *arguments)  # the first result is kept
    assert json.loads((folders / "metrics_1.json").read_text()) == metrics
    alone = json.loads((folders / "metrics.json").read_text())
    assert "stlpips_alex_diversity" in alone and alone.keys() == metrics.keys()
    for name in (name for name, value in alone.items() if isinstance(value, float)):
        assert metrics[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-4), name


def opened(folders):
    return from_folders(Namespace(images=folders / "images", labels=folders / "labels", real=folders / "real",
                                  config=folders / "config.yaml", overrides=["eval.diversity_samples=3"]))


def test_several_samples_of_a_label_map(folders):
    names = [f"{i}_{k}" for i in range(6) for k in range(2)]  # as sample.py --num 2 --grid writes them
    for shade, name in enumerate([*names, "grid"]):
        put(folders / f"images/{name}.png", Image.new("RGB", (48, 40), (shade, 0, 0)))
    generate, dataset, settings, *_ = opened(folders)
    assert [path.name for path in dataset.pairs[4]] == ["4.png", "4.png"] and settings.eval.diversity_samples == 2
    images = generate(torch.zeros(2, 40, 48), [sample_seed(0, index) for index in (4, 1)], 1)
    assert images[:, 0, 0, 0].tolist() == [9, 3] and images.shape == (2, 3, 40, 48)
    (folders / "images" / "4_1.png").unlink()
    with pytest.raises(UserError, match="4.png: 1 such images, not 2"):
        opened(folders)
    put(folders / "images/4_1.png", Image.new("RGB", (8, 6)))
    with pytest.raises(UserError, match=r"4_1.png: 8 x 6, .*data.size=\[6,8\]"):
        opened(folders)
