"""segmenter.py: training on the real split, other people's segmenters, the mapping of their ids to the classes."""

import sys
from unittest.mock import MagicMock

import pytest
import torch

from config import UserError, check_settings
from dataset import build_dataset
from evaluation import judge
from metrics import segmentation_scores
from segmenter import Segmenter, segmenter_for, train_segmenter


@pytest.fixture
def given(folder_data):
    """Three classes in flat colors: a data set that a segmenter learns at once."""
    return {"name": "folder", "root": str(folder_data), "size": [16, 24], "classes": 3, "void": 255, "workers": 0}


def segmenter_of(data, cache="nowhere", **judges):
    return segmenter_for(check_settings({"data": data, "eval": {"segmenter_steps": 40} | judges}, "test"), cache, "cpu")


def accuracy(segmenter, data):
    """Share of the labelled pixels of all classes of val that a segmenter gets right."""
    dataset = build_dataset(check_settings({"data": data}, "test").data, "val")
    images, labels = (torch.stack(column) for column in zip(*dataset))
    return (segmenter(images) == labels)[labels < 3].float().mean()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Scores of a pixel are its red, green and blue, at half the size: the right answer on `folder_data`."""
    file, shapes = tmp_path_factory.mktemp("exported") / "judge.pt2", ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(torch.nn.AvgPool2d(2), (torch.rand(2, 3, 16, 24),), dynamic_shapes=shapes), file)
    return file


def test_learns_and_is_kept(given, tmp_path, monkeypatch):
    segmenter = segmenter_of(given, tmp_path)
    assert accuracy(segmenter, given) > 0.8
    assert segmenter.description["trained_steps"] == 40 and len(segmenter.description["sha256"]) == 64
    monkeypatch.setattr("segmenter.train_segmenter", lambda *args: pytest.fail("trained twice"))
    assert segmenter_of(given, tmp_path).description == segmenter.description
    assert segmenter_of(given, segmenter=str(next(tmp_path.glob("*.pt")))).description == segmenter.description
    for changed, steps in (({}, 2), ({"flip": False}, 40), ({"size": [24, 16]}, 40), ({"classes": ["sky", "road", "tree"]}, 40)):
        with pytest.raises(pytest.fail.Exception, match="trained twice"):  # another segmenter
            segmenter_of(given | changed, tmp_path, segmenter_steps=steps)


def test_same_seed_same_segmenter_for_odd_sizes(given):
    data = check_settings({"data": given | {"size": [15, 21]}}, "").data
    first = train_segmenter(data, 2, "cpu")
    torch.manual_seed(1)  # means nothing to it
    torch.testing.assert_close(train_segmenter(data, 2, "cpu")["weights"], first["weights"], rtol=0, atol=0)


def test_exported_file(given, exported):
    segmenter = segmenter_of(given | {"root": "nowhere"}, segmenter=str(exported))  # needs no training split
    assert accuracy(segmenter, given) > 0.8 and segmenter.description["mapping"] == [0, 1, 2]


def test_mapping_reorders_and_leaves_out_what_cannot_be_judged():
    # the network's ids 0, 1, 2 are our classes 2, none, 0; our class 1 has no id, so its pixels count as void
    predictions = torch.tensor([[[0, 1], [2, 2]]])
    segmenter = Segmenter(lambda images: predictions, [2, -1, 0], ["a", "b", "c"], {"name": "stub"})
    assert segmenter(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).tolist() == [[[2, 3], [0, 0]]]
    assert segmenter.description["not_judged"] == ["b"]
    network = lambda images: images.flatten(1).float()
    judged = judge(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([[[2, 0], [0, 1]]]), network, segmenter, 3)
    scores = segmentation_scores(judged["confusion"], ["a", "b", "c"])
    assert scores["class_iou"] == {"a": 1 / 2, "b": None, "c": 1.0} and scores["pixel_accuracy"] == 2 / 3


@pytest.mark.parametrize("source, mapping, text", [
    ("absent.pt", None, "cannot be loaded"),
    ("judge.pt2", [0, 1, 7], "0 to 1, or -1 for none"),
    ("judge.pt2", [0, 1], r"is \[0, 1\]; it needs an entry for each of its 3 classes"),
    ("judge.pt2", None, "its class 'output 0' is not in the data set")])
def test_wrong_files_and_mappings_are_one_line(given, exported, source, mapping, text):
    with pytest.raises(UserError, match=f"^[^\n]*{source}[^\n]*{text}[^\n]*$"):
        segmenter_of(given | {"classes": ["a", "b"]}, segmenter=str(exported.with_name(source)), segmenter_mapping=mapping)


def test_hugging_face_by_name(given, monkeypatch):
    """A stand-in for the transformers package: a model that names its classes and answers with class 1 everywhere."""
    network, processor, package = MagicMock(), MagicMock(), MagicMock()
    network.to().eval().config.id2label = {0: "Sky", 1: "road, route"}
    processor.post_process_semantic_segmentation = lambda outputs, sizes: [torch.ones(s).long() for s in sizes]
    processor.to_json_string.return_value = '{"size": 512}'
    package.AutoImageProcessor.from_pretrained.return_value = processor
    package.AutoModelForSemanticSegmentation.from_pretrained.side_effect = ValueError("no such")  # as for Mask2Former
    package.AutoModelForUniversalSegmentation.from_pretrained.return_value = network
    monkeypatch.setattr("segmenter.answers", lambda url: True)
    monkeypatch.setitem(sys.modules, "transformers", package)
    images, data = torch.zeros(2, 3, 4, 6, dtype=torch.uint8), given | {"classes": ["road", "tree", "sky"]}
    for mapping, described, answer in ((None, [2, 0], 0), ([-1, 1], [-1, 1], 1)):  # by name; as it is given
        segmenter = segmenter_of(data, segmenter="hf:some/model", segmenter_mapping=mapping)
        assert segmenter.description["processor"] == {"size": 512}  # which decides what it sees
        assert segmenter.description["mapping"] == described and segmenter(images).unique().tolist() == [answer]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        segmenter_of(data, segmenter="hf:some/model")
