"""Kills processes that write, save and import at random points, and looks at what they leave behind.

    python tests/memory/killing.py 200

What must hold after each kill: all that was acknowledged is there, and of what was not, all or nothing; the memory
opens at once, is sound, and equals, bit for bit, one that was never killed; and a model predicts with it.
"""

import contextlib
import io
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recollect import DurableMemory, EpisodicMemory, LocalAdaptation, MbPA, load, rules, save
from recollect.cli_memory import main as memory_command
from recollect.errors import MissingDataError
from recollect.memory.durable.verifying import problems

CAPACITY, KEY, CLASSES = 700, 64, 5
VERSIONS = 3  # files that are imported in turns: one from before the last can be told from the last and the next
MODES = ("write", "save", "import")

State = dict[str, Tensor]


def operate(memory: EpisodicMemory | DurableMemory, number: int) -> None:
    """Does the operation of this number: a write of up to 300 rows, now and then a deletion."""
    if number % 40 == 39:
        memory.clear()
    elif number % 7 == 3:
        memory.forget(torch.arange(number % 11, CAPACITY, 97))
    else:
        count = 1 + number * 7919 % 300
        generator = torch.Generator().manual_seed(number)
        memory.write(torch.randn(count, KEY, generator=generator), torch.arange(count) % CLASSES)


def state_of(memory: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in memory.state_dict().items()}


def after(count: int) -> State:
    """The state of a memory in RAM after so many operations."""
    memory = EpisodicMemory(CAPACITY, KEY)
    for number in range(count - count % 40, count):  # the last clear has forgotten all before
        operate(memory, number)
    return state_of(memory)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def model(memory: DurableMemory | EpisodicMemory) -> MbPA:
    adaptation = LocalAdaptation(rules.sgd(0.1), steps=2)
    return MbPA(nn.Linear(KEY, CLASSES), memory, neighbors=5, adaptation=adaptation)


def predicts(memory: DurableMemory | EpisodicMemory) -> bool:
    return bool(model(memory)(torch.zeros(3, KEY)).isfinite().all())


# The children: each acknowledges what it has done by one byte


def write(folder: Path, first: int, acknowledge: Callable[[], None]) -> None:
    memory = DurableMemory(folder / "memory", CAPACITY, KEY)
    for number in range(first, sys.maxsize):
        operate(memory, number)
        acknowledge()


def write_and_save(folder: Path, first: int, acknowledge: Callable[[], None]) -> None:
    memory = DurableMemory(folder / "memory", CAPACITY, KEY)
    for number in range(first, sys.maxsize):
        operate(memory, number)
        save(model(memory), folder / "model")
        acknowledge()


def import_in_turns(folder: Path, first: int, acknowledge: Callable[[], None]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        for number in range(first, sys.maxsize):
            file = folder / f"{number % VERSIONS}.safetensors"
            memory_command(["import", str(folder / "memory"), str(file), "--replace"])
            acknowledge()


CHILDREN = {"write": write, "save": write_and_save, "import": import_in_turns}


class Life(NamedTuple):
    """What became of a folder."""

    folder: Path
    reached: int = 0
    """How many operations its memory has seen."""
    saved: int = 0
    """And at the last acknowledged save: kills in a row may come between operation and save."""


def kill_one(mode: str, folder: Path, first: int, dice: random.Random) -> int:
    """Starts a child, kills it somewhere, and returns how often it has acknowledged."""
    read, wrote = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            CHILDREN[mode](folder, first, lambda: os.write(wrote, b".") and None)
        finally:
            os._exit(1)
    os.close(wrote)
    done, wanted, began = 0, dice.randint(0, 12), time.monotonic()
    while done < wanted:
        received = os.read(read, 1)
        if not received:
            raise RuntimeError(f"the child that was to {mode} has stopped by itself")
        done += 1
    pause = (time.monotonic() - began) / wanted if wanted else 0.05  # what one operation takes
    select.select([], [], [], dice.uniform(0, 2 * pause))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done += len(os.read(read, 10**6))
    os.close(read)
    return done


def check(mode: str, life: Life, acknowledged: int, versions: list[State]) -> Life:
    """Asserts what must hold after a kill."""
    folder, done = life.folder, life.reached + acknowledged
    saved = done if acknowledged else life.saved
    if not (folder / "memory/memory.sqlite").exists():
        assert done == 0
        return life
    assert problems(folder / "memory") == []
    with DurableMemory(folder / "memory", CAPACITY, KEY) as memory:
        now = state_of(memory)
        assert predicts(memory)
    if mode == "import":
        last = versions[(done - 1) % VERSIONS] if done else state_of(EpisodicMemory(CAPACITY, KEY))
        assert same(now, last) or same(now, versions[done % VERSIONS])
        return Life(folder, done)
    seen = [count for count in (done, done + 1) if same(now, after(count))]
    assert seen, f"after {done} acknowledged operations the memory is another"
    if mode == "save":
        check_save(folder / "model", saved, seen[0])
    return Life(folder, seen[0], saved)


def check_save(folder: Path, saved: int, reached: int) -> None:
    """Asserts that a saved model is whole, and one of those since the last acknowledged save."""
    try:
        loaded = load(folder)
    except MissingDataError:
        assert saved == 0
        return
    assert isinstance(loaded, MbPA)
    assert isinstance(loaded.memory, EpisodicMemory)
    assert predicts(loaded.memory)
    assert any(same(state_of(loaded.memory), after(count)) for count in range(saved, reached + 1))


def main(kills: int, seed: int) -> None:
    dice, counts = random.Random(seed), dict.fromkeys(MODES, 0)
    torch.set_num_threads(1)
    versions = [after(count) for count in (31, 38, 25)]
    with tempfile.TemporaryDirectory() as root:
        lives: dict[str, Life] = {}
        for number in range(kills):
            mode = MODES[number % len(MODES)]
            if number // len(MODES) % 5 == 0:  # a new folder now and then; else one that was left by a kill
                lives[mode] = Life(Path(root) / f"{number}-{mode}")
                lives[mode].folder.mkdir()
                for each, state in enumerate(versions if mode == "import" else ()):
                    export(state, lives[mode].folder / f"{each}.safetensors")
            acknowledged = kill_one(mode, lives[mode].folder, lives[mode].reached, dice)
            lives[mode] = check(mode, lives[mode], acknowledged, versions)
            counts[mode] += 1
    print(", ".join(f"{count} kills while it did {mode}" for mode, count in counts.items()) + ": nothing was lost")


def export(state: State, file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with DurableMemory(folder, CAPACITY, KEY) as memory:
            memory.load_state_dict(state)
        memory_command(["export", folder, str(file)])


if __name__ == "__main__":
    main(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
