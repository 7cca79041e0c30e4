"""Settings: every key with its type, default and meaning, one class a section; YAML files and key.path=value overrides.

    python config.py > config.schema.json

writes the JSON schema by which editors complete and check the YAML files. The sections `generator` and `discriminator`
take a `name` and the arguments of the network of that name, which are checked where it is built (systems.py).
"""

import difflib
import errno
import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, field_validator, model_validator

LOCAL = ("data.root", "data.workers", "backbone.weights")  # may be others where a run goes on or is repeated


class UserError(ValueError):
    """An error the user can mend: one line that names the file, the value and the remedy."""


def run_script(main: Callable[[], None]) -> None:
    """Call a script's `main` and turn an error of the user into one line, `error: ...`, and exit status 1.

    That is a UserError, or a ValueError raised in one of these files. A ValueError of a library is a bug and keeps its
    traceback. An error of a loading process comes with that process's traceback and ends with its own text.
    """
    try:
        main()
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not isinstance(error, UserError) and raised_in.parent != Path(__file__).parent:
            raise
        sys.exit("error: " + re.sub(r"^\w+\.UserError: ", "", str(error).strip().splitlines()[-1]))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: {error.filename or Path.cwd()}: {error.strerror}; free space, choose another folder, or have it "
                 f"made writable; a run goes on with --resume")
    except KeyboardInterrupt:
        sys.exit("stopped; to go on give the same command again, train.py with --resume")


class Section(BaseModel):
    """A part of the settings. It cannot be changed; `model_copy(update={...})` gives another one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, given):
        """Without keys that are gone and changed nothing, which checkpoints hold."""
        unused = ("waves", 0), ("features_weights", None), ("diversity_weights", None)
        gone = lambda name, value: name == "skip_broken" or (name, value) in unused
        return {key: given[key] for key in given if not gone(key, given[key])} if isinstance(given, dict) else given


Flag = Annotated[bool, Strict()]
Id = Annotated[int, Strict()]
Whole = Annotated[int, Strict(), Field(ge=0)]
Count = Annotated[int, Strict(), Field(ge=1)]
Color = Annotated[list[Annotated[int, Strict(), Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


def key(default, meaning: str, **limits):
    """A field with its default, its meaning and, where its type does not say so, its range."""
    return Field(default, description=meaning, **limits)


class DataSettings(Section):
    name: Literal["scenes", "folder", "ade20k", "coco_stuff", "cityscapes", "celebamask_hq"] = key("scenes", "the data set")
    root: str | None = key(None, "folder of the data set; scenes needs none")
    size: tuple[Count, Count] = key((64, 64), "[height, width] of the images, or one number, in pixels")
    classes: Id | list[Id | str] | str | None = key(None, "folder: a count, names, or a .csv like those in classes/")
    void: Id | None = key(None, "id of unlabelled pixels in label files, beside those of a class table", ge=0, le=65535)
    palette: list[Color] | None = key(None, "folder: one [r, g, b] for each class, for label files in colors")
    holdout: Share = key(0.0, "share of the training pairs to hold out, by their names, where there is no val folder")
    load_scale: float = key(1.0, "training images are resized to load_scale x size before the random crop", ge=1)
    flip: Flag = key(True, "random horizontal flips in training")
    calibration_images: Count = key(256, "training pairs that the statistics of networks are measured on")
    workers: Whole = key(1, "loading processes of each training process")
    instances: Flag = key(False, "cityscapes: read instance maps too, for a generator with instance_edges")

    @field_validator("size", mode="before", json_schema_input_type=Count | tuple[Count, Count])
    @classmethod
    def _square(cls, size):
        return (size, size) if isinstance(size, int) else size


class NetworkSettings(Section):
    model_config = ConfigDict(extra="allow")

    @property
    def arguments(self) -> dict:
        """What is given beside the name: arguments of the network's class."""
        return self.model_extra


class GeneratorSettings(NetworkSettings):
    name: str = key("dp_sims", "a system of systems.py: dp_sims or oasis, trained against the discriminator, or sdm, trained "
                    "by diffusion; further keys are the arguments of its generator's class")


class DiscriminatorSettings(NetworkSettings):
    name: str = key("backbone", "backbone or oasis; further keys are the arguments of its class")


class BackboneSettings(Section):
    name: str = key("tf_efficientnet_lite0", "any timm network with intermediate features")
    pretrained: Flag = key(True, "false: the same architecture with random weights")
    weights: str | None = key(None, "local weight file; null: from its package or timm's hub")
    conditioning: Literal["both", "normalize", "sigmoid", "none"] = key("both", "of the features, at every scale")
    input_scale: float = key(1.0, "images are resized by this factor before the backbone", gt=0)


