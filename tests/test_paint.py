"""The painting page: what its server answers, against sample.py; and, under the marker `browser`, the page itself."""

import _thread
import http.client
import json
import os
import shutil
import signal
import threading
import time
import tracemalloc
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from conftest import ROOT, write_checkpoint
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import export
import paint
import scenes
from checkpoint import load_generator
from config import UserError

SDM = {"name": "sdm", "base_channels": 32, "multipliers": [1, 1], "num_res_blocks": 1, "attention_strides": [2],
       "head_channels": 32, "spade_channels": 8}
OASIS = {"name": "oasis", "channels": 2, "z_dim": 8}
COLORS = np.array([color for _, color in scenes.CLASSES] + [(0, 0, 0)], np.uint8)
LABEL = scenes.render("val", 3, (32, 32))[1]
LATEST = "runs/tiny/checkpoints/latest.pt"
pixels = lambda picture: np.frombuffer(picture, np.uint8).reshape(32, 32, 4)[..., :3]


def serve(handler: type, port: int = 0) -> ThreadingHTTPServer:
    """A server in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    return server


def serve_page(checkpoint: Path, port: int = 0, labels: Path | None = None) -> ThreadingHTTPServer:
    """The server of paint.py."""
    studio = paint.Studio(*load_generator(checkpoint), labels)
    return serve(type("Handler", (paint.Handler,), {"studio": studio, "names": ("localhost",)}), port)


def ask(port: int, path: str, body: bytes = b"", **headers) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST" if body else "GET", path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with random weights, and a label map with the name that the page saves."""
    folder = tmp_path_factory.mktemp("paint")
    write_checkpoint(folder / LATEST)
    (folder / "labels").mkdir()
    Image.fromarray(LABEL).save(folder / "labels/painted.png")
    return folder


@pytest.fixture(scope="module")
def server(folder) -> ThreadingHTTPServer:
    return serve_page(folder / LATEST)


def test_pictures_are_those_of_sample_py(server, folder, sample):
    """What a class shows is redrawn, and nothing else changes."""
    def draw(query: str) -> np.ndarray:
        status, picture = ask(server.server_port, f"/draw?page=a&seed=5&{query}", LABEL.tobytes())
        assert status == 200, picture
        return pixels(picture)

    given = LABEL, "--checkpoint", folder / LATEST, "--seed", 5
    plain, walk = sample(*given)[0], sample(*given, "--interpolate", 21)
    assert np.array_equal(draw(""), plain) and np.array_equal(draw("walk=13"), walk[13])
    c, d = np.unique(LABEL)[:2].tolist()
    first, second = (sample(*given, "--num", 3, "--resample", name) for name in (scenes.CLASSES[c][0], d))
    assert np.array_equal(draw(f"redraws={c}.2"), first[2])
    assert (first[2] != plain)[LABEL == c].any() and np.array_equal(first[2][LABEL != c], plain[LABEL != c])
    assert np.array_equal(draw(f"redraws={c}.2,{d}.1"), np.where((LABEL == d)[..., None], second[1], first[2]))
    both = sample(*given, "--num", 2, "--resample", c, "--interpolate", 21)  # the class redrawn, on the walk
    assert len(both) == 2 * 21 and np.array_equal(draw(f"walk=13&redraws={c}.1"), both[21 + 13])
    assert np.array_equal(both[21 + 13][LABEL != c], walk[13][LABEL != c])


@pytest.mark.parametrize("generator, options, wrong", [
    (OASIS, {"truncation": "1.7"}, {"truncation": "9"}), (SDM, {"steps": "10", "guidance": "2.0"}, {"guidance": "x"})])
