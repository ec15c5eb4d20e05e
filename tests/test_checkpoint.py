"""Checkpoints: what comes back, what a kill leaves behind, and what is refused."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.bits import bits
from safetensors.torch import save, save_file
from torch import nn

from recollect.checkpoint import read, write
from recollect.errors import DtypeError, FormatError

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
Pair = namedtuple("Pair", "first second")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.safetensors"


def back(path: Path, state: Mapping[str, Any]) -> Any:
    write(path, state, run={})
    return read(path, run={})


# What comes back ------------------------------------------------------------------------------------------------------


def test_missing_file_is_none(path: Path) -> None:
    assert read(path, run={"any": 1}) is None
    assert read(path / "below" / "nothing", run={}) is None


def test_folders_are_made(path: Path) -> None:
    deep = path.parent / "a" / "b" / "c.safetensors"
    write(deep, {"x": 1}, run={})
    assert read(deep, run={}) == {"x": 1}
    assert [p.name for p in deep.parent.iterdir()] == ["c.safetensors"]


def test_nothing_and_next_to_nothing(path: Path) -> None:
    assert back(path, {}) == {}
    state = {"": [], "a": (), "b": {}, "c": None, "d": ((), [()], {"": {}})}
    assert bits(back(path, state)) == bits(state)


def test_nested_states_come_back_with_their_types_and_order(path: Path) -> None:
    state = {
        "z": {2: "two", 1: torch.arange(3), -7: None, "1": "a word", 10: {0: [1, (2, [3.5])]}},
        "a": [True, False, 1, 0, 1.0, 0.0, -0.0, 10**40, -(2**63), 1e-320, 0.1, float("inf"), float("nan"), None],
        "words": ["", "tensor-0", '"', "\\", "\n\0", "ü", "\U0001f600", "dict", "None"],
        "like the code's own": [{"tensor": "tensor-0"}, {"dict": []}, {"list": [1]}, {"tuple": [1]}, ("tensor",)],
        "tuple": (torch.tensor(1.5), (None, (True,)), [(), []]),
    }
    assert bits(back(path, state)) == bits(state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_all_dtypes_and_shapes(path: Path, dtype: torch.dtype) -> None:
    tensors = [torch.randint(0, 2, shape).to(dtype) for shape in ((), (0,), (3, 0, 2), (1,), (2, 3))]
    state = {"a": tensors, **dict(enumerate(tensors))}
    if dtype.is_floating_point:
        size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        state["any"] = torch.randint(torch.iinfo(size).min, torch.iinfo(size).max, (5000,), dtype=size).view(dtype)
        state["special"] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    assert bits(back(path, state)) == bits(state)


def test_shared_strided_and_expanded_tensors(path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    state = {
        "base": base,
        "again": base,
        "view": base[1],
        "steps": base[:, ::2],
        "transposed": base.t(),
        "expanded": torch.tensor([1.0]).expand(5),
        "channels": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "negated": torch.complex(base, base).conj().imag,
        "parameter": nn.Parameter(base.clone()),
        "of a graph": nn.Parameter(base.clone()) * 2,
    }
    found = back(path, state)
    assert bits(found) == bits(state)
    found["base"].zero_()
    assert bits(found["again"]) == bits(base), "tensors that were shared come back apart"
    assert not found["parameter"].requires_grad
    assert bits(base) == bits(torch.arange(24.0).view(4, 6)), "what was written is untouched"


def test_the_state_may_change_while_it_is_kept(path: Path) -> None:
    tensor = torch.zeros(3)
    write(path, {"a": tensor}, run={})
    found = read(path, run={})
    tensor.fill_(9)
    write(path, {"a": tensor}, run={})  # over the file that `found` was read from
    assert found is not None
    assert found["a"].tolist() == [0, 0, 0]
    assert bits(read(path, run={})) == bits({"a": tensor})


def test_ordered_dictionaries_and_modules(path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    network(torch.randn(5, 3))
    assert isinstance(network.state_dict(), OrderedDict)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other.load_state_dict(back(path, {"n": network.state_dict()})["n"])
    assert bits(other.state_dict()) == bits(network.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda ps: torch.optim.Adam(ps, lr=0.01, betas=(0.8, 0.99), amsgrad=True),
        lambda ps: torch.optim.AdamW([{"params": ps[:1], "lr": 0.1}, {"params": ps[1:], "weight_decay": 0.3}]),
        lambda ps: torch.optim.RMSprop(ps, centered=True, momentum=0.1),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop"],
)
def test_optimizers_go_on_as_if_nothing_had_happened(path: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    def trained(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        generator = torch.Generator().manual_seed(steps)
        for _ in range(steps):
            optimizer.zero_grad()
            network(torch.randn(4, 3, generator=generator)).square().sum().backward()
            optimizer.step()

    network, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, fresh = make(list(network.parameters())), make(list(other.parameters()))
    trained(network, optimizer, 3)
    state = back(path, {"network": network.state_dict(), "optimizer": optimizer.state_dict()})
    assert bits(state["optimizer"]) == bits(optimizer.state_dict())
    other.load_state_dict(state["network"])
    fresh.load_state_dict(state["optimizer"])
    trained(network, optimizer, 4)
    trained(other, fresh, 4)
    assert bits(other.state_dict()) == bits(network.state_dict())
    assert bits(fresh.state_dict()) == bits(optimizer.state_dict())


def test_generators_go_on(path: Path) -> None:
    generator, other = torch.Generator().manual_seed(3), torch.Generator()
    torch.randn(7, generator=generator)
    other.set_state(back(path, {"g": generator.get_state()})["g"])
    assert torch.equal(torch.randn(50, generator=other), torch.randn(50, generator=generator))


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from([torch.ones(2)])
)
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=15)
@given(state=st.dictionaries(st.text(max_size=3), STATES, max_size=4))
def test_reading_undoes_writing(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    assert bits(back(path, state)) == bits(state)


def test_random_state_is_untouched(path: Path, rng_untouched: Callable[[], Any]) -> None:
    with rng_untouched():
        back(path, {"a": torch.ones(3)})


# Kills ----------------------------------------------------------------------------------------------------------------

_FLOATS = 50_000
_PLACES = ("half a file", "before the digest", "before fsync", "before the name", "after the name")


def _state(number: int) -> dict[str, Any]:
    return {"number": number, "tensors": [torch.full((_FLOATS,), float(number)), torch.tensor(number)], number: "key"}


def _consistent(state: Any) -> int:
    """The number of a state that is whole."""
    assert bits(state) == bits(_state(state["number"]))
    return state["number"]


def _die(*_: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_on(path: Path, first: int, place: str | None) -> None:
    """In a child: writes state after state, until it is killed or kills itself while the second is written."""
    replace = Path.replace
    write(path, _state(first), run={})
    if place == "half a file":

        class Half(io.FileIO):
            def write(self, data: Any) -> int:
                super().write(data[: len(data) // 2])
                return _die()

        def opened(self: Path, mode: str) -> Half:
            return Half(self, mode)

        Path.open = opened
    elif place == "before the digest":
        hashlib.sha256 = _die
    elif place == "before fsync":
        os.fsync = _die
    elif place == "before the name":
        Path.replace = _die
    elif place == "after the name":

        def replaced(self: Path, target: Path) -> None:
            replace(self, target)
            _die()

        Path.replace = replaced
    for number in range(first + 1, first + 500):  # and no longer, should nothing kill it
        write(path, _state(number), run={})


def _kill_again_and_again(folder: Path) -> None:
    """In a process of its own: forks writers, kills them, and reads what is left."""
    path, draw = folder / "state.safetensors", random.Random(0)
    write(path, _state(0), run={})
    last, found, start = 0, [], 1
    for place in [*_PLACES, *([None] * 10)]:
        pid = os.fork()
        if pid == 0:
            try:
                _write_on(path, start, place)
            finally:
                os._exit(1)
        if place is None:
            time.sleep(draw.uniform(0.0, 0.02))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"the writer ended by itself, {place}"
        number = _consistent(read(path, run={}))
        assert number >= last, "an older state came back"
        found.append((place, number - start))
        last, start = number, number + 1
    (folder / "found.json").write_text(json.dumps(found))


def test_a_kill_leaves_an_old_or_a_new_state_and_what_it_leaves_over_is_harmless(tmp_path: Path) -> None:
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=300)
    path = tmp_path / "state.safetensors"
    found = [tuple(pair) for pair in json.loads((tmp_path / "found.json").read_text())]
    assert found[:5] == [*((place, 0) for place in _PLACES[:4]), ("after the name", 1)]
    left = [p for p in tmp_path.iterdir() if p.name not in ("state.safetensors", "found.json")]
    assert len(left) >= 4, "the kills came too late to prove anything"
    assert not any(p.suffix == ".safetensors" for p in left), "what is left over must not look like a checkpoint"
    number = _consistent(read(path, run={}))
    path.with_name(f".{path.name}.{os.getpid()}").write_bytes(b"from a process that had my number")
    write(path, _state(number + 1), run={})
    assert _consistent(read(path, run={})) == number + 1


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace", "hashlib.sha256", "recollect.checkpoint.save"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    write(path, {"a": 1}, run={})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(broken, full)
        with pytest.raises(OSError, match="no space"):
            write(path, {"a": 2}, run={})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_data_are_on_the_disk_before_the_name_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (calls.append("replace"), replace(self, to)))
    write(path, {"a": 1}, run={})
    assert calls[:2] == ["fsync", "replace"]


# What is refused ------------------------------------------------------------------------------------------------------


_DAMAGED = "no checkpoint of recollect, or damaged"


def refused(path: Path, words: str = _DAMAGED, run: Mapping[str, Any] | None = None) -> None:
    """Asserts a FormatError with the file's name and a remedy, and that the file stays as it is."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(FormatError, match=words) as caught:
        read(path, run=run or {})
    assert str(path) in str(caught.value)
    assert "Delete it" in str(caught.value)
    assert before is None or path.read_bytes() == before


