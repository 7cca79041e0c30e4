"""Damaged files through the functions that read what comes from outside; and files that are programs."""

import io
import os
import pickle
import random
from functools import partial

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
from systems import system_for

SETTINGS = check_settings({**TINY, "generator": {"channels": [4, 4], "z_dim": 4, "style_dim": 4, "num_tokens": 2}}, "tiny")
FORM = labels.label_format(SETTINGS.data)
STATE = {"config": SETTINGS.model_dump(mode="json"), **label_state(FORM), "step": 3,
         "ema": system_for(SETTINGS, FORM.num_classes).build().state_dict()}
IMAGE, LABEL = scenes.render("val", 0, (24, 32))


def some_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes overwritten, taken out, put in, or repeated; or the file cut short."""
    place, length = rng.randrange(len(content)), rng.choice((1, 1, 4, 40))
    new = rng.choice((rng.randbytes(length), b"", content[place - length :][:length]))
    return content[:place] + new + content[place + rng.choice((0, length, length, len(content))) :]


def written(save, *options) -> bytes:
    """What save(file, *options) writes."""
    file = io.BytesIO()
    save(file, *options)
    return file.getvalue()


def picture(pixels: np.ndarray, format: str, mode: str) -> bytes:
    return written(Image.fromarray(pixels).convert(mode).save, format)


KINDS = {  # files, and what reads them
    "label map": ([picture(LABEL, "PNG", "L"), picture(LABEL, "PNG", "P"), picture(FORM.palette[LABEL], "PNG", "RGBA")],
                  lambda path: labels.read_label_file(path, STATE, (32, 32))),
    "image": ([picture(IMAGE, format, "RGB") for format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")], read_image),
    "config": ([(ROOT / "config.yaml").read_bytes()], load_settings),
    "class table": ([(ROOT / "classes/cityscapes.csv").read_bytes()], labels.read_class_table),
    "checkpoint": ([written(partial(torch.save, STATE))], load_generator)}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, kind, count):
    sources, read = KINDS[kind]
    rng, path, refused = random.Random(kind), tmp_path / "damaged", 0
    for source in sources:
        path.write_bytes(source)
        read(path)
    for number in range(count):
        path.write_bytes(some_bytes(sources[number % len(sources)], rng))
        try:
            read(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, error
    assert refused


class Executes:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.filterwarnings("ignore")  # of the pickle's protocol
@pytest.mark.parametrize("content", [
    written(partial(torch.save, {"config": Executes()})), pickle.dumps({"config": Executes()}),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(executed) (w) file closefile\n",
    b"data: !!python/object/apply:os.system ['touch executed']", written(partial(torch.save, {"weights": {}}))])
def test_other_files_are_refused_and_not_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "program"
    path.write_bytes(content)
    for read in (load_checkpoint, lambda path: load_generator(path, config_path=ROOT / "config.yaml"), read_image,
                 load_settings, lambda path: labels.read_label_file(path, STATE, (32, 32))):
        with pytest.raises(UserError, match="program: |leave --config out"):
            read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["program"]
