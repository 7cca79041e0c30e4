#!/usr/bin/env bash
# Makes the figures of RESULTS.md: ./results.sh [SECTION ...], all of them by default, half a day on two cores by estimate.
# Finished parts are skipped, so start it again after a stop. Tables, curves and pictures go to results/SECTION.
# Put CamVid into camvid/{train,val}/{images,labels}, or make camvid a link to such a folder; see configs/camvid.yaml.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

once() {  # FILE COMMAND ...: what the command prints goes to the file, unless it is there
  local file="results/$1"
  shift
  [ -e "$file" ] && return
  mkdir -p "$(dirname "$file")"
  "$@" | tee "$file.part"
  mv "$file.part" "$file"
}

clone() {  # OWNER/NAME
  [ -e "official/${1#*/}" ] || git clone "https://github.com/$1" "official/${1#*/}"
}

section_1() {  # quick start, each class in its mean color, real images of other scenes
  python compare.py --run configs/quickstart.yaml --out results/1
  for split in train val; do
    [ -e "results/1/$split" ] || python data.py export --config config.yaml --split $split --count 256 --out "results/1/$split"
  done
  python - <<'END'
from pathlib import Path
import numpy as np
from PIL import Image
read = lambda kind, split: {path.name: np.asarray(Image.open(path)) for path in Path(f"results/1/{split}/{kind}").glob("*.png")}
images, labels, maps = read("images", "train"), read("labels", "train"), read("labels", "val")
pixels, ids = (np.concatenate([array[name].reshape(-1, *array[name].shape[2:]) for name in images]) for array in (images, labels))
colors = np.stack([pixels[ids == i].mean(0) if (ids == i).any() else pixels.mean(0) for i in range(256)])
for folder in ("painted", "other"):
    Path(f"results/1/{folder}").mkdir(exist_ok=True)
for (name, label), image in zip(maps.items(), images.values()):
    Image.fromarray(colors[label].round().astype(np.uint8)).save(f"results/1/painted/{name}")
    Image.fromarray(image).save(f"results/1/other/{name}")
END
  for images in painted other; do
    once 1/$images.txt python evaluate.py --images results/1/$images --labels results/1/val/labels --real results/1/val/images \
      --config config.yaml --out results/1/$images.json
  done
  for seed in 0 1; do
    once 1/truncation_$seed.txt python evaluate.py --checkpoint runs/quickstart_quick_start_$seed/checkpoints/latest.pt \
      eval.truncation=1.5 --out results/1/truncation_$seed.json
  done
  once 1/samples.txt python sample.py --labels results/1/val/labels --out results/1/samples \
    --checkpoint runs/quickstart_quick_start_0/checkpoints/latest.pt
  once 1/spectrum.txt python - <<'END'
from pathlib import Path
import numpy as np
from PIL import Image
window, power = np.outer(np.hanning(64), np.hanning(64)), {}
for folder in ("samples", "val/images"):
    gray = np.stack([np.asarray(Image.open(path)).mean(2) for path in sorted(Path(f"results/1/{folder}").glob("*.png"))])
    power[folder] = (np.abs(np.fft.fft2((gray - gray.mean((1, 2), keepdims=True)) * window)) ** 2).sum(0)
frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64))
for low in (1 / 32, 1 / 16, 1 / 8, 1 / 4):  # generated over real, of an octave and of its worst frequency
    fake, real = (p[(frequency >= low) & (frequency < 2 * low)] for p in power.values())
    print(f"{low:.3f} to {2 * low:.3f} cycles a pixel: {fake.sum() / real.sum():.2f}, at most {(fake / real).max():.2f}")
END
}

