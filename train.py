"""Train a model: torchrun --standalone [--nproc_per_node N] train.py --config FILE [key.path=value ...] [--resume]

Everything goes to runs/NAME/: config.yaml, log.jsonl, metrics.jsonl, curves.png, samples/STEP.png, checkpoints/.
"""

import argparse
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from checkpoint import label_state, load_checkpoint, save_checkpoint, whole_file
from config import LOCAL, Settings, UserError, flatten, load_settings, run_script
from dataset import LabeledImages, build_dataset, evenly_spaced, leave_signals_to_parent, quick_check
from distributed import all_reduce, from_first_process, gather, hold, peak_memory, setup_distributed
from evaluation import build_judges, evaluate_generator, higher_is_better, metric_names
from interface import Trainer
from plots import draw_curves, evaluated, read_records
from segmenter import segmenter_for
from systems import system_for

# Settings that a resumed run must have again
DECIDING = ("seed", "init_from", "data", "generator", "discriminator", "backbone")


def batches(length: int, batch_size: int, steps: range, places: range, seed: int) -> Iterator[list[tuple[int, int]]]:
    """A list of (index, draw) for each step: these places of a batch, the same however many processes share it.

    Sample number n = step * batch_size + place is image n % N of the n // N-th shuffle of the N images, and `draw`, which
    its augmentation follows from, is n itself.
    """
    epoch, order = None, None
    for step in steps:
        batch = []
        for n in (step * batch_size + place for place in places):
            if n // length != epoch:
                epoch = n // length
                draw = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63)
                order = torch.randperm(length, generator=draw).tolist()
            batch.append((order[n % length], n))
        yield batch


def changes(run: Path, settings: Settings) -> dict[str, tuple]:
    """key.path -> (what the run had, what it gets), of settings that differ; its length and `LOCAL` ones aside."""
    if not (run / "config.yaml").exists():
        return {}
    now, before = (flatten(s.model_dump(mode="json")) for s in (settings, load_settings(run / "config.yaml")))
    return {key: (value, now.get(key)) for key, value in before.items()
            if key not in ("train.steps", *LOCAL) and now.get(key) != value}


