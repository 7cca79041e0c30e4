"""The painting page in a browser, with a server and without. It wants the marker `browser`."""

import os
import shutil
from argparse import Namespace
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from test_paint import COLORS, LABEL, LATEST, pixels, serve, serve_page

import export
import scenes

pytestmark = pytest.mark.browser
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "package"))  # npm pack onnxruntime-web && tar xf ...


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


@pytest.fixture(scope="module", params=["server", "static"])
def address(request, folder) -> str:
    """Of paint.py's server; and of an exported folder behind a plain web server."""
    if request.param == "server":
        server = serve_page(folder / LATEST)
    else:
        export.main(Namespace(checkpoint=folder / LATEST, config=None, out=folder / "page", runtime=RUNTIME))
        server = serve(partial(SimpleHTTPRequestHandler, directory=folder / "page"))
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def page(address, driver) -> Page:
    return Page(driver, address)


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
    page.keys("/")
    page.keys("per" + Keys.ENTER)
    assert page.js("name(current)") == "person"
    page.js("[...Array(60).keys()].forEach(i => { choose(i % 12); actions.clear(); })")
    page.keys(Keys.CONTROL + "z" * 60)
    assert np.array_equal(page.map(), expected)
    page.keys(Keys.CONTROL + "y" * 60)
    assert (page.map() == 59 % 12).all() and page.js("$('redo').disabled")


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


def test_another_finger_changes_nothing(page):
    page.click("[title=road]", "#clear", "[title=tree]")
    page.js("($('size').value = 1)")
    box = page.driver.find_element("id", "map").rect
    scale, middle_x, middle_y = min(box["width"], box["height"]) / 32, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    one, other = (10, 5), (20, 25)
    for kind, *points in [("Start", (5, 5)), ("Move", one), ("Start", one, other), ("Move", one, (22, 25)),
                          ("Move", (12, 5), (22, 25)), ("End",)]:
        page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": [
            {"id": finger, "x": middle_x + (x - 15.5) * scale, "y": middle_y + (y - 15.5) * scale}
            for finger, (x, y) in enumerate(points)]})
    expected = np.full((32, 32), 4, np.uint8)
    expected[5, 5:13] = [name for name, _ in scenes.CLASSES].index("tree")
    assert np.array_equal(page.map(), expected)
