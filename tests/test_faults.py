"""What a long run meets: kills, full disks, damaged files, restarts, several nodes. `-m slow` has the same at length."""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, TINY
from PIL import Image

import sample
import scenes
import train as script
from checkpoint import load_checkpoint, save_checkpoint
from config import UserError, load_settings

FORK = multiprocessing.get_context("fork")
QUICK = {**TINY, "eval": {**TINY["eval"], "num_images": 4, "segmenter_steps": 1, "diversity_samples": 0}}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def quick_config(tmp_path) -> Path:
    """The miniature model with the least of evaluation."""
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(QUICK))
    return path


def in_child(folder: Path, function, *arguments, **environment):
    """Start `function` in a forked process, which spares the start of Python and torch; its output goes to out.txt."""
    def target():
        os.chdir(folder)
        os.environ.update({name: str(value) for name, value in environment.items()})
        with open("out.txt", "a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        function(*arguments)
    process = FORK.Process(target=target)
    process.start()
    return process


def start_training(folder: Path, config: Path, *overrides: str):
    return in_child(folder, lambda: script.main(load_settings(config, list(overrides)), True))


def wait_for(condition, seconds: float = 120):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.002)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def step_of(path: Path) -> int:
    return load_checkpoint(path)["step"]


# --- kills ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kills, eval_every", [(3, 0), pytest.param(20, 6, marks=pytest.mark.slow)])
def test_kills_lose_no_saved_step(quick_config, tmp_path, kills, eval_every):
    """Every second kill comes while a file is being written, the others at any time; every step saves."""
    run, rng, reached, torn = tmp_path / "runs/tiny", random.Random(0), 0, 0
    folder = run / "checkpoints"
    options = ["train.save_every=1", f"train.eval_every={eval_every}"]
    version = lambda: (folder / "latest.pt").stat().st_ino if (folder / "latest.pt").exists() else None
    for number in range(kills):
        before = version()
        process = start_training(tmp_path, quick_config, "train.steps=100000", *options)
        wait_for(lambda: version() != before or not process.is_alive())
        time.sleep(rng.uniform(0, 0.5))
        if number % 2:
            wait_for(lambda: any(run.glob("**/*.tmp")) or not process.is_alive())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "out.txt").read_text()
        torn += any(run.glob("**/*.tmp"))
        steps = {path.name: step_of(path) for path in folder.glob("*.pt")}  # every one can be read
        assert steps["latest.pt"] == max(steps.values()) > reached
        assert steps["latest.pt"] >= lines_of(run / "log.jsonl")[-1]["step"] - 1
        reached = steps["latest.pt"]
    assert torn > 0
    process = start_training(tmp_path, quick_config, f"train.steps={reached + 2}", *options)
    process.join()
    assert process.exitcode == 0, (tmp_path / "out.txt").read_text()
    assert step_of(folder / "latest.pt") == reached + 2
    assert [record["step"] for record in lines_of(run / "log.jsonl")] == list(range(1, reached + 3))
    metrics = lines_of(run / "metrics.jsonl")
    evaluated = [step for step in range(1, reached + 2) if eval_every and step % eval_every == 0] + [reached + 2]
    assert [record["step"] for record in metrics] == evaluated
    assert step_of(folder / "best.pt") == min(metrics, key=lambda record: record["fd_tf_efficientnet_lite2"])["step"]
    assert not list(tmp_path.glob("runs/**/*.tmp"))
    print(f"{kills} kills, {torn} while a file was being written, {reached + 2} steps")


