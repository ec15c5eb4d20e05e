"""What README and docs/serving.md print works as printed: a notebook becomes a service, and curl talks to it."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import httpx
import torch
from serving import command, running
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
from recollect.serve import Service, journal

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_five_lines_of_the_readme_turn_its_first_example_into_a_service(tmp_path: Path) -> None:
    notebook, *others = blocks("README.md", "python")
    lines = next(block for block in others if "recollect.serve" in block)
    assert len([line for line in lines.splitlines() if line]) <= 5
    (tmp_path / "service.py").write_text(notebook + lines)
    what = re.findall(r"^recollect serve (\S+:\S+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    for entries in (200, 201):
        with command(*what, folder=tmp_path, PYTHONPATH=PATH) as service:
            with httpx.Client(base_url=service.url, timeout=60) as client:
                assert client.get("/readyz").json()["entries"] == entries
                content = {"inputs": [[[0.5] * 8] * 8], "labels": ["9"], "idempotency_key": "readme"}
                assert client.post("/v1/observe", json=content).json()["entries"] == 201
                (prediction,) = client.post("/v1/predict", json={"inputs": content["inputs"]}).json()["predictions"]
                assert prediction["label"] == "9"
            service.process.send_signal(signal.SIGTERM)
            assert service.ended() == 0


def test_the_service_of_the_page_is_served_as_it_is_printed(tmp_path: Path) -> None:
    (block,) = blocks("docs/serving.md", "python")
    (tmp_path / "service.py").write_text(block)
    with command("service:service", folder=tmp_path, PYTHONPATH=PATH) as service:
        model = httpx.get(f"{service.url}/v1/model").json()
        assert (model["entries"], model["is_picture"], model["input_shape"]) == (180, True, [8, 8])
        assert (tmp_path / "memory" / "memory.sqlite").exists()


def test_curl_gets_what_the_page_says() -> None:
    (block,) = (block for block in blocks("docs/serving.md", "sh") if "curl" in block)
    memory = EpisodicMemory(capacity=1_000, key_size=9)
    memory.write(torch.rand(180, 9), torch.arange(180) % 10)
    layer = MbPA(nn.Linear(9, 12), memory, neighbors=3, adaptation=LocalAdaptation(rules.sgd(1.0), steps=5))
    names = tuple("0123456789")
    with running(Service(nn.Flatten(), layer, input_shape=(3, 3), classes=names)) as server:
        script = block.replace("http://127.0.0.1:8000", server.url).replace("curl", "curl -sS -w '\\n'")
        done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    promised = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# {")]
    assert len(answers) == len(promised) == 4
    for answer, line in zip(answers, promised, strict=True):
        assert set(re.findall(r'"(\w+)":', line)) <= set(re.findall(r'"(\w+)":', answer))
    assert [json.loads(answers[at]) == json.loads(promised[at]) for at in (1, 3)] == [True, True]
    nearest = json.loads(answers[2])["neighbors"][0]
    assert (nearest["slot"], nearest["label"]) == (180, "seven, crossed")


def test_the_page_names_every_flag_and_the_limits_that_it_promises_are_those_of_the_code() -> None:
    page = (ROOT / "docs/serving.md").read_text()
    for flag in ("body", "inputs", "queue", "gather", "wait", "timeout", "drain", "memory", "shape", "classes"):
        assert f"--{flag}" in page
    assert f"newest {journal.KEYS:,} keys" in page
