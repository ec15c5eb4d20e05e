"""Replay buffers against deque(maxlen), algorithm R and CBRS written out; and as memories of MbPA."""

import copy
import random
from collections import Counter, deque

import pytest
import torch
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, load, rules, save
from recollect.continual.balance import Balance
from recollect.continual.replay import ClassBalanced, Reservoir, Ring
from recollect.errors import DtypeError, NonFiniteError, RecollectError, SettingError, ShapeError

BUFFERS = (Ring, Reservoir, ClassBalanced)
every_buffer = pytest.mark.parametrize("kind", BUFFERS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(kind, capacity, seed: int = 0):
    return kind(EpisodicMemory(capacity, 1), generator=generator(seed))


def stream(count: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that number the examples, and labels of which each is rarer than the one before."""
    weights = 3.0 ** -torch.arange(classes)
    labels = torch.multinomial(weights, count, replacement=True, generator=generator(seed))
    return torch.arange(count).float().unsqueeze(1), labels


def numbers(buffer) -> list[int]:
    memory = buffer.memory
    return sorted(memory.keys[memory.written >= 0].squeeze(1).int().tolist())


def contents(buffer) -> list[tuple[float, int]]:
    memory = buffer.memory
    rows = zip(memory.keys.squeeze(1).tolist(), memory.values.tolist(), memory.written.tolist(), strict=True)
    return [(key, value) if written >= 0 else (-1.0, -1) for key, value, written in rows]


def write_split(buffer, inputs, labels, seed: int) -> None:
    cuts, start = random.Random(seed), 0
    while start < len(inputs):
        end = start + cuts.choice((1, 1, 2, 3, 17, 60))
        buffer.write(inputs[start:end], labels[start:end])
        start = end


def same_state(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("seed", range(5))
def test_ring_is_a_deque(seed):
    inputs, labels = stream(100)
    buffer, expected = make(Ring, 7), deque(maxlen=7)
    for part in torch.arange(100).split(seed * 4 + 1):
        buffer.write(inputs[part], labels[part])
        expected.extend(part.tolist())
        assert numbers(buffer) == list(expected)
    assert int(buffer.seen) == 100


def test_reservoir_is_algorithm_r():
    inputs, labels = stream(200)
    buffer, draws, expected = make(Reservoir, 10, seed=3), generator(3), list(range(10))
    for t in range(11, 201):
        slot = int(torch.empty((), dtype=torch.long).random_(generator=draws)) % t
        if slot < 10:
            expected[slot] = t - 1
    buffer.write(inputs, labels)
    assert buffer.memory.keys.squeeze(1).int().tolist() == expected


@pytest.mark.parametrize("kind", [Reservoir, ClassBalanced])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("untyped")
def test_any_split_keeps_the_same_examples_in_the_same_slots(kind, seed):
    inputs, labels = stream(400, classes=6, seed=seed)
    whole, split = make(kind, 30, seed), make(kind, 30, seed)
    for first, last in ((0, 20), (20, 250), (250, 251), (251, 400)):
        whole.write(inputs[first:last], labels[first:last])
        write_split(split, inputs[first:last], labels[first:last], seed)
        assert contents(whole) == contents(split)
        assert torch.equal(whole.get_extra_state(), split.get_extra_state())
        if first:
            gone = torch.randperm(30, generator=generator(seed))[:12]
            whole.memory.forget(gone)
            split.memory.forget(gone)


def frequencies(run, examples: int, runs: int) -> torch.Tensor:
    kept = Counter()
    for seed in range(runs):
        kept.update(run(seed))
    return torch.tensor([kept[i] / runs for i in range(examples)], dtype=torch.float64)


def close_to(found: torch.Tensor, chance: float | torch.Tensor, runs: int) -> None:
    """Four standard errors for each frequency: with these fixed seeds it either holds or it does not."""
    chance = torch.as_tensor(chance, dtype=torch.float64)
    assert ((found - chance).abs() <= 4 * (chance * (1 - chance) / runs).sqrt() + 1e-12).all(), found


@pytest.mark.usefixtures("untyped")
def test_reservoir_keeps_every_position_with_the_same_chance():
    inputs, labels = stream(12)
    buffer = make(Reservoir, 5)

    def run(_: int) -> list[int]:
        buffer.memory.clear()
        buffer.write(inputs[:4], labels[:4])
        buffer.write(inputs[4:], labels[4:])
        return numbers(buffer)

    close_to(frequencies(run, 12, 300), 5 / 12, 300)


@pytest.mark.usefixtures("untyped")
def test_reservoir_stays_uniform_over_what_has_not_been_forgotten():
    inputs, labels = stream(12)
    buffer = make(Reservoir, 4)

    def run(_: int) -> list[int]:
        buffer.memory.clear()
        buffer.write(inputs[:6], labels[:6])
        here = buffer.memory.keys.squeeze(1) < 2  # examples 0 and 1, which their owners want removed
        buffer.memory.forget(here.nonzero().squeeze(1))
        buffer.write(inputs[6:], labels[6:])
        return numbers(buffer)

    close_to(frequencies(run, 12, 300), torch.tensor([0.0, 0.0] + [4 / 12] * 10), 300)


class Algorithm1:
    """Chrysakis and Moens (2020), Algorithm 1, line by line; an example is (number, class)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.random = size, random.Random(seed)
        self.memory: list[tuple[int, int]] = []
        self.full: set[int] = set()
        self.seen: Counter = Counter()

    def largest(self) -> set[int]:
        stored = Counter(c for _, c in self.memory)
        return {c for c in stored if stored[c] == max(stored.values())}

    def take(self, number: int, c: int) -> None:
        self.seen[c] += 1
        if len(self.memory) < self.size:
            self.memory.append((number, c))
        elif c not in self.full:
            victims = [i for i, (_, other) in enumerate(self.memory) if other in self.largest()]
            self.memory[self.random.choice(victims)] = (number, c)
        else:
            own = [i for i, (_, other) in enumerate(self.memory) if other == c]
            if self.random.random() <= len(own) / self.seen[c]:
                self.memory[self.random.choice(own)] = (number, c)
        if len(self.memory) == self.size:
            self.full |= self.largest()


@pytest.mark.usefixtures("untyped")
def test_class_balanced_is_distributed_as_algorithm_1():
    """Also: each part is a uniform sample of its class, and so are the sizes of the parts."""
    labels = torch.tensor([0, 0, 1, 0, 0, 0, 2, 0, 1, 3, 0, 1, 0, 2, 1, 0])
    runs, sizes, expected = 2_000, Counter(), Counter()

    def run(seed: int) -> list[int]:
        balance, draws, kept = Balance(6, [], []), random.Random(seed), {}
        for start, free in ((0, list(range(6))), (9, [])):
            part = labels[start : start + 9].tolist()
            rows = balance.choose(part, free, [draws.getrandbits(63) for _ in part[len(free) :]])
            kept |= {slot: start + row for slot, row in rows.items()}
        sizes[tuple(labels[list(kept.values())].bincount(minlength=4).tolist())] += 1
        return list(kept.values())

    def oracle(seed: int) -> list[int]:
        slow = Algorithm1(6, seed)
        for number, c in enumerate(labels.tolist()):
            slow.take(number, c)
        expected[tuple(sum(c == each for _, c in slow.memory) for each in range(4))] += 1
        return [number for number, _ in slow.memory]

    found, wanted = frequencies(run, 16, runs), frequencies(oracle, 16, runs)
    assert ((found - wanted).abs() <= 5 * (2 * wanted * (1 - wanted) / runs).sqrt() + 1e-12).all()
    assert sizes.keys() == expected.keys()
    for size in sizes:
        assert abs(sizes[size] - expected[size]) <= 5 * (2 * expected[size]) ** 0.5
    for c in range(4):
        close_to(found[labels == c], found[labels == c].mean(), runs)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.usefixtures("untyped")
def test_class_balanced_decides_each_example_as_algorithm_1_with_the_same_draws(seed):
    capacity, draws = 25, generator(seed)
    inputs, labels = stream(400, classes=9, seed=seed)
    labels = 7 - 3 * labels  # any whole numbers
    buffer, slow = make(ClassBalanced, capacity, seed), Algorithm1(capacity, seed)
    before: list = []
    for t, c in enumerate(labels.tolist()):
        buffer.write(inputs[t : t + 1], labels[t : t + 1])
        now = contents(buffer)
        changed = [i for i in range(capacity) if t and now[i] != before[i]]
        slow.seen[c] += 1
        if t >= capacity:
            draw = int(torch.empty((), dtype=torch.long).random_(generator=draws))
            own = [i for i, (_, other) in enumerate(before) if other == c]
            if c not in slow.full:
                assert len(changed) == 1
                assert before[changed[0]][1] in slow.largest()
            elif draw % slow.seen[c] < len(own):
                assert len(changed) == 1
                assert changed[0] in own
            else:
                assert changed == []
            assert all(now[i] == (t, c) for i in changed)
        slow.memory = [entry for entry in now if entry[0] >= 0]
        if t + 1 >= capacity:
            slow.full |= slow.largest()
        before = now
    table = {label: (seen, bool(full)) for label, seen, full, _ in buffer.classes.table.tolist()}
    assert table == {c: (slow.seen[c], c in slow.full) for c in slow.seen}


@pytest.mark.usefixtures("untyped")
def test_class_counts_are_balanced_on_a_very_unbalanced_stream():
    counts = [20_000, 2_000, 300, 40, 5]
    labels = torch.arange(5).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator(1))]
    buffer = ClassBalanced(EpisodicMemory(100, 1))
    for part in labels.split(128):
        buffer.write(torch.zeros(len(part), 1), part)
    stored = buffer.memory.values.bincount(minlength=5).tolist()
    assert stored[4] == 5  # all that there are
    assert sum(stored) == 100
    assert max(stored) - min(stored[:4]) <= 1


