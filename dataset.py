"""Data sets of (image, label map) pairs; `labels.py` has the convention that every one of them is turned into.

Sizes: without augmentation a pair is resized to exactly `size`, aspect not kept, and with it to `load_scale` x `size`,
then cropped at random to `size` and perhaps flipped, both as SPADE and OASIS do. Images are resized with an antialiased
bicubic filter, label maps by the nearest pixel. Images are turned upright as viewers show them (EXIF), label maps are
taken as they are.
"""

import glob
import hashlib
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from tqdm.contrib.concurrent import thread_map

import scenes
from config import DataSettings, UserError
from labels import decode_label, label_format, open_image

SPLITS = ("train", "val")
EXAMPLES = 24  # label maps that the painting page offers to start from
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> PIL.Image.Transpose that makes it upright


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps its pairs: `folders[split]` lists the (images, labels) folders, the first that exist win.

    Folders may have sub folders. The two names of a pair are equal but for the endings and the suffixes.
    """

    folders: dict[str, list[tuple[str, str]]]
    image_ending: str = ""
    label_ending: str = ""
    instance_ending: str | None = None  # instance maps lie beside the label maps, with this in place of label_ending
    equal_sizes: bool = True


LAYOUTS = {
    "folder": Layout({split: [(f"{split}/images", f"{split}/labels")] for split in SPLITS}),
    "ade20k": Layout({"train": [("images/training", "annotations/training")],
                      "val": [("images/validation", "annotations/validation")]}),
    "coco_stuff": Layout({split: [(f"{split}_img", f"{split}_label")] for split in SPLITS}),
    "cityscapes": Layout({split: [(f"leftImg8bit/{split}", f"gtFine/{split}")] for split in SPLITS},
                         "_leftImg8bit", "_gtFine_labelIds", "_gtFine_instanceIds"),
    # Results are published on the test split; images are 1024 x 1024 and label maps 512 x 512.
    "celebamask_hq": Layout({"train": [("train/images", "train/labels"), ("train_img", "train_label")],
                             "val": [("test/images", "test/labels"), ("test_img", "test_label"),
                                     ("val/images", "val/labels"), ("val_img", "val_label")]}, equal_sizes=False),
}


def files_by_name(folder: Path, suffixes: set[str], ending: str = "") -> dict[str, Path]:
    """The files below a folder by their names, paths without ending and suffix. Raises UserError where two have the same."""
    files = {}
    for below in sorted(glob.glob("**/*", root_dir=folder, recursive=True)):  # through links, without hidden files
        stem, suffix = os.path.splitext(below)
        if suffix.lower() in suffixes and stem.endswith(ending):
            # Files with endings, those of Cityscapes, begin with the name of their folder.
            name = os.path.basename(stem).removesuffix(ending) if ending else stem
            if name in files:
                raise UserError(f"{files[name]} and {folder / below} are both called {name}; remove or rename one")
            files[name] = folder / below
    return files


def label_files(folder: Path, data: DataSettings) -> dict[str, Path]:
    """The label maps below a folder by their names: PNG files; of a data set with endings only those that have its, if any."""
    files, layout = files_by_name(folder, {".png"}), LAYOUTS.get(data.name)
    known = {name: path for name, path in files.items() if layout and name.endswith(layout.label_ending)}
    if not (known or files):
        raise UserError(f"{folder}: no label maps; --labels names a folder of PNG files")
    return known or files


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file of any mode -> upright uint8 RGB (H, W, 3), resized to `size` (height, width) if given.

    Of 16-bit gray the upper byte is kept; alpha is dropped. Raises UserError.
    """
    with open_image(path) as image:
        return _decode_image(image, size)[1]


def _decode_image(image: Image.Image, size: tuple[int, int] | None, *crop) -> tuple[tuple[int, int], np.ndarray]:
    """Upright (width, height) of an open image; and its pixels, or those of a crop (see `_crop_box`), at `size`."""
    orientation = 1
    with suppress(Exception):  # Pillow raises many kinds of errors on damaged EXIF; viewers pass over it
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if "exif" in image.info else 1  # not of TIFF
    if orientation in TURNS:  # ImageOps.exif_transpose also writes EXIF anew, which stops where it is damaged
        image = image.transpose(TURNS[orientation])
    width, height = image.size
    size, box = size or (height, width), _crop_box(width, height, *crop)
    # JPEG decodes to 1/2, 1/4 or 1/8 at a fraction of the work; twice what is asked is left to the filter.
    image.draft(None, (int(2 * size[1] * width / (box[2] - box[0])), int(2 * size[0] * height / (box[3] - box[1]))))
    if image.mode.startswith("I"):  # Pillow alone would clip 16 bits to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    image = image if image.mode == "RGB" else image.convert("RGB")
    box = tuple(np.multiply(box, 2 * (image.width / width, image.height / height)))  # in what was decoded
    return (width, height), np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box, reducing_gap=2.0))


