"""What the server of the painting page answers, against sample.py."""

import _thread
import http.client
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, put, write_checkpoint
from PIL import Image

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


def serve(handler: type) -> ThreadingHTTPServer:
    """A server in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    return server


def serve_page(checkpoint: Path) -> ThreadingHTTPServer:
    """The server of paint.py."""
    studio = paint.Studio(*load_generator(checkpoint), None)
    return serve(type("Handler", (paint.Handler,), {"studio": studio, "names": ("localhost",)}))


def ask(port: int, path: str, body: bytes = b"", **headers) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST" if body else "GET", path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


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


def test_label_files_hold_ids_or_colors_and_have_any_size(server, tmp_path):
    large, indexed = Image.fromarray(COLORS[LABEL]).resize((96, 160), Image.Resampling.NEAREST), Image.fromarray(LABEL)
    indexed.putpalette(COLORS.flatten().tolist())
    read = lambda image: ask(server.server_port, "/label?name=a.png", put(tmp_path / "a.png", image).read_bytes())
    assert read(large) == read(indexed) == read(LABEL) == (200, LABEL.tobytes())
    status, text = read(np.full((8, 8), 77, np.uint8))
    assert status == 400 and text.startswith(b"a.png: id 77 is none of") and read(Image.new("L", (5000, 5000)))[0] == 400


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


def test_a_newer_request_of_a_page_ends_its_older_one(folder):
    system, generator, state = load_generator(folder / LATEST)
    for module in generator.modules():
        module.register_forward_pre_hook(lambda *_: time.sleep(0.02))  # seconds for a picture
    studio, pool = paint.Studio(system, generator, state, None), ThreadPoolExecutor(3)
    draw = lambda page, seed: studio.draw(page, LABEL.tobytes(), {"seed": seed}, lambda picture: None)
    older = pool.submit(draw, "a", "1")
    time.sleep(0.2)
    newest, other = pool.submit(draw, "a", "2"), pool.submit(draw, "b", "2")
    with pytest.raises(UserError, match="newer"):
        older.result()
    assert newest.result() == other.result()


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
    with pytest.raises(SystemExit, match="no_such: no label maps"):
        call("paint.py", "--labels", "no_such")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="train.py --config config.yaml"):
        call("paint.py")
