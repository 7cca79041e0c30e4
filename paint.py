"""Paint a label map, see the picture: python paint.py [--checkpoint FILE] [--labels DIR] [--host 127.0.0.1]
                                                    [--port 8000] [--no-browser] [--config FILE]

opens a page in the browser. --labels names a folder of label maps to start from, in the forms that sample.py reads;
without it they are those of the data set's val split, if it is on disk. The page shows bit for bit what
`sample.py --labels DIR --seed S` makes of the label map that it saves, as long as that file is called painted.png.

Only this machine reaches the page, unless --host says otherwise (0.0.0.0: the network). Ctrl-C ends it.
"""

import argparse
import json
import re
import traceback
import webbrowser
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from torch import Tensor

from checkpoint import load_generator, newest_checkpoint
from config import UserError, run_script
from dataset import EXAMPLES, evenly_spaced, example_pairs, label_files
from distributed import setup_distributed
from interface import System
from labels import read_label_file
from systems import TRUNCATIONS, WALK

NAME = zlib.crc32(b"painted")  # the label map that the page saves is painted.png; sample.py draws noise by this name
QUICK_STEPS = 20               # at first, of a system that takes many
MOST_BYTES = 2 ** 24           # of a request


class Studio:
    """A generator, and the one thread that draws with it: of each page, only the newest picture that it asked for."""

    def __init__(self, system: System, generator: torch.nn.Module, state: dict, labels: Path | None):
        self.system, self.generator, self.state, self.size = system, generator, state, system.settings.data.size
        files = list(label_files(labels, system.settings.data).values()) if labels else []
        self.files = [files[i] for i in evenly_spaced(len(files), EXAMPLES)]
        self.pairs = () if labels else example_pairs(system.settings.data, state["class_names"])
        given = system.settings.diffusion
        psi = system.settings.eval.truncation
        offered = {"truncation": [psi, *TRUNCATIONS],  # the first of each is the default
                   "steps": [min(QUICK_STEPS, given.steps), 10, 20, 50, 100, 250, 1000],
                   "guidance": [given.guidance, *((1.0, 1.5, 2.0, 3.0, 5.0) if given.drop_labels else ())]}
        self.choices = {key: list(dict.fromkeys(map(str, offered[key]))) for key in offered if key in system.options}
        self.newest: dict[str, object] = {}  # page -> a mark of the picture that it waits for
        self.drawn = "", None                # page and mark of the picture that is being drawn
        self.worker, self.device = ThreadPoolExecutor(1), next(generator.parameters()).device
        for module in generator.modules():   # a newer stroke ends an older picture at its next layer
            module.register_forward_pre_hook(lambda *_: self.go_on())

    def describe(self) -> dict:
        """What the page must know of the model."""
        return {key: self.state[key] for key in ("class_names", "palette", "ids", "step")} | {
            "server": True, "name": self.system.settings.name, "size": self.size, "options": sorted(self.system.options),
            "choices": self.choices, "walk": WALK, "examples": len(self.files or self.pairs),
            "photos": bool(self.pairs)}

    def draw(self, page: str, body: bytes, given: dict[str, str], send: Callable[[bytes], None]) -> bytes:
        """A picture of H * W bytes of classes; what the same page asked for before is given up.

        Args:
            given: `seed`; `walk`, the place from this noise (0) to another (WALK - 1); `redraws`, "class.number,...";
                and of each of `choices` the name of one.
            send: called with coarse pictures on the way, by systems that take many steps.

        Returns H * W RGBA pixels. Raises UserError for a wrong request, and if the page asks for another picture meanwhile.
        """
        (height, width), classes, labels = self.size, self.system.num_classes, np.frombuffer(body, np.uint8)
        if labels.size != height * width or labels.max() > classes:
            raise UserError(f"{len(body)} bytes; a label map of this model is {height * width}, {height} rows of "
                            f"{width} classes from 0 to {classes}: reload the page")
        label_map = torch.tensor(labels, device=self.device).view(1, height, width).long()
        seed, walk = whole(given.get("seed", "0"), 2 ** 63), whole(given.get("walk", "0"), WALK)
        redraws = re.findall(r"(\d+)\.(\d+)", given.get("redraws", ""))
        redraws = [(whole(c, classes), whole(k, 1000)) for c, k in redraws]
        chosen = {option: given.get(option, values[0]) for option, values in self.choices.items()}
        if any(value not in self.choices[option] for option, value in chosen.items()):
            raise UserError(f"{chosen}: choose among {self.choices}")
        options = {"interpolate": walk and WALK, "resample": None} | chosen
        system = self.system.with_options(argparse.Namespace(**options))
        preview = (lambda image: send(rgba(image))) if "steps" in system.options else None
        mark = self.newest[page] = object()

        def draw(redraw: int = 0, **changes) -> Tensor:
            wanted = argparse.Namespace(**options | changes, num=redraw + 1)
            number = redraw * (wanted.interpolate or 1) + walk  # among the images that sample.py would draw
            return next(system.draw(self.generator, [label_map], (seed, NAME), wanted, [number], preview))

        @torch.no_grad()
        def run() -> bytes:
            self.drawn = page, mark
            self.go_on()
            image = None if redraws else draw()
            for c, k in redraws:  # each class is pasted from the picture in which it alone is redrawn
                redrawn = draw(k, resample=c)
                image = redrawn if image is None else torch.where(label_map == c, redrawn, image)
            return rgba(image)

        return self.worker.submit(run).result()

    def go_on(self) -> None:
        """Raise UserError if nobody waits any more for what is being drawn."""
        page, mark = self.drawn
        if self.newest.get(page) is not mark:
            raise UserError("the page wants a newer picture")

    def read_label(self, path: str | Path, content: bytes | None = None) -> bytes:
        """A label file by the rules of sample.py -> H * W classes. Raises UserError."""
        return read_label_file(path, self.state, self.size, content).tobytes()

    def example(self, index: int) -> tuple[bytes, bytes]:
        """A label map to start from, H * W classes, and of a pair the photo, H * W RGBA pixels. Raises UserError."""
        if self.files:
            return self.read_label(self.files[index]), b""
        photo, label = self.pairs[index][:2]
        return label.numpy().tobytes(), rgba(photo)


