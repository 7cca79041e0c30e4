"""What a long run meets: kills, full disks, restarts, several nodes. `-m slow` has the same at length."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_child
from torch.distributed.elastic.utils.distributed import get_free_port

import train as script
from checkpoint import load_checkpoint, save_checkpoint
from config import UserError
from plots import read_records


def wait_for(condition, seconds: float = 120):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.002)


def step_of(path: Path) -> int:
    return load_checkpoint(path)["step"]


def output_of(*command) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True).stdout


@pytest.mark.parametrize("kills, eval_every", [(3, 0), pytest.param(20, 6, marks=pytest.mark.slow)])
def test_kills_lose_no_saved_step(train, tiny_config, tmp_path, kills, eval_every):
    """Every second kill comes while a file is being written, the others at any time; every step saves."""
    run, rng, reached, torn = tmp_path / "runs/tiny", random.Random(0), 0, 0
    options = ["train.save_every=1", f"train.eval_every={eval_every}"]
    latest = run / "checkpoints/latest.pt"
    version = lambda: latest.exists() and latest.stat().st_ino
    start = lambda steps: in_child(tmp_path, lambda: train(tiny_config, f"train.steps={steps}", *options, resume=True))
    saved = lambda: {path.name: step_of(path) for path in (run / "checkpoints").glob("*.pt")}  # every one can be read
    for number in range(kills):
        before, process = version(), start(100000)
        wait_for(lambda: version() != before or not process.is_alive())
        time.sleep(rng.uniform(0, 0.5))
        if number % 2:
            wait_for(lambda: any(run.glob("**/*.tmp")) or not process.is_alive())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "out.txt").read_text()
        torn += any(run.glob("**/*.tmp"))
        assert saved()["latest.pt"] == max(saved().values()) > reached
        reached = saved()["latest.pt"]
        assert reached >= read_records(run / "log.jsonl")[-1]["step"] - 1
    assert torn > 0
    process = start(reached + 2)
    process.join()
    assert process.exitcode == 0, (tmp_path / "out.txt").read_text()
    evaluated = [step for step in range(1, reached + 2) if eval_every and step % eval_every == 0] + [reached + 2]
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == evaluated
    assert saved()["latest.pt"] == reached + 2 and saved()["best.pt"] in evaluated
    assert [record["step"] for record in read_records(run / "log.jsonl")] == list(range(1, reached + 3))
    assert not list(tmp_path.glob("runs/**/*.tmp"))


def test_an_evaluation_cut_short_is_made_up_for(train, tiny_config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(script, "evaluate_generator", lambda *_, **__: 1 / 0)
        train(tiny_config, "train.steps=2")
    run = tmp_path / "runs/tiny"
    assert step_of(run / "checkpoints/latest.pt") == 2 and not (run / "checkpoints/best.pt").exists()
    for _ in range(2):  # once, that is
        train(tiny_config, "train.steps=2", resume=True)
        assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [2]
        assert step_of(run / "checkpoints/best.pt") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals(train, tiny_config, tmp_path, number):
    """Ctrl-C and SIGTERM save first, though they reach the loading processes too; those end with a killed parent."""
    process = in_child(tmp_path, lambda: train(tiny_config, "train.steps=100000", "train.save_every=0", "data.workers=2"))
    log = tmp_path / "runs/tiny/log.jsonl"
    wait_for(lambda: len(read_records(log)) >= 2)
    workers = output_of("pgrep", "-P", process.pid).split()
    assert len(workers) == 2
    (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
    process.join(60)
    states = lambda: output_of("ps", "-o", "stat=", "-p", ",".join(workers)).split()
    wait_for(lambda: all(state.startswith("Z") for state in states()), 30)  # has ended, if nobody waited for it
    if number != signal.SIGKILL:
        step = step_of(tmp_path / "runs/tiny/checkpoints/latest.pt")
        assert process.exitcode == 0 and step >= 2 and f"stopped at step {step}" in (tmp_path / "out.txt").read_text()


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
def test_a_thousand_steps_grow_nothing(train, tiny_config, tmp_path):
    options = ["train.steps=1000", "train.save_every=50", "train.sample_every=50", "train.eval_every=100"]
    process = in_child(tmp_path, lambda: train(tiny_config, *options))
    process.join()
    assert process.exitcode == 0, (tmp_path / "out.txt").read_text()
    peaks = [record["peak_memory_gib"] for record in read_records(tmp_path / "runs/tiny/log.jsonl")]
    assert peaks[999] <= 1.03 * peaks[499]


def torchrun(folder: Path, *arguments) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *map(str, arguments)]
    return subprocess.Popen(launch, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_nodes(call, tiny_config, tmp_path):
    """Two processes on each, with the rendezvous of production: their evaluation, of three images, is that of one process."""
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{get_free_port()}", "--rdzv-id=job"]
    training = [ROOT / "train.py", "--config", tiny_config, "train.steps=3", "eval.num_images=3"]
    for node in [torchrun(tmp_path, "--nnodes=2", *meet, *training) for _ in range(2)]:
        output, _ = node.communicate(timeout=600)
        assert node.returncode == 0, output
    [logged] = read_records(tmp_path / "runs/tiny/metrics.jsonl")
    call("evaluate.py", "--checkpoint", "runs/tiny/checkpoints/latest.pt")
    alone = json.loads((tmp_path / "metrics.json").read_text())
    assert logged["step"] == logged["num_images"] == alone["num_images"] == 3
    for name in alone:
        if isinstance(alone[name], float):
            assert logged[name] == pytest.approx(alone[name], rel=1e-4), name


@pytest.mark.slow
def test_elastic_restart(tiny_config, tmp_path, monkeypatch):
    """A killed training process restarts the group from the last checkpoint; the run ends with the right number of steps."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as README.md says
    agent = torchrun(tmp_path, "--standalone", "--max-restarts=3", ROOT / "train.py", "--config", tiny_config, "train.steps=12",
                     "train.save_every=1", "--resume")
    log = tmp_path / "runs/tiny/log.jsonl"
    wait_for(lambda: len(read_records(log)) >= 3 or agent.poll() is not None, 300)
    os.kill(int(output_of("pgrep", "-P", agent.pid).split()[-1]), signal.SIGKILL)
    output, _ = agent.communicate(timeout=600)
    assert agent.returncode == 0, output
    assert [record["step"] for record in read_records(log)] == list(range(1, 13))
    assert [record["step"] for record in read_records(tmp_path / "runs/tiny/metrics.jsonl")] == [12]
