import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, error_line

import data
from backbones import Backbone
from config import UserError, check_config
from gan import GAN, build_network
from train import StepSampler


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(records):
    return [{k: v for k, v in r.items() if k[:2] in ("g_", "d_")} for r in records]


def test_sampler_gives_the_same_batches_however_many_processes():
    whole = list(StepSampler(10, 8, range(5), 0, 0, 1))
    halves = [list(StepSampler(10, 8, range(5), 0, rank, 2)) for rank in range(2)]
    assert whole == [a + b for a, b in zip(*halves)]
    assert list(StepSampler(10, 8, range(3, 5), 0, 0, 1)) == whole[3:]  # resuming
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


@pytest.mark.parametrize("processes, accumulation, diversity, tolerance", [(2, 1, 0, 1e-4), (0, 2, 0, 1e-4), (2, 1, 2, 0.02)])
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


@pytest.mark.parametrize("overrides, named", [
    (["train.step=5"], ["train.step", "train.steps"]),
    (["trian.steps=5"], ["trian", "train"]),
    (["train.steps=many"], ["train.steps", "many", "int"]),
    (["data.size=64"], ["data.size", "64"]),
    (["generator.name=biggan"], ["biggan", "dp_sims"]),
    (["generator.channel=3"], ["generator.channel", "generator.channels"]),
    (["backbone.conditioning=some"], ["some", "normalize"]),
    (["backbone.name=resnet5000"], ["resnet5000"]),
    (["backbone.weights=nowhere.pth"], ["nowhere.pth"]),
    (["data.size=[30, 32]"], ["data.size", "4"]),
    (["data.name=folder"], ["data."]),
    (["init_from=nowhere.pt"], ["nowhere.pt"]),
    (["eval.metric=fdd"], ["eval.metric", "fdd"]),
    (["train.batch_size=3", "train.accumulation=2"], ["train.batch_size", "3"]),
])
def test_bad_configuration_is_one_line_before_training(train, tiny_config, tmp_path, overrides, named):
    with pytest.raises(UserError) as error:
        train(tiny_config, *overrides)
    line = str(error.value)
    assert all(part in line for part in named) and "\n" not in line, line
    assert not (tmp_path / "runs").exists()


def test_errors_are_one_line_on_the_command_line(run, tiny_config):
    line = error_line(run("train.py", "--config", tiny_config, "train.step=5"))
    assert "train.step" in line and "train.steps" in line
    assert "nowhere.yaml" in error_line(run("train.py", "--config", "nowhere.yaml"))


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


def test_overfits_one_batch():
    """Trained on four scenes alone, the generator comes to paint them: per-pixel error well below that of class means."""
    config = check_config({**TINY, "loss": {"diversity": 0, "contrastive": 0, "perceptual": 10.0},
                           "train": {"batch_size": 4, "lr_generator": 2e-3, "lr_discriminator": 2e-3, "ema": 0.9}}, "tiny")
    dataset = data.build_dataset(config["data"], "train")
    gan = GAN(config, dataset.num_classes, torch.device("cpu"))
    image, label_map = (torch.stack(column) for column in zip(*(dataset[i] for i in range(4))))
    real = image.float() / 127.5 - 1
    gan.calibrate([real])
    with torch.no_grad():
        error = lambda: (gan.ema(label_map.long(), torch.zeros(4, 8)) - real).abs().mean().item()
        before = error()
    first = [gan.step(image, label_map, step, [0, 1, 2, 3]) for step in range(150)][0]
    last = gan.step(image, label_map, 150, [0, 1, 2, 3])
    with torch.no_grad():
        after = error()
    assert last["g_perceptual"] < 0.7 * first["g_perceptual"]
    assert after < 0.6 * before, (before, after)


def test_generator_learns_from_the_discriminator_and_the_backbone_does_not():
    config = check_config(TINY, "tiny")
    dataset = data.build_dataset(config["data"], "train")
    gan = GAN(config, dataset.num_classes, torch.device("cpu"))
    image, label_map = (torch.stack(column) for column in zip(*(dataset[i] for i in range(4))))
    gan.calibrate([image.float() / 127.5 - 1])
    forwards = {"generator": 0, "backbone": 0, "discriminator": 0}
    for name in forwards:
        getattr(gan, name).register_forward_hook(lambda *_, name=name: forwards.__setitem__(name, forwards[name] + 1))
    frozen = {k: v.clone() for k, v in gan.backbone.state_dict().items()}
    before = [p.clone() for p in gan.generator.parameters()]
    gan.step(image, label_map, 0, [0, 1, 2, 3])
    assert forwards == {"generator": 1, "backbone": 2, "discriminator": 2}  # nothing is computed twice
    moved = [not torch.equal(a, b) for a, b in zip(before, gan.generator.parameters())]
    assert all(moved), [n for (n, _), m in zip(gan.generator.named_parameters(), moved) if not m]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gan.d_parameters)
    assert all(torch.equal(v, frozen[k]) for k, v in gan.backbone.state_dict().items())


