"""Paint a label map, see the picture: python paint.py [--checkpoint FILE] [--labels DIR] [--host 127.0.0.1]
                                                    [--port 8000] [--no-browser] [--config FILE]

opens a page in the browser. --labels names a folder of label maps to start from, in the forms that sample.py reads;
without it they are those of the data set's val split, if it is on disk. The page shows bit for bit what
`sample.py --labels DIR --seed S` makes of the label map that it saves, as long as that file is called painted.png.

Only this machine reaches the page, unless --host says otherwise (0.0.0.0: the network). Ctrl-C ends it.
"""

import argparse
import ipaddress
import json
import os
import queue
import re
import sys
import threading
import traceback
import webbrowser
import zlib
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkpoint import load_generator, newest_checkpoint
from config import UserError, run_script
from dataset import example_pairs
from distributed import setup_distributed
from interface import System
from labels import read_label_file

NAME = zlib.crc32(b"painted")  # the label map that the page saves is painted.png; sample.py draws noise by this name
QUICK_STEPS = 20               # at first, of a system that takes many
MOST_BYTES = 2 ** 24           # of a request
Image.MAX_IMAGE_PIXELS = 2 ** 23  # of a label file; Pillow refuses twice as many
PLAIN = {"num": 1, "resample": None, "interpolate": 0, "noise": "image", "steps": None, "guidance": None}


class Studio:
    """A generator, and the one thread that draws with it: of each page, only the newest picture that it asked for."""

    def __init__(self, system: System, generator: torch.nn.Module, state: dict, labels: Path | None):
        self.system, self.generator, self.state, self.size = system, generator, state, system.settings.data.size
        self.files = sorted(path for path in labels.glob("*") if path.suffix.lower() == ".png") if labels else []
        if labels and not self.files:
            raise UserError(f"{labels}: no label maps; --labels names a folder of PNG files")
        self.pairs = None if labels else example_pairs(system.settings.data, state["class_names"])
        self.count = len(self.files or self.pairs or ())  # of label maps to start from
        self.newest: dict[str, queue.SimpleQueue] = {}  # page -> what it waits for
        self.drawn = "", None  # the page and the queue of what is being drawn
        self.worker, self.change, self.reading = ThreadPoolExecutor(1), threading.Lock(), threading.Lock()
        for module in generator.modules():  # a newer stroke ends an older picture at its next layer
            module.register_forward_pre_hook(lambda *_: self.go_on())

    def describe(self) -> dict:
        """What the page must know of the model."""
        settings, options = self.system.settings, sorted(self.system.options)
        return {key: self.state[key] for key in ("class_names", "palette", "ids", "step")} | {
            "server": True, "name": settings.name, "size": self.size, "options": options, "examples": self.count,
            "photos": bool(self.pairs), "steps": min(QUICK_STEPS, settings.diffusion.steps)}

    def submit(self, page: str, body: bytes, given: dict[str, str]) -> queue.SimpleQueue:
        """Draw H * W bytes of classes as a query says, in the place of what the same page asked for before.

        Returns a queue of pictures, H * W RGB pixels each, coarse ones first, and last None; None alone if the page
        asks for another picture meanwhile, or if drawing fails. Raises UserError for a wrong request.
        """
        (height, width), classes = self.size, self.system.num_classes
        if len(body) != height * width or max(body) > classes:
            raise UserError(f"{len(body)} bytes; a label map of this model is {height * width}, {height} rows of "
                            f"{width} classes from 0 to {classes}: reload the page")
        label_map = torch.frombuffer(bytearray(body), dtype=torch.uint8).view(1, height, width).long()
        redraws = re.findall(r"(\d+)\.(\d+)", given.get("redraws", ""))
        redraws = [(whole(c, classes), whole(k, 1000)) for c, k in redraws]
        seed, interpolate = whole(given.get("seed", "0"), 2 ** 63), whole(given.get("interpolate", "0"), 1000)
        number = whole(given.get("number", "0"), max(interpolate, 1))
        options = PLAIN | {"interpolate": interpolate, "steps": whole(given.get("steps", "0"), 1001) or None}
        system, pictures = self.system.with_options(argparse.Namespace(**options)), queue.SimpleQueue()

        def finish(image: Tensor) -> None:
            pictures.put(image.permute(1, 2, 0).cpu().numpy().tobytes())

        def draw(number: int, **changes) -> Tensor:
            maps = [label_map.to(next(self.generator.parameters()).device)]
            coarse = lambda image: None if pictures.qsize() else finish(image)  # who reads slowly gets fewer of them
            preview = coarse if "steps" in system.options else None
            wanted = argparse.Namespace(**options | changes)
            return next(system.draw(self.generator, maps, (seed, NAME), wanted, [number], preview)).cpu()

        @torch.no_grad()
        def run() -> None:
            self.drawn = page, pictures
            try:
                self.go_on()
                image = None if redraws else draw(number)
                for c, k in redraws:  # each class is pasted from the picture in which it alone is redrawn
                    redrawn = draw(k, resample=c, num=k + 1, interpolate=0)
                    image = redrawn if image is None else torch.where(label_map == c, redrawn, image)
                finish(image)
            except CancelledError:
                pass
            except Exception:  # the page goes on, whatever becomes of one picture
                traceback.print_exc()
            pictures.put(None)

        with self.change:
            self.newest[page] = pictures
        self.worker.submit(run)
        return pictures

    def go_on(self) -> None:
        """Raise CancelledError if nobody waits any more for what is being drawn."""
        page, pictures = self.drawn
        if self.newest.get(page) is not pictures:
            raise CancelledError

    def read_label(self, path: str | Path, content: bytes | None = None) -> bytes:
        """A label file by the rules of sample.py -> H * W classes. Raises UserError."""
        with self.reading:  # one at a time: a large one takes memory
            label = read_label_file(path, self.system.num_classes, self.state["palette"], self.state["ids"], content)
            return Image.fromarray(label).resize(self.size[::-1], Image.Resampling.NEAREST).tobytes()

    def example(self, index: int) -> tuple[bytes, bytes]:
        """A label map to start from, H * W classes, and of a pair the photo, H * W RGB pixels. Raises UserError."""
        if self.files:
            return self.read_label(self.files[index]), b""
        photo, label = self.pairs[index][:2]
        return label.numpy().tobytes(), photo.permute(1, 2, 0).numpy().tobytes()


