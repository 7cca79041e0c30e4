"""What training and sampling cost on this machine.

    python bench.py [--config FILE] [--config FILE ...] [--steps N] [key.path=value ...]
    python bench.py --official DIR    a clone of boschresearch/OASIS or of WeilunWang/semantic-diffusion-model against ours

The first prints what a sample and a training step cost in each configuration, and behind each figure its ratio to the first
row's. Networks have random weights, which cost the same, and each configuration has a process of its own. Everything runs on
the device that training would use: on a GPU in bf16, but for the samples of GANs, which sample.py draws in float32; on a CPU in
float32 with OMP_NUM_THREADS threads. FLOPs are torch's count: a multiplication and an addition are two; lookups and
element-wise work count nothing. Images by diffusion are extrapolated: the encoding of the label map and one step, both passes
of guidance, are measured, and the step counts diffusion.steps times.

The second runs the published code as it is (float32, one image, 256 x 256, ADE20K's recipe; OASIS's training step without EMA;
of SDM's chain one step with guidance). The codes take turns, so that whatever else the machine does meets all of them.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import scenes
from config import Settings, UserError, load_settings, run_script
from distributed import peak_memory
from interface import System
from labels import label_format
from systems import system_for

HERE = Path(__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROCESSES = multiprocessing.get_context("spawn")


def seconds(call: Callable, repeat: int = 1, warm_up: int = 1) -> float:
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
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know attention on CPUs
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
    trainer, batch, size = system.trainer(DEVICE), system.settings.train.batch_size, system.settings.data.size
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=DEVICE)
    maps = drawn_maps(batch, system.num_classes, size)
    steps = itertools.count()
    return lambda: trainer.step(images, maps, next(steps), list(range(batch)))


def costs(settings: Settings, steps: int, samples: int = 3) -> dict[str, dict[str, float]]:
    """Figures by their units, of a sample and, unless `steps` is 0, of a training step; the memory is this process's peak."""
    system = system_of(settings)
    generator = system.build().eval().to(DEVICE, memory_format=torch.channels_last)
    maps = drawn_maps(1, system.num_classes, settings.data.size).long()
    with torch.no_grad():
        rows = {"sample": {"s": system.cost(lambda call: seconds(call, samples), generator, maps),
                           "TFLOP": system.cost(flops, generator, maps) / 1e12, "GiB": peak_memory(DEVICE),
                           "M parameters": sum(p.numel() for p in generator.parameters()) / 1e6}}
    del generator
    if steps:
        step = training_step(system)
        kinds = settings.loss.diversity_every  # of steps, which take turns
        rows["training step"] = {"s": seconds(step, steps), "TFLOP": sum(flops(step) for _ in range(kinds)) / kinds / 1e12,
                                 "GiB": peak_memory(DEVICE)}
    return rows


def show(what: str, rows: dict[str, dict[str, float]]) -> None:
    """Print rows of figures by their units, each with its ratio to that of the first row."""
    first = next(iter(rows.values()))
    for name, row in rows.items():
        print(f"{what:18}{name:28}" + "".join(f"{value:11.4g} {unit} {value / first[unit]:8.2f}x"
                                              for unit, value in row.items()), flush=True)


def published_oasis(folder: Path, training: bool) -> Callable:
    """A training step or a sample by the published code, recipe for ADE20K, from a clone of boschresearch/OASIS."""
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
    image = torch.rand(1, 3, 256, 256, device=DEVICE) * 2 - 1
    ids = (drawn_maps(1, 150, (256, 256)).long() + 1) % 151
    one_hot = torch.nn.functional.one_hot(ids, 151).permute(0, 3, 1, 2).float().contiguous()
    if not training:
        return lambda: official.eval()(None, one_hot, "generate", None)
    adam = lambda network, rate: torch.optim.Adam(network.parameters(), rate, (0.0, 0.999))
    optimizers = adam(official.netG, 1e-4), adam(official.netD, 4e-4)

    def step() -> None:
        for mode, optimizer in zip(("losses_G", "losses_D"), optimizers):
            official.zero_grad()
            official(image, one_hot, mode, criterion)[0].backward()
            optimizer.step()

    return step


