"""Mutated files through the functions that read what comes from outside: each is read or refused in one line, soon."""

import io
import os
import pickle
import random
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
from checkpoint import label_state, load_checkpoint, load_generator
from config import UserError, check_settings, load_settings
from dataset import read_image
from sample import read_maps
from systems import system_for

SETTINGS = check_settings({**TINY, "generator": {"channels": [4, 4], "z_dim": 4, "style_dim": 4, "num_tokens": 2}}, "tiny")
FORM = labels.label_format(SETTINGS.data)
STATE = {"config": SETTINGS.model_dump(mode="json"), **label_state(FORM), "step": 3,
         "ema": system_for(SETTINGS, FORM.num_classes).build().state_dict()}
IMAGE, LABEL = scenes.render("val", 0, (24, 32))
ODD = ["!!python/object/apply:os.system ['touch executed']", "!!int ''", "!!timestamp x", "2001-99-99", "!!set [1]", "&a [*a]",
       "*nothing", "9" * 5000, ".nan", "-1", "0", "1e999", "0x", "1:99:99", "{}", "[]", "[[]]", "{a: b", "null", "''", '"\\0"',
       "'\\ud800'", "\t", "\x07", "? [1]", "<<: [1]", "- x", "!!binary '%'", "[[256, 0, 0]]", "true", "é", "%", "@", "---"]


def some_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes overwritten, taken out, put in, or repeated; or the file cut short."""
    place, length = rng.randrange(len(content)), rng.choice((1, 1, 4, 40))
    new = rng.choice((rng.randbytes(length), b"", content[place - length :][:length]))
    return content[:place] + new + content[place + rng.choice((0, length, length, len(content))) :]


def png(content: bytes, rng: random.Random) -> bytes:
    """One chunk altered and its checksum made right again."""
    place = content.index(rng.choice([kind for kind in (b"IHDR", b"PLTE", b"IDAT") if kind in content]))
    length = int.from_bytes(content[place - 4 : place])
    chunk = content[place : place + 4] + some_bytes(content[place + 4 : place + 4 + length], rng)
    whole = (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    return content[: place - 4] + whole + content[place + 8 + length :]


def text(content: bytes, rng: random.Random) -> bytes:
    """A value or a line of YAML, or of a table, replaced by an odd one."""
    lines = content.decode().splitlines()
    place, odd = rng.randrange(len(lines)), rng.choice(ODD)
    key, mark, _ = lines[place].rpartition(":" if ":" in lines[place] else ",")
    lines[place] = rng.choice([f"{key}{mark} {odd}", odd, f"{odd}: 1", lines[rng.randrange(len(lines))], "  " + lines[place]])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def inner_pickle(content: bytes, rng: random.Random) -> bytes:
    """The pickled part of a checkpoint altered, with checksums that fit."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(result, "w") as target:
        for part in source.namelist():
            target.writestr(part, some_bytes(source.read(part), rng) if part.endswith("data.pkl") else source.read(part))
    return result.getvalue()


def picture(pixels: np.ndarray, format: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def stored(state) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


KINDS = {  # what is mutated -> (files, mutation beside that of bytes, reader)
    "label map": (lambda: [picture(LABEL, "PNG", "L"), picture(LABEL, "PNG", "P"), picture(FORM.palette[LABEL], "PNG", "RGBA")],
                  png, lambda path: read_maps(path, STATE, (32, 32))),
    "image": (lambda: [picture(IMAGE, format, "RGB") for format in ("JPEG", "WEBP", "BMP", "TIFF")], some_bytes, read_image),
    "image png": (lambda: [picture(IMAGE, "PNG", mode) for mode in ("RGB", "P", "LA")], png, read_image),
    "config": (lambda: [(ROOT / "config.yaml").read_bytes(), (ROOT / "configs/camvid.yaml").read_bytes()],
               text, lambda path: labels.label_format(load_settings(path).data)),
    "class table": (lambda: [(ROOT / "classes/cityscapes.csv").read_bytes()], text, labels.read_class_table),
    "checkpoint": (lambda: [stored(STATE)], inner_pickle, load_generator),
}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused(tmp_path, monkeypatch, kind, count):
    monkeypatch.chdir(tmp_path)
    sources, mutate, read = KINDS[kind]
    sources, rng, path, reads = sources(), random.Random(kind), tmp_path / "mutated", 0
    for source in sources:
        path.write_bytes(source)
        read(path)
    for number in range(count):
        path.write_bytes(rng.choice((mutate, mutate, some_bytes))(sources[number % len(sources)], rng))
        start = time.process_time()
        try:
            read(path)
            reads += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, error
        assert time.process_time() - start < 20
    assert [file.name for file in tmp_path.iterdir()] == ["mutated"]  # nothing was executed or written
    assert reads < count


class Executes:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.filterwarnings("ignore")  # of the pickle's protocol
@pytest.mark.parametrize("content", [
    stored({"config": Executes()}), pickle.dumps({"config": Executes()}),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(executed) (w) file closefile\n"])
def test_programs_are_not_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "program"
    path.write_bytes(content)
    for read in (load_checkpoint, lambda path: load_generator(path, config_path=ROOT / "config.yaml"), read_image,
                 lambda path: read_maps(path, STATE, (32, 32))):
        with pytest.raises(UserError, match="program: "):
            read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["program"]


@pytest.mark.parametrize("start", ["name", "train: {betas", "data: {name: folder, classes: 3, palette", "data: {classes"])
def test_yaml_that_stands_for_gigabytes(tmp_path, start):
    """Twelve levels of nine references to the level below."""
    nested = "&a0 [x, x, x, x, x, x, x, x, x]"
    for level in range(1, 12):
        nested = f"&a{level} [{nested}" + f", *a{level - 1}" * 8 + "]"
    path = tmp_path / "bomb.yaml"
    path.write_text(f"{start}: {nested}" + "}" * ("{" in start))
    with pytest.raises(UserError, match=f"{start.split()[-1].strip('{')} is ") as error:
        load_settings(path)
    assert len(str(error.value)) < 1000
