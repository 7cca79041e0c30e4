import json
import subprocess
import sys

import pytest
from conftest import ROOT, error_line

from config import Settings, UserError, check_settings, load_settings


@pytest.mark.parametrize("overrides, named", [
    (["train.step=5"], ["train.step", "train.steps"]),
    (["trian.steps=5"], ["trian", "train"]),
    (["train.steps=many"], ["train.steps", "many", "integer"]),
    (["data.size=[64]"], ["data.size", "64"]),
    (["generator.name=biggan"], ["biggan", "dp_sims"]),
    (["generator.channel=3"], ["generator.channel", "generator.channels"]),
    (["backbone.conditioning=some"], ["some", "normalize"]),
    (["backbone.name=resnet5000"], ["resnet5000"]),
    (["backbone.weights=nowhere.pth"], ["nowhere.pth"]),
    (["data.size=[30, 32]"], ["data.size", "multiples of 4"]),
    (["data.name=folder"], ["data."]),
    (["init_from=nowhere.pt"], ["nowhere.pt"]),
    (["eval.metric=fdd"], ["eval.metric", "fdd"]),
    (["train.batch_size=3", "train.accumulation=2"], ["train.batch_size", "3"]),
])
def test_bad_configuration_is_one_line_before_training(train, tiny_config, tmp_path, overrides, named):
    with pytest.raises(ValueError) as error:
        train(tiny_config, *overrides)
    line = str(error.value)
    assert all(part in line for part in named) and "\n" not in line, line
    assert not (tmp_path / "runs").exists()


def test_errors_are_one_line_on_the_command_line(run, tiny_config):
    line = error_line(run("train.py", "--config", tiny_config, "train.step=5"))
    assert "train.step" in line and "train.steps" in line
    assert "nowhere.yaml" in error_line(run("train.py", "--config", "nowhere.yaml"))


@pytest.mark.parametrize("section, key, value", [
    ("train", "steps", 0), ("train", "betas", ["a", 0.9]), ("train", "betas", [0, 1]), ("train", "ema", 1.0),
    ("train", "lr_generator", -1.0), ("eval", "batch_size", 0), ("eval", "diversity_maps", 0), ("eval", "num_images", -5),
    ("data", "workers", -1), ("data", "calibration_images", 0), ("backbone", "input_scale", 0.0),
    ("backbone", "input_scale", 0.01), ("data", "load_scale", float("inf")), ("loss", "contrastive_scales", 0),
    ("loss", "diversity_margin", ["a", "b", "c"]), ("loss", "contrastive_patches", 0)])
def test_values_that_cannot_work_are_refused(section, key, value):
    with pytest.raises(UserError, match=rf"^mine.yaml: {section}\.{key} is .*; "):
        check_settings({section: {key: value}}, "mine.yaml")


def test_a_file_says_the_same_in_either_way(tmp_path):
    """Nested keys in a file, and overrides; numbers as YAML reads them, 1e-4 as text."""
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr_generator: 1e-4, betas: [0, 0.9]}\ngenerator: {channels: [8, 16]}\n")
    (tmp_path / "empty.yaml").write_text("")
    given = load_settings(tmp_path / "empty.yaml", ["train.lr_generator=1e-4", "train.betas=[0, 0.9]",
                                                    "generator.channels=[8, 16]"])
    assert given == load_settings(path) and given.train.lr_generator == 1e-4 and given.train.betas == (0.0, 0.9)
    assert given.generator.name == "dp_sims" and given.generator.arguments == {"channels": [8, 16]}
    assert check_settings(given.model_dump(mode="json"), "again") == given
    with pytest.raises(Exception, match="frozen"):
        given.train.steps = 5


def test_the_schema_is_the_settings_and_covers_every_file():
    """Each key of each recipe is in the schema that editors check it against."""
    schema = json.loads(subprocess.run([sys.executable, ROOT / "config.py"], capture_output=True, check=True).stdout)
    assert schema == json.loads((ROOT / "config.schema.json").read_text()) == json.loads(json.dumps(Settings.model_json_schema()))
    steps = schema["$defs"]["TrainSettings"]["properties"]["steps"]
    assert steps["default"] == 600 and steps["minimum"] == 1 and "steps in all" in steps["description"]
    for path in [ROOT / "config.yaml", *ROOT.glob("configs/*.yaml")]:
        if "\nrows:" not in path.read_text():
            load_settings(path)
            modeline = path.read_text().splitlines()[0]
            assert modeline.startswith("# yaml-language-server: $schema=")
            assert (path.parent / modeline.partition("=")[2]).resolve() == ROOT / "config.schema.json"


def test_an_error_of_a_library_keeps_its_traceback(run, tmp_path):
    """One line is for what a user can mend: ours, or those of our networks; never for a bug."""
    for statement, shown in (("raise UserError('a.png: mend it')", "error: a.png: mend it"),
                             ("import models; models.Generator(3, noise='x')", "error: generator.noise is 'x'"),
                             ("import numpy; numpy.zeros(3).reshape(2)", "Traceback")):
        script = f"from config import UserError, run_script\ndef main():\n    {statement}\nrun_script(main)"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(shown), done.stderr


@pytest.mark.parametrize("given, named", [({5: 1}, "5"), ({"data": {None: 1}}, "data.None")])
def test_a_key_that_is_no_text_is_unknown(given, named):
    with pytest.raises(UserError, match=f"^mine.yaml: unknown key {named}; did you mean "):
        check_settings(given, "mine.yaml")
