"""Fetching: your own folder first, then the cache, then a download that counts only when its checksum is right."""

import gc
import gzip
import hashlib
import importlib
import socket
import stat
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from recollect.data import cache_folder, data_folder, fetch
from recollect.errors import MissingDataError, MissingExtraError

fetch_module = importlib.import_module("recollect.data.fetch")  # the package has the function under this name
NAME = "mnist/t10k-labels-idx1-ubyte.gz"
CONTENT = gzip.compress(b"labels" * 1000)


class Server:
    """Serves ``content`` on the loopback interface and counts the requests."""

    def __init__(self) -> None:
        self.content, self.status, self.promised = CONTENT, 200, None
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                self.send_response(server.status)
                self.send_header("Content-Length", str(server.promised or len(server.content)))
                self.end_headers()
                self.wfile.write(server.content)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}/"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, no data folder, and nothing but the loopback interface to download from."""
    monkeypatch.delenv("RECOLLECT_DATA", raising=False)
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(fetch_module, "FILES", {NAME: ("http://127.0.0.1:9/", "0" * 64)})
    yield tmp_path / "cache"
    with warnings.catch_warnings():  # pooch leaves the connection of a failed download to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def serve(monkeypatch: pytest.MonkeyPatch, address: str, content: bytes = CONTENT) -> None:
    monkeypatch.setattr(fetch_module, "FILES", {NAME: (address, hashlib.sha256(content).hexdigest())})


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def test_the_data_folder_comes_first_and_is_not_written(
    tmp_path: Path, cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine" / NAME
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "mine"))
    serve(monkeypatch, server.address)
    assert fetch(NAME) == mine
    assert not server.requests
    assert not cache.exists()


def test_what_the_data_folder_lacks_is_downloaded_to_the_cache(
    tmp_path: Path, cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "mine"))
    serve(monkeypatch, server.address)
    assert fetch(NAME) == cache / NAME
    assert not list((tmp_path / "mine").iterdir())


def test_a_data_folder_that_does_not_exist_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_DATA", "/no/such/folder")
    with pytest.raises(MissingDataError, match="RECOLLECT_DATA names /no/such/folder, which is no folder"):
        fetch(NAME)


def test_the_data_folder_without_the_variable(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_folder() is None
    monkeypatch.setenv("RECOLLECT_DATA", "")
    assert data_folder() is None
    (tmp_path / "shared" / "data").mkdir(parents=True)
    folder = data_folder()
    assert folder is not None
    assert folder.samefile(tmp_path / "shared" / "data")


def test_the_home_folder_may_be_written_as_a_tilde(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RECOLLECT_DATA", "~/here")
    assert data_folder() == tmp_path / "here"


def test_unknown_name() -> None:
    with pytest.raises(MissingDataError, match=r"'mnist/nothing.gz'. There are: mnist/train-images"):
        fetch("mnist/nothing.gz")


def test_a_download_is_kept_and_used_again(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, server.address)
    path = fetch(NAME)
    assert path == cache / NAME
    assert path.read_bytes() == CONTENT
    assert fetch(NAME) == path
    assert server.requests == ["/t10k-labels-idx1-ubyte.gz"]
    assert files(cache) == [path]


def test_others_may_read_the_cache(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, server.address)
    assert stat.S_IMODE(fetch(NAME).stat().st_mode) == 0o644


def test_a_damaged_file_in_the_cache_is_replaced(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, server.address)
    (cache / NAME).parent.mkdir(parents=True)
    (cache / NAME).write_bytes(CONTENT[:-1])
    assert fetch(NAME).read_bytes() == CONTENT


def test_the_cache_is_enough_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "http://127.0.0.1:9/")
    (cache / NAME).parent.mkdir(parents=True)
    (cache / NAME).write_bytes(CONTENT)
    assert fetch(NAME).read_bytes() == CONTENT


def refused(cache: Path) -> str:
    """Returns what the error says, having checked that it says what to do and leaves no file behind."""
    begin = time.monotonic()
    with pytest.raises(MissingDataError) as caught:
        fetch(NAME)
    assert time.monotonic() - begin < 20
    assert not files(cache)
    message = str(caught.value)
    assert f"set RECOLLECT_DATA to the folder that holds {NAME}" in message
    assert "\n" not in message
    return message


def test_another_checksum_leaves_nothing_behind(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, server.address, b"the true content")
    assert "its SHA-256 differs" in refused(cache)
    assert server.requests


def test_a_connection_that_breaks_leaves_nothing_behind(
    cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, server.address)
    server.content, server.promised = CONTENT[:10], len(CONTENT)
    assert "could not be downloaded" in refused(cache)


def test_a_server_that_does_not_have_it(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, server.address)
    server.status = 404
    assert "404" in refused(cache)


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:  # bound and never listening: the connection is refused
        free.bind(("127.0.0.1", 0))
        serve(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}/")
        assert "could not be downloaded from http://127.0.0.1" in refused(cache)


def test_an_unknown_host(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    serve(monkeypatch, "http://data.invalid/")
    assert "could not be downloaded from http://data.invalid/" in refused(cache)


def test_a_cache_that_is_a_file(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, server.address)
    cache.write_bytes(b"")
    with pytest.raises(MissingDataError, match="could not be downloaded"):
        fetch(NAME)


def test_a_cache_without_permission(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    serve(monkeypatch, server.address)
    monkeypatch.setattr("os.makedirs", forbidden)
    assert "Permission denied" in refused(cache)


def test_without_pooch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(MissingExtraError, match=r"recollect\[experiments\]"):
        fetch(NAME)


def test_the_cache_folder_is_the_one_that_was_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == cache
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RECOLLECT_CACHE", "~/a folder")
    assert cache_folder() == tmp_path / "a folder"
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert cache_folder() == tmp_path / "a folder", "a named folder needs no pooch"
    assert not cache.exists(), "asking makes no folder"
    assert not (tmp_path / "a folder").exists(), "asking makes no folder"


@pytest.mark.parametrize("named", [None, ""])
def test_the_cache_folder_of_the_platform(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    import pooch

    if named is None:
        monkeypatch.delenv("RECOLLECT_CACHE")
    else:
        monkeypatch.setenv("RECOLLECT_CACHE", named)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path(pooch.os_cache("recollect"))
    if sys.platform == "linux":
        assert cache_folder() == tmp_path / ".cache" / "recollect"


def test_the_cache_folder_of_the_platform_needs_pooch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECOLLECT_CACHE")
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(MissingExtraError, match=r"recollect\[experiments\].*RECOLLECT_CACHE"):
        cache_folder()
