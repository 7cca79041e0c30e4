"""Runs side by side: what differs in their settings, a table over seeds, curves and pictures.

    python compare.py runs/a_0 runs/a_1 runs/b_0 [--step N] [--metric miou] [--out FOLDER [--time]]
    python compare.py --run configs/ablation.yaml [--print] [--out FOLDER]

Runs that differ in their seed alone are one row: mean and standard deviation (n - 1). --run first trains what is
missing; where it is killed its trainings go on, and the next --run waits for them.
"""

import argparse
import csv
import json
import math
import os
import shlex
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from checkpoint import load_generator, whole_file
from config import LOCAL, Count, Section, Settings, UserError, Whole, flatten, load_settings, run_script
from dataset import build_dataset, evenly_spaced
from distributed import hold
from evaluation import higher_is_better
from interface import sample_seed
from plots import draw_curves, draw_strips, evaluated, is_headline, read_records
from systems import system_for

TRAIN = Path(__file__).parent / "train.py"
DATA_SET = ("name", "holdout", "classes", "void", "palette")  # and the last part of root: it may lie elsewhere
FREE = ("name", "train.steps", *LOCAL)  # what may change in an ablation whose runs are there


class Ablation(Section):
    """What --run reads. Changes are key.path=value, behind a configuration of its own if a row names one; each row with each
    seed is a run."""

    base: str = "config.yaml"
    changes: list[str] = []  # of all rows
    rows: dict[str, list[str]] = {}
    seeds: list[Whole] = [0]
    at_once: Count = 1


class Run:
    """A folder of runs/: its settings, and the records of its .jsonl files, flat. Raises UserError where it is none."""

    def __init__(self, folder: Path):
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: no run; a run is a folder with a config.yaml, such as runs/NAME")
        self.folder, self.settings = folder, load_settings(folder / "config.yaml")
        self.flat, data = flat(self.settings), self.settings.data
        self.data_set = {"root": Path(data.root or "").name} | {key: getattr(data, key) for key in DATA_SET}
        self.metrics, self.log = (read_records(folder / name) for name in ("metrics.jsonl", "log.jsonl"))

    def state(self) -> str:
        """Where an unfinished run is, in a sentence."""
        step = max((record["step"] for record in self.log + self.metrics), default=0)
        return (f"{self.folder}: {'in training' if in_training(self.folder) else 'stopped'} at step {step} of "
                f"{self.settings.train.steps}" + ("" if self.metrics else "; no evaluation yet"))

    def evaluation(self, at: str | int, metric: str | None = None) -> dict:
        """The record at the "last" evaluation, the "best" by a metric, or a step; empty where there is none."""
        if at == "last":
            return self.metrics[-1] if self.metrics else {}
        if at != "best":
            return next((record for record in self.metrics if record["step"] == at), {})
        metric = metric or self.settings.eval.metric
        column = next((name for name in self.evaluation("last") if name.partition(" (")[0] == metric), metric)
        known = [record for record in self.metrics if record.get(column) is not None]
        return min(known, key=lambda record: record[column] * (-1 if higher_is_better(metric) else 1), default={})


def flat(settings: Settings) -> dict[str, str]:
    """section.key -> its value as on the command line, with the defaults of the networks. Raises UserError."""
    values = flatten(system_for(settings, num_classes=1).settings.model_dump(mode="json"))
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def in_training(folder: Path) -> bool:
    """Whether a process trains this run now."""
    try:
        hold(folder / "lock").close()
    except UserError:
        return True
    except OSError:  # a disk that can only be read
        return False
    return False


