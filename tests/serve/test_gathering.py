"""Gathering: concurrent requests become one batch, and nobody can tell by the answers."""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable

import httpx
import pytest
from serving import eventually, picture, running, small_service

from recollect.serve.batching import Gatherer
from recollect.serve.problems import RefusedError
from recollect.serve.settings import Settings


class Slow:
    """An encoder that can be stopped."""

    def __init__(self) -> None:
        self.inner = small_service().encode
        self.go = threading.Event()
        self.go.set()

    def __call__(self, inputs):
        assert self.go.wait(30)
        return self.inner(inputs)


def batch_sizes(text: str) -> tuple[float, float]:
    """Returns how many batches there were, and how many inputs in all."""
    found = dict(line.split() for line in text.splitlines() if line.startswith("recollect_batch_inputs_"))
    return float(found["recollect_batch_inputs_count"]), float(found["recollect_batch_inputs_sum"])


def test_what_was_gathered_is_what_each_would_be_alone() -> None:
    slow = Slow()
    bodies = [{"inputs": [picture(10 * seed + row) for row in range(1 + seed % 3)]} for seed in range(24)]
    with running(small_service(encode=slow)) as server:
        alone = [server.client.post("/v1/predict", json=body).json()["predictions"] for body in bodies]
        batches, _ = batch_sizes(server.client.get("/metrics").text)
        assert batches == 24
        slow.go.clear()
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            jobs = [pool.submit(httpx.post, f"{server.url}/v1/predict", json=body, timeout=60) for body in bodies]
            size = sum(len(body["inputs"]) for body in bodies)
            eventually(lambda: f"recollect_waiting_inputs {size}.0" in server.client.get("/metrics").text)
            slow.go.set()
            together = [job.result().json()["predictions"] for job in jobs]
        now, _ = batch_sizes(server.client.get("/metrics").text)
    assert now - batches <= 3  # one that was under way, and the rest
    for one, other in zip(alone, together, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert mine["label"] == theirs["label"]
            assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-6)


def test_switched_off_each_request_goes_alone() -> None:
    with running(settings=Settings(gather=1)) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            bodies = [{"inputs": [picture(seed)]} for seed in range(16)]
            list(pool.map(lambda body: httpx.post(f"{server.url}/v1/predict", json=body, timeout=60), bodies))
        assert batch_sizes(server.client.get("/metrics").text) == (16, 16)


def test_a_prediction_sees_all_or_nothing_of_a_write() -> None:
    """Half of each write says dodo, half emu, for the same picture: who sees one of them sees the other."""
    strange = picture(77)
    with running(small_service(classes=("ant", "bee", "cat", "dodo", "emu"))) as server:
        stop = threading.Event()

        def write() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                while not stop.is_set():
                    content = {"inputs": [strange] * 2, "labels": ["dodo", "emu"]}
                    for slot in client.post("/v1/observe", json=content).json()["slots"]:
                        client.delete(f"/v1/memories/{slot}")

        seen = set()
        thread = threading.Thread(target=write)
        thread.start()
        for _ in range(60):
            answer = server.client.post("/v1/explain", json={"input": strange}).json()
            near = [neighbor["label"] for neighbor in answer["neighbors"] if neighbor["distance"] < 1e-9]
            seen.add(tuple(near))
        stop.set()
        thread.join()
    assert seen <= {(), ("dodo", "emu"), ("emu",), ("dodo",)}
    assert ("dodo", "emu") in seen


def test_the_event_loop_answers_while_the_model_works() -> None:
    slow = Slow()
    with running(small_service(encode=slow)) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow.go.clear()
        job = pool.submit(httpx.post, f"{server.url}/v1/predict", json={"inputs": [picture(1)]}, timeout=60)
        eventually(lambda: "recollect_waiting_inputs 1.0" in server.client.get("/metrics").text)
        assert server.client.get("/healthz").status_code == 200
        assert not job.done()
        slow.go.set()
        assert job.result().status_code == 200


def gathered(test: Callable) -> None:
    asyncio.run(test())


def test_a_lonely_request_does_not_wait_and_a_busy_worker_gathers() -> None:
    batches: list[list[int]] = []
    go = threading.Event()

    def work(items: list[int]) -> list[int | Exception]:
        batches.append(items)
        assert go.wait(10)
        return [10 * item for item in items]

    async def test() -> None:
        gatherer = Gatherer(work, most=4, wait=5.0, room=100, seconds=20.0, told=lambda size: None)
        first = asyncio.create_task(gatherer.submit(1, 1))
        while not batches:
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(gatherer.submit(item, 1)) for item in range(2, 8)]
        await asyncio.sleep(0.01)
        job = asyncio.create_task(gatherer.alone(lambda: "job", 1))
        await asyncio.sleep(0.01)
        last = asyncio.create_task(gatherer.submit(8, 1))
        await asyncio.sleep(0.01)
        go.set()
        began = time.perf_counter()
        assert [await task for task in (first, *rest)] == [10, 20, 30, 40, 50, 60, 70]
        assert (await job, await last) == ("job", 80)
        assert time.perf_counter() - began < 4  # nobody waited for company
        assert gatherer.close(10.0)

    gathered(test)
    assert batches == [[1], [2, 3, 4, 5], [6, 7], [8]]  # no more than four, and none across a job


def test_a_full_queue_refuses_and_forgets_what_was_given_up() -> None:
    go, done = threading.Event(), []

    def work(items: list[int]) -> list[int | Exception]:
        assert go.wait(10)
        done.extend(items)
        return list(items)

    async def test() -> None:
        gatherer = Gatherer(work, most=4, wait=0.0, room=3, seconds=0.3, told=lambda size: None)
        first = asyncio.create_task(gatherer.submit(1, 1))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(gatherer.submit(2, 2))
        job = asyncio.create_task(gatherer.alone(lambda: done.append(99), 0))
        await asyncio.sleep(0.05)
        with pytest.raises(RefusedError) as full:
            await gatherer.submit(3, 1)
        assert (full.value.status, full.value.retry) == (429, 1)
        for task, unknown in ((first, True), (second, False), (job, False)):
            with pytest.raises(RefusedError) as late:
                await task
            assert late.value.status == 503
            assert ("may have happened" in str(late.value)) is unknown
        assert gatherer.size == 0
        go.set()
        assert await gatherer.submit(4, 50) == 4  # larger than the queue, but nothing waits
        assert gatherer.close(10.0)

    gathered(test)
    assert done == [1, 4]
