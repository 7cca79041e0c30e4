"""What training and sampling cost on this machine.

    python bench.py [--config FILE] [--out FILE] [key.path=value ...]    a training step part by part, sampling
    python bench.py --cost [--out FILE]                                  DP-SIMS, OASIS and SDM at published size
    python bench.py --growth [--config FILE] [--out FILE] [key.path=value ...]    a step against batch, size and classes
    python bench.py --official DIR [--out FILE]                          ours against a clone of boschresearch/OASIS or of
                                                                         WeilunWang/semantic-diffusion-model

Networks have random weights, which cost the same. Everything is timed on the device that training would use: on a GPU in
bf16, but for the samples of GANs, which sample.py draws in float32; on a CPU in float32 with OMP_NUM_THREADS threads. FLOPs
are torch's count: a multiplication and an addition are two; lookups and element-wise work count nothing. The peak that a
share refers to is that of a matrix product of 4096 x 4096 (2048 x 2048 on a CPU) measured here in the same precision. Images
by diffusion are extrapolated: the encoding of the label map and one step, both passes of guidance, are measured, and the
step counts diffusion.steps times.
--official runs the published code as it is (float32, one image, 256 x 256, ADE20K's recipe; OASIS's training step without
EMA; of SDM's chain one step with guidance), in turns, each in a process of its own. On a GPU our training step is in bf16.
"""

import argparse
import contextlib
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import diffusion
import scenes
from config import UserError, load_config, one_line
from data import build_dataset
from gan import build_network
from labels import label_format
from sdm import SDMUNet
from train import StepSampler, build_trainer, peak_memory

COST_CONFIGS = {"DP-SIMS": "configs/ade20k.yaml", "OASIS": "configs/oasis_ade20k.yaml", "SDM": "configs/sdm_ade20k.yaml"}


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call, device: torch.device, repeat: int = 5, warm_up: int = 2) -> float:
    """Median time of `call()`."""
    times = []
    for i in range(warm_up + repeat):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def matrix_peak(device: torch.device) -> float:
    """FLOP/s of a large matrix product in the precision of training."""
    n, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / seconds(lambda: a @ a, device)


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class PartTimer:
    """Adds up the time of named parts of a step; parts do not nest."""

    def __init__(self, device: torch.device):
        self.device, self.parts, self.start = device, {}, 0.0

    def begin(self, *_) -> None:
        synchronize(self.device)
        self.start = time.perf_counter()

    def end(self, name: str) -> None:
        synchronize(self.device)
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - self.start

    @contextlib.contextmanager
    def attached(self, trainer):
        """Times the forward passes, backward passes and optimisers of every step within."""
        handles, backward, generator_inputs = [], torch.Tensor.backward, getattr(trainer, "g_parameters", None)
        for name in ("generator", "backbone", "discriminator"):
            network = getattr(trainer, name, None)
            if network is not None:
                handles += [network.register_forward_pre_hook(self.begin),
                            network.register_forward_hook(lambda *_, name=name: self.end(f"{name} forward"))]
        optimizers = [getattr(trainer, name, None) for name in ("optimizer", "g_optimizer", "d_optimizer")]
        for optimizer in filter(None, optimizers):
            handles += [optimizer.register_step_pre_hook(self.begin),
                        optimizer.register_step_post_hook(lambda *_: self.end("optimizers"))]

        def timed(tensor, *args, inputs=None, **kwargs):
            self.begin()
            backward(tensor, *args, inputs=inputs, **kwargs)
            self.end("generator loss backward" if inputs is generator_inputs else "discriminator loss backward")

        with mock.patch.object(torch.Tensor, "backward", timed):
            yield
        for handle in handles:
            handle.remove()


