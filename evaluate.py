"""Metrics of a model, or of images made by any system; EVALUATION.md is the protocol.

    python evaluate.py --checkpoint FILE [--config FILE] [--split val] [--out metrics.json] [key.path=value ...]
    python evaluate.py --images DIR --labels DIR --real DIR --config FILE [--out metrics.json] [key.path=value ...]

Prints a table and writes JSON that says what was measured. `torchrun --nproc_per_node N evaluate.py ...` shares the
images over N processes, with the same result. The folders of the second form hold files of the same names: NAME.png, or
for several samples of a label map NAME_0.png, NAME_1.png ... as sample.py writes them. Label maps hold the ids
or colors of the config's data set. Images must have the config's data.size; real ones and label maps are resized to it.
"""

import argparse
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import load_generator, whole_file
from config import Settings, UserError, apply_overrides, check_settings, load_settings, run_script
from dataset import IMAGE_SUFFIXES, LabeledImages, build_dataset, files_by_name, read_image
from distributed import setup_distributed
from evaluation import build_judges, evaluate_generator
from interface import sample_seed
from labels import open_image
from segmenter import segmenter_for
from systems import system_for

Source = tuple[Callable, LabeledImages, Settings, Path, dict]  # generate, data set, settings, cache, what the result says of it


def from_checkpoint(args: argparse.Namespace, device: torch.device) -> Source:
    """What is evaluated with --checkpoint. Raises UserError."""
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
    cache = cache if os.access(cache.parent, os.W_OK) else Path("runs") / "cache"
    source = {"checkpoint": str(args.checkpoint), "step": state["step"]} | system.protocol()
    return system.sampler(generator), dataset, settings, cache, source


def samples_of(names: list[str], folder: Path) -> list[list[Path]]:
    """The image files of each label map: [NAME.png], or [NAME_0.png, NAME_1.png, ...]. Raises UserError."""
    files, found = files_by_name(folder, IMAGE_SUFFIXES), []
    for name in names:
        numbered = itertools.takewhile(files.__contains__, (f"{name}_{k}" for k in itertools.count()))
        found.append([files[key] for key in ([name] if name in files else numbered)])
    path, times = Counter(itertools.chain(*found, [folder])).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path}: an image of {times} label maps by its name; rename one of them")
    wanted = max(1, *map(len, found))
    for name, paths in zip(names, found):
        if len(paths) != wanted:
            raise UserError(f"{folder / name}.png: {len(paths)} such images, not {wanted} (or {name}_0.png ...) as for each "
                            f"label map")
    return found


def from_folders(args: argparse.Namespace) -> Source:
    """What is evaluated with --images. Raises UserError."""
    settings, maps = load_settings(args.config, args.overrides), files_by_name(args.labels, IMAGE_SUFFIXES)
    if not maps:
        raise UserError(f"{args.labels}: no such folder, or no images in it")
    real, samples = (samples_of(list(maps), folder) for folder in (args.real, args.images))
    for path in itertools.chain(*samples):
        with open_image(path) as image:
            if image.size != settings.data.size[::-1]:
                raise UserError(f"{path}: {image.width} x {image.height}, not of data.size; add data.size="
                                f"[{image.height},{image.width}] to compare at that size")
    index_of = {sample_seed(settings.seed, index): index for index in range(len(samples))}

    def generate(label_map: torch.Tensor, sample_seeds: list[int], k: int) -> torch.Tensor:
        images = [torch.from_numpy(read_image(samples[index_of[s]][k]).copy()) for s in sample_seeds]
        return torch.stack(images).permute(0, 3, 1, 2).to(label_map.device)

    data = settings.data.model_copy(update={"instances": False})
    dataset = LabeledImages(data, "val", {name: (paths[0], maps[name]) for name, paths in zip(maps, real)})
    judged = {"diversity_samples": min(settings.eval.diversity_samples, len(samples[0])),  # as many as there are
              "rough": "none", "fill_void": False, "truncation": 1.0}  # they are made already
    settings = settings.model_copy(update={"eval": settings.eval.model_copy(update=judged)})
    source = {"images": str(args.images), "labels": str(args.labels), "real": str(args.real)}
    return generate, dataset, settings, Path("runs") / "cache", source


def table(metrics: dict) -> str:
    """The metrics as text: the figures, then IoU and color error of each class beside those of the real images."""
    show = lambda value: "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
    lines = [f"{key:32} {show(value)}" for key, value in metrics.items() if not isinstance(value, dict)]
    columns = {"IoU": "class_iou", "IoU real": "class_iou_real", "color error": "class_color_error"}
    lines += ["", f"{'class':32}" + "".join(f"{title:>13}" for title in columns)]
    lines += [f"{name[:31]:32}" + "".join(f"{show(metrics[key][name]):>13}" for key in columns.values())
              for name in metrics["class_color_error"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of train.py, or an official one")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="of the checkpoint's data set")
    parser.add_argument("--images", type=Path, help="generated images")
    parser.add_argument("--labels", type=Path, help="the label maps they were made from")
    parser.add_argument("--real", type=Path, help="the real images of those label maps")
    parser.add_argument("--config", type=Path, help="of the data set of --images, or of an official checkpoint")
    parser.add_argument("--out", type=Path, default=Path("metrics.json"), help="default: metrics.json")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    folders = args.images, args.labels, args.real
    one_form = not any(folders) if args.checkpoint else all((*folders, args.config))
    if not one_form:
        raise UserError("give either --checkpoint, or all of --images, --labels, --real and --config")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise UserError(f"--out {args.out}: cannot be written; name a file in another folder")
    rank, world_size, device = setup_distributed()
    generate, dataset, settings, cache, source = (
        from_checkpoint(args, device) if args.checkpoint else from_folders(args))
    judges = build_judges(settings.eval, dataset, device)
    segmenter = segmenter_for(settings, cache, device, rank)
    metrics = evaluate_generator(generate, dataset, settings, judges, segmenter, device, cache, rank, world_size)
    metrics["protocol"] |= {"source": source, "data": settings.data.model_dump(mode="json")}
    if rank == 0:
        print(table(metrics))
        if args.out.exists():
            earlier = (args.out.with_stem(f"{args.out.stem}_{k}") for k in itertools.count(1))
            kept = args.out.rename(next(path for path in earlier if not path.exists()))
            print(f"\n{args.out} was there; it is {kept} now")
        with whole_file(args.out) as path:
            path.write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"\nwrote {args.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