def find_checkpoint(run: Path, settings: Settings, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any. Raises UserError where a run would be overwritten or is another one."""
    if run.exists() and not resume:
        raise UserError(f"{run} exists; go on with --resume, or choose another name=...")
    for key, (before, now) in changes(run, settings).items():
        if key.split(".")[0] in DECIDING:
            raise UserError(f"{run}/config.yaml: {key} is {before!r}, now {now!r}; resume with the same, or choose another "
                            f"name=...")
    latest = run / "checkpoints" / "latest.pt"
    if latest.exists():
        return latest
    if others := sorted(latest.parent.glob("*.pt")):
        raise UserError(f"{latest}: gone, but {others[0].name} is there; copy a checkpoint to that name and go on from it, or "
                        f"choose another name=...")
    return None


def make_run(run: Path, settings: Settings, first: int) -> None:
    """The resolved settings of a run from step `first` on; what killed processes were writing is cleared away."""
    shared = [path for path in run.parent.glob("cache/*.tmp") if path.stat().st_mtime < time.time() - 3600]
    for leftover in [*run.rglob("*.tmp"), *shared]:  # in the cache another run may be writing
        leftover.unlink(missing_ok=True)
    if first and (changed := changes(run, settings)):
        before = run / f"config_until_{first:07d}.yaml"
        shutil.copyfile(run / "config.yaml", before)
        print(f"{run}: with another {', '.join(changed)} from step {first} on; {before} has what it was")
    with whole_file(run / "config.yaml") as path:
        path.write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))


def check_fit(settings: Settings, trainer: Trainer, world_size: int) -> None:
    """Raise UserError where processes, sizes or judges do not go together, before anything is spent on them."""
    train, judges, size = settings.train, settings.eval, settings.data.size
    if train.batch_size % (world_size * train.accumulation):
        raise UserError(f"train.batch_size is {train.batch_size}; it must be a multiple of "
                        f"{world_size} processes x {train.accumulation} rounds")
    for kind in ("generator", "discriminator"):
        divisor = getattr(getattr(trainer, kind, None), "divisor", 1)
        if any(side % divisor for side in size):
            raise UserError(f"data.size is {list(size)}; both must be multiples of {divisor} for this {kind}")
    if judges.metric not in metric_names(judges):
        raise UserError(f"eval.metric is {judges.metric!r}; with these judges there are {', '.join(metric_names(judges))}")
    if train.tracker != "none" and not find_spec(train.tracker):
        raise UserError(f"train.tracker is {train.tracker}, which is not installed; pip install {train.tracker}, or set it to "
                        f"none")


def read_losses(losses: dict[str, torch.Tensor], run: Path, step: int, trainer: Trainer) -> dict[str, float]:
    """Losses averaged over processes: the one place that waits for a GPU. Raises UserError for one that is not finite."""
    flat = torch.stack([value.float() for value in losses.values()])
    all_reduce([flat], average=True)
    values = dict(zip(losses, flat.tolist()))
    for name, value in values.items():
        if not math.isfinite(value):
            rates = " and ".join(f"train.{rate}" for rate, _ in trainer.rates.values())
            raise UserError(f"{run}: {name} is {value} at or before step {step}; the last checkpoint is kept. Go on from it "
                            f"with a lower {rates}")
    return values


@torch.no_grad()
def write_samples(path: Path, trainer: Trainer, dataset: LabeledImages, count: int = 8) -> None:
    """One sheet, a column a scene: label map, real image, and below what the trainer shows of its own."""
    palette = torch.from_numpy(dataset.palette).to(trainer.device)
    pairs = [dataset[i] for i in evenly_spaced(len(dataset), count)]
    real, label_map, *instances = (torch.stack(column).to(trainer.device) for column in zip(*pairs))
    label_map = label_map.long()
    rows = [palette[label_map].permute(0, 3, 1, 2).float() / 255, real.float() / 255,
            *trainer.sheet(label_map, palette, *instances)]
    save_image(make_grid(torch.cat(rows).cpu(), nrow=len(pairs), padding=1), path)


def start_networks(trainer: Trainer, settings: Settings, dataset: Dataset,
                   source: Path | None) -> tuple[int, list[torch.Tensor]]:
    """Load the checkpoint `source`; else measure what training needs, and load the networks of `init_from` if there is one.

    Returns:
        The step to start from, and batches of label maps (16, H, W) of the training split.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(settings.seed))
    images, maps = zip(*(dataset[i][:2] for i in order[: settings.data.calibration_images].tolist()))
    maps = [batch.to(trainer.device).long() for batch in torch.stack(maps).split(16)]
    file, trainer.fine_tuned = source or settings.init_from, bool(settings.init_from)
    if not source:
        trainer.calibrate([batch.to(trainer.device).float() / 127.5 - 1 for batch in torch.stack(images).split(16)])
    if not file:
        return 0, maps
    state = load_checkpoint(file)
    before, now = state["class_names"], dataset.class_names
    if before != now if source else len(before) != len(now):
        raise UserError(f"{file}: its {len(before)} classes are {', '.join(before):.200}, now there are {len(now)}, "
                        f"{', '.join(now):.200}; choose the data set it was trained on, with classes in the same order")
    try:
        trainer.load_state_dict(state, optimizers=bool(source))
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{file}: its networks differ from those configured ({' '.join(str(error).split())[:200]}); use "
                        f"the configuration it was trained with") from error
    if source and state["step"] > settings.train.steps:
        raise UserError(f"{source}: has reached step {state['step']}; raise train.steps (now {settings.train.steps})")
    return state["step"] if source else 0, maps


