"""The judge of mIoU: a segmentation network that reads generated images and is compared with the asked label map.

Where none is given, a small U-Net is trained on the real training split; it shares nothing with the discriminator.
"""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbones import answers
from checkpoint import save_checkpoint
from config import DataSettings, Settings, UserError
from dataset import build_dataset, leave_signals_to_parent
from distributed import gather, hold
from evaluation import cache_file
from judges import file_sha256, weights_sha256
from labels import label_format

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
        predict: images uint8 -> the network's logits (B, K, h, w), or ids (B, H, W).
        mapping: the network's id -> class of the data set, or -1 for none.
        class_names: the data set's C classes.
        description: what a result file says of it.

    Attributes:
        judges: (C + 1,) bool. A class that no id maps to cannot be judged: its pixels count as void.
    """

    def __init__(self, predict: Callable[[torch.Tensor], torch.Tensor], mapping: list[int], class_names: list[str],
                 description: dict):
        count = len(class_names)
        self.predict = predict
        self.lookup = torch.tensor([count if target == -1 else target for target in mapping])
        self.judges = torch.tensor([c in mapping for c in range(count)] + [False])
        self.description = description | {
            "mapping": mapping, "not_judged": [name for c, name in enumerate(class_names) if c not in mapping]}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        ids = self.predict(images)
        if ids.ndim == 4:
            ids = F.interpolate(ids, size=images.shape[2:], mode="bilinear", align_corners=False).argmax(1)
        return self.lookup.to(ids.device)[ids]


def train_segmenter(settings: DataSettings, steps: int, device: torch.device | str, seed: int = 0) -> dict:
    """Train a SmallUNet on the real training split: random crops, flips and color.

    The loss is a cross-entropy without void, a class weighted by 1 / sqrt(its share of the pixels).

    Returns: what `segmenter_for` keeps: weights, class_names, size, steps.
    """
    dataset = build_dataset(settings.model_copy(update={"load_scale": LOAD_SCALE, "instances": False}), "train", seed)
    random = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(dataset), (steps * BATCH_SIZE,), generator=random).tolist()
    loader = DataLoader(dataset, BATCH_SIZE, sampler=[(index, draw) for draw, index in enumerate(draws)],
                        num_workers=settings.workers, generator=random, worker_init_fn=leave_signals_to_parent)
    count = torch.zeros(dataset.num_classes + 1)  # pixels of each class, of about 100 images
    for index in range(0, len(dataset), max(1, len(dataset) // 100)):
        count += torch.bincount(dataset[index][1].flatten().long(), minlength=len(count))
    share = count[:-1] / count[:-1].sum().clamp_min(1)
    weights = (share + 1e-3).rsqrt()
    weights = (weights / (weights * share).sum().clamp_min(1e-6)).to(device)  # a mean of 1 over the labelled pixels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallUNet(dataset.num_classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(steps, 2))
    for images, labels in tqdm(loader, desc="train segmenter", unit="step", leave=False):
        gain = 1 + 0.2 * (2 * torch.rand(len(images), 3, 1, 1, generator=random) - 1)
        shift = 0.2 * (2 * torch.rand(len(images), 1, 1, 1, generator=random) - 1)
        images = ((images.float() / 127.5 - 1) * gain + shift).to(device, memory_format=torch.channels_last)
        loss = F.cross_entropy(network(images), labels.to(device).long(), weights, ignore_index=dataset.num_classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {"weights": network.cpu().state_dict(), "class_names": list(dataset.class_names),
            "size": list(dataset.size), "steps": steps}


def segmenter_for(settings: Settings, cache_dir: str | Path, device: torch.device | str, rank: int = 0) -> Segmenter:
    """The judge that the settings ask for: the one they name, or one trained here once and kept in `cache_dir`.

    Under torch.distributed every process calls it; the first one trains. `eval.segmenter` is a file that was kept so
    (.pt); a `torch.export` file (.pt2) that takes float RGB (B, 3, H, W) in [0, 1] and gives logits (B, K, h, w); or
    `hf:NAME`, a semantic segmentation model of the transformers package. `eval.segmenter_mapping` is the class of the
    data set for each of the segmenter's ids, -1 for none. None: by name, or the same where a file has no names.

    Raises:
        UserError: unreadable file, or classes that do not fit the data set.
    """
    data, source, mapping = settings.data, settings.eval.segmenter, settings.eval.segmenter_mapping
    class_names = label_format(data).class_names
    if source is None:
        dataset, steps = build_dataset(data, "train"), settings.eval.segmenter_steps
        file = cache_file(cache_dir, "segmenter", RECIPE, dataset, list(range(len(dataset))), class_names, steps, data.flip)
        if rank == 0 and not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with hold(file.with_suffix(".lock"), wait=True):  # two runs that start together share one
                if not file.is_file():
                    save_checkpoint(train_segmenter(data, steps, device), file)
        gather(None)  # the others wait for the file
        source = str(file)
    try:
        if source.startswith("hf:"):
            predict, names, description = _hugging_face(source, device)
        else:
            predict, names, description = _from_file(Path(source), data.size, class_names, device)
    except Exception as error:  # as many kinds as there are files
        raise UserError(f"eval.segmenter: {source} cannot be loaded and run ({error!r:.150}); give a torch.export file "
                        f"(.pt2), one that was trained here (.pt) or hf:NAME (pip install transformers; without a "
                        f"connection hf:FOLDER)") from error
    if mapping is None:
        known = {name: c for c, name in enumerate(class_names)}
        mapping = [known.get(name, known.get(name.split(",")[0].strip().lower())) for name in names]  # "Road, route"
        if None in mapping:
            raise UserError(f"segmenter {source}: its class {names[mapping.index(None)]!r} is not in the data set; set "
                            f"eval.segmenter_mapping to one class (or -1) for each of its {len(names)} classes")
    if len(mapping) != len(names) or not set(mapping) <= {-1, *range(len(class_names))}:
        raise UserError(f"segmenter {source}: eval.segmenter_mapping is {mapping!r:.100}; it needs an entry for each "
                        f"of its {len(names)} classes: 0 to {len(class_names) - 1}, or -1 for none")
    return Segmenter(predict, mapping, class_names, description)


def _from_file(file: Path, size: tuple[int, int], class_names: list[str],
               device: torch.device | str) -> tuple[Callable, list[str], dict]:
    """(predict, class names, description) of what `train_segmenter` gave, or of a torch.export file."""
    description = {"name": file.name, "sha256": file_sha256(file)}
    if file.suffix == ".pt2":
        exported = torch.export.load(file).module().to(device)
        with torch.no_grad():
            count = [exported(torch.zeros(batch, 3, *size, device=device)).shape[1] for batch in (2, 1)][-1]
        names = class_names if count == len(class_names) else [f"output {i}" for i in range(count)]
        return lambda images: exported(images.float() / 255), names, description
    state = torch.load(file, map_location="cpu", weights_only=True)
    network = SmallUNet(len(state["class_names"]))
    network.load_state_dict(state["weights"])
    network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    predict = lambda images: network((images.float() / 127.5 - 1).to(memory_format=torch.channels_last))
    description |= {"trained_size": state["size"], "trained_steps": state["steps"]}
    return predict, state["class_names"], description


def _hugging_face(source: str, device: torch.device | str) -> tuple[Callable, list[str], dict]:
    """(predict, class names, description) of hf:NAME, a transformers model: SegFormer, UperNet, Mask2Former and their like."""
    name = source.removeprefix("hf:")
    if not Path(name).is_dir() and not answers(huggingface_hub.constants.ENDPOINT):
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # its client would ask on for a minute
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation
    processor = AutoImageProcessor.from_pretrained(name)
    try:
        network = AutoModelForSemanticSegmentation.from_pretrained(name)
    except ValueError:  # Mask2Former and OneFormer are of the other kind
        network = AutoModelForUniversalSegmentation.from_pretrained(name)
    network = network.to(device).eval()

    def predict(images: torch.Tensor) -> torch.Tensor:
        inputs = processor(images=list(images.permute(0, 2, 3, 1).cpu().numpy()), return_tensors="pt").to(device)
        maps = processor.post_process_semantic_segmentation(network(**inputs), [tuple(images.shape[2:])] * len(images))
        return torch.stack(list(maps)).to(images.device)

    return predict, [network.config.id2label[i] for i in range(len(network.config.id2label))], {
        "name": source, "sha256": weights_sha256(network), "processor": json.loads(processor.to_json_string())}
