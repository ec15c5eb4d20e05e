"""The API as a client meets it: predict, observe, explain, forget, and what each says when something is wrong."""

import concurrent.futures
import json
from collections.abc import Iterator

import httpx
import pytest
import torch
from serving import SHAPE, Running, picture, running, small_service
from torch import nn

from recollect import (
    EpisodicMemory,
    LocalAdaptation,
    MbPA,
    rules,
)
from recollect.serve import Service
from recollect.serve.settings import Settings


@pytest.fixture
def served() -> Iterator[Running]:
    with running() as server:
        yield server


def post(client: httpx.Client, path: str, status: int = 200, **content) -> dict:
    answer = client.post(path, json=content)
    assert answer.status_code == status, answer.text
    return answer.json()


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"code", "got", "need", "do"}
    assert error["code"] == code
    return error


# What the endpoints answer --------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_layer(served: Running) -> None:
    pictures = [picture(seed) for seed in range(7)]
    predictions = post(served.client, "/v1/predict", inputs=pictures)["predictions"]
    service = served.engine.service
    truth = service.layer(service.keys(torch.tensor(pictures))).exp()
    got = torch.tensor([prediction["probabilities"] for prediction in predictions])
    assert torch.equal(got, truth)
    assert [prediction["label"] for prediction in predictions] == [
        served.engine.names[number] for number in truth[:, :3].argmax(-1).tolist()
    ]


def test_a_class_never_seen_is_taught_predicted_and_forgotten(served: Running) -> None:
    client, strange = served.client, picture(100)
    before = post(client, "/v1/explain", input=strange)
    assert before["after"]["label"] != "dodo"
    taught = post(client, "/v1/observe", inputs=[strange], labels=["dodo"])
    assert taught["new_classes"] == ["dodo"]
    assert taught["entries"] == 13
    model = client.get("/v1/model").json()
    assert model["classes"] == ["ant", "bee", "cat", "dodo", None]
    assert model["room"] == 1
    after = post(client, "/v1/explain", input=strange)
    assert after["after"]["label"] == "dodo"
    assert after["before"] == before["before"]
    nearest = after["neighbors"][0]
    assert nearest["slot"] == taught["slots"][0]
    assert nearest["label"] == "dodo"
    assert nearest["input"] == pytest.approx([pytest.approx(row, abs=1 / 255) for row in strange])
    assert client.delete(f"/v1/memories/{nearest['slot']}").json() == {"slot": nearest["slot"], "entries": 12}
    again = post(client, "/v1/explain", input=strange)
    assert again["after"] == before["after"]
    assert post(client, "/v1/predict", inputs=[strange])["predictions"][0] == before["after"]


def test_an_explanation_is_that_of_the_layer(served: Running) -> None:
    answer = post(served.client, "/v1/explain", input=picture(5))
    service = served.engine.service
    why = service.layer.explain(service.keys(torch.tensor([picture(5)]))[0])
    assert answer["exact"] is True
    for name in ("slots", "weights", "distances", "contributions"):
        field = name if name == "contributions" else name[:-1]
        assert [neighbor[field] for neighbor in answer["neighbors"]] == getattr(why, name).tolist()
    assert answer["before"]["probabilities"] == why.before.exp().tolist()
    assert answer["after"]["probabilities"] == why.after.exp().tolist()
    assert [n["label"] for n in answer["neighbors"]] == [served.engine.names[v] for v in why.values.tolist()]


def test_where_no_room_is_left_a_new_class_is_refused_and_nothing_stored(served: Running) -> None:
    three = {"inputs": [picture(s) for s in range(3)], "labels": ["dodo", "emu", "fox"]}
    error = error_of(served.client.post("/v1/observe", json=three), 422, "no_room")
    assert "'dodo', 'emu', 'fox'" in error["got"]
    assert "room for 2" in error["got"]
    assert "grow" in error["do"]
    assert served.client.get("/v1/model").json()["classes"] == ["ant", "bee", "cat", None, None]
    assert len(served.engine.memory) == 12


def test_a_memory_is_forgotten_once_and_only_the_one_that_was_meant(served: Running) -> None:
    client = served.client
    error_of(client.delete("/v1/memories/3", params={"written": 2}), 409, "overwritten")
    assert client.delete("/v1/memories/3", params={"written": 3}).status_code == 200
    error_of(client.delete("/v1/memories/3"), 404, "empty_slot")
    error_of(client.delete("/v1/memories/50"), 422, "no_slot")
    error_of(client.delete("/v1/memories/-1"), 422, "no_slot")
    error_of(client.delete("/v1/memories/" + "9" * 5000), 422, "no_slot")
    error_of(client.delete("/v1/memories/1", params={"written": "x"}), 422, "no_time")
    assert len(served.engine.memory) == 11


