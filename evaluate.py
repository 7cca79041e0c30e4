"""Metrics of a model, or of images made by any system; EVALUATION.md is the protocol.

    python evaluate.py --checkpoint runs/scenes/checkpoints/latest.pt [--config FILE] [--split val] [--out metrics.json] [key.path=value ...]
    python evaluate.py --images DIR --labels DIR --real DIR --config FILE [--out metrics.json] [key.path=value ...]

Prints a table and writes JSON that says what was measured. `torchrun --nproc_per_node N evaluate.py ...` shares the images
over N processes, with the same result. The folders of the second form hold files of the same names: DIR/NAME.png, or for
several samples of a label map DIR/NAME_0.png, DIR/NAME_1.png ... as sample.py writes them. Label maps are spelled as the
config's data set spells them. Images must have the config's data.size; real ones and label maps are resized to it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import load_generator
from config import UserError, apply_overrides, check_config, load_config, one_line
from data import IMAGE_SUFFIXES, LAYOUTS, LabeledImages, build_dataset, read_image
from distributed import setup_distributed
from labels import label_format, open_image
from metrics import evaluate_generator, sample_seed, sampler_for
from segmenter import segmenter_for


def files_by_name(folder: Path, option: str, endings: tuple[str, ...]) -> dict[str, Path]:
    """Image files of a folder, by their names without suffix and without the data set's endings. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"--{option} {folder}: no such folder")
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        name = path.stem
        for ending in endings:
            name = name.removesuffix(ending)
        if name in files:
            raise UserError(f"--{option} {path}: a second file of the name {files[name]}; remove one of them")
        files[name] = path
    if not files:
        raise UserError(f"--{option} {folder}: no images in it")
    return files


def paired_folders(labels: Path, real: Path, config: dict) -> tuple[LabeledImages, list[str]]:
    """The real images and label maps of two folders as a data set, and their names. Raises UserError."""
    layout = LAYOUTS.get(config["data"]["name"], LAYOUTS["folder"])
    endings = (layout.image_ending, layout.label_ending)
    label_files, real_files = files_by_name(labels, "labels", endings), files_by_name(real, "real", endings)
    same_names(label_files, labels, real_files, real)
    names = sorted(label_files)
    return LabeledImages(label_format(config["data"]), "val", config["data"]["size"], config["seed"], augment=False,
                         load_scale=1.0, flip=False, pairs=[(real_files[n], label_files[n]) for n in names],
                         layout=layout), names


def same_names(first: dict, first_folder: Path, second: dict, second_folder: Path) -> None:
    """Raise UserError unless the files of two folders have the same names."""
    for files, others, folder in ((first, second, second_folder), (second, first, first_folder)):
        lonely = sorted(files.keys() - others.keys())
        if lonely:
            raise UserError(f"{files[lonely[0]]}: no file of that name in {folder} ({len(first)} and {len(second)} files, "
                            f"{len(lonely)} without partner); complete the folder or remove the file")


def image_samples(folder: Path, names: list[str], labels: Path, config: dict) -> list[list[Path]]:
    """The files of each name's samples: [NAME.png], or [NAME_0.png, NAME_1.png, ...]. Raises UserError."""
    layout = LAYOUTS.get(config["data"]["name"], LAYOUTS["folder"])
    files = files_by_name(folder, "images", (layout.image_ending, layout.label_ending))
    samples, used = [], set()
    for name in names:
        found = [name] if name in files else []
        while not found[:1] == [name] and f"{name}_{len(found)}" in files:
            found.append(f"{name}_{len(found)}")
        if not found:
            raise UserError(f"{folder / name}.png: missing ({len(names)} label maps in {labels}, {len(files)} images); "
                            f"make an image for every label map")
        if samples and len(found) != len(samples[0]):
            raise UserError(f"{folder}: {len(found)} samples of {name}, but {len(samples[0])} of {names[0]}; "
                            f"make the same number for every label map")
        samples.append([files[key] for key in found])
        used.update(found)
    extra = sorted(files.keys() - used - {"grid"})  # grid.png is a sheet of sample.py
    if extra:
        raise UserError(f"{files[extra[0]]}: no label map of that name in {labels} ({len(extra)} such images); "
                        f"remove them or complete the label maps")
    height, width = config["data"]["size"]
    for path in (path for paths in samples for path in paths):
        with open_image(path) as image:
            if image.size != (width, height):
                raise UserError(f"{path}: {image.width} x {image.height}, but data.size is {height} high, {width} wide; "
                                f"add data.size=[{image.height},{image.width}] to compare at that size")
    return samples


