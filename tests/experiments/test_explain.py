"""``recollect explain``: which image is shown, and that all that is shown is true."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import micro_images
import pytest
import torch
from micro_images import CLASSES, NAMES, TEST
from PIL import Image
from torch import Tensor

from recollect import Explanation
from recollect.cli import main
from recollect.errors import SettingError
from recollect.experiments import plots
from recollect.experiments.incremental import explain, study
from recollect.experiments.incremental.explain import Explain, Picture, describe, draw, run, telling
from recollect.experiments.incremental.study import Study

# Which image is shown -------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
NEW = torch.tensor([False, False, True, True, True, True])


def probabilities(*right: float) -> Tensor:
    """Returns log-probabilities of three classes in which the right one has these; the next one most of the rest."""
    found = torch.full((len(right), 3), 0.01)
    for row, (label, chance) in enumerate(zip(LABELS.tolist(), right, strict=True)):
        found[row, label], found[row, (label + 1) % 3] = chance, 0.99 - chance
    return found.log()


@pytest.mark.parametrize(
    ("model", "parametric", "mixture", "wanted"),
    [
        # of 3 and 4, which the model alone gets right, 4 gains more
        ((0.9, 0.9, 0.3, 0.6, 0.8, 0.9), (0.1,) * 4 + (0.2, 0.6), (0.2,) * 5 + (0.1,), 4),
        # the mixture knows 4, too; 0 and 1 are no new ones
        ((0.9, 0.9, 0.3, 0.6, 0.8, 0.9), (0.1,) * 4 + (0.2, 0.6), (0.2,) * 4 + (0.9, 0.1), 3),
        # nobody is alone right: the largest gain among new ones
        ((0.9, 0.9, 0.3, 0.45, 0.35, 0.2), (0.0,) * 3 + (0.3, 0.1, 0.1), (0.2,) * 6, 2),
        # the gain is over the parametric model, not over the mixture
        ((0.1, 0.1, 0.7, 0.6, 0.2, 0.2), (0.4, 0.4, 0.45, 0.1, 0.2, 0.2), (0.0, 0.0, 0.0, 0.4, 0.1, 0.1), 3),
    ],
)
def test_telling(
    model: tuple[float, ...], parametric: tuple[float, ...], mixture: tuple[float, ...], wanted: int
) -> None:
    others = [probabilities(*parametric), probabilities(*mixture)]
    assert telling(probabilities(*model), others, LABELS, NEW) == wanted
    own = range(6)
    alone = [i for i in own if NEW[i] and model[i] > 0.495 and parametric[i] < 0.495 and mixture[i] < 0.495] or [
        i for i in own if NEW[i]
    ]
    assert max(alone, key=lambda i: model[i] - parametric[i]) == wanted, "the case is what it says"


# What is said and drawn -----------------------------------------------------------------------------------------------


def picture(neighbors: int, classes: int = 6, *, label: int = 3) -> Picture:
    g = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, classes, generator=g).log_softmax(1)
    explanation = Explanation(
        before,
        after,
        torch.randn(neighbors, classes, generator=g),
        True,
        torch.randint(classes, (neighbors,), generator=g),
        torch.rand(neighbors, generator=g).softmax(0),
        torch.rand(neighbors, generator=g).sort().values,
        torch.arange(neighbors),
    )
    pixels = torch.randint(256, (neighbors + 1, 8, 8, 3), dtype=torch.uint8, generator=g)
    return Picture(pixels[0], label, pixels[1:], explanation, NAMES)


def test_describe_without_neighbors() -> None:
    shown = picture(0)
    best = NAMES[int(shown.explanation.before.argmax())].split(",")[0]
    assert describe(shown, 17) == f"Test image 17: dog. The memory is empty; the head says {best}.\n"


@pytest.mark.parametrize("neighbors", [1, 3, 30])
def test_describe(neighbors: int) -> None:
    shown = picture(neighbors)
    found, short = shown.explanation, [name.split(",")[0] for name in NAMES]
    lines = describe(shown, 17).splitlines()
    before, after = (max(range(6), key=lambda i: float(p[i])) for p in (found.before, found.after))
    assert lines[0] == "Test image 17: dog"
    for line, word, best, chances in zip(
        lines[1:3], ("before:", "after: "), (before, after), (found.before, found.after), strict=True
    ):
        own, right = (f"{float(chances[label].exp()):.0%}" for label in (best, 3))
        assert line == f"{word} {short[best]} ({own}; dog {right})"
    assert lines[3:5] == ["", f"What added most to the logit of {short[after]}:"]
    added = found.contributions[:, after].tolist()
    most = sorted(range(neighbors), key=lambda place: -added[place])[:5]
    assert lines[5:] == [
        f"  {added[k]:+.3f}  neighbor {k + 1}, {short[int(found.values[k])]}, weight {float(found.weights[k]):.3f}"
        for k in most
    ]


@pytest.mark.parametrize("neighbors", [0, 3, 30])
def test_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, neighbors: int) -> None:
    shown, canvases = picture(neighbors), []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda canvas, path: (canvases.append(canvas), save(canvas, path)))
    draw(shown, tmp_path / "explanation.png")
    with Image.open(tmp_path / "explanation.png") as file:
        file.load()
        assert file.format == "PNG"
        assert file.size == (1500, 760)
    (canvas,) = canvases
    query, bars, *others = canvas.axes
    assert query.get_title(loc="left") == "Query: dog"
    assert torch.equal(torch.tensor(query.images[0].get_array()), shown.query)
    found = shown.explanation
    after = int(found.after.argmax())
    filled = [axes for axes in others if axes.images]
    assert len(filled) == min(neighbors, 20)
    for place, axes in enumerate(filled):
        assert torch.equal(torch.tensor(axes.images[0].get_array()), shown.neighbors[place])
        label, weight = int(found.values[place]), float(found.weights[place])
        added = float(found.contributions[place, after])
        assert axes.get_title() == f"{NAMES[label].split(',')[0]}\n{weight:.3f}, {added:+.3f}"
    names = [text.get_text() for text in bars.get_yticklabels()]
    assert "dog (right)" in names
    widths = [bar.get_width() for bar in bars.patches]
    for row, chances in enumerate((found.before, found.after)):
        own = widths[row * len(names) : (row + 1) * len(names)]
        for name, width in zip(names, own, strict=True):
            label = [one.split(",")[0] for one in NAMES].index(name.removesuffix(" (right)"))
            assert width == pytest.approx(100 * float(chances[label].exp()), rel=1e-5)
    legend = bars.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["before", "after"]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def micro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up images and features; the folder of a run."""
    micro_images.use(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(study, "features", micro_images.untrained)
    return tmp_path / "out"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Picture, Path]]:
    """What would be drawn."""
    found: list[tuple[Picture, Path]] = []
    monkeypatch.setattr(explain, "draw", lambda one, path: found.append((one, path)))
    return found


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("epochs", [0.5, 2.0])
def test_the_neighbors_are_the_images_whose_features_are_in_their_slots(
    micro: Path, shown: list[tuple[Picture, Path]], split: int, epochs: float
) -> None:
    text = run(Explain(out=micro, split=split, epochs=epochs, image=13))
    ((one, path),) = shown
    names = {(1, 0.5): "-epochs-0.5", (1, 2.0): "-epochs-2", (2, 0.5): "-split-2-epochs-0.5"}
    assert path == micro / f"explanation{names.get((split, epochs), '-split-2-epochs-2')}-image-13.png"
    data, found = micro_images.data(), one.explanation
    assert torch.equal(one.query, data.test.pixels[13])
    assert one.label == int(data.test.labels[13]) == 13 // TEST
    assert text == describe(one, 13)
    own = Study(Explain(out=micro))
    course = own.course(split, own.choices().parametric)
    course.stream.advance(epochs)
    memory, features = course.stream.memory, own.halves(split).features
    query = features.test[13].double()
    for place, slot in enumerate(found.slots.tolist()):
        (row,) = (features.train == memory.keys[slot]).all(1).nonzero().flatten().tolist()
        assert torch.equal(one.neighbors[place], data.train.pixels[row])
        assert int(found.values[place]) == int(data.train.labels[row])
        distance = float((features.train[row].double() - query).square().sum())
        assert float(found.distances[place]) == pytest.approx(distance, rel=1e-4, abs=1e-6)
    distances = (memory.keys[: len(memory)].double() - query).square().sum(1)
    nearest = distances.sort().values[: len(found.slots)]
    torch.testing.assert_close(found.distances.double(), nearest, rtol=1e-4, atol=1e-6)
    model = own.choices().sgd.predictor(course.stream.head, memory)
    torch.testing.assert_close(found.after, model(features.test[13]))
    logits = course.stream.head(features.test[13]).detach()
    torch.testing.assert_close(found.before, logits.log_softmax(0))
    torch.testing.assert_close((logits + found.contributions.sum(0)).log_softmax(0), found.after, rtol=1e-4, atol=1e-5)
    assert found.exact


