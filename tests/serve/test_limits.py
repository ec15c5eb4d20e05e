"""What the service keeps out, and how it ends: tokens, names, bodies of any size, full queues, signals."""

import concurrent.futures
import http.client
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from serving import command, eventually, picture, running, small_service
from test_gathering import Slow
from test_service import JSON, error_of
from torch import nn

from recollect import load, save
from recollect.cli import main
from recollect.serve.settings import Settings
from recollect.serve.sources import from_factory

TOKEN = "0123456789-a-long-secret"


def test_a_token_is_needed_for_all_but_the_page_and_the_probes() -> None:
    with running(settings=Settings(token=TOKEN)) as server:
        for path in ("/", "/page/page.js", "/page/style.css", "/healthz", "/readyz"):
            assert httpx.get(server.url + path).status_code == 200
        for header in (None, "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer", "Bearer é"):
            headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
            for method, path in (("GET", "/v1/model"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/v9")):
                answer = httpx.request(method, server.url + path, headers=headers)
                error_of(answer, 401, "no_token")
                assert answer.headers["www-authenticate"] == "Bearer"
            answer = httpx.post(f"{server.url}/v1/observe", json={}, headers=headers)
            error_of(answer, 401, "no_token")
        assert server.client.get("/v1/model").status_code == 200
        lower = httpx.get(f"{server.url}/v1/model", headers={"Authorization": f"bearer {TOKEN}"})
        assert lower.status_code == 200
        other_name = httpx.get(f"{server.url}/healthz", headers={"Host": "anything.example"})
        assert other_name.status_code == 200


def test_without_a_token_only_loopback_names_are_answered() -> None:
    with running() as server:
        port = server.url.rpartition(":")[2]
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]", "LOCALHOST"):
            assert server.client.get("/v1/model", headers={"Host": host}).status_code == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[::1].evil.example", ""):
            error_of(server.client.get("/v1/model", headers={"Host": host}), 421, "wrong_host")


def test_a_form_of_another_page_cannot_write() -> None:
    with running() as server:
        body = '{"inputs": [[[0,0,0,0],[0,0,0,0],[0,0,0,0],[0,0,0,0]]], "labels": ["ant"]}'
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            answer = server.client.post("/v1/observe", content=body, headers={"Content-Type": kind})
            error_of(answer, 415, "not_json")
        assert len(server.engine.memory) == 12


def test_headers_let_nothing_in_from_elsewhere() -> None:
    with running() as server:
        for path in ("/", "/v1/model", "/nowhere", "/page/page.js"):
            headers = server.client.get(path).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--demo", "--host", "0.0.0.0"), "without a token"),
        (("--demo", "--host", "example.org"), "without a token"),
        ((), "name what to serve"),
        (("folder", "--demo"), "name what to serve"),
        (("--demo", "--port", "70000"), "from 0 (any) to 65535"),
        (("--demo", "--port", "x"), "invalid int value"),
        (("--demo", "--inputs", "0"), "inputs must be a whole number"),
        (("--demo", "--wait", "nan"), "wait must be a finite number"),
        (("--demo", "--nonsense"), "unrecognized arguments"),
        (("nowhere", "--port", "0"), "there is no folder nowhere"),
        (("nowhere:made", "--port", "0"), "there is no module 'nowhere'"),
        (("json:nothing", "--port", "0"), "there is no 'nothing'"),
        (("time:time", "--port", "0"), "must return a recollect.serve.Service, got float"),
        (("nowhere", "--shape", "3,x"), "sizes above 0"),
        (("--demo", "--shape", "3,3"), "are for saved models"),
        (("json:loads", "--classes", "a,b"), "are for saved models"),
        ((":made", "--port", "0"), "need module:factory"),
        ((".mine:made", "--port", "0"), "need module:factory"),
        (("json:", "--port", "0"), "need module:factory"),
        (("sys:path", "--port", "0"), "'path' is a list"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: tuple[str, ...], message: str, capsys) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["serve", *arguments]) == 2
    signal.signal(signal.SIGTERM, before)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_bad_token_and_a_taken_port_are_refused(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_TOKEN", "short")
    assert main(["serve", "--demo"]) == 2
    assert "at least 16" in capsys.readouterr().err
    monkeypatch.delenv("RECOLLECT_TOKEN")
    (tmp_path / "token").write_bytes(b"\xff\xfe no text at all" * 10)
    assert main(["serve", "--demo", "--token-file", str(tmp_path / "token")]) == 2
    assert "printable ASCII" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--demo", "--port", str(taken.getsockname()[1])]) == 2
    assert "Choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["fastapi", "prometheus_client", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(package: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("app", "metrics"):
        monkeypatch.delitem(sys.modules, f"recollect.serve.{module}")
    assert main(["serve", "--demo", "--port", "0"]) == 2
    assert "pip install 'recollect[serve]'" in capsys.readouterr().err


# Bodies ---------------------------------------------------------------------------------------------------------------


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 2**20):
        yield b" " * 2**20


