"""SDM's training step, and SDM in the scripts."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, trainer_of
from PIL import Image

import denoising
import evaluate
import sample as sample_script
import scenes
from config import DataSettings, UserError, check_settings
from labels import label_format
from sdm import SDMUNet, official_name
from systems import system_for

RUN = {**TINY, "data": {**TINY["data"], "size": [16, 16], "calibration_images": 1}, "discriminator": {}, "loss": {},
       "generator": {"name": "sdm", "base_channels": 32, "multipliers": [1, 2], "num_res_blocks": 1,
                     "attention_strides": [2], "head_channels": 32, "spade_channels": 8},
       "diffusion": {"steps": 3, "sheet_steps": 2},
       "eval": TINY["eval"] | {"num_images": 4, "features": "stlpips_alex", "metric": "fd_stlpips_alex", "features_size": 32,
                               "diversity_size": 32, "segmenter_steps": 1, "kid_subsets": 2}}


@pytest.fixture
def sdm_config(tmp_path):
    """A configuration file of an SDM that trains in seconds."""
    path = tmp_path / "sdm.yaml"
    path.write_text(yaml.safe_dump(RUN))
    return path


def latest(folder) -> dict:
    return torch.load(folder / "checkpoints/latest.pt", weights_only=True)


def test_a_resumed_run_equals_an_unbroken_one(train, sdm_config, tmp_path):
    train(sdm_config, "name=whole")
    train(sdm_config, "name=parts", "train.steps=2")
    train(sdm_config, "name=parts", resume=True)
    whole, parts = (tmp_path / "runs" / name for name in ("whole", "parts"))
    for network in ("generator", "ema"):
        states = [latest(run)[network] for run in (whole, parts)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, parts)]
    terms = [[(record["step"], record["simple"], record["vb"]) for record in log] for log in logs]
    assert terms[0] == terms[1] and [term[0] for term in terms[0]] == [1, 2, 3, 4]
    assert Image.open(whole / "samples/0000004.png").size == (8 * 17 + 1, 4 * 17 + 1)  # map, real, two samples
    assert json.loads((whole / "metrics.jsonl").read_text())["num_images"] == 4


def two_trainers(**changes) -> list[denoising.Diffusion]:
    """The same trainer twice, away from the zeros that it starts with; Adam's first moment is the gradient itself."""
    trainers = []
    for _ in range(2):
        trainers.append(trainer_of({**RUN, "train": {"batch_size": 4, "betas": [0.0, 0.99]}, **changes}, 3))
        generator = torch.Generator().manual_seed(13)
        for parameter in trainers[-1].generator.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trainers


@pytest.mark.parametrize("processes", [1, 2])
def test_shares_of_a_batch_give_the_gradient_of_the_whole(monkeypatch, processes):
    """Four images at once against two rounds, or two processes, of two."""
    whole, shared = two_trainers()
    image = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(14))
    label_map = torch.randint(0, 4, (4, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(15))
    terms = whole.step(image, label_map, 5, [0, 1, 2, 3])
    if processes == 1:
        shared.rounds = 2
        shared_terms = shared.step(image, label_map, 5, [0, 1, 2, 3])
    else:
        gradients = []  # the first process's are kept, the second's averaged with them
        monkeypatch.setattr(denoising, "all_reduce", lambda mine, average: gradients.append([g.clone() for g in mine]))
        monkeypatch.setattr(shared.optimizer, "step", lambda: None)
        first = shared.step(image[:2], label_map[:2], 5, [0, 1])
        monkeypatch.undo()
        monkeypatch.setattr(denoising, "all_reduce", lambda mine, average: torch._foreach_lerp_(mine, gradients[0], 0.5))
        second = shared.step(image[2:], label_map[2:], 5, [2, 3])
        shared_terms = {name: (first[name] + second[name]) / 2 for name in first}
    for name in ("simple", "vb"):
        torch.testing.assert_close(shared_terms[name], terms[name])
    gradients = [[trainer.optimizer.state[p]["exp_avg"] for p in trainer.generator.parameters()] for trainer in (whole, shared)]
    largest = max(gradient.abs().max().item() for gradient in gradients[0])
    for reference, other in zip(*gradients):
        torch.testing.assert_close(other, reference, rtol=1e-4, atol=1e-6 * largest)


def test_withheld_label_maps_and_time_steps_are_drawn_for_every_place():
    trainer = two_trainers(diffusion={"drop_labels": 0.2})[0]
    t, dropped, noise = trainer._draw(7, list(range(400)), (1, 1))
    assert 0.14 < dropped.float().mean() < 0.26 and t.min() < 20 and t.max() > 980 and noise.std() > 0.9
    again = trainer._draw(7, [399, 3], (1, 1))
    assert all(torch.equal(part, whole[[399, 3]]) for part, whole in zip(again, (t, dropped, noise)))
    assert not torch.equal(trainer._draw(8, [3], (1, 1))[2], noise[3:4])


def test_evaluation_draws_the_same_image_in_any_batch():
    generate = system_for(check_settings(RUN, "tiny"), 3).sampler(two_trainers()[0].generator)
    label_map = torch.randint(0, 4, (3, 16, 16), generator=torch.Generator().manual_seed(16))
    batch = generate(label_map, [5, 6, 7], 1).int()
    assert batch.shape == (3, 3, 16, 16) and (batch - generate(label_map, [5, 6, 7], 0).int()).abs().max() > 20
    assert (batch[1:2] - generate(label_map[1:2], [6], 1).int()).abs().max() <= 1


def sample_images(folder, out: str, **options):
    """sample.py on folder/labels within this process."""
    defaults = {"labels": folder / "labels", "out": folder / out, "checkpoint": None, "num": 1, "seed": 0, "grid": False,
                "resample": None, "interpolate": 0, "config": None, "noise": "image", "steps": None, "guidance": None,
                "instances": None}
    sample_script.main(argparse.Namespace(**{**defaults, **options}))
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted((folder / out).iterdir())}


