import json
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, error_line

from config import UserError
from distributed import hold
from train import batches


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(records):
    return [{k: v for k, v in r.items() if k[:2] in ("g_", "d_")} for r in records]


def test_batches_are_the_same_however_many_processes():
    whole = list(batches(10, 8, range(5), range(8), seed=0))
    halves = [list(batches(10, 8, range(5), places, seed=0)) for places in (range(4), range(4, 8))]
    assert whole == [a + b for a, b in zip(*halves)]
    assert list(batches(10, 8, range(3, 5), range(8), seed=0)) == whole[3:]  # resuming
    indices = [index for batch in whole for index, _ in batch]
    assert all(sorted(indices[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))  # every epoch shows all
    assert [draw for batch in whole for _, draw in batch] == list(range(40))


def test_run_folder_and_exact_resume(train, tiny_config, tmp_path):
    """Steps 3 to 6 of a run stopped at 2 equal those of an unbroken run bit for bit; a run is never overwritten."""
    train(tiny_config, "name=whole", "train.steps=6")
    train(tiny_config, "name=parts", "train.steps=2")
    with pytest.raises(UserError, match="--resume"):
        train(tiny_config, "name=parts", "train.steps=6")
    with pytest.raises(UserError, match="has reached step 2; raise train.steps"):
        train(tiny_config, "name=parts", "train.steps=1", resume=True)
    with pytest.raises(UserError, match=r"data.size is \[32, 32\], now \[64, 64\]"):
        train(tiny_config, "name=parts", "train.steps=6", "data.size=[64, 64]", resume=True)
    train(tiny_config, "name=parts", "train.steps=6", "data.workers=1", resume=True)
    logs = [read_log(tmp_path / "runs" / name) for name in ("whole", "parts")]
    assert [r["step"] for r in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert losses_of(logs[0]) == losses_of(logs[1])
    assert {"images_per_second", "lr_generator", "lr_discriminator", "peak_memory_gib"} <= set(logs[0][0])
    folder = tmp_path / "runs" / "whole"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "0000002.pt", "0000004.pt", "0000006.pt", "best.pt", "latest.pt"]
    assert (folder / "samples" / "0000006.png").stat().st_size > 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["loss"]["focal_gamma"] == 2.0
    states = [torch.load(tmp_path / "runs" / n / "checkpoints/latest.pt", weights_only=True) for n in ("whole", "parts")]
    assert all(torch.equal(states[0]["ema"][k], states[1]["ema"][k]) for k in states[0]["ema"])
    assert not any("network" in key for key in states[0]["statistics"])  # the backbone is not in the checkpoint
    train(tiny_config, "name=tuned", "train.steps=1", "train.lr_generator=0", f"init_from={folder}/checkpoints/latest.pt")
    tuned = torch.load(tmp_path / "runs/tuned/checkpoints/latest.pt", weights_only=True)
    assert all(torch.equal(tuned["generator"][k], states[0]["generator"][k]) for k in tuned["generator"])


@pytest.mark.parametrize("processes, accumulation, diversity, tolerance",
                         [(2, 1, 0, 1e-4), (0, 2, 0, 1e-4), (2, 1, 2, 0.02)])
def test_shared_batch_gives_the_gradient_of_the_whole(run, train, tiny_config, tmp_path, processes, accumulation, diversity,
                                                      tolerance):
    """Two processes, or two rounds, of 4 images against one of 8. Adam's first moment is the gradient itself, as its
    beta is 0. In the diversity loss the sign of a difference near 0 hangs on rounding."""
    options = ["train.steps=1", "train.batch_size=8", f"loss.diversity={diversity}"]
    train(tiny_config, "name=one", *options)
    two = run("train.py", "--config", tiny_config, "name=two", f"train.accumulation={accumulation}", *options,
              processes=processes)
    assert two.returncode == 0, two.stderr
    one, two = (torch.load(tmp_path / "runs" / n / "checkpoints/latest.pt", weights_only=True) for n in ("one", "two"))
    for optimizer in ("g_optimizer", "d_optimizer"):
        for i, state in one[optimizer]["state"].items():
            reference, other = state["exp_avg"], two[optimizer]["state"][i]["exp_avg"]
            assert torch.allclose(reference, other, rtol=0, atol=tolerance * reference.abs().max())
    logs = [losses_of(read_log(tmp_path / "runs" / name)) for name in ("one", "two")]
    assert all(np.isclose(logs[0][0][k], logs[1][0][k], rtol=1e-4, atol=1e-6) for k in logs[0][0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(tiny_config, tmp_path, number):
    """The signal reaches the loading processes too, as it does from a terminal or a cluster."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--config", tiny_config, "train.steps=100000",
                                "train.save_every=0", "data.workers=2"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    log = tmp_path / "runs/tiny/log.jsonl"
    limit = time.monotonic() + 240
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert time.monotonic() < limit, "it did not start to train"
        time.sleep(0.1)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    state = torch.load(tmp_path / "runs/tiny/checkpoints/latest.pt", weights_only=True)
    assert state["step"] >= 2 and f"stopped at step {state['step']}" in output


def test_non_finite_loss_stops_with_its_name_and_keeps_the_last_checkpoint(train, tiny_config, tmp_path):
    train(tiny_config, "train.steps=2")
    with pytest.raises(UserError, match=r"runs/tiny: [gd]_\w+ is nan at step \d+; .*lr_generator"):
        train(tiny_config, "train.steps=8", "train.lr_generator=1e30", resume=True)
    state = torch.load(tmp_path / "runs/tiny/checkpoints/latest.pt", weights_only=True)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["ema"].values() if v.is_floating_point())


def test_checkpoint_of_another_class_count(train, tiny_config, tmp_path, folder_data):
    train(tiny_config, "name=scenes", "train.steps=1")
    with pytest.raises(UserError, match="latest.pt.* 12 classes.* 3;"):
        train(tiny_config, "name=other", "init_from=runs/scenes/checkpoints/latest.pt", "data.name=folder",
              f"data.root={folder_data}", "data.classes=3", "data.void=255")
    assert not (tmp_path / "runs/other").exists()


def test_folder_data_set_with_a_bad_label_stops_before_training(train, tiny_config, tmp_path, folder_data):
    options = ["data.name=folder", f"data.root={folder_data}", "data.classes=3", "train.steps=1"]
    with pytest.raises(UserError, match=r"\.png.*255"):  # it occurs and is not declared void
        train(tiny_config, *options)
    assert not (tmp_path / "runs").exists()
    train(tiny_config, *options, "data.void=255")


def test_a_resumed_run_may_name_another_judge(train, tiny_config, tmp_path):
    train(tiny_config, "train.steps=2")
    train(tiny_config, "train.steps=4", "eval.metric=miou", "eval.features=stlpips_alex", resume=True)
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert "fd_stlpips_alex" in lines[1] and "fd_stlpips_alex" not in lines[0]


def test_sizes_that_do_not_fit_are_refused_before_a_run_is_made(train, tiny_config, tmp_path):
    with pytest.raises(UserError, match="both must be multiples of 64 for this discriminator"):
        train(tiny_config, "discriminator={name: oasis, channels: 2}")
    assert not (tmp_path / "runs/tiny").exists()


def test_a_process_that_never_comes_ends_the_wait(run, tiny_config, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29876}.items():
        monkeypatch.setenv(name, str(value))
    line = error_line(run("train.py", "--config", tiny_config, "train.timeout=0.02"))
    assert line.startswith("error: process 0 did not meet all 2 processes within 0.02 minutes (train.timeout): ")


def test_a_run_has_one_training(train, tiny_config, tmp_path):
    train(tiny_config, "train.steps=1")
    with hold(tmp_path / "runs/tiny/lock"), pytest.raises(UserError, match="runs/tiny: another process trains it; wait"):
        train(tiny_config, "train.steps=2", resume=True)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_trackers_get_the_log_and_nobody_else_does(train, tiny_config, tmp_path, monkeypatch, tracker):
    """Stand-ins of the two packages, as far as they are called."""
    got = []
    modules = {"tensorboard": {"torch.utils.tensorboard": types.SimpleNamespace(SummaryWriter=lambda run, purge_step: (
        types.SimpleNamespace(add_scalar=lambda key, value, step: got.append((step, key)))))},
        "wandb": {"wandb": types.SimpleNamespace(init=lambda **options: got.append(options["id"]), log=lambda numbers, step: (
            got.extend((step, key) for key in numbers)))}}[tracker]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with monkeypatch.context() as found:
        found.setattr("train.find_spec", lambda name: None)
        with pytest.raises(UserError, match=f"train.tracker is {tracker}, which is not installed; pip install {tracker}"):
            train(tiny_config, "name=missing", f"train.tracker={tracker}")
    monkeypatch.setattr("train.find_spec", lambda name: name)
    train(tiny_config, "name=silent", "train.steps=1")
    assert got == []
    train(tiny_config, "name=told", "train.steps=1", f"train.tracker={tracker}")
    assert {(1, "g_pixel"), (1, "miou"), (1, "lr_generator")} <= set(got)