def whole(text: str, below: int) -> int:
    """A whole number of a query. Raises UserError."""
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) >= below:
        raise UserError(f"{text[:30]!r} is not a whole number below {below}")
    return int(text)


class Handler(BaseHTTPRequestHandler):
    timeout = 20  # seconds that a slow sender or reader may pause
    log_message = lambda *_: None  # the terminal is for errors
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
            if name not in self.names and not ipaddress.ip_address(name) or origin not in (None, f"http://{host}"):
                raise UserError(f"this server answers its own page, not {origin}")
            body = self.rfile.read(whole(self.headers.get("Content-Length", "0"), MOST_BYTES))
            url = urlsplit(self.path)
            self.answer(f"{self.command} {url.path}", dict(parse_qsl(url.query)), body)
        except ValueError as error:
            self.reply(str(error).encode(), "text/plain; charset=utf-8", 400)

    do_POST = do_GET

    def answer(self, what: str, given: dict[str, str], body: bytes) -> None:
        """Answer "METHOD /path" with its query and body. Raises UserError."""
        if what == "GET /":
            self.reply(Path(__file__).with_name("paint.html").read_bytes(), "text/html; charset=utf-8")
        elif what == "GET /model.json":
            self.reply(json.dumps(self.studio.describe()).encode(), "application/json")
        elif what in ("GET /example", "GET /photo"):
            index = whole(given.get("index", ""), self.studio.count)
            self.reply(self.studio.example(index)[what == "GET /photo"])
        elif what == "POST /label":
            self.reply(self.studio.read_label(given.get("name", "the file")[:100], body))
        elif what == "POST /draw":
            self.draw(given.get("page", "")[:40], body, given)
        else:
            raise UserError(f"{what[:60]}: there is nothing here")

    def draw(self, page: str, body: bytes, given: dict[str, str]) -> None:
        """Send the pictures one after the other, each H * W * 3 bytes; the last is the one that was asked for."""
        pictures = self.studio.submit(page, body, given)
        try:
            if (first := pictures.get()) is None:
                raise UserError("no picture: the page wants a newer one, or the terminal of paint.py says what failed")
            self.reply(first)
            while picture := pictures.get():
                self.wfile.write(picture)
        finally:
            with self.studio.change:
                if self.studio.newest.get(page) is pictures:
                    del self.studio.newest[page]

    def reply(self, body: bytes, kind: str = "application/octet-stream", status: int = 200) -> None:
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
    studio.submit("", bytes(np.prod(studio.size)), {}).get()  # the first picture takes longer
    try:
        server = ThreadingHTTPServer((arguments.host, arguments.port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {arguments.host} --port {arguments.port}: {error}; choose others") from None
    address = f"http://{arguments.host}:{server.server_address[1]}"
    print(f"{address} shows the page; Ctrl-C ends it", flush=True)
    if not arguments.no_browser and (os.name == "nt" or sys.platform == "darwin" or os.environ.get("DISPLAY")):
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        studio.newest.clear()  # ends what is being drawn
        print()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the newest one in runs/")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration of an official checkpoint")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="label maps to start from")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no-browser", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(lambda: main(parse_arguments()))
