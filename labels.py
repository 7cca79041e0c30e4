"""Label files and the one label convention.

Everywhere inside the program classes are 0..C-1 and unlabelled pixels ("void") are C; a label map is uint8 (H, W) on
the host and int64 on the device. Label files keep the ids or colors of their data set, on the way in (training,
`sample.py`, `evaluate.py`) and out (`data.py export`); `LabelFormat` says which. Nothing else knows them.
"""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

import scenes
from config import DataSettings, UserError

UNKNOWN = 255  # marks ids that mean nothing; void is C, so there are at most 254 classes
MOST_PIXELS = 2 ** 24  # of a label map that comes over the network
PACK = np.array([65536, 256, 1], np.int32)  # (..., 3) colors -> one number each


@dataclass(frozen=True)
class LabelFormat:
    """The classes of a data set and how its label files spell them.

    palette: (C + 1, 3) uint8, colors of the classes and, last, of void. If all classes are gray, gray files hold
        these colors (0/255 masks), not ids.
    ids: uint8, id in a file -> class 0..C-1, void C, or UNKNOWN for an id that is an error; (256,), or longer if the
        data set has larger ids (16-bit files).
    rgb: whether RGB files are read by the palette.
    """

    class_names: list[str]
    palette: np.ndarray
    ids: np.ndarray
    rgb: bool = True

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def gray(self) -> bool:
        return self.rgb and bool((self.palette[:-1] == self.palette[:-1, :1]).all())

    def classes_of(self, ids: np.ndarray) -> np.ndarray:
        """What is in a file -> uint8, classes 0..C or UNKNOWN."""
        place = ids.astype(int, casting="safe").clip(-1, len(self.ids))  # files can have 16 bits, and a sign
        return np.append(self.ids, np.uint8(UNKNOWN))[place]

    def encode(self, label: np.ndarray) -> np.ndarray:
        """Classes 0..C -> what a gray label file of this data set holds: the first id of each class, or its gray."""
        if self.gray:
            return self.palette[label, 0]
        ids = np.array([(*np.flatnonzero(self.ids == c), UNKNOWN)[0] for c in range(self.num_classes + 1)])
        return ids.astype(np.uint8 if len(self.ids) == 256 else np.uint16)[label]


