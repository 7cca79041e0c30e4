"""Label maps to images: python sample.py --labels DIR [--checkpoint FILE] [--out DIR] [--num K] [--seed S] [--grid]
                                      [--resample CLASS] [--interpolate N] [--config FILE] [--noise image|class|pixel]
                                      [--steps N] [--guidance S] [--instances DIR]

DIR holds label maps as PNG: class ids as the data set that the model was trained on spells them (8-bit L or P), or RGB
in the model's palette. They may have any size and are resized (nearest) to the size the model was trained at, which is
the size of the images. An image depends on its label map, its name and the seed alone. An official checkpoint of OASIS
or SDM carries no configuration: name one with --config.

SDM's images take --steps (default: the model's configuration), and its models of Cityscapes the edges of instance maps:
--instances names a folder with files of the same names (or _instanceIds for _labelIds). Without it the label map's own
edges are used, so that touching things of one class are not told apart; models of CelebAMask-HQ want just that.

`torchrun --nproc_per_node N sample.py ...` shares the label maps over N processes, with the same images.
"""

import argparse
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from checkpoint import load_generator
from config import UserError, apply_overrides, check_config, one_line
from data import read_instance_map
from distributed import setup_distributed
from labels import colorize, read_label_file
from gan import noise
from metrics import gather, sample_seed, sampler_for, to_uint8
from oasis import OASISGenerator
from sdm import SDMUNet