def bench_training(config: dict, device: torch.device, steps: int) -> dict:
    """Time of a step and its parts, FLOPs, memory; over `steps` steps after 2, from the real loader."""
    dataset = build_dataset(config["data"], "train", config["seed"], augment=True)
    size = config["train"]["batch_size"]
    trainer = build_trainer(config, dataset.num_classes, device)
    sampler = StepSampler(len(dataset), size, range(2 * steps + 3), config["seed"], 0, 1)
    batches = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=config["data"]["workers"],
                              pin_memory=device.type == "cuda"))
    places, step = list(range(size)), 0

    def one() -> None:
        nonlocal step
        image, label_map, *instances = (t.to(device, non_blocking=True) for t in next(batches))
        trainer.step(image, label_map, step, places, *instances)
        step += 1

    one()
    count = flops(lambda: (one(), one())) // 2  # one with the diversity pair, one without
    whole = statistics.fmean(seconds(one, device, repeat=1, warm_up=0) for _ in range(steps))
    timer = PartTimer(device)
    with timer.attached(trainer):
        start = time.perf_counter()
        for _ in range(steps):
            timer.begin()
            batch = next(batches)
            timer.end("data wait")
            image, label_map, *instances = (t.to(device) for t in batch)
            trainer.step(image, label_map, step, places, *instances)
            step += 1
        synchronize(device)
        timed = time.perf_counter() - start
    parts = {name: value / timed for name, value in timer.parts.items()}
    parts["losses, EMA and the rest"] = 1 - sum(parts.values())
    return {"batch_size": size, "seconds_per_step": whole, "images_per_second": size / whole, "share_of_step": parts,
            "flops_per_step": count, "flops_per_second": count / whole, "peak_memory_gib": peak_memory(device),
            "parameters": {name: count_parameters(getattr(trainer, name)) for name in ("generator", "discriminator")
                           if hasattr(trainer, name)}}


def count_parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def drawn_maps(count: int, num_classes: int, size, device: torch.device) -> torch.Tensor:
    """Label maps (count, H, W) as a data set has them: rendered scenes, each of their classes given one at random."""
    rng = np.random.default_rng(0)
    maps = []
    for i in range(count):
        names = rng.choice(num_classes + 1, len(scenes.CLASSES) + 1, replace=num_classes < len(scenes.CLASSES))
        maps.append(names[scenes.render("val", i, tuple(size))[1]])
    return torch.from_numpy(np.stack(maps)).to(device)


def sampling_cost(measure: Callable, generator: torch.nn.Module, maps: torch.Tensor, config: dict) -> float:
    """What `measure(call)` says, seconds or FLOPs, of drawing an image for each of the label maps (B, H, W)."""
    if not isinstance(generator, SDMUNet):
        z = torch.randn(len(maps), generator.z_dim, device=maps.device)
        return measure(lambda: generator(maps, z))
    guided, steps = config["diffusion"]["guidance"] != 1, config["diffusion"]["steps"]
    noisy, t = torch.randn(len(maps), 3, *maps.shape[1:], device=maps.device), torch.zeros(len(maps), device=maps.device)
    with torch.autocast(maps.device.type, torch.bfloat16, enabled=maps.device.type == "cuda"):
        encoding = measure(lambda: generator.encode_labels(maps, guided=guided))
        features = generator.encode_labels(maps, guided=guided)
        return encoding + steps * measure(lambda: generator(noisy, t, features))


