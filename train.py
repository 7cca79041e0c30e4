"""Train a model: torchrun --standalone [--nproc_per_node N] train.py --config FILE [key.path=value ...] [--resume]

Everything goes to runs/NAME/: config.yaml, log.jsonl, metrics.jsonl, samples/STEP.png, checkpoints/.
"""

import argparse
import errno
import json
import math
import os
import re
import resource
import signal
import sys
import time
from itertools import takewhile
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.utils.data import DataLoader
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint, whole_file
from config import UserError, load_config, one_line
from data import build_dataset, evenly_spaced, leave_signals_to_parent, quick_check
from distributed import from_first_process, setup_distributed
from diffusion import Diffusion
from gan import GAN
from judges import PerceptualNetwork, feature_network
from segmenter import segmenter_for
from metrics import evaluate_generator, higher_is_better, metric_names, sampler_for


def build_trainer(config: dict, num_classes: int, device: torch.device) -> GAN | Diffusion:
    """What trains the generator that the config names."""
    return (Diffusion if config["generator"]["name"] == "sdm" else GAN)(config, num_classes, device)


class StepSampler:
    """Batches of (index, draw) for this process, one a step, the same however many processes share them.

    Sample number n = step * batch_size + place is image n % N of the n // N-th shuffle of the data set, and `draw`,
    which its augmentation follows from, is n itself.
    """

    def __init__(self, length: int, batch_size: int, steps: range, seed: int, rank: int, world_size: int):
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.places = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):
        epoch, order = None, None
        for step in self.steps:
            batch = []
            for place in self.places:
                n = step * self.batch_size + place
                if n // self.length != epoch:
                    epoch = n // self.length
                    draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.length, generator=draw).tolist()
                batch.append((order[n % self.length], n))
            yield batch


def find_checkpoint(run: Path, config: dict, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any. Raises UserError where a run would be overwritten or is another one."""
    if run.exists() and not resume:
        raise UserError(f"{run} exists; go on with --resume, or choose another name=...")
    if (run / "config.yaml").exists():
        flat = lambda config: {"seed": config["seed"]} | {
            f"{section}.{key}": value for section in ("data", "generator", "discriminator", "backbone")
            for key, value in config[section].items() if key != "workers"}
        before, now = flat(load_config(run / "config.yaml")), flat(config)
        for key in before | now:
            if before.get(key) != now.get(key):
                raise UserError(f"{run}/config.yaml: {key} is {before.get(key)!r}, now {now.get(key)!r}; "
                                f"resume with the same, or choose another name=...")
    latest = run / "checkpoints" / "latest.pt"
    return latest if latest.exists() else None


def make_run(run: Path, config: dict) -> None:
    """The folders of a run, its resolved configuration; what killed processes were writing is cleared away."""
    for folder in ("checkpoints", "samples"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    shared = [path for path in run.parent.glob("cache/*.tmp") if path.stat().st_mtime < time.time() - 3600]
    for leftover in [*run.rglob("*.tmp"), *shared]:  # in the cache another run may be writing
        leftover.unlink(missing_ok=True)
    with whole_file(run / "config.yaml") as path:
        path.write_text(yaml.safe_dump(config, sort_keys=False))


def drop_lines_after(path: Path, step: int) -> None:
    """Cut a .jsonl file where its lines lie past `step` or are cut short: their run ended before it saved."""
    if path.exists():
        kept = takewhile(lambda line: line.endswith(b"}\n") and json.loads(line)["step"] <= step,
                         path.read_bytes().splitlines(keepends=True))
        os.truncate(path, sum(map(len, kept)))  # not written anew, so that a kill loses nothing


def append_line(path: Path, record: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def stop_requested(stop: bool) -> bool:
    """True on every process as soon as one of them was asked to stop."""
    if not dist.is_initialized():
        return stop
    flag = torch.tensor(int(stop))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def check_fit(config: dict, trainer, world_size: int) -> None:
    """Raise UserError where processes, sizes or judges do not go together, before anything is spent on them."""
    train, judges = config["train"], config["eval"]
    if train["batch_size"] % (world_size * train["accumulation"]):
        raise UserError(f"train.batch_size is {train['batch_size']}; it must be a multiple of "
                        f"{world_size} processes x {train['accumulation']} rounds")
    for kind in ("generator", "discriminator"):
        divisor = getattr(getattr(trainer, kind, None), "divisor", 1)
        if any(side % divisor for side in config["data"]["size"]):
            raise UserError(f"data.size is {config['data']['size']}; both must be multiples of {divisor} for this {kind}")
    if judges["metric"] not in metric_names(judges):
        raise UserError(f"eval.metric is {judges['metric']!r}; with these judges there are {', '.join(metric_names(judges))}")
    feature_network(judges["features"], judges["features_weights"], size=judges["features_size"])
    if judges["diversity_samples"] > 1:
        PerceptualNetwork(judges["diversity_network"], judges["diversity_weights"], judges["diversity_size"])


def check_finite(pending: list[tuple[int, dict]], run: Path, rates: tuple[str, ...]) -> None:
    """Raise UserError for the first loss of the steps since the last look that is not finite."""
    for step, values in pending:
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(f"{run}: {name} is {value} at step {step}; the last checkpoint is kept. "
                                f"Go on from it with a lower {' and '.join(f'train.{name}' for name in rates)}")


def collect(pending: list[tuple[int, dict[str, torch.Tensor]]]) -> list[tuple[int, dict[str, float]]]:
    """Losses of the steps since the last look, averaged over processes, as numbers: the one place that waits for a GPU."""
    flat = torch.stack([value.float() for _, values in pending for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    numbers = iter(flat.tolist())
    return [(step, {name: next(numbers) for name in values}) for step, values in pending]


@torch.no_grad()
def write_samples(path: Path, trainer, dataset, count: int = 8) -> None:
    """One sheet, a column a scene: label map, real image, and below what the trainer shows of its own."""
    palette = torch.from_numpy(dataset.palette).to(trainer.device)
    pairs = [dataset[i] for i in evenly_spaced(len(dataset), count)]
    real, label_map, *instances = (torch.stack(column).to(trainer.device) for column in zip(*pairs))
    label_map = label_map.long()
    rows = [palette[label_map].permute(0, 3, 1, 2).float() / 255, real.float() / 255,
            *trainer.sheet(label_map, palette, *instances)]
    save_image(make_grid(torch.cat(rows).cpu(), nrow=len(pairs), padding=1), path)


def start_networks(trainer, config: dict, dataset, source: Path | None) -> tuple[int, list[torch.Tensor]]:
    """Load a checkpoint or measure what training needs.

    Returns:
        The step to start from, and batches of label maps (16, H, W) of the training split.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config["seed"]))
    images, maps = zip(*(dataset[i][:2] for i in order[: config["data"]["calibration_images"]].tolist()))
    maps = [batch.to(trainer.device).long() for batch in torch.stack(maps).split(16)]
    state = load_checkpoint(source or config["init_from"], trainer.device) if source or config["init_from"] else None
    if state is None:
        trainer.calibrate([batch.to(trainer.device).float() / 127.5 - 1 for batch in torch.stack(images).split(16)])
        return 0, maps
    if len(state["class_names"]) != trainer.num_classes:
        raise UserError(f"{source or config['init_from']}: trained on {len(state['class_names'])} classes, "
                        f"the data set has {trainer.num_classes}; choose the data set it was trained on")
    try:
        trainer.load_state_dict(state, optimizers=bool(source))
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{source or config['init_from']}: its networks differ from those configured "
                        f"({' '.join(str(error).split())[:200]}); use the configuration it was trained with") from error
    if source and state["step"] > config["train"]["steps"]:
        raise UserError(f"{source}: has reached step {state['step']}; raise train.steps (now {config['train']['steps']})")
    return state["step"] if source else 0, maps


