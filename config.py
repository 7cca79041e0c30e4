"""Configuration: every key with its type and default in one table, YAML files and key.path=value overrides checked against it.

The sections `generator` and `discriminator` take a `name` and the arguments of the class of that name.
"""

import copy
import difflib
import inspect
import math
import re
import reprlib
import types
from pathlib import Path

import yaml


class UserError(Exception):
    """An error the user can mend: one line that names the file, the value and the remedy."""


def one_line(error: UserError) -> str:
    """Its text; one raised in a loading process comes with the traceback of that process, and ends with the text."""
    return re.sub(r"^\w+\.(UserError|Unreadable|WrongLabel|UnequalSizes): ", "", str(error).strip().splitlines()[-1])


def shorten(value) -> str:
    """A value as a message shows it: a few lines of YAML can stand for gigabytes."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring = 2, 100
    return short.repr(value)


OptionalStr, OptionalInt, OptionalFloat = str | None, int | None, float | None

# section -> key -> (type, default, meaning)
SCHEMA = {
    "name": (str, "scenes", "results go to runs/NAME"),
    "seed": (int, 0, "initial weights, noise, order and augmentation follow from it"),
    "init_from": (OptionalStr, None, "checkpoint whose networks training starts from (fine-tuning)"),
    "data": {
        "name": (str, "scenes", "scenes, folder, ade20k, coco_stuff, cityscapes or celebamask_hq"),
        "root": (OptionalStr, None, "folder of the data set; scenes needs none"),
        "size": (list, [64, 64], "[height, width] of the images, in pixels"),
        "classes": (int | list | str | None, None, "folder: a count, a list of names, or a .csv like those in classes/"),
        "void": (OptionalInt, None, "folder: id of unlabelled pixels in the label files"),
        "palette": (list | None, None, "folder: one [r, g, b] a class, for label files in colours"),
        "load_scale": (float, 1.0, "training images are resized to load_scale x size before the random crop"),
        "flip": (bool, True, "random horizontal flips in training"),
        "calibration_images": (int, 256, "training pairs that statistics are measured on: the backbone's, batch norm's"),
        "workers": (int, 1, "loading processes of each training process"),
        "skip_broken": (bool, False, "go on without files that cannot be read"),
        "instances": (bool, False, "cityscapes: read instance maps too, for a generator with instance_edges"),
    },
    "generator": {"name": (str, "dp_sims", "dp_sims or oasis, trained against the discriminator, or sdm, trained by diffusion; "
                                 "further keys are the arguments of its class")},
    "discriminator": {"name": (str, "backbone", "backbone or oasis; further keys are the arguments of its class")},
    "backbone": {
        "name": (str, "tf_efficientnet_lite0", "any timm network with intermediate features"),
        "pretrained": (bool, True, "false: the same architecture with random weights"),
        "weights": (OptionalStr, None, "local weight file; none: from its package or timm's hub"),
        "conditioning": (str, "both", "both, normalize, sigmoid or none"),
        "input_scale": (float, 1.0, "images are resized by this factor before the backbone"),
    },
    "loss": {
        "focal_gamma": (float, 2.0, "focusing of the pixel loss; 0 is plain cross-entropy"),
        "class_balancing": (float, 0.75, "weigh classes by their pixel frequency in the batch to the power of -this; 0 = alike"),
        "contrastive": (float, 0.3, "weight of the patch contrastive loss"),
        "contrastive_scales": (int, 2, "how many of the backbone's coarsest usable scales it sees"),
        "contrastive_patches": (int, 64, "patches an image and scale"),
        "contrastive_temperature": (float, 0.3, "temperature of its softmax"),
        "perceptual": (float, 0.0, "weight of an L1 distance between backbone features, an alternative to the former"),
        "diversity": (float, 2.0, "weight of the diversity hinge"),
        "diversity_margin": (list, [0.05, 0.25, 0.85], "required mean distance in coarse brightness, coarse "
                             "color and detail, as shares of that between different real images"),
        "diversity_every": (int, 1, "every so many steps the fake batch is two samples of every other label map"),
        "diversity_regional": (float, 0.5, "share of the pairs whose noises differ in random classes alone"),
        "labelmix": (float, 0.0, "weight of OASIS's LabelMix consistency of the discriminator"),
        "locality": (float, 0.5, "weight of the change outside the region whose noise was redrawn, as a share of that inside"),
    },
    "diffusion": {  # with generator.name sdm, in place of discriminator, backbone and loss
        "steps": (int, 1000, "steps of an image in evaluation and sample.py, 2 to 1000; published: 1000"),
        "sheet_steps": (int, 50, "steps of an image in samples/STEP.png"),
        "sampler": (str, "ancestral", "ancestral or ddim"),
        "guidance": (float, 1.5, "1: the network with the label map; above, away from what it does without"),
        "drop_labels": (float, 0.2, "share of the label maps withheld in training, which guidance rests on"),
    },
    "train": {
        "steps": (int, 600, "steps in all; each updates every network once"),
        "batch_size": (int, 8, "images a step over all processes and accumulation rounds"),
        "accumulation": (int, 1, "rounds of forward and backward a step"),
        "compile": (bool, False, "torch.compile for generator and discriminator; meant for GPUs"),
        "lr_generator": (float, 4e-4, "Adam"),
        "lr_discriminator": (float, 4e-4, "Adam"),
        "betas": (list, [0.0, 0.99], "Adam's"),
        "fresh_fakes": (bool, False, "the discriminator's fakes come from the updated generator, at the cost of a forward pass"),
        "ema": (float, 0.999, "decay of the generator's moving average, the model that is sampled and evaluated"),
        "log_every": (int, 10, "steps"),
        "sample_every": (int, 200, "steps; 0 = only at the end"),
        "eval_every": (int, 0, "steps; 0 = only at the end"),
        "save_every": (int, 200, "steps; 0 = only at the end"),
        "keep": (int, 3, "how many checkpoints/STEP.pt stay"),
    },
    "eval": {
        "metric": (str, "fd_tf_efficientnet_lite2", "the metric that picks best.pt"),
        "num_images": (int, 0, "held-out images; 0 = all of the split"),
        "batch_size": (int, 8, "images at once, in each process"),
        "features": (str, "tf_efficientnet_lite2", "network of Frechet distance and KID: inception, stlpips_vgg or any timm name"),
        "features_weights": (OptionalStr, None, "its local weight file"),
        "features_size": (OptionalInt, None, "side in pixels that it sees; none: what it was trained at"),
        "kid_subsets": (int, 100, "subsets that KID is averaged over"),
        "kid_subset_size": (int, 1000, "images a subset, at most those there are"),
        "segmenter": (OptionalStr, None, "file or hf:NAME; none: one is trained on the real training split"),
        "segmenter_mapping": (list | None, None, "class for each id of that segmenter, -1 for none; none: by name or the same"),
        "segmenter_steps": (int, 400, "training steps of that one"),
        "diversity_network": (str, "stlpips_vgg", "lpips_alex, lpips_vgg, stlpips_alex or stlpips_vgg"),
        "diversity_weights": (OptionalStr, None, "local weight file of the backbone of lpips_*"),
        "diversity_size": (OptionalInt, 128, "height that samples are resized to for it; none: as they are"),
        "diversity_maps": (int, 32, "label maps whose samples are compared"),
        "diversity_samples": (int, 4, "samples a map; all pairs are compared; 0 = no diversity"),
    },
}


def network_classes(kind: str) -> dict[str, type]:
    """Name -> class, for `kind` "generator" or "discriminator". A new network is listed here."""
    import models  # here, since the networks' files import this one
    import oasis
    import sdm
    return {"generator": {"dp_sims": models.Generator, "oasis": oasis.OASISGenerator, "sdm": sdm.SDMUNet},
            "discriminator": {"backbone": models.Discriminator, "oasis": oasis.OASISDiscriminator}}[kind]


def network_arguments(cls: type) -> dict:
    """The configurable arguments of a network class: those that have a default, as name -> (type, default, meaning)."""
    parameters = inspect.signature(cls).parameters.values()
    plain = lambda value: list(value) if isinstance(value, tuple) else value
    return {p.name: (type(plain(p.default)), plain(p.default), "") for p in parameters if p.default is not p.empty}


def load_config(path: str | Path, overrides: list[str] = ()) -> dict:
    """Read a YAML file, apply `key.path=value` overrides, check everything and fill in the defaults.

    Raises:
        UserError: unreadable file, unknown key (the nearest right one is named) or wrong type.
    """
    try:
        given = yaml.safe_load(Path(path).read_text()) or {}
    except Exception as error:  # PyYAML raises many kinds of errors on odd values
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:300] or type(error).__name__})") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: holds {type(given).__name__}, not keys and values")
    return check_config(apply_overrides(given, overrides), str(path))


def apply_overrides(given: dict, overrides: list[str]) -> dict:
    """Set each `key.path=value` in a nested dict, in place; the values are YAML. Raises UserError."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: overrides are written key.path=value")
        section = given
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f"{override!r}: {parent} is a value, not a section")
        try:
            section[last] = yaml.safe_load(value)
        except Exception as error:  # as in load_config
            raise UserError(f"{override!r}: the value is not YAML") from error
    return given


