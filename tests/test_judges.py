"""judges.py against pytorch-fid, lpips and stlpips; what it says where weights cannot be had."""

import socket
import urllib.request
import warnings

import huggingface_hub
import lpips
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_fid import fid_score, inception

import backbones
import judges
from metrics import frechet_distance, mean_and_covariance


@pytest.fixture
def random_weights(tmp_path, monkeypatch):
    """random_weights(name, state) -> a file that passes for the published weights."""
    def write(name, state):
        torch.save(state, tmp_path / "weights.pth")
        url = f"https://nowhere/weights-{judges.file_sha256(tmp_path / 'weights.pth')[:8]}.pth"
        monkeypatch.setitem(judges.PUBLISHED_WEIGHTS, name, (url, "eval.weights"))
        return str(tmp_path / "weights.pth")

    return write


def test_fid_equals_pytorch_fid(tmp_path, random_weights, monkeypatch):
    rng = np.random.default_rng(0)
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        state = inception.fid_inception_v3().state_dict()
    for tensor in state.values():
        if tensor.ndim == 4:  # PyTorch's own initialisation lets the signal die out over 90 layers
            torch.nn.init.kaiming_normal_(tensor)
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
        reference_network = inception.InceptionV3()
    ours = judges.FeatureNetwork("inception", random_weights("inception", state))
    references, statistics = [], []
    for high in (256, 160):
        images = rng.integers(0, high, (5, 48, 64, 3), dtype=np.uint8)
        files = [tmp_path / f"{high}_{i}.png" for i in range(len(images))]
        for file, image in zip(files, images):
            Image.fromarray(image).save(file)
        references.append(fid_score.get_activations(files, reference_network, 5, 2048, "cpu", num_workers=0))
        mine = ours(torch.from_numpy(images).permute(0, 3, 1, 2))
        statistics += mean_and_covariance([mine])
        np.testing.assert_allclose(mine, references[-1], rtol=1e-3, atol=1e-3 * references[-1].std())
    # scipy's root of a 2048 x 2048 matrix takes pytorch-fid half a minute; the root in a basis of all the features
    # (both sets and their means) is the same number
    basis, _ = np.linalg.qr(np.concatenate(references).T)
    small = [activations @ basis for activations in references]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = fid_score.calculate_frechet_distance(small[0].mean(0), np.cov(small[0], rowvar=False),
                                                        small[1].mean(0), np.cov(small[1], rowvar=False))
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["lpips_alex", "stlpips_vgg"])
def test_diversity_equals_calling_the_package(name, random_weights):
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weights = None
    if name == "lpips_alex":
        trunk = torchvision.models.alexnet(weights=None).state_dict()
        weights = random_weights(name, trunk)
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        slices = [getattr(reference.net, f"slice{i}") for i in range(1, 6)]
        convolutions = [m for s in slices for m in s if isinstance(m, torch.nn.Conv2d)]
        for convolution, place in zip(convolutions, (0, 3, 6, 8, 10)):
            convolution.load_state_dict({k: trunk[f"features.{place}.{k}"] for k in ("weight", "bias")})
    else:
        from stlpips_pytorch import stlpips
        reference = stlpips.LPIPS(net="vgg", variant="shift_tolerant", verbose=False)
    network = judges.PerceptualNetwork(name, weights, size=64)
    x = torch.nn.functional.interpolate(images.float() / 127.5 - 1, (64, 64), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = np.mean([reference(x[i:i + 1], x[j:j + 1]).item() for i, j in ((0, 1), (0, 2), (1, 2))])
    assert network.mean_pair_distance(images) == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def silent_url(monkeypatch):
    """Of a server that takes calls and says nothing; it is asked for 8 seconds at most, here for half a one."""
    def ask(url, timeout, original=urllib.request.urlopen):
        assert timeout <= 8
        return original(url, timeout=0.5)

    monkeypatch.setattr(urllib.request, "urlopen", ask)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


@pytest.mark.parametrize("name, build", [("inception", judges.FeatureNetwork),
                                         ("lpips_vgg", judges.PerceptualNetwork)])
def test_missing_weights_are_one_line(name, build, tmp_path, monkeypatch, silent_url):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = judges.PUBLISHED_WEIGHTS[name][0].rsplit("/", 1)[1]
    monkeypatch.setitem(judges.PUBLISHED_WEIGHTS, name, (silent_url + file, "eval.weights"))
    (tmp_path / "broken.pth").write_text("no weights")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    for weights in (None, "absent.pth", "broken.pth", "other.pth"):
        path = tmp_path / (weights or f"checkpoints/{file}")
        with pytest.raises(ValueError, match=f"{path} .* put {file} .*name the file in eval.weights") as error:
            build(name, weights and str(path))
        assert "\n" not in str(error.value)


def test_a_silent_hub_is_not_asked(silent_url, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", silent_url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="weights of resnet18 cannot be fetched .* backbone.weights=FILE") as error:
        backbones.load_timm("resnet18")
    assert huggingface_hub.constants.HF_HUB_OFFLINE and "\n" not in str(error.value)
