"""compare.py on runs written by hand, whose figures are known, and on one that is trained."""

import argparse
import csv
import fcntl
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, in_child, write_checkpoint
from matplotlib.figure import Figure
from PIL import Image
from test_faults import wait_for

import compare
import plots
import scenes
from checkpoint import load_generator
from config import UserError, check_settings
from distributed import hold

PROTOCOL = {"num_images": 8, "features": {"network": "a"}, "segmenter": {"sha256": "s"}, "kid": {"subsets": 1}}


def write_run(folder: Path, metrics: list, losses=(), seed=0, protocol=PROTOCOL, **sections) -> Path:
    """A folder as train.py leaves it; `sections` are added to those of TINY."""
    given = TINY | {"name": folder.name, "seed": seed} | {key: TINY.get(key, {}) | sections[key] for key in sections}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(check_settings(given, "test").model_dump(mode="json")))
    metrics = [{**record, "protocol": {**protocol, "seed": seed}} for record in metrics]
    for name, records in {"metrics.jsonl": metrics, "log.jsonl": losses}.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / name).write_text("".join(lines) + '{"step": 5, "g_pi')  # killed while it wrote
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


def test_table_has_means_and_deviations_of_seeds(four_runs, tmp_path, capsys, monkeypatch):
    panels = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda panel, title, **options: panels.append(title))
    call(*four_runs, step=4, out=tmp_path / "out", time=True)
    assert panels == ["fd_tf_efficientnet_lite2", "miou", "g_pixel", "d_real"]  # of the curves
    said = capsys.readouterr().out
    rows = rows_of(said)
    of = lambda *values: f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert {key: row["fd_tf_efficientnet_lite2 ↓"] for key, row in rows.items()} == {
        ("last", "a"): of(90, 95.5), ("best", "a"): of(90, 95.5), ("4", "a"): of(90, 95.5),
        ("last", "b"): of(85, 70), ("best", "b"): of(80, 70), ("4", "b"): "85.00 (n=1)"}
    assert rows["last", "b"]["step"] == "2 to 4" and rows["best", "b"]["step"] == "2"
    assert rows["last", "b"]["changed"] == "loss.contrastive=0.0" and rows["last", "a"]["changed"] == ""
    assert "where a row does not say: loss.contrastive=0.3" in said and "best: by fd_tf_efficientnet_lite2" in said
    assert "runs/b_1: stopped at step 4 of 4" in said  # trained, but the last evaluation is missing
    with open(tmp_path / "out/table.csv", newline="") as file:
        table = {(row["at"], row["row"]): row for row in csv.DictReader(file)}
    assert float(table["last", "b"]["fd_tf_efficientnet_lite2 std"]) == pytest.approx(statistics.stdev((85, 70)))
    assert table["4", "b"]["fd_tf_efficientnet_lite2 std"] == "" and table["4", "b"]["class_iou.car n"] == "1"
    latex = (tmp_path / "out/table.tex").read_text()
    assert r" & fd\_tf\_efficientnet\_lite2 $\downarrow$ & " in latex and r" & 2 to 4 & 77.50 $\pm$ 10.61 & " in latex
    assert "\n% where a row does not say: loss.contrastive=0.3" in latex
    assert rows_of((tmp_path / "out/table.md").read_text()) == rows
    call(*four_runs, metric="miou")  # of which more is better
    assert rows_of(capsys.readouterr().out)["best", "a"]["miou ↑"] == f"0.1100 ± {statistics.stdev((0.1, 0.12)):.4f}"


def test_other_protocols_get_other_columns(four_runs, tmp_path, capsys):
    other = PROTOCOL | {"segmenter": {"sha256": "t", "name": "another.pt"}}
    metrics = [{"step": 4, "fd_tf_efficientnet_lite2": 60.0, "miou": 0.4}]
    call(*four_runs, write_run(tmp_path / "runs/c", metrics, protocol=other, loss={"diversity": 0}))
    said = capsys.readouterr().out
    a, c = (rows_of(said)["last", name] for name in "ac")
    assert c["miou (1) ↑"] == "-" and c["miou (2) ↑"] == "0.4000" and a["miou (2) ↑"] == "-"
    assert c["fd_tf_efficientnet_lite2 ↓"] == "60.00" and c["minutes"] == "-"  # of an older run
    assert "miou: in columns (1), (2) ..., as protocol.segmenter.sha256 differs" in said


def test_what_cannot_be_compared_is_said(four_runs, tmp_path, capsys):
    new = write_run(tmp_path / "runs/new", [], seed=2)
    camvid = write_run(tmp_path / "runs/camvid", [], data={"name": "folder", "root": "x", "classes": 3})
    with hold(new / "lock"):
        call(*four_runs[:1], tmp_path / "none", new, camvid)
    said = capsys.readouterr().out
    assert "new: in training at step 0 of 4; no evaluation yet" in said
    assert "none: no run; " in said and "camvid: another data set than " in said
    places = {10: "/x/camvid", 11: "/y/camvid", 12: "/y/other"}  # the first two are the same data, on two machines
    call(*(write_run(tmp_path / f"runs/m_{seed}", [{"step": 4, "miou": 0.5}], seed=seed,
                     data={"root": root, "workers": seed}) for seed, root in places.items()))
    said = capsys.readouterr().out
    assert rows_of(said)["last", "m"]["runs"] == "2" and "m_12: another data set than " in said


