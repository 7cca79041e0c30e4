"""Mutated files through the functions that read what comes from outside: each is read or refused in one line, soon.

A few hundred here, thousands with `-m slow` (`-s` shows the figures).
"""

import io
import os
import pickle
import random
import signal
import struct
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import labels
import scenes
from checkpoint import load_checkpoint, load_generator, read_official
from config import UserError, check_settings, load_settings
from dataset import read_image, read_instance_map
from sample import read_maps
from systems import system_for

SETTINGS = check_settings({**TINY, "generator": {"channels": [4, 4], "z_dim": 4, "style_dim": 4, "num_tokens": 2}}, "tiny")
FORM = labels.label_format(SETTINGS.data)
ODD = ["!!python/object/apply:os.system ['touch executed']", "!!python/name:os.system", "!!int ''", "!!timestamp x",
       "2001-99-99", "!!bool x", "!!float x", "!!set [1]", "&a [*a]", "*nothing", "9" * 5000, "1" + "0" * 400, ".nan", "-.inf",
       "-1", "0", "1e999", "0x", "0b2", "1:99:99", "{}", "[]", "[[]]", "{a: b", "null", "''", '"\\0"', "'\\ud800'", "\t", "\x07",
       "? [1]", "<<: [1]", "- x", "!!binary '%'", "[[1, 2, 3], [4, 5]]", "[[256, 0, 0]]", "true", "é", "%", "@", "|", "---"]


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


def some_bytes(content: bytes, rng: random.Random) -> bytes:
    """Overwritten, cut, repeated or moved bytes."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 4, 40))
        way = rng.randrange(5)
        if way < 2:
            content[place : place + length] = rng.randbytes(length)
        elif way == 2:
            content[place : place + 1] = bytes([content[place] ^ 1 << rng.randrange(8)]) if place < len(content) else b""
        elif way == 3:
            content[place:place] = content[rng.randrange(len(content) + 1) :][:length]
        else:
            del content[place : place + length if rng.random() < 0.8 else None]
        content = content or bytearray(1)
    return bytes(content)


def png(content: bytes, rng: random.Random) -> bytes:
    """One chunk altered and its checksum made right again; or bytes of the whole."""
    if rng.random() < 0.3:
        return some_bytes(content, rng)
    chunks, place = [], 8
    while place < len(content):
        length = struct.unpack(">I", content[place : place + 4])[0]
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    chosen = rng.randrange(len(chunks))
    kind, body = chunks[chosen]
    if kind == b"IDAT" and rng.random() < 0.7:  # the pixels, packed again
        body = zlib.compress(some_bytes(zlib.decompress(body), rng))
    else:
        body = some_bytes(body or b"\0", rng)
    chunks[chosen] = kind, body
    return content[:8] + b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)


def yaml_text(content: bytes, rng: random.Random) -> bytes:
    """A value or a line replaced by an odd one; or bytes."""
    if rng.random() < 0.3:
        return some_bytes(content, rng)
    lines = content.decode().splitlines()
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.randrange(len(lines))
        key, colon, _ = lines[place].partition(":")
        odd = rng.choice(ODD)
        lines[place] = rng.choice([f"{key}{colon} {odd}", odd, f"{odd}: 1", lines[rng.randrange(len(lines))], "  " + lines[place]])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def table_text(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return some_bytes(content, rng)
    rows = [line.split(",") for line in content.decode().splitlines()]
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice(["", "-1", "256", "x", "1e3", '"', "9" * 5000, "a,b", "\0", "void", "\u0661"])
    return "\n".join(map(",".join, rows)).encode()


def inner_pickle(content: bytes, rng: random.Random) -> bytes:
    """The pickled part of a checkpoint altered, with checksums that fit; or bytes of the whole."""
    if rng.random() < 0.4:
        return some_bytes(content, rng)
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(result, "w") as target:
        for part in source.namelist():
            body = source.read(part)
            target.writestr(part, some_bytes(body, rng) if part.endswith("data.pkl") else body)
    return result.getvalue()


def picture(pixels: np.ndarray, format: str, mode: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def stored(state) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def checkpoint() -> bytes:
    return stored({**STATE, "step": 3, "ema": system_for(SETTINGS, FORM.num_classes).build().state_dict()})


IMAGE, LABEL = scenes.render("val", 0, (24, 32))
COLORS = FORM.palette[LABEL]
STATE = {"config": SETTINGS.model_dump(mode="json"), "class_names": FORM.class_names, "palette": FORM.palette.tolist(), "ids": FORM.ids.tolist()}
FOLDER = b"""data:
  name: folder
  root: here
  size: [32, 48]
  classes: [sky, road, car]
  void: 255
  palette: [[70, 130, 180], [128, 64, 128], [0, 0, 142], [0, 0, 0]]
  load_scale: 1.3
