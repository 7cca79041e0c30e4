"""The benchmark: what it extrapolates of a diffusion chain, races, and the published codes as they lie on a disk."""

import time

import numpy as np
import pytest
from conftest import TINY

import bench
import diffusion
from config import UserError, check_settings

SDM = {**TINY, "data": {**TINY["data"], "size": [16, 16]}, "discriminator": {}, "loss": {},
       "generator": {"name": "sdm", "base_channels": 32, "multipliers": [1, 2], "num_res_blocks": 1,
                     "attention_strides": [2], "head_channels": 32, "spade_channels": 8}}


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_flops_of_an_image_are_those_of_the_whole_chain(guidance):
    settings = check_settings({**SDM, "diffusion": {"steps": 3, "guidance": guidance}}, "tiny")
    generator = bench.system_of(settings).build().to(bench.DEVICE).eval()
    maps, noise = bench.drawn_maps(1, 12, (16, 16)).long(), diffusion.seeded_noise([0], (16, 16))
    chain = bench.flops(lambda: diffusion.sample(generator, maps, noise, steps=3, guidance=guidance))
    result = bench.bench_sampling(settings, repeat=1)
    assert result["flops"] == chain > 0 and result["seconds"] > 0


def test_a_training_step_is_measured(capsys):
    result = bench.bench_training(check_settings(TINY, "tiny"), steps=1, profile=True)
    assert result["images_per_second"] == pytest.approx(4 / result["seconds"]) and result["flops"] > 0
    assert "convolution" in capsys.readouterr().out


OASIS_FILES = {"models/losses.py": """
import torch
import models.norms as norms
class losses_computer:
    def __init__(self, opt): assert opt.semantic_nc == norms.CHANNELS
""", "models/norms.py": "CHANNELS = 151", "models/models.py": """
import torch
from utils.plain import scale
class OASIS_model(torch.nn.Module):
    def __init__(self, opt):
        super().__init__()
        self.netG, self.netD = torch.nn.Conv2d(opt.semantic_nc, 3, 1), torch.nn.Conv2d(3, 1, 1)
    def forward(self, image, label, mode, losses_computer):
        if mode == "generate":
            return self.netG(label)
        return [scale * self.netD(self.netG(label) if mode == "losses_G" else image).mean()]
""", "utils/plain.py": "scale = 2.0"}


def test_a_clone_without_init_files_is_found_before_our_models(tmp_path):
    """boschresearch/OASIS keeps its `models` in a folder without __init__.py; ours is a file of the same name."""
    for name, text in OASIS_FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    result = bench.race({"published": (bench.published_oasis, tmp_path)}, {"sample": 1, "training step": 1})
    assert min(result[event]["published"]["seconds"] for event in result) > 0


def test_official_code_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "--official", str(tmp_path)])
    with pytest.raises(UserError, match="no models/models.py and no guided_diffusion; give the folder of a clone"):
        bench.main()


def light(seconds):
    return {"first": lambda: time.sleep(seconds), "second": lambda: time.sleep(seconds)}


def heavy(seconds):
    return {"second": lambda: (np.ones(2 ** 27), time.sleep(seconds))}  # 1 GiB


def test_a_race_measures_each_entrant_by_itself(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the memory of the processes is compared
    result = bench.race({"light": (light, 0.02), "heavy": (heavy, 0.5)}, {"first": 1, "second": 2})
    assert set(result["first"]) == {"light"}
    small, large = (result["second"][name] for name in ("light", "heavy"))
    assert 0.02 <= small["seconds"] < 0.5 <= large["seconds"]
    assert small["peak_memory_gib"] + 0.9 < large["peak_memory_gib"] < small["peak_memory_gib"] + 1.1
    assert len(capsys.readouterr().out.splitlines()) == 3