@pytest.mark.parametrize("how", ["whole", "chunked"])
def test_a_body_of_100_mb_is_refused_and_the_service_goes_on(how: str) -> None:
    size = 100 * 2**20
    with running(settings=Settings(timeout=60.0)) as server:
        content = b" " * size if how == "whole" else chunks(size)
        answer = server.client.post("/v1/predict", content=content, headers=JSON)
        error_of(answer, 413, "too_large")
        assert server.client.post("/v1/predict", json={"inputs": [picture(1)]}).status_code == 200


def test_what_is_too_large_is_so_even_if_its_end_never_comes() -> None:
    with running(settings=Settings(timeout=0.5, body=1000)) as server:
        address, _, port = server.url.removeprefix("http://").partition(":")
        with socket.create_connection((address, int(port)), timeout=30) as slow:
            slow.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 9000\r\n\r\n" + b" " * 2000
            )
            assert slow.recv(100).startswith(b"HTTP/1.1 413 ")


def test_who_asks_first_is_told_before_sending() -> None:
    with running() as server:
        address = server.url.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=30)
        connection.putrequest("POST", "/v1/predict")
        for name, value in {"Expect": "100-continue", "Content-Length": str(2**40), **JSON}.items():
            connection.putheader(name, value)
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    with running(settings=Settings(timeout=0.5)) as server:
        address, _, port = server.url.removeprefix("http://").partition(":")
        with socket.create_connection((address, int(port)), timeout=30) as slow:
            slow.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection((address, int(port)), timeout=30) as gone:
            gone.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert server.client.post("/v1/predict", json={"inputs": [picture(1)]}).status_code == 200


def test_too_many_inputs_are_refused() -> None:
    with running(settings=Settings(inputs=3)) as server:
        four = {"inputs": [picture(1)] * 4}
        error_of(server.client.post("/v1/predict", json=four), 422, "too_many")
        error_of(server.client.post("/v1/observe", json=four | {"labels": ["ant"] * 4}), 422, "too_many")
    with running() as server:
        many = {"inputs": [picture(1)] * 51, "labels": ["dodo"] * 51, "idempotency_key": "k"}
        error_of(server.client.post("/v1/observe", json=many), 422, "too_many")  # more than the memory holds
        assert server.client.get("/v1/model").json()["room"] == 2


def test_a_full_queue_says_when_to_try_again() -> None:
    slow = Slow()
    with running(small_service(encode=slow), Settings(queue=2)) as server:
        slow.go.clear()
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            body = {"inputs": [picture(1)]}
            jobs = [pool.submit(httpx.post, f"{server.url}/v1/predict", json=body, timeout=60) for _ in range(6)]
            eventually(lambda: sum(job.done() for job in jobs) == 4)
            slow.go.set()
        answers = [job.result() for job in jobs]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) == 4
        for answer in refused:
            error_of(answer, 429, "queue_full")
            assert answer.headers["retry-after"] == "1"


def test_a_model_that_takes_too_long_is_given_up_and_a_write_that_had_not_begun_does_not_happen() -> None:
    slow = Slow()
    with running(small_service(encode=slow), Settings(timeout=0.3)) as server:
        slow.go.clear()
        answer = server.client.post("/v1/predict", json={"inputs": [picture(1)]})
        error_of(answer, 503, "too_slow")
        assert answer.headers["retry-after"] == "1"
        write = server.client.post("/v1/observe", json={"inputs": [picture(1)], "labels": ["ant"]})
        assert "Nothing was done" in error_of(write, 503, "too_slow")["do"]
        slow.go.set()
        eventually(lambda: server.client.post("/v1/predict", json={"inputs": [picture(1)]}).status_code == 200)
        assert len(server.engine.memory) == 12


# Processes ------------------------------------------------------------------------------------------------------------


def test_an_error_in_the_code_of_a_factory_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty_service.py").write_text("import os\nos.nothing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(AttributeError, match="nothing"):
        from_factory("faulty_service:made")


MODULE = """
import time
import torch
from torch import nn
from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
from recollect.serve import Service

def encode(inputs):
    time.sleep(float(inputs[0, 0, 0]))  # the first number says how long to think
    return inputs.flatten(1)

def service():
    head = nn.Linear(16, 4)
    layer = MbPA(head, EpisodicMemory(50, 16), neighbors=3, adaptation=LocalAdaptation(rules.sgd(1.0), steps=5))
    return Service(encode, layer, input_shape=(4, 4), classes=("ant", "bee"), folder="memory")
"""


