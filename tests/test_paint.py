"""The painting page: what its server answers, against sample.py; and, under the marker `browser`, the page itself."""

import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from torch import nn

import sample as sample_script
import scenes
from checkpoint import label_state, load_generator, save_checkpoint
from config import UserError, check_settings
from interface import System
from labels import label_format
from paint import Studio, main
from systems import system_for

SDM = {"name": "sdm", "base_channels": 32, "multipliers": [1, 1], "num_res_blocks": 1, "attention_strides": [2],
       "head_channels": 32, "spade_channels": 8}


def write_checkpoint(path: Path, **changes) -> Path:
    """A checkpoint with random weights."""
    settings = check_settings({**TINY, **changes}, "test")
    form = label_format(settings.data)
    torch.manual_seed(0)
    generator = system_for(settings, form.num_classes).build()
    for parameter in generator.parameters():
        if not parameter.any():  # zeros, as at the start of training, would hide what they multiply
            nn.init.normal_(parameter, std=0.05)
    save_checkpoint({**label_state(form), "config": settings.model_dump(mode="json"), "step": 7,
                     "ema": generator.state_dict()}, path)
    return path


class Server:
    """paint.py in a process of its own."""

    def __init__(self, folder: Path, *arguments, port: int = 0):
        command = [sys.executable, ROOT / "paint.py", "--no-browser", "--port", port, *arguments]
        self.process = subprocess.Popen([str(part) for part in command], cwd=folder, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        line = self.process.stdout.readline()
        assert line.startswith("http://"), self.process.stderr.read()
        self.address = line.split()[0]
        self.port = int(self.address.rsplit(":", 1)[1])

    def ask(self, method: str, path: str, body: bytes = b"", **headers) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body or None, {key.replace("_", "-"): value for key, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content

    def end(self) -> str:
        self.process.send_signal(signal.SIGINT)
        errors = self.process.communicate(timeout=30)[1]
        assert self.process.returncode == 0, errors
        return errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with random weights, a label map with the name that the page saves, and a folder of others."""
    folder = tmp_path_factory.mktemp("paint")
    write_checkpoint(folder / "runs/tiny/checkpoints/latest.pt")
    (folder / "labels").mkdir()
    Image.fromarray(scenes.render("val", 3, (32, 32))[1]).save(folder / "labels/painted.png")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder)
    yield server
    assert server.end() == ""


@pytest.fixture(scope="module")
def label(folder) -> np.ndarray:
    return np.asarray(Image.open(folder / "labels/painted.png"))


@pytest.fixture
def sample(folder, monkeypatch, tmp_path):
    """sample("--seed", 5, ...): the pixels of the pictures that sample.py makes of the label map."""
    def call(*arguments) -> list[bytes]:
        out = Path(tempfile.mkdtemp(dir=tmp_path)) / "out"
        command = ["sample.py", "--labels", folder / "labels", "--out", out, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        monkeypatch.chdir(folder)
        sample_script.main(sample_script.parse_arguments())
        paths = sorted(out.glob("*.png"), key=lambda path: int("0" + path.stem.removeprefix("painted").removeprefix("_")))
        return [np.asarray(Image.open(path)).tobytes() for path in paths]
    return call


def test_pictures_are_those_of_sample_py(server, label, sample):
    draw = lambda query: server.ask("POST", f"/draw?page=a&{query}", label.tobytes())
    assert draw("seed=5") == (200, sample("--seed", 5)[0])
    walk = sample("--seed", 5, "--interpolate", 21)
    assert draw("seed=5&interpolate=21&number=13") == (200, walk[13])
    classes = np.unique(label)[:2].tolist()
    first, second = (sample("--seed", 5, "--num", 3, "--resample", c) for c in classes)
    assert draw(f"seed=5&redraws={classes[0]}.2") == (200, first[2])
    pixels = lambda picture: np.frombuffer(picture, np.uint8).reshape(32, 32, 3)
    pasted = np.where((label == classes[1])[..., None], pixels(second[1]), pixels(first[2]))
    assert draw(f"seed=5&redraws={classes[0]}.2,{classes[1]}.1") == (200, pasted.tobytes())
    assert (pixels(first[2]) != pixels(sample("--seed", 5)[0]))[label == classes[0]].any()


def test_label_files_are_read_by_the_rules_of_sample_py(server, label, sample, folder, tmp_path):
    def png(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    colors = np.array([color for _, color in scenes.CLASSES] + [(0, 0, 0)], np.uint8)
    indexed = Image.fromarray(label)
    indexed.putpalette(colors.flatten().tolist())
    for image in (Image.fromarray(label), Image.fromarray(colors[label]), indexed,
                  Image.fromarray(label).resize((96, 160), Image.Resampling.NEAREST)):
        assert server.ask("POST", "/label?name=a.png", png(image)) == (200, label.tobytes())
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(png(Image.fromarray(np.full((8, 8), 77, np.uint8))))
    with pytest.raises(UserError) as error:
        sample("--labels", tmp_path)
    status, text = server.ask("POST", f"/label?name={wrong}", wrong.read_bytes())
    assert (status, text.decode()) == (400, str(error.value)) and "77" in text.decode()
    huge = png(Image.new("L", (5000, 5000)))
    for body in (b"", b"no picture", png(indexed)[:100], huge):
        status, text = server.ask("POST", "/label?name=a.png", body)
        assert status == 400 and text.startswith(b"a.png: ") and b"\n" not in text


def test_examples_are_those_of_the_data_set_or_the_folder(folder, server, label):
    described = json.loads(server.ask("GET", "/model.json")[1])
    assert described["examples"] == scenes.LENGTHS["val"] and described["photos"]
    photo, drawn = scenes.render("val", 3, (32, 32))
    assert server.ask("GET", "/example?index=3") == (200, drawn.tobytes())
    assert server.ask("GET", "/photo?index=3") == (200, photo.tobytes())
    studio = Studio(*load_generator(folder / "runs/tiny/checkpoints/latest.pt"), folder / "labels")
    assert studio.describe()["examples"] == 1 and studio.example(0)[0] == label.tobytes()


def test_wrong_requests_get_a_sentence(server, label):
    body = label.tobytes()
    wrong = [("GET", "/nothing", b"", {}), ("GET", "/../paint.py", b"", {}), ("GET", "/example?index=500", b"", {}),
             ("GET", "/example?index=../1", b"", {}), ("GET", "/example", b"", {}), ("POST", "/", body, {}),
             ("POST", "/draw", b"", {}), ("POST", "/draw", body[1:], {}), ("POST", "/draw", b"\xff" * len(body), {}),
             ("POST", "/draw?seed=-1", body, {}), ("POST", "/draw?seed=9999999999999999999", body, {}),
             ("POST", "/draw?number=1", body, {}), ("POST", "/draw?redraws=12.0", body, {}),
             ("POST", "/draw?interpolate=x", body, {}), ("GET", "//[", b"", {}),
             ("GET", "/", b"", {"Host": "evil.example"}), ("GET", "/", b"", {"Host": ""}), ("GET", "/", b"", {"Host": "[::1"}),
             ("POST", "/draw", body, {"Origin": "http://evil.example"}), ("POST", "/draw", body, {"Origin": "null"}),
             ("POST", "/draw", b"", {"Content-Length": str(10 ** 9)}), ("POST", "/draw", b"", {"Content-Length": "-1"})]
    for method, path, content, headers in wrong:
        status, text = server.ask(method, path, content, **headers)
        assert 400 <= status < 500 and 10 < len(text) < 400 and b"Traceback" not in text, (method, path, headers, text)
    address = {"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}
    assert server.ask("POST", "/draw", body, **address)[0] == 200


def test_many_quick_requests_leave_threads_and_memory_as_they_were(server, label):
    def state() -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines())
        return int(lines["Threads"]), int(lines["VmRSS"].split()[0])

    def many(tab: int) -> None:
        for i in range(100):
            status, content = server.ask("POST", f"/draw?page=tab{tab}&seed={i}", label.tobytes())
            answers.append((status, len(content)))

    def run_all() -> None:
        tabs = [threading.Thread(target=many, args=(i // 2,)) for i in range(10)]  # two of the same page end each other's
        for tab in tabs:
            tab.start()
        for tab in tabs:
            tab.join()
        time.sleep(0.5)

    answers = []
    run_all()
    before = state()
    run_all()
    assert len(answers) == 2000 and {status for status, _ in answers} <= {200, 400}
    assert (200, 32 * 32 * 3) in answers
    assert state()[0] <= before[0] and state()[1] < before[1] + 30_000  # kB; a picture a request would be 3 MB


def test_coarse_pictures_come_first_and_the_last_is_that_of_sample_py(tmp_path, label, sample):
    path = write_checkpoint(tmp_path / "sdm.pt", generator=SDM, diffusion={"steps": 8})
    studio = Studio(*load_generator(path), None)
    assert studio.describe()["steps"] == 8 and set(studio.describe()["options"]) == {"steps", "guidance"}
    queue = studio.submit("a", label.tobytes(), {"seed": "2", "steps": "4"})
    pictures = list(iter(queue.get, None))
    assert len(pictures) > 1 and pictures[-1] == sample("--seed", 2, "--steps", 4, "--checkpoint", path)[0]
    with pytest.raises(UserError, match="steps"):
        studio.submit("a", label.tobytes(), {"steps": "1"})


class Slow(System):
    """Draws for two seconds, in two hundred layers."""

    options = frozenset()

    def draw(self, generator, maps, key, options, numbers=None, preview=None):
        for _ in range(200):
            generator(maps[0])
        yield torch.full((3, 4, 4), key[0], dtype=torch.uint8)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        time.sleep(0.01)
        return x


def test_a_newer_request_of_a_page_ends_its_older_one():
    settings = check_settings({"data": {"size": [4, 4]}}, "test")
    state = {**label_state(label_format(settings.data)), "step": 0}
    studio, body = Studio(Slow(settings, 12), Layer(), state, None), bytes(16)
    started = time.perf_counter()
    older = [studio.submit("a", body, {"seed": "1"}) for _ in range(5)]
    time.sleep(0.2)
    newest, other = studio.submit("a", body, {"seed": "2"}), studio.submit("b", body, {"seed": "3"})
    assert [queue.get(timeout=5) for queue in older] == [None] * 5
    assert time.perf_counter() - started < 1  # the first was begun, and ended in the middle
    assert newest.get(timeout=5) == bytes([2]) * 48 and newest.get(timeout=5) is None
    assert other.get(timeout=5) == bytes([3]) * 48


def test_without_a_model_or_label_maps_it_says_what_to_do(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"config": None, "labels": None, "host": "127.0.0.1", "port": 0, "no_browser": True}
    checkpoint = folder / "runs/tiny/checkpoints/latest.pt"
    for changes, said in (({"checkpoint": None}, "train.py --config config.yaml"), ({"port": 99999}, "--port 99999"),
                          ({"labels": Path("no_such")}, "no_such")):
        with pytest.raises(UserError, match=said):
            main(Namespace(**{"checkpoint": checkpoint} | given | changes))


# The page in a browser, with a server and without.

RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "package"))  # npm pack onnxruntime-web && tar xf ...


@pytest.fixture(scope="module")
def static(folder):
    """The address of an exported folder behind a plain web server."""
    pytest.importorskip("onnxruntime")
    if not (RUNTIME / "dist").is_dir():
        pytest.skip(f"no onnxruntime-web at {RUNTIME}; npm pack onnxruntime-web && tar xf onnxruntime-web-*.tgz")
    import export
    export.main(Namespace(checkpoint=folder / "runs/tiny/checkpoints/latest.pt", config=None, out=folder / "page", runtime=RUNTIME))
    handler = partial(SimpleHTTPRequestHandler, directory=folder / "page")
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,720"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    driver.downloads = downloads
    yield driver
    driver.quit()


class Page:
    """The page, opened anew, in the hands of a person."""

    def __init__(self, driver, address: str):
        self.driver = driver
        driver.get("about:blank")
        driver.get(address)
        self.settle()

    def js(self, expression: str, *given):
        return self.driver.execute_script(f"return {expression}", *given)

    def until(self, condition: str) -> None:
        end = time.monotonic() + 60
        while not self.js(condition):
            assert time.monotonic() < end, (condition, self.said())
            time.sleep(0.02)

    def settle(self) -> None:
        self.until("wanted > 0 && drawn === wanted && drawing === null && !queue.length")

    def said(self) -> str:
        return self.driver.find_element("id", "status").text

    def click(self, name: str) -> None:
        self.driver.find_element("id", name).click()

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains
        ActionChains(self.driver).send_keys(*keys).perform()

    def choose(self, name: str) -> None:
        self.driver.find_element("css selector", f"#classes [title='{name}']").click()

    def drag(self, *points: tuple[int, int], shift: bool = False) -> None:
        """Mouse down at the first pixel, over the others, up at the last."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys
        left, top, scale = self.js("[$('map').getBoundingClientRect()].map(box => [box.left, box.top, box.width / W])[0]")
        actions = ActionChains(self.driver, duration=10)
        if shift:
            actions.key_down(Keys.SHIFT).perform()
        pointer = actions.w3c_actions.pointer_action
        for i, (x, y) in enumerate(points):
            pointer.move_to_location(round(left + (x + 0.5) * scale), round(top + (y + 0.5) * scale))
            if i == 0:
                pointer.pointer_down()
        pointer.pointer_up()
        actions.perform()
        if shift:
            ActionChains(self.driver).key_up(Keys.SHIFT).perform()

    def map(self) -> np.ndarray:
        return np.array(self.js("[...map]"), np.uint8).reshape(32, 32)

    def picture(self) -> np.ndarray:
        self.settle()
        return np.array(self.js("[...picture]"), np.uint8).reshape(32, 32, 3)

    def download(self, button: str, name: str) -> Path:
        path = self.driver.downloads / name
        path.unlink(missing_ok=True)
        self.click(button)
        end = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        return path


@pytest.fixture(params=["server", "static"])
def page(request, driver):
    given = request.getfixturevalue(request.param)
    return Page(driver, given if isinstance(given, str) else given.address)


@pytest.mark.browser
def test_painting_with_the_mouse(page):
    class_of = [name for name, _ in scenes.CLASSES].index
    page.choose("sky")
    page.click("clear")
    expected = np.zeros((32, 32), np.uint8)
    assert np.array_equal(page.map(), expected)
    page.choose("building")
    page.keys("r")
    page.drag((20, 30), (25, 20), (28, 10))
    expected[10:31, 20:29] = class_of("building")
    assert np.array_equal(page.map(), expected)
    page.keys("f", str(class_of("grass") + 1))
    page.drag((0, 31))
    expected[expected == 0] = class_of("grass")
    assert np.array_equal(page.map(), expected)
    page.choose("road")
    page.keys("b", *"[" * 40)
    page.drag((2, 2), (12, 7), (2, 12), shift=True)  # straight from start to end
    expected[2:13, 2] = class_of("road")
    assert np.array_equal(page.map(), expected)
    page.choose("tree")
    page.keys(*"]" * 4)
    page.drag((10, 20))  # a disc five pixels wide
    y, x = np.ogrid[:32, :32]
    expected[(x - 10) ** 2 + (y - 20) ** 2 <= 2.5 ** 2] = class_of("tree")
    assert np.array_equal(page.map(), expected)
    painted = page.map()
    page.keys(*"[" * 4)
    for i in range(60):  # a pixel each
        page.drag((i % 32, 30 + i // 32))
    last = page.map()
    for _ in range(60):
        page.click("undo")
    assert np.array_equal(page.map(), painted)
    for _ in range(60):
        page.click("redo")
    assert np.array_equal(page.map(), last)
    page.keys("p")
    page.drag((24, 12))
    assert page.js("current") == class_of("building")
    names = page.js("[...document.querySelectorAll('#classes span')].map(row => row.textContent)")
    assert set(names[:4]) == {"grass", "road", "building", "tree"} and len(names) == 13


@pytest.mark.browser
def test_searching_for_a_class(page):
    page.keys("/", "per")
    assert page.js("[...document.querySelectorAll('#classes span')].map(row => row.textContent)") == ["person"]
    page.keys("\ue007")  # Enter
    assert page.js("name(current)") == "person" and page.js("document.querySelectorAll('#classes button').length") == 13


@pytest.mark.browser
def test_redrawing_a_class_keeps_the_rest(page):
    page.choose("grass")
    page.click("clear")
    page.choose("sky")
    page.keys("r")
    page.drag((0, 0), (31, 12))
    before, sky = page.picture(), page.map() == 0
    page.click("redraw")
    after = page.picture()
    assert np.array_equal(after[~sky], before[~sky]) and (after[sky] != before[sky]).any()
    page.choose("grass")
    page.click("redraw")
    both = page.picture()
    assert np.array_equal(both[sky], after[sky]) and (both[~sky] != after[~sky]).any()
    page.click("another")
    assert (page.picture() != both).any() and page.js("noise") == {"seed": 1, "walk": 0, "redraws": {}}


@pytest.mark.browser
def test_variations_and_the_walk_between_noises(page):
    page.click("six")
    page.settle()
    assert page.js("$('variations').children.length") == 6 and page.js("noise.seed") == 0
    page.js("$('variations').children[3].click()")
    picture = page.picture()
    assert page.js("noise.seed") == 4
    page.js("($('walk').value = 10, $('walk').oninput())")
    middle = page.picture()
    page.js("($('walk').value = 0, $('walk').oninput())")
    assert np.array_equal(page.picture(), picture) and (middle != picture).any()


@pytest.mark.browser
def test_what_is_saved_comes_back(page, sample):
    page.choose("tree")
    page.drag((5, 5), (20, 25))
    page.click("another")
    page.click("redraw")
    labels, picture = page.map(), page.picture()
    colors = np.array([color for _, color in scenes.CLASSES] + [(0, 0, 0)], np.uint8)
    saved = page.download("saveMap", "painted.png")
    assert np.array_equal(np.asarray(Image.open(saved)), colors[labels])
    assert np.array_equal(np.asarray(Image.open(page.download("savePicture", "painted_picture.png"))), picture)
    both = np.asarray(Image.open(page.download("saveBoth", "painted_both.png")))
    assert np.array_equal(both, np.concatenate([colors[labels], picture], axis=1))
    if page.js("model.server"):
        folder = Path(tempfile.mkdtemp(dir=saved.parent))
        shutil.copy(saved, folder)
        assert sample("--labels", folder, "--seed", 1, "--resample", "tree") == [picture.tobytes()]
    time.sleep(0.5)  # the link follows a moment later
    link = page.js("location.href")
    again = Page(page.driver, link)
    assert np.array_equal(again.map(), labels) and np.array_equal(again.picture(), picture)
    again.click("clear")
    again.driver.find_element("id", "open").send_keys(str(saved))
    again.until("new Set(map).size > 1")
    assert np.array_equal(again.map(), labels)
    wrong = saved.parent / "wrong.png"
    Image.fromarray(np.full((8, 8, 3), (1, 2, 3), np.uint8)).save(wrong)
    again.driver.find_element("id", "open").send_keys(str(wrong))
    again.until("$('status').className === 'wrong'")
    assert again.said().startswith("wrong.png: ") and np.array_equal(again.map(), labels)


@pytest.mark.browser
def test_painting_goes_on_while_the_server_is_away(folder, driver):
    server = Server(folder)
    page = Page(driver, server.address)
    page.choose("grass")
    page.click("clear")
    before = page.picture()
    assert server.end() == ""
    page.choose("road")
    page.drag((3, 3), (25, 25))
    page.until("$('status').className === 'wrong'")
    assert "no answer" in page.said() and (page.map() == 4).any()
    server = Server(folder, port=server.port)
    page.settle()
    assert "drawn in" in page.said() and (page.picture() != before).any()
    assert server.end() == ""
