"""The judge of mIoU: a segmentation network that reads generated images and is compared with the asked label map.

Where none is given, a small U-Net is trained on the real training split; it shares nothing with the discriminator.

    python segmenter.py --config configs/camvid.yaml --out camvid_segmenter.pt data.root=../camvid
    python evaluate.py --checkpoint FILE eval.segmenter=camvid_segmenter.pt
"""

import argparse
import hashlib
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import save_checkpoint
from config import UserError, load_config, one_line
from data import build_dataset, leave_signals_to_parent
from judges import file_sha256
from labels import label_format
from metrics import confusion_matrix, data_key, gather, segmentation_scores

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 16, 4e-3, 0.02
LOAD_SCALE = 1.3  # images of up to 1.3 x the size, randomly cropped
RECIPE = 1  # raise it when the network or its training changes: cached segmenters are then trained anew


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels),
                         nn.ReLU(inplace=True))


class SmallUNet(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> logits (B, C, H, W).

    It works on blocks of 2 x 2 pixels, which take a quarter of the time and lose nothing: each gives four sets of
    logits. Features of the coarser scales are added to those of the finer ones.
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (32, 64, 128, 192)):
        super().__init__()
        pairs = list(zip(widths, widths[1:]))
        self.stem = _conv(4 * 3, widths[0])
        self.down = nn.ModuleList(nn.Sequential(_conv(a, b, 2), _conv(b, b)) for a, b in pairs)
        self.reduce = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.up = nn.ModuleList(_conv(a, a) for a, _ in pairs)
        self.head = nn.Conv2d(widths[0], 4 * num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        x, skips = self.stem(F.pixel_unshuffle(x, 2)), []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for reduce, up, skip in reversed(list(zip(self.reduce, self.up, skips))):
            x = up(skip + F.interpolate(reduce(x), size=skip.shape[2:], mode="bilinear"))
        return F.pixel_shuffle(self.head(x), 2)[:, :, :height, :width]


class Segmenter:
    """A judge: images (B, 3, H, W) uint8 -> class ids (B, H, W) int64 in 0..C, C = none of the data set's classes.

    Args:
        predict: images uint8 -> the network's own ids (B, h, w).
        mapping: the network's id -> class of the data set, or -1 for none.
        class_names: the data set's C classes.
        description: what a result file says of it.

    Attributes:
        judges: (C + 1,) bool. A class that no id maps to cannot be judged: its pixels count as void.
    """

    def __init__(self, predict, mapping: list[int], class_names: list[str], description: dict):
        count = len(class_names)
        self.predict, self.num_classes = predict, count
        self.lookup = torch.tensor([count if target == -1 else target for target in mapping])
        self.judges = torch.tensor([c in mapping for c in range(count)] + [False])
        self.description = description | {
            "mapping": mapping, "not_judged": [name for c, name in enumerate(class_names) if c not in mapping]}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        ids = self.predict(images).long()
        if ids.min() < 0 or ids.max() >= len(self.lookup):
            raise UserError(f"segmenter {self.description['name']}: gave id {int(ids.max())}, but its mapping has "
                            f"{len(self.lookup)} entries; set eval.segmenter_mapping to one class a segmenter id")
        if ids.shape[1:] != images.shape[2:]:
            ids = F.interpolate(ids[:, None].float(), size=images.shape[2:], mode="nearest")[:, 0].long()
        return self.lookup.to(ids.device)[ids]


def train_segmenter(data_config: dict, steps: int, device: torch.device | str, seed: int = 0) -> dict:
    """Train a SmallUNet on the real training split: random crops, flips and color; weighted cross-entropy, void left out.

    Returns: what `load_segmenter` reads: weights, class_names, size, steps.
    """
    dataset = build_dataset(data_config | {"load_scale": LOAD_SCALE, "instances": False}, "train", seed, augment=True)
    random = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(dataset), (steps * BATCH_SIZE,), generator=random).tolist()
    loader = DataLoader(dataset, BATCH_SIZE, sampler=[(index, draw) for draw, index in enumerate(draws)],
                        num_workers=data_config["workers"], generator=random, worker_init_fn=leave_signals_to_parent)
    weights = class_weights(dataset).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallUNet(dataset.num_classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(steps, 2))
    bar = tqdm(loader, desc="train segmenter", unit="step", leave=False)
    for images, labels in bar:
        gain = 1 + 0.2 * (2 * torch.rand(len(images), 3, 1, 1, generator=random) - 1)
        shift = 0.2 * (2 * torch.rand(len(images), 1, 1, 1, generator=random) - 1)
        images = ((images.float() / 127.5 - 1) * gain + shift).to(device, memory_format=torch.channels_last)
        loss = F.cross_entropy(network(images), labels.to(device).long(), weights, ignore_index=dataset.num_classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return {"weights": network.cpu().state_dict(), "class_names": list(dataset.class_names),
            "size": list(dataset.size), "steps": steps}


def class_weights(dataset, num_images: int = 100) -> torch.Tensor:
    """(C,) weights 1 / sqrt(share of pixels), with a mean of 1 over the labelled pixels, from evenly spread images."""
    count = torch.zeros(dataset.num_classes + 1)
    for index in range(0, len(dataset), max(1, len(dataset) // num_images)):
        count += torch.bincount(dataset[index][1].flatten().long(), minlength=len(count))
    share = count[:-1] / count[:-1].sum().clamp_min(1)
    weights = (share + 1e-3).rsqrt()
    return weights / (weights * share).sum().clamp_min(1e-6)


def load_segmenter(source: str, class_names: list[str], size: tuple[int, int], device: torch.device | str,
                   mapping: list[int] | None = None) -> Segmenter:
    """A judge by name.

    Args:
        source: a file of this script; a TorchScript file (.pt) or `torch.export` file (.pt2) that takes float RGB
            (B, 3, H, W) in [0, 1] and gives logits (B, K, h, w) or ids (B, h, w); or `hf:NAME`, a semantic
            segmentation model of the transformers package.
        class_names, size: the data set's classes and [height, width].
        mapping: class of the data set for each of the segmenter's ids, -1 for none. None: by name for `hf:`, else the
            segmenter's classes must be the data set's.

    Raises:
        UserError: unreadable file, or classes that do not fit the data set.
    """
    if source.startswith("hf:"):
        predict, names = _hugging_face(source[3:], device)
        mapping = _match_names(names, class_names, source) if mapping is None else mapping
        return Segmenter(predict, _checked(mapping, len(names), class_names, source), class_names, {"name": source})
    path = Path(source)
    if not path.is_file():
        raise UserError(f"eval.segmenter: {path} is not a file; give one of segmenter.py, TorchScript, or hf:NAME")
    description = {"name": path.name, "sha256": file_sha256(path)}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # not a file of ours; TorchScript and exported programs raise various errors here
        state = None
    if not isinstance(state, dict) or "class_names" not in state:
        predict, count = _exported(path, size, device)
        mapping = list(range(len(class_names))) if mapping is None else mapping
        return Segmenter(predict, _checked(mapping, count, class_names, source), class_names, description)
    if state["class_names"] != list(class_names):
        raise UserError(f"{path}: trained on the classes {state['class_names']}, not on the data set's "
                        f"{list(class_names)}; train one with python segmenter.py")
    network = SmallUNet(len(class_names))
    network.load_state_dict(state["weights"])
    network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def predict(images: torch.Tensor) -> torch.Tensor:
        return network((images.float() / 127.5 - 1).to(memory_format=torch.channels_last)).argmax(1)

    trained = {"trained_size": state["size"], "trained_steps": state["steps"]}
    return Segmenter(predict, list(range(len(class_names))), class_names, description | trained)


def _checked(mapping: list[int], num_ids: int | None, class_names: list[str], source: str) -> list[int]:
    wrong = [target for target in mapping if not isinstance(target, int) or not -1 <= target < len(class_names)]
    if wrong:
        raise UserError(f"eval.segmenter_mapping: {wrong[0]!r} is no class; use 0 to {len(class_names) - 1}, or -1 for none")
    if num_ids is not None and len(mapping) != num_ids:
        raise UserError(f"segmenter {source}: {num_ids} classes, but {len(mapping)} are mapped to the data set's "
                        f"{len(class_names)}; set eval.segmenter_mapping to one class (or -1) a segmenter class")
    return mapping


def _match_names(names: list[str], class_names: list[str], source: str) -> list[int]:
    def plain(name):
        return name.split(",")[0].split(";")[0].strip().lower().replace("-", " ")

    known = {plain(name): c for c, name in enumerate(class_names)}
    missing = [name for name in names if plain(name) not in known]
    if missing:
        raise UserError(f"segmenter {source}: its class {missing[0]!r} is not in the data set ({len(missing)} such); "
                        f"set eval.segmenter_mapping to one class (or -1) for each of its {len(names)} classes")
    return [known[plain(name)] for name in names]


def _exported(path: Path, size: tuple[int, int], device: torch.device | str):
    """(predict, number of classes or None where the network gives ids) of a TorchScript or exported file."""
    try:
        network = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(path, device).eval()
        network = network.to(device)
        with torch.no_grad():
            output = network(torch.zeros(1, 3, *size, device=device))
    except Exception as error:  # as many kinds as there are files
        raise UserError(f"segmenter {path}: cannot be loaded and run on {tuple(size)} images "
                        f"({str(error).strip().splitlines()[-1][:120]}); export it with torch.jit or torch.export") from error

    def predict(images: torch.Tensor) -> torch.Tensor:
        logits = network(images.float() / 255)
        if logits.ndim == 3:
            return logits
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False).argmax(1)

    return predict, output.shape[1] if output.ndim == 4 else None


def _hugging_face(name: str, device: torch.device | str):
    """(predict, class names) of a transformers model: SegFormer, UperNet, Mask2Former and their like."""
    try:
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation
    except ImportError as error:
        raise UserError(f"eval.segmenter: hf:{name} needs transformers; pip install transformers") from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        try:
            network = AutoModelForSemanticSegmentation.from_pretrained(name)
        except ValueError:  # Mask2Former and OneFormer are of the other kind
            network = AutoModelForUniversalSegmentation.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"eval.segmenter: hf:{name} cannot be fetched ({str(error).splitlines()[0][:120]}); "
                        f"download it on a connected machine and give its folder, hf:FOLDER") from error
    network = network.to(device).eval()

    def predict(images: torch.Tensor) -> torch.Tensor:
        inputs = processor(images=list(images.permute(0, 2, 3, 1).cpu().numpy()), return_tensors="pt").to(device)
        maps = processor.post_process_semantic_segmentation(network(**inputs), [tuple(images.shape[2:])] * len(images))
        return torch.stack(list(maps)).to(images.device)

    return predict, [network.config.id2label[i] for i in range(len(network.config.id2label))]


def segmenter_for(config: dict, cache_dir: str | Path, device: torch.device | str, rank: int = 0) -> Segmenter:
    """The judge that the config asks for: the one it names, or one trained here once and kept in `cache_dir`.

    Under torch.distributed every process calls it; the first one trains.
    """
    data_config, judges = config["data"], config["eval"]
    source = judges["segmenter"]
    if source is None:
        dataset = build_dataset(data_config, "train")
        key = repr((RECIPE, data_key(dataset, list(range(len(dataset)))), dataset.class_names, judges["segmenter_steps"]))
        path = Path(cache_dir) / f"segmenter-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        if rank == 0 and not path.is_file():
            save_checkpoint(train_segmenter(data_config, judges["segmenter_steps"], device), path)
        gather(None)  # the others wait for the file
        source = str(path)
    return load_segmenter(source, label_format(data_config).class_names, tuple(data_config["size"]), device,
                          judges["segmenter_mapping"])


def validate(segmenter: Segmenter, data_config: dict, device: torch.device | str) -> dict:
    """Scores on the real val split, as `metrics.segmentation_scores` gives them."""
    dataset = build_dataset(data_config | {"instances": False}, "val")
    confusion = 0
    for images, labels in tqdm(DataLoader(dataset, BATCH_SIZE, num_workers=data_config["workers"]), leave=False):
        labels = labels.to(device).long()
        confusion = confusion + confusion_matrix(labels, segmenter(images.to(device)), dataset.num_classes)
    return segmentation_scores(confusion, dataset.class_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = train_segmenter(config["data"], config["eval"]["segmenter_steps"], device)
    save_checkpoint(state, args.out)
    segmenter = load_segmenter(str(args.out), state["class_names"], state["size"], device)
    scores = validate(segmenter, config["data"], device)
    for name, iou in scores["class_iou"].items():
        print(f"{name:24} {'absent' if iou is None else f'{iou:.3f}'}")
    print(f"{args.out}: mIoU {scores['miou']:.3f}, pixel accuracy {scores['pixel_accuracy']:.3f} on real val")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
