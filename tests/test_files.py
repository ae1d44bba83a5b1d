"""Files of datasets: fetched once from a server, whole or not at all, checked by size and hash; Frozen-Lake's.

Web servers listen on 127.0.0.1. Minari's files: test_minari.py.
"""

import hashlib
import socket
import struct
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import HOPPER, good, write

from common import data, files
from common.run import UsageError

# ---- downloads ----


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server for hopper-medium-v2's file: `body` is right, `reply(handler)` may be replaced."""
    body = write(tmp_path / "published.hdf5", good(30)).read_bytes()

    def whole_file(handler: BaseHTTPRequestHandler, content: bytes = body) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            this.hits.append(self.path)
            this.reply(self)

        def log_message(self, *_) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    this = SimpleNamespace(hits=[], body=body, whole_file=whole_file, reply=whole_file)
    this.folder = tmp_path / "some" / "cache"
    this.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    this.path = this.folder / "hopper_medium-v2.hdf5"
    this.listing = lambda: sorted(p.name for p in this.folder.glob("*"))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("D4RL_URL", this.url + "/d4rl")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(this.folder))
    monkeypatch.setenv("no_proxy", "*")
    task = replace(data.TASKS[HOPPER], size=len(body), sha256=hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(data.TASKS, HOPPER, task)
    yield this
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def download_refusal() -> str:
    """The one line with which loading hopper-medium-v2 is refused."""
    with pytest.raises(UsageError) as e:
        data.load(HOPPER)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


def test_a_file_is_downloaded_once(server):
    d = data.load(HOPPER)
    assert np.array_equal(d.obs, good(30)["observations"])
    assert d.sha256 == hashlib.sha256(server.body).hexdigest()
    assert server.hits == ["/d4rl/gym_mujoco_v2/hopper_medium-v2.hdf5"]
    assert server.listing() == ["hopper_medium-v2.hdf5"] and server.path.read_bytes() == server.body
    again = data.load(HOPPER)
    assert len(server.hits) == 1 and np.array_equal(again.obs, d.obs)


def test_a_dataset_of_one_s_own_is_never_downloaded(server, tmp_path):
    assert len(data.load(HOPPER, write(tmp_path / "own.hdf5", good(5))).obs) == 5
    assert server.hits == []


def test_the_leftover_of_a_killed_download_is_no_obstacle(server):
    server.folder.mkdir(parents=True)
    (server.folder / "hopper_medium-v2.hdf5.part").write_bytes(b"half" * 10_000)
    assert len(data.load(HOPPER).obs) == 30
    assert server.path.read_bytes() == server.body
    assert set(server.listing()) <= {"hopper_medium-v2.hdf5", "hopper_medium-v2.hdf5.part"}


def test_a_download_with_the_wrong_hash_is_refused(server):
    wrong = bytes([*server.body[:-1], server.body[-1] ^ 1])
    server.reply = lambda handler: server.whole_file(handler, wrong)
    message = download_refusal()
    assert hashlib.sha256(wrong).hexdigest() in message and hashlib.sha256(server.body).hexdigest() in message
    assert server.listing() == []


def test_a_download_of_the_wrong_size_is_refused(server):
    """A log-in page instead of the file, answered with 200."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"<html>please log in</html>")

    server.reply = page
    assert str(len(server.body)) in download_refusal()
    assert server.listing() == []


def test_a_download_cut_off_is_refused(server):
    """Half the announced bytes, then the connection is closed in good order."""
    server.reply = lambda handler: server.whole_file(handler, server.body[: len(server.body) // 2])
    download_refusal()
    assert server.listing() == []


def test_a_download_cut_off_is_refused_where_neither_size_nor_hash_is_known(server, tmp_path):
    server.reply = lambda handler: server.whole_file(handler, server.body[: len(server.body) // 2])
    words = f"{len(server.body) // 2} of {len(server.body)} bytes came"
    with pytest.raises(UsageError, match=words):
        files.download(f"{server.url}/d4rl/gym_mujoco_v2/hopper_medium-v2.hdf5", tmp_path / "x", None, None)
    assert not list(tmp_path.glob("x*"))


def test_a_download_whose_connection_breaks_is_refused(server):
    def reset(handler: BaseHTTPRequestHandler) -> None:
        server.whole_file(handler, server.body[:100])
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()  # RST instead of FIN

    server.reply = reset
    download_refusal()
    assert server.listing() == []


def test_after_a_failure_the_next_attempt_succeeds(server):
    server.reply = lambda handler: server.whole_file(handler, server.body[:100])
    download_refusal()
    server.reply = server.whole_file
    assert len(data.load(HOPPER).obs) == 30


def test_a_file_that_is_not_there_is_refused_with_advice(server):
    server.reply = lambda handler: handler.send_error(404)
    message = download_refusal()
    assert server.url + "/d4rl/gym_mujoco_v2/hopper_medium-v2.hdf5" in message
    assert str(server.path) in message and "hopper-mini-v0" in message
    assert server.listing() == []


def test_no_server_is_refused_with_advice(server, monkeypatch):
    with socket.socket() as s:  # a port that nobody listens on
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    monkeypatch.setenv("D4RL_URL", url)
    message = download_refusal()
    assert url + "/gym_mujoco_v2/hopper_medium-v2.hdf5" in message
    assert str(server.path) in message and "hopper-mini-v0" in message
    assert server.listing() == []


def test_a_server_that_does_not_speak_http_is_refused_with_advice(server):
    """An SSH server on that port: what it says must not break the line."""
    server.reply = lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    assert str(server.path) in download_refusal()
    assert server.listing() == []


def test_a_server_that_announces_no_number_is_refused_or_measured(server):
    """`Content-Length: abc`: the file itself is right."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "abc")
        handler.end_headers()
        handler.wfile.write(server.body)

    server.reply = reply
    try:
        assert len(data.load(HOPPER).obs) == 30
    except UsageError:
        assert server.listing() == []


@pytest.mark.parametrize(
    "url",
    ["mirror.example.org", "", "http://[::1", "http://" + "a" * 70],
    ids=["no scheme", "empty", "half an address", "too long a name"],
)
def test_a_base_url_that_is_none_is_refused_with_advice(url, server, monkeypatch):
    """$D4RL_URL without a scheme, empty, or mistyped. (Empty may also mean D4RL's own host: then look there.)"""
    monkeypatch.setenv("D4RL_URL", url)
    monkeypatch.setattr(data, "D4RL_URL", "http://127.0.0.1:1")
    assert str(server.path) in download_refusal()
    assert server.listing() == []


@pytest.mark.usefixtures("server")
def test_a_dataset_folder_that_is_a_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file"))
    assert str(tmp_path / "file") in download_refusal()
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_damaged_file_in_the_cache_is_refused_by_its_hash(server):
    """One byte of the rows: h5py would read it without a word."""
    data.load(HOPPER)
    damaged = bytearray(server.body)
    damaged[-5] ^= 1
    server.path.write_bytes(damaged)
    message = download_refusal()
    assert str(server.path) in message and hashlib.sha256(damaged).hexdigest() in message
    assert len(server.hits) == 1 and server.path.read_bytes() == damaged  # the user's file is not touched


def test_a_short_file_in_the_cache_is_refused_by_its_size(server):
    server.folder.mkdir(parents=True)
    server.path.write_bytes(server.body[:-10])
    message = download_refusal()
    assert str(server.path) in message and str(len(server.body) - 10) in message
    assert server.hits == []


def test_two_runs_started_together_both_get_the_file(server):
    """Several seeds at once on a fresh machine: the second transfer ends after the first file is in place."""
    second, lock, order = threading.Event(), threading.Lock(), []

    def reply(handler: BaseHTTPRequestHandler) -> None:
        with lock:
            order.append(handler)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(server.body)))
        handler.end_headers()
        handler.wfile.flush()
        if handler is order[0]:
            second.wait(1)
            threading.Event().wait(0.2)  # the second has opened its file by now
        else:
            second.set()
            for _ in range(200):
                if server.path.exists():
                    break
                threading.Event().wait(0.01)
        handler.wfile.write(server.body)

    server.reply = reply
    results: list[object] = []

    def load() -> None:
        try:
            results.append(len(data.load(HOPPER).obs))
        except Exception as e:
            results.append(repr(e))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [30, 30]
    assert server.listing() == ["hopper_medium-v2.hdf5"] and server.path.read_bytes() == server.body


# ---- Frozen-Lake ----


def test_frozen_lake_data_are_collected_once_and_learn(tmp_path, monkeypatch):
    """30,000 rows of slip 0.1; the learner gets better; the second load reads the same file."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "new"))
    dataset = data.load("frozenlake-4x4-slip-0.3")
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["frozenlake-4x4.hdf5"]
    returns = dataset.episode_returns()
    assert len(dataset.rewards) == 30_000 and returns[-600:].mean() > 2 * returns[:600].mean() > 0
    moves = dataset.actions.argmax(1)
    rows = (dataset.obs.argmax(1) == 8) & (moves == 1)  # down from row 2: slips right with 0.05
    fell = dataset.next_obs.argmax(1)[rows] == 12
    assert fell.mean() == pytest.approx(0.9, abs=0.03) and dataset.terminations[rows][fell].all()
    assert ((dataset.rewards == 1) == (dataset.next_obs.argmax(1) == 15)).all()
    monkeypatch.setattr(files, "frozen_lake", None)
    assert data.load("frozenlake-4x4").sha256 == dataset.sha256