def check_config(given: dict, source: str) -> dict:
    """Check a nested dict against the schema and fill in the defaults; `source` is named in errors."""
    schema = copy.deepcopy(SCHEMA)
    for kind in ("generator", "discriminator"):
        section = given.get(kind)
        name = section.get("name", SCHEMA[kind]["name"][1]) if isinstance(section, dict) else SCHEMA[kind]["name"][1]
        classes = network_classes(kind)
        if not isinstance(name, str) or name not in classes:
            raise UserError(f"{source}: {kind}.name is {shorten(name)}; there are {', '.join(classes)}")
        schema[kind].update(network_arguments(classes[name]))
    config = _fill(given, schema, source, "")
    _check_values(config, source)
    return config


def _fill(given: dict, schema: dict, source: str, prefix: str) -> dict:
    for key in given:
        if key not in schema:
            every = [f"{prefix}{k}" for k in schema]
            near = difflib.get_close_matches(f"{prefix}{key}", every, n=1, cutoff=0)
            raise UserError(f"{source}: unknown key {prefix}{key}; did you mean {near[0] if near else every[0]}?")
    result = {}
    for key, entry in schema.items():
        if isinstance(entry, dict):
            section = given.get(key, {})
            if not isinstance(section, dict):
                raise UserError(f"{source}: {prefix}{key} is {shorten(section)}; it is a section of keys")
            result[key] = _fill(section, entry, source, f"{prefix}{key}.")
        else:
            result[key] = _convert(given[key], entry[0], source, prefix + key) if key in given else entry[1]
    return result