def test_probes_and_counters(served: Running) -> None:
    post(served.client, "/v1/predict", inputs=[picture(1)])
    served.client.post("/v1/predict", content="{", headers=JSON)
    post(served.client, "/v1/observe", inputs=[picture(1)], labels=["ant"])
    assert served.client.get("/healthz").json() == {"healthy": True}
    assert served.client.get("/readyz").json() == {"ready": True, "entries": 13}
    lines = served.client.get("/metrics").text.splitlines()
    assert 'recollect_requests_total{endpoint="/v1/predict",status="200"} 1.0' in lines
    assert 'recollect_requests_total{endpoint="/v1/predict",status="400"} 1.0' in lines
    assert "recollect_observed_total 1.0" in lines
    assert "recollect_memory_entries 13.0" in lines
    assert "recollect_memory_capacity 50.0" in lines
    assert "recollect_waiting_inputs 0.0" in lines
    assert "recollect_batch_inputs_count 1.0" in lines


def test_unknown_addresses_and_methods_are_errors_of_the_same_form(served: Running) -> None:
    error_of(served.client.get("/v2/predict"), 404, "no_such_address")
    error_of(served.client.get("/page/../app.py"), 404, "no_such_address")
    error_of(served.client.get("/page/index.html"), 404, "no_such_address")
    error_of(served.client.get("/v1/predict"), 405, "wrong_method")


def test_openapi_knows_shapes_and_errors(served: Running) -> None:
    paths = served.client.get("/openapi.json").json()["paths"]
    assert paths.keys() >= {"/v1/predict", "/v1/observe", "/v1/explain", "/v1/memories/{slot}", "/v1/model"}
    body = paths["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    one = body["properties"]["inputs"]["items"]
    assert (one["minItems"], one["items"]["maxItems"]) == SHAPE
    assert {"413", "422", "429", "503", "507"} <= paths["/v1/observe"]["post"]["responses"].keys()


# Idempotency ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["header", "field"])
def test_a_repeated_key_is_answered_as_before_and_written_once(served: Running, where: str) -> None:
    content = {"inputs": [picture(1), picture(2)], "labels": ["ant", "dodo"]}
    headers = {"Idempotency-Key": "one"} if where == "header" else {}
    more = {} if where == "header" else {"idempotency_key": "one"}
    first = served.client.post("/v1/observe", json=content | more, headers=headers)
    second = served.client.post("/v1/observe", json=dict(reversed((content | more).items())), headers=headers)
    assert first.status_code == second.status_code == 200
    assert first.text == second.text
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert len(served.engine.memory) == 14
    other = served.client.post("/v1/observe", json={**content, "labels": ["ant", "ant"]} | more, headers=headers)
    error_of(other, 422, "key_was_used")
    assert len(served.engine.memory) == 14


def test_the_same_key_at_once_is_written_once(served: Running) -> None:
    content = {"inputs": [picture(1)], "labels": ["ant"], "idempotency_key": "race"}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(httpx.post, f"{served.url}/v1/observe", json=content, timeout=60) for _ in range(16)]
        texts = {job.result().text for job in jobs}
    assert len(texts) == 1
    assert len(served.engine.memory) == 13


def test_keys_that_make_no_sense_are_refused(served: Running) -> None:
    content = {"inputs": [picture(1)], "labels": ["ant"]}
    two = served.client.post("/v1/observe", json=content | {"idempotency_key": "a"}, headers={"Idempotency-Key": "b"})
    error_of(two, 422, "two_keys")
    for key in ("", "k" * 201, "\n", "é", "\ud800"):
        answer = served.client.post("/v1/observe", content=json.dumps(content | {"idempotency_key": key}), headers=JSON)
        error_of(answer, 422, "bad_key")
    for key in (7, None):
        error_of(served.client.post("/v1/observe", json=content | {"idempotency_key": key}), 422, "wrong_type")
    assert len(served.engine.memory) == 12


