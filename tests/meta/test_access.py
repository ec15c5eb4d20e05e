"""The memory's cells against their papers' equations, written out in loops."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import nn

from recollect.errors import DtypeError, SettingError, ShapeError
from recollect.meta.access import Access, LRUAccess, LRUState, NTMAccess, NTMState

Untouched = Callable[[], AbstractContextManager[None]]
Array = np.ndarray

KINDS = [LRUAccess, NTMAccess]
HIDDEN, SLOTS, WIDTH = 5, 7, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def lively(access: nn.Module) -> nn.Module:
    """Weights large enough that gates and keys go far up and down."""
    access.double()
    for number, parameter in enumerate(access.parameters()):
        parameter.data.copy_(1.5 * randn(*parameter.shape, seed=10 + number))
    return access


def lru(**settings: float) -> LRUAccess:
    sizes = {"slots": SLOTS, "width": WIDTH, "reads": 3, "generator": generator()}
    return lively(LRUAccess(HIDDEN, **{**sizes, **settings}))


def ntm(**settings: int) -> NTMAccess:
    sizes = {"slots": SLOTS, "width": WIDTH, "reads": 2, "generator": generator()}
    return lively(NTMAccess(HIDDEN, **{**sizes, **settings}))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def cosine(a: Array, b: Array) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.sqrt(sum(a * a)) * math.sqrt(sum(b * b)))


def affine(layer: nn.Linear, x: Array) -> Array:
    return layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()


def lru_step(access: LRUAccess, hidden: Array, memory: Array, usage: Array, weights: Array) -> tuple[Array, ...]:
    """Santoro et al., Eq. (17) to (23), for one sequence, number by number."""
    slots, width, heads = access.slots, access.width, access.reads
    raw = affine(access.heads, hidden)
    keys = [[math.tanh(raw[h * width + j]) for j in range(width)] for h in range(heads)]
    gates = [sigmoid(raw[heads * width + h]) for h in range(heads)]
    # With ``separate`` there are vectors to write beside the keys.
    rest = raw[heads * (width + 1) :]
    written = [[math.tanh(rest[h * width + j]) for j in range(width)] for h in range(heads)] if len(rest) else keys

    order = sorted(range(slots), key=lambda i: (usage[i], i))
    least = [1.0 if i in order[:heads] else 0.0 for i in range(slots)]  # (21)
    writes = np.zeros((heads, slots))
    for h in range(heads):
        for i in range(slots):
            writes[h, i] = gates[h] * weights[h, i] + (1 - gates[h]) * least[i]  # (22)
    memory = memory.copy()
    memory[order[0]] = 0.0
    for h in range(heads):
        for i in range(slots):
            for j in range(width):
                memory[i, j] += writes[h, i] * written[h][j]  # (23)

    reads, weights = np.zeros((heads, width)), np.zeros((heads, slots))
    for h in range(heads):
        raised = [math.exp(cosine(np.array(keys[h]), memory[i])) for i in range(slots)]  # (17)
        for i in range(slots):
            weights[h, i] = raised[i] / sum(raised)  # (18)
            reads[h] += weights[h, i] * memory[i]  # (19)
    usage = np.array([access.gamma * usage[i] + sum(weights[:, i]) + sum(writes[:, i]) for i in range(slots)])  # (20)
    return reads, memory, usage, weights


def ntm_weights(access: NTMAccess, raw: Array, memory: Array, before: Array) -> Array:
    """Graves et al., Eq. (5) to (9), for one head of one sequence."""
    slots, width, span = access.slots, access.width, 2 * access.shift + 1
    key = np.tanh(raw[:width])
    strength, gate, sharpening = softplus(raw[width]), sigmoid(raw[width + 1]), 1 + softplus(raw[width + 2 + span])
    chances = np.exp(raw[width + 2 : width + 2 + span])
    chances = chances / sum(chances)
    raised = [math.exp(strength * cosine(key, memory[i])) for i in range(slots)]
    blended = [gate * raised[i] / sum(raised) + (1 - gate) * before[i] for i in range(slots)]
    moved = np.zeros(slots)
    for j in range(slots):
        for by, chance in zip(range(-access.shift, access.shift + 1), chances, strict=True):
            moved[(j + by) % slots] += blended[j] * chance
    return moved**sharpening / sum(moved**sharpening)


def ntm_step(access: NTMAccess, hidden: Array, memory: Array, reading: Array, writing: Array) -> tuple[Array, ...]:
    """Graves et al., Section 3, for one sequence."""
    slots, width = access.slots, access.width
    raw, changes = affine(access.writing, hidden).reshape(access.writes, -1), affine(access.changes, hidden)
    writing = np.stack([ntm_weights(access, raw[h], memory, writing[h]) for h in range(access.writes)])
    erased = [[sigmoid(changes[2 * h * width + j]) for j in range(width)] for h in range(access.writes)]
    added = [[math.tanh(changes[(2 * h + 1) * width + j]) for j in range(width)] for h in range(access.writes)]
    memory = memory.copy()
    for h in range(access.writes):
        for i in range(slots):
            for j in range(width):
                memory[i, j] *= 1 - writing[h, i] * erased[h][j]  # (3)
    for h in range(access.writes):
        for i in range(slots):
            for j in range(width):
                memory[i, j] += writing[h, i] * added[h][j]  # (4)
    raw = affine(access.reading, hidden).reshape(access.reads, -1)
    reading = np.stack([ntm_weights(access, raw[h], memory, reading[h]) for h in range(access.reads)])
    reads = np.stack([sum(reading[h, i] * memory[i] for i in range(slots)) for h in range(access.reads)])  # (2)
    return reads, memory, reading, writing


def follow(access: LRUAccess | NTMAccess, step: Callable[..., tuple[Array, ...]], *, steps: int = 12) -> None:
    """Compares reads and state of three sequences with the oracle's, after each step."""
    hidden, state = randn(steps, 3, HIDDEN), access.initial(3)
    oracle = [tuple(part[b].numpy() for part in state) for b in range(3)]
    for t in range(steps):
        reads, state = access(hidden[t], state)
        for b in range(3):
            expected, *parts = step(access, hidden[t, b].numpy(), *oracle[b])
            oracle[b] = tuple(parts)
            for got, want in zip((reads, *state), (expected, *parts), strict=True):
                torch.testing.assert_close(got[b], torch.from_numpy(want), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reads", [1, 2, 3, SLOTS])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("separate", [False, True])
def test_lru_is_the_papers(reads: int, gamma: float, separate: bool) -> None:
    follow(lru(reads=reads, gamma=gamma, separate=separate), lru_step)


@pytest.mark.parametrize("writes", [1, 3])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_ntm_is_the_papers(writes: int, shift: int) -> None:
    follow(ntm(writes=writes, shift=shift), ntm_step)


def test_the_slots_are_used_in_turn() -> None:
    """The oracle is followed through many choices of slots, not just the first ones."""
    access = lru(reads=2)
    hidden, state, chosen = randn(20, 1, HIDDEN), access.initial(1), set()
    for step in hidden:
        chosen.add(int(state.usage.argmin()))
        _, state = access(step, state)
    assert chosen == set(range(SLOTS))


def shut(access: LRUAccess, *, gates: float) -> LRUAccess:
    """With ``gates`` at -1000 all goes to the least used slots, at 1000 to those read before."""
    with torch.no_grad():
        access.heads.weight[-access.reads :] = 0.0
        access.heads.bias[-access.reads :] = gates
    return access


@pytest.mark.parametrize(
    ("usage", "least"),
    [
        ([0.0] * 7, [0, 1, 2]),
        ([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1, 2, 3]),
        ([2.0, 1.0, 1.0, 0.0, 1.0, 1.0, 3.0], [3, 1, 2]),
        ([5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0], [3, 4, 5]),
        ([1.0, 2.0, 3.0, 0.5, 0.2, 0.1, 9.0], [5, 4, 3]),
    ],
)
def test_exactly_as_many_slots_as_reads_are_least_used(usage: list[float], least: list[int]) -> None:
    access = shut(lru(reads=3), gates=-1000.0)
    before = access.initial(1)._replace(memory=randn(1, SLOTS, WIDTH), usage=torch.tensor([usage]).double())
    _, after = access(randn(1, HIDDEN), before)
    moved = (after.memory != before.memory).any(2)[0].nonzero().flatten().tolist()
    assert moved == sorted(least)
    keys = access.heads(randn(1, HIDDEN))[0, : 3 * WIDTH].tanh().reshape(3, WIDTH).sum(0)
    torch.testing.assert_close(after.memory[0, least[0]], keys)  # the old content is gone
    torch.testing.assert_close(after.memory[0, least[1:]], before.memory[0, least[1:]] + keys)


def test_ties_of_128_slots_go_to_the_first() -> None:
    access = shut(lru(slots=128, reads=4), gates=-1000.0)
    before = access.initial(2)
    before.usage[:, 0] = 1.0
    _, after = access(randn(2, HIDDEN), before)
    moved = (after.memory != before.memory).any(2)
    assert [row.nonzero().flatten().tolist() for row in moved] == [[1, 2, 3, 4]] * 2


def test_the_least_used_slot_is_set_to_zero() -> None:
    access = shut(lru(), gates=1000.0)
    memory, usage = randn(2, SLOTS, WIDTH), randn(2, SLOTS, seed=2).abs()
    memory[0, usage[0].argmin()] = math.inf  # zero, whatever was there
    _, after = access(randn(2, HIDDEN), LRUState(memory, usage, torch.zeros(2, 3, SLOTS).double()))
    expected = memory.clone()
    for b in range(2):
        expected[b, usage[b].argmin()] = 0.0
    assert torch.equal(after.memory, expected)


@pytest.mark.parametrize(
    ("kind", "heads"), [(LRUAccess, (1,)), (LRUAccess, (2,)), (NTMAccess, (1, 1)), (NTMAccess, (1, 2))]
)
def test_gradients(kind: type, heads: tuple[int, ...]) -> None:
    """Of two steps, at all inputs and weights, against finite differences."""
    settings = dict(zip(("reads", "writes"), heads, strict=False))
    access = lively(kind(2, slots=4, width=2, **settings))
    names = [name for name, _ in access.named_parameters()]
    usage = torch.tensor([[3.0, 0.4, 2.0, 0.1]]).double()  # far enough apart that no small change moves the choice
    states = [randn(1, 4, 2, seed=3), *(randn(1, count, 4, seed=5).softmax(2) for count in heads)]

    def run(hidden: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given, weights = rest[: len(states)], dict(zip(names, rest[len(states) :], strict=True))
        state = LRUState(given[0], usage, given[1]) if kind is LRUAccess else NTMState(*given)
        first, state = torch.func.functional_call(access, weights, (hidden[0], state))
        second, state = torch.func.functional_call(access, weights, (hidden[1], state))
        return (first, second, *(part for part in state if part.requires_grad))

    inputs = [randn(2, 1, 2), *states, *(p.detach().clone() for p in access.parameters())]
    assert torch.autograd.gradcheck(run, [part.requires_grad_() for part in inputs])


def test_no_gradient_goes_through_the_usage() -> None:
    access = lru()
    _, state = access(randn(2, HIDDEN).requires_grad_(), access.initial(2))
    assert [part.requires_grad for part in state] == [True, False, True]


def test_empty_slots_and_keys_have_finite_gradients() -> None:
    access = lru()
    for parameter in access.parameters():
        parameter.data.zero_()  # keys of 0
    state = LRUState(*(torch.zeros_like(part) for part in access.initial(1)))  # slots of 0
    reads, after = access(randn(1, HIDDEN), state)
    (reads.sum() + after.memory.sum() + after.weights.square().sum()).backward()
    torch.testing.assert_close(after.weights, torch.full_like(after.weights, 1 / SLOTS))
    assert all(parameter.grad.isfinite().all() for parameter in access.parameters())


@pytest.mark.parametrize("start", ["first slot", "everywhere"])
def test_high_powers_of_small_weights_are_finite(start: str) -> None:
    """Where (1/128)^61 is 0 in float32, and where a weight is 0 itself."""
    access = NTMAccess(HIDDEN, slots=128, width=WIDTH, reads=2, generator=generator())
    bias = access.reading.bias.data.view(2, -1)
    bias[:, WIDTH + 1] = -1000.0  # the gate: stay where you were
    bias[:, -1] = 60.0  # the sharpening
    state = access.initial(1)
    if start == "everywhere":
        state = state._replace(reading=torch.full_like(state.reading, 1 / 128))
    _, after = access(torch.zeros(1, HIDDEN), state)
    torch.testing.assert_close(after.reading.sum(2), torch.ones(1, 2))
    after.reading.square().sum().backward()
    assert access.reading.bias.grad.isfinite().all()


def test_slots_of_an_empty_ntm_grow_apart() -> None:
    access = ntm()
    state = access.initial(1)
    for step in randn(4, 1, HIDDEN):
        _, state = access(step, state)
    assert len(state.memory[0].unique(dim=0)) == SLOTS


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_rows(kind: type) -> None:
    access = lively(kind(HIDDEN, slots=SLOTS, width=WIDTH, reads=2))
    hidden = randn(6, 4, HIDDEN)

    def run(rows: slice) -> tuple[torch.Tensor, ...]:
        state = access.initial(len(range(4)[rows]))
        for step in hidden[:, rows]:
            reads, state = access(step, state)
        return (reads, *state)

    together, alone = run(slice(None)), [run(slice(b, b + 1)) for b in range(4)]
    for number, part in enumerate(together):
        torch.testing.assert_close(part, torch.cat([one[number] for one in alone]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_its_inputs_alone(kind: type, rng_untouched: Untouched) -> None:
    with rng_untouched():
        access = kind(HIDDEN, slots=SLOTS, width=WIDTH, reads=2, generator=generator())
        hidden, state = torch.randn(2, HIDDEN, generator=generator()), access.initial(2)
        kept = [part.clone() for part in (hidden, *state)]
        with torch.no_grad():
            first, again = access(hidden, state), access(hidden, state)
    assert all(torch.equal(old, new) for old, new in zip(kept, (hidden, *state), strict=True))
    assert torch.equal(first[0], again[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_drawn_from_the_generator(kind: type) -> None:
    one, same, other = (kind(100, generator=generator(seed)) for seed in (0, 0, 1))
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert a.abs().max() <= 0.1
        assert a.numel() < 500 or a.abs().max() > 0.099
    torch.manual_seed(3)
    one = kind(100)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), kind(100).parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_follows_the_weights(kind: type) -> None:
    access = kind(HIDDEN).double()
    assert {part.dtype for part in access.initial(1)} == {torch.float64}
    assert isinstance(access, Access)


@pytest.mark.parametrize("kind", KINDS)
def test_works_in_a_network_of_ones_own(kind: type) -> None:
    access = kind(8, slots=SLOTS, width=WIDTH, reads=2)
    controller, output = nn.GRUCell(3 + 2 * WIDTH, 8), nn.Linear(2 * WIDTH, 1)
    hidden, reads, state = torch.zeros(2, 8), torch.zeros(2, 2, WIDTH), access.initial(2)
    for _ in range(3):
        hidden = controller(torch.cat([torch.ones(2, 3), reads.flatten(1)], 1), hidden)
        reads, state = access(hidden, state)
    output(reads.flatten(1)).sum().backward()
    for parameter in (*controller.parameters(), *access.parameters(), *output.parameters()):
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots must be a whole number above 0, got 0"),
        ({"width": 2.0}, "width must be a whole number above 0, got 2.0"),
        ({"reads": True}, "reads must be a whole number above 0, got True"),
        ({"slots": 3, "reads": 4}, "each of the 4 reads needs a least used slot of its own, but slots=3"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\].*Got 1.5"),
        ({"gamma": -0.1}, "gamma must be a finite number of at least 0, got -0.1"),
        ({"gamma": math.nan}, "gamma must be a finite number"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_lru_says_what_is_wrong(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        LRUAccess(8, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"writes": 0}, "writes must be a whole number above 0, got 0"),
        ({"shift": -1}, "shift must be a whole number of at least 0, got -1"),
        ({"shift": 2, "slots": 4}, "shifts from -2 to 2 go around all slots=4"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_ntm_says_what_is_wrong(settings: dict[str, int], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        NTMAccess(8, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("untyped")
def test_a_step_says_what_is_wrong(kind: type) -> None:
    access = kind(HIDDEN, slots=SLOTS, width=WIDTH, reads=2)
    with pytest.raises(ShapeError, match=r"at one step, of shape \(sequences, 5\), got \(2, 10, 5\)"):
        access(torch.zeros(2, 10, HIDDEN), access.initial(2))
    with pytest.raises(ShapeError, match=r"of shape \(sequences, 5\), got \(2, 6\)"):
        access(torch.zeros(2, 6), access.initial(2))
    with pytest.raises(DtypeError, match=r"hidden must be torch.float32 as the weights are, got torch.float64"):
        access(torch.zeros(2, HIDDEN).double(), access.initial(2))
    with pytest.raises(ShapeError, match=r"state of 2 sequences must be an .*\[\(2, 7, 4\), .*got \[\(3, 7, 4\)"):
        access(torch.zeros(2, HIDDEN), access.initial(3))
    with pytest.raises(DtypeError, match="hidden must be a tensor, got list"):
        access([0.0] * HIDDEN, access.initial(1))


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("untyped")
def test_each_part_of_a_state_is_checked(kind: type, part: int) -> None:
    access = kind(HIDDEN, slots=SLOTS, width=WIDTH, reads=2)
    more = kind(HIDDEN, slots=SLOTS + 1, width=WIDTH, reads=2).initial(2)
    state, hidden = access.initial(2), torch.zeros(2, HIDDEN)
    for wrong in (access.initial(1)[part], more[part]):
        with pytest.raises(ShapeError, match="Is it that of another batch, or of another network"):
            access(hidden, type(state)(*state[:part], wrong, *state[part + 1 :]))
    with pytest.raises(DtypeError, match=r"the state must be torch\.float32 as the weights are, got torch\.float64"):
        access(hidden, type(state)(*state[:part], state[part].double(), *state[part + 1 :]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("untyped")
def test_what_is_no_state(kind: type) -> None:
    access = kind(HIDDEN, slots=SLOTS, width=WIDTH, reads=2)
    for wrong, name in ((torch.zeros(2, 7, 4), "Tensor"), (None, "NoneType"), ((1, 2, 3), "tuple")):
        with pytest.raises(ShapeError, match=rf"of tensors of the shapes .* got something else \({name}\)"):
            access(torch.zeros(2, HIDDEN), wrong)