def _convert(value, kind, source: str, key: str):
    kinds = kind.__args__ if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as text
            if math.isfinite(float(value)):
                return float(value)
            raise UserError(f"{source}: {key} is {shorten(value)}; it takes a finite number")
        except (ValueError, OverflowError):
            pass
    if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
        return value
    names = " or ".join("null" if k is types.NoneType else k.__name__ for k in kinds)
    raise UserError(f"{source}: {key} is {shorten(value)}; it takes {names}")


def _check_values(config: dict, source: str) -> None:
    def need(condition: bool, key: str, remedy: str) -> None:
        if not condition:
            value = config
            for part in key.split("."):
                value = value[part]
            raise UserError(f"{source}: {key} is {shorten(value)}; {remedy}")

    size, train = config["data"]["size"], config["train"]
    need(len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size), "data.size", "write [height, width]")
    need(config["data"]["load_scale"] >= 1, "data.load_scale", "it is at least 1")
    need(config["backbone"]["conditioning"] in ("both", "normalize", "sigmoid", "none"), "backbone.conditioning",
         "it is both, normalize, sigmoid or none")
    for section, least, keys in (
            ("train", 1, ("steps", "batch_size", "accumulation", "log_every", "keep")),
            ("train", 0, ("sample_every", "eval_every", "save_every", "lr_generator", "lr_discriminator", "ema")),
            ("data", 1, ("calibration_images",)), ("data", 0, ("workers",)),
            ("loss", 1, ("diversity_every", "contrastive_patches", "contrastive_scales")),
            ("eval", 1, ("batch_size", "segmenter_steps", "diversity_maps", "kid_subsets")), ("eval", 0, ("num_images",))):
        for key in keys:
            need(config[section][key] >= least, f"{section}.{key}", f"it is at least {least}")
    for kind in ("generator", "discriminator"):
        for key, value in config[kind].items():
            need(type(value) is not int or value >= (key != "attention_scales"), f"{kind}.{key}", "it is at least 1")
    need(0 <= config["seed"] < 2 ** 63, "seed", "it is 0 to 2 ** 63 - 1")
    need(config["backbone"]["input_scale"] > 0 and min(size) * config["backbone"]["input_scale"] >= 1, "backbone.input_scale",
         f"it is above 0 and leaves something of {size}")
    need(train["ema"] < 1, "train.ema", "it is a share from 0 to below 1")
    need(numbers(config["loss"]["diversity_margin"], 3), "loss.diversity_margin", "give three shares")
    need(numbers(train["betas"], 2) and max(map(float, train["betas"])) < 1, "train.betas", "Adam has two, from 0 to below 1")
    diffusion = config["diffusion"]
    for key in ("steps", "sheet_steps"):
        need(2 <= diffusion[key] <= 1000, f"diffusion.{key}", "it is 2 to 1000")
    need(diffusion["sampler"] in ("ancestral", "ddim"), "diffusion.sampler", "it is ancestral or ddim")
    need(0 <= diffusion["guidance"] < float("inf"), "diffusion.guidance", "it is a number from 0")
    need(0 <= diffusion["drop_labels"] < 1, "diffusion.drop_labels", "it is a share from 0 to below 1")
    need(diffusion["drop_labels"] > 0 or diffusion["guidance"] == 1, "diffusion.guidance",
         "without dropped label maps (diffusion.drop_labels) nothing is learned that it could use: set 1")
    need(not config["data"]["instances"] or config["generator"].get("instance_edges", False), "data.instances",
         "only generator.name=sdm with generator.instance_edges=true uses instance maps")
    need(config["name"] not in ("", ".", "..", "cache") and not set(config["name"]) & set('/\\'), "name",
         "it is the name of one folder, and runs/cache is taken")


def numbers(values: list, count: int) -> bool:
    """Whether a list has `count` numbers that are finite and not negative; YAML reads 1e-4 as text."""
    try:
        return len(values) == count and all(0 <= float(value) < float("inf") for value in values)
    except (TypeError, ValueError):
        return False