def main(settings: Settings, resume: bool) -> None:
    rank, world_size, device = setup_distributed(settings.train.timeout)
    train, seed, run = settings.train, settings.seed, Path("runs") / settings.name
    dataset = build_dataset(settings.data, "train", seed)
    held_out = build_dataset(settings.data, "val", seed)
    system = system_for(settings, dataset.num_classes)
    settings = system.settings
    lock = hold(run / "lock") if rank == 0 and resume and run.exists() else None
    source = from_first_process(lambda: find_checkpoint(run, settings, resume))
    if rank == 0:
        quick_check(dataset)
        quick_check(held_out)
    trainer = system.trainer(device)
    check_fit(settings, trainer, world_size)
    judges = build_judges(settings.eval, held_out, device)
    first, maps = start_networks(trainer, settings, dataset, source)
    if source and first == train.steps and from_first_process(lambda: evaluated(run, first)):
        if rank == 0:
            print(f"{run}: has reached step {first}; raise train.steps to go on, or measure anew with evaluate.py")
        return
    cache = run.parent / "cache"  # what the judges know of the real images, shared by all runs
    segmenter = segmenter_for(settings, cache, device, rank)
    if rank == 0:
        for folder in ("checkpoints", "samples"):
            (run / folder).mkdir(parents=True, exist_ok=True)
        lock = lock or hold(run / "lock")
        make_run(run, settings, first)

    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    places = range(rank * train.batch_size // world_size, (rank + 1) * train.batch_size // world_size)
    sampler = batches(len(dataset), train.batch_size, range(first, train.steps), places, seed)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=settings.data.workers,
                        pin_memory=device.type == "cuda", worker_init_fn=leave_signals_to_parent)
    due = lambda every, step: step == train.steps or bool(every) and step % every == 0
    recorder = Recorder(run, first, settings) if rank == 0 else None

    def evaluate(step: int) -> None:
        """Of the checkpoint just saved; best.pt comes before the record, which says that both are there."""
        metrics = evaluate_generator(system.sampler(trainer.ema), held_out, settings, judges, segmenter, device, cache, rank,
                                     world_size)
        if rank == 0:
            if recorder.score(metrics) < recorder.best(metrics):
                with whole_file(run / "checkpoints" / "best.pt") as path:
                    shutil.copyfile(run / "checkpoints" / "latest.pt", path)
            recorder.evaluation({"step": step, **metrics})
            records = [record for name in ("metrics.jsonl", "log.jsonl") for record in read_records(run / name)]
            draw_curves({run.name: [records]}, run / "curves.png")

    if source and due(train.eval_every, first) and not from_first_process(lambda: evaluated(run, first)):
        evaluate(first)  # the run ended after its save
    losses, looked, since = {}, first, time.time()
    bar = tqdm(loader, initial=first, total=train.steps, disable=rank != 0, unit="step", dynamic_ncols=True)
    for step, batch in enumerate(bar, first + 1):
        image, label_map, *instances = (t.to(device, non_blocking=True) for t in batch)
        losses |= trainer.step(image, label_map, step - 1, list(places), *instances)  # some come only every few steps
        stopping = any(gather(bool(stop)))
        logging, evaluating = due(train.log_every, step), due(train.eval_every, step)
        saving = due(train.save_every, step) or evaluating or stopping
        if logging or saving:
            values = read_losses(losses, run, step, trainer)
            if rank == 0 and logging:
                speed = (step - looked) * train.batch_size / (time.time() - since)
                recorder.write("log.jsonl", {"step": step, **values, "images_per_second": speed,
                                             **dict(trainer.rates.values()), "peak_memory_gib": peak_memory(device)})
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
            losses, looked, since = {}, step, time.time()
        sampling = due(train.sample_every, step)
        if sampling or saving:
            trainer.refresh(maps)
        if rank == 0 and sampling:
            write_samples(run / "samples" / f"{step:07d}.png", trainer, held_out)
        if rank == 0 and saving:
            save(run, step, settings, dataset, trainer)
        if evaluating and not stopping:
            evaluate(step)
        since = time.time() if saving or sampling else since
        if stopping:
            bar.close()
            if rank == 0:
                print(f"stopped at step {step}; saved {run}/checkpoints/latest.pt; go on with --resume")
            break
    else:
        bar.close()
        if rank == 0:
            print("\n".join(f"{name:32} {value:.4g}" for name, value in recorder.evaluations[-1].items()
                            if isinstance(value, (int, float))))
            print(f"samples: {run}/samples/{train.steps:07d}.png\ncheckpoint: {run}/checkpoints/latest.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def save(run: Path, step: int, settings: Settings, dataset: LabeledImages, trainer: Trainer) -> None:
    """Write checkpoints/latest.pt and the same as STEP.pt (no link, as people write over files); drop the oldest beyond
    train.keep."""
    folder = run / "checkpoints"
    state = {"config": settings.model_dump(mode="json"), **label_state(dataset.form), "step": step, **trainer.state_dict()}
    for name in ("latest", f"{step:07d}"):
        save_checkpoint(state, folder / f"{name}.pt")
    numbered = [path for path in folder.glob("*.pt") if path.stem.isdigit()]
    for old in sorted(numbered, key=lambda path: path.stat().st_mtime)[: -settings.train.keep]:  # a run may have gone back
        old.unlink()


class Recorder:
    """log.jsonl and metrics.jsonl, and what train.tracker names; remembers the evaluations."""

    def __init__(self, run: Path, first: int, settings: Settings):
        self.run, self.metric, self.started = run, settings.eval.metric, time.time()
        steps, self.evaluations = (self.lines_until(run / name, first) for name in ("log.jsonl", "metrics.jsonl"))
        self.minutes = steps[-1].get("minutes", 0) if steps else 0
        self.track = lambda numbers, step: None
        if settings.train.tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            events = SummaryWriter(run, purge_step=first)
            self.track = lambda numbers, step: [events.add_scalar(key, value, step) for key, value in numbers.items()]
        elif settings.train.tracker == "wandb":
            import wandb
            wandb.init(name=run.name, id=run.name, resume="allow", dir=run, config=settings.model_dump(mode="json"))
            self.track = wandb.log

    @staticmethod
    def lines_until(path: Path, step: int) -> list[dict]:
        """The records up to a step. The file is cut behind them: the run ended before it saved what it did then."""
        if not path.exists():
            return []
        kept = list(takewhile(lambda line: line.endswith(b"}\n") and json.loads(line)["step"] <= step,
                              path.read_bytes().splitlines(keepends=True)))
        os.truncate(path, sum(map(len, kept)))  # not written anew, so that a kill loses nothing
        return [json.loads(line) for line in kept]

    def score(self, metrics: dict) -> float:
        """The value that picks best.pt, so that lower is better."""
        value = metrics.get(self.metric)  # a resumed run may have had other judges; mIoU needs labelled pixels
        if value is None:
            return math.inf
        return -value if higher_is_better(self.metric) else value

    def best(self, metrics: dict) -> float:
        """The best score among earlier evaluations by the same protocol."""
        rests = lambda record: {k: v for k, v in record.get("protocol", {}).items() if k not in ("versions", "platform")}
        return min((self.score(earlier) for earlier in self.evaluations if rests(earlier) == rests(metrics)), default=math.inf)

    def evaluation(self, metrics: dict) -> None:
        self.evaluations.append(metrics)
        self.write("metrics.jsonl", metrics)

    def write(self, name: str, record: dict) -> None:
        """Add a line, with the minutes that the run has taken in all."""
        record["minutes"] = self.minutes + (time.time() - self.started) / 60
        with open(self.run / name, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.track({key: value for key, value in record.items() if isinstance(value, (int, float))}, record["step"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config.yaml", help="default: config.yaml")
    parser.add_argument("--resume", action="store_true", help="go on with runs/NAME from its latest checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    run_script(lambda: main(load_settings(arguments.config, arguments.overrides), arguments.resume))