def test_options_are_those_of_sample_py(generator, options, wrong, tmp_path, sample):
    path, coarse = write_checkpoint(tmp_path / "latest.pt", generator=generator), []
    studio = paint.Studio(*load_generator(path), None)
    picture = studio.draw("a", LABEL.tobytes(), {"seed": "2"} | options, coarse.append)
    given = [part for option, value in options.items() for part in (f"--{option}", value)]
    assert np.array_equal(pixels(picture), sample(LABEL, "--seed", 2, "--checkpoint", path, *given)[0])
    assert len(coarse) == int(options.get("steps", 0))
    assert set(studio.describe()["choices"]) == set(options)
    with pytest.raises(UserError):
        studio.draw("a", LABEL.tobytes(), wrong, coarse.append)


def test_label_files_are_read_by_the_rules_of_sample_py(server, folder, sample, tmp_path):
    def read(image: Image.Image) -> tuple[int, bytes]:
        image.save(tmp_path / "a.png")
        return ask(server.server_port, f"/label?name={tmp_path}/a.png", (tmp_path / "a.png").read_bytes())

    large = Image.fromarray(COLORS[LABEL]).resize((96, 160), Image.Resampling.NEAREST)
    assert read(large) == (200, LABEL.tobytes()) and read(Image.new("L", (5000, 5000)))[0] == 400
    wrong = np.full((8, 8), 77, np.uint8)
    status, text = read(Image.fromarray(wrong))
    with pytest.raises(SystemExit) as error:
        sample(wrong, "--checkpoint", folder / LATEST)
    assert status == 400 and text.decode().partition("a.png")[2] == str(error.value).partition("painted.png")[2] != ""


def test_examples_are_those_of_the_data_set_or_the_folder(folder, server):
    described = json.loads(ask(server.server_port, "/model.json")[1])
    assert described["examples"] == 24 and described["photos"]
    photo, drawn = scenes.render("val", 3 * scenes.LENGTHS["val"] // 24, (32, 32))
    assert ask(server.server_port, "/example/3") == (200, drawn.tobytes())
    assert np.array_equal(pixels(ask(server.server_port, "/photo/3")[1]), photo)
    studio = paint.Studio(*load_generator(folder / LATEST), folder / "labels")
    assert studio.describe()["examples"] == 1 and studio.example(0)[0] == LABEL.tobytes()


def test_wrong_requests_get_a_sentence(server):
    body, local = LABEL.tobytes(), f"localhost:{server.server_port}"
    wrong = [("/../paint.py", b"", {}), ("/example/24", b"", {}), ("/draw", body[1:], {}), ("/draw", b"\xff" * len(body), {}),
             ("/draw?seed=-1", body, {}), ("/draw?walk=21", body, {}), ("/draw?redraws=12.0", body, {}), ("//[", b"", {}),
             ("/", b"", {"Host": "evil.example"}), ("/", b"", {"Host": "cafe"}), ("/", b"", {"Host": "[::1"}),
             ("/draw", body, {"Origin": "http://evil.example"}), ("/draw", b"", {"Content-Length": str(10 ** 9)})]
    for path, content, headers in wrong:
        status, text = ask(server.server_port, path, content, **headers)
        assert status == 400 and 10 < len(text) < 400, (path, headers, text)
    assert ask(server.server_port, "/draw", body, Host=local, Origin=f"http://{local}")[0] == 200
    with patch.object(paint.Studio, "draw", side_effect=RuntimeError("out of memory")):
        assert ask(server.server_port, "/draw", body) == (500, b"RuntimeError in paint.py: out of memory")


def test_a_newer_request_of_a_page_ends_its_older_one(folder):
    system, generator, state = load_generator(folder / LATEST)
    for module in generator.modules():
        module.register_forward_pre_hook(lambda *_: time.sleep(0.02))  # seconds for a picture
    studio, pool = paint.Studio(system, generator, state, None), ThreadPoolExecutor(3)
    draw = lambda page, seed: studio.draw(page, LABEL.tobytes(), {"seed": seed}, lambda picture: None)
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


def test_many_quick_requests_leave_threads_and_memory_as_they_were(server):
    """Of ten tabs; two requests of the same tab end each other's. A picture that stayed of each would be 1.2 MB."""
    draw = lambda i: ask(server.server_port, f"/draw?page=tab{i % 10}&seed={i}", LABEL.tobytes())[0]
    with ThreadPoolExecutor(10) as pool:
        assert set(pool.map(draw, range(100))) <= {200, 400}
        threads = threading.active_count()
        tracemalloc.start()
        before, answers = tracemalloc.get_traced_memory()[0], list(pool.map(draw, range(300)))
        end = time.monotonic() + 10
        while threading.active_count() > threads:
            assert time.monotonic() < end
            time.sleep(0.01)
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert 200 in answers and set(answers) <= {200, 400} and grown < 100 * 32 * 32 * 4


def test_the_script_opens_the_page_until_ctrl_c(folder, call, monkeypatch, tmp_path):
    def visit(address: str) -> None:
        seen.append(ask(int(address.removeprefix("http://127.0.0.1:")), "/"))
        _thread.interrupt_main()

    seen, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    monkeypatch.setattr("webbrowser.open", lambda address: threading.Thread(target=visit, args=[address]).start())
    monkeypatch.chdir(folder)
    call("paint.py", "--port", "0")
    signal.signal(signal.SIGINT, before)
    assert seen == [(200, (ROOT / "paint.html").read_bytes())]
    for wrong in ("--port 99999", "--labels no_such"):
        with pytest.raises(SystemExit, match=wrong.split()[1]):
            call("paint.py", *wrong.split())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="train.py --config config.yaml"):
        call("paint.py")


