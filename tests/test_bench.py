"""The benchmark: what it extrapolates of a diffusion chain, and the parts of a training step."""

import time

import numpy as np
import pytest
import torch
from conftest import TINY

import bench
import diffusion
from config import UserError, check_config
from gan import build_network

SDM = {**TINY, "data": {**TINY["data"], "size": [16, 16]}, "discriminator": {}, "loss": {},
       "generator": {"name": "sdm", "base_channels": 32, "multipliers": [1, 2], "num_res_blocks": 1,
                     "attention_strides": [2], "head_channels": 32, "spade_channels": 8}}
CPU = torch.device("cpu")


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_flops_of_an_image_are_those_of_the_whole_chain(guidance):
    config = check_config({**SDM, "diffusion": {"steps": 3, "guidance": guidance}}, "tiny")
    generator = build_network("generator", config, 12).eval()
    maps = bench.drawn_maps(1, 12, (16, 16), CPU)
    noise = diffusion.seeded_noise([0], (16, 16))
    chain = bench.flops(lambda: diffusion.sample(generator, maps, noise, steps=3, guidance=guidance))
    with torch.no_grad():
        assert bench.sampling_cost(bench.flops, generator, maps, config) == chain > 0
    result = bench.bench_sampling(config, CPU, batches=(1,), repeat=1)
    assert result["flops_per_image"] == chain and result["latency_seconds"] > 0
    assert bench.chain(result).startswith(f"3 steps at guidance {guidance:g}, extrapolated")


@pytest.mark.parametrize("given, networks", [(TINY, {"generator", "discriminator"}), (SDM, {"generator"})])
def test_parts_make_up_the_training_step(given, networks):
    result = bench.bench_training(check_config(given, "tiny"), CPU, steps=1)
    parts = result["share_of_step"]
    assert sum(parts.values()) == pytest.approx(1) and min(parts.values()) > 0 and set(result["parameters"]) == networks
    assert {f"{name} loss backward" for name in networks} | {"data wait", "generator forward", "optimizers"} <= set(parts)
    assert result["flops_per_step"] > 0


def test_growth_changes_one_thing_at_a_time():
    rows = bench.bench_growth(check_config(TINY, "tiny"), CPU, steps=1)
    base, *changed = [{name: row[name] for name in ("batch_size", "size", "classes")} for row in rows]
    assert [[name for name in base if row[name] != base[name]] for row in changed] == (
        [["batch_size"]] * 2 + [["size"]] * 2 + [["classes"]] * 2)
    assert min(row["seconds_per_step"] for row in rows) > 0


def test_official_code_missing(tmp_path):
    with pytest.raises(UserError, match="no models/models.py and no guided_diffusion; give the folder of a clone"):
        bench.bench_official(tmp_path)


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
