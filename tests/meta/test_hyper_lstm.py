"""HyperLSTM: held to scalar loops over the paper's equations, its initial values and its published sizes."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from recollect.errors import DtypeError, SettingError, ShapeError
from recollect.meta.hyper_lstm import HyperLSTM, HyperLSTMCell, HyperLSTMState

Untouched = Callable[[], AbstractContextManager[None]]
D, H, M, Z, B, T = 2, 4, 3, 2, 2, 5  # input, hidden, hyper, embedding, batch, steps
INPUT, FORGET, NEW, OUTPUT = range(4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(*, layer_norm: bool = True, dropout: float = 0.0) -> HyperLSTMCell:
    """A cell in float64 with all of its parameters drawn: at its initial values half of the terms are zero."""
    cell = HyperLSTMCell(
        D, H, hyper_size=M, embedding=Z, layer_norm=layer_norm, dropout=dropout, generator=seeded()
    ).double()
    with torch.no_grad():
        for number, parameter in enumerate(cell.parameters()):
            parameter.normal_(0.0, 0.7, generator=seeded(number))
    return cell


def inputs(seed: int = 7) -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=seeded(seed))


def some_state(seed: int = 8) -> HyperLSTMState:
    shapes = (H, H, M, M)
    return HyperLSTMState(*(torch.randn(B, s, dtype=torch.float64, generator=seeded(seed + s)) for s in shapes))


Row = list[float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dot(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(y: Row, scale: Row, shift: Row) -> Row:
    mean = sum(y) / len(y)
    variance = sum((v - mean) ** 2 for v in y) / len(y)
    return [s * (v - mean) / math.sqrt(variance + 1e-3) + t for v, s, t in zip(y, scale, shift, strict=True)]


def lstm(gates: list[Row], c: Row, cell_norm: Callable[[Row], Row], mask: Row) -> tuple[Row, Row]:
    i, f, g, o = gates
    c = [sigmoid(f[u]) * c[u] + sigmoid(i[u]) * math.tanh(g[u]) * mask[u] for u in range(len(c))]
    normed = cell_norm(c)
    return [sigmoid(o[u]) * math.tanh(normed[u]) for u in range(len(c))], c


def oracle(cell: HyperLSTMCell, x: Row, state: list[Row], mask: Row) -> list[Row]:
    """Eq. (10) to (13) for one sequence, unit by unit."""
    h, c, h_hat, c_hat = state
    p = {name: value.tolist() for name, value in cell.state_dict().items()}
    w_x, w_h = p["weight_ih"], p["weight_hh"]

    def hyper_norm(number: int, y: Row) -> Row:
        return norm(y, p["hyper_norm.scale"][number], p["hyper_norm.shift"][number])

    small = []
    for gate in range(4):
        rows = range(gate * M, gate * M + M)
        small.append(hyper_norm(gate, [dot(w_x[r], x) + dot(w_h[r], h) + dot(p["hyper_hh"][r], h_hat) for r in rows]))
    h_hat, c_hat = lstm(
        small, c_hat, lambda y: norm(y, p["hyper_norm.cell.weight"], p["hyper_norm.cell.bias"]), [1.0] * M
    )
    gates = []
    for gate in range(4):
        w_z, b_z = p["scale_embedding.weight"], p["scale_embedding.bias"]
        z_h = [dot(w_z[r], h_hat) + b_z[r] for r in range(gate * Z, gate * Z + Z)]
        z_x = [dot(w_z[r], h_hat) + b_z[r] for r in range((4 + gate) * Z, (4 + gate) * Z + Z)]
        z_b = [dot(p["shift_embedding.weight"][r], h_hat) for r in range(gate * Z, gate * Z + Z)]
        y = []
        for u in range(H):
            d_h = sum(p["scale"][gate][n][u] * z_h[n] for n in range(Z))
            d_x = sum(p["scale"][4 + gate][n][u] * z_x[n] for n in range(Z))
            b = sum(p["shift"][gate][n][u] * z_b[n] for n in range(Z)) + p["bias"][gate][u]
            row = 4 * M + gate * H + u
            y.append(d_h * dot(w_h[row], h) + d_x * dot(w_x[row], x) + b)
        gates.append(norm(y, p["norm.scale"][gate], p["norm.shift"][gate]) if cell.norm else y)
    cell_norm = (lambda y: norm(y, p["norm.cell.weight"], p["norm.cell.bias"])) if cell.norm else lambda y: y
    h, c = lstm(gates, c, cell_norm, mask)
    return [h, c, h_hat, c_hat]


def unrolled(cell: HyperLSTMCell, x: Tensor, start: HyperLSTMState, masks: Tensor) -> tuple[Tensor, HyperLSTMState]:
    outputs = torch.zeros(B, T, H, dtype=torch.float64)
    ends = []
    for b in range(B):
        state = [part[b].tolist() for part in start]
        for t in range(T):
            state = oracle(cell, x[b, t].tolist(), state, masks[t, b].tolist())
            outputs[b, t] = torch.tensor(state[0], dtype=torch.float64)
        ends.append(state)
    parts = zip(*ends, strict=True)
    return outputs, HyperLSTMState(*(torch.tensor(part, dtype=torch.float64) for part in parts))


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("start", [None, some_state()])
def test_steps_are_the_written_out_equations(layer_norm: bool, start: HyperLSTMState | None) -> None:
    cell = made(layer_norm=layer_norm)
    first = cell.initial(B) if start is None else start
    expected, end = unrolled(cell, inputs(), first, torch.ones(T, B, H))
    with torch.no_grad():
        outputs, state = HyperLSTM(cell)(inputs(), start)
    close(outputs, expected)
    close(tuple(state), tuple(end))


def test_dropout_is_on_what_enters_the_main_cell_a_fresh_mask_for_each_step() -> None:
    cell = made(dropout=0.5)
    masks = torch.empty(T, B, H, dtype=torch.float64).bernoulli_(0.5, generator=seeded(3)) / 0.5
    assert len(masks.unique(dim=0)) == T
    expected, end = unrolled(cell, inputs(), some_state(), masks)
    outputs, state = HyperLSTM(cell)(inputs(), some_state(), generator=seeded(3))
    close(outputs.detach(), expected)
    close(tuple(part.detach() for part in state), tuple(end))
    plain = HyperLSTM(made())(inputs())[0]
    close(HyperLSTM(cell).eval()(inputs())[0], plain)


def test_dropout_leaves_the_global_random_state_alone(rng_untouched: Untouched) -> None:
    layer = HyperLSTM(made(dropout=0.5))
    with rng_untouched():
        one, two, other = (layer(inputs(), generator=seeded(seed))[0] for seed in (1, 1, 2))
        layer.eval()(inputs())
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(layer.train()(inputs())[0], layer(inputs())[0]), "drawn anew where there is no generator"


@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_sequence_is_its_steps_and_its_segments(layer_norm: bool) -> None:
    cell = made(layer_norm=layer_norm)
    outputs, end = HyperLSTM(cell)(inputs())
    state = None
    for t in range(T):
        state = cell(inputs()[:, t], state)
        close(state.hidden, outputs[:, t])
    assert state is not None
    close(tuple(state), tuple(end))
    first, middle = HyperLSTM(cell)(inputs()[:, :2])
    second, last = HyperLSTM(cell)(inputs()[:, 2:], middle)
    close(torch.cat([first, second], 1), outputs)
    close(tuple(last), tuple(end))


def test_a_batch_is_its_sequences() -> None:
    layer = HyperLSTM(made())
    outputs, end = layer(inputs(), some_state())
    for b in range(B):
        alone, state = layer(inputs()[b : b + 1], HyperLSTMState(*(part[b : b + 1] for part in some_state())))
        close(alone[0], outputs[b])
        close([part[0] for part in state], [part[b] for part in end])


@pytest.mark.parametrize("layer_norm", [True, False])
def test_gradients_of_parameters_inputs_and_state(layer_norm: bool) -> None:
    layer = HyperLSTM(made(layer_norm=layer_norm))
    names = [name for name, _ in layer.named_parameters()]
    tensors = [*layer.parameters(), inputs()[:1, :2].requires_grad_()]
    tensors += [part[:1].detach().requires_grad_() for part in some_state()]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, values, strict=False))
        x, *state = values[len(names) :]
        after, end = functional_call(layer, parameters, (x, HyperLSTMState(*state)))
        return after, *end

    assert torch.autograd.gradcheck(outputs, tuple(tensors), fast_mode=True)


def test_initial_values_are_those_of_the_paper(rng_untouched: Untouched) -> None:
    with rng_untouched():
        cell = HyperLSTMCell(5, 8, hyper_size=6, embedding=4, generator=seeded())
    small = 4 * 6
    seen = torch.cat([cell.weight_hh[:small], cell.weight_ih[:small]], 1)
    for matrix in (seen, cell.hyper_hh, cell.weight_hh[small:], cell.weight_ih[small:]):
        for gate in matrix.chunk(4):
            rows, columns = gate.shape
            gram = gate @ gate.mT if rows <= columns else gate.mT @ gate
            torch.testing.assert_close(gram, torch.eye(min(rows, columns)), rtol=0, atol=1e-5)
    assert not torch.equal(cell.hyper_hh[:6], cell.hyper_hh[6:12]), "each gate has a matrix of its own"
    assert not cell.scale_embedding.weight.any()
    assert bool((cell.scale_embedding.bias == 1).all())
    assert 0.005 < float(cell.shift_embedding.weight.detach().std()) < 0.015
    assert bool((cell.scale == 0.1 / 4).all())
    assert not cell.shift.any()
    assert not cell.bias.any()
    assert cell.norm is not None
    for norms in (cell.norm, cell.hyper_norm):
        assert bool((norms.scale == 1).all())
        assert norms.shift.sum(1).tolist() == [0, norms.shift.shape[1], 0, 0], "the forget gate starts open"
        assert bool((norms.cell.weight == 1).all())
        assert not norms.cell.bias.any()
    plain = HyperLSTMCell(5, 8, layer_norm=False, generator=seeded())
    assert plain.bias.sum(1).tolist() == [0, 8, 0, 0]


def test_the_generator_decides_the_initial_weights() -> None:
    one, same, other = (HyperLSTMCell(5, 8, generator=seeded(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in ("weight_ih", "weight_hh", "hyper_hh"))


def count(cell: nn.Module) -> int:
    return sum(parameter.numel() for parameter in cell.parameters())


def test_published_sizes() -> None:
    """Table 3, PTB's 50 characters as one-hot vectors: 4.91M without LayerNorm in the main LSTM, 4.92M with it."""
    softmax = 1000 * 50 + 50
    with torch.device("meta"):
        plain, normed, large = (
            HyperLSTMCell(50, 1000, hyper_size=128, embedding=embedding, layer_norm=layer_norm)
            for embedding, layer_norm in ((4, False), (4, True), (16, True))
        )
        second = HyperLSTMCell(1000, 1000, hyper_size=128, embedding=16)
    assert count(plain) + softmax == 4_912_642
    assert count(normed) + softmax == 4_922_642
    assert count(large) + count(second) + softmax == 14_406_690, "the paper: two layers, embeddings of 16, 14.41M"


