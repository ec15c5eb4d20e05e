"""The benchmark of reading with a memory: the loops compute what recollect does, and nothing is left out of a text."""

import pytest
import torch

from benchmarks import floors, language, reading
from benchmarks.checks import DisagreementError
from benchmarks.going import Going

CPU = torch.device("cpu")
SMALL = language.Setting("PTB", 40, 6, 20, few=5, neighbors=4, block=8)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "CACHES", (SMALL, SMALL._replace(text="WikiText-2", entries=24)))
    monkeypatch.setattr(language, "ADAPTED", (SMALL, SMALL._replace(hidden=9, quick=False)))
    monkeypatch.setattr(language, "WHOLE", (SMALL._replace(hidden=9, quick=False),))


@pytest.mark.parametrize("full", [False, True])
def test_contenders_agree(full: bool) -> None:
    made = list(language.cases(full, CPU))
    assert len(made) == language.count(full) == (5 if full else 3)
    for case in made:
        if case.check is not None:
            case.check()
        for call in case.contenders.values():
            call()
        assert case.ours in case.contenders
        assert case.work.multiply_adds > 0


@pytest.mark.parametrize("name", ["pointer", "added_up"])
def test_a_loop_over_another_window_is_not_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading.Past, "before", lambda past, number, queries: slice(number, number + past.window))
    case = language._cache(SMALL, CPU)
    assert case.check is not None
    with pytest.raises(DisagreementError, match="loop differs"):
        case.check()


def test_an_adaptation_that_does_nothing_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    case = language._mbpa(SMALL, CPU)
    monkeypatch.setattr(language, "_RATE", 0.0)  # of the loops and of the model that the check makes
    assert case.check is not None
    with pytest.raises(DisagreementError, match="changes next to nothing"):
        case.check()


def test_each_word_is_read_by_what_came_just_before_it() -> None:
    text = language._Text(SMALL, CPU)
    seen = text.memory.read(text.last.keys, None, before=text.last.times)
    assert [len(set(row[row >= 0].tolist())) for row in seen.slots] == [SMALL.entries] * SMALL.block
    past = text.past(SMALL.few)
    for number in range(SMALL.few):
        values = seen.values[number][seen.slots[number] >= 0]
        assert torch.equal(values, past.words[past.before(number, SMALL.few)])
    for _ in range(20):
        block = text.next()
        near = text.memory.read(block.keys, 1, before=block.times)
        assert float(near.distances.min()) > 0  # the text has begun anew, and no word finds itself


def test_reading_goes_on_where_it_was() -> None:
    read: list[int] = []

    def reader(parts):
        for part in parts:
            read.extend(part.tolist())

    going = Going(reader, iter(torch.arange(6).split(2)))
    assert read == [0, 1]
    going()
    assert read == [0, 1, 2, 3]
    going()
    assert read == [0, 1, 2, 3, 4, 5]
    with pytest.raises(EOFError):
        going()


def test_errors_of_the_reader_are_raised_in_the_call() -> None:
    def reader(parts):
        next(parts)
        raise ValueError("no such word")

    with pytest.raises(ValueError, match="no such word"):
        Going(reader, iter([torch.zeros(1), torch.zeros(1)]))


def test_the_whole_text_is_counted_in_seconds() -> None:
    assert language._whole_text({"LSTM": 1e-3}) == {"82,430 words, LSTM": "82 s"}


def test_floors_count_by_hand() -> None:
    assert floors.cache(5, 7, 2, window=3) == floors.Work(2 * (7 + 3) * 5, 4 * (7 + 3 + 2 * 2) * 5)
    assert floors.projection(None, 5, 2) == floors.Work(0, 0)
    assert floors.projection(3, 5, 2) == floors.Work(2 * 15, 4 * 15)
    assert floors.recurrent(3, 5, 2) == floors.Work(2 * 4 * 5 * 8, 4 * 4 * 5 * (3 + 2 * 5))
