"""What training and sampling cost on this machine.

    python bench.py [--config FILE] [--profile] [key.path=value ...]    a training step and a sample
    python bench.py --cost                                              DP-SIMS, OASIS and SDM at published size
    python bench.py --official DIR                                      ours against a clone of boschresearch/OASIS or of
                                                                        WeilunWang/semantic-diffusion-model

Networks have random weights, which cost the same. Everything is timed on the device that training would use: on a GPU in
bf16, but for the samples of GANs, which sample.py draws in float32; on a CPU in float32 with OMP_NUM_THREADS threads. FLOPs
are torch's count: a multiplication and an addition are two; lookups and element-wise work count nothing. Images by diffusion
are extrapolated: the encoding of the label map and one step, both passes of guidance, are measured, and the step counts
diffusion.steps times. --profile prints torch's own profile of a training step. --out FILE writes the figures as JSON.
--official runs the published code as it is (float32, one image, 256 x 256, ADE20K's recipe; OASIS's training step without
EMA; of SDM's chain one step with guidance). All take turns, each in a process of its own, so that whatever else the machine
does meets all of them.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import scenes
from config import Settings, UserError, load_settings, run_script
from distributed import peak_memory
from interface import System
from labels import label_format
from systems import system_for

HERE = Path(__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PUBLISHED_SIZE = {"DP-SIMS": HERE / "configs/ade20k.yaml", "OASIS": HERE / "configs/oasis_ade20k.yaml",
                  "SDM": HERE / "configs/sdm_ade20k.yaml"}


def seconds(call: Callable, repeat: int = 5, warm_up: int = 1) -> float:
    """Median time of `call()`."""
    times = []
    for _ in range(warm_up + repeat):
        start = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def flops(call: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def drawn_maps(batch: int, num_classes: int, size: tuple[int, int]) -> torch.Tensor:
    """Label maps uint8 (B, H, W) of rendered scenes, their classes spread over the data set's."""
    spread = np.linspace(0, num_classes, scenes.VOID + 1).astype(np.uint8)
    return torch.from_numpy(np.stack([spread[scenes.render("val", i, size)[1]] for i in range(batch)])).to(DEVICE)


def system_of(settings: Settings) -> System:
    return system_for(settings, label_format(settings.data).num_classes)


def training_step(system: System) -> Callable:
    """A call that trains once, on random images and rendered label maps."""
    settings, trainer = system.settings, system.trainer(DEVICE)
    batch, size = settings.train.batch_size, settings.data.size
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=DEVICE)
    maps = drawn_maps(batch, system.num_classes, size)
    steps = itertools.count()
    return lambda: trainer.step(images, maps, next(steps), list(range(batch)))


@torch.no_grad()
def bench_sampling(settings: Settings, repeat: int = 3) -> dict:
    """Seconds and FLOPs of an image at batch 1, parameters of the generator, and the peak memory of this process."""
    system = system_of(settings)
    generator = system.build().eval().to(DEVICE, memory_format=torch.channels_last)
    maps = drawn_maps(1, system.num_classes, settings.data.size).long()
    count = system.cost(flops, generator, maps)
    return {"seconds": system.cost(lambda call: seconds(call, repeat), generator, maps), "flops": count,
            "parameters": sum(p.numel() for p in generator.parameters()), "peak_memory_gib": peak_memory(DEVICE)}


def bench_training(settings: Settings, steps: int, profile: bool) -> dict:
    """Seconds and FLOPs of a training step, images a second, and the peak memory of this process."""
    step = training_step(system_of(settings))
    count, time_of_step = flops(step), seconds(step, steps)
    if profile:
        with torch.profiler.profile() as profiler:
            step()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
    return {"seconds": time_of_step, "images_per_second": settings.train.batch_size / time_of_step, "flops": count,
            "batch_size": settings.train.batch_size, "peak_memory_gib": peak_memory(DEVICE)}