def test_size_without_what_layer_norm_makes_superfluous() -> None:
    """Without the biases in front of LayerNorm, and without scale and shift of the cells: what a lean cell has."""
    with torch.device("meta"):
        cell = HyperLSTMCell(50, 1000, hyper_size=128, embedding=4)
    assert cell.norm is not None
    assert count(cell) - cell.bias.numel() - count(cell.norm.cell) - count(cell.hyper_norm.cell) == 4_866_336


def test_it_learns() -> None:
    """To say what came two steps before."""
    layer = HyperLSTM(HyperLSTMCell(3, 12, hyper_size=6, embedding=2, dropout=0.1, generator=seeded()))
    last = nn.utils.skip_init(nn.Linear, 12, 3)
    for parameter in last.parameters():
        parameter.data.zero_()
    optimizer = torch.optim.Adam([*layer.parameters(), *last.parameters()], lr=0.02)
    g, losses = seeded(4), []
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    for _ in range(50):
        symbols = torch.randint(3, (16, 6), generator=g)
        outputs, _ = layer(nn.functional.one_hot(symbols, 3).float(), generator=g)
        loss = nn.functional.cross_entropy(last(outputs[:, 2:]).flatten(0, 1), symbols[:, :-2].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(3))
    assert losses[-1] < 0.75 * losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in layer.named_parameters())


