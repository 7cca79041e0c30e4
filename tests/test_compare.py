"""compare.py on runs written by hand, whose figures are known, and on one that is trained."""

import argparse
import csv
import json
import os
import random
import re
import signal
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, in_child, write_checkpoint
from matplotlib.figure import Figure
from PIL import Image

import compare
import plots
from checkpoint import load_generator
from config import UserError, check_settings
from dataset import build_dataset
from distributed import hold

PROTOCOL = {"num_images": 8, "features": {"network": "a"}, "segmenter": {"sha256": "s"}, "kid": {"subsets": 1}}


def write_run(folder: Path, metrics: list, losses=(), seed=0, protocol=PROTOCOL, **sections) -> Path:
    """A folder as train.py leaves it; `sections` are added to those of TINY."""
    given = TINY | {"name": folder.name, "seed": seed} | {key: TINY.get(key, {}) | sections[key] for key in sections}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(check_settings(given, "test").model_dump(mode="json")))
    metrics = [{**record, "protocol": {**protocol, "seed": seed}} for record in metrics]
    for name, records in {"metrics.jsonl": metrics, "log.jsonl": losses}.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def call(*folders: Path, **options):
    none = {"run": None, "print": False, "step": None, "metric": None, "out": None, "time": False}
    compare.main(argparse.Namespace(runs=list(folders), **{**none, **options}))


def rows_of(text: str) -> dict[tuple[str, str], dict]:
    """The rows of a Markdown table, by their first two columns."""
    lines = [list(map(str.strip, line.strip("|").split("|"))) for line in text.splitlines() if line.startswith("|")]
    return {tuple(line[:2]): dict(zip(lines[0], line)) for line in lines[2:]}


@pytest.fixture
def four_runs(tmp_path):
    """Two seeds of each of two settings; the fourth run has not been evaluated at step 4."""
    distances = {"a_0": (100.0, 90.0), "a_1": (120.0, 95.5), "b_0": (80.0, 85.0), "b_1": (70.0,)}
    return [write_run(tmp_path / "runs" / name, [{"step": step, "fd_tf_efficientnet_lite2": value, "miou": value / 1000,
                                                  "class_iou": {"car": 0.5}, "minutes": step / 2}
                                                 for step, value in zip((2, 4), values)],
                      [{"step": step, "g_pixel": step * 1.5, "d_real": 1.0, "images_per_second": 4.0,
                        "lr_generator": 1e-4, "minutes": step / 2} for step in (1, 2, 3, 4)],
                      seed=int(name[2]), loss={"contrastive": 0.3 if name[0] == "a" else 0})
            for name, values in distances.items()]


def test_table_has_means_and_deviations_of_seeds(four_runs, tmp_path, capsys):
    call(*four_runs, step=4, out=tmp_path / "out")
    said = capsys.readouterr().out
    rows = rows_of(said)
    fd = {key: row["fd_tf_efficientnet_lite2 ↓"] for key, row in rows.items()}
    two = f"{statistics.mean((90, 95.5)):.2f} ± {statistics.stdev((90, 95.5)):.2f}"
    assert fd[("last", "a")] == fd[("best", "a")] == fd[("4", "a")] == two
    assert fd[("last", "b")] == f"77.50 ± {statistics.stdev((85, 70)):.2f}" and rows[("last", "b")]["step"] == "2 to 4"
    assert fd[("best", "b")] == f"75.00 ± {statistics.stdev((80, 70)):.2f}" and rows[("best", "b")]["step"] == "2"
    assert fd[("4", "b")] == "85.00 (n=1)"
    assert rows[("last", "b")]["changed"] == "loss.contrastive=0.0" and rows[("last", "a")]["changed"] == ""
    assert "runs/b_1: stopped at step 4 of 4" in said  # trained, but the last evaluation is missing
    assert "where a row does not say: loss.contrastive=0.3" in said and "best: by fd_tf_efficientnet_lite2" in said
    with open(tmp_path / "out/table.csv", newline="") as file:
        table = {(row["at"], row["row"]): row for row in csv.DictReader(file)}
    assert float(table[("last", "b")]["fd_tf_efficientnet_lite2 std"]) == pytest.approx(statistics.stdev((85, 70)))
    assert table[("4", "b")]["fd_tf_efficientnet_lite2 std"] == "" and table[("4", "b")]["class_iou.car n"] == "1"
    latex = (tmp_path / "out/table.tex").read_text()
    assert not re.search(r"(?<!\\)_", latex)
    assert {line.count(" & ") for line in latex.splitlines() if "&" in line} == {8}
    assert rows_of((tmp_path / "out/table.md").read_text()) == rows_of(said)
    call(*four_runs, metric="miou")  # of which more is better
    assert rows_of(capsys.readouterr().out)["best", "a"]["miou ↑"] == f"0.1100 ± {statistics.stdev((0.1, 0.12)):.4f}"


