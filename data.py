"""Data sets of (image, label map) pairs; `labels.py` has the convention that every one of them is turned into.

Sizes: without augmentation a pair is resized to exactly `size`, aspect not kept, and with it to `load_scale` x `size`,
then cropped at random to `size` and perhaps flipped, both as SPADE and OASIS do. Images are resized with an antialiased
bicubic filter, label maps by the nearest pixel.

    python data.py check  --config configs/camvid.yaml data.root=../camvid       reads every file, counts classes
    python data.py show   --config configs/camvid.yaml --out sheet.png           images, label maps, legend
    python data.py export --config configs/camvid.yaml --split val --count 100 --out exported
`export` writes exported/images and exported/labels, PNG files at `data.size`; label files are spelled as the data set
spells them, so that `sample.py --labels` and `evaluate.py --labels` read them like the original ones.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import scenes
from config import UserError
from labels import LabelFormat, damaged, decode_label, label_format, open_image

SPLITS = ("train", "val")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
IMAGE_FILTER = Image.Resampling.BICUBIC


class UnequalSizes(UserError):
    """An image and its label map differ in size."""


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps its pairs: `folders[split]` lists the (images, labels) folders, the first that exists wins.

    The two names of a pair are equal but for the endings and the suffixes.
    """

    folders: dict[str, list[tuple[str, str]]]
    image_ending: str = ""
    label_ending: str = ""
    instance_ending: str | None = None  # instance maps lie beside the label maps, with this in place of label_ending
    nested: bool = False  # one more level of folders (cities)
    equal_sizes: bool = True


LAYOUTS = {
    "folder": Layout({split: [(f"{split}/images", f"{split}/labels")] for split in SPLITS}),
    "ade20k": Layout({"train": [("images/training", "annotations/training")],
                      "val": [("images/validation", "annotations/validation")]}),
    "coco_stuff": Layout({split: [(f"{split}_img", f"{split}_label")] for split in SPLITS}),
    "cityscapes": Layout({split: [(f"leftImg8bit/{split}", f"gtFine/{split}")] for split in SPLITS},
                         "_leftImg8bit", "_gtFine_labelIds", "_gtFine_instanceIds", nested=True),
    # Results are published on the test split; images are 1024 x 1024 and label maps 512 x 512.
    "celebamask_hq": Layout({"train": [("train/images", "train/labels"), ("train_img", "train_label")],
                             "val": [("test/images", "test/labels"), ("test_img", "test_label"),
                                     ("val/images", "val/labels"), ("val_img", "val_label")]}, equal_sizes=False),
}


def list_pairs(root: Path, layout: Layout, split: str) -> tuple[list[tuple[Path, Path]], list[str]]:
    """(image, label) paths sorted by name, and one line for each file that has no partner. Raises UserError."""
    tried = [(root / image, root / label) for image, label in layout.folders[split]]
    found = [pair for pair in tried if pair[0].is_dir() and pair[1].is_dir()]
    if not found:
        missing = next(folder for folder in tried[0] if not folder.is_dir())
        raise UserError(f"{missing}: no such folder; set data.root (now {root}) to the folder that holds it")
    image_folder, label_folder = found[0]
    images, problems = _files_by_name(image_folder, IMAGE_SUFFIXES, layout.image_ending, layout.nested)
    labels, twins = _files_by_name(label_folder, {".png"}, layout.label_ending, layout.nested)
    if not images and not labels:
        raise UserError(f"{image_folder}: empty; put images there, and label maps (PNG) of the same names in {label_folder}")
    problems += twins
    for name in sorted(images.keys() - labels.keys()):
        wanted = label_folder / f"{name}{layout.label_ending}.png"
        problems.append(f"{images[name]}: no label map {wanted}; add it (label maps are PNG) or remove the image")
    for name in sorted(labels.keys() - images.keys()):
        wanted = image_folder / f"{name}{layout.image_ending}.jpg"
        problems.append(f"{labels[name]}: no image {wanted} or .png; add it or remove the label map")
    return [(images[name], labels[name]) for name in sorted(images.keys() & labels.keys())], problems