# What is refused ------------------------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "not_json"),
        (b"{", 400, "not_json"),
        (b"\xff\xfe\x00", 400, "not_json"),
        (b"[" * 100_000, 400, "not_json"),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", 400, "not_json"),
        (b"[]", 422, "wrong_type"),
        (b"null", 422, "wrong_type"),
        (b"{}", 422, "missing_field"),
        (b'{"inputs": [], "extra": 1}', 422, "unknown_field"),
        (b'{"inputs": [], "\\ud800": 1}', 422, "unknown_field"),
        (b'{"inputs": []}', 422, "wrong_type"),
        (b'{"inputs": "text"}', 422, "wrong_type"),
        (b'{"inputs": [1, 2]}', 422, "wrong_shape"),
        (b'{"inputs": [[[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3]]]}', 422, "wrong_shape"),
        (b'{"inputs": [[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,4]], [[1]]]}', 422, "wrong_shape"),
        (b'{"inputs": [[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,"4"]]]}', 422, "wrong_type"),
        (b'{"inputs": [[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,null]]]}', 422, "wrong_type"),
        (b'{"inputs": [[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,true]]]}', 422, "wrong_type"),
        (b'{"inputs": [[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,NaN]]]}', 422, "not_finite"),
        (b'{"inputs": [[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,Infinity]]]}', 422, "not_finite"),
        (b'{"inputs": [[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,-Infinity]]]}', 422, "not_finite"),
        (b'{"inputs": [[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,1e999]]]}', 422, "not_finite"),
        (b'{"inputs": [[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,1e39]]]}', 422, "not_finite"),
        (b'{"inputs": [[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,' + b"9" * 400 + b"]]]}", 422, "not_finite"),
    ],
)
def test_a_body_that_makes_no_sense_is_refused(served: Running, body: bytes, status: int, code: str) -> None:
    error_of(served.client.post("/v1/predict", content=body, headers=JSON), status, code)
    assert post(served.client, "/v1/predict", inputs=[picture(1)])["predictions"]


def test_an_error_names_the_place(served: Running) -> None:
    bad = [picture(1), picture(2)]
    bad[1][3] = [1.0, 2.0, 3.0]
    error = error_of(served.client.post("/v1/predict", json={"inputs": bad}), 422, "wrong_shape")
    assert error["got"] == "a list of 3 as inputs[1]"
    assert "[4, 4]" in error["need"]


@pytest.mark.parametrize(
    "labels",
    [[], ["ant", "bee"], "ant", [None], [True], [1.5], [7], [""], [" "], ["x" * 101], ["a\nb"], ["\ud800"]],
)
def test_labels_that_make_no_sense_are_refused(served: Running, labels: object) -> None:
    content = json.dumps({"inputs": [picture(1)], "labels": labels})
    error_of(served.client.post("/v1/observe", content=content, headers=JSON), 422, "wrong_type")
    assert len(served.engine.memory) == 12


def test_what_the_model_cannot_take_hurts_only_the_request_that_holds_it(served: Running) -> None:
    def refuses_large(inputs: torch.Tensor) -> torch.Tensor:
        if bool((inputs > 100).any()):
            raise ValueError("a number above 100")
        return inputs.flatten(1)[:, :8]

    good, bad = {"inputs": [picture(1)]}, {"inputs": [[[101.0] * 4] * 4]}
    with running(small_service(encode=refuses_large)) as server:
        truth = post(server.client, "/v1/predict", **good)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(httpx.post, f"{server.url}/v1/predict", json=b, timeout=60) for b in [good, bad] * 8]
            answers = [job.result() for job in jobs]
        for answer in answers[::2]:
            assert answer.json()["predictions"][0]["probabilities"] == pytest.approx(
                truth["predictions"][0]["probabilities"], abs=1e-6
            )
        for answer in answers[1::2]:
            assert "above 100" in error_of(answer, 422, "not_taken")["got"]
        refused = server.client.post("/v1/observe", json={**bad, "labels": ["dodo"], "idempotency_key": "k"})
        error_of(refused, 422, "not_taken")
        assert len(server.engine.memory) == 12
        assert server.client.get("/v1/model").json()["room"] == 2
        fine = server.client.post("/v1/observe", json={**good, "labels": ["dodo"], "idempotency_key": "k"})
        assert fine.json()["entries"] == 13


def test_an_adaptation_that_runs_away_is_an_error_and_no_nan() -> None:
    memory = EpisodicMemory(capacity=10, key_size=2)
    memory.write(torch.tensor([[1e8, 0.0], [0.0, 1e8]]), torch.tensor([0, 1]))
    head = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    layer = MbPA(head, memory, neighbors=2, adaptation=LocalAdaptation(rules.sgd(1e30), steps=20))
    with running(Service(nn.Identity(), layer, input_shape=(2,))) as server:
        error_of(server.client.post("/v1/predict", json={"inputs": [[1e8, 1e8]]}), 422, "not_finite")
        error_of(server.client.post("/v1/explain", json={"input": [1e8, 1e8]}), 422, "not_finite")


def test_limits_are_told(served: Running) -> None:
    limits = served.client.get("/v1/model").json()["limits"]
    usual = Settings()
    assert limits == {"body": usual.body, "inputs": usual.inputs, "queue": usual.queue}