section_2() {
  python compare.py --run configs/ablation.yaml --out results/2
  for run in {full,no_conditioning,texture_contrast}_{0,1}; do
    for psi in 0.7 1 1.5 2.2; do
      once 2/${run}_$psi.txt python evaluate.py --checkpoint runs/ablation_$run/checkpoints/latest.pt eval.truncation=$psi \
        --out results/2/${run}_$psi.json
    done
  done
  once 2/truncation.txt python - <<'END'
import json
from matplotlib.figure import Figure
figure = Figure(figsize=(7, 4.5), layout="constrained")
panel = figure.subplots()
names = {"full": "conditioning, no texture noise", "no_conditioning": "no conditioning", "texture_contrast": "texture noise, heavy contrastive loss"}
print(f"{'':18}", *(f"{name[:14]:>15}" for name in ("truncation", "Frechet", "kernel", "mIoU", "diversity")))
for (row, name), color in zip(names.items(), ("#D55E00", "#009E73", "#0072B2")):
    means = []
    for psi in ("0.7", "1", "1.5", "2.2"):
        runs = [json.load(open(f"results/2/{row}_{seed}_{psi}.json")) for seed in (0, 1)]
        keys = "fd_tf_efficientnet_lite2", "kid_tf_efficientnet_lite2", "miou", "stlpips_vgg_diversity"
        values = [[run[key] for run in runs] for key in keys]
        panel.scatter(values[3], values[0], s=14, alpha=0.5, color=color)
        means.append((sum(values[3]) / 2, sum(values[0]) / 2))
        print(f"{row:18}{psi:>16}", *(f"{a:7.3g} /{b:6.3g}" for a, b in values))
    panel.plot(*zip(*means), marker="o", color=color, label=f"{name}, truncation 0.7, 1, 1.5, 2.2")
panel.set(xlabel="diversity", ylabel="Frechet distance")
panel.grid(alpha=0.3)
figure.legend(loc="outside lower left", fontsize=8)
figure.savefig("results/2/truncation.png", dpi=100)
END
}

section_3() { python compare.py --run configs/systems.yaml --out results/3; }

section_4() {
  OMP_NUM_THREADS=2 once 4/cost.txt python bench.py --steps 0 --config configs/ade20k.yaml --config configs/oasis_ade20k.yaml \
    --config configs/sdm_ade20k.yaml
}

section_5() {
  clone boschresearch/OASIS
  clone WeilunWang/semantic-diffusion-model
  OMP_NUM_THREADS=2 once 5/oasis.txt python bench.py --official official/OASIS
  OMP_NUM_THREADS=2 once 5/sdm.txt python bench.py --official official/semantic-diffusion-model
}

section_6() {
  for change in train.batch_size=4 train.batch_size=8 train.batch_size=16 data.size=128 data.size=256; do
    once 6/$change.txt python bench.py --config config.yaml --steps 4 generator.texture=false $change
  done
  for config in config configs/camvid128; do
    for texture in false true; do
      once 6/texture_${texture}_$(basename $config).txt python bench.py --config $config.yaml --steps 8 generator.texture=$texture
    done
  done
  local configs=()
  for name in tf_efficientnet_lite0 convnext_{tiny,large} swin_tiny_patch4_window7_224 vit_small_patch16_dinov3 \
    vit_small_patch14_dinov2 eva02_small_patch14_224 vit_base_patch16_{clip_224,siglip_256,224}; do
    sed "s/^  name: tf_efficientnet_lite0/  name: $name\n  pretrained: false/" configs/camvid128.yaml >results/6/$name.yaml
    configs+=(--config results/6/$name.yaml)
  done
  once 6/backbones.txt python bench.py "${configs[@]}" --steps 2 train.batch_size=2
}

section_7() { once 7/tests.txt python -m pytest -m slow; }

section_8() {  # goes on from the runs of section 3
  section_3
  for psi in 0.7 1.3 1.7 2.2; do
    once 8/truncation_$psi.txt python evaluate.py --checkpoint runs/systems_dp_sims_0/checkpoints/0002000.pt eval.truncation=$psi \
      --out results/8/truncation_$psi.json
  done
  once 8/truncation_1_1.7.txt python evaluate.py --checkpoint runs/systems_dp_sims_1/checkpoints/0002000.pt eval.truncation=1.7 \
    --out results/8/truncation_1_1.7.json
  python train.py --config configs/camvid128.yaml name=camvid128_rough loss.rough=0.5 --resume
  for kind in downsample edges random; do
    for run in systems_dp_sims_0 camvid128_rough; do
      once 8/$kind/$run.txt python evaluate.py --checkpoint runs/$run/checkpoints/0002000.pt eval.rough=$kind \
        --out results/8/$kind/$run.json
    done
  done
  python compare.py --run configs/few_images.yaml --out results/8/few_images
}

for section in ${*:-1 2 3 4 5 6 7 8}; do
  "section_$section"
done
