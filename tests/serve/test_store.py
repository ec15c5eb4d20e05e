"""The folder of a service: what a killed start has left is removed, what another one is making is not."""

import dataclasses
import os
from pathlib import Path

from serving import small_service

from recollect.serve import store


def test_leftovers(tmp_path: Path) -> None:
    new, old = (tmp_path / f".memory.{letter * 16}.partial" for letter in "ab")
    for path in (new, old):
        path.mkdir()
    os.utime(old, (0, 0))
    service = store.kept(dataclasses.replace(small_service(), folder=str(tmp_path / "memory")))
    assert new.exists(), "its maker may not have locked it yet"
    assert not old.exists()
    assert (tmp_path / "memory" / "memory.sqlite").exists()
    service.layer.memory.close()