def test_without_an_image_the_telling_one_is_shown(micro: Path, shown: list[tuple[Picture, Path]]) -> None:
    text = run(Explain(out=micro, epochs=0.5))
    ((one, path),) = shown
    assert path == micro / "explanation-epochs-0.5.png"
    number = int(re.findall(r"Test image (\d+):", text)[0])
    own = Study(Explain(out=micro))
    choices, halves = own.choices(), own.halves(1)
    course = own.course(1, choices.parametric)
    course.stream.advance(0.5)
    makers = choices.sgd, choices.parametric, choices.mixture
    model, *others = (s.predictor(course.stream.head, course.stream.memory)(halves.test.inputs) for s in makers)
    labels = halves.test.labels
    assert number == telling(model, others, labels, halves.new[labels])
    assert halves.new[labels[number]]
    assert torch.equal(one.query, own.data.test.pixels[number])
    run(Explain(out=micro, epochs=0.5, image=number))
    assert torch.equal(shown[-1][0].neighbors, one.neighbors)


DEFAULT = next(field.default for field in fields(Explain) if field.name == "epochs")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "explanation.png"),
        ({"split": 1, "epochs": DEFAULT}, "explanation.png"),
        ({"image": 0}, "explanation-image-0.png"),
        ({"split": 2}, "explanation-split-2.png"),
        ({"epochs": 1.0, "split": 2}, "explanation-split-2-epochs-1.png"),
        ({"epochs": 0.0}, "explanation-epochs-0.png"),
        ({"epochs": 0.25, "split": 2, "image": 59}, "explanation-split-2-epochs-0.25-image-59.png"),
    ],
)
def test_the_picture_is_named_by_what_is_not_default(
    micro: Path, shown: list[tuple[Picture, Path]], given: dict[str, Any], name: str
) -> None:
    run(Explain(out=micro, **given))
    assert [path for _, path in shown] == [micro / name]


