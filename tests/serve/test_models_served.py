"""What can be served, what cannot, and what of it outlives the process."""

import sys
from pathlib import Path

import pytest
import torch
from serving import SHAPE, picture, running, small_service
from test_service import JSON, error_of, post
from torch import nn

from recollect import (
    ApproximateIndex,
    DurableMemory,
    EpisodicMemory,
    LocalAdaptation,
    MbPA,
    MilvusMemory,
    Parametric,
    rules,
)
from recollect.errors import FormatError, LabelError, SettingError
from recollect.serve import Examples, Service, wire
from recollect.serve.journal import Journal
from recollect.serve.problems import RefusedError

# Other models ---------------------------------------------------------------------------------------------------------


def test_texts_are_served_and_shown() -> None:
    def letters(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[text.count(letter) + 0.0 for letter in "aeiou"] for text in texts])

    memory = EpisodicMemory(capacity=10, key_size=5)
    layer = MbPA(nn.Linear(5, 3), memory, neighbors=2, adaptation=LocalAdaptation(rules.sgd(1.0), steps=5))
    with running(Service(letters, layer, input_shape=None, classes=("yes",))) as server:
        post(server.client, "/v1/observe", inputs=["ananas", "kiwi é"], labels=["fruit", "yes"])
        answer = post(server.client, "/v1/explain", input="banana")
        assert answer["after"]["label"] == "fruit"
        assert [neighbor["input"] for neighbor in answer["neighbors"]] == ["ananas", "kiwi é"]
        error_of(server.client.post("/v1/predict", json={"inputs": [[1.0]]}), 422, "wrong_type")
        surrogate = server.client.post("/v1/predict", content=b'{"inputs": ["\\ud800"]}', headers=JSON)
        error_of(surrogate, 422, "wrong_type")


def test_an_empty_memory_predicts_what_the_network_predicts() -> None:
    with running(small_service(examples=None)) as server:
        answer = post(server.client, "/v1/explain", input=picture(1))
        assert answer["neighbors"] == []
        assert answer["before"] == answer["after"]
        service = server.engine.service
        truth = Parametric(service.layer.head)(service.keys(torch.tensor([picture(1)]))).exp()[0].tolist()
        assert post(server.client, "/v1/predict", inputs=[picture(1)])["predictions"][0]["probabilities"] == truth


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_shape": (4, 0)}, "sizes above 0"),
        ({"input_shape": [4, 4]}, "sizes above 0"),
        ({"classes": ("a", "a")}, "different names"),
        ({"classes": ("a", "")}, "1 to 100 printable"),
        ({"classes": ["a"]}, "tuple"),
        ({"encode": 5}, "function or a module"),
        ({"layer": nn.Linear(8, 5)}, "must be an MbPA"),
        ({"examples": Examples(["a"], [])}, "1 inputs, but 0 labels"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_a_service_of_parts_that_do_not_fit_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        small_service(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_shape": (4, 5)}, "fails on an input of shape"),
        ({"encode": lambda inputs: inputs}, "keys"),
        ({"classes": tuple("abcdef")}, "only 5 outputs"),
    ],
)
def test_what_does_not_fit_shows_at_the_start(changed: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message), running(small_service(**changed)):
        pass


# What outlives the process --------------------------------------------------------------------------------------------


def test_names_keys_and_pictures_are_there_after_a_restart(tmp_path: Path) -> None:
    content = {"inputs": [picture(1)], "labels": ["dodo"], "idempotency_key": "once"}
    with running(small_service(folder=tmp_path / "memory")) as server:
        first = post(server.client, "/v1/observe", **content)
        why = post(server.client, "/v1/explain", input=picture(1))
        assert isinstance(server.engine.memory, DurableMemory)
        for slot in (0, 1):
            server.client.delete(f"/v1/memories/{slot}")
    with running(small_service(folder=tmp_path / "memory")) as server:
        assert post(server.client, "/v1/observe", **content) == first
        assert len(server.engine.memory) == 11  # the examples have not come back
        again = post(server.client, "/v1/explain", input=picture(1))
        assert again["neighbors"][0] == why["neighbors"][0]
        assert again["classes"] == ["ant", "bee", "cat", "dodo", None]
    with (
        pytest.raises(SettingError, match="was begun with"),
        running(small_service(folder=tmp_path / "memory", classes=("x", "y"))),
    ):
        pass


def test_a_durable_memory_of_ones_own_is_served(tmp_path: Path) -> None:
    made = small_service()
    memory = DurableMemory(tmp_path / "own", capacity=20, key_size=8)
    layer = MbPA(made.layer.head, memory, neighbors=4, adaptation=LocalAdaptation(rules.sgd(1.0), steps=5))
    with running(small_service(layer=layer)) as server:
        post(server.client, "/v1/observe", inputs=[picture(1)], labels=["dodo"])
    with DurableMemory(tmp_path / "own", read_only=True) as memory:
        assert len(memory) == 13
    with (
        pytest.raises(SettingError, match="Leave folder out"),
        running(small_service(layer=layer, folder=tmp_path / "other")),
    ):
        pass


