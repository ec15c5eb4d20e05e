"""``import recollect`` is light: torch, jaxtyping and safetensors, and nothing that only some need."""

import json
import subprocess
import sys

import pytest

OPTIONAL = (
    *("faiss", "pymilvus", "milvus_lite", "sklearn", "scipy", "pandas", "transformers", "datasets", "matplotlib"),
    *("PIL", "rich", "tyro", "pooch", "requests", "fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"),
    *("beartype", "hypothesis", "pytest"),
)
SCRIPT = """
import json, sys
import torch, jaxtyping, safetensors.torch
before = {name.split(".")[0] for name in sys.modules}
state, threads = torch.get_rng_state(), torch.get_num_threads()
import recollect
after = {name.split(".")[0] for name in sys.modules}
own = sorted(name for name in sys.modules if name.startswith("recollect"))
untouched = torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
print(json.dumps({"before": sorted(before), "after": sorted(after), "own": own, "untouched": untouched}))
"""


@pytest.fixture(scope="module")
def modules() -> dict:
    run = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return json.loads(run.stdout)


def test_import_loads_no_optional_package(modules: dict) -> None:
    assert not set(modules["after"]) & set(OPTIONAL)


def test_import_takes_only_the_core_dependencies(modules: dict) -> None:
    new = set(modules["after"]) - set(modules["before"]) - sys.stdlib_module_names
    assert new == {"recollect"}


def test_import_loads_only_the_core_of_the_package(modules: dict) -> None:
    rooms = {name.split(".")[1] for name in modules["own"] if "." in name}
    assert {"mbpa", "memory"} <= rooms
    assert not rooms & {"experiments", "cli", "cli_memory", "serve", "data", "models", "integrations"}


def test_import_has_no_side_effects(modules: dict) -> None:
    assert modules["untouched"]