def test_a_term_signal_lets_requests_finish_and_a_kill_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    blank = [[0.0] * 4] * 4
    taught = {"inputs": [blank, blank], "labels": ["ant", "dodo"], "idempotency_key": "once"}
    with command("mine:service", folder=tmp_path) as service:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            first = client.post("/v1/observe", json=taught)
        service.process.send_signal(signal.SIGKILL)
        assert service.ended() == -signal.SIGKILL
    with command("mine:service", folder=tmp_path) as service:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            assert client.post("/v1/observe", json=taught).text == first.text
            model = client.get("/v1/model").json()
            assert (model["entries"], model["classes"]) == (2, ["ant", "bee", "dodo", None])
        thinking = [[[1.5, 0, 0, 0], *blank[1:]]]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            job = pool.submit(httpx.post, f"{service.url}/v1/predict", json={"inputs": thinking}, timeout=60)
            eventually(lambda: "recollect_waiting_inputs 1.0" in httpx.get(f"{service.url}/metrics").text)
            service.process.send_signal(signal.SIGTERM)
            assert job.result().status_code == 200
        assert service.ended() == 0
    assert (tmp_path / "errors.txt").read_text() == ""


def test_a_model_that_never_ends_is_said_not_to_be_ready_and_does_not_keep_the_service(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    blank = [[0.0] * 4] * 4
    with command("mine:service", "--timeout", "0.3", "--drain", "0.3", folder=tmp_path) as service:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            taught = client.post("/v1/observe", json={"inputs": [blank], "labels": ["ant"]})
            assert taught.status_code == 200
            assert client.get("/readyz").status_code == 200
            stuck = client.post("/v1/predict", json={"inputs": [[[600.0, 0, 0, 0], *blank[1:]]]})
            error_of(stuck, 503, "too_slow")
            answer = client.get("/readyz")
            error_of(answer, 503, "too_slow")
            assert answer.headers["retry-after"] == "1"
            assert client.get("/healthz").status_code == 200
        service.process.send_signal(signal.SIGTERM)
        assert service.ended() == 1
    assert "the model is stuck" in (tmp_path / "errors.txt").read_text()
    with command("mine:service", folder=tmp_path) as service:
        assert httpx.get(f"{service.url}/v1/model").json()["entries"] == 1


def test_a_second_process_on_a_folder_is_told_who_has_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    with command("mine:service", folder=tmp_path) as service:
        words = [sys.executable, "-m", "recollect", "serve", "mine:service", "--port", "0"]
        other = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert other.returncode == 2
        assert len(other.stderr.splitlines()) == 1
        assert f"process {service.process.pid} has the memory in {tmp_path}/memory" in other.stderr
        assert httpx.get(f"{service.url}/readyz").status_code == 200


def test_two_that_begin_at_once_make_one_memory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    words = [sys.executable, "-m", "recollect", "serve", "mine:service", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(words, cwd=tmp_path, **pipes) for _ in range(2)]
    eventually(lambda: [process.poll() for process in both].count(2) == 1, 60.0)
    loser, winner = sorted(both, key=lambda process: process.poll() is None)
    assert "has the memory in" in loser.communicate()[1]
    winner.send_signal(signal.SIGTERM)
    printed, complained = winner.communicate(timeout=60)
    assert (winner.returncode, complained) == (0, "")
    assert "recollect serves 2 classes" in printed
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_saved_model_is_served_and_its_folder_keeps_what_it_is_taught(tmp_path: Path) -> None:
    made = small_service()
    made.layer.memory.write(made.keys(made.examples.inputs), torch.arange(12) % 3)
    save(nn.Sequential(*list(made.encode), made.layer), tmp_path / "model")
    arguments = ("model", "--shape", "4,4", "--token-file", "token.txt")
    (tmp_path / "token.txt").write_text(TOKEN + "\n")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for entries in (12, 13):
        with command(*arguments, folder=tmp_path) as service, httpx.Client(base_url=service.url, timeout=60) as client:
            assert client.get("/v1/model").status_code == 401
            assert client.get("/v1/model", headers=headers).json()["entries"] == entries
            truth = made.layer(made.keys(made.examples.inputs)).exp().tolist()
            if entries == 12:
                body = {"inputs": made.examples.inputs.tolist()}
                got = client.post("/v1/predict", json=body, headers=headers).json()["predictions"]
                assert [row["probabilities"] for row in got] == [pytest.approx(row, abs=1e-6) for row in truth]
            body = {"inputs": [picture(1)], "labels": ["4"]}
            assert client.post("/v1/observe", json=body, headers=headers).status_code == 200
            service.process.send_signal(signal.SIGTERM)
            assert service.ended() == 0
    assert len(load(tmp_path / "model")[3].memory) == 12
