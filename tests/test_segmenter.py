"""segmenter.py: training on the real split, other people's segmenters, the mapping of their ids to the classes."""

import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from checkpoint import save_checkpoint
from config import UserError, check_settings
from dataset import build_dataset
from evaluation import Tally
from metrics import segmentation_scores
from segmenter import Segmenter, SmallUNet, class_weights, load_segmenter, segmenter_for, train_segmenter


@pytest.fixture
def given(folder_data):
    """Three classes in flat colors: a data set that a segmenter learns at once."""
    data = {"name": "folder", "root": str(folder_data), "size": [16, 24], "classes": 3, "void": 255, "workers": 0}
    return {"data": data, "eval": {"segmenter_steps": 40}}


@pytest.fixture
def data(given):
    return check_settings(given, "test").data


def accuracy(segmenter, dataset):
    """Share of the labelled pixels of all classes that a segmenter gets right."""
    images, labels = (torch.stack(column) for column in zip(*dataset))
    return (segmenter(images) == labels)[labels < 3].float().mean()


class ByChannel(torch.nn.Module):
    """Scores of a pixel = its red, green and blue, at half the size: the right answer on `folder_data`."""

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 2)


def test_learns_and_is_kept(given, data, tmp_path, monkeypatch):
    judge = lambda changed: segmenter_for(check_settings(given | changed, "test"), tmp_path / "cache", "cpu")
    segmenter = judge({})
    assert accuracy(segmenter, build_dataset(data, "val")) > 0.8
    assert segmenter.description["trained_steps"] == 40 and len(segmenter.description["sha256"]) == 64
    monkeypatch.setattr("segmenter.train_segmenter", lambda *args: pytest.fail("trained twice"))
    assert judge({}).description == segmenter.description
    for changed in ({"eval": {"segmenter_steps": 2}}, {"data": given["data"] | {"size": [24, 16]}},
                    {"data": given["data"] | {"classes": ["sky", "road", "tree"]}}):
        with pytest.raises(pytest.fail.Exception, match="trained twice"):  # another segmenter
            judge(changed)


def test_same_seed_same_segmenter(data):
    first, second = (train_segmenter(data, 2, "cpu") for _ in range(2))
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])


def test_odd_sizes():
    assert SmallUNet(5).eval()(torch.zeros(1, 3, 31, 45)).shape == (1, 5, 31, 45)


def test_class_weights_equal_the_formula(data):
    dataset = build_dataset(data, "train")
    labels = np.stack([dataset[i][1].numpy() for i in range(len(dataset))])
    share = np.array([(labels == c).sum() for c in range(3)]) / (labels < 3).sum()
    weights = (share + 1e-3) ** -0.5
    np.testing.assert_allclose(class_weights(dataset), weights / (weights * share).sum(), rtol=1e-5)


def test_torchscript_and_exported_files(given, data, tmp_path):
    dataset = build_dataset(data, "val")
    torch.jit.trace(ByChannel(), torch.rand(1, 3, 16, 24)).save(str(tmp_path / "judge.pt"))
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(ByChannel(), (torch.rand(2, 3, 16, 24),), dynamic_shapes=({0: batch},)),
                      tmp_path / "judge.pt2")
    for name in ("judge.pt", "judge.pt2"):
        segmenter = load_segmenter(str(tmp_path / name), dataset.class_names, dataset.size, "cpu")
        assert accuracy(segmenter, dataset) > 0.8 and segmenter.description["mapping"] == [0, 1, 2]
        away = {"data": given["data"] | {"root": "nowhere"}, "eval": {"segmenter": str(tmp_path / name)}}
        settings = check_settings(away, "test")  # needs no training split
        assert segmenter_for(settings, tmp_path / "cache", "cpu").description == segmenter.description
    with pytest.raises(UserError, match=r"is \[0, 1\]; it needs an entry for each of its 3 classes"):
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


def test_wrong_files_and_mappings_are_one_line(data, tmp_path):
    names, size = ["a", "b", "c"], (16, 24)
    (tmp_path / "noise.pt").write_bytes(b"nothing")
    torch.save({"class_names": names}, tmp_path / "model.pt")  # such as a checkpoint
    torch.jit.trace(ByChannel(), torch.rand(1, 3, 16, 24)).save(str(tmp_path / "judge.pt"))
    save_checkpoint(train_segmenter(data, 1, "cpu"), tmp_path / "other.pt")
    for source, mapping, text in [("absent.pt", None, "absent.pt is not a file"),
                                  ("noise.pt", None, "noise.pt: cannot be loaded"),
                                  ("model.pt", None, "model.pt: cannot be loaded"),
                                  ("judge.pt", [0, 1, 7], "0 to 2, or -1 for none"),
                                  ("judge.pt", [0, 1], "an entry for each of its 3 classes"),
                                  ("other.pt", None, "trained on the classes")]:
        with pytest.raises(UserError, match=text) as error:
            load_segmenter(str(tmp_path / source), names, size, "cpu", mapping)
        assert "\n" not in str(error.value)
    few = Segmenter(lambda images: torch.full((1, 2, 2), 5), [0, 1, 2], names, {"name": "stub"})
    with pytest.raises(UserError, match="gave id 5"):
        few(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))


def fake_transformers(labels):
    """A stand-in for the transformers package: a model that names its classes and answers with class 1 everywhere."""
    network, processor = MagicMock(), MagicMock()
    network.to().eval().config.id2label = dict(enumerate(labels))
    processor.post_process_semantic_segmentation = lambda outputs, sizes: [torch.ones(s).long() for s in sizes]
    package = MagicMock()
    package.AutoImageProcessor.from_pretrained.return_value = processor
    package.AutoModelForSemanticSegmentation.from_pretrained.side_effect = ValueError("no such")  # as for Mask2Former
    package.AutoModelForUniversalSegmentation.from_pretrained.return_value = network
    return package


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