def _crop_box(width: int, height: int, scale: float = 1.0, position=(0.0, 0.0)) -> tuple[float, float, float, float]:
    """The part (x0, y0, x1, y1) of a picture that is 1 / scale as wide and high; position: (y, x) in 0..1."""
    part_width, part_height = width / scale, height / scale
    left, top = position[1] * (width - part_width), position[0] * (height - part_height)
    return left, top, min(left + part_width, width), min(top + part_height, height)


def read_instance_map(path: str | Path, size: tuple[int, int], box: tuple | None = None) -> np.ndarray:
    """An instance map (8- or 16-bit gray PNG) -> int32 (H, W): the part `box` resized (nearest). Raises UserError."""
    with open_image(path) as image:
        ids = Image.fromarray(np.asarray(image).astype(np.int32))  # one mode for all bit depths, with all bits kept
        return np.array(ids.resize(size[::-1], Image.Resampling.NEAREST, box))


class LabeledImages(torch.utils.data.Dataset):
    """Pairs of image and label map at one size; made by `build_dataset`.

    `dataset[index]` is the plain pair, `dataset[index, draw]` an augmented one that depends on (seed, draw) alone:
    image uint8 (3, H, W), label uint8 (H, W) in 0..C and, with `instances`, int32 (H, W), an id for each thing that the
    data set tells apart; one crop and flip for all. `names[index]` is a path that is unique within the split.
    Raises UserError for files that cannot be used.
    """

    def __init__(self, data: DataSettings, split: str, pairs: dict[str, tuple[Path, Path]] | None = None, seed: int = 0):
        """pairs: {name: (image, label map)}, none for scenes."""
        self.data, self.split, self.seed = data, split, seed
        self.size, self.form = data.size, label_format(data)
        self.num_classes, self.palette = self.form.num_classes, self.form.palette
        self.class_names = self.form.class_names
        self.pairs = None if pairs is None else list(pairs.values())
        self.names = [f"{split}_{i:05d}" for i in range(scenes.LENGTHS[split])] if pairs is None else list(pairs)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, ...]:
        index, draw = key if isinstance(key, tuple) else (key, None)
        index = range(len(self))[index]  # IndexError behind the last pair, also where pairs are drawn
        crop, flip = (), False
        if draw is not None:
            rng = np.random.default_rng([self.seed, draw])
            crop, flip = (self.data.load_scale, rng.random(2)), self.data.flip and rng.random() < 0.5
        image, *labels = (a[:, ::-1] if flip else a for a in self._read(index, *crop)[1])
        return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in (image.transpose(2, 0, 1), *labels))

    def _read(self, index: int, scale: float = 1.0, position=(0.0, 0.0), whole_label: bool = False):
        """((width, height) of the image, [image, label map (as large as its file if asked), instances if any])."""
        if self.pairs is None:
            height, width = (round(s * scale) for s in self.size)
            top, left = (int(p * (s - t + 1)) for p, s, t in zip(position, (height, width), self.size))
            area = slice(top, top + self.size[0]), slice(left, left + self.size[1])
            return (width, height), [a[area] for a in scenes.render(self.split, index, (height, width))]
        image_path, label_path = self.pairs[index]
        layout = LAYOUTS.get(self.data.name, LAYOUTS["folder"])
        with open_image(image_path) as image:
            (width, height), pixels = _decode_image(image, self.size, scale, position)
        with open_image(label_path) as label:
            if layout.equal_sizes and label.size != (width, height):
                raise UserError(f"{label_path}: {label.width} x {label.height}, but {image_path} is {width} x {height};"
                                " make both the same size, upright")
            box = _crop_box(*label.size, scale, position)
            if not whole_label:
                label = label.resize(self.size[::-1], Image.Resampling.NEAREST, box)
            maps = [pixels, decode_label(label, label_path, self.form)]
        if self.data.instances:
            stem = label_path.stem.removesuffix(layout.label_ending) + layout.instance_ending
            maps.append(read_instance_map(label_path.with_name(f"{stem}.png"), self.size, box))
        return (width, height), maps

    def inspect(self, index: int) -> tuple[tuple[int, int], np.ndarray]:
        """Read all of a pair: the image's (width, height), and (C + 1,) pixels of each class. Raises UserError."""
        size, (_, label, *_) = self._read(index, whole_label=True)
        return size, np.bincount(label.ravel(), minlength=self.num_classes + 1)


