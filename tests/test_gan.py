import copy

import pytest
import torch
from conftest import TINY, trainer_of

import losses
from backbones import Backbone
from config import DataSettings
from dataset import build_dataset

BFLOAT16 = torch.autocast
SMALL = {"name": "test_efficientnet", "pretrained": False}


def batch(count: int, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and label maps of the first rendered scenes, uint8."""
    dataset = build_dataset(DataSettings(size=(side, side)), "train")
    return tuple(torch.stack(column) for column in zip(*(dataset[i] for i in range(count))))


def test_one_step(monkeypatch):
    """Generator and discriminator learn and the backbone does not; the generator alone gets rough label maps."""
    gan, (image, label_map) = trainer_of({**TINY, "loss": {**TINY["loss"], "rough": 1.0}}), batch(4)
    gan.calibrate([image.float() / 127.5 - 1])
    inputs, targets, contrasted = {"generator": [], "backbone": [], "discriminator": []}, [], []
    for name, calls in inputs.items():
        getattr(gan, name).register_forward_hook(lambda _, given, __, calls=calls: calls.append(given[0]))
    focal_loss = losses.focal_loss
    monkeypatch.setattr(losses, "focal_loss", lambda *given: targets.append(given[1]) or focal_loss(*given))
    gan.contrast.register_forward_hook(lambda _, given, __: contrasted.extend(given))
    frozen = copy.deepcopy(gan.backbone.state_dict())
    before = [p.clone() for p in gan.generator.parameters()]
    gan.step(image, label_map, 0, [0, 1, 2, 3])
    assert [len(calls) for calls in inputs.values()] == [1, 2, 2]  # nothing is computed twice
    for (name, new), old, average in zip(gan.generator.named_parameters(), before, gan.ema.parameters()):
        assert not torch.equal(new, old), name
        torch.testing.assert_close(average, 0.1 * old + 0.9 * new)  # at the start an average of few steps
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gan.d_parameters)
    torch.testing.assert_close(gan.backbone.state_dict(), frozen, rtol=0, atol=0)
    maps = label_map.long()
    assert torch.equal(targets[0], maps[[0, 2, 0, 2]]) and torch.equal(targets[1], maps)  # two samples of every other map
    assert all(not torch.equal(*pair) for pair in zip(inputs["generator"][0], maps[::2]))
    real = gan.backbone(image.float() / 127.5 - 1)[gan.contrast_scales[0]]
    assert torch.equal(contrasted[1][0], real[[0, 2, 0, 2]])


@pytest.mark.parametrize("name", ["contrastive", "diversity", "locality", "perceptual"])
def test_each_loss_falls_along_its_gradient(name):
    """With a weight beside which the other losses count little, and rates of 0."""
    weights = {"perceptual": 0.1, "diversity": 0.1, "diversity_margin": [9, 9, 9], "diversity_regional": 1.0, name: 1e4}
    gan = trainer_of({**TINY, "backbone": SMALL, "train": {"batch_size": 4, "lr_generator": 0, "lr_discriminator": 0},
                      "loss": {**TINY["loss"], **weights}})
    image, label_map = batch(4)
    gan.calibrate([image.float() / 127.5 - 1])
    value = lambda: gan.step(image, label_map, 0, [0, 1, 2, 3])[f"g_{name}"].item()
    before, size = value(), torch.nn.utils.get_total_norm(p.grad for p in gan.generator.parameters())
    for parameter in gan.generator.parameters():
        parameter.data -= 0.01 / size * parameter.grad
    assert value() < before


@pytest.mark.parametrize("changed", [
    {}, {"loss": {"diversity": 0, "perceptual": 1.0, "labelmix": 1.0}, "generator": {**TINY["generator"], "noise": "concat"}},
    {"generator": {"name": "oasis", "channels": 2}, "discriminator": {"name": "oasis", "channels": 2},
     "data": {**TINY["data"], "size": [64, 64]}}])
def test_a_step_under_autocast_is_close_to_float32(monkeypatch, changed):
    """The types that meet on a GPU, on a CPU."""
    given = {**TINY, "backbone": SMALL, **changed}
    height, width = given["data"]["size"]
    image = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    label_map = torch.randint(0, 13, (2, height, width), dtype=torch.uint8)
    values = []
    for half in (False, True):
        trainer = trainer_of(given)
        if half:
            trainer.backbone = Backbone(**SMALL, bf16=True)
            monkeypatch.setattr(torch, "autocast", lambda kind, dtype=None, enabled=True: BFLOAT16(
                kind, torch.bfloat16, enabled=dtype is not None or enabled))
        trainer.calibrate([image.float() / 127.5 - 1])
        values.append({name: value.item() for name, value in trainer.step(image, label_map, 0, [0, 1]).items()})
    exact, rounded = values
    assert len(exact) >= 3 and rounded != exact
    assert rounded == pytest.approx(exact, rel=0.1, abs=0.02)


@pytest.mark.slow
def test_compiled_networks_train_like_the_others():
    """One step: the losses of both networks go back through one compiled graph. Wants a C++ compiler."""
    image, label_map = batch(4)
    values, gradients = [], []
    for compiled in (False, True):
        trainer = trainer_of({**TINY, "train": {"compile": compiled}})
        trainer.calibrate([image.float() / 127.5 - 1])
        values.append(trainer.step(image, label_map, 0, [0, 1, 2, 3]))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.g_parameters + trainer.d_parameters]))
    for name, value in values[0].items():
        assert values[1][name].item() == pytest.approx(value.item(), rel=1e-3), name
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_margins_compare_different_images_alone():
    """A last batch of one image has nothing to be compared with."""
    gan, images = trainer_of(TINY), torch.rand(5, 3, 32, 32) * 2 - 1
    gan.calibrate([images[:4], images[4:]])
    between = losses.diversity_distances(images[:4], images[[3, 0, 1, 2]], torch.ones(4, 1, 32, 32)).mean(0)
    torch.testing.assert_close(gan.margins, torch.tensor(gan.loss.diversity_margin) * between)


def test_a_run_goes_on_with_the_margins_rates_and_betas_that_are_configured():
    """Checkpoints of earlier versions hold the margins themselves."""
    before = trainer_of(TINY)
    before.calibrate([torch.rand(4, 3, 32, 32) * 2 - 1])
    before.step(*batch(4), 0, [0, 1, 2, 3])
    train, whole = {"lr_generator": 1e-3, "betas": [0.5, 0.9]}, before.state_dict()
    config = {"loss": {"diversity_margin": before.loss.diversity_margin}}
    older = {k: v for k, v in whole.items() if k != "real_distances"} | {"margins": before.margins, "config": config}
    for state in (whole, older):
        after = trainer_of(TINY | {"train": train, "loss": {"diversity_margin": [0.1, 0.5, 0.85]}})
        after.load_state_dict(copy.deepcopy(state))
        torch.testing.assert_close(after.margins, before.margins * torch.tensor([2.0, 2.0, 1.0]))
        torch.testing.assert_close(after.state_dict()["real_distances"], before.real_distances)
        [group] = after.g_optimizer.param_groups
        assert group["lr"] == 1e-3 and group["betas"] == (0.5, 0.9) and after.g_optimizer.state
