"""What `python data.py check | show | export` does."""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from config import UserError, load_config, one_line
from data import LAYOUTS, SPLITS, LabeledImages, UnequalSizes, build_dataset, evenly_spaced, in_threads, list_pairs
from labels import Unreadable, WrongLabel, colorize

KINDS = {Unreadable: "unreadable", UnequalSizes: "of unequal size", WrongLabel: "with unknown ids or colors"}
LISTED = 20  # problems of a kind that are printed


def check_dataset(config: dict, split: str) -> dict:
    """Reads every file of a split.

    Returns a dict: pairs (int), problems {kind: [one line each]}, sizes {(width, height): images},
    pixels (C + 1,) counts of the classes and, last, void. Raises UserError where there is no data set at all.
    """
    problems = {kind: [] for kind in ("without partner", *KINDS.values())}
    if config["data"]["name"] != "scenes":
        layout = LAYOUTS[config["data"]["name"]]
        if config["data"]["root"] is not None:
            problems["without partner"] = list_pairs(Path(config["data"]["root"]), layout, split)[1]
    dataset = build_dataset(config["data"] | {"skip_broken": True}, split)

    def examine(index: int):
        if dataset.pairs is None:
            size, label, wrong = dataset.size[::-1], dataset[index][1].numpy(), []
        else:
            size, label, wrong = dataset.inspect(index)
        counts = 0 if label is None else np.bincount(label.ravel(), minlength=dataset.num_classes + 1)
        return size, counts, wrong

    sizes, pixels = Counter(), np.zeros(dataset.num_classes + 1, np.int64)
    for size, counts, wrong in in_threads(examine, range(len(dataset)), f"reading {split}"):
        sizes.update([size] if size else [])
        pixels += counts
        for error in wrong:
            problems[KINDS[type(error)]].append(str(error))
    return {"pairs": len(dataset), "problems": problems, "sizes": sizes, "pixels": pixels, "names": dataset.class_names}