@torch.no_grad()
def bench_sampling(config: dict, device: torch.device, batches=(1, 2, 4, 8, 16), repeat: int = 3) -> dict:
    """Latency at batch 1 and the best throughput over `batches`, each the median of `repeat` runs; FLOPs an image."""
    form, size = label_format(config["data"]), config["data"]["size"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    generator = build_network("generator", config, form.num_classes).eval()
    generator = generator.to(device, memory_format=torch.channels_last)
    times = {}
    count = sampling_cost(flops, generator, drawn_maps(1, form.num_classes, size, device), config)  # and a warm-up
    for batch in batches:
        maps = drawn_maps(batch, form.num_classes, size, device)
        times[batch] = sampling_cost(lambda call: seconds(call, device, repeat, warm_up=0), generator, maps, config)
    best = max(times, key=lambda batch: batch / times[batch])
    return {"latency_seconds": times[1], "images_per_second": best / times[best], "at_batch": best, "flops_per_image": count,
            "parameters": count_parameters(generator), "peak_memory_gib": peak_memory(device),
            "diffusion": config["diffusion"] if isinstance(generator, SDMUNet) else None}


def measure_cost(system: str) -> dict:
    """A line of the cost table: one image at batch 1; run in a process of its own, for its memory."""
    return bench_sampling(load_config(Path(__file__).parent / COST_CONFIGS[system]), best_device(), batches=(1,), repeat=2)


def cost_table() -> dict:
    context = multiprocessing.get_context("spawn")
    rows = {}
    for system in COST_CONFIGS:
        with context.Pool(1) as pool:
            rows[system] = pool.apply(measure_cost, (system,))
    base = rows["DP-SIMS"]
    print(f"{'':10}{'parameters':>14}{'TFLOP/image':>14}{'s/image':>12}{'GiB':>8}"
          f"{'parameters':>12}{'FLOPs':>12}{'time':>12}{'memory':>12}")
    for system, row in rows.items():
        ratio = [row[key] / base[key] for key in ("parameters", "flops_per_image", "latency_seconds", "peak_memory_gib")]
        print(f"{system:10}{row['parameters'] / 1e6:>12.1f} M{row['flops_per_image'] / 1e12:>14.3f}"
              f"{row['latency_seconds']:>12.2f}{row['peak_memory_gib']:>8.2f}" + "".join(f"{r:>11.2f}x" for r in ratio))
    print(f"SDM: {chain(rows['SDM'])}")
    return rows


def bench_growth(config: dict, device: torch.device, steps: int) -> list[dict]:
    """Time of a step on random images and rendered label maps: the configuration's, then with one thing changed."""
    height, width = config["data"]["size"]
    base = {"batch_size": config["train"]["batch_size"], "size": (height, width), "classes": 12}
    changes = [{}, *({"batch_size": base["batch_size"] * factor} for factor in (2, 4)),
               *({"size": (height * factor, width * factor)} for factor in (2, 4)), *({"classes": n} for n in (151, 183))]
    rows = []
    print(f"{'batch':>8}{'size':>12}{'classes':>9}{'s/step':>10}{'time':>9}{'pixels':>9}")
    for change in changes:
        batch, size, classes = {**base, **change}.values()
        data = {**config["data"], "size": list(size)}
        trainer = build_trainer({**config, "data": data, "train": {**config["train"], "batch_size": batch}}, classes, device)
        images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=device)
        maps, step = drawn_maps(batch, classes, size, device), iter(range(steps + 2))
        time_of_step = seconds(lambda: trainer.step(images, maps, next(step), list(range(batch))), device, steps)
        rows.append({"batch_size": batch, "size": size, "classes": classes, "seconds_per_step": time_of_step})
        pixels = batch * size[0] * size[1] / (base["batch_size"] * height * width)
        print(f"{batch:>8}{f'{size[0]} x {size[1]}':>12}{classes:>9}{time_of_step:>10.3f}"
              f"{time_of_step / rows[0]['seconds_per_step']:>8.2f}x{pixels:>8.0f}x", flush=True)
    return rows


def published_oasis(folder: Path) -> dict[str, Callable]:
    """The published networks and losses, of the recipe for ADE20K, from a clone of boschresearch/OASIS."""
    device = best_device()
    options = SimpleNamespace(
        phase="train", continue_train=False, no_EMA=False, add_vgg_loss=False, no_labelmix=False, lambda_labelmix=10.0,
        no_balancing_inloss=False, contain_dontcare_label=True, no_spectral_norm=False, channels_G=64, num_res_blocks=6,
        no_3dnoise=False, semantic_nc=151, z_dim=64, crop_size=256, aspect_ratio=1.0, spade_ks=3,
        param_free_norm="syncbatch", gpu_ids="0" if device.type == "cuda" else "-1")
    sys.modules.pop("models", None)  # their package has the name of our module
    sys.path.insert(0, str(folder))
    from models.losses import losses_computer
    from models.models import OASIS_model
    official, criterion = OASIS_model(options).to(device), losses_computer(options)
    image, maps = drawn_pair(device)
    one_hot = torch.nn.functional.one_hot((maps.long() + 1) % 151, 151).permute(0, 3, 1, 2).float().contiguous()
    adam = lambda network, rate: torch.optim.Adam(network.parameters(), rate, (0.0, 0.999))
    optimizers = adam(official.netG, 1e-4), adam(official.netD, 4e-4)

    def training_step() -> None:
        official.train()
        for mode, optimizer in zip(("losses_G", "losses_D"), optimizers):
            official.zero_grad()
            official(image.float() / 127.5 - 1, one_hot, mode, criterion)[0].backward()
            optimizer.step()

    return {"sample": lambda: official.eval()(None, one_hot, "generate", None), "training step": training_step}