def cost_table() -> dict:
    """An image by each system at published size; each in a process of its own, for its memory."""
    context, rows = multiprocessing.get_context("spawn"), {}
    for name, config in PUBLISHED_SIZE.items():
        with context.Pool(1) as pool:
            rows[name] = pool.apply(bench_sampling, (load_settings(config),))
    keys = {"parameters": (1e6, "M"), "flops": (1e12, "TFLOP"), "seconds": (1, "s"), "peak_memory_gib": (1, "GiB")}
    for name, row in rows.items():
        print(f"{name:10}" + "".join(f"{row[key] / unit:>12.3f} {text} {row[key] / rows['DP-SIMS'][key]:>9.2f}x"
                                     for key, (unit, text) in keys.items()))
    return rows


def published_oasis(folder: Path) -> dict[str, Callable]:
    """The published networks and losses, of the recipe for ADE20K, from a clone of boschresearch/OASIS."""
    options = types.SimpleNamespace(
        phase="train", continue_train=False, no_EMA=False, add_vgg_loss=False, no_labelmix=False, lambda_labelmix=10.0,
        no_balancing_inloss=False, contain_dontcare_label=True, no_spectral_norm=False, channels_G=64, num_res_blocks=6,
        no_3dnoise=False, semantic_nc=151, z_dim=64, crop_size=256, aspect_ratio=1.0, spade_ks=3,
        param_free_norm="syncbatch", gpu_ids="0" if DEVICE.type == "cuda" else "-1")
    package = types.ModuleType("models")  # their folder has no __init__.py, so that our models.py would be found first
    package.__path__ = [str(folder / "models")]
    sys.modules["models"] = package
    sys.path.insert(0, str(folder))
    from models.losses import losses_computer
    from models.models import OASIS_model
    official, criterion = OASIS_model(options).to(DEVICE), losses_computer(options)
    image, maps = drawn_pair()
    one_hot = torch.nn.functional.one_hot((maps.long() + 1) % 151, 151).permute(0, 3, 1, 2).float().contiguous()
    adam = lambda network, rate: torch.optim.Adam(network.parameters(), rate, (0.0, 0.999))
    optimizers = adam(official.netG, 1e-4), adam(official.netD, 4e-4)

    def step() -> None:
        official.train()
        for mode, optimizer in zip(("losses_G", "losses_D"), optimizers):
            official.zero_grad()
            official(image.float() / 127.5 - 1, one_hot, mode, criterion)[0].backward()
            optimizer.step()

    return {"sample": lambda: official.eval()(None, one_hot, "generate", None), "training step": step}


def published_sdm(folder: Path) -> dict[str, Callable]:
    """The published network and chain, of the recipe for ADE20K, from a clone of WeilunWang/semantic-diffusion-model."""
    sys.path.insert(0, str(folder))
    from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
    network, chain = create_model_and_diffusion(**{
        **model_and_diffusion_defaults(), "image_size": 256, "num_classes": 151, "no_instance": True, "class_cond": True,
        "num_channels": 256, "num_res_blocks": 2, "num_head_channels": 64, "attention_resolutions": "32,16,8",
        "resblock_updown": True, "use_scale_shift_norm": True, "learn_sigma": True, "noise_schedule": "linear"})
    network, maps = network.to(DEVICE).eval().requires_grad_(False), drawn_pair()[1]
    one_hot = torch.nn.functional.one_hot(maps.long(), 151).permute(0, 3, 1, 2).float().contiguous()
    noisy, t = torch.randn(1, 3, 256, 256, device=DEVICE), torch.full((1,), 500, device=DEVICE)
    return {"step of a sample": lambda: chain.p_sample(network, noisy, t, model_kwargs={"y": one_hot, "s": 1.5})}


def our_training(name: str) -> dict[str, Callable]:
    return {"training step": training_step(system_of(load_settings(PUBLISHED_SIZE[name], ["train.batch_size=1"])))}