# The page in a browser, with a server and without.

RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "package"))  # npm pack onnxruntime-web && tar xf ...


@pytest.fixture(scope="module")
def static(folder) -> ThreadingHTTPServer:
    """An exported folder behind a plain web server."""
    export.main(Namespace(checkpoint=folder / LATEST, config=None, out=folder / "page", runtime=RUNTIME))
    return serve(partial(SimpleHTTPRequestHandler, directory=folder / "page"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,720"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.downloads = tmp_path_factory.mktemp("downloads")
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(driver.downloads)})
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
        WebDriverWait(self.driver, 60, 0.02).until(lambda _: self.js(condition), condition)

    def settle(self) -> None:
        self.until("wanted > 0 && drawn === wanted && job === null && !queue.length")

    def said(self) -> str:
        return self.js("$('status').textContent")

    def click(self, *selectors: str) -> None:
        for selector in selectors:
            self.driver.find_element("css selector", selector).click()

    def keys(self, keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(keys)

    def drag(self, start: tuple[int, int], *others: tuple[int, int], key: str = Keys.NULL) -> None:
        """Mouse down at the first pixel, over the others, up at the last, with a key held."""
        canvas = self.driver.find_element("id", "map")
        scale = min(canvas.size.values()) / 32
        actions = ActionChains(self.driver, duration=10).key_down(key)
        move = lambda point: actions.move_to_element_with_offset(canvas, *(round((at - 15.5) * scale) for at in point))
        move(start).click_and_hold()
        for point in others:
            move(point)
        actions.release().key_up(key).perform()

    def map(self) -> np.ndarray:
        return np.array(self.js("[...map]"), np.uint8).reshape(32, 32)

    def names(self) -> list[str]:
        return self.js("[...document.querySelectorAll('#classes span')].map(row => row.textContent)")

    def picture(self) -> np.ndarray:
        self.settle()
        return pixels(bytes(self.js("[...picture]")))

    def download(self, button: str, name: str) -> np.ndarray:
        path = self.driver.downloads / name
        path.unlink(missing_ok=True)
        self.click(button)
        WebDriverWait(self.driver, 20, 0.05).until(lambda _: path.exists())
        return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(params=["server", "static"])
def page(request, driver) -> Page:
    return Page(driver, f"http://127.0.0.1:{request.getfixturevalue(request.param).server_port}")


@pytest.mark.browser
def test_painting_with_the_mouse(page):
    class_of = [name for name, _ in scenes.CLASSES].index
    page.click("[title=building]", "#clear", "[title=sky]", "#clear", "[title=building]", "#rectangle")
    page.drag((20, 30), (25, 20), (28, 10))
    expected = np.zeros((32, 32), np.uint8)
    expected[10:31, 20:29] = class_of("building")
    page.keys(f"f{class_of('grass') + 1}")
    page.drag((0, 31))
    expected[expected == 0] = class_of("grass")
    page.click("[title=road]")
    page.keys("b" + "[" * 40)
    page.drag((2, 2), (12, 7), (2, 12), key=Keys.SHIFT)  # straight from start to end
    expected[2:13, 2] = class_of("road")
    page.click("[title=tree]")
    page.keys("]" * 4)
    page.drag((10, 20))  # a disc five pixels wide
    y, x = np.ogrid[:32, :32]
    expected[(x - 10) ** 2 + (y - 20) ** 2 <= 2.5 ** 2] = class_of("tree")
    assert np.array_equal(page.map(), expected)
    assert set(page.names()[:4]) == {"grass", "road", "building", "tree"} and len(page.names()) == 13
    page.keys("p")
    page.drag((24, 12))
    assert page.js("name(current)") == "building"
    page.keys("/")
    page.keys("per")
    assert page.names() == ["person"]
    page.keys(Keys.ENTER)
    assert page.js("name(current)") == "person" and len(page.names()) == 13
    page.js("[...Array(60).keys()].forEach(i => { choose(i % 12); actions.clear(); })")
    page.keys(Keys.CONTROL + "z" * 60)
    assert np.array_equal(page.map(), expected)
    page.keys(Keys.CONTROL + "y" * 60)
    assert (page.map() == 59 % 12).all() and page.js("$('redo').disabled")


@pytest.mark.browser
def test_noise_of_a_class_of_the_walk_and_of_variations(page):
    page.click("[title=grass]", "#clear", "[title=sky]", "#rectangle")
    page.drag((0, 0), (31, 12))
    before, sky = page.picture(), page.map() == 0
    page.click("#redraw")
    after = page.picture()
    assert np.array_equal(after[~sky], before[~sky]) and (after[sky] != before[sky]).any()
    page.click("[title=grass]", "#redraw")
    both = page.picture()
    assert np.array_equal(both[sky], after[sky]) and (both[~sky] != after[~sky]).any()
    page.js("($('walk').value = 10, $('walk').oninput())")
    middle = page.picture()
    assert page.js("noise") == {"seed": 0, "walk": 10, "redraws": {"0": 0, "2": 0}}
    page.click("[title=sky]", "#redraw")  # on the walk
    again = page.picture()
    assert np.array_equal(again[~sky], middle[~sky]) and (again[sky] != middle[sky]).any()
    page.js("(actions.six(), actions.six())")  # the second while the first is drawn
    page.settle()
    assert page.js("$('variations').children.length") == 6 and page.js("noise.seed") == 0
    middle = page.picture()
    page.click("#truncation [value='1.7']")
    assert (page.picture() != middle).any()
    page.click("#truncation [value='1.0']")
    assert np.array_equal(page.picture(), middle)
    thumbnail = page.js("[...$('variations').children[0].firstChild.getContext('2d').getImageData(0, 0, 32, 32).data]")
    page.click("#variations :nth-child(1)")
    assert np.array_equal(page.picture(), pixels(bytes(thumbnail))) and (page.picture() != again).any()
    assert page.js("noise") == {"seed": 7, "walk": 0, "redraws": {}}


@pytest.mark.browser
def test_what_is_saved_comes_back(page, folder, sample, tmp_path):
    page.click("[title=tree]")
    page.drag((5, 5), (20, 25))
    page.click("#another", "#redraw")
    labels, picture = page.map(), page.picture()
    assert np.array_equal(page.download("#saveMap", "painted.png"), COLORS[labels])
    assert np.array_equal(page.download("#savePicture", "painted_picture.png"), picture)
    both = page.download("#saveBoth", "painted_both.png")
    assert np.array_equal(both, np.concatenate([COLORS[labels], picture], axis=1))
    saved = shutil.copy(page.driver.downloads / "painted.png", tmp_path)
    if page.js("model.server"):
        options = "--checkpoint", folder / LATEST, "--seed", 1, "--resample", "tree"
        assert np.array_equal(sample(COLORS[labels], *options)[0], picture)
    page.until("location.hash.includes('seed%22%3A1')")  # the link follows a moment later
    again = Page(page.driver, page.js("location.href"))
    assert np.array_equal(again.map(), labels) and np.array_equal(again.picture(), picture)
    again.click("#clear")
    again.driver.find_element("id", "open").send_keys(saved)
    again.until("new Set(map).size > 1")
    again.settle()
    assert np.array_equal(again.map(), labels)
    Image.fromarray(LABEL).save(tmp_path / "ids.png")  # gray
    again.driver.find_element("id", "open").send_keys(str(tmp_path / "ids.png"))
    again.until(f"String(map) === '{','.join(map(str, LABEL.flat))}'")
    Image.fromarray(np.full((8, 8, 3), (1, 2, 3), np.uint8)).save(tmp_path / "wrong.png")
    again.driver.find_element("id", "open").send_keys(str(tmp_path / "wrong.png"))
    again.until("$('status').className === 'wrong'")
    assert again.said().startswith("wrong.png: ") and np.array_equal(again.map(), LABEL)


@pytest.mark.browser
def test_another_finger_and_other_keys_change_nothing(page):
    page.click("[title=road]", "#clear", "[title=tree]")
    page.js("($('size').value = 1)")
    touch = lambda kind, *points: page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [
        dict(zip(("x", "y", "id"), page.js(f"""(box => [box.x + box.width / 2 + {x - 15.5} * Math.min(box.width, box.height) / 32,
            box.y + box.height / 2 + {y - 15.5} * Math.min(box.width, box.height) / 32, {finger}])
            ($('map').getBoundingClientRect())"""))) for finger, (x, y) in enumerate(points)]})
    touch("touchStart", (5, 5))
    touch("touchMove", (10, 5))
    touch("touchStart", (10, 5), (20, 25))
    touch("touchMove", (10, 5), (22, 25))
    touch("touchMove", (12, 5), (22, 25))
    touch("touchEnd")
    expected = np.full((32, 32), 4, np.uint8)
    expected[5, 5:13] = [name for name, _ in scenes.CLASSES].index("tree")
    assert np.array_equal(page.map(), expected)
    page.keys(Keys.CONTROL + "z" + Keys.NULL)
    page.keys(Keys.CONTROL + Keys.SHIFT + "z" + Keys.NULL)
    page.keys(Keys.ALT + "f" + Keys.NULL)
    assert np.array_equal(page.map(), expected) and page.js("tool") == "brush"
    page.js("(location.hash = 'map=abc')")
    page.until("$('status').className === 'wrong'")
    page.js("setNoise({})")
    page.settle()
    assert page.said() == "this link is not one of this model's"  # until the next key or press
    page.keys("n")
    page.settle()
    assert "drawn in" in page.said()


@pytest.mark.browser
def test_a_damaged_example_is_passed_by(folder, driver, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    shutil.copy(folder / "labels/painted.png", tmp_path)
    page = Page(driver, f"http://127.0.0.1:{serve_page(folder / LATEST, labels=tmp_path).server_port}")
    assert np.array_equal(page.map(), LABEL) and page.js("$('gallery').children.length") == 1


@pytest.mark.browser
def test_painting_goes_on_while_the_server_is_away(folder, driver):
    server = serve_page(folder / LATEST)
    page = Page(driver, f"http://127.0.0.1:{server.server_port}")
    image = page.picture()
    server.shutdown()
    server.server_close()
    page.click("[title=road]")
    page.drag((3, 3), (25, 25))
    page.until("$('status').className === 'wrong'")
    assert "no answer" in page.said() and (page.map() == 4).any()
    serve_page(folder / LATEST, server.server_port)
    assert (page.picture() != image).any() and "drawn in" in page.said()
