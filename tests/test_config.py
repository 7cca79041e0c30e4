import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import compare
import models
from config import Settings, check_settings, load_settings, run_script


@pytest.mark.parametrize("overrides, named", [
    (["train.lr=5"], ["did you mean train.lr_generator?"]),
    (["batch_size=4"], ["did you mean train.batch_size or eval.batch_size?"]),
    (["train.steps=" + "many" * 1000], ["train.steps", "many", "integer"]),
    (["train.betas=[a, 0.9]"], ["train.betas is ['a', 0.9]; "]),
    (["loss.focal_gamma=0.5"], ["loss.focal_gamma is 0.5; "]),
    (["data.size=[30, 32]"], ["data.size", "multiples of 4"]),
    (["generator.channel=3"], ["generator.channel", "generator.channels"]),
    (["discriminator={name: oasis, channels: 2}"], ["both must be multiples of 64 for this discriminator"]),
    (["backbone.weights=nowhere.pth"], ["nowhere.pth"]),
    (["eval.features=resnet5000", "eval.metric=miou"], ["eval.features is 'resnet5000'"]),
    (["backbone.name=levit_128s", "backbone.pretrained=false"], ["'levit_128s': it takes no images of 32 x 32"]),
    (["eval.metric=fdd"], ["eval.metric", "fdd"]),
    (["train.batch_size=3", "train.accumulation=2"], ["train.batch_size", "3"]),
    (["data.root=x"], ["data.root is 'x', and data.name scenes, which has its own; for data of yours set data.name=folder"]),
    (["data.name=ade20k", "data.classes=3"], ["data.classes is 3, and data.name ade20k, which has its own"]),
    (["data.instances=true"], ["data.instances: scenes has no instance maps"]),
    (["data.calibration_images=1"], ["there is one image; add training pairs"]),
    (["eval.num_images=1"], ["eval.num_images is 1, val has 500: distances need at least 2"]),
    (["generator.noise=crossattention"], ["generator.noise is 'crossattention'"]),
    (["generator.channels=[200, 200]"], ["generator.channels: 200", "multiple of 64"]),
    (["generator.name=toys"], ["generator.name is 'toys'; there are dp_sims, oasis, sdm"]),
    (["diffusion.drop_labels=0"], ["diffusion.guidance is 1.5; without dropped label maps"]),
    (["generator={name: sdm}", "eval.truncation=2"], ["eval.truncation is 2.0; sdm has no noise to multiply"]),
    (["generator={name: sdm, base_channels: 48}"], ["base_channels 48 times multiplier 1 is 48: make it a multiple of 32"])])
def test_bad_configuration_is_one_line_before_training(train, tiny_config, tmp_path, overrides, named):
    with pytest.raises(ValueError) as error:
        train(tiny_config, *overrides)
    line = str(error.value)
    assert all(part in line for part in named) and "\n" not in line and len(line) < 1000, line
    assert not (tmp_path / "runs").exists()


def test_a_file_says_the_same_in_either_way(tmp_path):
    """Nested keys in a file, and overrides; numbers as YAML reads them, 1e-4 as text."""
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr_generator: 1e-4, betas: [0, 0.9]}\ngenerator: {channels: [8, 16]}\n")
    (tmp_path / "empty.yaml").write_text("train:\n")
    given = load_settings(tmp_path / "empty.yaml", ["train.lr_generator=1e-4", "train.betas=[0, 0.9]",
                                                    "generator.channels=[8, 16]"])
    assert given == load_settings(path) and given.train.lr_generator == 1e-4 and given.train.betas == (0.0, 0.9)
    assert given.generator.name == "dp_sims" and given.generator.arguments == {"channels": [8, 16]}
    assert check_settings(given.model_dump(mode="json"), "again") == given


def test_the_schema_is_of_these_settings_and_every_file_keeps_to_them(call, capsys, tmp_path):
    call("config.py")
    assert json.loads(capsys.readouterr().out) == json.loads((ROOT / "config.schema.json").read_text())
    for name in ("config.yaml", "configs"):  # which the rows of ablations name; there are no runs here
        (tmp_path / name).symlink_to(ROOT / name)
    for path in [ROOT / "config.yaml", *ROOT.glob("configs/*.yaml")]:
        if "\nrows:" in path.read_text():
            assert compare.plan_ablation(path)[1]
        else:
            load_settings(path)
            modeline = path.read_text().splitlines()[0].partition("# yaml-language-server: $schema=")
            assert (path.parent / modeline[2]).resolve() == ROOT / "config.schema.json"


def test_errors_are_one_line_but_a_bug_keeps_its_traceback(call, tmp_path):
    (tmp_path / "twice.yaml").write_text("train: {steps: 5}\n\ntrain: {batch_size: 4}\n")
    for file, message in ("nowhere.yaml", "cannot be read"), ("twice.yaml", ".*the key train stands twice, again in line 3"):
        with pytest.raises(SystemExit, match=f"^error: {file}: {message}"):
            call("train.py", "--config", file)
    with pytest.raises(SystemExit, match="^error: generator.noise is 'x'"):
        run_script(lambda: models.Generator(3, noise="x"))  # a ValueError of a file of ours
    with pytest.raises(ValueError):
        run_script(lambda: np.zeros(3).reshape(2))
    with pytest.raises(SystemExit, match="^error: .*No space left on device; free space, .* goes on with --resume"):
        run_script(lambda: Path("/dev/full").write_text("a"))


def test_keys_of_earlier_versions_that_changed_nothing_are_passed_by():
    assert check_settings({"data": {"skip_broken": False}, "generator": {"waves": 0}}, "mine.yaml") == Settings()
    assert check_settings({"generator": {"waves": 64}}, "mine.yaml").generator.arguments == {"waves": 64}  # refused later
