import numpy as np
import torch
from conftest import TINY, trainer_of

from augment import recolor, shift


def draws(*rows):
    return torch.tensor([[*row, *[0.0] * (5 - len(row))] for row in rows])


def test_shift_by_numpy():
    """Up to an eighth of each side, image and label map alike, the edge repeated."""
    image, label_map = torch.randn(2, 3, 16, 24), torch.randint(0, 5, (2, 16, 24))
    given = draws((1, -1), (0, 0.5))
    for x, axes in ((image, (1, 2)), (label_map, (0, 1))):
        moved = shift(x, given).numpy()
        for row, (down, right) in enumerate(((2, -3), (0, 2))):  # 16 / 8 and 24 / 8 pixels at most
            source = [np.clip(np.arange(side) + by, 0, side - 1) for side, by in ((16, down), (24, right))]
            expected = x[row].numpy().take(source[0], axes[0]).take(source[1], axes[1])
            assert np.array_equal(moved[row], expected)


def test_recolor_by_its_formula():
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.allclose(recolor(image, draws((1, 1))), image, atol=1e-6)
    assert torch.allclose(recolor(image, draws((0, 0, 1))), image + 0.5, atol=1e-6)
    assert torch.allclose(recolor(image, draws((0, 0, 0, -1))), image.mean(1, keepdim=True).expand_as(image), atol=1e-6)
    gray = image.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(recolor(image, draws((0, 0, 0, 0, 1))), gray + 1.5 * (image - gray), atol=1e-6)
    assert torch.allclose(recolor(image, draws((0, 0, 0, 1))), 2 * image - image.mean(1, keepdim=True), atol=1e-6)


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