def test_other_protocols_get_other_columns(four_runs, tmp_path, capsys):
    other = PROTOCOL | {"segmenter": {"sha256": "t"}, "diffusion": {"steps": 4}}
    metrics = [{"step": 4, "fd_tf_efficientnet_lite2": 60.0, "miou": 0.4}]
    call(*four_runs, write_run(tmp_path / "runs/c", metrics, protocol=other, loss={"diversity": 0}))
    said = capsys.readouterr().out
    a, c = (rows_of(said)["last", name] for name in "ac")
    assert c["miou (1) ↑"] == "-" and c["miou (2) ↑"] == "0.4000" and a["miou (2) ↑"] == "-"
    assert c["fd_tf_efficientnet_lite2 ↓"] == "60.00" and c["minutes"] == "-"  # of an older run
    assert "miou: in columns (1), (2) ..., as protocol.segmenter.sha256 differs" in said


def test_what_cannot_be_compared_is_said(four_runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    new = write_run(tmp_path / "runs/new", [], seed=2)
    camvid = write_run(tmp_path / "runs/camvid", [], data={"name": "folder", "root": "x", "classes": 3})
    with hold(new / "lock"):
        call(*four_runs[:1], tmp_path / "empty", tmp_path / "none", new, camvid)
    said = capsys.readouterr().out
    assert "new: in training at step 0 of 4; no evaluation yet" in said
    assert "empty: no run; " in said and "none: no run; " in said and "camvid: another data set than " in said
    with pytest.raises(UserError, match="such as runs/NAME; left out"):
        call(tmp_path / "empty")


def test_curves_are_means_in_bands():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 400))
    curves = [{step + 1: (step / 2, row[step]) for step in range(400)} for row in values]
    panel = Figure().subplots()
    plots.draw_group(panel, curves, {"color": "#0072B2"})
    mean = panel.lines[-1].get_xydata()
    parts = values.reshape(3, 100, 4).mean(2)  # each point is the mean of four steps
    assert np.allclose(mean[:, 1], parts.mean(0))
    assert np.allclose(mean[:, 0], np.arange(400).reshape(100, 4).mean(1) / 2)
    edges = panel.collections[0].get_paths()[0].vertices
    assert edges[:, 1].max() == pytest.approx((parts.mean(0) + parts.std(0, ddof=1)).max())


def test_curves_show_metrics_and_losses(four_runs, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda panel, title, **options: titles.append(title))
    records = [plots.read_records(four_runs[0] / f"{name}.jsonl") for name in ("metrics", "log")]
    plots.draw_curves({"a": [sum(records, [])]}, tmp_path / "curves.png", "minutes")
    assert titles == ["fd_tf_efficientnet_lite2", "miou", "g_pixel", "d_real"]
    with open(four_runs[0] / "log.jsonl", "a") as file:
        file.write('{"step": 5, "g_pi')  # killed while it wrote
    assert plots.read_records(four_runs[0] / "log.jsonl") == records[1]