def test_more_classes_than_slots():
    buffer = make(ClassBalanced, 10)
    for part in torch.arange(300).split(32):
        buffer.write(part.float().unsqueeze(1), part)
    assert len(buffer) == 10
    assert len(buffer.memory.values.unique()) == 10


@every_buffer
def test_loading_in_the_middle_of_a_stream_goes_on_bit_for_bit(kind):
    inputs, labels = stream(500, classes=8)
    saved, loaded = make(kind, 40, seed=5), make(kind, 40, seed=6)
    write_split(loaded, inputs[:90], labels[:90], seed=1)  # of another past
    write_split(saved, inputs[:300], labels[:300], seed=2)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    twin = copy.deepcopy(saved)
    write_split(saved, inputs[300:], labels[300:], seed=3)
    for other in (loaded, twin):
        write_split(other, inputs[300:], labels[300:], seed=3)
        assert same_state(saved, other)
    sampled = [buffer.sample(9)[0] for buffer in (saved, loaded, twin)]
    assert torch.equal(sampled[0], sampled[1])
    assert torch.equal(sampled[0], sampled[2])


@every_buffer
def test_saved_on_disk_and_loaded(kind, tmp_path):
    inputs, labels = stream(200)
    buffer = make(kind, 20, seed=5)
    buffer.write(inputs[:100], labels[:100])
    save(buffer, tmp_path / "buffer")
    loaded = load(tmp_path / "buffer", modules={"": make(kind, 20)})
    for each in (buffer, loaded):
        each.write(inputs[100:], labels[100:])
    assert same_state(buffer, loaded)