generator:
  channels: [8, 16]
train:
  lr_generator: 1e-3
  betas: [0.0, 0.99]
"""
KINDS = {  # what is mutated -> (files, mutation, reader)
    "label png": (lambda: [picture(LABEL, "PNG", "L"), picture(LABEL, "PNG", "P"), picture(COLORS, "PNG", "RGB"), picture(COLORS, "PNG", "RGBA")],
                  png, lambda path: read_maps(path, STATE, (32, 32))),
    "instance png": (lambda: [picture(LABEL, "PNG", "L")], png, lambda path: read_instance_map(path, (8, 8))),
    "image": (lambda: [picture(IMAGE, "JPEG", "RGB", progressive=progressive) for progressive in (False, True)] +
              [picture(IMAGE, format, "RGB") for format in ("WEBP", "BMP", "TIFF")] +
              [picture(IMAGE, "TIFF", "RGB", compression="tiff_lzw")],
              some_bytes, lambda path: read_image(path, (16, 16))),
    "image png": (lambda: [picture(IMAGE, "PNG", mode) for mode in ("RGB", "P", "LA")], png, lambda path: read_image(path, (16, 16))),
    "config": (lambda: [FOLDER, (ROOT / "config.yaml").read_bytes(), (ROOT / "configs/camvid.yaml").read_bytes()],
               yaml_text, lambda path: labels.label_format(load_settings(path).data)),
    "class table": (lambda: [(ROOT / "classes/cityscapes.csv").read_bytes()], table_text, labels.read_class_table),
    "checkpoint": (lambda: [checkpoint()], some_bytes, load_generator),
    "checkpoint's pickle": (lambda: [checkpoint()], inner_pickle, lambda path: check_settings(load_checkpoint(path)["config"], str(path))),
    "official checkpoint": (lambda: [stored({"a": torch.ones(3), "b": torch.zeros(2, 2)})], inner_pickle, read_official),
}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused(tmp_path, monkeypatch, kind, count):
    monkeypatch.chdir(tmp_path)
    sources, mutate, read = KINDS[kind]
    sources, rng, path = sources(), random.Random(kind), tmp_path / "mutated"

    def stop(*_):
        raise Hang(f"{kind}: {path} takes more than 20 s of CPU time")

    before, slowest, reads = signal.signal(signal.SIGPROF, stop), 0.0, 0
    try:
        for source in sources:
            path.write_bytes(source)
            read(path)
        for number in range(count):
            path.write_bytes(mutate(sources[number % len(sources)], rng))
            signal.setitimer(signal.ITIMER_PROF, 20)
            start = time.process_time()
            try:
                read(path)
                reads += 1
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, error
            slowest = max(slowest, time.process_time() - start)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert [file.name for file in tmp_path.iterdir()] == ["mutated"]  # nothing was executed or written
    assert reads < count
    print(f"{kind}: {count} files, {reads} read, {count - reads} refused, slowest {slowest:.2f} s of CPU time")


class Executes:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("write", [
    lambda path: path.write_bytes(stored({"config": Executes()})),
    lambda path: path.write_bytes(pickle.dumps({"config": Executes()})),
    lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(executed) (w) file closefile\n")])
def test_programs_are_not_executed(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "program"
    write(path)
    for read in (load_checkpoint, read_official, read_image, lambda path: read_maps(path, STATE, (32, 32))):
        with pytest.raises(UserError, match="program: "):
            read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["program"]


@pytest.mark.parametrize("key", ["name", "data", "data.palette", "data.classes", "train.steps", "generator.name", "train.betas"])
def test_yaml_that_stands_for_gigabytes(tmp_path, key):
    """Twelve levels of nine references to the level below."""
    nested = "&a0 [x, x, x, x, x, x, x, x, x]"
    for level in range(1, 12):
        nested = f"&a{level} [{nested}" + f", *a{level - 1}" * 8 + "]"
    section, dot, last = key.rpartition(".")
    before = {"palette": "name: folder, classes: 3, ", "classes": "name: folder, "}.get(last, "")
    path = tmp_path / "bomb.yaml"
    path.write_text(f"{section}: {{{before}{last}: {nested}}}" if dot else f"{last}: {nested}")
    with pytest.raises(UserError, match=f"{key} is |{key}: ") as error:
        labels.label_format(load_settings(path).data)
    assert len(str(error.value)) < 1000