def test_a_memory_that_does_not_fit_the_names_the_head_or_the_folder_is_refused(tmp_path: Path) -> None:
    def refused(match: str, **changed) -> None:
        with pytest.raises((SettingError, LabelError), match=match), running(small_service(**changed)):
            pass

    made = small_service()
    for label, match in (
        (3, "label 3, but only the outputs 0 to 2 have names"),
        (5, r"5 classes .* forget those entries\.$"),
    ):
        made.layer.memory.clear()
        made.layer.memory.write(torch.rand(2, 8), torch.tensor([1, label]))
        refused(match, layer=made.layer)
    folder = tmp_path / "memory"
    with running(small_service(folder=folder)) as server:
        (slot,) = post(server.client, "/v1/observe", inputs=[picture(1)], labels=["dodo"])["slots"]
        server.client.delete(f"/v1/memories/{slot}")
    adapt, head = made.layer.adaptation, made.layer.head
    small = MbPA(nn.Linear(8, 3), EpisodicMemory(50, 8), neighbors=4, adaptation=adapt)
    refused("begun with the classes .* 3 outputs", folder=folder, layer=small)
    large = MbPA(head, EpisodicMemory(500, 8), neighbors=4, adaptation=adapt)
    refused("capacity=50 there, 500 asked", folder=folder, layer=large)
    with DurableMemory(folder, read_only=True) as memory:
        refused("read_only", layer=MbPA(head, memory, neighbors=4, adaptation=adapt))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    refused("something else than a memory", folder=tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_durable_copy_keeps_the_index(tmp_path: Path) -> None:
    made, index = small_service(), ApproximateIndex()
    memory = EpisodicMemory(capacity=50, key_size=8, index=index)
    layer = MbPA(made.layer.head, memory, neighbors=4, adaptation=made.layer.adaptation)
    with running(small_service(layer=layer, folder=tmp_path / "memory")) as server:
        assert server.engine.memory.ring.index is index
        nearest = post(server.client, "/v1/explain", input=made.examples.inputs[7].tolist())["neighbors"][0]
        assert (nearest["slot"], nearest["distance"]) == (7, pytest.approx(0.0, abs=1e-9))


def test_a_shared_memory_takes_no_classes_that_others_would_not_know(tmp_path: Path) -> None:
    memory = MilvusMemory(tmp_path / "memory.db", "digits", capacity=20, key_size=8)
    made = small_service()
    layer = MbPA(made.layer.head, memory, neighbors=4, adaptation=made.layer.adaptation)
    with running(small_service(layer=layer)) as server:
        model = server.client.get("/v1/model").json()
        assert (model["entries"], model["room"], model["classes"]) == (12, 0, ["ant", "bee", "cat", None, None])
        new = server.client.post("/v1/observe", json={"inputs": [picture(1)], "labels": ["dodo"]})
        assert "name all classes in Service" in error_of(new, 422, "no_room")["do"]
        slots = post(server.client, "/v1/observe", inputs=[picture(1)], labels=["bee"])["slots"]
        nearest = post(server.client, "/v1/explain", input=picture(1))["neighbors"][0]
        assert (nearest["slot"], nearest["label"], nearest["written"]) == (slots[0], "bee", None)
        assert server.client.delete(f"/v1/memories/{slots[0]}").json()["entries"] == 12
    memory.close()


def test_a_server_behind_the_model_that_is_away_is_not_the_fault_of_the_request() -> None:
    away: list[bool] = []
    tried: list[int] = []
    inner = small_service().encode

    def asks_a_server(inputs: torch.Tensor) -> torch.Tensor:
        tried.append(len(inputs))
        if away:
            raise ConnectionRefusedError("nobody listens")
        return inner(inputs)

    with running(small_service(encode=asks_a_server)) as server:
        good = [wire.inputs([picture(seed)], SHAPE, 1) for seed in range(3)]
        assert len(server.engine.predict(good)) == 3
        away.append(True)
        tried.clear()
        answers = server.engine.predict(good)
        assert [answer.status for answer in answers if isinstance(answer, RefusedError)] == [503] * 3
        assert tried == [3]  # and not each by itself again, which would take three times as long
        for path, content in (
            ("/v1/predict", {"inputs": [picture(1)]}),
            ("/v1/explain", {"input": picture(1)}),
            ("/v1/observe", {"inputs": [picture(1)], "labels": ["dodo"]}),
        ):
            answer = server.client.post(path, json=content)
            assert "nobody listens" in error_of(answer, 503, "unreachable")["got"]
            assert answer.headers["retry-after"] == "5"
        away.clear()
        post(server.client, "/v1/observe", inputs=[picture(1)], labels=["dodo"])


def test_an_encoder_that_wants_to_exit_ends_nothing() -> None:
    def exits(inputs: torch.Tensor) -> torch.Tensor:
        if bool((inputs > 100).any()):
            sys.exit(3)
        return inputs.flatten(1)[:, :8]

    with running(small_service(encode=exits)) as server:
        answer = server.client.post("/v1/predict", json={"inputs": [[[101.0] * 4] * 4]})
        assert "status 3" in error_of(answer, 422, "not_taken")["got"]
        post(server.client, "/v1/predict", inputs=[picture(1)])


def test_a_foreign_journal_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "service.sqlite"
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(FormatError, match="damaged or no journal"):
        Journal(path)
    assert path.read_bytes() == b"something else entirely" * 100
