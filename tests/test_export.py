"""The ONNX file of a generator, run by onnxruntime, against PyTorch."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TINY, write_checkpoint
from test_paint import OASIS, SDM

import export
import scenes
from checkpoint import load_generator
from config import UserError


@pytest.fixture
def runtime(tmp_path) -> Path:
    """Stands for onnxruntime-web, which is only copied."""
    (tmp_path / "package/dist").mkdir(parents=True)
    for name in export.RUNTIME:
        (tmp_path / "package/dist" / name).write_text("runtime")
    return tmp_path / "package"


@pytest.mark.parametrize("generator", [TINY["generator"], pytest.param(OASIS, marks=pytest.mark.slow)])
def test_the_file_draws_what_the_generator_draws(generator, runtime, tmp_path):
    data, out = {**TINY["data"], "size": [32, 96]}, tmp_path / "page"
    checkpoint = write_checkpoint(tmp_path / "latest.pt", generator=generator, data=data)
    export.main(Namespace(checkpoint=checkpoint, config=None, out=out, runtime=runtime))
    assert {path.name for path in out.iterdir()} == {"index.html", "model.onnx", "model.json", "example", *export.RUNTIME}
    kinds = {entry.data_type for entry in onnx.load(out / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds and onnx.TensorProto.FLOAT not in kinds
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert {entry.name: (entry.type, entry.shape) for entry in session.get_inputs()} == {
        "label_map": ("tensor(int64)", [1, 32, 96]), "z": ("tensor(float)", [1, 8]), "z2": ("tensor(float)", [1, 8]),
        "region": ("tensor(bool)", [1, 32, 96])}
    generator = load_generator(checkpoint)[1]
    label_map = torch.randint(13, (1, 4, 12)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    inputs = {"label_map": label_map, "z": torch.randn(1, 8), "z2": torch.randn(1, 8), "region": label_map < 6}
    image = session.run(["image"], {key: value.numpy() for key, value in inputs.items()})[0]
    with torch.no_grad():
        assert np.abs(image - generator(**inputs).numpy()).max() * 127.5 <= 2
    described = json.loads((out / "model.json").read_text())
    assert described["examples"] == 24 == len(list((out / "example").iterdir()))
    assert (out / "example/0").read_bytes() == scenes.render("val", 0, (32, 96))[1].tobytes()


def test_what_cannot_be_exported_is_said(runtime, tmp_path):
    given = {"config": None, "out": tmp_path / "page", "runtime": runtime}
    sdm, checkpoint = write_checkpoint(tmp_path / "sdm.pt", generator=SDM), write_checkpoint(tmp_path / "latest.pt")
    for changes, said in (({"checkpoint": sdm}, "sdm: takes many steps"), ({"out": tmp_path}, "choose another --out"),
                          ({"runtime": tmp_path}, "npm pack onnxruntime-web")):
        with pytest.raises(UserError, match=said):
            export.main(Namespace(**{"checkpoint": checkpoint} | given | changes))
    assert not (tmp_path / "page").exists()
