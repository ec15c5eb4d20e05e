"""The journal beside the memory: a kill between the two, full disks, and what is kept for how long."""

import os
from pathlib import Path

import pytest
import torch
from serving import Running, picture, running, small_service
from test_service import error_of, post

from recollect import DurableMemory
from recollect.errors import FormatError, SettingError
from recollect.serve import journal as module
from recollect.serve.engine import Engine
from recollect.serve.journal import Announcement, Answer, Journal
from recollect.serve.store import journal, kept


def begin(folder: Path) -> Engine:
    service = kept(small_service(folder=folder))
    return Engine(service, journal(service))


@pytest.mark.parametrize("written", [True, False])
def test_a_kill_between_memory_and_journal_is_found_out(tmp_path: Path, written: bool) -> None:
    folder = tmp_path / "memory"
    with running(small_service(folder=folder)) as server:
        engine = server.engine
        wanted = {"inputs": [picture(1)], "labels": ["dodo"], "idempotency_key": "once"}
        digest = digest_of(engine, wanted)
        engine._journal.announce(Announcement(12, ["dodo"], ["dodo"], "once", digest))
        if written:  # and killed before the journal is told
            engine.memory.write(engine.service.keys(torch.tensor([picture(1)])), torch.tensor([3]))
    with running(small_service(folder=folder)) as server:
        model = server.client.get("/v1/model").json()
        assert model["classes"] == ["ant", "bee", "cat", "dodo" if written else None, None]
        answer = server.client.post("/v1/observe", json=wanted)
        assert ("idempotency-replayed" in answer.headers) is written
        assert answer.json() == {
            "slots": [12],
            "labels": ["dodo"],
            "new_classes": ["dodo"],
            "entries": 13,
        }
        assert len(server.engine.memory) == 13


def digest_of(engine: Engine, content: dict) -> str:
    """Returns what the engine would compute of a request."""
    from recollect.serve import engine as inner
    from recollect.serve import wire

    rows = wire.inputs(content["inputs"], engine.service.input_shape, 256)
    return inner._digest(inner.Observation(rows, content["labels"], content["idempotency_key"]))


def fill(connection) -> None:
    """Lets an SQLite file grow no more."""
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    assert connection.execute(f"PRAGMA max_page_count = {pages}").fetchone()[0] == pages


def write_until_refused(server: Running, label: str) -> int:
    for seed in range(200):
        answer = server.client.post("/v1/observe", json={"inputs": [picture(seed)] * 40, "labels": [label] * 40})
        if answer.status_code != 200:
            error = error_of(answer, 507, "disk_full")
            assert "Make room" in error["do"]
            return seed
    raise AssertionError("it was never full")


def test_a_full_memory_file_refuses_writes_loses_nothing_and_predicts(tmp_path: Path) -> None:
    service = small_service()
    memory = DurableMemory(tmp_path / "memory", capacity=5_000, key_size=8)
    service.layer.memory = memory
    with running(service) as server:
        fill(memory._database._connection)
        before = len(memory) + 40 * write_until_refused(server, "ant")
        assert len(memory) == before
        new = {"inputs": [picture(1)] * 200, "labels": ["dodo"] * 200, "idempotency_key": "k"}
        error_of(server.client.post("/v1/observe", json=new), 507, "disk_full")
        assert server.client.get("/v1/model").json()["room"] == 2
        post(server.client, "/v1/predict", inputs=[picture(1)])
        memory._database._connection.execute("PRAGMA max_page_count = 1000000")
        assert post(server.client, "/v1/observe", **new)["new_classes"] == ["dodo"]
        assert len(memory) == before + 200
    with DurableMemory(tmp_path / "memory", read_only=True) as again:
        assert len(again) == before + 200


def test_a_full_journal_never_lets_a_write_happen_twice(tmp_path: Path) -> None:
    """Wherever the journal fills up: a key that was answered or not, repeated once there is room, counts once."""
    with running(small_service(folder=tmp_path / "memory")) as server:
        data = server.engine._journal._data
        fill(data)
        statuses = set()
        for seed in range(120):
            content = {"inputs": [picture(seed)], "labels": ["ant"], "idempotency_key": "x" * 150 + str(seed)}
            statuses.add(server.client.post("/v1/observe", json=content).status_code)
        assert statuses == {200, 507}
        step = int(server.engine.memory.ring.step)
        post(server.client, "/v1/predict", inputs=[picture(1)])
        data.execute("PRAGMA max_page_count = 1000000")
        for seed in range(120):
            content = {"inputs": [picture(seed)], "labels": ["ant"], "idempotency_key": "x" * 150 + str(seed)}
            post(server.client, "/v1/observe", **content)
        assert step < 132
        assert int(server.engine.memory.ring.step) == 132


def test_keys_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEYS", 3)
    kept_keys = Journal(None)
    for number in range(5):
        kept_keys.complete(key=str(number), answer=Answer(b"", str(number)))
    assert [kept_keys.answer(str(number)) is not None for number in range(5)] == [False, False, True, True, True]
    kept_keys.close()


def test_a_newer_journal_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    new = Journal(path)
    new._data.execute("PRAGMA user_version = 99")
    new.close()
    before = path.read_bytes()
    with pytest.raises(FormatError, match="version 99"):
        Journal(path)
    assert path.read_bytes() == before