def test_an_evaluation_cut_short_is_made_up_for(train, quick_config, tmp_path, monkeypatch):
    options = ["train.steps=2"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(script, "evaluate_generator", lambda *_, **__: 1 / 0)
        train(quick_config, *options)
    run = tmp_path / "runs/tiny"
    assert step_of(run / "checkpoints/latest.pt") == 2 and not (run / "checkpoints/best.pt").exists()
    for _ in range(2):  # once, that is
        train(quick_config, *options, resume=True)
        assert [record["step"] for record in lines_of(run / "metrics.jsonl")] == [2]
        assert step_of(run / "checkpoints/best.pt") == 2


def children(parent: int) -> list[int]:
    """Process numbers of the children of a process, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            pass
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_loading_processes_end_with_a_killed_parent(quick_config, tmp_path):
    process = start_training(tmp_path, quick_config, "train.steps=100000", "data.workers=2")
    log = tmp_path / "runs/tiny/log.jsonl"
    wait_for(lambda: log.exists() and len(lines_of(log)) > 2)
    workers = children(process.pid)
    assert len(workers) == 2 and all(map(alive, workers))
    process.kill()
    process.join()
    wait_for(lambda: not any(map(alive, workers)), 30)


# --- disks ----------------------------------------------------------------------------------------------------------

def test_disk_full_keeps_the_old_checkpoint(tmp_path):
    latest, limits = tmp_path / "latest.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {f"part {i}": torch.randn(100, 1000) for i in range(5)}
    save_checkpoint(state, latest)
    before = latest.read_bytes()
    try:
        for size in range(1, len(before), len(before) // 5):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(UserError, match=r"latest.pt: cannot be written \(.*File too large\); free space.*--resume$"):
                save_checkpoint(state, latest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["latest.pt"] and latest.read_bytes() == before


@pytest.mark.slow
def test_a_disk_that_fills_up(run, quick_config, tmp_path):
    """train.py until the disk is full, at whatever it writes then; with more space it goes on."""
    (tmp_path / "runs").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", tmp_path / "runs"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    arguments = ["--config", quick_config, "train.steps=8", "train.save_every=1", "train.keep=10", "--resume"]
    try:
        full = run("train.py", *arguments)
        assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr
        line = full.stderr.splitlines()[-1]
        assert line.startswith("error: ") and "No space left on device" in line and "free space" in line
        print(line)
        assert not list(tmp_path.glob("runs/**/*.tmp"))
        reached = step_of(tmp_path / "runs/tiny/checkpoints/latest.pt")
        assert 0 < reached < 8
        subprocess.run(["mount", "-o", "remount,size=100m", tmp_path / "runs"], check=True)
        done = run("train.py", *arguments)
        assert done.returncode == 0, done.stderr
        assert [record["step"] for record in lines_of(tmp_path / "runs/tiny/log.jsonl")] == list(range(1, 9))
    finally:
        subprocess.run(["umount", tmp_path / "runs"], check=True)


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "latest.pt"
    save_checkpoint({"config": {}, "class_names": ["a"], "palette": [[0, 0, 0]] * 2, "ids": [0] * 256, "step": 3,
                     "ema": {"weight": torch.randn(100, 1000)}}, path)
    assert step_of(path) == 3
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= damage == "bit"
    path.write_bytes(content[: len(content) - (damage == "cut")])
    with pytest.raises(UserError, match=r"latest.pt: cut short, altered .* --resume") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


# --- long runs ------------------------------------------------------------------------------------------------------

def footprint(process: int) -> dict[str, int]:
    """Memory (KiB), open files and child processes of a process and its children."""
    group = [process, *children(process)]
    memory = [int(line.split()[1]) for one in group for line in Path(f"/proc/{one}/status").read_text().splitlines()
              if line.startswith("VmRSS")]
    return {"memory": memory[0], "memory of children": sum(memory[1:]),
            "files": sum(len(os.listdir(f"/proc/{one}/fd")) for one in group), "children": len(group) - 1}


@pytest.mark.slow
def test_a_thousand_steps_grow_nothing(quick_config, tmp_path):
    options = ["train.steps=1000", "data.workers=2", "train.log_every=10", "train.save_every=50", "train.sample_every=50",
               "train.eval_every=100"]
    process = start_training(tmp_path, quick_config, *options)
    log, seen = tmp_path / "runs/tiny/log.jsonl", {}
    for step in range(110, 1000, 110):  # between two evaluations
        wait_for(lambda: log.exists() and lines_of(log)[-1:] and lines_of(log)[-1]["step"] >= step or not process.is_alive(), 3000)
        seen[step] = footprint(process.pid)
        print(step, seen[step])
    process.join()
    assert process.exitcode == 0, (tmp_path / "out.txt").read_text()
    # several looks each: a file may just be open, and the allocator hands freed blocks back at times of its own
    for name, pick, growth in (("memory", max, 1.03), ("memory of children", max, 1.03), ("files", min, 1), ("children", max, 1)):
        values = [look[name] for look in seen.values()]
        assert pick(values[-4:]) <= growth * pick(values[:4]), name
    assert seen[990]["children"] == 2


# --- several processes ----------------------------------------------------------------------------------------------

def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def label_maps(tmp_path) -> Path:
    (tmp_path / "labels").mkdir()
    for i in range(3):
        Image.fromarray(scenes.render("val", i, (32, 32))[1]).save(tmp_path / "labels" / f"map{i}.png")
    return tmp_path / "labels"


def test_sample_shares_label_maps_with_identical_images(train, quick_config, tmp_path, label_maps):
    """Three maps over four processes, so that one has none."""
    train(quick_config, "train.steps=1")
    options = {**sample.DEFAULTS, "labels": Path("labels"), "checkpoint": None, "num": 2, "seed": 0, "grid": True,
               "config": None}
    sample.main(SimpleNamespace(**options, out=Path("one")))
    group = [in_child(tmp_path, sample.main, SimpleNamespace(**options, out=Path("four")), RANK=rank, WORLD_SIZE=4,
                      LOCAL_RANK=rank, MASTER_ADDR="localhost", MASTER_PORT=port)
             for port in [free_port()] for rank in range(4)]
    for process in group:
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "out.txt").read_text()
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 7 and names == sorted(path.name for path in (tmp_path / "four").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "four" / name).read_bytes() for name in names)


def two_by_two(folder: Path, *arguments) -> None:
    """torchrun as on two nodes of two processes each, with the rendezvous of production."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv-backend=c10d",
              f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=job", *map(str, arguments)]
    nodes = [subprocess.Popen(launch, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for _ in range(2)]
    for node in nodes:
        output, _ = node.communicate(timeout=600)
        assert node.returncode == 0, output


@pytest.mark.slow
def test_two_nodes(run, quick_config, tmp_path, label_maps):
    """Training with its evaluation, evaluate.py and sample.py, each with three images for four processes."""
    options = ["eval.num_images=3"]
    two_by_two(tmp_path, ROOT / "train.py", "--config", quick_config, *options, "train.steps=3")
    checkpoint = tmp_path / "runs/tiny/checkpoints/latest.pt"
    assert step_of(checkpoint) == 3 and lines_of(tmp_path / "runs/tiny/metrics.jsonl")[-1]["num_images"] == 3
    results = []
    for many in (True, False):
        for name, arguments in (("evaluate.py", ["--checkpoint", checkpoint, "--out", f"{many}.json", *options]),
                                ("sample.py", ["--labels", label_maps, "--out", f"images_{many}"])):
            if many:
                two_by_two(tmp_path, ROOT / name, *arguments)
            else:
                assert run(name, *arguments).returncode == 0
        results.append(json.loads((tmp_path / f"{many}.json").read_text()))
    for path in (tmp_path / "images_True").iterdir():
        assert path.read_bytes() == (tmp_path / "images_False" / path.name).read_bytes()
    for name, value in results[1].items():
        if isinstance(value, float):
            assert results[0][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
def test_elastic_restart(quick_config, tmp_path):
    """A killed training process restarts the group from the last checkpoint; the run ends with the right number of steps."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3", "--nproc_per_node=2",
              ROOT / "train.py", "--config", quick_config, "train.steps=12", "train.save_every=1", "--resume"]
    agent = subprocess.Popen(launch, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "runs/tiny/log.jsonl"
    wait_for(lambda: log.exists() and len(lines_of(log)) >= 3 or agent.poll() is not None, 300)
    victim = children(agent.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    output, _ = agent.communicate(timeout=600)
    assert agent.returncode == 0, output
    assert step_of(tmp_path / "runs/tiny/checkpoints/latest.pt") == 12
    assert [record["step"] for record in lines_of(log)] == list(range(1, 13))
    assert len(lines_of(tmp_path / "runs/tiny/metrics.jsonl")) == 1
