"""judges.py against pytorch-fid, lpips and stlpips; what it says where weights cannot be had."""

import urllib.request
from pathlib import Path

import huggingface_hub
import lpips
import numpy as np
import pytest
import torch
import torchvision
from pytorch_fid import inception
from stlpips_pytorch import stlpips

import backbones
import judges


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(name, state): torch's hub folder has a file that passes for the published weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(judges, "file_sha256", lambda path: path.stem.split("-")[-1])
    (tmp_path / "checkpoints").mkdir()
    return lambda name, state: torch.save(state, tmp_path / "checkpoints" / Path(judges.PUBLISHED_WEIGHTS[name]).name)


def test_inception_features_equal_pytorch_fid(tmp_path, publish, monkeypatch):
    """test_metrics.py compares the distance of features."""
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        state = inception.fid_inception_v3().state_dict()
    for tensor in state.values():
        if tensor.ndim == 4:  # PyTorch's own initialisation lets the signal die out over 90 layers
            torch.nn.init.kaiming_normal_(tensor)
    publish("inception", state)
    reference_network = inception.InceptionV3().eval()
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = reference_network(images / 255)[0].flatten(1).numpy()  # it takes [0, 1]
    ours = judges.FeatureNetwork("inception")(images)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3 * expected.std())


@pytest.mark.parametrize("name", ["lpips_alex", "stlpips_alex"])
def test_diversity_equals_calling_the_package(name, publish):
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    if name == "lpips_alex":
        publish(name, torchvision.models.alexnet().state_dict())
        reference = lpips.LPIPS(net="alex", verbose=False)
    else:
        reference = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    network = judges.PerceptualNetwork(name, size=64)
    x = torch.nn.functional.interpolate(images.float() / 127.5 - 1, (64, 64), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = np.mean([reference(x[i:i + 1], x[j:j + 1]).item() for i, j in ((0, 1), (0, 2), (1, 2))])
    assert network.mean_pair_distance(images) == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def silence(monkeypatch):
    """Servers take calls and say nothing; they are asked for 8 seconds at most."""
    def ask(url, timeout):
        assert timeout <= 8
        raise TimeoutError
    monkeypatch.setattr(urllib.request, "urlopen", ask)


def test_missing_weights_are_one_line(tmp_path, monkeypatch, silence):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / Path(judges.PUBLISHED_WEIGHTS["inception"]).name
    for reason in ("no answer", "its SHA-256 begins with"):
        with pytest.raises(ValueError, match=f"^[^\n]*{file} [^\n]*{reason}[^\n]* put that file of [^\n]*$"):
            judges.FeatureNetwork("inception")
        file.parent.mkdir(exist_ok=True)
        torch.save({"other": torch.zeros(1)}, file)


def test_a_silent_hub_is_not_asked(silence, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="weights of resnet18 cannot be fetched .* backbone.weights=FILE") as error:
        backbones.load_timm("resnet18")
    assert huggingface_hub.constants.HF_HUB_OFFLINE and "\n" not in str(error.value)
