"""Checkpoints: written so that a kill at any instant leaves a loadable one, read without unpickling objects.

A checkpoint is a dict: config, class_names (C), palette (C + 1 rows [r, g, b], the last is void), step, and the state of
the networks (generator, ema, discriminator, ...). The frozen backbone is not in it.
"""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import torch
import torch.nn as nn

import oasis
from config import UserError, check_config, load_config
from gan import build_network
from labels import label_format
from sdm import SDMUNet

# generator class -> (network, state dict, file name)
OFFICIAL_LOADERS = {oasis.OASISGenerator: oasis.load_official, SDMUNet: SDMUNet.load_official}


def save_checkpoint(state: dict, path: Path) -> None:
    """Write `state` to `path`, whole or not at all.

    Raises:
        UserError: the disk is full or not writable; whatever was at `path` is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); free space and go on with --resume") from error


def copy_checkpoint(source: Path, path: Path) -> None:
    """Give the checkpoint `source` a second name, whole or not at all; a link where the disk can."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """Read a checkpoint of this project.

    Raises:
        UserError: no such file, or one that is cut short, altered or something else; an older one beside it is named.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train.py writes runs/NAME/checkpoints/latest.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("a part has a wrong checksum")
        state = torch.load(path, map_location=device, weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        others = sorted((p for p in path.parent.glob("*.pt") if p != path), key=lambda p: p.stat().st_mtime)
        remedy = f"try {others[-1]}" if others else "an official checkpoint needs --config"
        raise UserError(f"{path}: cut short, altered or not a checkpoint ({str(error).splitlines()[0]}); {remedy}") from error
    if not isinstance(state, dict) or not {"config", "class_names", "palette", "step", "ema"} <= set(state):
        raise UserError(f"{path}: not a checkpoint of this project; give one that train.py wrote, or --config with an "
                        f"official one")
    return state


def load_generator(path: str | Path, device: str | torch.device = "cpu",
                   config_path: str | Path | None = None) -> tuple[nn.Module, dict]:
    """The generator (its moving average) in eval mode, and the checkpoint it came from; see `load_checkpoint`.

    With `config_path`, `path` is a state dict of an official code, which carries no configuration; class names and
    palette are the data set's then, and the step is 0.
    """
    if config_path:
        config = load_config(config_path)
        form = label_format(config["data"])
        state = {"config": config, "class_names": form.class_names, "palette": form.palette.tolist(), "step": 0}
    else:
        state = load_checkpoint(path, device)
        state["config"] = check_config(state["config"], str(path))
    generator = build_network("generator", state["config"], len(state["class_names"]))
    if config_path:
        if type(generator) not in OFFICIAL_LOADERS:
            raise UserError(f"{config_path}: generator.name is {state['config']['generator']['name']}, whose checkpoints "
                            f"carry their configuration; leave --config out, or name that of an official checkpoint")
        OFFICIAL_LOADERS[type(generator)](generator, read_official(path), str(path))
    else:
        generator.load_state_dict(state["ema"])
    return generator.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), state


def read_official(path: str | Path) -> dict:
    """The tensors of an official checkpoint, by name, read without unpickling objects. Raises UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a state dict ({str(error).splitlines()[0]}); fetch it again") from error
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: not a state dict; --config goes with official checkpoints, those of train.py carry theirs")
    return state