class LossSettings(Section):
    focal_gamma: Weight = key(2.0, "focusing of the pixel loss, 1 or more; 0 is plain cross-entropy")
    class_balancing: float = key(0.75, "weigh classes by their share of the pixels to the power of -this; 0 = alike")
    contrastive: float = key(0.3, "weight of the patch contrastive loss")
    contrastive_scales: Count = key(2, "how many of the backbone's coarsest usable scales it sees")
    contrastive_patches: Count = key(64, "patches an image and scale")
    contrastive_temperature: float = key(0.3, "temperature of its softmax")
    perceptual: float = key(0.0, "weight of an L1 distance between backbone features, instead of the contrastive loss")
    diversity: float = key(2.0, "weight of the diversity hinge")
    diversity_margin: tuple[Weight, Weight, Weight] = key(
        (0.05, 0.25, 0.85), "required distance in coarse brightness, coarse color, detail, as shares of real images'")
    diversity_every: Count = key(1, "every so many steps the fake batch is two samples of every other label map")
    diversity_regional: float = key(0.5, "share of the pairs whose noises differ in random classes alone")
    augment: float = key(0.0, "strength of the augmentation of what the discriminator sees; 0 = none", ge=0, le=1)
    rough: float = key(0.0, "share of the label maps that the generator gets roughened, see augment.roughen", ge=0, le=1)
    labelmix: float = key(0.0, "weight of OASIS's LabelMix consistency of the discriminator")
    locality: float = key(0.5, "weight of the change outside the region whose noise was redrawn, per change inside")


class DiffusionSettings(Section):
    """With generator.name sdm, in place of discriminator, backbone and loss."""

    steps: int = key(1000, "steps of an image in evaluation and sample.py; published: 1000", ge=2, le=1000)
    sheet_steps: int = key(50, "steps of an image in samples/STEP.png", ge=2, le=1000)
    sampler: Literal["ancestral", "ddim"] = key("ancestral", "draws each step anew, or lets the first noise decide")
    guidance: Weight = key(1.5, "classifier-free guidance; 1: none, above: the image follows the label map more")
    drop_labels: Share = key(0.2, "share of the label maps withheld in training, which guidance rests on")


class TrainSettings(Section):
    steps: Count = key(600, "steps in all; each updates every network once")
    batch_size: Count = key(8, "images a step over all processes and accumulation rounds")
    accumulation: Count = key(1, "rounds of forward and backward a step")
    compile: Flag = key(False, "torch.compile for generator and discriminator; meant for GPUs")
    lr_generator: Weight = key(4e-4, "Adam")
    lr_discriminator: Weight = key(4e-4, "Adam")
    betas: tuple[Share, Share] = key((0.0, 0.99), "Adam's")
    fresh_fakes: Flag = key(False, "the discriminator's fakes come from the updated generator, for one more forward pass")
    ema: Share = key(0.999, "decay of the generator's moving average, the model that is sampled and evaluated; at most "
                       "(1 + step) / (10 + step), unless init_from is given")
    log_every: Count = key(10, "steps")
    sample_every: Whole = key(200, "steps; 0 = only at the end")
    eval_every: Whole = key(0, "steps; 0 = only at the end")
    save_every: Whole = key(200, "steps; 0 = only at the end")
    keep: Count = key(3, "how many checkpoints/STEP.pt stay")
    tracker: Literal["none", "tensorboard", "wandb"] = key("none", "what else gets the log; wandb sends it to its server")
    timeout: float = key(30.0, "minutes that processes wait for one another", gt=0)


class EvalSettings(Section):
    metric: str = key("fd_tf_efficientnet_lite2", "the metric that picks best.pt")
    num_images: Whole = key(0, "held-out images; 0 = all of the split")
    batch_size: Count = key(8, "images at once, in each process")
    rough: Literal["none", "downsample", "edges", "random"] = key(
        "none", "how the label maps that generators get are roughened, see augment.roughen")
    truncation: float = key(1.0, "factor of a GAN's noise in evaluation, sample.py and paint.py, not in training; "
                            "above 1 samples differ more", gt=0)
    fill_void: Flag = key(False, "generators get the nearest label in place of void, as with sample.py --fill-void")
    features: str = key("tf_efficientnet_lite2", "network of the distances: inception, stlpips_vgg or any timm name")
    features_size: Count | None = key(None, "side in pixels that it sees; null: what it was trained at")
    kid_subsets: Count = key(100, "subsets that KID is averaged over")
    kid_subset_size: Id = key(1000, "images a subset, at most those there are", ge=2)
    segmenter: str | None = key(None, "file or hf:NAME; null: one is trained on the real training split")
    segmenter_mapping: list[Id] | None = key(None, "class for each of its ids, -1 for no class; null: by name or the same")
    segmenter_steps: Count = key(400, "training steps of that one")
    diversity_network: Literal["lpips_alex", "lpips_vgg", "stlpips_alex", "stlpips_vgg"] = key("stlpips_vgg", "its network")
    diversity_size: Count | None = key(128, "smaller samples are enlarged to this height for it; null: never")
    diversity_maps: Count = key(32, "label maps whose samples are compared")
    diversity_samples: Whole = key(4, "samples a map; all pairs are compared; 0 = no diversity")