@every_buffer
@pytest.mark.usefixtures("untyped")
def test_sample_is_uniform_distinct_and_in_random_order(kind):
    buffer = make(kind, 8)
    inputs, labels = stream(6)
    buffer.write(inputs, labels)
    buffer.memory.forget(2)
    first = Counter()

    def run(_: int) -> list[int]:
        drawn = buffer.sample(3)[0].squeeze(1).int().tolist()
        assert len(set(drawn)) == 3
        first[drawn[0]] += 1
        return drawn

    close_to(frequencies(run, 6, 1_000), torch.tensor([0.6, 0.6, 0, 0.6, 0.6, 0.6], dtype=torch.float64), 1_000)
    close_to(torch.tensor([first[i] / 1_000 for i in (0, 1, 3, 4, 5)]), 1 / 5, 1_000)
    drawn, values = buffer.sample(100)
    assert sorted(drawn.squeeze(1).int().tolist()) == [0, 1, 3, 4, 5]
    assert torch.equal(values, labels[drawn.squeeze(1).long()])


@every_buffer
def test_empty_buffer(kind):
    buffer = kind(EpisodicMemory(8, 6), shape=(2, 3))
    inputs, labels = buffer.sample(3)
    assert inputs.shape == (0, 2, 3)
    assert labels.shape == (0,)
    buffer.write(torch.zeros(0, 2, 3), torch.zeros(0, dtype=torch.long))
    assert (len(buffer), bool(buffer), buffer.capacity, int(buffer.seen)) == (0, True, 8, 0)


