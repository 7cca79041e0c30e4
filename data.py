"""Look at a data set and copy from it; `dataset.py` reads it.

    python data.py check  --config configs/camvid.yaml data.root=../camvid       reads every file, counts classes
    python data.py show   --config configs/camvid.yaml --out sheet.png           images, label maps, legend
    python data.py export --config configs/camvid.yaml --split val --count 100 --out exported
`export` writes exported/images and exported/labels, PNG files at `data.size`, and with data.instances=true
exported/instances; label files keep the ids of the data set, so that `sample.py --labels` and `evaluate.py --labels` read
them like the original ones.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torchvision.utils import make_grid
from tqdm.contrib.concurrent import thread_map

from checkpoint import whole_file
from config import DataSettings, UserError, load_settings, run_script
from dataset import SPLITS, LabeledImages, build_dataset, evenly_spaced, find_pairs


def check(data: DataSettings, arguments: argparse.Namespace) -> None:
    """Reads every file of train and val, names what is wrong, counts classes; exit status 1 if training would stop."""
    ready = True
    for split in SPLITS:
        pairs, problems = find_pairs(data, split)
        dataset = LabeledImages(data, split, pairs)

        def inspect(index: int) -> tuple | None:
            try:
                return dataset.inspect(index)
            except UserError as error:
                problems.append(str(error))

        found = [pair for pair in thread_map(inspect, range(len(dataset)), desc=f"reading {split}", leave=False) if pair]
        sizes = Counter(size for size, _ in found)
        pixels = sum(counts for _, counts in found) + np.zeros(dataset.num_classes + 1)
        print(f"{split}: {len(dataset)} pairs; {len(problems)} files cannot be used")
        for problem in sorted(problems):
            print(f"  {problem}")
        common = ", ".join(f"{width} x {height} ({count})" for (width, height), count in sizes.most_common(5))
        print(f"  image sizes (width x height): {common}{', ...' * (len(sizes) > 5)}")
        for index, (name, count) in enumerate(zip([*dataset.class_names, "void (unlabelled)"], pixels)):
            print(f"  {index:4d}  {count / max(pixels.sum(), 1):8.3%}  {name}")
        print(f"  {sum(pixels[:-1] == 0)} of {dataset.num_classes} classes have no pixel")
        if few := split == "val" and len(dataset) < 2:
            print("  at least 2 are needed; raise data.holdout, or add pairs")
        ready &= pixels.sum() > 0 and not few and not problems
    if not ready:
        raise UserError("this data set cannot be trained on; mend the files named above")
    print("ready to train on")


def show(data: DataSettings, arguments: argparse.Namespace) -> None:
    """A sheet: images beside their label maps in color, evenly spaced over the split, and the legend."""
    dataset = build_dataset(data, arguments.split)
    indices = evenly_spaced(len(dataset), arguments.count)
    colors, names = torch.from_numpy(dataset.palette), [*dataset.class_names, "void"]
    pairs = [torch.cat([image, colors[label.int()].permute(2, 0, 1)], 2) for image, label, *_ in (dataset[i] for i in indices)]
    grid = make_grid(pairs, max(1, 512 // dataset.size[1]), padding=8, pad_value=255).permute(1, 2, 0).numpy()
    figure = Figure(figsize=(16, 16 * grid.shape[0] / grid.shape[1] + 0.03 * len(names) + 0.5), layout="constrained")
    panel = figure.subplots()
    panel.imshow(grid, interpolation="nearest")
    panel.axis("off")
    figure.legend(handles=[Patch(facecolor=color / 255, edgecolor="black", label=f"{i} {name}")
                           for i, (name, color) in enumerate(zip(names, dataset.palette))], loc="outside lower left", ncols=8)
    with whole_file(arguments.out) as path:
        figure.savefig(path, format="png")
    print(f"{arguments.out}: {len(indices)} of {len(dataset)} pairs")


def export(data: DataSettings, arguments: argparse.Namespace) -> None:
    """Pairs at data.size as PNG files, evenly spaced: those that `evaluate.py` judges if eval.num_images = --count."""
    dataset = build_dataset(data, arguments.split)
    indices = evenly_spaced(len(dataset), arguments.count)

    def write(index: int) -> None:
        image, label, *instances = (tensor.numpy() for tensor in dataset[index])
        pictures = image.transpose(1, 2, 0), dataset.form.encode(label), *(ids.astype(np.uint16) for ids in instances)
        for kind, picture in zip(("images", "labels", "instances"), pictures):
            path = arguments.out / kind / f"{dataset.names[index]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)

    thread_map(write, indices, desc="writing", leave=False)
    print(f"{len(indices)} of {len(dataset)} pairs in {arguments.out}/images and {arguments.out}/labels, "
          f"{dataset.size[0]} x {dataset.size[1]} pixels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="check | show | export")
    for function, split, count in ((check, None, None), (show, "train", 16), (export, "val", 0)):
        command = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        command.add_argument("--config", type=Path, required=True, metavar="FILE")
        if split:
            command.add_argument("--split", choices=SPLITS, default=split)
            command.add_argument("--count", type=int, default=count, metavar="N", help="how many pairs, 0 = all")
            command.add_argument("--out", type=Path, required=True)
        command.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    if arguments.function is show and arguments.out.suffix.lower() != ".png":
        raise UserError(f"--out {arguments.out}: name a .png file")
    if arguments.function is not check and arguments.out.exists():
        raise UserError(f"{arguments.out} exists; remove it or choose another --out")
    arguments.function(load_settings(arguments.config, arguments.overrides).data, arguments)


if __name__ == "__main__":
    run_script(main)