def read_class_table(path: str | Path) -> LabelFormat:
    """Reads a table with the columns id, name, r, g, b; rows named void are the unlabelled ids. Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [(row["name"].strip(), *(int(row[column]) for column in ("id", "r", "g", "b")))
                    for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: {error}; a class table is a .csv with the columns id,name,r,g,b") from None
    names = [row[0] for row in rows if row[0] != "void"]
    _check_names(names, path)
    ids = [row[1] for row in rows]
    if not all(0 <= number <= 255 for row in rows for number in row[2:]) or not 0 <= min(ids) <= max(ids) <= 65535:
        raise UserError(f"{path}: ids must be 0 to 65535, colors 0 to 255")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: id {max(ids, key=ids.count)} stands in two rows")
    table, palette = np.full(max(256, max(ids) + 1), UNKNOWN, np.uint8), np.zeros((len(names) + 1, 3), np.uint8)
    for name, id_, *color in reversed(rows):  # of several rows named void the first has the color
        index = len(names) if name == "void" else names.index(name)
        table[id_], palette[index] = index, color
    return LabelFormat(names, palette, table)


def _check_names(names: list[str], source: str | Path) -> None:
    if not 1 <= len(names) < UNKNOWN:
        raise UserError(f"{source}: {len(names)} classes; give 1 to {UNKNOWN - 1}, by number, names or a class table")
    if len(set(names)) < len(names):
        raise UserError(f"{source}: class names must be different, {max(names, key=names.count)} is there twice")


def label_format(data: DataSettings) -> LabelFormat:
    """The classes and label files that the settings name; needs no data set on disk. Raises UserError."""
    classes, void, colors = data.classes, data.void, data.palette
    if data.name == "scenes":
        classes, colors, void = *zip(*scenes.CLASSES), scenes.VOID
    elif data.name != "folder":
        classes = str(Path(__file__).parent / "classes" / f"{data.name}.csv")
    if isinstance(classes, str):
        form = read_class_table(classes)
        if colors is not None:
            raise UserError(f"data.palette: the colors of the classes are in {classes}; change them there, and set "
                            "data.palette=null")
        if void is None:
            return form
        ids = np.pad(form.ids, (0, max(0, void + 1 - len(form.ids))), constant_values=UNKNOWN)
        ids[void] = form.num_classes
        return replace(form, ids=ids)
    if isinstance(classes, int):
        classes = [f"class {i}" for i in range(min(classes, UNKNOWN))]
    names = [str(name) for name in classes or ()]
    _check_names(names, "data.classes")
    count = len(names)
    if colors is None:  # PASCAL VOC's color map without its black, then black for void
        code, channel, bit = np.arange(1, count + 1)[:, None, None], np.arange(3)[:, None], np.arange(8)
        palette = [*((code >> (3 * bit + channel) & 1) << (7 - bit)).sum(axis=2), (0, 0, 0)]
    elif len(colors) in (count, count + 1):
        palette = [*colors, (0, 0, 0)][:count + 1]
        void = count if void is None else void
    else:
        raise UserError(f"data.palette: {len(colors)} colors for {count} classes; write one [r, g, b] a class, in their "
                        "order, then void's if it is not black")
    # The ids without void are the classes in order: 11 classes with void 11 are 0 to 10, with void 0 they are 1 to 11.
    ids = np.full(max(256, (void or 0) + 1), UNKNOWN, np.uint8)
    ids[[i for i in range(count + 1) if i != void][:count]] = np.arange(count)
    if void is not None:
        ids[void] = count
    return LabelFormat(names, np.array(palette, np.uint8), ids, rgb=colors is not None)


@contextmanager
def open_image(path: str | Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """An image file, not yet decoded, for a `with` block. Raises UserError for what Pillow raises, in the block too.

    content: what is in the file, where `path` is only its name.
    """
    source = str(path) if content is None else io.BytesIO(content)
    try:
        with Image.open(source, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF")) as image:  # others (EPS) are programs
            if content is not None and image.width * image.height > MOST_PIXELS:
                raise UserError(f"{path}: {image.width} x {image.height} pixels; make it smaller")
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many kinds of errors on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(f" {source!r}", "")[:120]
        raise UserError(f"{path}: damaged, cut short or no image ({reason}); replace or remove it") from None


def decode_label(image: Image.Image, path: str | Path, form: LabelFormat) -> np.ndarray:
    """A label picture -> uint8 (H, W) in 0..C.

    Gray and palette pictures hold ids (gray ones colors if all classes are gray, and all their values are such colors). RGB
    holds the palette's colors, the first class that has a color wins; or, where its channels are equal and no color of the
    palette, ids.
    Raises UserError naming the file, the value and the remedy.
    """
    if image.mode == "1" and form.gray:
        image = image.convert("L")
    colored = len(image.getbands()) > 1 or image.mode == "L" and form.gray
    values = np.asarray(image.convert("RGB") if colored else image)
    if colored:
        code, (known, first) = values @ PACK, np.unique(form.palette @ PACK, return_index=True)
        place = np.searchsorted(known, code).clip(max=len(known) - 1)
        wrong = known[place] != code
        if form.rgb and not wrong.any():
            return first[place].astype(np.uint8)
        gray = (values == values[..., :1]).all()
        holds_ids = gray and (not form.gray or (form.classes_of(values[..., 0]) != UNKNOWN).all())
        if form.rgb and not holds_ids:
            raise UserError(f"{path}: color {values[wrong][0].tolist()} is not in the palette; add it to data.palette, "
                            "or save the file again as PNG if it went through JPEG or a smooth resize")
        if not gray:
            colors = np.unique(values.reshape(-1, 3), axis=0)[:5].tolist()
            raise UserError(f"{path}: RGB colors ({str(colors)[1:-1]} ...) where class ids are expected; "
                            "set data.palette to one [r, g, b] a class")
        values = values[..., 0]
    label = form.classes_of(values)
    bad = values[label == UNKNOWN]
    if not len(bad):
        return label
    if bad[0] == 255 and np.isin(values, (0, 255)).all():
        raise UserError(f"{path}: id 255, as in a 0/255 mask; set data.classes=2 and "
                        "data.palette=[[0,0,0],[255,255,255]], or data.void=255 if 255 means unlabelled")
    known = np.flatnonzero(form.ids < form.num_classes)
    raise UserError(f"{path}: id {bad[0]} is none of the ids of {form.num_classes} classes, {known[0]} to {known[-1]}, nor "
                    "void; mend the file, raise data.classes, or set data.void to the id of unlabelled pixels")


def read_label_file(path: str | Path, num_classes: int, palette, ids, content: bytes | None = None) -> np.ndarray:
    """A label file of any size -> uint8 (H, W) in 0..C; palette and ids as in `LabelFormat`, content as in
    `open_image`. Raises UserError."""
    with open_image(path, content) as image:
        form = LabelFormat([""] * num_classes, np.asarray(palette, np.uint8), np.asarray(ids, np.uint8))
        return decode_label(image, path, form)
