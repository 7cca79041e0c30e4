import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import together

from config import UserError
from distributed import hold
from plots import read_records
from train import batches


def losses_of(records):
    return [{k: v for k, v in r.items() if k[:2] in ("g_", "d_")} for r in records]


def latest(folder):
    return torch.load(folder / "checkpoints/latest.pt", weights_only=True)


def test_batches_are_the_same_however_many_processes():
    whole = list(batches(10, 8, range(5), range(8), seed=0))
    halves = [list(batches(10, 8, range(5), places, seed=0)) for places in (range(4), range(4, 8))]
    assert whole == [a + b for a, b in zip(*halves)]
    assert list(batches(10, 8, range(3, 5), range(8), seed=0)) == whole[3:]  # resuming
    indices = [index for batch in whole for index, _ in batch]
    assert all(sorted(indices[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))  # every epoch shows all
    assert [draw for batch in whole for _, draw in batch] == list(range(40))


def test_run_folder_and_exact_resume(train, tiny_config, tmp_path, capsys):
    """Steps 3 and 4 of a run stopped at 2 equal those of an unbroken run bit for bit; a run is never overwritten."""
    whole, parts = (tmp_path / "runs" / name for name in ("whole", "parts"))
    train(tiny_config, "name=whole")
    train(tiny_config, "name=parts", "train.steps=2")
    for options, resume, message in [
            ([], False, "runs/parts exists; go on with --resume"),
            (["train.steps=1"], True, "has reached step 2; raise train.steps"),
            (["data.size=[64, 64]"], True, r"data.size is \[32, 32\], now \[64, 64\]")]:
        with pytest.raises(UserError, match=message):
            train(tiny_config, "name=parts", *options, resume=resume)
    with hold(parts / "lock"), pytest.raises(UserError, match="runs/parts: another process trains it; wait"):
        train(tiny_config, "name=parts", resume=True)
    train(tiny_config, "name=parts", "data.workers=1", "eval.metric=miou", "eval.features=stlpips_alex", resume=True)
    assert "runs/parts: with another eval.metric, eval.features from step 2 on; " in capsys.readouterr().out
    assert yaml.safe_load((parts / "config_until_0000002.yaml").read_text())["eval"]["features"] == "tf_efficientnet_lite2"
    logs = [read_records(run / "log.jsonl") for run in (whole, parts)]
    assert [r["step"] for r in logs[1]] == [1, 2, 3, 4] and losses_of(logs[0]) == losses_of(logs[1])
    assert {"images_per_second", "lr_generator", "lr_discriminator", "peak_memory_gib"} <= set(logs[0][0])
    assert ["fd_stlpips_alex" in record for record in read_records(parts / "metrics.jsonl")] == [False, True]  # another judge
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["0000002.pt", "0000004.pt", "best.pt", "latest.pt"]
    torch.testing.assert_close(latest(whole)["ema"], latest(parts)["ema"], rtol=0, atol=0)
    shutil.copyfile(whole / "checkpoints/0000002.pt", whole / "checkpoints/latest.pt")  # back to an older step
    train(tiny_config, "name=whole", "train.steps=3", "train.save_every=1", "train.keep=1", resume=True)
    steps = {p.name: torch.load(p, weights_only=True)["step"] for p in (whole / "checkpoints").iterdir()}
    assert steps == {"0000003.pt": 3, "latest.pt": 3, "best.pt": steps["best.pt"]}
    written = (whole / "config.yaml").read_text()
    train(tiny_config, "name=whole", "train.steps=3", "loss.rough=0.5", resume=True)
    assert "has reached step 3; raise train.steps to go on" in capsys.readouterr().out
    assert (whole / "config.yaml").read_text() == written  # of what was used


@pytest.mark.parametrize("processes, accumulation, diversity, tolerance",
                         [(2, 1, 0, 1e-4), (1, 2, 0, 1e-4), (2, 1, 2, 0.02)])
def test_shared_batch_gives_the_gradient_of_the_whole(train, tiny_config, tmp_path, monkeypatch, processes, accumulation,
                                                      diversity, tolerance):
    """Two processes, or two rounds, of 4 images against one of 8. Adam's first moment is the gradient itself, as its
    beta is 0. Activations are made smooth: at a kink near 0 rounding decides, which changes a gradient by a thousandth of its
    largest value. The diversity loss keeps its kinks, the signs of differences, and so has the larger tolerance."""
    for activation in ("relu", "leaky_relu", "hardtanh"):
        monkeypatch.setattr(F, activation, lambda x, *_, **__: F.silu(x))
    options = ["train.steps=1", "train.batch_size=8", f"loss.diversity={diversity}"]
    train(tiny_config, "name=one", *options)
    together(tmp_path, processes, train, tiny_config, "name=two", f"train.accumulation={accumulation}", *options)
    folders = [tmp_path / "runs" / name for name in ("one", "two")]
    one, two = map(latest, folders)
    for optimizer in ("g_optimizer", "d_optimizer"):
        for i, state in one[optimizer]["state"].items():
            reference, other = state["exp_avg"], two[optimizer]["state"][i]["exp_avg"]
            assert torch.allclose(reference, other, rtol=0, atol=tolerance * reference.abs().max())
    logs = [losses_of(read_records(folder / "log.jsonl"))[0] for folder in folders]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-6)


