"""Curves of runs and rows of their images, as train.py and compare.py draw them."""

import json
from itertools import takewhile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw

from checkpoint import whole_file
from config import flatten

# Okabe and Ito's colors, which colorblind readers can tell apart, without yellow, which is faint on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")  # the next one each time the colors are used up
POINTS = 100  # of a curve; where there are more, each is the mean of its neighbors
HIDDEN = ("step", "minutes", "num_images", "images_per_second", "peak_memory_gib", "miou_real", "pixel_accuracy_real")


def read_records(path: Path) -> list[dict]:
    """The whole lines of a .jsonl file as flat dicts, {"class_iou.car": 0.1}; none where there is no such file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [flatten(json.loads(line)) for line in takewhile(lambda line: line.endswith(b"}\n"), lines)]


def evaluated(run: Path, step: int) -> bool:
    """Whether a run has an evaluation of this step."""
    return any(record["step"] == step for record in read_records(run / "metrics.jsonl"))


def is_headline(name: str) -> bool:
    """Whether it is a loss or metric of the model: not of one class, of real images, of KID's subsets, nor a rate."""
    plain = name.partition(" (")[0]
    return not ("." in plain or plain in HIDDEN or plain.startswith("lr_") or plain.endswith("_std"))


def draw_curves(groups: dict[str, list[list[dict]]], path: Path, x: str = "step") -> None:
    """A panel for each metric and loss. Raises UserError where `path` cannot be written.

    Several runs of a group are thin lines; their mean is a thick one, at the steps that all of them have, in a band of
    one standard deviation (n - 1) to each side.

    Args:
        groups: name in the legend -> runs, each a list of flat records with `step`, those of evaluations first.
        path: PNG. x: step or minutes; records without it are left out.
    """
    records = [record for runs in groups.values() for run in runs for record in run if record.get(x) is not None]
    names = list(dict.fromkeys(name for record in records for name in record if is_headline(name)))
    rows, columns = max(1, -(-len(names) // 4)), max(1, min(4, len(names)))
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.06 * len(groups) + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    looks = [{"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i // len(COLORS) % len(STYLES)]}
             for i in range(len(groups))]
    for name, panel in zip(names, panels):
        panel.set_title(name, fontsize=10)
        panel.set_xlabel(x, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
        for runs, look in zip(groups.values(), looks):
            curves = [{record["step"]: (record[x], record[name]) for record in run
                       if record.get(x) is not None and record.get(name) is not None} for run in runs]
            draw_group(panel, [curve for curve in curves if curve], look)
    for panel in panels:  # those left over
        panel.remove()
    if not names:
        figure.suptitle(f"nothing with {x}")
    figure.legend(handles=[Line2D([], [], label=label[:60], **look) for label, look in zip(groups, looks)],
                  loc="outside lower left", ncols=columns, fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def draw_group(panel, curves: list[dict[int, tuple[float, float]]], look: dict) -> None:
    """The runs of one group in one panel, each step -> (x, y)."""
    def line(points: np.ndarray, **options) -> None:
        panel.plot(*points.T, marker="o" if len(points) <= 20 else None, markersize=3, **look, **options)

    common = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
    for curve in curves if len(curves) > 1 else []:
        line(thinned(np.array(list(curve.values()))), linewidth=0.6, alpha=0.5)
    if common:
        points = thinned(np.array([[curve[step] for curve in curves] for step in common]))  # (steps, runs, 2)
        (xs, mean), spread = points.mean(1).T, points[..., 1].std(1, ddof=1) if len(curves) > 1 else 0
        line(points.mean(1), linewidth=1.6)
        panel.fill_between(xs, mean - spread, mean + spread, color=look["color"], alpha=0.15, linewidth=0)


def thinned(points: np.ndarray) -> np.ndarray:
    """(steps, ...) -> (at most POINTS, ...), means of neighbors."""
    return np.stack([part.mean(0) for part in np.array_split(points, min(POINTS, len(points)))])


def draw_strips(strips: dict[str, np.ndarray], path: Path) -> None:
    """A row of images for each title, uint8 (N, H, W, 3), small ones enlarged. Raises UserError as `draw_curves`."""
    rows = {title: np.concatenate(images, axis=1) for title, images in strips.items()}
    rows = {title: row.repeat(scale := max(1, 128 // len(row)), 0).repeat(scale, 1) for title, row in rows.items()}
    width, height = max(row.shape[1] for row in rows.values()), sum(len(row) + 16 for row in rows.values())
    sheet, top = Image.new("RGB", (width, height), "white"), 0
    for title, row in rows.items():
        ImageDraw.Draw(sheet).text((2, top + 2), title, "black")
        sheet.paste(Image.fromarray(row), (0, top + 16))
        top += len(row) + 16
    with whole_file(path) as temporary:
        sheet.save(temporary, "png")