def _files_by_name(folder: Path, suffixes: set[str], ending: str, nested: bool) -> tuple[dict[str, Path], list[str]]:
    files: dict[str, Path] = {}
    problems = []
    for inner in sorted(p for p in folder.iterdir() if p.is_dir()) if nested else [folder]:
        for file_name in sorted(os.listdir(inner)):
            stem, suffix = os.path.splitext(file_name)
            if suffix.lower() not in suffixes or not stem.endswith(ending) or file_name.startswith("."):
                continue
            name = (f"{inner.name}/" if nested else "") + stem.removesuffix(ending)
            if name in files:
                problems.append(f"{inner / file_name}: a second file of the name {files[name]}; remove one of them")
            files.setdefault(name, inner / file_name)
    return files, problems


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB. Of 16-bit gray the upper byte is kept (Pillow alone would clip it); alpha is dropped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file of any mode -> uint8 RGB (H, W, 3), resized to `size` (height, width) if given. Raises UserError."""
    with open_image(path) as image:
        return _resize_image(image, path, size or image.size[::-1], (0, 0, *image.size))


def _resize_image(image: Image.Image, path: str | Path, size, box) -> np.ndarray:
    """Decodes and resizes the part `box` (x0, y0, x1, y1 in pixels) to `size` (height, width)."""
    width, height = image.size
    try:
        # JPEG decodes to 1/2, 1/4 or 1/8 at a fraction of the work; twice what is asked is left to the filter.
        image.draft(None, (int(2 * size[1] * width / (box[2] - box[0])), int(2 * size[0] * height / (box[3] - box[1]))))
        shrunk = image.width / width, image.height / height
        box = box[0] * shrunk[0], box[1] * shrunk[1], box[2] * shrunk[0], box[3] * shrunk[1]
        return np.asarray(to_rgb(image).resize(size[::-1], IMAGE_FILTER, box, reducing_gap=2.0))
    except Exception as error:  # Pillow raises many kinds of errors on damaged files
        raise damaged(path, error) from None


def read_instance_map(path: str | Path, size: tuple[int, int], box: tuple | None = None) -> np.ndarray:
    """An instance map (8- or 16-bit gray PNG) -> int32 (H, W), the part `box` of it resized (nearest). Raises UserError."""
    with open_image(path) as image:
        try:  # one mode for all bit depths, with all bits kept
            ids = Image.fromarray(np.asarray(image).astype(np.int32))
            return np.array(ids.resize(size[::-1], Image.Resampling.NEAREST, box))
        except Exception as error:  # as above
            raise damaged(path, error) from None


class LabeledImages(torch.utils.data.Dataset):
    """Pairs of image and label map at one size; made by `build_dataset`.

    `dataset[index]` is the plain pair, `dataset[index, draw]` an augmented one that depends on (seed, draw) alone:
    image uint8 (3, H, W), label uint8 (H, W) in 0..C and, with `instances`, int32 (H, W), an id for each thing that the
    data set tells apart; one crop and flip for all. Raises UserError for files that cannot be used; with skip_broken they
    are named once, counted in `num_broken` (over all loading processes), and another pair is drawn, always the same.
    """

    def __init__(self, form: LabelFormat, split: str, size, seed: int, augment: bool, load_scale: float, flip: bool,
                 pairs: list[tuple[Path, Path]] | None = None, layout: Layout = LAYOUTS["folder"],
                 skip_broken: bool = False, instances: bool = False):
        self.form, self.split, self.size, self.seed = form, split, tuple(size), seed
        self.augment, self.load_scale, self.flip = augment, load_scale, flip
        self.pairs, self.layout, self.skip_broken, self.instances = pairs, layout, skip_broken, instances
        self.num_classes, self.class_names, self.palette = form.num_classes, form.class_names, form.palette
        self.broken = torch.zeros(len(self), dtype=torch.bool).share_memory_()  # loading processes add to it

    def __len__(self) -> int:
        return scenes.LENGTHS[self.split] if self.pairs is None else len(self.pairs)

    def stem(self, index: int) -> str:
        """A name for the pair that is unique within the split."""
        if self.pairs is None:
            return f"{self.split}_{index:05d}"
        return self.pairs[index][1].stem.removesuffix(self.layout.label_ending)

    @property
    def num_broken(self) -> int:
        return int(self.broken.sum())

    def mark_broken(self, index: int, error: UserError) -> None:
        """Remembers a broken pair and names it, the first time."""
        if not self.broken[index]:
            self.broken[index] = True
            say_once(f"skipped: {error}")

    def instance_path(self, index: int) -> Path:
        """The instance map of a pair."""
        label = self.pairs[index][1]
        return label.with_name(label.stem.removesuffix(self.layout.label_ending) + self.layout.instance_ending + ".png")

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, ...]:
        index, draw = key if isinstance(key, tuple) else (key, None)
        if not 0 <= index < len(self):
            raise IndexError(index)
        for attempt in range(100):
            try:
                return self._load(index, draw)
            except UserError as error:
                if not self.skip_broken:
                    raise
                self.mark_broken(index, error)
                index = int(np.random.default_rng([self.seed, index, attempt]).integers(len(self)))
        raise UserError(f"{self.pairs[index][0]}: 100 broken files in a row; see `python data.py check` and mend them")

    def _load(self, index: int, draw: int | None) -> tuple[torch.Tensor, ...]:
        position, flip = None, False
        if self.augment and draw is not None:
            rng = np.random.default_rng([self.seed, draw])
            position, flip = rng.random(2), self.flip and rng.random() < 0.5
        maps = self._render(index, position) if self.pairs is None else self._read(index, position)
        image, *labels = (a[:, ::-1] for a in maps) if flip else maps
        return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in (image.transpose(2, 0, 1), *labels))

    def _render(self, index: int, position) -> tuple[np.ndarray, np.ndarray]:
        if position is None:
            return scenes.render(self.split, index, self.size)
        height, width = (round(s * self.load_scale) for s in self.size)
        image, label = scenes.render(self.split, index, (height, width))
        top, left = (int(p * (s - t + 1)) for p, s, t in zip(position, (height, width), self.size))
        area = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        return image[area], label[area]

    def _read(self, index: int, position) -> tuple[np.ndarray, ...]:
        image_path, label_path = self.pairs[index]
        with open_image(image_path) as image, open_image(label_path) as label:
            self._compare_sizes(index, image.size, label.size)
            boxes = [self._crop_box(*picture.size, position) for picture in (image, label)]
            pixels = _resize_image(image, image_path, self.size, boxes[0])
            try:
                label = label.resize(self.size[::-1], Image.Resampling.NEAREST, boxes[1])
            except Exception as error:  # as above
                raise damaged(label_path, error) from None
        classes = decode_label(label, label_path, self.form)
        if not self.instances:
            return pixels, classes
        return pixels, classes, read_instance_map(self.instance_path(index), self.size, boxes[1])

    def _compare_sizes(self, index: int, image_size: tuple[int, int], label_size: tuple[int, int]) -> None:
        if self.layout.equal_sizes and image_size != label_size:
            image_path, label_path = self.pairs[index]
            turned = " (if the image is turned by an EXIF tag, save it upright)" if image_size == label_size[::-1] else ""
            raise UnequalSizes(f"{label_path}: {label_size[0]} x {label_size[1]}, but {image_path} is "
                               f"{image_size[0]} x {image_size[1]}; make both the same size{turned}")

    def _crop_box(self, width: int, height: int, position) -> tuple[float, float, float, float]:
        """The part (x0, y0, x1, y1) of a picture that becomes the output; position: (y, x) in 0..1, None = all of it."""
        if position is None:
            return 0, 0, width, height
        part_width, part_height = width / self.load_scale, height / self.load_scale
        left, top = position[1] * (width - part_width), position[0] * (height - part_height)
        return left, top, min(left + part_width, width), min(top + part_height, height)

    def inspect(self, index: int, image_too: bool = True) -> tuple[tuple[int, int] | None, np.ndarray | None, list[UserError]]:
        """Reads a pair's files at full size: the image's (width, height), the label map, and what is wrong with them."""
        size, classes, problems = None, None, []
        image_path, label_path = self.pairs[index]
        try:
            with open_image(image_path) as image:
                size = image.size
                if image_too:
                    _resize_image(image, image_path, (1, 1), (0, 0, *size))
        except UserError as error:
            problems.append(error)
        try:
            with open_image(label_path) as label:
                if size:
                    self._compare_sizes(index, size, label.size)
                classes = decode_label(label, label_path, self.form)
            if self.instances:
                read_instance_map(self.instance_path(index), (1, 1))
        except UserError as error:
            problems.append(error)
        return size, classes, problems


def build_dataset(data_config: dict, split: str, seed: int = 0, augment: bool = False) -> LabeledImages:
    """The data set that a config's `data` section names.

    Args:
        split: "train" or "val".
        augment: whether `dataset[index, draw]` crops and flips; if not, the draw is accepted and changes nothing.
    Raises: UserError for a missing or empty folder, for instance maps of a data set that has none, and for files without
        a partner (with skip_broken they are named).
    """
    form = label_format(data_config)
    options = {key: data_config[key] for key in ("size", "load_scale", "flip")} | {"seed": seed, "augment": augment}
    layout = LAYOUTS.get(data_config["name"], LAYOUTS["folder"])
    skip_broken, instances = data_config["skip_broken"], data_config["instances"]
    if instances and layout.instance_ending is None:
        raise UserError(f"data.instances: true, but {data_config['name']} has no instance maps; set it to false, and the "
                        f"edges of the label map are used")
    if data_config["name"] == "scenes":
        return LabeledImages(form, split, **options)
    if data_config["root"] is None:
        raise UserError(f"data.root: null; set it to the folder of the data set {data_config['name']}")
    pairs, problems = list_pairs(Path(data_config["root"]), layout, split)
    if problems and not (skip_broken and pairs):
        raise UserError(problems[0] + (f" ({len(problems) - 1} more such files)" if len(problems) > 1 else ""))
    for problem in problems:
        say_once(f"skipped: {problem}")
    return LabeledImages(form, split, **options, pairs=pairs, layout=layout, skip_broken=skip_broken, instances=instances)


@cache
def say_once(line: str) -> None:
    """Print to stderr what this process has not said yet: judges build the data sets of the training anew."""
    print(line, file=sys.stderr)


def leave_signals_to_parent(worker: int) -> None:
    """For loading processes, which Ctrl-C and a cluster's SIGTERM reach too: the process that trains finishes its step, saves
    and ends them. One that is left over dies a minute after its SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))


