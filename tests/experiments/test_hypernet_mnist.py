"""MNIST by a generated kernel: the networks, the moved images, and a run that is stopped."""

import json
import math
from pathlib import Path

import pytest
import torch
from stopping import rows_of_a_stopped_run
from torch import nn
from torch.nn.functional import pad

from recollect.data import Dataset
from recollect.experiments.meta import hypernet_mnist
from recollect.experiments.meta.hypernet_mnist import (
    HypernetMnist,
    Scale,
    cropped,
    network,
    run,
    second_kernel,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Scale:
    """Images of two brightnesses, and a run of seconds."""

    def read(part: str) -> Dataset:
        g = torch.Generator().manual_seed({"train": 0, "test": 1}[part])
        labels = torch.randint(2, (60,), generator=g)
        return Dataset(torch.rand(60, 784, generator=g) * (1 + labels[:, None]) / 2, labels)

    monkeypatch.setattr(hypernet_mnist, "mnist", read)
    monkeypatch.setattr(hypernet_mnist, "_PART", 7)
    scale = Scale(2, train=30, valid=20, test=9, batch=20)
    monkeypatch.setattr(hypernet_mnist, "SCALES", {"smoke": scale})
    return scale


@pytest.mark.parametrize(("kind", "second", "parameters"), [("generated", 4244, 12_910), ("ordinary", 12_544, 21_210)])
def test_the_networks_of_the_paper(kind: str, second: int, parameters: int) -> None:
    net = network(kind, generator=torch.Generator().manual_seed(0))
    kernel, size = second_kernel(net)
    assert kernel.shape == (16, 16, 7, 7)
    assert size == second
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert net(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    again = network(kind, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_the_first_values_of_the_notebook() -> None:
    net = network("ordinary", generator=torch.Generator().manual_seed(0))
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.dim() == 4:
            assert 0.006 < parameter.std() < 0.011
            assert parameter.abs().max() <= 0.02
        else:
            torch.testing.assert_close(parameter @ parameter.mT, torch.eye(10), rtol=0, atol=1e-5)


def test_both_networks_are_one_given_the_second_kernel() -> None:
    generated = network("generated", generator=torch.Generator().manual_seed(0))
    ordinary = network("ordinary", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ordinary.get_parameter("3.weight").copy_(second_kernel(generated)[0])
    for name, its in generated.get_submodule("net").named_parameters():
        torch.testing.assert_close(ordinary.get_parameter(name), its)
    images = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(ordinary(images), generated(images))


def test_images_move_by_a_pixel_or_not() -> None:
    images = torch.rand(200, 1, 5, 4)
    moved = cropped(images, generator=torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    seen = set()
    for before, after in zip(images, moved, strict=True):
        wide = pad(before, (1, 1, 1, 1))
        places = [(y, x) for y in range(3) for x in range(3) if torch.equal(after, wide[:, y : y + 5, x : x + 4])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 9


def test_a_run(tiny: Scale, tmp_path: Path) -> None:
    table = run(HypernetMnist(out=tmp_path))
    assert table == (tmp_path / "table.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["part"], row["kind"], row.get("epochs")) for row in rows] == [
        (part, kind, epochs)
        for kind in ("generated", "ordinary")
        for part, epochs in (("learning", 1), ("learning", 2), ("test", None))
    ]
    assert "| generated second kernel | ours | 4,244 | 12,910 |" in table
    assert "|  | paper | 12,544 |  | 99.28 |" in table
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "results.jsonl").read_bytes()
    assert run(HypernetMnist(out=tmp_path)) == table
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_stopped_run_gives_the_same_rows(tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recollect.experiments.meta.training._SECONDS", -1.0)  # every epoch is saved
    whole, stopped = rows_of_a_stopped_run(run, HypernetMnist, tmp_path)
    assert stopped == whole


def test_an_epoch_is_adam_on_whole_batches(tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a batch add up to its gradient, and the rate falls along a cosine."""
    monkeypatch.setattr(hypernet_mnist, "cropped", lambda images, generator: images)
    run(HypernetMnist(out=tmp_path))
    (row,) = [
        row
        for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
        if row["part"] == "test" and row["kind"] == "ordinary"
    ]
    data = hypernet_mnist._Study(hypernet_mnist.Run(tmp_path / "other", {}), tiny)._data
    assert [len(part.labels) for part in data] == [30, 20, 9]
    g = torch.Generator().manual_seed(0)
    net = network("ordinary", generator=g)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    batches = [part for _ in range(2) for part in torch.randperm(30, generator=g).split(20)]
    for number, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * number / 4)) / 2
        some = data.train.take(rows)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(some.inputs.view(-1, 1, 28, 28)), some.labels).backward()
        optimizer.step()
    torch.testing.assert_close(torch.tensor(row["kernel"]) / 1000, second_kernel(net)[0], rtol=0, atol=6e-4)
    right = [int(net(x.view(1, 1, 28, 28)).argmax()) == int(y) for x, y in zip(*data.test, strict=True)]
    assert row["accuracy"] == round(100 * sum(right) / 9, 2)
