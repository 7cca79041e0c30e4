import numpy as np
import torch
import torch.nn.functional as F
from conftest import TINY, trainer_of
from PIL import Image
from scipy import ndimage

from augment import fill_void, recolor, roughen, shift


def draws(*rows):
    return torch.tensor([[*row, *[0.0] * (5 - len(row))] for row in rows])


def test_shift_by_padding():
    """Up to an eighth of each side, image and label map alike, the edge repeated."""
    image, given = torch.randn(2, 3, 16, 24), draws((1, -1), (0, 0.5))
    moved = shift(image, given)
    assert torch.equal(moved[0], F.pad(image[0], (3, 0, 0, 2), "replicate")[:, 2:, :24])  # 16 / 8 and 24 / 8 pixels at most
    assert torch.equal(moved[1], F.pad(image[1], (0, 2), "replicate")[..., 2:])
    assert torch.equal(shift(image[:, 0], given), moved[:, 0])


def test_recolor_by_its_formula():
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    gray, mean = image.mean(1, keepdim=True), image.mean((1, 2, 3), keepdim=True)
    for row, expected in [((1, 1), image), ((0, 0, 1), image + 0.5), ((0, 0, 0, -1), gray.expand_as(image)),
                          ((0, 0, 0, 1), 2 * image - gray), ((0, 0, 0, 0, 1), mean + 1.5 * (image - mean))]:
        assert torch.allclose(recolor(image, draws(row)), expected, atol=1e-6)


def test_the_discriminator_sees_what_belongs_together_moved_alike(monkeypatch):
    """Fakes are label maps painted gray, so that where a fake was moved, its target must have moved too."""
    trainer = trainer_of({**TINY, "loss": {"augment": 1.0, "diversity": 0, "contrastive": 0}})
    label_map = torch.randint(0, 12, (4, 32, 32), dtype=torch.uint8)
    paint = lambda maps, z: (maps[:, None].float() / 6 - 1).expand(-1, 3, -1, -1) * trainer.generator.to_rgb[0].bias[0].exp()
    monkeypatch.setattr(trainer.generator, "forward", paint)
    seen, targets = [], []
    monkeypatch.setattr(trainer, "_features", lambda image: seen.append(image) or trainer.backbone(image))
    monkeypatch.setattr("losses.focal_loss", lambda logits, target, *_: targets.append(target) or logits.mean())
    monkeypatch.setattr(trainer, "_update", lambda *_: None)  # the paint has a gradient for one parameter alone
    trainer.step(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), label_map, 0, [0, 1, 2, 3])
    assert not torch.equal(targets[0], label_map.long())
    for image, target in zip(seen[0], targets[0]):
        assert abs(np.corrcoef(image[0].detach().flatten(), target.flatten())[0, 1]) > 0.999


def test_rough_label_maps_by_pillow_and_numpy():
    """As in the published scripts: a quarter by nearest pixels; edges grown by 2 pixels at a height of 256; a tenth."""
    coarse = torch.randint(0, 5, (16, 12))
    label_map = coarse.repeat_interleave(16, 0).repeat_interleave(16, 1)
    label_map[::7, ::5] = 1
    picture = Image.fromarray(label_map.numpy().astype(np.uint8))
    small = picture.resize((48, 64), Image.Resampling.NEAREST).resize((192, 256), Image.Resampling.NEAREST)
    assert np.array_equal(roughen(label_map, "downsample", 5, 0), small)

    cross = ndimage.generate_binary_structure(2, 1)
    lowest, highest = (f(label_map.numpy(), footprint=cross) for f in (ndimage.minimum_filter, ndimage.maximum_filter))
    away = ndimage.distance_transform_cdt(lowest == highest, metric="taxicab")
    assert np.array_equal(roughen(label_map, "edges", 5, 0), np.where(away <= 2, 5, label_map))

    rough = roughen(label_map, "random", 5, 0)
    changed = (rough != label_map).numpy()
    assert abs(changed.mean() - 0.1) < 5 * (0.1 * 0.9 / changed.size) ** 0.5 and (rough[changed] == 5).all()
    assert not torch.equal(rough, roughen(label_map, "random", 5, 1))


def test_void_takes_the_nearest_label():
    """By hand. A map of void alone stays."""
    label_map = torch.tensor([[5, 5, 5, 0], [5, 5, 5, 5], [5, 5, 1, 5]])  # the first pixel is 3 and 8 ** 0.5 from the two
    assert fill_void(label_map, 5).tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert (fill_void(torch.full((4, 4), 5), 5) == 5).all()