def rgba(image: Tensor) -> bytes:
    """uint8 (3, H, W) -> H * W pixels, as a canvas takes them."""
    return torch.cat([image, torch.full_like(image[:1], 255)]).permute(1, 2, 0).cpu().numpy().tobytes()


def whole(text: str, below: int) -> int:
    """A whole number of a query. Raises UserError."""
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) >= below:
        raise UserError(f"{text[:30]!r} is not a whole number below {below}")
    return int(text)


class Handler(BaseHTTPRequestHandler):
    timeout = 20  # seconds that a slow sender or reader may pause
    log_message = lambda *_: None  # the terminal is for errors
    begun = False  # whether the answer has a head
    studio: Studio
    names: tuple[str, str]  # by which the page may call this machine, beside its addresses

    def handle(self) -> None:
        with suppress(OSError):  # the page is gone or too slow
            super().handle()

    def do_GET(self) -> None:
        try:
            host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
            name = urlsplit(f"//{host}").hostname or ""
            # A page of another site that lets its name point to this machine (DNS rebinding) sends that name.
            if name not in self.names and not re.fullmatch(r"[\d.]+|[\da-f]*:[\da-f:.]*", name):
                raise UserError(f"this server is not called {host[:100]!r}; open the page by its machine's address, or start "
                                f"paint.py with --host and this name")
            if origin not in (None, f"http://{host}"):
                raise UserError(f"this server answers its own page, not {origin[:100]}")
            body = self.rfile.read(whole(self.headers.get("Content-Length", "0"), MOST_BYTES))
            url, studio = urlsplit(self.path), self.studio
            given = dict(parse_qsl(url.query))
            match url.path.split("/")[1:]:
                case [""]:
                    self.reply(Path(__file__).with_name("paint.html").read_bytes(), "text/html; charset=utf-8")
                case ["model.json"]:
                    self.reply(json.dumps(studio.describe()).encode(), "application/json")
                case ["example" | "photo" as kind, index]:
                    self.reply(studio.example(whole(index, len(studio.files or studio.pairs)))[kind == "photo"])
                case ["label"]:
                    self.reply(studio.read_label(given.get("name", "the file")[:100], body))
                case ["draw"]:
                    self.reply(studio.draw(given.get("page", "")[:40], body, given, self.reply))
                case _:
                    raise UserError(f"{url.path[:60]}: there is nothing here")
        except OSError:
            raise
        except Exception as error:
            wrong = isinstance(error, ValueError)
            if not wrong:
                traceback.print_exc()
            if not self.begun:
                text = str(error) if wrong else f"{type(error).__name__} in paint.py: {str(error)[:200]}"
                self.reply(text.encode(), "text/plain; charset=utf-8", 400 if wrong else 500)

    do_POST = do_GET

    def reply(self, body: bytes, kind: str = "application/octet-stream", status: int = 200) -> None:
        """The answer, or its next part."""
        if not self.begun:
            self.begun = True
            self.send_response(status)
            for key, value in {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                               "X-Frame-Options": "DENY"}.items():
                self.send_header(key, value)
            self.end_headers()
        self.wfile.write(body)


def main(arguments: argparse.Namespace) -> None:
    loaded = load_generator(arguments.checkpoint or newest_checkpoint(), setup_distributed()[2], arguments.config)
    Handler.studio = studio = Studio(*loaded, arguments.labels)
    Handler.names = "localhost", arguments.host.lower()
    studio.draw("", bytes(studio.size[0] * studio.size[1]), {}, lambda picture: None)  # the first takes longer
    try:
        server = ThreadingHTTPServer((arguments.host, arguments.port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {arguments.host} --port {arguments.port}: {error}; choose others") from None
    address = f"http://{arguments.host}:{server.server_address[1]}"
    print(f"{address} shows the page; Ctrl-C ends it", flush=True)
    if not arguments.no_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        studio.newest.clear()  # ends what is being drawn
        print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the newest one in runs/")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration of an official checkpoint")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="label maps to start from")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, which this machine alone reaches")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--no-browser", action="store_true")
    run_script(lambda: main(parser.parse_args()))
