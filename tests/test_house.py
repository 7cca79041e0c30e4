"""The shape of the house: which rooms import which, how large they are, and that a room can be copied out."""

import graphlib
import re
import subprocess
import sys

from conftest import ROOT

SCRIPTS = {"train", "sample", "evaluate", "bench", "data", "paint", "compare", "export"}
COPYABLE = {"models", "backbones", "losses", "oasis", "sdm", "diffusion", "metrics", "augment"}
FILES = {path.stem: path for path in ROOT.glob("*.py")}


def imports(name: str) -> set[str]:
    """The project's modules that a file imports, inside functions too, and those that a table names as "module:Class"."""
    found = re.findall(r'^ *(?:from|import) (\w+)\s|"(\w+):\w+"', FILES[name].read_text(), re.MULTILINE)
    return {module for pair in found for module in pair} & FILES.keys() - {name}


def test_imports_go_one_way():
    graph = {name: imports(name) for name in FILES}
    assert {name: graph[name] for name in COPYABLE & FILES.keys() if graph[name]} == {}
    assert {name: graph[name] & SCRIPTS for name in FILES if graph[name] & SCRIPTS} == {}
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the files that import themselves


def test_only_the_table_names_the_systems_and_a_file_fits_one_sitting():
    for name, path in FILES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, name
        assert name in ("systems", "oasis", "sdm") or not re.search("OASISGenerator|OASISDiscriminator|SDMUNet", text), name


CHECK = """
import math, sys
sys.path.insert(0, ".")
from loop import backbone, d_loss, discriminator, g_loss, generator
assert all(p.grad is not None and p.grad.isfinite().all() for n in (generator, discriminator) for p in n.parameters())
assert not any(p.requires_grad for p in backbone.parameters()) and math.isfinite(g_loss.item() + d_loss.item())
"""


def test_rooms_can_be_copied_and_the_loop_of_the_readme_runs(tmp_path):
    for name in ("models", "backbones", "losses"):
        (tmp_path / f"{name}.py").write_text(FILES[name].read_text())
    section = (ROOT / "README.md").read_text().partition("## Use it in your own code")[2]
    loop = re.search(r"```python\n(.*?)```", section, re.S)[1].replace("range(10)", "range(2)")  # batches
    (tmp_path / "loop.py").write_text(loop)
    done = subprocess.run([sys.executable, "-I", "-c", CHECK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