@every_buffer
def test_global_random_state_is_not_touched_and_the_default_seed_is_0(kind, rng_untouched):
    inputs, labels = stream(100)
    with rng_untouched():
        default = kind(EpisodicMemory(10, 1))
        default.write(inputs, labels)
        default.sample(4)
    seeded = make(kind, 10, seed=0)
    seeded.write(inputs, labels)
    seeded.sample(4)
    assert same_state(default, seeded)


@every_buffer
def test_images_stored_as_bytes(kind):
    buffer = kind(EpisodicMemory(20, 16, key_dtype=torch.uint8), shape=(1, 4, 4))
    images = torch.randint(256, (50, 1, 4, 4), generator=generator(), dtype=torch.uint8)
    buffer.write(images, torch.arange(50))
    inputs, labels = buffer.sample(20)
    assert inputs.dtype == torch.uint8
    assert torch.equal(inputs, images[labels])


@pytest.mark.parametrize("kind", [Ring, Reservoir])
def test_values_of_any_shape(kind):
    buffer = kind(EpisodicMemory(5, 1, value_shape=(2,), value_dtype=torch.float32))
    inputs, _ = stream(30)
    buffer.write(inputs, inputs.expand(-1, 2))
    drawn, values = buffer.sample(5)
    assert torch.equal(values, drawn.expand(-1, 2))


@every_buffer
def test_what_is_replayed_is_what_mbpa_reads(kind):
    keys = torch.randn(200, 3, generator=generator())
    labels = (keys[:, 0] > 0).long()
    buffer = kind(EpisodicMemory(60, 3))
    buffer.write(keys, labels)
    head = nn.Linear(3, 2)
    model = MbPA(head, buffer.memory, neighbors=5, adaptation=LocalAdaptation(rules.sgd(1.0), steps=5))
    replayed, wanted = buffer.sample(60)
    assert (model(replayed).argmax(-1) == wanted).float().mean() > 0.9
    assert torch.equal(model.memory.read(replayed, neighbors=1).distances, torch.zeros(60, 1))


@pytest.mark.parametrize("kind", [Reservoir, ClassBalanced])
def test_a_memory_that_holds_entries(kind):
    inputs, labels = stream(60)
    memory = EpisodicMemory(20, 1)
    memory.write(inputs[:30], labels[:30])
    buffer = kind(memory, generator=generator())
    assert int(buffer.seen) == 30
    if kind is ClassBalanced:
        seen = {label: count for label, count, *_ in buffer.classes.table.tolist()}
        assert seen == Counter(labels[10:30].tolist())
    buffer.write(inputs[30:], labels[30:])
    assert int(buffer.seen) == 60
    assert len(set(numbers(buffer))) == 20


@every_buffer
def test_changes_behind_its_back(kind):
    inputs, labels = stream(400, classes=6)
    buffer, source = make(kind, 20), random.Random(0)
    other = make(kind, 20, seed=1)
    other.write(inputs, labels)
    for step, part in enumerate(torch.arange(400).split(20)):
        match step % 5:
            case 1:
                buffer.memory.forget(torch.tensor(source.sample(range(20), 7)))
            case 2:
                buffer.memory.write(inputs[part][:5], labels[part][:5])
                assert int(buffer.seen) > 0
            case 3:
                buffer.memory.load_state_dict(copy.deepcopy(other.memory.state_dict()))
            case 4 if step > 10:
                buffer.memory.clear()
        cleared = len(buffer) == 0
        seen, outside = int(buffer.seen), 5 if step % 5 == 2 else 0
        buffer.write(inputs[part], labels[part])
        assert int(buffer.seen) == 20 if cleared else int(buffer.seen) >= seen * (step % 5 != 3) + 20 + outside
        assert len(numbers(buffer)) == len(buffer)
        assert all(labels[int(key)] == value for key, value in contents(buffer) if key >= 0)
        if kind is ClassBalanced:
            table = {label: row for label, *row in buffer.classes.table.tolist()}
            stored = Counter(value for key, value in contents(buffer) if key >= 0)
            assert len(buffer) == 20
            assert all(table[label][0] >= stored[label] for label in stored)
            assert all(table[label][1] for label in stored if stored[label] == max(stored.values()))
            derived = buffer.classes.balance(buffer.memory, int(buffer.step)).slots.members
            assert {c: len(slots) for c, slots in derived.items() if slots}.keys() <= set(range(len(table)))
            assert Counter({buffer.classes.table[c, 0].item(): len(s) for c, s in derived.items() if s}) == stored