def published_sdm(folder: Path) -> Callable:
    """A step of the published chain, recipe for ADE20K, from a clone of WeilunWang/semantic-diffusion-model."""
    sys.path.insert(0, str(folder))
    from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
    network, chain = create_model_and_diffusion(**{
        **model_and_diffusion_defaults(), "image_size": 256, "num_classes": 151, "no_instance": True, "class_cond": True,
        "num_channels": 256, "num_res_blocks": 2, "num_head_channels": 64, "attention_resolutions": "32,16,8",
        "resblock_updown": True, "use_scale_shift_norm": True, "learn_sigma": True, "noise_schedule": "linear"})
    network, maps = network.to(DEVICE).eval().requires_grad_(False), drawn_maps(1, 150, (256, 256))
    one_hot = torch.nn.functional.one_hot(maps.long(), 151).permute(0, 3, 1, 2).float().contiguous()
    noisy, t = torch.randn(1, 3, 256, 256, device=DEVICE), torch.full((1,), 500, device=DEVICE)
    return lambda: chain.p_sample(network, noisy, t, model_kwargs={"y": one_hot, "s": 1.5})


def ours(config: str, training: bool) -> Callable:
    """A training step of one image, or in float32 a sample (of a diffusion chain one step), by one of our systems."""
    system, calls = system_of(load_settings(HERE / config, ["train.batch_size=1"])), []
    if training:
        return training_step(system)
    generator = system.build().to(DEVICE, memory_format=torch.channels_last).eval().requires_grad_(False)
    system.cost(lambda call: calls.append(call) or 0, generator, drawn_maps(1, 150, (256, 256)).long())
    return calls[-1]


def enter(build: Callable, *arguments) -> None:
    """Make this process one that `take_turn` can be asked of."""
    global contestant
    contestant = build(*arguments)


def take_turn() -> tuple[float, float]:
    """Seconds of one call, and the peak memory of this process in GiB."""
    return seconds(contestant, warm_up=0), peak_memory(DEVICE)


def race(what: str, contestants: dict[str, tuple], repeat: int) -> dict[str, dict[str, float]]:
    """Median seconds and peak memory of calls that take turns, after one turn that does not count.

    contestants: name -> (function that gives the call, its arguments ...).
    """
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, PROCESSES, enter, contestant))
                 for name, contestant in contestants.items()}
        turns = [{name: pool.submit(take_turn).result() for name, pool in pools.items()} for _ in range(1 + repeat)]
    rows = {name: {"s": statistics.median(turn[name][0] for turn in turns[1:]), "GiB": turns[-1][name][1]}
            for name in contestants}
    show(what, rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, action="append", help="default: config.yaml")
    parser.add_argument("--steps", type=int, default=10, help="training steps that are timed; 0: samples alone")
    parser.add_argument("--official", type=Path, metavar="DIR", help="our OASIS or SDM against the published code in DIR")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    folder = args.official and args.official.absolute()
    if not folder:
        rows = {}
        for path in args.config or [HERE / "config.yaml"]:
            with ProcessPoolExecutor(1, PROCESSES) as pool:
                rows[str(path)] = pool.submit(costs, load_settings(path, args.overrides), args.steps).result()
        for what in next(iter(rows.values())):
            show(what, {name: row[what] for name, row in rows.items()})
    elif (folder / "guided_diffusion").is_dir():
        race("step of a sample", {"published": (published_sdm, folder), "ours": (ours, "configs/sdm_ade20k.yaml", False)}, 2)
    elif (folder / "models/models.py").is_file():
        race("sample", {"published": (published_oasis, folder, False), "ours": (ours, "configs/oasis_ade20k.yaml", False),
                        "DP-SIMS": (ours, "configs/ade20k.yaml", False)}, 3)
        race("training step", {"published": (published_oasis, folder, True),
                               "ours": (ours, "configs/oasis_ade20k.yaml", True)}, 2)
    else:
        raise UserError(f"{folder}: no models/models.py and no guided_diffusion; give the folder of a clone of "
                        f"github.com/boschresearch/OASIS or github.com/WeilunWang/semantic-diffusion-model")


if __name__ == "__main__":
    run_script(main)