def test_sample_and_evaluate_a_checkpoint(train, sdm_config, tmp_path, monkeypatch):
    train(sdm_config, "train.steps=1")
    (tmp_path / "labels").mkdir()
    for i in range(2):
        Image.fromarray(scenes.render("val", i, (16, 16))[1]).save(tmp_path / "labels" / f"map{i}.png")
    both = sample_images(tmp_path, "both", steps=5, num=2, grid=True)
    assert list(both) == ["grid.png", "map0_0.png", "map0_1.png", "map1_0.png", "map1_1.png"]
    assert not np.array_equal(both["map0_0.png"], both["map0_1.png"])
    (tmp_path / "labels/map0.png").unlink()
    assert np.array_equal(sample_images(tmp_path, "alone", steps=5)["map1.png"], both["map1_0.png"])
    assert not np.array_equal(sample_images(tmp_path, "seed", steps=5, seed=1)["map1.png"], both["map1_0.png"])
    for options, message in (({"steps": 1}, "--steps, --guidance: diffusion.steps is 1; .* 2$"), ({"guidance": -1.0}, "diffusion.guidance"),
                             ({"resample": "sky"}, "--resample: this model's generator, sdm, does not have it; it has --guidance, --steps"),
                             ({"noise": "pixel"}, "--noise: .*sdm"), ({"interpolate": 3}, "--interpolate: .*sdm"),
                             ({"instances": tmp_path}, "--instances: .*sdm")):
        with pytest.raises(UserError, match=message) as error:
            sample_images(tmp_path, "none", **options)
        assert "\n" not in str(error.value) and not (tmp_path / "none").exists()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "runs/tiny/checkpoints/latest.pt", "diffusion.steps=5"])
    evaluate.main()
    protocol = json.loads((tmp_path / "metrics.json").read_text())["protocol"]
    assert protocol["source"]["diffusion"]["steps"] == 5


def test_diffusion_options_are_refused_for_a_gan(tmp_path):
    system = system_for(check_settings(TINY, "tiny"), 3)
    for option, value in (("steps", 5), ("guidance", 2.0), ("instances", tmp_path)):
        options = argparse.Namespace(**{**sample_script.DEFAULTS, "num": 1, "seed": 0, option: value})
        with pytest.raises(UserError, match=f"--{option}: .*dp_sims, does not have it; it has --interpolate, --resample"):
            sample_script.check_options(system, options)