def our_training(fresh_fakes: bool) -> dict[str, Callable]:
    """OASIS's training step, with fakes from the updated generator for the discriminator or one batch for both."""
    device = best_device()
    config = load_config(Path(__file__).parent / COST_CONFIGS["OASIS"],
                         ["train.batch_size=1", f"train.fresh_fakes={fresh_fakes}"])
    trainer, (image, maps) = build_trainer(config, 150, device), drawn_pair(device)
    return {"training step": lambda: trainer.step(image, maps, 0, [0])}


def our_sample(system: str) -> dict[str, Callable]:
    """An image, of a GAN; of SDM what it takes once and a step with guidance. In float32."""
    device = best_device()
    config = load_config(Path(__file__).parent / COST_CONFIGS[system])
    network = build_network("generator", config, 150).to(device, memory_format=torch.channels_last)
    network, maps = network.eval().requires_grad_(False), drawn_pair(device)[1]
    if system != "SDM":
        z = torch.randn(1, network.z_dim, device=device)
        return {"sample": lambda: network(maps, z)}
    noisy, t = torch.randn(1, 3, 256, 256, device=device), torch.full((1,), 500, device=device)
    constants, features = diffusion.schedule(device=device), {}

    def encode() -> None:
        features.clear()  # or the maps would be there twice
        features["of_map"] = network.encode_labels(maps, guided=True)

    return {"label map, once an image": encode,
            "step of a sample": lambda: diffusion.ancestral_step(
                noisy, diffusion.guide(network(noisy, t, features["of_map"]), 1.5), 500, torch.randn_like(noisy), constants)}


def published_sdm(folder: Path) -> dict[str, Callable]:
    """The published network and chain, of the recipe for ADE20K, from a clone of WeilunWang/semantic-diffusion-model."""
    device = best_device()
    sys.path.insert(0, str(folder))
    from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
    network, chain = create_model_and_diffusion(**{
        **model_and_diffusion_defaults(), "image_size": 256, "num_classes": 151, "no_instance": True, "class_cond": True,
        "num_channels": 256, "num_res_blocks": 2, "num_head_channels": 64, "attention_resolutions": "32,16,8",
        "resblock_updown": True, "use_scale_shift_norm": True, "learn_sigma": True, "noise_schedule": "linear"})
    network, maps = network.to(device).eval().requires_grad_(False), drawn_pair(device)[1]
    one_hot = torch.nn.functional.one_hot(maps.long(), 151).permute(0, 3, 1, 2).float().contiguous()
    noisy, t = torch.randn(1, 3, 256, 256, device=device), torch.full((1,), 500, device=device)
    return {"step of a sample": lambda: chain.p_sample(network, noisy, t, model_kwargs={"y": one_hot, "s": 1.5})}


def drawn_pair(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """An image (1, 3, 256, 256) uint8 and a label map of 150 classes (1, 256, 256) uint8."""
    return torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8, device=device), drawn_maps(1, 150, (256, 256), device)


CALLS = {}  # of a process in a race


def enter(build: Callable, argument) -> None:
    try:
        CALLS.update(build(argument))
    except ImportError as error:
        raise UserError(f"{argument}: {error}; install what the published code needs") from None


def take_turn(event: str) -> tuple[float, float] | None:
    """Seconds of one call, and the peak memory of this process in GiB; None without such a call."""
    return (seconds(CALLS[event], best_device(), 1, 0), peak_memory(best_device())) if event in CALLS else None