def find_pairs(data: DataSettings, split: str) -> tuple[dict[str, tuple[Path, Path]] | None, list[str]]:
    """{name: (image, label map)} of a split on disk, none for scenes; and a line for each file without a partner.

    Pairs come in the order of their names, paths without ending and suffix. Where "val" has no folder, `data.holdout`
    is the share of the training pairs that make it; whether a pair belongs to it follows from its name alone.
    Raises UserError for a missing or empty folder, and instance maps of a data set that has none.
    """
    if data.instances and (data.name == "scenes" or not LAYOUTS[data.name].instance_ending):
        raise UserError(f"data.instances: {data.name} has no instance maps; set it to false: label maps give edges too")
    foreign = {"scenes": ("root", "classes", "void", "palette"), "folder": ()}.get(data.name, ("classes",))
    for key in foreign:
        if (value := getattr(data, key)) is not None:
            raise UserError(f"data.{key} is {value!r:.60}, and data.name {data.name}, which has its own; for data of yours set "
                            f"data.name=folder, else data.{key}=null")
    if data.name == "scenes":
        return None, []
    root, layout = Path(data.root or ""), LAYOUTS[data.name]
    found = {part: [(root / images, root / labels) for images, labels in layout.folders[part]
                    if (root / images).is_dir() and (root / labels).is_dir()] for part in SPLITS}
    held_out = data.holdout > 0 and not found["val"]
    if not found["train" if held_out else split]:
        wanted = " and ".join(layout.folders[split][0])
        raise UserError(f"{root}: no folders {wanted} in it; set data.root to the folder that holds them, or, if there "
                        "is only train, hold out a share of it with data.holdout=0.1")
    image_folder, label_folder = found["train" if held_out else split][0]
    images = files_by_name(image_folder, IMAGE_SUFFIXES, layout.image_ending)
    labels = files_by_name(label_folder, {".png"}, layout.label_ending)
    lonely = [f"{images[name]}: no label map {label_folder / name}{layout.label_ending}.png (PNG, as JPEG changes ids); "
              "add it or remove the image" for name in sorted(images.keys() - labels.keys())]
    lonely += [f"{labels[name]}: no image {image_folder / name}{layout.image_ending}.jpg or .png; add it or remove the "
               "label map" for name in sorted(labels.keys() - images.keys())]
    names = sorted(images.keys() & labels.keys())
    if held_out:
        hashes = [int(hashlib.sha256(os.fsencode(name)).hexdigest()[:8], 16) / 16**8 for name in names]  # in 0..1
        names = [name for name, share in zip(names, hashes) if (share < data.holdout) == (split == "val")]
    if not names and not lonely:
        raise UserError(f"{image_folder}: no images for {split} (data.holdout={data.holdout}); put more there, and "
                        f"label maps (PNG) of the same names in {label_folder}")
    return {name: (images[name], labels[name]) for name in names}, lonely


def build_dataset(data: DataSettings, split: str, seed: int = 0) -> LabeledImages:
    """The data set that the settings name; split is "train" or "val". Raises UserError as `find_pairs` does, and for files
    without a partner."""
    pairs, lonely = find_pairs(data, split)
    if lonely:
        raise UserError(lonely[0] + f" ({len(lonely) - 1} more such files)" * (len(lonely) > 1))
    return LabeledImages(data, split, pairs, seed)


def example_pairs(data: DataSettings, class_names: list[str]) -> Sequence[tuple[torch.Tensor, ...]]:
    """EXAMPLES pairs of the val split, if it is on disk; else rendered scenes, if the classes are theirs; else none."""
    for settings in (data, DataSettings(name="scenes", size=data.size)):
        with suppress(UserError):
            if label_format(settings).class_names == class_names:
                dataset = build_dataset(settings, "val")
                return torch.utils.data.Subset(dataset, evenly_spaced(len(dataset), EXAMPLES))
    return ()


def leave_signals_to_parent(worker: int) -> None:
    """For loading processes, which Ctrl-C and a cluster's SIGTERM reach too: the process that trains finishes its step,
    saves and ends them. One that is left over dies a minute after its SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))


def evenly_spaced(length: int, count: int) -> list[int]:
    """`count` of the indices 0..length - 1, from the first on; all of them where count is 0 or too large."""
    count = min(count or length, length)
    return [i * length // count for i in range(count)]


def quick_check(dataset: LabeledImages, most: int = 1000) -> None:
    """Read so many pairs before training starts, all or evenly spaced ones; those of `scenes` are drawn, not read.

    Raises UserError for the first that cannot be used.
    """
    indices = evenly_spaced(len(dataset), most) if dataset.pairs else []
    thread_map(dataset.inspect, indices, desc=f"checking {dataset.split}", leave=False)
