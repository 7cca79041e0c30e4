"""A generator for others: python export.py --out FOLDER [--checkpoint FILE] [--runtime FOLDER] [--config FILE]

writes FOLDER/model.onnx, which needs none of this code: label_map int64 (1, H, W) in 0..C, z float32 (1, z_dim), and
z2, the noise where region, bool (1, H, W), is true -> image float32 (1, 3, H, W) in [-1, 1]. Beside it lies the page
of paint.py, which draws with it in the browser. Any web server serves FOLDER: python -m http.server -d FOLDER

--runtime is the folder of onnxruntime-web that `npm pack onnxruntime-web && tar xf onnxruntime-web-*.tgz` makes.
"""

import argparse
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper

from checkpoint import load_generator, newest_checkpoint
from config import UserError, run_script
from dataset import example_pairs
from systems import TRUNCATIONS, WALK

RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
MOST_ERROR = 2  # of the file against PyTorch, images in 0..255; float16 weights round

# What torch's exporter refuses or makes loops of, in plain operations.
PLAIN = {"scaled_dot_product_attention": lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v,
         "embedding_bag": lambda rows, table, mode: sum(F.embedding(part, table).sum(1) for part in rows.chunk(3, 1))}


def halve_weights(path: Path) -> None:
    """Store the weights of a model as float16. It computes in float32 all the same."""
    model = onnx.load(path)
    for weight in list(model.graph.initializer):
        values = numpy_helper.to_array(weight)
        if values.dtype == np.float32:
            half = numpy_helper.from_array(values.astype(np.float16), f"{weight.name}_half")
            model.graph.initializer.remove(weight)
            model.graph.initializer.append(half)
            model.graph.node.insert(0, helper.make_node("Cast", [half.name], [weight.name], to=onnx.TensorProto.FLOAT))
    onnx.save(model, path)


@torch.no_grad()
def main(arguments: argparse.Namespace) -> None:
    out, runtime = arguments.out, arguments.runtime / "dist"
    system, generator, state = load_generator(arguments.checkpoint or newest_checkpoint(), "cpu", arguments.config)
    settings, (height, width) = system.settings, system.settings.data.size
    if "resample" not in system.options:
        raise UserError(f"{settings.generator.name}: takes many steps for an image; export.py takes systems with one")
    if not all((runtime / name).is_file() for name in RUNTIME):
        raise UserError(f"{runtime}: no onnxruntime-web; run npm pack onnxruntime-web && tar xf onnxruntime-web-*.tgz, "
                        f"and name the folder `package` that this makes with --runtime")
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    stripes = torch.arange(height * width).view(1, height, width) // width % (system.num_classes + 1)
    inputs = {"label_map": stripes, "z": torch.randn(1, generator.z_dim), "z2": torch.randn(1, generator.z_dim),
              "region": stripes < system.num_classes // 2}
    image = generator(**inputs)

    (out / "example").mkdir(parents=True)
    model = out / "model.onnx"
    with patch.multiple(F, **PLAIN):
        torch.onnx.export(generator, kwargs=inputs, f=str(model), input_names=list(inputs),
                          output_names=["image"], dynamo=True, external_data=False, verbose=False)
    halve_weights(model)
    session = onnxruntime.InferenceSession(model)
    drawn = session.run(None, {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()})[0]
    error = 127.5 * np.abs(drawn - image.numpy()).max()
    print(f"largest difference from PyTorch: {error:.2g} in 0..255")
    if not error <= MOST_ERROR:  # or it is NaN
        raise UserError(f"{model}: its images differ by {error:.2g} from PyTorch's, of 0..255; the limit is {MOST_ERROR}")

    shutil.copy(Path(__file__).with_name("paint.html"), out / "index.html")
    for name in RUNTIME:
        shutil.copy(runtime / name, out / name)
    pairs = example_pairs(settings.data, state["class_names"])
    for number in range(len(pairs)):
        (out / "example" / str(number)).write_bytes(pairs[number][1].numpy().tobytes())
    known = {key: state[key] for key in ("class_names", "palette", "ids", "step")}
    (out / "model.json").write_text(json.dumps(known | {
        "server": False, "name": settings.name, "size": [height, width], "z_dim": generator.z_dim,
        "options": sorted(system.options), "walk": WALK, "examples": len(pairs), "photos": False,
        "choices": {"truncation": list(dict.fromkeys(map(str, (settings.eval.truncation, *TRUNCATIONS))))}}))
    print(f"{out}: {model.stat().st_size / 1e6:.1f} MB beside the runtime; python -m http.server -d {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the newest one in runs/")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration of an official checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--runtime", type=Path, default=Path("package"), metavar="FOLDER", help="default: package")
    run_script(lambda: main(parser.parse_args()))