def test_copies_and_state_dicts() -> None:
    layer = HyperLSTM(made())
    expected = layer(inputs())[0]
    twin, other = copy.deepcopy(layer), HyperLSTM(HyperLSTMCell(D, H, hyper_size=M, embedding=Z).double())
    other.load_state_dict(layer.state_dict())
    layer.cell.weight_ih.data.zero_()
    assert torch.equal(twin(inputs())[0], expected)
    assert torch.equal(other(inputs())[0], expected)
    assert not torch.equal(layer(inputs())[0], expected)


def test_it_runs_under_inference_mode() -> None:
    layer = HyperLSTM(made())
    expected = layer(inputs())[0]
    with torch.inference_mode():
        assert torch.equal(layer(inputs())[0], expected)


@pytest.mark.parametrize("shape", [(B, D), (B, T, D + 1), (B, 0, D), (D,)])
def test_sequences_of_the_wrong_shape(untyped: None, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="inputs must have shape"):
        HyperLSTM(made())(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(B, T, D), (B, D + 1), (D,)])
def test_inputs_of_the_wrong_shape(untyped: None, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=rf"inputs must have shape \(b, {D}\)"):
        made()(torch.zeros(shape))


def test_states_of_the_wrong_shape(untyped: None) -> None:
    cell = made()
    with pytest.raises(ShapeError, match=r"state of 1 sequences must be .* Is it that of another batch"):
        cell(inputs()[:1, 0], some_state())
    with pytest.raises(ShapeError, match=rf"\({B}, {H}\), \({B}, {H}\), \({B}, {M}\), \({B}, {M}\)"):
        cell(inputs()[:, 0], HyperLSTMState(*reversed(some_state())))
    with pytest.raises(ShapeError, match="must be a HyperLSTMState"):
        cell(inputs()[:, 0], tuple(some_state())[:2])