def print_report(split: str, report: dict) -> None:
    problems, pixels, sizes = report["problems"], report["pixels"], report["sizes"]
    print(f"{split}: {report['pairs']} pairs; files " + ", ".join(f"{kind} {len(lines)}" for kind, lines in problems.items()))
    common = ", ".join(f"{w} x {h} ({count})" for (w, h), count in sizes.most_common(5))
    print(f"  images (width x height): {common}" + (f" and {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""))
    share = pixels / max(pixels.sum(), 1)
    for index, name in enumerate([*report["names"], "void"]):
        number = f"{index:4d}" if index < len(report["names"]) else "void"
        print(f"  {number}  {share[index]:8.3%}  {name if index < len(report['names']) else '(unlabelled)'}")
    absent = sum(pixels[:-1] == 0)
    print(f"  {absent} of {len(report['names'])} classes have no pixel" if absent else "  every class occurs")
    for kind, lines in problems.items():
        for line in lines[:LISTED]:
            print(f"  {kind}: {line}")
        if len(lines) > LISTED:
            print(f"  {kind}: {len(lines) - LISTED} more")


def check(config: dict, arguments: argparse.Namespace) -> None:
    """Reads every file of train and val, names what is wrong, counts classes; exit status 1 if training would stop."""
    failed = False
    for split in SPLITS:
        try:
            report = check_dataset(config, split)
        except UserError as error:
            print(f"{split}: {error}")
            failed = True
            continue
        print_report(split, report)
        count = sum(map(len, report["problems"].values()))
        failed |= count > 0 and not config["data"]["skip_broken"]
        failed |= report["pixels"].sum() == 0
    if failed:
        sys.exit("error: this data set cannot be trained on; mend the files named above"
                 " (or pass over broken ones with data.skip_broken=true)")
    print("ready to train on")


def show(config: dict, arguments: argparse.Namespace) -> None:
    """A sheet: images beside their label maps in color, evenly spaced over the split, and the legend."""
    refuse_existing([arguments.out])
    dataset = build_dataset(config["data"], arguments.split)
    height, width = dataset.size
    scale = max(1, round(192 / height))
    columns = max(1, 1536 // (2 * width * scale + 8))
    count = min(arguments.count, len(dataset))
    cells = []
    for index in evenly_spaced(len(dataset), count):
        image, label = (tensor.numpy() for tensor in dataset[index][:2])
        pair = np.concatenate([image.transpose(1, 2, 0), colorize(label, dataset.palette)], axis=1)
        cells.append(np.pad(pair.repeat(scale, 0).repeat(scale, 1), ((0, 8), (0, 8), (0, 0)), constant_values=255))
    cells += [np.full_like(cells[0], 255)] * (-count % columns)
    rows = [np.concatenate(cells[i:i + columns], axis=1) for i in range(0, len(cells), columns)]
    sheet = np.concatenate([*rows, legend(dataset, rows[0].shape[1])])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(arguments.out)
    print(f"{arguments.out}: {count} of {len(dataset)} pairs")


def legend(dataset: LabeledImages, width: int) -> np.ndarray:
    """uint8 (height, width, 3): each class's color, number and name."""
    names = [f"{i} {name}" for i, name in enumerate(dataset.class_names)] + [f"{dataset.num_classes} void"]
    across = max(1, width // 170)
    picture = Image.new("RGB", (width, 20 * -(-len(names) // across) + 8), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, color) in enumerate(zip(names, dataset.palette.tolist())):
        x, y = i % across * 170 + 4, i // across * 20 + 4
        draw.rectangle((x, y, x + 22, y + 14), tuple(color), "black")
        draw.text((x + 28, y + 1), name, "black")
    return np.asarray(picture)


def export(config: dict, arguments: argparse.Namespace) -> None:
    """`count` pairs at data.size as PNG files, evenly spaced: those that `evaluate.py` judges with eval.num_images = count.

    Label files hold the data set's own ids.
    """
    dataset = build_dataset(config["data"], arguments.split)
    paths = {index: [arguments.out / kind / f"{dataset.stem(index)}.png" for kind in ("images", "labels")]
             for index in evenly_spaced(len(dataset), arguments.count)}
    refuse_existing([path for pair in paths.values() for path in pair])
    for kind in ("images", "labels"):
        (arguments.out / kind).mkdir(parents=True, exist_ok=True)

    def write(index: int) -> None:
        image, label = (tensor.numpy() for tensor in dataset[index][:2])
        Image.fromarray(image.transpose(1, 2, 0)).save(paths[index][0])
        Image.fromarray(dataset.form.encode(label)).save(paths[index][1])

    list(in_threads(write, paths, "writing"))
    print(f"{len(paths)} of {len(dataset)} pairs in {arguments.out}/images and {arguments.out}/labels, "
          f"{dataset.size[0]} x {dataset.size[1]} pixels")


def refuse_existing(paths: list[Path]) -> None:
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists; remove it or choose another --out")


def main(description: str) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="check | show | export")
    for function in (check, show, export):
        command = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        command.add_argument("--config", type=Path, required=True, metavar="FILE")
        if function is not check:
            command.add_argument("--split", choices=SPLITS, default="train" if function is show else "val")
            command.add_argument("--count", type=int, default=16 if function is show else 0, metavar="N",
                                 help="how many pairs" + (" (default: all)" if function is export else ""))
            command.add_argument("--out", type=Path, required=True)
        command.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    try:
        if arguments.function is not check and arguments.count < 0 or arguments.function is show and not arguments.count:
            raise UserError(f"--count {arguments.count}: ask for at least one pair")
        if arguments.function is show and arguments.out.suffix.lower() not in (".png", ".jpg"):
            raise UserError(f"--out {arguments.out}: name a .png or .jpg file")
        arguments.function(load_config(arguments.config, arguments.overrides), arguments)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
