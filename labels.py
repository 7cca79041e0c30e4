"""Label files and the one label convention.

Everywhere inside the program classes are 0..C-1 and unlabelled pixels ("void") are C; a label map is uint8 (H, W) on
the host and int64 on the device. Label files keep the ids or colors of their data set, on the way in (training,
`sample.py`, `evaluate.py`) and out (`data.py export`); `LabelFormat` says which. Nothing else in the program knows them.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import scenes
from config import UserError, shorten

CLASS_TABLES = Path(__file__).parent / "classes"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # the others that Pillow knows by content include programs (EPS)
MAX_CLASSES = 254  # void is C, and 255 marks ids that mean nothing
UNKNOWN = 255
PACK = np.array([65536, 256, 1], np.int32)  # (..., 3) colors -> one number each


class Unreadable(UserError):
    """A file that Pillow cannot decode."""


class WrongLabel(UserError):
    """A label file with an id or a color that means nothing."""


@dataclass(frozen=True)
class LabelFormat:
    """The classes of a data set and how its label files spell them.

    palette: (C + 1, 3) uint8, colors of the classes and, last, of void. If all classes are gray, gray files hold
        these colors (0/255 masks), not ids.
    ids: (256,) uint8, id in a file -> class 0..C-1, void C, or UNKNOWN for an id that is an error.
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

    def encode(self, label: np.ndarray) -> np.ndarray:
        """Classes 0..C -> what a gray label file of this data set holds: the first id of each class, or its gray."""
        if self.gray:
            return self.palette[label, 0]
        first = [np.flatnonzero(self.ids == c)[:1] for c in range(self.num_classes + 1)]
        return np.array([id_[0] if len(id_) else UNKNOWN for id_ in first], np.uint8)[label]