def race(entrants: dict[str, tuple[Callable, object]], events: dict[str, int]) -> dict:
    """Median seconds and peak memory of events, each as many times as it says after one time that does not count.

    entrants: name -> (function that gives {event: call}, its argument). Each has a process of its own, for its memory,
    and they take turns, so that whatever else the machine does meets all of them. Ratios are to the first.
    """
    context, result = multiprocessing.get_context("spawn"), {}
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in entrants}
        for name, pool in pools.items():
            pool.submit(enter, *entrants[name]).result()
        for event, repeat in events.items():
            turns = [{name: pool.submit(take_turn, event).result() for name, pool in pools.items()} for _ in range(1 + repeat)]
            rows = {name: {"seconds": statistics.median(turn[name][0] for turn in turns[1:]),
                           "peak_memory_gib": turns[-1][name][1]} for name in pools if turns[0][name]}
            base = next(iter(rows.values()))
            for name, row in rows.items():
                print(f"{event:26}{name:22}{row['seconds']:8.2f} s{base['seconds'] / row['seconds']:7.2f}x"
                      f"{row['peak_memory_gib']:8.2f} GiB{base['peak_memory_gib'] / row['peak_memory_gib']:7.2f}x", flush=True)
            result[event] = rows
    return result


def bench_official(folder: Path) -> dict:
    """The published code in `folder` against ours. Raises UserError."""
    if (folder / "guided_diffusion").is_dir():
        return race({"published": (published_sdm, folder), "ours": (our_sample, "SDM")},
                    {"label map, once an image": 2, "step of a sample": 2})
    if not (folder / "models/models.py").is_file():
        raise UserError(f"{folder}: no models/models.py and no guided_diffusion; give the folder of a clone of "
                        f"github.com/boschresearch/OASIS or github.com/WeilunWang/semantic-diffusion-model")
    return race({"published": (published_oasis, folder), "ours": (our_sample, "OASIS"), "DP-SIMS": (our_sample, "DP-SIMS"),
                 "ours, training": (our_training, True), "ours, one fake batch": (our_training, False)},
                {"sample": 3, "training step": 2})


def chain(sampling: dict) -> str:
    """What the figures of an image by diffusion rest on."""
    return ("{steps} steps at guidance {guidance:g}, extrapolated from the measured label encoding and one measured step"
            .format(**sampling["diffusion"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "config.yaml")
    parser.add_argument("--cost", action="store_true", help="the three systems at published size")
    parser.add_argument("--growth", action="store_true", help="a training step against batch, size and classes")
    parser.add_argument("--official", type=Path, metavar="DIR", help="our OASIS or SDM against the published code in DIR")
    parser.add_argument("--steps", type=int, default=10, help="training steps that are timed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    device = best_device()
    if args.cost:
        result = cost_table()
    elif args.official:
        result = bench_official(args.official)
    elif args.growth:
        result = {"growth": bench_growth(load_config(args.config, args.overrides), device, args.steps)}
    else:
        config, peak = load_config(args.config, args.overrides), matrix_peak(device)
        training, sampling = bench_training(config, device, args.steps), bench_sampling(config, device)
        result = {"training": training, "sampling": sampling, "matrix_product_flops_per_second": peak}
        print(f"training, batch {training['batch_size']}: {training['seconds_per_step']:.3f} s a step, "
              f"{training['images_per_second']:.1f} images/s, {training['flops_per_step'] / 1e9:.1f} GFLOP a step, "
              f"{training['flops_per_second'] / peak:.0%} of a matrix product's speed, {training['peak_memory_gib']:.2f} GiB")
        for name, share in training["share_of_step"].items():
            print(f"    {name:30}{share:>6.1%}")
        print(f"sampling: {sampling['latency_seconds'] * 1e3:.1f} ms at batch 1; {sampling['images_per_second']:.1f} images/s "
              f"at batch {sampling['at_batch']}; {sampling['flops_per_image'] / 1e9:.2f} GFLOP an image, "
              f"{sampling['flops_per_image'] * sampling['images_per_second'] / peak:.0%} of a matrix product's speed"
              + (f"; {chain(sampling)}" if sampling["diffusion"] else ""))
    result["machine"] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
                         "threads": torch.get_num_threads(), "torch": torch.__version__}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