@pytest.mark.parametrize("name, void", [("cityscapes", "first"), ("celebamask_hq", "none")])
def test_official_checkpoint_through_sample(tmp_path, monkeypatch, name, void):
    """Weights that paint label channel 5 of the official order: labelId 5 on Cityscapes, class 5 on CelebAMask-HQ."""
    form = label_format(DataSettings(name=name))
    config = {"name": "official", "data": {"name": name, "size": [16, 16]},
              "generator": {**RUN["generator"], "void_channel": void, "instance_edges": True}}
    (tmp_path / "official.yaml").write_text(yaml.safe_dump(config))
    unet = SDMUNet(form.num_classes, **{k: v for k, v in config["generator"].items() if k != "name"})
    torch.save({official_name(key): value for key, value in unet.state_dict().items()}, tmp_path / "ema.pt")
    assert unet.label_channels == {"cityscapes": 36, "celebamask_hq": 20}[name]
    (tmp_path / "labels").mkdir()
    ids = np.zeros((16, 16), np.uint8)
    ids[:, 8:] = 5
    Image.fromarray(ids).save(tmp_path / "labels/a.png")
    seen = []
    monkeypatch.setattr(SDMUNet, "encode_labels", lambda self, *arguments, encode=SDMUNet.encode_labels, **options: (
        seen.append(self.semantics(*arguments[:2])[0]), encode(self, *arguments, **options))[1])
    options = {"checkpoint": tmp_path / "ema.pt", "config": tmp_path / "official.yaml", "steps": 3}
    sample_images(tmp_path, "out", **options)
    assert seen[0][5].equal(torch.from_numpy(ids == 5).float()) and seen[0][0].equal(torch.from_numpy(ids == 0).float())
    assert seen[0][-1].sum(0).nonzero().flatten().tolist() == [7, 8]
    (tmp_path / "instances").mkdir()
    things = np.zeros((16, 16), np.int32)
    things[:, :4] = 26001
    Image.fromarray(things.astype(np.uint16)).save(tmp_path / "instances/a.png")
    sample_images(tmp_path, "with", instances=tmp_path / "instances", **options)
    assert seen[1][-1].sum(0).nonzero().flatten().tolist() == [3, 4]
    with pytest.raises(UserError, match="ema.pt: its networks are not those of .*official.yaml.*Missing key"):
        config["generator"]["num_res_blocks"] = 2
        (tmp_path / "official.yaml").write_text(yaml.safe_dump(config))
        sample_images(tmp_path, "other", **options)


@pytest.mark.parametrize("override, message", [
    ("diffusion.steps=1", "diffusion.steps is 1; .* 2$"),
    ("diffusion.sheet_steps=1001", "diffusion.sheet_steps"),
    ("diffusion.sampler=plms", "ancestral.* or .*ddim"),
    ("diffusion.guidance=-1", "diffusion.guidance is -1"),
    ("diffusion.drop_labels=1", "diffusion.drop_labels is 1"),
    ("diffusion.drop_labels=0", "diffusion.guidance is 1.5; without dropped label maps"),
    ("diffusion.step=5", "did you mean diffusion.steps"),
    ("generator.void_channel=middle", "void_channel 'middle': choose one of"),
    ("generator.head_channels=24", "head_channels 24 does not divide"),
    ("data.size=[15,16]", "multiples of 2"),
    ("data.instances=true", "scenes has no instance maps"),
])
def test_bad_configuration_is_one_line(train, sdm_config, tmp_path, override, message):
    with pytest.raises(ValueError, match=message) as error:
        train(sdm_config, override)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_instance_maps_reach_training_sheet_and_evaluation(train, sdm_config, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="scenes has no instance maps"):
        train(sdm_config, "data.instances=true", "generator.instance_edges=true")
    for split in ("train", "val"):
        for i in range(4):
            image, label = scenes.render(split, i, (16, 16))
            for name, array in (("leftImg8bit/{}/ulm/{}_leftImg8bit", image), ("gtFine/{}/ulm/{}_gtFine_labelIds", label),
                                ("gtFine/{}/ulm/{}_gtFine_instanceIds", label.astype(np.uint16) + 26000)):
                path = tmp_path / "cityscapes" / (name.format(split, i) + ".png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    seen = []
    monkeypatch.setattr(SDMUNet, "semantics", lambda self, label_map, instances=None, *rest, plain=SDMUNet.semantics: (
        seen.append(instances), plain(self, label_map, instances, *rest))[1])
    train(sdm_config, f"data.root={tmp_path / 'cityscapes'}", "data.name=cityscapes", "data.instances=true",
          "generator.instance_edges=true", "generator.void_channel=first", "train.steps=1", "diffusion.steps=2")
    assert {len(ids) for ids in seen} == {4, 2} and min(ids.min() for ids in seen) >= 26000  # two of four show diversity
