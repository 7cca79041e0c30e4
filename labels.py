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

    palette: (C + 1, 3) uint8, colors of the classes and, last, of void; all are different.
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

    def encode(self, label: np.ndarray) -> np.ndarray:
        """Classes 0..C -> what a gray label file of this data set holds: the first id of each class."""
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
    return LabelFormat(names, _distinct(palette, names, path), table)


def _distinct(palette: np.ndarray, names: list[str], source: str | Path) -> np.ndarray:
    """The colors of classes and void; void gets a gray of its own where a class has its color. Raises UserError where two
    classes have the same."""
    *colors, void = map(tuple, palette.tolist())
    for color, name in zip(colors, names):
        if (first := names[colors.index(color)]) != name:
            raise UserError(f"{source}: {first} and {name} have the same color, {list(color)}; give each class its own")
    grays = ((v, v, v) for v in (0, 255, 127, *range(1, 255)))
    return np.array([*colors, void if void not in colors else next(gray for gray in grays if gray not in colors)], np.uint8)


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
        palette = _distinct(np.array([*colors, (0, 0, 0)][:count + 1], np.uint8), names, "data.palette")
    else:
        raise UserError(f"data.palette: {len(colors)} colors for {count} classes; write one [r, g, b] a class, in their "
                        "order, then void's if it is not black")
    ids = np.full(max(256, (void or 0) + 1), UNKNOWN, np.uint8)
    if is_mask(colors):
        for index in reversed(range(len(colors))):  # where void has the gray of a class, it is the class
            ids[colors[index][0]] = index
        if void is not None and ids[void] < count:
            raise UserError(f"data.void is {void}, and so is the gray of {names[ids[void]]} in data.palette; change one")
    else:  # in order, without void: 11 classes with void 11 are 0 to 10, with void 0 they are 1 to 11
        void = count if void is None and colors is not None else void
        ids[[i for i in range(count + 1) if i != void][:count]] = np.arange(count)
    if void is not None:
        ids[void] = count
    return LabelFormat(names, np.array(palette, np.uint8), ids, rgb=colors is not None)


def is_mask(colors: list[list[int]] | None) -> bool:
    """Whether `data.palette` has gray colors alone: gray files hold these then, as 0/255 masks do, and not ids."""
    return colors is not None and all(len(set(color)) == 1 for color in colors)


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
            if image.mode == "F":
                raise UserError(f"{path}: has floating-point values; save images with 8 bits, label maps with 8 or 16")
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

    Gray pictures hold ids, and those with a palette of their own too. RGB holds the colors of the classes; or, where its
    channels are equal and no such color, ids.
    Raises UserError naming the file, the value and the remedy.
    """
    if image.mode == "1" and form.ids[1] == UNKNOWN:
        image = image.convert("L")  # 0 and 255
    colored, by_color = len(image.getbands()) > 1, None
    values = np.asarray(image.convert("RGB") if colored else image)
    if form.rgb and (colored or image.mode == "P"):
        shown = values if colored else np.asarray(image.convert("RGB"))
        order = np.argsort(form.palette @ PACK, kind="stable")
        place = order[np.searchsorted(form.palette @ PACK, shown @ PACK, sorter=order).clip(max=form.num_classes)]
        wrong = (form.palette[place] != shown).any(-1)
        by_color = None if wrong.any() else place.astype(np.uint8)
    if colored:
        if by_color is not None:
            return by_color
        if (values != values[..., :1]).any():
            if form.rgb:
                raise UserError(f"{path}: color {values[wrong][0].tolist()} is not in the palette; add it to data.palette, "
                                "or save the file again as PNG if it went through JPEG or a smooth resize")
            colors = np.unique(values.reshape(-1, 3), axis=0)[:5].tolist()
            raise UserError(f"{path}: RGB colors ({str(colors)[1:-1]} ...) where class ids are expected; "
                            "set data.palette to one [r, g, b] a class")
        values = values[..., 0]
    place = values.astype(int, casting="safe").clip(-1, len(form.ids))  # files can have 16 bits, and a sign
    label = np.append(form.ids, np.uint8(UNKNOWN))[place]
    bad = values[label == UNKNOWN]
    if not len(bad):
        if by_color is not None and (by_color != label).any():
            raise UserError(f"{path}: its own palette shows other classes than its indices; save it as RGB, or as gray ids")
        return label
    if bad[0] == 255 and np.isin(values, (0, 255)).all():
        raise UserError(f"{path}: id 255, as in a 0/255 mask; set data.classes=2 and "
                        "data.palette=[[0,0,0],[255,255,255]], or data.void=255 if 255 means unlabelled")
    known = np.flatnonzero(form.ids < form.num_classes)
    raise UserError(f"{path}: id {bad[0]} is none of the ids of {form.num_classes} classes, {known[0]} to {known[-1]}, nor "
                    "void; mend the file, raise data.classes or name a table there, leave out a data.palette of grays, or set "
                    "data.void to the id of unlabelled pixels")


def read_label_file(path: str | Path, state: dict, size: tuple[int, int], content: bytes | None = None) -> np.ndarray:
    """A label file of any size -> uint8 (H, W) in 0..C at `size` (nearest); state: of a checkpoint, whose classes, palette
    and ids the file has; content as in `open_image`. Raises UserError."""
    form = LabelFormat(state["class_names"], np.array(state["palette"], np.uint8), np.array(state["ids"], np.uint8))
    with open_image(path, content) as image:
        label = Image.fromarray(decode_label(image, path, form))
    return np.array(label.resize(size[::-1], Image.Resampling.NEAREST))
