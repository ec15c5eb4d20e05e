"""Eight learners of the same characters: each against its definition, and a run that is stopped."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from micro_drawings import split_of, use_marked_drawings, use_random_drawings
from stopping import rows_of_a_stopped_run
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, NonParametric, rules
from recollect.data import Episodes
from recollect.experiments.meta import few_shot
from recollect.experiments.meta import few_shot_learners as learners
from recollect.experiments.meta.drawings import TEST, TRAIN, VALID
from recollect.experiments.meta.few_shot import ALL, META_LSTM, SCALES, FewShot, MetaLstm, Scale, run
from recollect.experiments.runner import Run
from recollect.meta import MAML, MANN, ContextHypernetwork, Labels, LRUAccess, offset

_WAYS, _SHOTS = 3, 2


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Scale:
    """Random drawings of a few pixels, and a run of seconds."""
    use_random_drawings(monkeypatch, 17)
    monkeypatch.setattr(few_shot, "_SIDE", 17)  # as many features as of 28
    scale = Scale(2, 2, 2, 2, 2, 2, valid=1, test=2, alone=2, timed=1, queries=1, every=1, steps=1)
    monkeypatch.setattr(few_shot, "SCALES", {"smoke": scale})
    return scale


@pytest.fixture
def some() -> Episodes:
    """Two tasks, with labels in no order."""
    g = torch.Generator().manual_seed(1)
    labels = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 2, 0, 1, 0, 1]])
    shape = (1, 4, 4)
    return Episodes(
        torch.rand(2, 6, *shape, generator=g),
        labels,
        torch.rand(2, 4, *shape, generator=g),
        labels[:, :4],
        labels[:, :3],
    )


@pytest.fixture
def features() -> nn.Module:
    return learners.network(4, 7, generator=torch.Generator().manual_seed(2))[:-1].eval()


def test_the_network() -> None:
    net = learners.network(28, 5, generator=torch.Generator().manual_seed(0))
    assert net(torch.rand(3, 1, 28, 28)).shape == (3, 5)
    assert net[:-1](torch.rand(3, 1, 28, 28)).shape == (3, few_shot._SIZE)


def test_keys_are_of_length_one(features: nn.Module, some: Episodes) -> None:
    found = learners.keys(features, some.support)
    assert found.shape == (2, 6, 32)
    raw = features(some.support[1, 4:5])[0]
    torch.testing.assert_close(found[1, 4], raw / raw.norm())


def test_nearest_and_prototypes(features: nn.Module, some: Episodes) -> None:
    support, queries = learners.keys(features, some.support), learners.keys(features, some.queries)
    nearest, prototypes = learners.nearest(features), learners.prototypes(features)
    for task in range(2):
        labels = some.support_labels[task]
        for place, query in enumerate(queries[task]):
            ways = [float((query - key).norm()) for key in support[task]]
            assert nearest(some)[task, place] == labels[ways.index(min(ways))]
            means = [support[task][labels == label].mean(0) for label in range(_WAYS)]
            far = [float((query - mean).norm()) for mean in means]
            assert prototypes(some)[task, place] == far.index(min(far))


def test_vote_and_mbpa(features: nn.Module, some: Episodes) -> None:
    vote = {choice.settings["neighbors"]: choice.learner for choice in learners.vote(features, _SHOTS, _WAYS)}
    assert vote.keys() == {3, 5, 6}
    wanted = {"neighbors": 5, "rate": 10.0, "steps": 5}
    mbpa = next(choice for choice in learners.mbpa(features, _SHOTS, _WAYS) if choice.settings == wanted)
    for task in range(2):
        memory = EpisodicMemory(capacity=6, key_size=32)
        memory.write(learners.keys(features, some.support[task]), some.support_labels[task])
        asked = learners.keys(features, some.queries[task])
        votes = NonParametric(memory, classes=_WAYS, neighbors=3)(asked)
        assert torch.equal(vote[3](some)[task], votes.argmax(-1))
        head = nn.Linear(32, _WAYS)
        head.weight.data.zero_()
        head.bias.data.zero_()
        layer = MbPA(head, memory, neighbors=5, adaptation=LocalAdaptation(rules.sgd(10.0), steps=5))
        assert torch.equal(mbpa.learner(some)[task], layer(asked).argmax(-1))


def test_mann_reads_each_query_after_the_support(features: nn.Module, some: Episodes) -> None:
    g = torch.Generator().manual_seed(7)
    labels = Labels(_WAYS)
    access = LRUAccess(6, generator=g)
    mann = MANN(32 + _WAYS, _WAYS, access=access, hidden=6, generator=g)
    with torch.no_grad():
        mann.controller.weight_ih.mul_(20)  # so that the last labels count
        mann.controller.bias_ih.zero_()
        mann.output.bias.zero_()
    found = learners.read_on(features, mann, _WAYS)(some)
    changed = some.support_labels.clone()
    changed[:, -1] = (changed[:, -1] + 1) % _WAYS
    other = learners.read_on(features, mann, _WAYS)(some._replace(support_labels=changed))
    assert not torch.equal(found, other), "the last label, which comes with the query"
    for task in range(2):
        for place in range(4):
            images = torch.cat([some.support[task], some.queries[task, place][None]])
            shown = torch.cat([some.support_labels[task], torch.tensor([0])])  # the last label is never seen
            logits, _ = mann(offset(32**0.5 * learners.keys(features, images)[None], labels.encode(shown[None])))
            assert found[task, place] == logits[0, -1].argmax()


def test_fine_tuning_starts_from_the_embedding(features: nn.Module, some: Episodes) -> None:
    state = torch.get_rng_state()
    assert torch.equal(learners.blank(32, _WAYS)(features(some.support[0])), torch.zeros(6, _WAYS))
    assert torch.equal(torch.get_rng_state(), state)
    before = {name: value.clone() for name, value in features.state_dict().items()}
    settings = {"layers": "all", "rate": 0.01, "steps": 20}
    choices = learners.fine_tuning(features, 32, _WAYS)
    learner = next(choice.learner for choice in choices if choice.settings == settings)
    same = some._replace(queries=some.support, query_labels=some.support_labels)
    assert torch.equal(learner(same), some.support_labels), "it knows what it was trained on"
    assert all(torch.equal(before[name], value) for name, value in features.state_dict().items())


def test_a_hypernetwork_reads_the_whole_support(features: nn.Module, some: Episodes) -> None:
    g = torch.Generator().manual_seed(3)
    hypernetwork = ContextHypernetwork(32, rate=4.0, generator=g)
    with torch.no_grad():
        hypernetwork.key.weight.normal_(generator=g)
    found = learners.generated(features, hypernetwork, _WAYS)(some)
    support, queries = learners.keys(features, some.support), learners.keys(features, some.queries)
    head = learners.blank(32, _WAYS)
    for task in range(2):
        context = learners.remembered(support[task], some.support_labels[task]).read(queries[task], 6)
        with torch.no_grad():
            assert torch.equal(found[task], hypernetwork.adapted(head, queries[task], context).argmax(1))


def test_a_query_alone_sees_the_support_of_its_task(some: Episodes) -> None:
    learner = learners.nearest(nn.Flatten())
    assert torch.equal(learners.alone(learner)(some), learner(some))


def test_a_query_alone_does_not_see_the_others() -> None:
    g = torch.Generator().manual_seed(4)
    labels = torch.arange(_WAYS).repeat(2, 1)
    support, queries = torch.rand(2, 2, _WAYS, 1, 28, 28, generator=g)
    some = Episodes(support, labels, queries, labels, labels)
    learner = learners.after(MAML(learners.network(28, _WAYS, generator=g), rule=rules.sgd(0.4)), 1)
    found = learners.alone(learner)(some)
    for task, place in itertools.product(range(2), range(_WAYS)):
        one = Episodes(*(part[[task]] for part in some))
        one = one._replace(queries=one.queries[:, [place]], query_labels=one.query_labels[:, [place]])
        assert found[task, place] == learner(one)[0, 0]
    assert not torch.equal(found, learner(some)), "together they see each other"


def test_a_run(tiny: Scale, tmp_path: Path) -> None:
    table = run(FewShot(out=tmp_path))
    assert table == (tmp_path / "table.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for part in ("test", "cost"):
        found = [(row["learner"], row["shots"]) for row in rows if row["part"] == part]
        assert found == [(name, shots) for name in ALL for shots in (1, 5)]
    trained = ("hypernetwork", "mann", "maml", "meta-lstm", "meta-lstm-last")
    learning = [(row["learner"], row["iterations"]) for row in rows if row["part"] == "learning"]
    assert learning == [(name, number) for name in trained for number in (1, 2)]
    assert all(row["milliseconds"] > 0 and row["together"] > 0 for row in rows if row["part"] == "cost")
    assert "| MAML |" in table
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "results.jsonl").read_bytes()
    assert run(FewShot(out=tmp_path)) == table
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_costs_are_medians_for_each_query(tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []
    seconds = iter((90.0, 7.0, 1.0, 3.0, 80.0, 10.0, 60.0, 30.0))  # each fourth one is a warm-up

    def learner(some: Episodes) -> torch.Tensor:
        asked.append(tuple(some.queries.shape[:2]))
        now[0] += next(seconds)
        return some.query_labels

    record = Run(tmp_path, {})
    study = few_shot._Study(record, replace(tiny, timed=3, queries=2))
    monkeypatch.setattr(study, "_choices", lambda name, shots: [few_shot.Choice({"steps": 1}, learner)])
    monkeypatch.setattr(few_shot.time, "perf_counter", lambda: now[0])
    study.cost("nearest", 1, {"steps": 1})
    assert asked == [(1, 1)] * 4 + [(1, 10)] * 4, "one query, then those of five classes, of one task at a time"
    assert record.rows[-1]["milliseconds"] == 3_000.0
    assert record.rows[-1]["together"] == 3_000.0, "30 s for ten queries"


def test_settings_are_chosen_on_validation_tasks(tiny: Scale, tmp_path: Path) -> None:
    record = Run(tmp_path, {})
    study = few_shot._Study(record, replace(tiny, valid=5, test=5))
    study.test("mbpa", 5)
    row = record.rows[-1]
    choices = study._choices("mbpa", 5)
    valid = [float(study._right(choice.learner, 1, 5, 5).mean()) for choice in choices]
    assert row["settings"] == choices[valid.index(max(valid))].settings
    assert row["valid"] == round(max(valid), 2)
    best = choices[valid.index(max(valid))]
    assert row["accuracy"] == round(float(study._right(best.learner, 2, 5, 5).mean()), 2)


def test_what_is_asked_together_is_asked_one_at_a_time_too(tiny: Scale, tmp_path: Path) -> None:
    study = few_shot._Study(Run(tmp_path, {}), replace(tiny, test=8, alone=4, queries=3))
    row = study.test("maml", 1)
    learner = next(choice.learner for choice in study._choices("maml", 1) if choice.settings == row["settings"])
    together, alone = (study._right(each, TEST, 1, 4) for each in (learner, learners.alone(learner)))
    assert row["alone"] == round(float(alone.mean()), 2) != round(float(together.mean()), 2)


def test_only_the_test_sees_its_characters(tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_marked_drawings(monkeypatch, few_shot, "episodes", 17)
    study = few_shot._Study(Run(tmp_path, {}), replace(tiny, every=2))
    study.test("maml", 1)
    learning = [TRAIN, TRAIN, VALID, VALID, "learning"]  # with one drawing and with five
    # The test asks all queries of a task together, and then one at a time.
    assert log.splits == [*learning, *[VALID] * len(study._choices("maml", 1)), TEST, TEST, "test"]


def test_turned_characters_are_for_training_alone(tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_marked_drawings(monkeypatch, few_shot, "episodes", 17)
    few_shot._Study(Run(tmp_path, {}), tiny).test("maml", 1)
    assert set(log.turned) == {(TRAIN, True), (VALID, False), (TEST, False)}


def test_the_embedding_and_mann_learn_from_training_characters(
    tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_marked_drawings(monkeypatch, few_shot, "episodes", 17)
    seen, real = [], learners.network

    def network(side: int, outputs: int, *, generator: torch.Generator) -> nn.Sequential:
        net = real(side, outputs, generator=generator)
        net[0].register_forward_pre_hook(lambda _, inputs: seen.append(split_of(inputs[0])))
        return net

    monkeypatch.setattr(learners, "network", network)
    study = few_shot._Study(Run(tmp_path, {}), replace(tiny, every=100))  # no look at validation tasks
    assert isinstance(study._mann, MANN)
    assert seen == [TRAIN] * (2 + 40), "two batches of the embedding, and 10 characters in four turns for MANN"


def test_the_meta_lstm_alone_and_a_stop(tiny: Scale, tmp_path: Path) -> None:
    whole, stopped = (
        [row for row in map(json.loads, text.splitlines()) if row["part"] != "cost"]
        for text in rows_of_a_stopped_run(run, MetaLstm, tmp_path, stops=(6, 8))
    )
    assert stopped == whole
    assert {row["learner"] for row in whole if row["part"] == "test"} == set(META_LSTM)
    run(FewShot(out=tmp_path / "whole"))  # adds what is missing


def test_meta_learners_see_one_and_five_drawings_by_turns(
    tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], few_shot._Study._draw

    def draw(self: few_shot._Study, split: int, tasks: int, shots: int, *, generator: torch.Generator) -> Episodes:
        seen.append((split, tasks, shots))
        return real(self, split, tasks, shots, generator=generator)

    monkeypatch.setattr(few_shot._Study, "_draw", draw)
    study = few_shot._Study(Run(tmp_path, {}), replace(tiny, maml=4, every=100))
    assert study._maml.steps == 1
    assert seen == [(0, 32, 1), (0, 8, 5)] * 2


def test_the_scale_of_the_paper() -> None:
    assert SCALES["paper"].meta_lstm == 75_000
    assert SCALES["paper"].mann == 100_000