def read_runs(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be compared; sentences on those that cannot or are unfinished. Raises UserError for none."""
    runs, notes = [], []
    for folder in dict.fromkeys(folders):
        try:
            run = Run(folder)
            for key, value in run.data_set.items():
                if runs and value != runs[0].data_set[key]:
                    raise UserError(f"{folder}: another data set than {runs[0].folder}, data.{key} differs")
            runs.append(run)
            notes += [f"{folder}: other settings until step {int(path.stem[-7:])}, see {path.name}"
                      for path in sorted(folder.glob("config_until_*.yaml"))]
            notes += [] if evaluated(folder, run.settings.train.steps) else [run.state()]
        except UserError as error:
            notes.append(f"{error}; left out")
    if not runs:
        raise UserError("; ".join(notes) or "no runs")
    return runs, notes


def metric_names(runs: list[Run]) -> list[str]:
    """What the evaluations measured, in single classes too."""
    names = dict.fromkeys(name for run in runs for record in run.metrics for name in record)
    return [name for name in names if name not in ("step", "minutes") and not name.startswith("protocol.")]


def protocol_of(metric: str, record: dict) -> dict:
    """The part of an evaluation's protocol that a metric rests on; neither the seed nor how the images were made."""
    rests = {"features": metric.startswith(("fid", "fd_", "kid")), "kid": metric.startswith("kid"),
             "segmenter": metric.startswith(("miou", "pixel_accuracy", "class_iou")),
             "diversity": metric.endswith("_diversity"), **dict.fromkeys(("seed", "truncation", "versions", "platform"), False)}
    return {key: value for key, value in record.items()  # a network is known by its weights, whatever its file is called
            if key.startswith("protocol.") and rests.get(key.split(".")[1], True) and key != "protocol.segmenter.name"}


def separate_protocols(runs: list[Run]) -> list[str]:
    """Make "miou (1)" and "miou (2)" of a metric whose protocols differ; sentences say which part differs."""
    notes: dict[str, list[str]] = {}
    for name in metric_names(runs):
        records = [record for run in runs for record in run.metrics if name in record]
        protocols = [protocol_of(name, record) for record in records]
        kinds = [kind for i, kind in enumerate(protocols) if kind not in protocols[:i]]
        parts = sorted({key for kind in kinds for key in kind | kinds[0] if kind.get(key) != kinds[0].get(key)})
        for record, protocol in zip(records, protocols) if parts else ():
            record[f"{name} ({kinds.index(protocol) + 1})"] = record.pop(name)
        if parts and is_headline(name):
            notes.setdefault(", ".join(parts), []).append(name)
    return [f"{', '.join(names)}: in columns (1), (2) ..., as {parts} differs" for parts, names in notes.items()]


def group_runs(runs: list[Run]) -> tuple[dict[tuple[str, str], list[Run]], str]:
    """(name, what is not as usual) of each row of the table -> its runs; the usual values of what differs."""
    alike: dict[tuple, list[Run]] = {}
    for run in runs:
        row = tuple(sorted(item for item in run.flat.items() if item[0] not in ("name", "seed", *LOCAL)))
        alike.setdefault(row, []).append(run)
    counts = {key: Counter(dict(row).get(key) for row in alike) for row in alike for key, _ in row}
    usual = {key: count.most_common(1)[0][0] for key, count in counts.items() if len(count) > 1}
    groups = {}
    for row, members in alike.items():
        names = [run.folder.name.removesuffix(str(run.settings.seed)) for run in members]
        name = os.path.commonprefix(names).rstrip("_-") or members[0].folder.name
        changed = " ".join(f"{key}={value}" for key, value in row if key in usual and value != usual[key])
        groups[name, changed] = members
    return groups, " ".join(f"{key}={value}" for key, value in usual.items() if value is not None)


def fill_table(groups: dict, places: list[str | int], metric: str | None) -> tuple[list[list[str]], list[dict]]:
    """Rows of text below their head, and rows of all values for the CSV file. `metric` picks the best evaluation."""
    names = metric_names(sum(groups.values(), []))
    shown = [name for name in names if is_headline(name)]
    heads = [f"{name} {'↑' if higher_is_better(name.partition(' (')[0]) else '↓'}" for name in shown]
    rows, values = [["at", "row", "changed", "runs", "step", *heads, "minutes", "images/s"]], []
    for place in places:
        for (name, changed), runs in groups.items():
            records = [run.evaluation(place, metric) for run in runs]
            steps = sorted({record["step"] for record in records if record})
            speeds = [[record["images_per_second"] for record in run.log] for run in runs]
            cells = {key: statistics([record.get(key) for record in records]) for key in [*names, "minutes"]}
            cells["images/s"] = statistics([np.mean(speed) if speed else None for speed in speeds])
            step = " to ".join(map(str, steps[:1] + steps[1:][-1:])) or "-"
            about = [str(place), name, changed, str(len(runs)), step]
            rows.append(about + [show(cells[key], len(runs)) for key in [*shown, "minutes", "images/s"]])
            parts = {f"{key} {part}": value for key, cell in cells.items() if cell
                     for part, value in zip(("mean", "std", "n"), cell)}
            values.append(dict(zip(rows[0], about)) | parts)
    return rows, values


def statistics(values: list[float | None]) -> tuple[float, float | None, int] | None:
    """Mean, standard deviation (of two and more) and number of what is there."""
    there = [value for value in values if value is not None]
    return (float(np.mean(there)), float(np.std(there, ddof=1)) if there[1:] else None, len(there)) if there else None


def show(cell: tuple[float, float | None, int] | None, runs: int) -> str:
    """Four digits of the mean; n where it is not the number of runs; a dash for nothing."""
    if cell is None:
        return "-"
    mean, deviation, count = cell
    digits = min(max(3 - math.floor(math.log10(abs(mean))), 0), 6) if mean and math.isfinite(mean) else 1
    return (f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
            + ("" if count == runs else f" (n={count})"))


def markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(value.ljust(width) for value, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def latex(rows: list[list[str]]) -> str:
    """A tabular with the rules of the package booktabs."""
    signs = {"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"} | {sign: "\\" + sign for sign in "_%#&$"}
    cells = [["--" if cell == "-" else cell.translate(str.maketrans(signs)) for cell in row] for row in rows]
    head, *body = [" & ".join(row) + r" \\" for row in cells]
    return "\n".join([rf"\begin{{tabular}}{{lll{'r' * (len(rows[0]) - 3)}}}", r"\toprule", head, r"\midrule", *body,
                      r"\bottomrule", r"\end{tabular}"])


@torch.no_grad()
def draw_pictures(runs: list[Run], path: Path, step: int | None, count: int = 8) -> list[str]:
    """The same label maps and noise drawn by every run, below the real images; a sentence for each run left out."""
    device, strips, notes = "cuda" if torch.cuda.is_available() else "cpu", {}, []
    for run in runs:
        checkpoint = run.folder / "checkpoints" / ("latest.pt" if step is None else f"{step:07d}.pt")
        try:
            dataset = build_dataset(run.settings.data, "val")
            system, generator, state = load_generator(checkpoint, device)
        except UserError as error:
            notes.append(f"{error}; not in {path.name}")
            continue
        system = system.with_options(argparse.Namespace(steps=run.settings.diffusion.sheet_steps))
        indices = evenly_spaced(len(dataset), count)
        real, label_map, *instances = (torch.stack(column).to(device) for column in zip(*(dataset[i] for i in indices)))
        images = system.sampler(generator)(label_map.long(), [sample_seed(0, i) for i in indices], 0, *instances)
        strips.setdefault("label maps", dataset.palette[label_map.cpu()])
        strips.setdefault("real images", real.permute(0, 2, 3, 1).cpu().numpy())
        strips[f"{run.folder}, step {state['step']}"] = images.permute(0, 2, 3, 1).cpu().numpy()
    if strips:
        draw_strips(strips, path)
    return notes


def plan_ablation(path: Path) -> tuple[int, dict[Path, tuple[Settings, list[str]]]]:
    """How many at once, and folder of each run of an ablation -> its settings and command. Raises UserError."""
    ablation, plan = load_settings(path, model=Ablation), {}
    for row, changes in ablation.rows.items():
        base, *changes = changes if changes and changes[0].endswith(".yaml") else [ablation.base, *changes]
        for seed in ablation.seeds:
            name = f"{path.stem}_{row}_{seed}"
            folder, overrides = Path("runs") / name, [*ablation.changes, *changes, f"seed={seed}", f"name={name}"]
            settings = load_settings(base, overrides)
            before = Run(folder).flat if (folder / "config.yaml").is_file() else {}
            for key, value in flat(settings).items():
                if key not in FREE and before.get(key, value) != value:
                    raise UserError(f"{folder}/config.yaml: {key} is {before[key]}, in {path} {value}; give the row "
                                    "another name, or move the folder away")
            plan[folder] = settings, [sys.executable, str(TRAIN), "--config", base, *overrides, "--resume"]
    return ablation.at_once, plan


def train_all(at_once: int, plan: dict[Path, tuple[Settings, list[str]]]) -> None:
    """Train what is not finished; wait for what another process trains."""
    folders = iter(plan)  # shared by the threads: each takes the next

    def train() -> None:
        for folder in folders:
            settings, command = plan[folder]
            folder.mkdir(parents=True, exist_ok=True)
            while not evaluated(folder, settings.train.steps):
                hold(folder / "lock", wait=True).close()  # who trains it now ends first
                if evaluated(folder, settings.train.steps):
                    break
                print(f"{folder}: training", flush=True)
                with open(folder / "output.txt", "a") as output:
                    subprocess.run(command, stdout=output, stderr=output, env={"TQDM_MININTERVAL": "60", **os.environ})
                *_, said = ["nothing said", *(folder / "output.txt").read_text().splitlines()]
                print(f"{folder}: {'done' if evaluated(folder, settings.train.steps) else f'not finished, {said}'}", flush=True)
                if not in_training(folder):  # or another process was faster
                    break

    threads = [threading.Thread(target=train, daemon=True) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(arguments: argparse.Namespace) -> None:
    folders, out, metric = arguments.runs, arguments.out, arguments.metric
    if arguments.run:
        at_once, plan = plan_ablation(arguments.run)
        if arguments.print:
            for folder, (settings, command) in plan.items():
                if not evaluated(folder, settings.train.steps):
                    print(shlex.join(command))
            return
        train_all(at_once, plan)
        folders = list(plan)
    runs, notes = read_runs(folders)
    if metric and metric not in metric_names(runs):
        names = ", ".join(filter(is_headline, metric_names(runs)))
        raise UserError(f"--metric {metric}: no run has it; there are {names}")
    notes += separate_protocols(runs)
    groups, usual = group_runs(runs)
    notes += [f"where a row does not say: {usual}"] if usual else []
    notes += [f"{name}: two runs of one seed count as two" for (name, _), members in groups.items()
              if len({run.settings.seed for run in members}) < len(members)]
    notes.append(f"best: by {' or '.join(sorted({metric or run.settings.eval.metric for run in runs}))}")
    places = ["last", "best", *([] if arguments.step is None else [arguments.step])]
    if all(run.evaluation("best", metric) == run.evaluation("last") for run in runs):
        places.remove("best")
        notes[-1] += ", which is the last one of each run"
    rows, values = fill_table(groups, places, metric)
    if out:
        curves = {" ".join(row): [run.metrics + run.log for run in members] for row, members in groups.items()}
        draw_curves(curves, out / "curves.png", "minutes" if arguments.time else "step")
        notes += draw_pictures(runs, out / "pictures.png", arguments.step)
        with whole_file(out / "table.csv") as path, open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in values for key in row))
            writer.writeheader()
            writer.writerows(values)
        texts = {"table.md": "\n\n".join([markdown(rows), *notes]),
                 "table.tex": "\n".join([latex(rows), *(f"% {note}" for note in notes)])}
        for name, text in texts.items():
            with whole_file(out / name) as path:
                path.write_text(text + "\n")
        notes.append(f"wrote {out}/table.md, table.csv, table.tex, curves.png, pictures.png")
    print(markdown(rows), *notes, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs/")
    parser.add_argument("--run", type=Path, metavar="FILE", help="train the rows of an ablation first")
    parser.add_argument("--print", action="store_true", help="with --run: only print the commands, for a scheduler")
    parser.add_argument("--step", type=int, help="compare at this step too, and draw pictures with its checkpoints")
    parser.add_argument("--metric", help="which picks the best evaluation; else eval.metric of each run")
    parser.add_argument("--out", type=Path, help="folder for table.md, .csv and .tex, curves.png and pictures.png")
    parser.add_argument("--time", action="store_true", help="curves against minutes")
    arguments = parser.parse_intermixed_args()
    if bool(arguments.run) == bool(arguments.runs):
        parser.error("give either folders of runs or --run FILE")
    run_script(lambda: main(arguments))
