"""segmenter.py: training on the real split, other people's segmenters, the mapping between their ids and the classes."""

import sys
import types

import numpy as np
import pytest
import torch

from config import UserError
from data import build_dataset
from metrics import Tally, segmentation_scores
from checkpoint import save_checkpoint
from segmenter import Segmenter, SmallUNet, class_weights, load_segmenter, segmenter_for, train_segmenter, validate

JUDGES = {"segmenter": None, "segmenter_steps": 40, "segmenter_mapping": None}


@pytest.fixture
def config(folder_data):
    """Three classes in flat colors: a data set that a segmenter learns at once."""
    return {"data": {"name": "folder", "root": str(folder_data), "size": [16, 24], "classes": 3, "void": 255,
                     "palette": None, "load_scale": 1.0, "flip": True, "workers": 0, "skip_broken": False,
                     "instances": False},
            "eval": dict(JUDGES)}


class ByChannel(torch.nn.Module):
    """Scores of a pixel = its red, green and blue, at half the size: the right answer on `folder_data`."""

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 2)


def test_learns_and_is_kept(config, tmp_path, monkeypatch):
    segmenter = segmenter_for(config, tmp_path / "cache", "cpu")
    scores = validate(segmenter, config["data"], "cpu")
    assert scores["miou"] > 0.8 and list(scores["class_iou"]) == ["class 0", "class 1", "class 2"]
    assert segmenter.description["trained_steps"] == 40 and len(segmenter.description["sha256"]) == 64
    monkeypatch.setattr("segmenter.train_segmenter", lambda *args: pytest.fail("trained twice"))
    again = segmenter_for(config, tmp_path / "cache", "cpu")
    assert again.description == segmenter.description
    for changed in ({"eval": JUDGES | {"segmenter_steps": 2}}, {"data": config["data"] | {"size": [24, 16]}},
                    {"data": config["data"] | {"classes": ["sky", "road", "tree"]}}):
        with pytest.raises(pytest.fail.Exception, match="trained twice"):  # another segmenter
            segmenter_for(config | changed, tmp_path / "cache", "cpu")


def test_same_seed_same_segmenter(config):
    first, second = (train_segmenter(config["data"], 2, "cpu") for _ in range(2))
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])


def test_odd_sizes():
    assert SmallUNet(5).eval()(torch.zeros(1, 3, 31, 45)).shape == (1, 5, 31, 45)


def test_class_weights_equal_the_formula(config):
    dataset = build_dataset(config["data"], "train")
    labels = np.stack([dataset[i][1].numpy() for i in range(len(dataset))])
    share = np.array([(labels == c).sum() for c in range(3)]) / (labels < 3).sum()
    weights = (share + 1e-3) ** -0.5
    np.testing.assert_allclose(class_weights(dataset), weights / (weights * share).sum(), rtol=1e-5)


def test_torchscript_and_exported_files(config, tmp_path):
    dataset = build_dataset(config["data"], "val")
    torch.jit.trace(ByChannel(), torch.rand(1, 3, 16, 24)).save(str(tmp_path / "judge.pt"))
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(ByChannel(), (torch.rand(2, 3, 16, 24),), dynamic_shapes=({0: batch},)),
                      tmp_path / "judge.pt2")
    for name in ("judge.pt", "judge.pt2"):
        segmenter = load_segmenter(str(tmp_path / name), dataset.class_names, dataset.size, "cpu")
        scores = validate(segmenter, config["data"], "cpu")
        assert scores["miou"] > 0.8 and segmenter.description["mapping"] == [0, 1, 2]
        away = {**config, "data": {**config["data"], "root": "nowhere"}, "eval": {**config["eval"], "segmenter": str(tmp_path / name)}}
        assert segmenter_for(away, tmp_path / "cache", "cpu").description == segmenter.description  # needs no training split
    with pytest.raises(UserError, match="3 classes, but 2 are mapped"):
        load_segmenter(str(tmp_path / "judge.pt"), ["a", "b"], dataset.size, "cpu")


