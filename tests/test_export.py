"""The ONNX file of a generator, run by onnxruntime, against PyTorch."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY
from test_paint import OASIS, SDM, write_checkpoint

import export
import scenes
from checkpoint import load_generator
from config import UserError

GENERATORS = {"dp_sims": TINY["generator"], "concat": {**TINY["generator"], "noise": "concat"},
              "oasis": OASIS}


@pytest.fixture
def runtime(tmp_path) -> Path:
    """Stands for onnxruntime-web, which is only copied."""
    (tmp_path / "package/dist").mkdir(parents=True)
    for name in export.RUNTIME:
        (tmp_path / "package/dist" / name).write_text("runtime")
    return tmp_path / "package"


@pytest.mark.parametrize("name", GENERATORS)
def test_the_file_draws_what_the_generator_draws(name, runtime, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    checkpoint, out = write_checkpoint(tmp_path / "latest.pt", generator=GENERATORS[name]), tmp_path / "page"
    export.main(Namespace(checkpoint=checkpoint, config=None, out=out, runtime=runtime))
    assert "difference from PyTorch" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"index.html", "model.onnx", "model.json", "example", *export.RUNTIME}
    weights = [entry.data_type for entry in onnx.load(out / "model.onnx").graph.initializer]
    assert onnx.TensorProto.FLOAT16 in weights and onnx.TensorProto.FLOAT not in weights
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert {entry.name: (entry.type, entry.shape) for entry in session.get_inputs()} == {
        "label_map": ("tensor(int64)", [1, 32, 32]), "z": ("tensor(float)", [1, 8]), "z2": ("tensor(float)", [1, 8]),
        "region": ("tensor(bool)", [1, 32, 32])}
    generator = load_generator(checkpoint)[1]
    label_map = torch.randint(13, (1, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    inputs = {"label_map": label_map, "z": torch.randn(1, 8), "z2": torch.randn(1, 8), "region": label_map == label_map[0, 0, 0]}
    image = session.run(["image"], {key: value.numpy() for key, value in inputs.items()})[0]
    with torch.no_grad():
        assert np.abs(image - generator(**inputs).numpy()).max() * 127.5 <= 2
    described = json.loads((out / "model.json").read_text())
    assert described["examples"] == 24 == len(list((out / "example").iterdir()))
    assert (out / "example/0").read_bytes() == scenes.render("val", 0, (32, 32))[1].tobytes()


def test_what_cannot_be_exported_is_said(runtime, tmp_path):
    given = {"config": None, "out": tmp_path / "page", "runtime": runtime}
    sdm = write_checkpoint(tmp_path / "sdm.pt", generator=SDM)
    with pytest.raises(UserError, match="sdm: takes many steps"):
        export.main(Namespace(checkpoint=sdm, **given))
    checkpoint = write_checkpoint(tmp_path / "latest.pt")
    with pytest.raises(UserError, match="npm pack onnxruntime-web"):
        export.main(Namespace(checkpoint=checkpoint, **given | {"runtime": tmp_path}))
    with pytest.raises(UserError, match="choose another --out"):
        export.main(Namespace(checkpoint=checkpoint, **given | {"out": tmp_path}))
    assert not (tmp_path / "page").exists()