class Settings(Section):
    """All of a run."""

    name: str = key("scenes", "results go to runs/NAME")
    seed: int = key(0, "initial weights, noise, order and augmentation follow from it", ge=0, lt=2 ** 63)
    init_from: str | None = key(None, "checkpoint whose networks training starts from (fine-tuning)")
    data: DataSettings = DataSettings()
    generator: GeneratorSettings = GeneratorSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    backbone: BackboneSettings = BackboneSettings()
    loss: LossSettings = LossSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if name in ("", ".", "..", "cache") or set(name) & set('/\\\0'):
            raise ValueError("it is the name of one folder, and runs/cache is taken")
        return name

    @model_validator(mode="after")
    def _fit_together(self) -> "Settings":
        if min(self.data.size) * self.backbone.input_scale < 1:
            raise ValueError(f"backbone.input_scale is {self.backbone.input_scale}; it leaves nothing of {self.data.size}")
        if 0 < self.loss.focal_gamma < 1:
            raise ValueError(f"loss.focal_gamma is {self.loss.focal_gamma}; between 0 and 1 the gradient is infinite where a "
                             "pixel is certain: set 0, or 1 or more")
        if self.diffusion.drop_labels == 0 and self.diffusion.guidance != 1:
            raise ValueError(f"diffusion.guidance is {self.diffusion.guidance}; without dropped label maps "
                             f"(diffusion.drop_labels) nothing is learned that it could use: set 1")
        return self


class Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in seen:
                raise yaml.YAMLError(f"the key {str(key.value):.100} stands twice, again in line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_settings(path: str | Path, overrides: list[str] = (), model: type[BaseModel] = Settings) -> BaseModel:
    """Read a YAML file, apply `key.path=value` overrides, check everything and fill in the defaults.

    Raises:
        UserError: unreadable file, unknown key (the nearest right one is named), wrong type or value.
    """
    try:
        given = yaml.load(Path(path).read_text(), Loader) or {}
    except Exception as error:  # PyYAML raises many kinds of errors on odd values
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path}: cannot be read as YAML ({reason})") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: holds {type(given).__name__}, not keys and values")
    return check_settings(apply_overrides(given, overrides), str(path), model)


def apply_overrides(given: dict, overrides: list[str]) -> dict:
    """Set each `key.path=value` in a nested dict, in place; the values are YAML. Raises UserError."""
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: overrides are written key.path=value")
        section = given
        *parents, last = path.split(".")
        for parent in parents:
            if section.get(parent) is None:  # absent, or all of it is commented out
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(f"{override!r}: {parent} is a value, not a section")
        try:
            section[last] = yaml.safe_load(value)
        except Exception as error:  # as in load_settings
            raise UserError(f"{override!r}: the value is not YAML") from error
    return given


def check_settings(given: dict, source: str, model: type[BaseModel] = Settings, prefix: str = "") -> BaseModel:
    """Check a nested dict against a model and fill in the defaults.

    Args:
        given: of a YAML file or a checkpoint. source: where it is from, for messages.
        model: what its keys are checked against. prefix: of its keys in messages, such as "generator.".

    Raises:
        UserError: for the first unknown key or wrong value.
    """
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    section = model.model_fields.get(first["loc"][0]) if first["loc"] else None
    inside = section and isinstance(section.default, Section)
    path = [str(part)[:100] for part in first["loc"][: 2 if inside else 1]]  # behind it: a place in a value
    name, reason = prefix + ".".join(path), first["msg"].removeprefix("Value error, ")
    if first["type"] in ("extra_forbidden", "invalid_key"):  # the latter is no text, such as 5 or true
        siblings = type(section.default).model_fields if inside else model.model_fields
        known = [prefix + ".".join([*path[:-1], field]) for field in siblings]
        if not inside:  # perhaps its section was left out
            known += [f"{key}.{field}" for key, part in siblings.items()
                      for field in getattr(type(part.default), "model_fields", ())]
        word = lambda key: key.rpartition(".")[2]
        likeness = {key: (key.startswith(name) or word(key).startswith(name),
                          difflib.SequenceMatcher(None, word(name), word(key)).ratio()) for key in known}
        nearest = [key for key in known if likeness[key] == max(likeness.values())][:3]
        raise UserError(f"{source}: unknown key {name}; did you mean {' or '.join(nearest)}?")
    if not path:  # the message of a check of several keys, which names them
        raise UserError(f"{source}: {reason}")
    value = given[path[0]] if len(path) == 1 else given[path[0]].get(path[1])
    raise UserError(f"{source}: {name} is {value!r:.100}; {reason[0].lower()}{reason[1:]}")


def flatten(nested: dict, prefix: str = "") -> dict:
    """{"train": {"steps": 600}} -> {"train.steps": 600}: every value under the name that an override gives it."""
    flat = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


if __name__ == "__main__":
    print(json.dumps(Settings.model_json_schema(), indent=1))