def test_dtypes_must_be_those_of_the_weights(untyped: None) -> None:
    cell = made().float()
    for call in (lambda: HyperLSTM(cell)(inputs()), lambda: cell(inputs()[:, 0])):
        with pytest.raises(DtypeError, match=r"inputs must be torch\.float32 as the weights are, got torch\.float64"):
            call()
    with pytest.raises(DtypeError, match=r"the state must be torch\.float32 as the weights are, got torch\.float64"):
        cell(inputs()[:, 0].float(), some_state())
    with pytest.raises(ShapeError, match=r"must be a HyperLSTMState .* got something else \(Tensor\)"):
        cell(inputs()[:, 0].float(), torch.zeros(4, B, H))


def test_autocast_converts_dtypes() -> None:
    layer = HyperLSTM(made().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = layer(inputs().bfloat16(), layer(inputs().float())[1])[0]
    assert outputs.isfinite().all()


def test_lists_are_no_inputs(untyped: None) -> None:
    with pytest.raises(DtypeError, match="inputs must be a tensor, got list"):
        HyperLSTM(made())([[[1.0, 2.0]]])


@pytest.mark.parametrize("name", ["input_size", "hidden_size", "hyper_size", "embedding"])
@pytest.mark.parametrize("size", [0, 2.0, True])
def test_sizes_must_be_whole_numbers(untyped: None, name: str, size: object) -> None:
    sizes = {"input_size": 2, "hidden_size": 2, "hyper_size": 2, "embedding": 2} | {name: size}
    with pytest.raises(SettingError, match=f"{name} must be a whole number above 0"):
        HyperLSTMCell(**sizes)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan"), "0.1"])
def test_dropout_must_be_a_probability(untyped: None, dropout: object) -> None:
    with pytest.raises(SettingError, match="dropout must be"):
        HyperLSTMCell(2, 2, dropout=dropout)


def test_a_word_is_no_truth_value(untyped: None) -> None:
    with pytest.raises(SettingError, match="layer_norm must be True or False, got 'no'"):
        HyperLSTMCell(2, 2, **{"layer_norm": "no"})


def test_a_class_is_no_cell(untyped: None) -> None:
    with pytest.raises(SettingError, match="cell must be a cell, such as HyperLSTMCell"):
        HyperLSTM(HyperLSTMCell)
