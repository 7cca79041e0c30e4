"""Checkpoints: written so that a kill at any instant leaves a loadable one, read without unpickling objects.

A checkpoint is a dict: config (the settings), class_names (C), palette (C + 1 rows [r, g, b], the last is void), ids (256:
what each id in a label file means, see `LabelFormat`), step, and the state of the networks (generator, ema,
discriminator, ...). The frozen backbone is not in it.
"""

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn

from config import UserError, check_settings, load_settings
from interface import System
from labels import UNKNOWN, LabelFormat, is_color, label_format
from systems import system_for

PARTS = {"config": dict, "class_names": list, "palette": list, "step": int, "ema": dict}  # what every reader relies on


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


def label_state(form: LabelFormat) -> dict:
    """What a checkpoint keeps of the label files, so that sample.py needs no data set."""
    return {"class_names": form.class_names, "palette": form.palette.tolist(), "ids": form.ids.tolist()}


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """Read a checkpoint of this project.

    Raises:
        UserError: no such file, or one that is cut short, altered or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train.py writes runs/NAME/checkpoints/latest.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("its parts claim to be larger than the file")
            if archive.testzip() is not None:
                raise ValueError("a part has a wrong checksum")
        state = torch.load(path, map_location=device, weights_only=True)
        check_parts(state)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # zipfile and the unpickler raise many kinds of errors on damaged files
        raise UserError(f"{path}: cut short, altered or not a checkpoint of this project ({reason(error)}); name another "
                        f"one beside it, or copy that over it and go on with --resume. An official checkpoint needs "
                        f"--config") from error
    return state


def check_parts(state) -> None:
    """Raise ValueError unless `state` has what every reader relies on."""
    for name, kind in PARTS.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise ValueError(f"it has no {name}")
    if len(state["palette"]) != len(state["class_names"]) + 1 or not all(map(is_color, state["palette"])):
        raise ValueError("its palette does not fit its classes")
    known = {*range(len(state["class_names"]) + 1), UNKNOWN}
    if "ids" in state and (len(state["ids"]) != 256 or not set(state["ids"]) <= known):
        raise ValueError("its label ids do not fit its classes")


def reason(error: Exception) -> str:
    """The first line of an error's text, shortened; its kind where there is none."""
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def newest_checkpoint() -> Path:
    """The youngest runs/*/checkpoints/latest.pt. Raises UserError if there is none."""
    found = sorted(Path("runs").glob("*/checkpoints/latest.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("runs/*/checkpoints/latest.pt: none here; train a model or name one with --checkpoint")
    return found[-1]


def load_generator(path: str | Path, device: str | torch.device = "cpu",
                   config_path: str | Path | None = None) -> tuple[System, nn.Module, dict]:
    """The system of a checkpoint, its generator (the moving average) in eval mode, and the checkpoint.

    With `config_path`, `path` is a state dict of an official code, which carries no configuration; class names,
    palette and ids are the data set's then, and the step is 0. Raises UserError.
    """
    if config_path:
        settings = load_settings(config_path)
        state = {**label_state(label_format(settings.data)), "step": 0}
    else:
        state = load_checkpoint(path, device)
        settings = check_settings(state["config"], str(path))
        if "ids" not in state:  # written before checkpoints had them
            state["ids"] = label_format(settings.data).ids.tolist()
    system = system_for(settings, len(state["class_names"]))
    generator = system.build()
    try:
        if config_path:
            system.load_official(generator, read_official(path))
        else:
            generator.load_state_dict(state["ema"])
    except (RuntimeError, TypeError, AttributeError) as error:
        remedy = "name the configuration of its data set and size" if config_path else "use the version that wrote it"
        raise UserError(f"{path}: its networks are not those of {config_path or 'its configuration'} "
                        f"({' '.join(str(error).split())[:200]}); {remedy}") from error
    return system, generator.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), state


def read_official(path: str | Path) -> dict:
    """The tensors of an official checkpoint, by name, read without unpickling objects. Raises UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # as in load_checkpoint
        raise UserError(f"{path}: cannot be read as a state dict ({reason(error)}); fetch it again") from error
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: not a state dict; --config goes with official checkpoints, those of train.py carry theirs")
    return state