BFLOAT16 = torch.autocast


@pytest.mark.parametrize("changed", [
    {}, {"loss": {"diversity": 0, "perceptual": 1.0, "labelmix": 1.0}}, {"generator": {**TINY["generator"], "noise": "concat"}},
    {"generator": {"name": "oasis", "channels": 2}, "discriminator": {"name": "oasis", "channels": 2},
     "data": {**TINY["data"], "size": [64, 64]}}])
def test_a_step_under_autocast_is_close_to_float32(monkeypatch, changed):
    """The types that meet on a GPU, on a CPU."""
    config = check_config({**TINY, **changed}, "tiny")
    height, width = config["data"]["size"]
    image = torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8)
    label_map = torch.randint(0, 13, (4, height, width), dtype=torch.uint8)
    values = []
    for half in (False, True):
        trainer = GAN(config, 12, torch.device("cpu"))
        trainer.calibrate([image.float() / 127.5 - 1])
        if half:
            trainer.backbone = Backbone("tf_efficientnet_lite0", bf16=True)
            trainer.calibrate([image.float() / 127.5 - 1])
            monkeypatch.setattr(torch, "autocast", lambda kind, dtype=None, enabled=True: BFLOAT16(
                kind, torch.bfloat16, enabled=dtype is not None or enabled))
        values.append(trainer.step(image, label_map, 0, [0, 1, 2, 3]))
    assert values[0].keys() == values[1].keys() and len(values[0]) >= 3
    for name, value in values[0].items():
        assert values[1][name].float() == pytest.approx(value.item(), rel=0.1, abs=0.02), name
    assert any(values[1][name].float() != value for name, value in values[0].items())


@pytest.mark.slow
def test_compiled_networks_train_like_the_others(capsys):
    """One step: the losses of both networks go back through one compiled graph."""
    dataset = data.build_dataset(check_config(TINY, "tiny")["data"], "train")
    image, label_map = (torch.stack(column) for column in zip(*(dataset[i] for i in range(4))))
    values, gradients = [], []
    for compiled in (False, True):
        config = check_config({**TINY, "train": {"compile": compiled}}, "tiny")
        trainer = GAN(config, dataset.num_classes, torch.device("cpu"))
        trainer.calibrate([image.float() / 127.5 - 1])
        values.append(trainer.step(image, label_map, 0, [0, 1, 2, 3]))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.g_parameters + trainer.d_parameters]))
    assert "going on without it" not in capsys.readouterr().out  # wants a C++ compiler
    for name, value in values[0].items():
        assert values[1][name].item() == pytest.approx(value.item(), rel=1e-3), name
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("section, key, value", [
    ("train", "steps", 0), ("train", "betas", ["a", 0.9]), ("train", "betas", [0, 1]), ("train", "ema", 1.0),
    ("train", "lr_generator", -1.0), ("eval", "batch_size", 0), ("eval", "diversity_maps", 0), ("eval", "num_images", -5),
    ("data", "workers", -1), ("data", "calibration_images", 0), ("backbone", "input_scale", 0.0),
    ("backbone", "input_scale", 0.01), ("data", "load_scale", float("inf")), ("generator", "num_tokens", 0),
    ("discriminator", "channels", 0), ("loss", "contrastive_scales", 0),
    ("loss", "diversity_margin", ["a", "b", "c"]), ("loss", "contrastive_patches", 0)])
def test_values_that_cannot_work_are_refused(section, key, value):
    with pytest.raises(UserError, match=rf"^mine.yaml: {section}\.{key} is .*; "):
        check_config({section: {key: value}}, "mine.yaml")


@pytest.mark.parametrize("arguments, message", [
    ({"noise": "crossattention"}, "generator.noise"), ({"channels": []}, "generator.channels"),
    ({"channels": ["a"]}, "generator.channels"), ({"channels": [200, 200], "attention_scales": 1}, "multiple of 64")])
def test_networks_refuse_what_they_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        build_network("generator", check_config({"generator": arguments}, "mine.yaml"), 12)


def test_a_resumed_run_may_name_another_judge(train, tiny_config, tmp_path):
    train(tiny_config, "train.steps=2")
    train(tiny_config, "train.steps=4", "eval.metric=miou", "eval.features=stlpips_alex", resume=True)
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert "fd_stlpips_alex" in lines[1] and "fd_stlpips_alex" not in lines[0]


def test_sizes_that_do_not_fit_are_refused_before_a_run_is_made(train, tiny_config, tmp_path):
    with pytest.raises(UserError, match="both must be multiples of 64 for this discriminator"):
        train(tiny_config, "discriminator={name: oasis, channels: 2}")
    assert not (tmp_path / "runs/tiny").exists()