def test_truncated_or_flipped_at_any_place(path: Path) -> None:
    draw = random.Random(0)
    write(path, {"a": torch.arange(5.0), "b": [1, {"x": None}]}, run={})
    whole = path.read_bytes()
    assert hashlib.sha256(whole[:-32]).digest() == whole[-32:], "a SHA-256 of the rest ends the file"
    for place in range(len(whole)):
        path.write_bytes(whole[:place])
        refused(path)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        refused(path)
    for more in (b"\0", whole):
        path.write_bytes(whole + more)
        refused(path)
    path.write_bytes(whole)
    assert read(path, run={}) is not None


@pytest.mark.parametrize("content", [b"", b"\0", b"{}", b"hello\n" * 100, b"PK\x03\x04" * 50, bytes(1000)])
def test_foreign_files(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("header", [None, {}, {"format": "pt"}, {"format": "recollect checkpoint 1"}])
def test_other_safetensors(path: Path, header: dict[str, str] | None) -> None:
    save_file(nn.Linear(2, 2).state_dict(), path, header)
    refused(path)


@pytest.mark.parametrize("header", [None, {}, {"format": "pt"}, {"format": "recollect checkpoint 2"}])
def test_other_versions(path: Path, header: dict[str, str] | None) -> None:
    data = save({"a": torch.ones(2)}, header)
    path.write_bytes(data + hashlib.sha256(data).digest())
    refused(path, "checkpoint of another version")


def test_folder(path: Path) -> None:
    path.mkdir()
    refused(path)


@pytest.mark.parametrize(
    ("there", "asked", "words"),
    [
        ({"seed": 1}, {"seed": 2}, "seed=1 there, 2 asked"),
        ({"seed": 1}, {}, "seed=1 there, nothing asked"),
        ({}, {"seed": 1}, "seed=nothing there, 1 asked"),
        ({"a": 1, "b": [1, 2], "c": "x"}, {"a": 1, "b": [1, 3], "c": "y"}, r"b=\[1, 2\] there.*c=x there, y asked"),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a="),
        ({"a": 0.1}, {"a": 0.1 + 1e-16}, "a="),
        ({"a": "1"}, {"a": 1}, "a="),
        ({"a": None}, {}, "a=None there, nothing asked"),
    ],
)
def test_other_settings(path: Path, there: dict[str, Any], asked: dict[str, Any], words: str) -> None:
    write(path, {"x": 1}, run=there)
    refused(path, "other settings.*" + words, asked)
    assert read(path, run=there) == {"x": 1}


def test_settings_are_compared_as_json(path: Path) -> None:
    write(path, {"x": 1}, run={"b": (1, 2), "a": {"c": None}})
    assert read(path, run={"a": {"c": None}, "b": [1, 2]}) == {"x": 1}


def refused_to_write(path: Path, state: Mapping[str, Any], run: Mapping[str, Any], words: str) -> None:
    """Asserts a DtypeError that leaves no file where there was none, and an old file as it was."""
    with pytest.raises(DtypeError, match=words):
        write(path, state, run=run)
    assert not list(path.parent.iterdir())
    write(path, {"a": 1}, run={})
    before = path.read_bytes()
    with pytest.raises(DtypeError, match=words):
        write(path, {"first": torch.ones(2), **state}, run=run)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((value, type(value).__name__) for value in (b"x", {1, 2}, object(), 1j, torch.float32, range(3))),
        (torch.Generator(), "Generator"),
        (Pair(1, 2), "Pair"),
        *(({key: 3}, "got dict") for key in ((1, 2), None, True, 1.0)),
        (torch.ones(2).to_sparse(), "plain tensors of real numbers, got torch.float32, torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex64), "real numbers, got torch.complex64"),
        (torch.ones(2, dtype=torch.complex128).conj(), "real numbers, got torch.complex128"),
        (torch.ones(2, device="meta"), "plain tensors"),
    ],
)
def test_what_cannot_be_kept(path: Path, value: object, words: str) -> None:
    wrapped = (value, [1, (value,)], {1: {2: value}})
    for number, state in enumerate(wrapped):
        (folder := path.parent / str(number)).mkdir()
        refused_to_write(folder / path.name, {"a": state}, {}, words)


@pytest.mark.parametrize("run", [{"a": torch.ones(1)}, {"a": {1}}, {"a": {(1, 2): 3}}], ids=str)
def test_settings_that_json_cannot_hold(path: Path, run: Any) -> None:
    refused_to_write(path, {"a": 1}, run, "settings of a run must be what JSON can hold")
    with pytest.raises(DtypeError, match="settings of a run"):
        read(path, run=run)


def test_a_size_comes_back_as_a_tuple(path: Path) -> None:
    assert bits(back(path, {"a": torch.Size([1, 2])})) == bits({"a": (1, 2)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    _kill_again_and_again(Path(sys.argv[1]))