def test_loading_another_memory_with_the_same_write_times_is_noticed():
    inputs, _ = stream(10)
    buffer, other = make(ClassBalanced, 4), EpisodicMemory(4, 1)
    buffer.write(inputs[:4], torch.tensor([0, 0, 1, 2]))
    other.write(inputs[:4], torch.tensor([1, 2, 0, 0]))
    buffer.memory.load_state_dict(other.state_dict())
    buffer.write(inputs[4:5], torch.tensor([3]))  # replaces one of class 0, which now has the other slots
    assert sorted(buffer.memory.values.tolist()) == [0, 1, 2, 3]


@every_buffer
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("inputs", "labels", "error", "words"),
    [
        (torch.zeros(3, 4), torch.zeros(3).long(), ShapeError, r"inputs must have shape \(b, 2, 2\), got \(3, 4\)"),
        (torch.zeros(2, 2), torch.zeros(2).long(), ShapeError, "unsqueeze"),
        (torch.tensor(1.0), torch.zeros(1).long(), ShapeError, "inputs must have shape"),
        (torch.zeros(3, 2, 2), torch.zeros(2).long(), ShapeError, r"labels must have shape \(3,\) to match 3 inputs"),
        (torch.zeros(3, 2, 2), torch.zeros(3, 1).long(), ShapeError, r"got \(3, 1\)"),
        (torch.zeros(3, 2, 2), torch.zeros(3), DtypeError, "cannot be stored as torch.int64"),
        (torch.full((3, 2, 2), torch.nan), torch.zeros(3).long(), NonFiniteError, "row 0 holds NaN"),
        (torch.zeros(3, 2, 2).bool(), torch.zeros(3).long(), DtypeError, "real numbers"),
        ([[0.0] * 4], torch.zeros(1).long(), DtypeError, "inputs must be a tensor, got list"),
        (torch.zeros(1, 2, 2), [0], DtypeError, "labels must be a tensor, got list"),
    ],
)
def test_bad_examples_change_nothing(kind, inputs, labels, error, words):
    buffer = kind(EpisodicMemory(5, 4), shape=(2, 2))
    buffer.write(torch.rand(20, 2, 2), torch.arange(20) % 3)
    before = copy.deepcopy(buffer)
    with pytest.raises(error, match=words) as caught:
        buffer.write(inputs, labels)
    assert isinstance(caught.value, RecollectError)
    assert same_state(buffer, before)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Ring(nn.Linear(1, 1)), SettingError, "memory must be an EpisodicMemory"),
        (lambda: Ring(EpisodicMemory(5, 4, history=3)), SettingError, "without history"),
        (lambda: Ring(EpisodicMemory(5, 4), shape=(2, 3)), SettingError, r"shape \(2, 3\) must hold key_size = 4"),
        (lambda: Ring(EpisodicMemory(5, 4), shape=(-2, -2)), SettingError, "must hold key_size"),
        (lambda: Reservoir(EpisodicMemory(5, 4), generator=3), SettingError, "generator must be a torch.Generator"),
        (lambda: ClassBalanced(EpisodicMemory(5, 4, value_shape=(2,))), ShapeError, r"value_shape=\(\), got .*\(2,\)"),
        (lambda: ClassBalanced(EpisodicMemory(5, 4, value_dtype=torch.float32)), DtypeError, "whole numbers"),
        (lambda: ClassBalanced(EpisodicMemory(5, 4, value_dtype=torch.bool)), DtypeError, "whole numbers"),
        (lambda: Ring(EpisodicMemory(5, 4)).sample(-1), SettingError, "count must be a whole number of at least 0"),
        (lambda: Ring(EpisodicMemory(5, 4)).sample(2.0), SettingError, r"got 2\.0"),
        (lambda: Ring(EpisodicMemory(5, 4)).sample(True), SettingError, "got True"),
    ],
)
def test_bad_settings(build, error, words):
    with pytest.raises(error, match=words):
        build()


@every_buffer
def test_writing_in_inference_mode_and_then_outside(kind):
    inputs, labels = stream(100)
    buffer, plain = make(kind, 10), make(kind, 10)
    with torch.inference_mode():
        buffer.write(inputs[:60], labels[:60])
    buffer.write(inputs[60:], labels[60:])
    for part in (slice(0, 60), slice(60, 100)):
        plain.write(inputs[part], labels[part])
    assert same_state(buffer, plain)
