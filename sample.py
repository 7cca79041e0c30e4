"""Label maps to images: python sample.py --labels DIR [--checkpoint FILE] [--out DIR] [--num K] [--seed S] [--grid]
                                      [--resample CLASS] [--interpolate N] [--fill-void] [--config FILE]
                                      [--truncation PSI] [--steps N] [--guidance S] [--instances DIR]

DIR holds label maps as PNG: the class ids of the data set that the model was trained on (gray or palette, 8 or 16 bits), or
RGB in the model's palette. Sub folders are read too, and made in --out. Label maps may have any size and are resized
(nearest) to the size the model was trained at, which is the size of the images. An image depends on its label map, its
name and the seed alone. An official checkpoint of OASIS or SDM carries no configuration: name one with --config.

SDM's images take --steps (default: the model's configuration), and its models of Cityscapes the edges of instance maps:
--instances names a folder with files of the same names (or _instanceIds for _labelIds). Without it the label map's own
edges are used, so that touching things of one class are not told apart; models of CelebAMask-HQ want just that.

`torchrun --nproc_per_node N sample.py ...` shares the label maps over N processes, with the same images.
"""

import argparse
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from augment import fill_void
from checkpoint import load_generator, newest_checkpoint
from config import UserError, run_script
from dataset import label_files, read_instance_map
from distributed import gather, setup_distributed
from interface import System
from labels import read_label_file

DEFAULTS = {"resample": None, "interpolate": 0, "truncation": None, "steps": None, "guidance": None, "instances": None}


def find_class(name: str, class_names: list[str]) -> int:
    """A class by its name or number. Raises UserError."""
    if name in class_names:
        return class_names.index(name)
    if name.isdigit() and int(name) < len(class_names):
        return int(name)
    raise UserError(f"--resample {name}: no such class; the model has {', '.join(class_names)}")


def check_options(system: System, arguments: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together, or that this model does not have."""
    if arguments.num < 1 or arguments.interpolate == 1 or arguments.interpolate < 0 or arguments.seed < 0:
        raise UserError("--num takes at least 1, --interpolate at least 2, --seed at least 0")
    if arguments.interpolate and arguments.num > 1 and not arguments.resample:
        raise UserError("--interpolate goes with --num only where --resample redraws a class at each of its images")
    for option, default in DEFAULTS.items():
        if getattr(arguments, option) != default and option not in system.options:
            has = ", ".join(f"--{name}" for name in sorted(system.options)) or "none of these options"
            raise UserError(f"--{option}: this model's generator, {system.settings.generator.name}, does not have it; it "
                            f"has {has}")


def image_names(maps: Iterable[str], count: int, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The file names of each label map's images. Raises UserError where one would be overwritten."""
    names = {name: [f"{name}.png"] if count == 1 else [f"{name}_{k}.png" for k in range(count)] for name in maps}
    if arguments.grid and ["grid.png"] in names.values():
        raise UserError(f"{arguments.labels}/grid.png: has the name of the sheet; rename it, or leave --grid out")
    for name in [name for group in names.values() for name in group] + ["grid.png"] * arguments.grid:
        if (arguments.out / name).exists():
            raise UserError(f"{arguments.out / name} exists; choose another --out")
    return names


@torch.no_grad()
def main(arguments: argparse.Namespace) -> None:
    rank, world_size, device = setup_distributed()
    checkpoint = arguments.checkpoint or newest_checkpoint()
    system, generator, state = load_generator(checkpoint, device, arguments.config)
    files = label_files(arguments.labels, system.settings.data)
    files = {name: path for name, path in files.items() if arguments.out not in path.parents}
    if not files:
        raise UserError(f"{arguments.labels}: no label maps but those in --out {arguments.out}; choose another --out")
    check_options(system, arguments)
    system, size = system.with_options(arguments), system.settings.data.size
    if arguments.resample:
        arguments.resample = find_class(arguments.resample, state["class_names"])
    names = image_names(files, (arguments.interpolate or 1) * arguments.num, arguments)
    share, rows = list(files)[rank::world_size], {}

    def read(name: str) -> list[torch.Tensor]:
        """The label map, int64 (1, H, W) in 0..C, and the instance map, int32 (1, H, W), if one is asked for."""
        maps = [torch.from_numpy(read_label_file(files[name], state, size)).long()[None]]
        if arguments.instances:
            namesake = arguments.instances / f"{name.replace('_labelIds', '_instanceIds')}{files[name].suffix}"
            maps.append(torch.from_numpy(read_instance_map(namesake, size))[None])
        return maps

    for name in tqdm(share, desc="check", leave=False, disable=rank != 0):
        read(name)
    gather(None)  # nothing is written before every process has checked its share
    for name in tqdm(share, unit="map", disable=rank != 0):
        maps = [m.to(device) for m in read(name)]
        (arguments.out / name).parent.mkdir(parents=True, exist_ok=True)
        if arguments.fill_void:
            maps[0] = fill_void(maps[0], len(state["class_names"]))
        key, images = (arguments.seed, zlib.crc32(os.fsencode(name))), []
        for file, image in zip(names[name], system.draw(generator, maps, key, arguments)):
            images.append(image.permute(1, 2, 0).cpu().numpy())
            Image.fromarray(images[-1]).save(arguments.out / file)
        if arguments.grid:
            colors = np.array(state["palette"], np.uint8)[maps[0][0].cpu().numpy()]
            rows[name] = np.concatenate([colors, *images], axis=1)
    rows = {name: row for part in gather(rows) for name, row in part.items()}
    if rank == 0:
        if arguments.grid:
            Image.fromarray(np.concatenate([rows[name] for name in files])).save(arguments.out / "grid.png")
        count = sum(map(len, names.values()))
        print(f"{count} images of {size[0]} x {size[1]} pixels in {arguments.out}, by {checkpoint}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, metavar="DIR", help="label maps")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the newest runs/*/checkpoints/latest.pt")
    parser.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples")
    parser.add_argument("--num", type=int, default=1, metavar="K", help="samples a label map: NAME_0.png ...")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    parser.add_argument("--grid", action="store_true", help="write grid.png too: a row of colors and samples a label map")
    parser.add_argument("--resample", metavar="CLASS", help="redraw only what this class shows; the rest is as without it")
    parser.add_argument("--interpolate", type=int, default=0, metavar="N",
                        help="N images from one noise to another; with --resample the class is redrawn in each")
    parser.add_argument("--fill-void", action="store_true", help="give unlabelled pixels the nearest label first")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration of an official checkpoint")
    parser.add_argument("--truncation", type=float, metavar="PSI",
                        help="GANs: the noise times PSI (default: the model's eval.truncation, 1); above 1 samples differ more")
    parser.add_argument("--steps", type=int, metavar="N", help="SDM: steps of an image, 2 to 1000")
    parser.add_argument("--guidance", type=float, metavar="S", help="SDM: 1 is plain, 1.5 published")
    parser.add_argument("--instances", type=Path, metavar="DIR", help="SDM with instance edges: folder of instance maps")
    run_script(lambda: main(parser.parse_args()))