def test_non_finite_loss_stops_with_its_name_and_keeps_the_last_checkpoint(train, tiny_config, tmp_path):
    train(tiny_config, "train.steps=2")
    with pytest.raises(UserError, match=r"runs/tiny: [gd]_\w+ is nan at or before step \d+; .*lr_generator"):
        train(tiny_config, "train.steps=8", "train.lr_generator=1e30", resume=True)
    state = latest(tmp_path / "runs/tiny")
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["ema"].values() if v.is_floating_point())


def test_fine_tuning_and_a_folder_of_ones_own(train, tiny_config, tmp_path, folder_data):
    """It starts from the networks of a checkpoint, of as many classes; a bad label map stops it before a run is made."""
    train(tiny_config, "train.steps=1")
    source = "init_from=runs/tiny/checkpoints/latest.pt"
    train(tiny_config, "name=tuned", "train.steps=1", "train.lr_generator=0", source)
    before, tuned = (latest(tmp_path / "runs" / name)["generator"] for name in ("tiny", "tuned"))
    torch.testing.assert_close(tuned, before, rtol=0, atol=0)
    averages = [latest(tmp_path / "runs" / name)["ema"] for name in ("tiny", "tuned")]  # the latter goes on from the former
    for name, average in averages[1].items():
        torch.testing.assert_close(average, 0.999 * averages[0][name] + 0.001 * before[name])
    train(tiny_config, "name=larger", "train.steps=1", "data.size=64", source)  # the contrastive loss sees other scales
    margins = [latest(tmp_path / "runs" / name)["real_distances"] for name in ("tiny", "tuned", "larger")]
    assert torch.equal(margins[0], margins[1]) and not torch.equal(margins[0], margins[2])
    own = ["name=own", "train.steps=1", "data.name=folder", f"data.root={folder_data}", "data.classes=3"]
    with pytest.raises(UserError, match=r"\.png.*255"):  # it occurs and is not declared void
        train(tiny_config, *own)
    with pytest.raises(UserError, match="latest.pt: its 12 classes are .* now there are 3, "):
        train(tiny_config, *own, "data.void=255", source)
    assert not (tmp_path / "runs/own").exists()
    train(tiny_config, *own, "data.void=255")


def test_a_process_that_never_comes_ends_the_wait(train, tiny_config, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29876}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"^process 0 did not meet all 2 processes; it waits for 0.02 minutes at most \(train"):
        train(tiny_config, "train.timeout=0.02")


@pytest.mark.parametrize("tracker, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_trackers_get_the_log(train, tiny_config, monkeypatch, tracker, module):
    """A stand-in of the package, as far as it is called."""
    got = set()
    events = SimpleNamespace(add_scalar=lambda key, value, step: got.add((key, step)))
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(
        SummaryWriter=lambda run, purge_step: events,
        init=lambda **options: None, log=lambda numbers, step: got.update((key, step) for key in numbers)))
    monkeypatch.setattr("train.find_spec", lambda name: name)
    train(tiny_config, "train.steps=1", f"train.tracker={tracker}")
    assert {("g_pixel", 1), ("miou", 1), ("lr_generator", 1)} <= got
