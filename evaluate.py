"""Metrics of a model, or of images made by any system; EVALUATION.md is the protocol.

    python evaluate.py --checkpoint FILE [--config FILE] [--split val] [--out metrics.json] [key.path=value ...]
    python evaluate.py --images DIR --labels DIR --real DIR --config FILE [--out metrics.json] [key.path=value ...]

Prints a table and writes JSON that says what was measured. `torchrun --nproc_per_node N evaluate.py ...` shares the
images over N processes, with the same result. The folders of the second form hold files of the same names: NAME.png, or
for several samples of a label map NAME_0.png, NAME_1.png ... as sample.py writes them. Label maps are spelled as the
config's data set spells them. Images must have the config's data.size; real ones and label maps are resized to it.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import load_generator, whole_file
from config import DataSettings, Settings, UserError, apply_overrides, check_settings, load_settings, run_script
from dataset import IMAGE_SUFFIXES, LAYOUTS, LabeledImages, Layout, build_dataset, read_image
from distributed import setup_distributed
from evaluation import evaluate_generator
from interface import sample_seed
from labels import open_image
from segmenter import segmenter_for
from systems import system_for


def files_by_name(folder: Path, layout: Layout) -> dict[str, Path]:
    """Image files of a folder, by their paths below it without suffix and the data set's endings. Raises UserError."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        name = path.relative_to(folder).with_suffix("").as_posix()
        name = name.removesuffix(layout.image_ending).removesuffix(layout.label_ending)
        if name in files:
            raise UserError(f"{path}: a second file of the name {files[name]}; remove one of them")
        files[name] = path
    if not files:
        raise UserError(f"{folder}: no such folder, or no images in it")
    return files


def partners(folder: Path, names: list[str], layout: Layout) -> list[list[Path]]:
    """The files of a folder for each label map: [NAME.png], or [NAME_0.png, NAME_1.png, ...]. Raises UserError."""
    files, found = files_by_name(folder, layout), []
    for name in names:
        numbered = itertools.takewhile(files.__contains__, (f"{name}_{k}" for k in itertools.count()))
        found.append([name] if name in files else list(numbered))
        wanted = max(len(found[0]), 1)
        if len(found[-1]) != wanted:
            raise UserError(f"{folder / name}.png: {len(found[-1])} such images, not {wanted}; there must be one for "
                            f"each of the {len(names)} label maps, or the same number ({name}_0.png ...) for each")
    extra = sorted(files.keys() - set(itertools.chain(*found)) - {"grid"})  # grid.png is a sheet of sample.py
    if extra:
        raise UserError(f"{files[extra[0]]}: no label map of that name ({len(extra)} such images); remove them or "
                        f"complete the label maps")
    return [[files[key] for key in keys] for keys in found]


def open_folders(images: Path, labels: Path, real: Path, data: DataSettings) -> tuple[LabeledImages, list[list[Path]]]:
    """The real images and label maps of two folders as a data set, and the samples of each map. Raises UserError."""
    layout, (height, width) = LAYOUTS.get(data.name, LAYOUTS["folder"]), data.size
    label_files = files_by_name(labels, layout)
    names = sorted(label_files)
    pairs = {name: (files[0], label_files[name]) for name, files in zip(names, partners(real, names, layout))}
    samples = partners(images, names, layout)
    for path in itertools.chain(*samples):
        with open_image(path) as image:
            if image.size != (width, height):
                raise UserError(f"{path}: {image.width} x {image.height}, but data.size is {height} high, {width} "
                                f"wide; add data.size=[{image.height},{image.width}] to compare at that size")
    return LabeledImages(data.model_copy(update={"instances": False, "skip_broken": False}), "val", pairs), samples


def folder_sampler(samples: list[list[Path]], seed: int) -> Callable[..., torch.Tensor]:
    """The `generate` of `evaluate_generator` that reads images from files, samples[index][k]."""
    index_of = {sample_seed(seed, index): index for index in range(len(samples))}

    def generate(label_map: torch.Tensor, sample_seeds: list[int], k: int) -> torch.Tensor:
        images = [torch.from_numpy(read_image(samples[index_of[s]][k]).copy()) for s in sample_seeds]
        return torch.stack(images).permute(0, 3, 1, 2).to(label_map.device)

    return generate


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[Callable, LabeledImages, Settings, Path, dict]:
    """(generate, data set, settings, cache folder, what the result says of its source). Raises UserError."""
    if args.checkpoint:
        system, generator, state = load_generator(args.checkpoint, device, args.config)
        given = apply_overrides(system.settings.model_dump(mode="json"), args.overrides)
        settings = check_settings(given, str(args.checkpoint))
        dataset = build_dataset(settings.data, args.split)
        if list(dataset.class_names) != list(state["class_names"]):
            raise UserError(f"{args.checkpoint}: trained on {len(state['class_names'])} classes, the data set has "
                            f"{dataset.num_classes} or others; evaluate on the data set it was trained on")
        system = system_for(settings, dataset.num_classes)
        folder = args.checkpoint.absolute().parent  # of train.py's checkpoints, whose cache is shared
        cache = (folder.parents[1] if folder.name == "checkpoints" else folder) / "cache"
        source = {"checkpoint": str(args.checkpoint), "step": state["step"]} | system.protocol()
        return system.sampler(generator), dataset, settings, cache, source
    settings = load_settings(args.config, args.overrides)
    dataset, samples = open_folders(args.images, args.labels, args.real, settings.data)
    if len(samples[0]) < max(2, settings.eval.diversity_samples):  # as many as there are
        judges = settings.eval.model_copy(update={"diversity_samples": len(samples[0])})
        settings = settings.model_copy(update={"eval": judges})
    source = {"images": str(args.images), "labels": str(args.labels), "real": str(args.real)}
    return folder_sampler(samples, settings.seed), dataset, settings, Path("runs") / "cache", source


def table(metrics: dict) -> str:
    """The metrics as text: the figures, then IoU and color error of each class beside those of the real images."""
    def show(value):
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    lines = [f"{key:32} {show(value)}" for key, value in metrics.items() if not isinstance(value, dict)]
    columns = {"IoU": "class_iou", "IoU real": "class_iou_real", "color error": "class_color_error"}
    columns = {title: metrics[key] for title, key in columns.items()}
    lines += ["", f"{'class':32}" + "".join(f"{title:>13}" for title in columns)]
    lines += [f"{name[:31]:32}" + "".join(f"{show(column[name]):>13}" for column in columns.values())
              for name in metrics["class_color_error"]]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--split", choices=("train", "val"), default="val", help="of the checkpoint's data set")
    parser.add_argument("--images", type=Path, help="generated images")
    parser.add_argument("--labels", type=Path, help="the label maps they were made from")
    parser.add_argument("--real", type=Path, help="the real images of those label maps")
    parser.add_argument("--config", type=Path, help="of the data set of --images, or of an official checkpoint")
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
    generate, dataset, settings, cache, source = prepare(args, device)
    segmenter = segmenter_for(settings, cache, device, rank)
    metrics = evaluate_generator(generate, dataset, settings.eval, device, cache, segmenter, settings.seed, rank,
                                 world_size, settings.data.workers)
    metrics["protocol"] |= {"source": source, "data": settings.data.model_dump(mode="json")}
    if rank == 0:
        with whole_file(args.out) as path:
            path.write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"{table(metrics)}\n\nwrote {args.out}")


if __name__ == "__main__":
    try:
        run_script(main)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