def test_curves_are_means_in_bands():
    values = np.random.default_rng(0).normal(size=(3, 400))
    curves = [{step + 1: (step / 2, row[step]) for step in range(400)} for row in values]
    panel = Figure().subplots()
    plots.draw_group(panel, curves, {"color": "#0072B2"})
    xs, parts = np.arange(400).reshape(100, 4).mean(1) / 2, values.reshape(3, 100, 4).mean(2)  # a point is four steps
    assert np.allclose(panel.lines[-1].get_xydata(), np.stack([xs, parts.mean(0)], axis=1))
    edges = panel.collections[0].get_paths()[0].vertices
    assert edges[:, 1].max() == pytest.approx((parts.mean(0) + parts.std(0, ddof=1)).max())


def test_pictures_are_those_of_the_generators(train, tiny_config, tmp_path):
    train(tiny_config, "name=a", "train.steps=1")
    other = write_run(tmp_path / "runs/b", [])
    write_checkpoint(other / "checkpoints/latest.pt")
    runs, _ = compare.read_runs([Path("runs/a"), other, write_run(tmp_path / "runs/none", [])])
    notes = compare.draw_pictures(runs, tmp_path / "pictures.png", None, count=3)
    assert len(notes) == 1 and "runs/none/checkpoints/latest.pt" in notes[0]
    sheet = np.asarray(Image.open(tmp_path / "pictures.png")).reshape(4, 16 + 128, 3, 128, 3)[:, 16::4, 2, ::4]
    index = 500 * 2 // 3  # the last column of three
    image, label_map = scenes.render("val", index, (32, 32))
    assert np.array_equal(sheet[1], image)
    seed = int(np.random.SeedSequence([0, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    z = torch.from_numpy(np.random.default_rng((seed, 0)).standard_normal(8, dtype=np.float32))[None]
    for row, run in zip(sheet[2:], runs):
        _, generator, _ = load_generator(run.folder / "checkpoints/latest.pt")
        with torch.no_grad():
            picture = (generator(torch.from_numpy(label_map)[None].long(), z)[0] + 1) * 127.5
        assert np.abs(row - picture.permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-2  # rounded


TRAINING = """
import fcntl, json, shutil, sys
name = dict(argument.split("=", 1) for argument in sys.argv if "=" in argument)["name"]
lock = open(f"runs/{name}/lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error where another process trains it
if "concat" in name:
    sys.exit("error: no memory")
shutil.copy(f"settings/{name}.yaml", f"runs/{name}/config.yaml")
with open(f"runs/{name}/metrics.jsonl", "a") as out:
    out.write(json.dumps({"step": 18, "fd_tf_efficientnet_lite2": 9.0, "protocol": {}}) + "\\n")
"""


def test_an_ablation_goes_on_where_it_was_cut_off(tiny_config, tmp_path, monkeypatch, capsys):
    """Three rows with two seeds each, and a script in the place of train.py. What another process trains, as trainings go on
    where compare.py alone is killed, is waited for. A run that fails is named, and does not end the others."""
    (tmp_path / "training.py").write_text(TRAINING)
    monkeypatch.setattr(compare, "TRAIN", tmp_path / "training.py")
    monkeypatch.chdir(tmp_path)
    ablation = tmp_path / "abl.yaml"
    rows = {"full": [], "no_contrastive": ["loss.contrastive=0"], "concat": ["generator.noise=concat"]}
    given = {"base": str(tiny_config), "changes": ["train.steps=18"], "rows": rows, "seeds": [0, 1], "at_once": 2}
    ablation.write_text(yaml.safe_dump(given, sort_keys=False))
    Path("settings").mkdir()
    for folder, (settings, _) in compare.plan_ablation(ablation)[1].items():
        Path(f"settings/{folder.name}.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    call(run=ablation, print=True)  # commands for a scheduler
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and not Path("runs").exists()
    assert lines[2].endswith("train.steps=18 loss.contrastive=0 seed=0 name=abl_no_contrastive_0 --resume")
    Path("runs/abl_full_0").mkdir(parents=True)
    lock = hold(Path("runs/abl_full_0/lock"))
    process = in_child(tmp_path, lambda: call(run=ablation))
    wait_for(lambda: len(list(tmp_path.glob("runs/*/metrics.jsonl"))) == 3)
    fcntl.flock(lock, fcntl.LOCK_UN)  # the child has a copy of what is open
    process.join(60)
    counts = [Path("out.txt").read_text().count(words) for words in (": training", ": done", "not finished, error: no memory")]
    assert process.exitcode == 0 and counts == [6, 4, 2]
    call(run=ablation, print=True)
    assert capsys.readouterr().out.splitlines() == lines[4:]
    ablation.write_text(ablation.read_text().replace("loss.contrastive=0", "loss.contrastive=0.1"))
    with pytest.raises(UserError, match=r"no_contrastive_0/config.yaml: loss.contrastive is 0.0, in .*abl.yaml 0.1; "):
        call(run=ablation)
