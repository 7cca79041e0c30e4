"""Checkpoints: written so that a kill at any instant leaves a loadable one, read without unpickling objects.

A checkpoint is a dict: config, class_names (C), palette (C + 1 rows [r, g, b], the last is void), ids (256: what
each id in a label file means, see `LabelFormat`), step, and the state of the networks (generator, ema, discriminator,
...). The frozen backbone is not in it.
"""

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn

import oasis
from config import UserError, check_config, load_config
from gan import build_network
from labels import UNKNOWN, is_color, label_format
from sdm import SDMUNet

PARTS = {"config": dict, "class_names": list, "palette": list, "step": int, "ema": dict}  # what every reader relies on

# generator class -> (network, state dict, file name)
OFFICIAL_LOADERS = {oasis.OASISGenerator: oasis.load_official, SDMUNet: SDMUNet.load_official}


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file takes the place of `path` after the block, whole or not at all.

    Raises:
        UserError: the disk is full or not writable; whatever was at `path` is still there.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may write the same file of their shared cache
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a killed process with the same number; it may be a link to another file
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save puts an error of its own over it
        raise UserError(f"{path}: cannot be written ({cause}); free space and go on with --resume") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(state: dict, path: Path) -> None:
    """Write a dict of tensors and plain values to `path`, whole or not at all. Raises UserError, see `whole_file`."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def copy_checkpoint(source: Path, path: Path) -> None:
    """Give the checkpoint `source` a second name, whole or not at all; a link where the disk can. Raises UserError."""
    with whole_file(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """Read a checkpoint of this project.

    Raises:
        UserError: no such file, or one that is cut short, altered or something else; the newest whole one beside it is
            named.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train.py writes runs/NAME/checkpoints/latest.pt")
    try:
        return read_checkpoint(path, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # zipfile and the unpickler raise many kinds of errors on damaged files
        others = sorted((p for p in path.parent.glob("*.pt") if p != path), key=lambda p: p.stat().st_mtime, reverse=True)
        whole = next(filter(is_whole, others), None)
        remedy = (f"the newest whole one is {whole}: name that, or go on from it with `mv {whole} {path}` and --resume"
                  if whole else "no whole one lies beside it")
        raise UserError(f"{path}: cut short, altered or not a checkpoint of this project ({reason(error)}); {remedy}. "
                        f"An official checkpoint needs --config") from error


def read_checkpoint(path: Path, device: str | torch.device) -> dict:
    """What `load_checkpoint` gives. Raises ValueError, or whatever zipfile and torch raise on damaged files."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("its parts claim to be larger than the file")
        if archive.testzip() is not None:
            raise ValueError("a part has a wrong checksum")
    state = torch.load(path, map_location=device, weights_only=True)
    for name, kind in PARTS.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise ValueError(f"it has no {name}")
    if len(state["palette"]) != len(state["class_names"]) + 1 or not all(map(is_color, state["palette"])):
        raise ValueError("its palette does not fit its classes")
    known = {*range(len(state["class_names"]) + 1), UNKNOWN}
    if "ids" in state and (len(state["ids"]) != 256 or not set(state["ids"]) <= known):
        raise ValueError("its label ids do not fit its classes")
    return state


def is_whole(path: Path) -> bool:
    """Whether a file can be read as a checkpoint of this project."""
    try:
        read_checkpoint(path, "cpu")
    except Exception:  # as in load_checkpoint
        return False
    return True


def reason(error: Exception) -> str:
    """The first line of an error's text, shortened; its kind where there is none."""
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def load_generator(path: str | Path, device: str | torch.device = "cpu",
                   config_path: str | Path | None = None) -> tuple[nn.Module, dict]:
    """The generator (its moving average) in eval mode, and the checkpoint it came from; see `load_checkpoint`.

    With `config_path`, `path` is a state dict of an official code, which carries no configuration; class names,
    palette and ids are the data set's then, and the step is 0.
    """
    if config_path:
        config = load_config(config_path)
        form = label_format(config["data"])
        state = {"config": config, "class_names": form.class_names, "palette": form.palette.tolist(),
                 "ids": form.ids.tolist(), "step": 0}
    else:
        state = load_checkpoint(path, device)
        state["config"] = check_config(state["config"], str(path))
        if "ids" not in state:  # written before checkpoints had them
            state["ids"] = label_format(state["config"]["data"]).ids.tolist()
    generator = build_network("generator", state["config"], len(state["class_names"]))
    if config_path:
        if type(generator) not in OFFICIAL_LOADERS:
            raise UserError(f"{config_path}: generator.name is {state['config']['generator']['name']}, whose checkpoints "
                            f"carry their configuration; leave --config out, or name that of an official checkpoint")
        OFFICIAL_LOADERS[type(generator)](generator, read_official(path), str(path))
    else:
        try:
            generator.load_state_dict(state["ema"])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: its networks are not those of its configuration ({' '.join(str(error).split())[:200]}); "
                            f"use the version of this code that wrote it") from error
    return generator.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), state


def read_official(path: str | Path) -> dict:
    """The tensors of an official checkpoint, by name, read without unpickling objects. Raises UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # as in load_checkpoint
        raise UserError(f"{path}: cannot be read as a state dict ({reason(error)}); fetch it again") from error
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: not a state dict; --config goes with official checkpoints, those of train.py carry theirs")
    return state
