"""Checkpoints: written so that a kill at any instant leaves a loadable one, read without unpickling objects.

A checkpoint is a dict: config (the settings), class_names (C), palette (C + 1 rows [r, g, b], the last is void), ids
(what each id in a label file means, see `LabelFormat`), step, and the state of the networks (generator, ema,
discriminator, ...). The frozen backbone is not in it.
"""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn as nn

from config import UserError, check_settings, load_settings
from interface import System
from labels import LabelFormat, is_mask, label_format
from systems import system_for


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file takes the place of `path` after the block, whole or not at all.

    Raises:
        UserError: the disk is full or not writable; whatever was at `path` is still there.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may write the same file of a shared cache
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a killed process with the same number
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save wraps it
        raise UserError(f"{path}: cannot be written ({cause}); free space or choose another folder; a run goes on with "
                        f"--resume") from error
    finally:
        with suppress(OSError):  # of a disk that can only be read
            temporary.unlink(missing_ok=True)


def save_checkpoint(state: dict, path: Path) -> None:
    """Write a dict of tensors and plain values to `path`, whole or not at all. Raises UserError, see `whole_file`."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def label_state(form: LabelFormat) -> dict:
    """What a checkpoint keeps of the label files, so that sample.py needs no data set."""
    return {"class_names": form.class_names, "palette": form.palette.tolist(), "ids": form.ids.tolist()}


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of this project, onto the CPU.

    Raises:
        UserError: no such file, or one that is cut short, altered or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train.py writes runs/NAME/checkpoints/latest.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size or archive.testzip():
                raise ValueError("not as it was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        parts = {"config": dict, "class_names": list, "palette": list, "step": int, "ema": dict}
        if not all(isinstance(state.get(name), kind) for name, kind in parts.items()):
            raise ValueError(f"without {', '.join(parts)}")
    except Exception as error:  # zipfile and the unpickler raise many kinds of errors on damaged files
        raise UserError(f"{path}: cut short, altered or not a checkpoint of this project ({error!r:.120}); name "
                        f"another one beside it, or copy that over it and go on with --resume. An official checkpoint "
                        f"needs --config") from error
    return state


def newest_checkpoint() -> Path:
    """The youngest runs/*/checkpoints/latest.pt. Raises UserError if there is none."""
    found = sorted(Path("runs").glob("*/checkpoints/latest.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("runs/*/checkpoints/latest.pt: none here; torchrun --standalone train.py --config config.yaml makes "
                        "one in about ten minutes, or name one with --checkpoint")
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
        state = load_checkpoint(path)
        settings = check_settings(state["config"], str(path))
        if "ids" not in state or is_mask(settings.data.palette):  # written before checkpoints had them, or those of masks
            state["ids"] = label_format(settings.data).ids.tolist()
    system = system_for(settings, len(state["class_names"]))
    generator = system.build()
    try:
        if config_path:
            system.load_official(generator, torch.load(path, map_location="cpu", weights_only=True))
        else:
            generator.load_state_dict(state["ema"])
    except UserError:
        raise
    except Exception as error:  # as in load_checkpoint
        remedy = "name the configuration of its data set and size" if config_path else "use the version that wrote it"
        raise UserError(f"{path}: does not fit {config_path or 'its configuration'} ({' '.join(str(error).split())[:200]}); "
                        f"{remedy}") from error
    return system, generator.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), state