def default_palette(num_classes: int) -> np.ndarray:
    """(C + 1, 3) uint8: PASCAL VOC's color map without its black, then black for void."""
    code = np.arange(1, num_classes + 1)
    palette = np.zeros((num_classes + 1, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:-1, channel] |= (((code >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def id_table(num_classes: int, void: int | None) -> np.ndarray:
    """(256,) uint8, id in a file -> class: 0, 1, 2 ... without `void` are the classes in order.

    So 11 classes with void 11 or 255 have ids 0..10, and 150 classes with void 0 have ids 1..150.
    """
    table = np.full(256, UNKNOWN, np.uint8)
    table[[i for i in range(num_classes + 1) if i != void][:num_classes]] = np.arange(num_classes)
    if void is not None:
        table[void] = num_classes
    return table


def read_class_table(path: str | Path) -> LabelFormat:
    """Reads a table with the columns id, name, r, g, b; rows named void are the unlabelled ids. Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(row["name"].strip(), *(int(row[c]) for c in ("id", "r", "g", "b"))) for row in csv.DictReader(file)]
    except OSError:
        raise UserError(f"{path}: no such class table; data.classes takes a .csv with the columns id,name,r,g,b") from None
    except (KeyError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: {error}; a class table has the columns id,name,r,g,b, numbers 0 to 255") from None
    classes = [row for row in rows if row[0] != "void"]
    voids = [row for row in rows if row[0] == "void"]
    if not all(0 <= number <= 255 for row in rows for number in row[1:]) or len({row[1] for row in rows}) < len(rows):
        raise UserError(f"{path}: ids and colors must be 0 to 255, and an id may stand in one row only")
    table = np.full(256, UNKNOWN, np.uint8)
    table[[row[1] for row in voids]] = min(len(classes), UNKNOWN)
    for index, row in enumerate(classes[:MAX_CLASSES]):
        table[row[1]] = index
    palette = np.array([row[2:] for row in classes] + [voids[0][2:] if voids else (0, 0, 0)], np.uint8)
    return _checked(LabelFormat([row[0] for row in classes], palette, table), str(path))


def _checked(form: LabelFormat, source: str) -> LabelFormat:
    names = form.class_names
    if not 1 <= len(names) <= MAX_CLASSES:
        raise UserError(f"{source}: {len(names)} classes; label maps are 8-bit, so 1 to {MAX_CLASSES}")
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{source}: class names must be texts; put the others in quotes")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{source}: class names must be different, {twice[0]} is there twice")
    return form


def label_format(data_config: dict) -> LabelFormat:
    """The classes and label files of a config's `data` section; needs no data set on disk. Raises UserError."""
    name, classes, void = data_config["name"], data_config["classes"], data_config["void"]
    if name == "scenes":
        palette = np.array([color for _, color in scenes.CLASSES] + [(0, 0, 0)], np.uint8)
        return LabelFormat([name for name, _ in scenes.CLASSES], palette, id_table(len(scenes.CLASSES), scenes.VOID))
    if name != "folder":
        return read_class_table(CLASS_TABLES / f"{name}.csv")
    if isinstance(classes, str):
        return read_class_table(classes)
    if not classes:
        raise UserError(f"data.classes: {classes}; a folder data set needs their number, a list of names or a class table")
    names = [f"class {i}" for i in range(min(classes, MAX_CLASSES + 1))] if isinstance(classes, int) else classes
    if void is not None and not 0 <= void <= 255:
        raise UserError(f"data.void: {void}; label files are 8-bit, so 0 to 255, or null")
    count, colors = len(names), data_config["palette"]
    form = _checked(LabelFormat(names, default_palette(min(count, 255)), id_table(min(count, 255), void), rgb=False),
                    "data.classes")
    if colors is None:
        return form
    if len(colors) not in (count, count + 1) or not all(map(is_color, colors)):
        raise UserError(f"data.palette: {shorten(colors)} does not give {count} classes their colors; write one "
                        "[r, g, b] of 0 to 255 a class, in their order, then void's if it is not black")
    palette = np.array(colors + [[0, 0, 0]] * (count + 1 - len(colors)), np.uint8)
    return LabelFormat(names, palette, id_table(count, count if void is None else void))


def is_color(color) -> bool:
    """Whether a value is [r, g, b] of 0 to 255."""
    return isinstance(color, list) and len(color) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in color)


def colorize(label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Label map (H, W) in 0..C -> uint8 (H, W, 3), by a palette (C + 1, 3)."""
    return np.asarray(palette, np.uint8)[np.asarray(label)]


def open_image(path: str | Path) -> Image.Image:
    """Opens without decoding the pixels. Raises UserError."""
    try:
        return Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise Unreadable(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many kinds of errors on damaged files
        raise damaged(path, error) from None


def damaged(path: str | Path, error: Exception) -> Unreadable:
    """What to tell of a file that Pillow could not decode."""
    reason = (str(error).splitlines() or [""])[0].replace(f" '{path}'", "")[:120]
    return Unreadable(f"{path}: damaged, cut short or no image ({reason or type(error).__name__}); replace or remove it")


def decode_label(image: Image.Image, path: str | Path, form: LabelFormat) -> np.ndarray:
    """A label picture -> uint8 (H, W) in 0..C.

    Gray and palette pictures hold ids (gray ones colors if all classes are gray). RGB holds the palette's colors, the
    first class that has a color wins; or, where its channels are equal and no color of the palette, ids.
    Raises UserError naming the file, the value and the remedy.
    """
    try:
        if image.mode in ("LA", "La"):
            image = image.convert("L")
        elif image.mode in ("RGBA", "RGBX", "PA", "CMYK", "YCbCr", "HSV", "LAB"):
            image = image.convert("RGB")
        values = np.asarray(image.convert("L") if image.mode == "1" and form.gray else image)
    except Exception as error:  # as in open_image
        raise damaged(path, error) from None
    if values.ndim == 2 and form.gray and image.mode in ("1", "L"):
        return _colors_to_classes(np.repeat(values[..., None], 3, axis=2), path, form)
    if values.ndim == 3:
        equal = (values == values[..., :1]).all()
        if not equal or (form.rgb and np.isin(values @ PACK, form.palette @ PACK).all()) or form.gray:
            return _colors_to_classes(values, path, form)
        values = values[..., 0]
    label = form.ids[values if values.dtype == np.uint8 else np.where((values < 0) | (values > 254), 255, values).astype(np.uint8)]
    if label.max(initial=0) == UNKNOWN:
        raise WrongLabel(f"{path}: {_unknown_id(values[label == UNKNOWN][0], values, form)}")
    return label


def _colors_to_classes(values: np.ndarray, path: str | Path, form: LabelFormat) -> np.ndarray:
    code = values @ PACK
    if not form.rgb:
        colors = [[int(c) >> 16, int(c) >> 8 & 255, int(c) & 255] for c in np.unique(code)[:5]]
        raise WrongLabel(f"{path}: RGB colors ({str(colors)[1:-1]} ...) where class ids are expected; "
                        "set data.palette to one [r, g, b] a class")
    known, first = np.unique(form.palette @ PACK, return_index=True)
    place = np.searchsorted(known, code).clip(max=len(known) - 1)
    wrong = known[place] != code
    if wrong.any():
        raise WrongLabel(f"{path}: color {values[wrong][0].tolist()} is not in the palette; add it to data.palette, "
                        "or save the file again as PNG if it went through JPEG or a smooth resize")
    return first[place].astype(np.uint8)


def _unknown_id(bad: int, values: np.ndarray, form: LabelFormat) -> str:
    if set(np.unique(values).tolist()) <= {0, 255}:
        return ("id 255, as in a 0/255 mask; set data.classes=2 and data.palette=[[0,0,0],[255,255,255]], "
                "or data.void=255 if 255 means unlabelled")
    known = np.flatnonzero(form.ids != UNKNOWN)
    spans = [span for span in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)]
    spans = ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in spans)
    return (f"id {int(bad)} is out of range ({form.num_classes} classes, ids {spans}); mend the file, raise data.classes, "
            f"or set data.void={int(bad)} if it means unlabelled")


def read_label_file(path, num_classes: int, palette, void: int | None = None, ids: np.ndarray | None = None) -> np.ndarray:
    """A label file of any size -> uint8 (H, W) in 0..C, void = C. See `decode_label`; raises UserError.

    palette: (C + 1, 3) colors of RGB files. ids: the table `label_format(data_config).ids` of the file's data set;
    without it files hold 0..C-1 and `void` (default C).
    """
    ids = id_table(num_classes, num_classes if void is None else void) if ids is None else np.asarray(ids, np.uint8)
    with open_image(path) as image:
        return decode_label(image, path, LabelFormat([""] * num_classes, np.asarray(palette, np.uint8), ids))