def folder_sampler(samples: list[list[Path]], seed: int):
    """The `generate` of `evaluate_generator` that reads images from files, samples[index][k]."""
    index_of = {sample_seed(seed, index): index for index in range(len(samples))}

    def generate(label_map: torch.Tensor, sample_seeds: list[int], k: int) -> torch.Tensor:
        images = [torch.from_numpy(read_image(samples[index_of[s]][k]).copy()) for s in sample_seeds]
        return torch.stack(images).permute(0, 3, 1, 2).to(label_map.device)

    return generate


def table(metrics: dict) -> str:
    """The metrics as text: the figures, then IoU and color error of each class beside those of the real images."""
    def show(value):
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    lines = [f"{key:32} {show(value)}" for key, value in metrics.items() if not isinstance(value, dict)]
    columns = {"IoU": "class_iou", "IoU real": "class_iou_real", "color error": "class_color_error"}
    columns = {title: metrics[key] for title, key in columns.items() if key in metrics}
    lines += ["", f"{'class':32}" + "".join(f"{title:>13}" for title in columns)]
    lines += [f"{name[:31]:32}" + "".join(f"{show(column[name]):>13}" for column in columns.values())
              for name in metrics["class_color_error"]]
    return "\n".join(lines)


def write_json(metrics: dict, path: Path) -> None:
    """Write atomically. Raises UserError."""
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(metrics, indent=2) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); choose another file") from error


def prepare(args: argparse.Namespace, device: torch.device, rank: int = 0):
    """(generate, data set, config, cache folder, what the result says of its source). Raises UserError."""
    if args.checkpoint:
        generator, state = load_generator(args.checkpoint, device, args.config)
        config = check_config(apply_overrides(state["config"], args.overrides), str(args.checkpoint))
        dataset = build_dataset(config["data"], args.split)
        if list(dataset.class_names) != list(state["class_names"]):
            raise UserError(f"{args.checkpoint}: trained on {len(state['class_names'])} classes, the data set has "
                            f"{dataset.num_classes} or others; evaluate on the data set it was trained on")
        folder = args.checkpoint.absolute().parent
        cache = (folder.parents[1] if folder.name == "checkpoints" else folder) / "cache"  # train.py's, where it is one of its
        source = {"checkpoint": str(args.checkpoint), "step": state["step"]}
        if config["generator"]["name"] == "sdm":
            source["diffusion"] = config["diffusion"]
        return sampler_for(generator, config, progress=rank == 0), dataset, config, cache, source
    config = load_config(args.config, args.overrides)
    dataset, names = paired_folders(args.labels, args.real, config)
    samples = image_samples(args.images, names, args.labels, config)
    if len(samples[0]) < max(2, config["eval"]["diversity_samples"]):  # as many as there are
        config["eval"]["diversity_samples"] = len(samples[0])
    source = {"images": str(args.images), "labels": str(args.labels), "real": str(args.real)}
    return folder_sampler(samples, config["seed"]), dataset, config, Path("runs") / "cache", source


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--split", choices=("train", "val"), default="val", help="of the checkpoint's data set")
    parser.add_argument("--images", type=Path, help="generated images")
    parser.add_argument("--labels", type=Path, help="the label maps they were made from")
    parser.add_argument("--real", type=Path, help="the real images of those label maps")
    parser.add_argument("--config", type=Path, help="data set and eval settings for --images, or of an official checkpoint")
    parser.add_argument("--out", type=Path, default=Path("metrics.json"))
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    folders = (args.images, args.labels, args.real)
    if bool(args.checkpoint) == any(folders) or not args.checkpoint and not all((*folders, args.config)):
        raise UserError("give either --checkpoint, or all of --images, --labels, --real and --config")
    return args


def main() -> None:
    args = parse_arguments()
    rank, world_size, device = setup_distributed()
    generate, dataset, config, cache, source = prepare(args, device, rank)
    segmenter = segmenter_for(config, cache, device, rank)
    metrics = evaluate_generator(generate, dataset, config["eval"], device, cache, segmenter, config["seed"], rank,
                                 world_size, config["data"]["workers"])
    metrics["protocol"] |= {"source": source, "data": config["data"]}
    if rank == 0:
        write_json(metrics, args.out)
        print(f"{table(metrics)}\n\nwrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
