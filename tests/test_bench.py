"""The benchmark: what it extrapolates of a diffusion chain, races, and the published codes as they lie on a disk."""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import patch

import numpy as np
import yaml
from conftest import TINY
from test_denoising import RUN

import bench
import diffusion
from config import check_settings


def test_flops_of_an_image_are_those_of_the_whole_chain():
    settings = check_settings(RUN, "tiny")
    generator = bench.system_of(settings).build().to(bench.DEVICE).eval()
    maps, noise = bench.drawn_maps(1, 12, (16, 16)).long(), diffusion.seeded_noise([0], (16, 16))
    chain = bench.flops(lambda: diffusion.sample(generator, maps, noise, steps=3, guidance=1.5))
    result = bench.costs(settings, steps=0, samples=1)["sample"]
    assert result["TFLOP"] == chain / 1e12 > 0 and result["s"] > 0


def test_configurations_side_by_side(tmp_path, monkeypatch, capsys):
    """Ratios are to the first; a batch twice as large is twice the work, a sample stays the same."""
    paths = [tmp_path / "small.yaml", tmp_path / "large.yaml"]
    for path, batch in zip(paths, (2, 4)):
        path.write_text(yaml.safe_dump(TINY | {"train": TINY["train"] | {"batch_size": batch}}))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))  # faster
    arguments = [f"--config={path}" for path in paths]
    monkeypatch.setattr("sys.argv", ["bench.py", *arguments, "--steps=1", "loss.diversity=0"])
    bench.main()
    assert re.findall(r"(sample|step) .*(small|large).yaml .* TFLOP +([\d.]+)x", capsys.readouterr().out) == [
        ("sample", "small", "1.00"), ("sample", "large", "1.00"), ("step", "small", "1.00"), ("step", "large", "2.00")]


MODELS = """
import torch
import models.losses
class OASIS_model(torch.nn.Module):
    def __init__(self, opt):
        super().__init__()
        self.netG, self.netD = torch.nn.Conv2d(opt.semantic_nc, 3, 1), torch.nn.Conv2d(3, 1, 1)
    def forward(self, image, label, mode, losses_computer):
        return self.netG(label) if mode == "generate" else [self.netD(self.netG(label)).mean()]
"""


def test_a_clone_without_init_files_is_found_before_our_models(tmp_path, monkeypatch):
    """boschresearch/OASIS keeps its `models` in a folder without __init__.py; ours is a file of the same name."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/losses.py").write_text("losses_computer = lambda options: None")
    (tmp_path / "models/models.py").write_text(MODELS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with patch.dict(sys.modules):
        assert bench.published_oasis(tmp_path, training=False)().shape == (1, 3, 256, 256)
        bench.published_oasis(tmp_path, training=True)()


def test_a_race_measures_each_contestant_by_itself(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the memory of the processes is compared
    contestants = {"light": (partial, time.sleep, 0.02), "heavy": (partial, np.ones, 2 ** 27)}  # of 8 bytes
    small, large = bench.race("idle", contestants, repeat=2).values()
    assert 0.02 <= small["s"] < 0.5 and small["GiB"] + 0.9 < large["GiB"] < small["GiB"] + 1.1