def test_pictures_are_those_of_the_generators(train, tiny_config, tmp_path):
    train(tiny_config, "name=a", "train.steps=1", "eval.num_images=4", "eval.diversity_samples=0")
    other = write_run(tmp_path / "runs/b", [])
    write_checkpoint(other / "checkpoints/latest.pt")
    runs, _ = compare.read_runs([Path("runs/a"), other, write_run(tmp_path / "runs/none", [])])
    notes = compare.draw_pictures(runs, tmp_path / "pictures.png", None, count=3)
    assert len(notes) == 1 and "runs/none/checkpoints/latest.pt" in notes[0]
    sheet = np.asarray(Image.open(tmp_path / "pictures.png")).reshape(4, 16 + 128, 3, 128, 3)[:, 16:].swapaxes(1, 2)
    dataset = build_dataset(runs[0].settings.data, "val")
    index = compare.evenly_spaced(len(dataset), 3)[2]
    image, label_map = dataset[index]
    assert (sheet[1, 2, ::4, ::4] == image.permute(1, 2, 0).numpy()).all()
    seed = int(np.random.SeedSequence([0, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    z = torch.from_numpy(np.random.default_rng((seed, 0)).standard_normal(8, dtype=np.float32))[None]
    for row, run in enumerate(runs[:2], 2):
        _, generator, _ = load_generator(run.folder / "checkpoints/latest.pt")
        with torch.no_grad():
            picture = (generator(label_map[None].long(), z)[0] + 1) * 127.5
        assert np.abs(sheet[row, 2, ::4, ::4] - picture.permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-2  # rounded


TRAINING = """
import fcntl, json, os, shutil, sys, time
given = dict(argument.split("=", 1) for argument in sys.argv if "=" in argument)
name, steps = given["name"], int(given["train.steps"])
run = "runs/" + name
lock = open(run + "/lock", "a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("error: another process trains it")
if not os.path.exists(run + "/metrics.jsonl"):
    shutil.copy(f"settings/{name}.yaml", run + "/copy")
    os.replace(run + "/copy", run + "/config.yaml")
    time.sleep(0.05 * steps)
    with open(run + "/metrics.jsonl", "a") as out:
        out.write(json.dumps({"step": steps, "fd_tf_efficientnet_lite2": 9.0, "protocol": {}}) + "\\n")
"""


@pytest.fixture
def ablation(tmp_path, monkeypatch, tiny_config) -> Path:
    """Three rows with two seeds each, and a script in the place of train.py that only takes time."""
    (tmp_path / "training.py").write_text(TRAINING)
    monkeypatch.setattr(compare, "TRAIN", tmp_path / "training.py")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "abl.yaml"
    rows = {"full": [], "no_contrastive": ["loss.contrastive=0"], "concat": ["generator.noise=concat"]}
    given = {"base": str(tiny_config), "changes": ["train.steps=18"], "rows": rows, "seeds": [0, 1], "at_once": 2}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    Path("settings").mkdir()
    for folder, (settings, _) in compare.plan_ablation(path)[1].items():
        Path(f"settings/{folder.name}.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return path


def test_kills_lose_nothing_and_run_nothing_twice(ablation, tmp_path):
    """Of compare.py alone, whose trainings go on, or of all; two of them always run at the same time."""
    random.seed(0)
    killed = 0
    for kill in range(6):
        both = [in_child(tmp_path, lambda: call(run=ablation)) for _ in range(2)]
        time.sleep(random.uniform(0.05, 0.5))
        for process in both:
            send = os.killpg if kill % 3 == 0 else os.kill  # with its trainings, or alone
            killed += process.is_alive()
            if process.is_alive():
                send(process.pid, signal.SIGTERM if kill % 3 == 1 else signal.SIGKILL)
            process.join(30)
            assert process.exitcode is not None
    both = [in_child(tmp_path, lambda: call(run=ablation)) for _ in range(2)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0, (tmp_path / "out.txt").read_text()
    runs = [tmp_path / f"runs/abl_{row}_{seed}" for row in ("full", "no_contrastive", "concat") for seed in (0, 1)]
    assert all(len((run / "metrics.jsonl").read_text().splitlines()) == 1 for run in runs) and killed >= 3
    assert (tmp_path / "out.txt").read_text().count("| last | abl_") >= 2 * 3  # a table each


def test_a_failed_run_is_named_the_others_go_on_and_rows_keep_their_meaning(ablation, tmp_path, capsys):
    call(run=ablation, print=True)  # commands for a scheduler
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and not (tmp_path / "runs").exists()
    assert lines[2].endswith("train.steps=18 loss.contrastive=0 seed=0 name=abl_no_contrastive_0 --resume")
    fails = "if 'concat' in run: sys.exit('error: no memory')\n"
    (tmp_path / "training.py").write_text(TRAINING.replace("if not os", fails + "if not os"))
    process = in_child(tmp_path, lambda: call(run=ablation))
    process.join(60)
    said = (tmp_path / "out.txt").read_text()
    assert process.exitcode == 0 and said.count("not finished, error: no memory") == 2 and said.count(": done") == 4
    call(run=ablation, print=True)
    assert capsys.readouterr().out.splitlines() == lines[4:]
    ablation.write_text(ablation.read_text().replace("loss.contrastive=0", "loss.contrastive=0.1"))
    with pytest.raises(UserError, match=r"no_contrastive_0/config.yaml: loss.contrastive is 0.0, in .*abl.yaml 0.1; "):
        call(run=ablation)


def test_the_comparisons_of_the_results_are_files(tmp_path, monkeypatch):
    for name in ("config.yaml", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)  # where there are no runs
    for name, runs, said in (("ablation", 28, "backbone.pretrained=false"), ("quickstart", 6, "generator.texture=false"),
                             ("systems", 6, "configs/oasis_camvid.yaml")):
        _, plan = compare.plan_ablation(Path(f"configs/{name}.yaml"))
        assert len(plan) == runs and sum(said in command for _, command in plan.values()) == 2