def test_an_empty_memory_explains_nothing(micro: Path) -> None:
    text = run(Explain(out=micro, epochs=0.0, image=0))
    head = Study(Explain(out=micro)).halves(1).features
    best = int((head.weight @ head.test[0] + head.bias).argmax())
    assert text == f"Test image 0: ant. The memory is empty; the head says {NAMES[best].split(',')[0]}.\n"
    with Image.open(micro / "explanation-epochs-0-image-0.png") as file:
        file.verify()


def test_pictures_of_no_run_are_refused_and_left(micro: Path, shown: list[Any]) -> None:
    micro.mkdir()
    (micro / "holiday.png").write_bytes(b"mine")
    with pytest.raises(SettingError, match=r"holiday\.png is there, but it is of no run"):
        run(Explain(out=micro, image=0))
    assert [path.name for path in micro.iterdir()] == ["holiday.png"]
    assert (micro / "holiday.png").read_bytes() == b"mine"
    assert not shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--image -1", f"--image must be from 0 to {CLASSES * TEST - 1}, got -1"),
        (f"--image {CLASSES * TEST}", f"got {CLASSES * TEST}"),
        ("--split 0", "--split must be one of [1, 2], got 0"),
        ("--split 3", "got 3"),
        ("--epochs -0.1", "--epochs must be"),
        ("--epochs nan", "--epochs must be"),
        ("--epochs inf", "--epochs must be"),
        ("--image x", "--image"),
        ("--scale huge", "'huge'"),
        ("--device abacus", "'abacus'"),
    ],
)
def test_a_mistake_is_one_line(micro: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert main(["explain", "--out", str(micro), *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(micro.glob("*.png"))


def test_a_folder_of_another_scale_is_refused(micro: Path, shown: list[Any]) -> None:
    Study(Explain(out=micro, scale="small")).record.add(part="x")
    with pytest.raises(SettingError, match="other settings"):
        run(Explain(out=micro, image=0))
    assert not shown