def test_a_journal_that_was_full_repeats_the_very_words_and_shows_the_picture(tmp_path: Path) -> None:
    """Its record of the last write is late; whatever comes next, the record is made first."""
    with running(small_service(folder=tmp_path / "memory")) as server:
        data = server.engine._journal._data
        fill(data)
        for seed in range(120):  # until the memory has a write that the journal could not take
            content = {"inputs": [picture(seed)], "labels": ["ant"], "idempotency_key": "x" * 150 + str(seed)}
            first = server.client.post("/v1/observe", json=content)
            if server.engine._ledger._unrecorded is not None:
                break
        assert first.status_code == 200
        data.execute("PRAGMA max_page_count = 1000000")
        slot = first.json()["slots"][0]
        assert server.client.delete("/v1/memories/3").status_code == 200
        assert server.client.post("/v1/observe", json=content).text == first.text
        neighbors = post(server.client, "/v1/explain", input=content["inputs"][0])["neighbors"]
        assert [neighbor["input"] is not None for neighbor in neighbors if neighbor["slot"] == slot] == [True]


def test_what_a_full_journal_has_not_taken_is_not_shown_once_it_is_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    with running(small_service(folder=folder)) as server:
        data = server.engine._journal._data
        fill(data)
        for seed in range(120):
            content = {"inputs": [picture(seed)], "labels": ["ant"], "idempotency_key": "x" * 150 + str(seed)}
            first = server.client.post("/v1/observe", json=content)
            if server.engine._ledger._unrecorded is not None:
                break
        data.execute("PRAGMA max_page_count = 1000000")
        assert server.client.delete(f"/v1/memories/{first.json()['slots'][0]}").status_code == 200
        assert server.client.post("/v1/observe", json=content).text == first.text
        stored = bytes(round(255 * ink) for row in torch.tensor(content["inputs"][0]).tolist() for ink in row)
        assert stored not in raw(folder)


def test_a_picture_outside_of_black_and_white_is_not_shown_as_another_one(tmp_path: Path) -> None:
    with running(small_service(folder=tmp_path / "memory")) as server:
        odd = [[-3.0, 0.2, 5.0, 0.4]] * 4
        slot = post(server.client, "/v1/observe", inputs=[odd], labels=["ant"])["slots"][0]
        nearest = post(server.client, "/v1/explain", input=odd)["neighbors"][0]
        assert (nearest["slot"], nearest["input"]) == (slot, None)


def raw(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(path.glob("service.sqlite*")))


def test_what_is_forgotten_is_gone_from_all_files_at_once_and_even_if_it_is_forgotten_elsewhere(tmp_path: Path) -> None:
    folder, pictures = tmp_path / "memory", [[[row / 9 + 0.06 * seed] * 4 for row in range(4)] for seed in (1, 2)]
    stored = [bytes(round(255 * ink) for row in one for ink in row) for one in torch.tensor(pictures).tolist()]
    with running(small_service(folder=folder)) as server:
        first, second = post(server.client, "/v1/observe", inputs=pictures, labels=["ant"] * 2)["slots"]
        assert all(one in raw(folder) for one in stored)
        assert server.client.delete(f"/v1/memories/{first}").status_code == 200
        assert [one in raw(folder) for one in stored] == [False, True]
    with DurableMemory(folder) as memory:
        memory.forget(second)
    with running(small_service(folder=folder)):
        assert stored[1] not in raw(folder)


@pytest.mark.parametrize("name", ["memory.sqlite", "service.sqlite"])
@pytest.mark.parametrize("how", ["cut", "gone", "another one"])
def test_a_file_that_is_taken_away_while_it_is_served_takes_no_more_writes(tmp_path: Path, name: str, how: str) -> None:
    folder = tmp_path / "memory"
    path = folder / name
    with running(small_service(folder=folder)) as server:
        post(server.client, "/v1/observe", inputs=[picture(1)], labels=["dodo"])
        if how == "cut":
            os.truncate(path, path.stat().st_size - 1)
        else:
            path.rename(tmp_path / "taken")
        if how == "another one":
            path.write_bytes((tmp_path / "taken").read_bytes())
        write = server.client.post("/v1/observe", json={"inputs": [picture(2)], "labels": ["emu"]})
        assert f"{path} is {how}" in error_of(write, 503, "not_stored")["got"]
        error_of(server.client.delete("/v1/memories/3"), 503, "not_stored")
        post(server.client, "/v1/predict", inputs=[picture(1)])
        assert server.client.get("/v1/model").json()["classes"] == ["ant", "bee", "cat", "dodo", None]
        assert len(server.engine.memory) == 13


@pytest.mark.parametrize("size", [0, 50, 4096, 2 * 4096, 5 * 4096])
def test_a_journal_that_was_cut_is_a_clear_error_at_the_start(tmp_path: Path, size: int) -> None:
    folder = tmp_path / "memory"
    with running(small_service(folder=folder)) as server:
        for seed in range(20):
            content = {"inputs": [picture(seed)], "labels": ["dodo"], "idempotency_key": 100 * str(seed)}
            post(server.client, "/v1/observe", **content)
    path = folder / "service.sqlite"
    assert path.stat().st_size > size
    os.truncate(path, size)
    before = path.read_bytes()
    error = SettingError if size == 0 else FormatError  # of an empty file nobody can say what it was
    with pytest.raises(error, match=r"Restore the folder|Name them all"), running(small_service(folder=folder)):
        pass
    assert size == 0 or path.read_bytes() == before


def test_forgotten_pictures_are_gone_from_the_file(tmp_path: Path) -> None:
    engine = begin(tmp_path / "memory")
    engine.close()
    path = tmp_path / "memory" / "service.sqlite"
    stored = bytes((engine.service.examples.inputs[5].flatten() * 255).round().int().tolist())
    assert stored in path.read_bytes()
    engine = begin(tmp_path / "memory")
    engine.forget(5, None)
    engine.close()
    assert stored not in path.read_bytes()
    assert not path.with_name("service.sqlite-wal").exists()
