"""Shared by the tests: the project on the path, a miniature data set, a configuration that trains in seconds."""

import itertools
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # what is forked below waits for ever where OpenMP had threads before

TINY = {
    "name": "tiny",
    "data": {"name": "scenes", "size": [32, 32], "workers": 0, "calibration_images": 16},
    "generator": {"channels": [8, 16, 16], "z_dim": 8, "style_dim": 16, "num_tokens": 4, "attention_scales": 1,
                  "texture": True},
    "discriminator": {"channels": 4},
    "loss": {"contrastive_patches": 16},
    "train": {"steps": 4, "batch_size": 4, "log_every": 1, "sample_every": 0, "eval_every": 0, "save_every": 2},
    "eval": {"num_images": 4, "features_size": 64, "segmenter_steps": 1, "diversity_maps": 2, "diversity_samples": 0,
             "diversity_network": "stlpips_alex", "diversity_size": 64},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_config(tmp_path) -> Path:
    """A configuration file of a model that trains in seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs a script in an empty folder: call("sample.py", ...). Within this process, which spares the imports; an error is
    a SystemExit."""
    monkeypatch.chdir(tmp_path)
    def start(script: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return start


def write_checkpoint(path: Path, **changes) -> Path:
    """A checkpoint with random weights."""
    from checkpoint import label_state, save_checkpoint
    from config import check_settings
    from labels import label_format
    from systems import system_for
    settings = check_settings({**TINY, **changes}, "test")
    form = label_format(settings.data)
    torch.manual_seed(0)
    generator = system_for(settings, form.num_classes).build()
    for parameter in generator.parameters():
        if not parameter.any():  # zeros, as at the start of training, would hide what they multiply
            torch.nn.init.normal_(parameter, std=0.05)
    save_checkpoint({**label_state(form), "config": settings.model_dump(mode="json"), "step": 7,
                     "ema": generator.state_dict()}, path)
    return path


def put(path: Path, array: np.ndarray | Image.Image, **options) -> Path:
    """Write a picture, and make the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with random weights, and a label map with the name that the page saves."""
    import scenes
    folder = tmp_path_factory.mktemp("paint")
    write_checkpoint(folder / "runs/tiny/checkpoints/latest.pt")
    put(folder / "labels/painted.png", scenes.render("val", 3, (32, 32))[1])
    return folder


@pytest.fixture
def sample(tmp_path, call):
    """sample.py on a label map: sample(label, "--num", 3, ...) -> its pictures, in the order of their numbers."""
    def draw(label: np.ndarray | Image.Image, *options) -> list[np.ndarray]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        put(folder / "labels/painted.png", label)
        call("sample.py", "--labels", folder / "labels", "--out", folder / "out", *options)
        paths = sorted((folder / "out").iterdir(), key=lambda path: (len(path.name), path.name))
        return [np.asarray(Image.open(path)) for path in paths]
    return draw


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train.py's main within this process, in an empty folder: train(file, "key=value", ..., resume=False). No curves."""
    import train as script
    from config import load_settings
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "draw_curves", lambda *_: None)  # they take longer than all else
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield lambda file, *overrides, resume=False: script.main(load_settings(file, list(overrides)), resume)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def folder_data(tmp_path) -> Path:
    """ROOT/{train,val}/{images,labels}: six pairs of 40 x 48 pixels, three classes in flat colors, void id 255."""
    rng, root = np.random.default_rng(0), tmp_path / "data"
    colors = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [0, 0, 0]], np.uint8)
    for split, i in itertools.product(("train", "val"), range(6)):
        label = np.repeat(np.repeat(rng.integers(0, 4, (5, 6)), 8, 0), 8, 1).astype(np.uint8)
        put(root / split / f"images/{i}.png", colors[label])
        put(root / split / f"labels/{i}.png", np.where(label == 3, 255, label).astype(np.uint8))
    return root


def in_child(folder: Path, function, *arguments, **environment):
    """Start `function` in a forked process, which spares the start of Python and torch; its output goes to out.txt."""
    def target():
        os.setsid()  # signals to its group reach its loading processes and not us
        torch.set_num_threads(1)  # makes anew the thread pool that is lost in a fork; autograd's threads would race for it
        os.chdir(folder)
        os.environ.update({name: str(value) for name, value in environment.items()})
        sys.stdout = sys.stderr = open("out.txt", "a", buffering=1)
        function(*arguments)
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def together(folder: Path, count: int, function, *arguments) -> None:
    """`function` in a group of `count` such processes, to its end."""
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": get_free_port()}
    group = [in_child(folder, function, *arguments, RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(count)]
    for process in group:
        process.join(200)
        assert process.exitcode == 0, (folder / "out.txt").read_text()


def trainer_of(given: dict, num_classes: int = 12):
    """What trains a model of these settings on a CPU."""
    from config import check_settings
    from systems import system_for
    return system_for(check_settings(given, "tiny"), num_classes).trainer(torch.device("cpu"))
