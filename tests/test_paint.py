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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from torch import nn

import sample as sample_script
import scenes
from checkpoint import label_state, load_generator, save_checkpoint
from config import UserError, check_settings
from labels import label_format
from paint import Studio, main
from systems import system_for

SDM = {"name": "sdm", "base_channels": 32, "multipliers": [1, 1], "num_res_blocks": 1, "attention_strides": [2],
       "head_channels": 32, "spade_channels": 8}
OASIS = {"name": "oasis", "channels": 2, "z_dim": 8}
COLORS = np.array([color for _, color in scenes.CLASSES] + [(0, 0, 0)], np.uint8)
pixels = lambda picture: np.frombuffer(picture, np.uint8).reshape(32, 32, 4)[..., :3]


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

    def __init__(self, folder: Path, port: int = 0):
        command = [sys.executable, str(ROOT / "paint.py"), "--no-browser", "--port", str(port)]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"},  # in the background it is ignored:
                                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        line = self.process.stdout.readline()
        assert line.startswith("http://"), self.process.stderr.read()
        self.address = line.split()[0]
        self.port = int(self.address.rsplit(":", 1)[1])

    def ask(self, path: str, body: bytes = b"", **headers) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST" if body else "GET", path, body, {key.replace("_", "-"): headers[key] for key in headers})
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
    """sample("--seed", 5, ...): the pictures that sample.py makes of the label map."""
    def call(*arguments) -> list[np.ndarray]:
        out = Path(tempfile.mkdtemp(dir=tmp_path)) / "out"
        command = ["sample.py", "--labels", folder / "labels", "--out", out, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        monkeypatch.chdir(folder)
        sample_script.main(sample_script.parse_arguments())
        paths = sorted(out.glob("*.png"), key=lambda path: int("0" + path.stem.removeprefix("painted").removeprefix("_")))
        return [np.asarray(Image.open(path)) for path in paths]
    return call


def test_pictures_are_those_of_sample_py(server, label, sample):
    def draw(query: str) -> np.ndarray:
        status, picture = server.ask(f"/draw?page=a&seed=5&{query}", label.tobytes())
        assert status == 200, picture
        return pixels(picture)

    plain, walk = sample("--seed", 5)[0], sample("--seed", 5, "--interpolate", 21)
    assert np.array_equal(draw(""), plain) and np.array_equal(draw("walk=13"), walk[13])
    c, d = np.unique(label)[:2].tolist()
    first, second = (sample("--seed", 5, "--num", 3, "--resample", number) for number in (c, d))
    assert np.array_equal(draw(f"redraws={c}.2"), first[2]) and (first[2] != plain)[label == c].any()
    assert np.array_equal(draw(f"redraws={c}.2,{d}.1"), np.where((label == d)[..., None], second[1], first[2]))
    both = sample("--seed", 5, "--num", 2, "--resample", c, "--interpolate", 21)  # the class redrawn, on the walk
    assert len(both) == 2 * 21 and np.array_equal(draw(f"walk=13&redraws={c}.1"), both[21 + 13])
    assert np.array_equal(both[21 + 13][label != c], walk[13][label != c])
    assert (both[21 + 13] != walk[13])[label == c].any() and (both[13] != both[21 + 13])[label == c].any()


@pytest.mark.parametrize("generator, options", [
    (OASIS, {"noise": "class"}), (OASIS, {"noise": "pixel"}), (SDM, {"steps": "10", "guidance": "2.0"}), (SDM, {})])
def test_options_are_those_of_sample_py(generator, options, tmp_path, label, sample):
    path, coarse = write_checkpoint(tmp_path / "latest.pt", generator=generator, diffusion={"steps": 8}), []
    studio = Studio(*load_generator(path), None)
    picture = studio.draw("a", label.tobytes(), {"seed": "2"} | options, coarse.append)
    given = [part for option, value in options.items() for part in (f"--{option}", value)]
    assert np.array_equal(pixels(picture), sample("--seed", 2, "--checkpoint", path, *given)[0])
    assert len(coarse) == (int(options.get("steps", 8)) if generator is SDM else 0)
    assert set(studio.describe()["choices"]) == ({"steps", "guidance"} if generator is SDM else {"noise"})
    wrong = {"steps": "1", "noise": "pink"} if not options else options | {"walk": "3"} if generator is OASIS else {"guidance": "x"}
    with pytest.raises(UserError):
        studio.draw("a", label.tobytes(), wrong, coarse.append)


def test_label_files_are_read_by_the_rules_of_sample_py(server, label, sample, tmp_path):
    def png(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    for image in (Image.fromarray(label), Image.fromarray(COLORS[label]),
                  Image.fromarray(label).resize((96, 160), Image.Resampling.NEAREST)):
        assert server.ask("/label?name=a.png", png(image)) == (200, label.tobytes())
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(png(Image.fromarray(np.full((8, 8), 77, np.uint8))))
    with pytest.raises(UserError) as error:
        sample("--labels", tmp_path)
    assert server.ask(f"/label?name={wrong}", wrong.read_bytes()) == (400, str(error.value).encode())
    for body in (b"no picture", png(Image.fromarray(label))[:100], png(Image.new("L", (5000, 5000)))):
        status, text = server.ask("/label?name=a.png", body)
        assert status == 400 and text.startswith(b"a.png: ") and b"\n" not in text and b"BytesIO" not in text


def test_examples_are_those_of_the_data_set_or_the_folder(folder, server, label):
    described = json.loads(server.ask("/model.json")[1])
    assert described["examples"] == 24 and described["photos"]
    photo, drawn = scenes.render("val", 3 * scenes.LENGTHS["val"] // 24, (32, 32))
    assert server.ask("/example/3") == (200, drawn.tobytes())
    assert np.array_equal(pixels(server.ask("/photo/3")[1]), photo)
    studio = Studio(*load_generator(folder / "runs/tiny/checkpoints/latest.pt"), folder / "labels")
    assert studio.describe()["examples"] == 1 and studio.example(0)[0] == label.tobytes()


def test_wrong_requests_get_a_sentence(server, label):
    body = label.tobytes()
    wrong = [("/nothing", b"", {}), ("/../paint.py", b"", {}), ("/example/24", b"", {}), ("/example/../1", b"", {}),
             ("/example/", b"", {}), ("/draw", b"", {}), ("/draw", body[1:], {}), ("/draw", b"\xff" * len(body), {}),
             ("/draw?seed=-1", body, {}), ("/draw?seed=9999999999999999999", body, {}), ("/draw?walk=21", body, {}),
             ("/draw?redraws=12.0", body, {}), ("//[", b"", {}),
             ("/", b"", {"Host": "evil.example"}), ("/", b"", {"Host": ""}), ("/", b"", {"Host": "[::1"}),
             ("/draw", body, {"Origin": "http://evil.example"}), ("/draw", body, {"Origin": "null"}),
             ("/draw", b"", {"Content-Length": str(10 ** 9)}), ("/draw", b"", {"Content-Length": "-1"})]
    for path, content, headers in wrong:
        status, text = server.ask(path, content, **headers)
        assert 400 <= status < 500 and 10 < len(text) < 400 and b"Traceback" not in text, (path, headers, text)
    address = {"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}
    assert server.ask("/draw", body, **address)[0] == 200


def test_many_quick_requests_leave_threads_and_memory_as_they_were(server, label):
    def state() -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines())
        return int(lines["Threads"]), int(lines["VmRSS"].split()[0])

    def ask(i: int) -> tuple[int, int]:
        status, content = server.ask(f"/draw?page=tab{i % 5}&seed={i}", label.tobytes())
        return status, len(content)

    with ThreadPoolExecutor(10) as pool:  # two of the same page end each other's
        list(pool.map(ask, range(1000)))
        before = state()
        answers = set(pool.map(ask, range(1000)))
    assert {status for status, _ in answers} <= {200, 400} and (200, 32 * 32 * 4) in answers
    assert state()[0] <= before[0] + 1 and state()[1] < before[1] + 30_000  # kB; a picture a request would be 4 MB


def test_a_newer_request_of_a_page_ends_its_older_one(folder, label):
    system, generator, state = load_generator(folder / "runs/tiny/checkpoints/latest.pt")
    for module in generator.modules():
        module.register_forward_pre_hook(lambda *_: time.sleep(0.02))  # seconds for a picture
    studio, pool = Studio(system, generator, state, None), ThreadPoolExecutor(3)
    draw = lambda page, seed: studio.draw(page, label.tobytes(), {"seed": seed}, lambda picture: None)
    begun = time.perf_counter()
    alone = draw("c", "2")
    begun, whole = time.perf_counter(), time.perf_counter() - begun
    older = pool.submit(draw, "a", "1")
    time.sleep(0.2)
    newest, other = pool.submit(draw, "a", "2"), pool.submit(draw, "b", "2")
    with pytest.raises(UserError, match="newer"):
        older.result()
    assert time.perf_counter() - begun < whole / 2  # it ended in the middle
    assert newest.result() == other.result() == alone


def test_without_a_model_or_label_maps_it_says_what_to_do(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"config": None, "labels": None, "host": "127.0.0.1", "port": 0, "no_browser": True}
    checkpoint = folder / "runs/tiny/checkpoints/latest.pt"
    for changes, said in (({"checkpoint": None}, "train.py --config config.yaml"), ({"port": 99999}, "--port 99999"),
                          ({"labels": Path("no_such")}, "no_such")):
        with pytest.raises(UserError, match=said):
            main(Namespace(**{"checkpoint": checkpoint} | given | changes))


# The page in a browser, with a server and without.

ENTER, SHIFT, CONTROL = "\ue007", "\ue008", "\ue009"
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "package"))  # npm pack onnxruntime-web && tar xf ...


@pytest.fixture(scope="module")
def static(folder):
    """The address of an exported folder behind a plain web server."""
    import export
    export.main(Namespace(checkpoint=folder / "runs/tiny/checkpoints/latest.pt", config=None, out=folder / "page", runtime=RUNTIME))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder / "page"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
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

    def js(self, expression: str):
        return self.driver.execute_script(f"return {expression}")

    def until(self, condition: str) -> None:
        end = time.monotonic() + 60
        while not self.js(condition):
            assert time.monotonic() < end, (condition, self.said())
            time.sleep(0.02)

    def settle(self) -> None:
        self.until("wanted > 0 && drawn === wanted && job === null && !queue.length")

    def said(self) -> str:
        return self.driver.find_element("id", "status").text

    def click(self, *names: str) -> None:
        for name in names:
            self.driver.find_element("id", name).click()

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def control(self, letter: str, count: int) -> None:
        ActionChains(self.driver).key_down(CONTROL).send_keys(letter * count).key_up(CONTROL).perform()

    def choose(self, name: str) -> None:
        self.driver.find_element("css selector", f"#classes [title='{name}']").click()

    def drag(self, *points: tuple[int, int], key: str = "") -> None:
        """Mouse down at the first pixel, over the others, up at the last, with a key held."""
        left, top, width, height = self.js("Object.values($('map').getBoundingClientRect().toJSON()).slice(0, 4)")
        scale = min(width, height) / 32
        actions = ActionChains(self.driver, duration=10)
        if key:
            actions.key_down(key)
        for i, (x, y) in enumerate(points):
            actions.w3c_actions.pointer_action.move_to_location(round(left + width / 2 + (x - 15.5) * scale),
                                                                round(top + height / 2 + (y - 15.5) * scale))
            actions.w3c_actions.key_action.pause()
            if i == 0:
                actions.click_and_hold()
        actions.release()
        if key:
            actions.key_up(key)
        actions.perform()

    def map(self) -> np.ndarray:
        return np.array(self.js("[...map]"), np.uint8).reshape(32, 32)

    def names(self) -> list[str]:
        return self.js("[...document.querySelectorAll('#classes span')].map(row => row.textContent)")

    def picture(self) -> np.ndarray:
        self.settle()
        return pixels(bytes(self.js("[...picture]")))

    def open(self, path: Path, then: str) -> None:
        self.driver.find_element("id", "open").send_keys(str(path))
        self.until(then)

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
    page.drag((2, 2), (12, 7), (2, 12), key=SHIFT)  # straight from start to end
    expected[2:13, 2] = class_of("road")
    assert np.array_equal(page.map(), expected)
    page.choose("tree")
    page.keys(*"]" * 4)
    page.drag((10, 20))  # a disc five pixels wide
    y, x = np.ogrid[:32, :32]
    expected[(x - 10) ** 2 + (y - 20) ** 2 <= 2.5 ** 2] = class_of("tree")
    assert np.array_equal(page.map(), expected)
    assert set(page.names()[:4]) == {"grass", "road", "building", "tree"} and len(page.names()) == 13
    page.keys("p")
    page.drag((24, 12))
    assert page.js("name(current)") == "building"
    page.keys("/", "per")
    assert page.names() == ["person"]
    page.keys(ENTER)
    assert page.js("name(current)") == "person" and len(page.names()) == 13
    page.js("[...Array(60).keys()].forEach(i => { choose(i % 12); actions.clear(); })")
    page.control("z", 60)
    assert np.array_equal(page.map(), expected)
    page.control("y", 60)
    assert (page.map() == 59 % 12).all() and page.js("$('redo').disabled")
    page.click("undo")
    assert (page.map() == 58 % 12).all()


@pytest.mark.browser
def test_noise_of_a_class_of_the_walk_and_of_variations(page):
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
    page.js("($('walk').value = 10, $('walk').oninput())")
    middle = page.picture()
    assert page.js("noise") == {"seed": 0, "walk": 10, "redraws": {"0": 0, "2": 0}}
    page.choose("sky")
    page.click("redraw")  # on the walk
    again = page.picture()
    assert np.array_equal(again[~sky], middle[~sky]) and (again[sky] != middle[sky]).any()
    page.click("six")
    page.settle()
    assert page.js("$('variations').children.length") == 6 and page.js("noise.seed") == 0
    page.js("$('variations').children[3].click()")
    assert (page.picture() != again).any() and page.js("noise") == {"seed": 4, "walk": 0, "redraws": {}}


@pytest.mark.browser
def test_what_is_saved_comes_back(page, sample):
    page.choose("tree")
    page.drag((5, 5), (20, 25))
    page.click("another", "redraw")
    labels, picture = page.map(), page.picture()
    saved = page.download("saveMap", "painted.png")
    load = lambda path: np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(load(saved), COLORS[labels])
    assert np.array_equal(load(page.download("savePicture", "painted_picture.png")), picture)
    both = load(page.download("saveBoth", "painted_both.png"))
    assert np.array_equal(both, np.concatenate([COLORS[labels], picture], axis=1))
    if page.js("model.server"):
        folder = Path(tempfile.mkdtemp(dir=saved.parent))
        shutil.copy(saved, folder)
        assert np.array_equal(sample("--labels", folder, "--seed", 1, "--resample", "tree")[0], picture)
    time.sleep(0.5)  # the link follows a moment later
    again = Page(page.driver, page.js("location.href"))
    assert np.array_equal(again.map(), labels) and np.array_equal(again.picture(), picture)
    again.click("clear")
    again.open(saved, "new Set(map).size > 1")
    again.settle()
    assert np.array_equal(again.map(), labels)
    wrong = saved.parent / "wrong.png"
    Image.fromarray(np.full((8, 8, 3), (1, 2, 3), np.uint8)).save(wrong)
    again.open(wrong, "$('status').className === 'wrong'")
    assert again.said().startswith("wrong.png: ") and np.array_equal(again.map(), labels)


@pytest.mark.browser
def test_options_of_the_model(tmp_path, driver):
    """OASIS's local noise: no walk, no redraw."""
    write_checkpoint(tmp_path / "runs/oasis/checkpoints/latest.pt", generator=OASIS)
    server = Server(tmp_path)
    page = Page(driver, server.address)
    image = page.picture()
    driver.find_element("css selector", "#noise [value=pixel]").click()
    assert (page.picture() != image).any() and not driver.find_element("id", "redraw").is_enabled()
    driver.find_element("css selector", "#noise [value=image]").click()
    assert np.array_equal(page.picture(), image) and driver.find_element("id", "walk").is_enabled()
    assert server.end() == ""


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