def main(config: dict, resume: bool) -> None:
    rank, world_size, device = setup_distributed()
    train, seed, run = config["train"], config["seed"], Path("runs") / config["name"]
    source = from_first_process(lambda: find_checkpoint(run, config, resume))
    dataset = build_dataset(config["data"], "train", seed, augment=True)
    held_out = build_dataset(config["data"], "val", seed)
    for part in (dataset, held_out):
        if rank == 0:
            quick_check(part)
        part.broken |= from_first_process(lambda: part.broken)  # named once, not by every process
    trainer = build_trainer(config, dataset.num_classes, device)
    check_fit(config, trainer, world_size)
    first, maps = start_networks(trainer, config, dataset, source)
    cache = run.parent / "cache"  # what the judges know of the real images, shared by all runs
    segmenter = segmenter_for(config, cache, device, rank)
    if rank == 0:
        make_run(run, config)

    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    sampler = StepSampler(len(dataset), train["batch_size"], range(first, train["steps"]), seed, rank, world_size)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=config["data"]["workers"],
                        pin_memory=device.type == "cuda", worker_init_fn=leave_signals_to_parent)
    due = lambda every, step: step == train["steps"] or bool(every) and step % every == 0
    recorder = Recorder(run, first, config) if rank == 0 else None

    def evaluate(step: int) -> None:
        """Of the checkpoint just saved; best.pt comes before the record, which says that both are there."""
        metrics = evaluate_generator(sampler_for(trainer.ema, config, rank == 0), held_out, config["eval"], device, cache,
                                     segmenter, seed, rank, world_size, config["data"]["workers"])
        if rank == 0:
            if recorder.is_best(metrics):
                copy_checkpoint(run / "checkpoints" / "latest.pt", run / "checkpoints" / "best.pt")
            recorder.evaluation(step, metrics)

    if source and due(train["eval_every"], first) and from_first_process(lambda: recorder.evaluated < first):
        evaluate(first)  # the run ended after its save
    pending, since = [], time.time()
    bar = tqdm(loader, initial=first, total=train["steps"], disable=rank != 0, unit="step", dynamic_ncols=True)
    for step, batch in enumerate(bar, first + 1):
        image, label_map, *instances = (t.to(device, non_blocking=True) for t in batch)
        pending.append((step, trainer.step(image, label_map, step - 1, list(sampler.places), *instances)))
        stopping = stop_requested(bool(stop))
        logging, evaluating = due(train["log_every"], step), due(train["eval_every"], step)
        saving = due(train["save_every"], step) or evaluating or stopping
        if logging or saving:
            numbers = collect(pending)
            check_finite(numbers, run, trainer.rates)
            if rank == 0 and logging:
                values = {name: value for _, losses in numbers for name, value in losses.items()}
                recorder.log({"step": step, **values,
                              "images_per_second": len(pending) * train["batch_size"] / (time.time() - since),
                              **{name: train[name] for name in trainer.rates},
                              "peak_memory_gib": peak_memory(device),
                              **({"broken_pairs": dataset.num_broken} if config["data"]["skip_broken"] else {})})
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
            pending, since = [], time.time()
        sampling = due(train["sample_every"], step)
        if sampling or saving:
            trainer.refresh(maps)
        if rank == 0 and sampling:
            write_samples(run / "samples" / f"{step:07d}.png", trainer, held_out)
        if rank == 0 and saving:
            save(run, step, config, dataset, trainer)
        if evaluating and not stopping:
            evaluate(step)
        since = time.time() if saving else since
        if stopping:
            bar.close()
            if rank == 0:
                print(f"stopped at step {step}; saved {run}/checkpoints/latest.pt; go on with --resume")
            break
    else:
        bar.close()
        if rank == 0:
            print(summary(recorder.latest))
            print(f"samples: {sorted((run / 'samples').glob('*.png'))[-1]}\ncheckpoint: {run}/checkpoints/latest.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def save(run: Path, step: int, config: dict, dataset, trainer) -> None:
    """Write checkpoints/latest.pt and give it the second name STEP.pt; drop the oldest beyond train.keep."""
    folder = run / "checkpoints"
    form = dataset.form
    save_checkpoint({"config": config, "class_names": form.class_names, "palette": form.palette.tolist(),
                     "ids": form.ids.tolist(), "step": step, **trainer.state_dict()}, folder / "latest.pt")
    copy_checkpoint(folder / "latest.pt", folder / f"{step:07d}.pt")
    for old in sorted(folder.glob("[0-9]*.pt"))[: -config["train"]["keep"]]:
        old.unlink()


class Recorder:
    """log.jsonl, metrics.jsonl and, where tensorboard is installed, its events; remembers the best evaluation."""

    def __init__(self, run: Path, first: int, config: dict):
        self.run, self.metric = run, config["eval"]["metric"]
        for name in ("log.jsonl", "metrics.jsonl"):
            drop_lines_after(run / name, first)
        self.best, self.latest, self.evaluated = math.inf, {}, -1
        if (run / "metrics.jsonl").exists():
            for line in (run / "metrics.jsonl").read_text().splitlines():
                self.latest = json.loads(line)
                self.best, self.evaluated = min(self.best, self.score(self.latest)), self.latest.pop("step")
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.events = SummaryWriter(run, purge_step=first)
        except ImportError:
            self.events = None

    def score(self, metrics: dict) -> float:
        """The value that picks best.pt, so that lower is better."""
        value = metrics.get(self.metric)  # a resumed run may have had other judges; mIoU needs labelled pixels
        if value is None:
            return math.inf
        return -value if higher_is_better(self.metric) else value

    def log(self, record: dict) -> None:
        append_line(self.run / "log.jsonl", record)
        self.add_events(record)

    def is_best(self, metrics: dict) -> bool:
        return self.score(metrics) < self.best

    def evaluation(self, step: int, metrics: dict) -> None:
        append_line(self.run / "metrics.jsonl", {"step": step, **metrics})
        self.add_events({"step": step, **metrics})
        self.latest, self.best = metrics, min(self.best, self.score(metrics))

    def add_events(self, record: dict) -> None:
        for name, value in record.items():
            if self.events and isinstance(value, (int, float)) and name != "step":
                self.events.add_scalar(name, value, record["step"])


def summary(metrics: dict) -> str:
    """The metrics that are single numbers, a line each."""
    return "\n".join(f"{name:32} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float)))


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, GiB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss starts at the parent's peak
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 30


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--resume", action="store_true", help="go on with runs/NAME from its latest checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    try:
        main(load_config(arguments.config, arguments.overrides), arguments.resume)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    except OSError as error:  # of the log or the samples; checkpoints have their own message
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: runs: cannot be written ({error.strerror}); free space and go on with --resume")
    except KeyboardInterrupt:  # until the first step; then a flag is set
        sys.exit("stopped before the first step; nothing to save")