def newest_checkpoint() -> Path:
    """The youngest runs/*/checkpoints/latest.pt. Raises UserError if there is none."""
    found = sorted(Path("runs").glob("*/checkpoints/latest.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("runs/*/checkpoints/latest.pt: none here; train a model or name one with --checkpoint")
    return found[-1]


def find_label_maps(folder: Path) -> list[Path]:
    """The PNG files of a folder, by name. Raises UserError if there is none."""
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() == ".png") if folder.is_dir() else []
    if not paths:
        raise UserError(f"{folder}: no label maps; --labels names a folder of PNG files")
    return paths


def find_class(name: str, class_names: list[str]) -> int:
    """A class by its name or number. Raises UserError."""
    if name in class_names:
        return class_names.index(name)
    if name.isdigit() and int(name) < len(class_names):
        return int(name)
    raise UserError(f"--resample {name}: no such class; the model has {', '.join(class_names)}")


def read_maps(path: Path, state: dict, instances: Path | None) -> list[torch.Tensor]:
    """Label file -> int64 (H, W) in 0..C at the model's size; and of its namesake in `instances`, if given, int32 ids."""
    height, width = state["config"]["data"]["size"]
    label = read_label_file(path, len(state["class_names"]), state["palette"], ids=state["ids"])
    label = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
    maps = [torch.from_numpy(np.array(label)).long()]
    if instances:
        name = path.name.replace("_labelIds", "_instanceIds")
        maps.append(torch.from_numpy(read_instance_map(instances / name, (height, width))))
    return maps


def plan_noise(stem: str, label_map: torch.Tensor, network, arguments: argparse.Namespace, resampled: int | None) -> list[dict]:
    """The noise arguments of the network for each image of one label map (H, W).

    Sample k of a name has noise (seed, name, k). Resampling keeps sample 0 and takes the region's noise from another
    stream; interpolation goes on the sphere from sample 0 to sample 1; noise for each class or pixel has streams too.
    """
    key, device = (arguments.seed, zlib.crc32(stem.encode())), label_map.device
    draw = lambda k, stream, rows=1: noise([(*key, k, stream)], rows * network.z_dim, device).view(rows, -1)
    if resampled is not None:
        region = (label_map == resampled)[None]
        return [{"z": draw(0, 0), "z2": draw(k, 1), "region": region} for k in range(arguments.num)]
    if arguments.noise == "class":
        return [{"z": draw(k, 2, network.num_classes + 1), "noise_ids": label_map[None]} for k in range(arguments.num)]
    if arguments.noise == "pixel":
        ids = torch.arange(label_map.numel(), device=device).view_as(label_map)[None]
        return [{"z": draw(k, 3, ids.numel()), "noise_ids": ids} for k in range(arguments.num)]
    if not arguments.interpolate:
        return [{"z": draw(k, 0)} for k in range(arguments.num)]
    start, end = draw(0, 0), draw(1, 0)
    angle = torch.acos(torch.cosine_similarity(start, end))
    return [{"z": (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)}
            for t in torch.linspace(0, 1, arguments.interpolate, device=device)]


def check_options(generator, config: dict, arguments: argparse.Namespace) -> dict:
    """The configuration with what the options change of it. Raises UserError for options that this model does not have."""
    name = config["generator"]["name"]
    if arguments.noise != "image" and not isinstance(generator, OASISGenerator):
        raise UserError(f"--noise {arguments.noise}: OASIS alone has it; this model's generator is {name}")
    changes = {"steps": arguments.steps, "guidance": arguments.guidance}
    changes = {key: value for key, value in changes.items() if value is not None}
    if not isinstance(generator, SDMUNet):
        if changes or arguments.instances:
            raise UserError(f"--{next(iter(changes), 'instances')}: diffusion models alone have it; this model's generator "
                            f"is {name}")
        return config
    for option in ("resample", "interpolate"):
        if getattr(arguments, option):
            raise UserError(f"--{option}: not with diffusion, which has fresh noise for every step and pixel and no one "
                            f"noise vector to redraw by class or walk along; use --num or --seed")
    if arguments.instances and not generator.instance_edges:
        raise UserError(f"--instances {arguments.instances}: this model was trained without instance edges; leave it out")
    return check_config(apply_overrides(config, [f"diffusion.{key}={value}" for key, value in changes.items()]),
                        "--steps, --guidance")


def draw(generator, config: dict, stem: str, maps: list[torch.Tensor], arguments: argparse.Namespace,
         resampled: int | None) -> Iterator[torch.Tensor]:
    """The images of one label map in turn, uint8 (3, H, W); one at a time, so that none depends on its batch."""
    maps = [m[None] for m in maps]
    if isinstance(generator, SDMUNet):
        generate, seed = sampler_for(generator, config, progress=True), sample_seed(arguments.seed, zlib.crc32(stem.encode()))
        for k in range(arguments.num):
            yield generate(maps[0], [seed], k, *maps[1:])[0]
    else:
        plan = plan_noise(stem, maps[0][0], generator, arguments, resampled)
        kept = None if resampled is None else to_uint8(generator(maps[0], z=plan[0]["z"]))[0]
        for given in plan:
            image = to_uint8(generator(maps[0], **given))[0]
            yield image if resampled is None else torch.where(given["region"], image, kept)


@torch.no_grad()
def main(arguments: argparse.Namespace) -> None:
    if arguments.num < 1 or arguments.interpolate == 1 or arguments.interpolate < 0 or arguments.seed < 0:
        raise UserError("--num takes at least 1, --interpolate at least 2, --seed at least 0")
    if bool(arguments.resample) + bool(arguments.interpolate) + (arguments.noise != "image") > 1:
        raise UserError("choose one of --resample, --interpolate and --noise")
    if arguments.interpolate and arguments.num > 1:
        raise UserError("--interpolate does not go with --num")
    rank, world_size, device = setup_distributed()
    paths = find_label_maps(arguments.labels)
    generator, state = load_generator(arguments.checkpoint or newest_checkpoint(), device, arguments.config)
    config = check_options(generator, state["config"], arguments)
    chosen_class = find_class(arguments.resample, state["class_names"]) if arguments.resample else None
    count = arguments.interpolate or arguments.num
    names = {path: [f"{path.stem}.png"] if count == 1 else [f"{path.stem}_{k}.png" for k in range(count)] for path in paths}
    wanted = [name for group in names.values() for name in group] + ["grid.png"] * arguments.grid
    if len(set(wanted)) < len(wanted):
        raise UserError(f"{arguments.labels}: two images would be called {next(n for n in wanted if wanted.count(n) > 1)}; rename a "
                        f"label map (or leave --grid out, whose sheet is grid.png)")
    for name in wanted:
        if (arguments.out / name).exists():
            raise UserError(f"{arguments.out / name} exists; choose another --out")
    share = paths[rank::world_size]
    for path in tqdm(share, desc="check", leave=False, disable=rank != 0):
        read_maps(path, state, arguments.instances)
    gather(None)  # nothing is written before every process has checked its share
    arguments.out.mkdir(parents=True, exist_ok=True)

    rows = {}
    with ThreadPoolExecutor(2) as pool:  # reads the next map and writes finished images while the network runs
        read = lambda path: pool.submit(read_maps, path, state, arguments.instances)
        upcoming, written = [read(path) for path in share[:1]], []
        for path, following in zip(tqdm(share, unit="map", disable=rank != 0), [*share[1:], None]):
            maps = [m.to(device) for m in upcoming.pop().result()]
            upcoming += [read(following)] if following else []
            images = []
            for k, image in enumerate(draw(generator, config, path.stem, maps, arguments, chosen_class)):
                images.append(image.permute(1, 2, 0).cpu().numpy())
                written.append(pool.submit(Image.fromarray(images[-1]).save, arguments.out / names[path][k]))
            if arguments.grid:
                colors = colorize(maps[0].cpu().numpy().astype(np.uint8), np.array(state["palette"], np.uint8))
                rows[path] = np.concatenate([colors, *images], axis=1)
        for task in written:
            task.result()
    rows = {path: row for part in gather(rows) for path, row in part.items()}
    if rank == 0:
        if arguments.grid:
            Image.fromarray(np.concatenate([rows[path] for path in paths])).save(arguments.out / "grid.png")
        height, width = state["config"]["data"]["size"]
        print(f"{len(paths) * count} images of {height} x {width} pixels in {arguments.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, metavar="DIR")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the newest runs/*/checkpoints/latest.pt")
    parser.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR")
    parser.add_argument("--num", type=int, default=1, metavar="K", help="samples a label map: NAME_0.png ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", action="store_true", help="write grid.png too: a row a label map, its colors and samples")
    parser.add_argument("--resample", metavar="CLASS", help="redraw only what this class shows; the rest is as without it")
    parser.add_argument("--interpolate", type=int, default=0, metavar="N", help="N images from one noise to another")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration of an official checkpoint")
    parser.add_argument("--noise", choices=("image", "class", "pixel"), default="image",
                        help="OASIS: one noise vector for the image, for each class in it, or for each pixel")
    parser.add_argument("--steps", type=int, metavar="N", help="SDM: steps of an image, 2 to 1000")
    parser.add_argument("--guidance", type=float, metavar="S", help="SDM: 1 is plain, 1.5 published")
    parser.add_argument("--instances", type=Path, metavar="DIR", help="SDM with instance edges: folder of instance maps")
    try:
        main(parser.parse_args())
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