def evenly_spaced(length: int, count: int) -> list[int]:
    """`count` of the indices 0..length - 1, from the first on; all of them where count is 0 or too large."""
    count = min(count or length, length)
    return [i * length // count for i in range(count)]


def in_threads(function: Callable, items: Iterable, text: str) -> Iterator:
    """Results in order, with a progress bar; Pillow decodes outside Python's lock."""
    items = list(items)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            yield from tqdm(pool.map(function, items), text, len(items), leave=False)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def quick_check(dataset: LabeledImages, most: int = 2000, image_bytes: float = 256e6) -> None:
    """Reads label files, and images up to so many bytes, before training starts: all, or evenly spaced ones.

    Raises: UserError for the first file that cannot be used; with skip_broken such files are named, marked and counted.
    """
    if dataset.pairs is None:
        return
    spread = lambda count: np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), max(count, 1))).astype(int)).tolist()
    mean_bytes = np.mean([dataset.pairs[index][0].stat().st_size for index in spread(100)])
    with_image = set(spread(min(most, int(image_bytes / max(mean_bytes, 1)))))

    def look(index: int) -> tuple[int, list[UserError]]:
        return index, dataset.inspect(index, index in with_image)[2]

    for index, problems in in_threads(look, sorted(with_image | set(spread(most))), f"checking {dataset.split}"):
        if problems and not dataset.skip_broken:
            raise problems[0]
        if problems:
            dataset.mark_broken(index, problems[0])
    if dataset.num_broken:
        say_once(f"skipped: {dataset.num_broken} of {len(dataset)} pairs of {dataset.split}")


if __name__ == "__main__":
    from data_tools import main  # not above: it imports this module

    main(__doc__)
