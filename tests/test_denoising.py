"""SDM's training step, and SDM in the scripts."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, put, trainer_of
from PIL import Image
from test_dataset import tree

import denoising
import scenes
import sdm

RUN = {**TINY, "data": {**TINY["data"], "size": [16, 16], "calibration_images": 1}, "discriminator": {}, "loss": {},
       "generator": {"name": "sdm", "base_channels": 32, "multipliers": [1, 2], "num_res_blocks": 1,
                     "attention_strides": [2], "head_channels": 32, "spade_channels": 8},
       "diffusion": {"steps": 3, "sheet_steps": 2},
       "eval": TINY["eval"] | {"features": "stlpips_alex", "metric": "fd_stlpips_alex", "features_size": 32,
                               "diversity_samples": 2, "diversity_size": 32}}
CITYSCAPES = {**RUN["generator"], "void_channel": "first", "instance_edges": True}


def trainer() -> denoising.Diffusion:
    """Away from the zeros that it starts with; Adam's first moment is the gradient itself."""
    trainer = trainer_of({**RUN, "train": {"batch_size": 4, "betas": [0.0, 0.99]}, "diffusion": {"drop_labels": 0.2}}, 3)
    for parameter in trainer.generator.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return trainer


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 256, (4, 3, 16, 16)).to(torch.uint8), torch.randint(0, 4, (4, 16, 16)).to(torch.uint8)


def test_shares_of_a_batch_give_the_gradient_of_the_whole(monkeypatch):
    """Four images at once against two rounds, or two processes, of two."""
    shared, (image, label_map), met, terms = trainer(), batch(), [], []

    def meet(gradients, average):
        """Keeps what this process brings; what comes back is zeros."""
        assert average
        met.append(torch.cat([gradient.flatten() for gradient in gradients]))
        torch._foreach_zero_(gradients)

    monkeypatch.setattr(denoising, "all_reduce", meet)
    for shared.rounds, places in ((1, [0, 1, 2, 3]), (2, [0, 1, 2, 3]), (1, [0, 1]), (1, [2, 3])):
        terms.append(torch.stack(list(shared.step(image[places], label_map[places], 5, places).values())))
    for whole, rounds, first, second in (met, terms):
        for share in (rounds, (first + second) / 2):
            torch.testing.assert_close(share, whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())
    assert not any(state["exp_avg"].any() for state in shared.optimizer.state.values())  # Adam takes what came back


def test_a_resumed_training_equals_an_unbroken_one():
    whole, parts, (image, label_map) = trainer(), trainer(), batch()
    old = next(whole.ema.parameters()).clone()
    whole.step(image, label_map, 0, [0, 1, 2, 3])
    torch.testing.assert_close(next(whole.ema.parameters()), 0.1 * old + 0.9 * next(whole.generator.parameters()))
    parts.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert whole.step(image, label_map, 1, [0, 1, 2, 3]) == parts.step(image, label_map, 1, [0, 1, 2, 3])
    for network in ("generator", "ema"):
        torch.testing.assert_close(whole.state_dict()[network], parts.state_dict()[network], rtol=0, atol=0)


def test_withheld_label_maps_and_time_steps_are_drawn_for_every_place():
    t, dropped, noise = trainer()._draw(7, list(range(400)), (1, 1))
    assert 0.14 < dropped.float().mean() < 0.26 and t.min() < 20 and t.max() > 980 and noise.std() > 0.9
    assert not torch.equal(trainer()._draw(8, [3], (1, 1))[2], noise[3:4])


def test_trains_with_instance_maps_samples_and_is_evaluated(train, call, sample, tmp_path, monkeypatch):
    image, label = scenes.render("val", 0, (16, 16))
    for path in tree(tmp_path / "data", label, "cityscapes", image, "abcd").rglob("*_labelIds.png"):
        put(path.with_name(path.name.replace("label", "instance")), label + np.uint16(26000))
    given = {**RUN["data"], "name": "cityscapes", "root": str(tmp_path / "data"), "instances": True}
    (tmp_path / "sdm.yaml").write_text(yaml.safe_dump({**RUN, "data": given, "generator": CITYSCAPES}))
    seen, plain = [], sdm.instance_edges
    monkeypatch.setattr(sdm, "instance_edges", lambda ids: seen.append(ids) or plain(ids))
    train(tmp_path / "sdm.yaml", "train.steps=1")
    assert {len(ids) for ids in seen} == {4, 2} and min(ids.min() for ids in seen) >= 26000  # two of four show diversity
    assert Image.open("runs/tiny/samples/0000001.png").size == (4 * 17 + 1, 4 * 17 + 1)  # map, real, two samples

    assert not np.array_equal(*sample(label, "--steps", 5, "--num", 2))
    call("evaluate.py", "--checkpoint", "runs/tiny/checkpoints/latest.pt", "diffusion.steps=5")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_images"] == 4 and metrics["protocol"]["source"]["diffusion"]["steps"] == 5


def test_official_cityscapes_checkpoint_through_sample(sample, tmp_path, monkeypatch):
    """The network is given labelId 5 in channel 5, and the edges of the label map or of the instance map in the last."""
    file, config = tmp_path / "official.yaml", {"data": {"name": "cityscapes", "size": [16, 16]}, "generator": {**CITYSCAPES}}
    file.write_text(yaml.safe_dump(config))
    unet = sdm.SDMUNet(34, **{key: value for key, value in CITYSCAPES.items() if key != "name"})
    torch.save({sdm.official_name(key): value for key, value in unet.state_dict().items()}, tmp_path / "ema.pt")
    label = np.repeat([[0] * 8 + [5] * 8], 16, 0).astype(np.uint8)
    put(tmp_path / "instances/painted.png", np.roll(label, 4, 1).astype(np.uint16) + 26000)
    seen, plain = [], sdm.SDMUNet.semantics
    monkeypatch.setattr(sdm.SDMUNet, "semantics", lambda *given: seen.append(plain(*given)) or seen[-1])
    given = label, "--checkpoint", tmp_path / "ema.pt", "--config", file, "--steps", 3
    sample(*given)
    sample(*given, "--instances", tmp_path / "instances")
    for semantics, edges in zip(seen, ([7, 8], [3, 4, 11, 12])):
        assert semantics.shape == (1, 36, 16, 16) and np.array_equal(semantics[0, 5], label == 5)
        assert np.array_equal(semantics[0, 0], label == 0) and semantics[0, -1, 0].nonzero().flatten().tolist() == edges
    config["generator"]["num_res_blocks"] = 2
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="ema.pt: does not fit .*official.yaml.*Missing key"):
        sample(*given)