def test_mapping_reorders_and_leaves_out_what_cannot_be_judged():
    # the network's ids 0, 1, 2 are our classes 2, none, 0; our class 1 has no id, so its pixels count as void
    predictions = torch.tensor([[[0, 1], [2, 2]]])
    segmenter = Segmenter(lambda images: predictions, [2, -1, 0], ["a", "b", "c"], {"name": "stub"})
    assert segmenter(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).tolist() == [[[2, 3], [0, 0]]]
    assert segmenter.description["not_judged"] == ["b"]
    tally = Tally(lambda images: images.flatten(1).float(), segmenter, 3)
    tally.update([0], torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([[[2, 0], [0, 1]]]))
    scores = segmentation_scores(tally.confusion, ["a", "b", "c"])
    assert scores["class_iou"] == {"a": 1 / 2, "b": None, "c": 1.0} and scores["pixel_accuracy"] == 2 / 3


def test_wrong_files_and_mappings_are_one_line(config, tmp_path):
    names, size = ["a", "b", "c"], (16, 24)
    (tmp_path / "noise.pt").write_bytes(b"nothing")
    torch.jit.trace(ByChannel(), torch.rand(1, 3, 16, 24)).save(str(tmp_path / "judge.pt"))
    save_checkpoint(train_segmenter(config["data"], 1, "cpu"), tmp_path / "other.pt")
    for source, mapping, text in [("absent.pt", None, "absent.pt is not a file"), ("noise.pt", None, "noise.pt: cannot be loaded"),
                                  ("judge.pt", [0, 1, 7], "7 is no class; use 0 to 2"),
                                  ("judge.pt", [0, 1], "3 classes, but 2 are mapped"),
                                  ("other.pt", None, "trained on the classes")]:
        with pytest.raises(UserError, match=text) as error:
            load_segmenter(str(tmp_path / source), names, size, "cpu", mapping)
        assert "\n" not in str(error.value)
    few = Segmenter(lambda images: torch.full((1, 2, 2), 5), [0, 1, 2], names, {"name": "stub"})
    with pytest.raises(UserError, match="gave id 5"):
        few(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))


def fake_transformers(labels):
    """A stand-in for the transformers package: a model that names its classes and answers with class 1 everywhere."""
    model = types.SimpleNamespace(config=types.SimpleNamespace(id2label=dict(enumerate(labels))))
    network = type("Network", (), {"config": model.config, "to": lambda self, device: self, "eval": lambda self: self,
                                   "__call__": lambda self, **inputs: None})()
    inputs = type("Inputs", (dict,), {"to": lambda self, device: self})()
    processor = type("Processor", (), {
        "__call__": lambda self, images, return_tensors: inputs,
        "post_process_semantic_segmentation": lambda self, outputs, sizes: [torch.ones(s, dtype=torch.int64) for s in sizes]})()
    refuse = lambda name: (_ for _ in ()).throw(ValueError("not a semantic model"))  # as for Mask2Former
    return types.SimpleNamespace(
        AutoImageProcessor=types.SimpleNamespace(from_pretrained=lambda name: processor),
        AutoModelForSemanticSegmentation=types.SimpleNamespace(from_pretrained=refuse),
        AutoModelForUniversalSegmentation=types.SimpleNamespace(from_pretrained=lambda name: network))


def test_hugging_face_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(["Sky", "road, route"]))
    images = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    segmenter = load_segmenter("hf:some/model", ["road", "tree", "sky"], (4, 6), "cpu")
    assert segmenter.description["mapping"] == [2, 0] and segmenter.description["not_judged"] == ["tree"]
    assert segmenter(images).unique().tolist() == [0]
    with pytest.raises(UserError, match="'Sky' is not in the data set .* set eval.segmenter_mapping"):
        load_segmenter("hf:some/model", ["road", "tree"], (4, 6), "cpu")
    assert load_segmenter("hf:some/model", ["road", "tree"], (4, 6), "cpu", [-1, 1])(images).unique().tolist() == [1]


def test_without_transformers_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        load_segmenter("hf:some/model", ["a"], (4, 4), "cpu")