def our_sample(name: str) -> dict[str, Callable]:
    """What an image by one of our systems is made of, in float32: one call, or with diffusion the label map and a step."""
    system, calls = system_of(load_settings(PUBLISHED_SIZE[name])), []
    generator = system.build().to(DEVICE, memory_format=torch.channels_last).eval().requires_grad_(False)
    system.cost(lambda call: calls.append(call) or 0, generator, drawn_pair()[1].long())
    return dict(zip(["step of a sample", "label map, once an image"] if len(calls) > 1 else ["sample"], calls[::-1]))


def drawn_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """An image (1, 3, 256, 256) uint8 and a label map of 150 classes (1, 256, 256) uint8."""
    return torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8, device=DEVICE), drawn_maps(1, 150, (256, 256))


CALLS = {}  # of a process in a race


def enter(build: Callable, argument) -> None:
    CALLS.update(build(argument))


def take_turn(event: str) -> tuple[float, float] | None:
    """Seconds of one call, and the peak memory of this process in GiB; None without such a call."""
    return (seconds(CALLS[event], 1, 0), peak_memory(DEVICE)) if event in CALLS else None


def race(entrants: dict[str, tuple[Callable, object]], events: dict[str, int]) -> dict:
    """Median seconds and peak memory of events, each as many times as it says after one time that does not count.

    entrants: name -> (function that gives {event: call}, its argument). Ratios are to the first.
    """
    context, result = multiprocessing.get_context("spawn"), {}
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in entrants}
        for name, pool in pools.items():
            pool.submit(enter, *entrants[name]).result()
        for event, repeat in events.items():
            turns = [{name: pool.submit(take_turn, event).result() for name, pool in pools.items()}
                     for _ in range(1 + repeat)]
            rows = {name: {"seconds": statistics.median(turn[name][0] for turn in turns[1:]),
                           "peak_memory_gib": turns[-1][name][1]} for name in pools if turns[0][name]}
            base = next(iter(rows.values()))
            for name, row in rows.items():
                time_ratio, memory_ratio = (base[key] / row[key] for key in ("seconds", "peak_memory_gib"))
                print(f"{event:26}{name:12}{row['seconds']:8.2f} s{time_ratio:7.2f}x{row['peak_memory_gib']:8.2f} GiB"
                      f"{memory_ratio:7.2f}x", flush=True)
            result[event] = rows
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--cost", action="store_true", help="the three systems at published size")
    parser.add_argument("--official", type=Path, metavar="DIR", help="our OASIS or SDM against the published code in DIR")
    parser.add_argument("--steps", type=int, default=10, help="training steps that are timed")
    parser.add_argument("--profile", action="store_true", help="print torch's profile of a training step")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    if args.cost:
        result = cost_table()
    elif args.official:
        folder = args.official.absolute()
        if (folder / "guided_diffusion").is_dir():
            result = race({"published": (published_sdm, folder), "ours": (our_sample, "SDM")},
                          {"label map, once an image": 2, "step of a sample": 2})
        elif (folder / "models/models.py").is_file():
            result = race({"published": (published_oasis, folder), "ours": (our_sample, "OASIS"),
                           "DP-SIMS": (our_sample, "DP-SIMS"), "our step": (our_training, "OASIS")},
                          {"sample": 3, "training step": 2})
        else:
            raise UserError(f"{folder}: no models/models.py and no guided_diffusion; give the folder of a clone of "
                            f"github.com/boschresearch/OASIS or github.com/WeilunWang/semantic-diffusion-model")
    else:
        settings = load_settings(args.config, args.overrides)
        result = {"training": bench_training(settings, args.steps, args.profile), "sampling": bench_sampling(settings)}
        for name, row in result.items():
            print(f"{name:10}" + "".join(f"{key} {value:.4g}   " for key, value in row.items()))
    result["machine"] = {"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine(),
                         "threads": torch.get_num_threads(), "torch": torch.__version__}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
