"""Importances against one backward pass for each example, for layers and networks of many kinds."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

from recollect.continual import importance, layerwise
from recollect.continual.examples import Batch, batches
from recollect.continual.importance import Layerwise, importances
from recollect.continual.outputs import output_mask, restricted
from recollect.continual.recording import record, units
from recollect.continual.unrolled import unrolled
from recollect.errors import DtypeError, LabelError, SettingError, ShapeError

DOUBLE = torch.float64
VOCABULARY = 9


# The oracle


def directions(outputs: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
    """Three directions; the last one depends on the labels."""
    yield outputs.cos()
    yield 2 * outputs
    if labels is not None:
        yield torch.sin(labels.to(outputs.dtype)).view(-1, *(1,) * (outputs.dim() - 1)) * (1 + outputs.square())


def trainable(network: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, p in network.named_parameters() if p.requires_grad)


def oracle(network: nn.Module, inputs: Tensor, labels: Tensor | None, power: int) -> dict[str, Tensor]:
    """Each example by itself, each direction by itself."""
    network = copy.deepcopy(network).eval()
    parameters = [p for p in network.parameters() if p.requires_grad]
    sums = [torch.zeros(p.shape, dtype=DOUBLE) for p in parameters]
    for n in range(len(inputs)):
        label = None if labels is None else labels[n : n + 1]
        with torch.no_grad():
            ways = list(directions(network(inputs[n : n + 1]), label))
        for way in ways:
            grads = torch.autograd.grad((network(inputs[n : n + 1]) * way).sum(), parameters, allow_unused=True)
            for total, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    total.add_((grad.to_dense() if grad.is_sparse else grad).abs() ** power)
    return dict(zip(trainable(network), sums, strict=True))


def agree(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert got.keys() == wanted.keys()
    for name, right in wanted.items():
        scale = float(right.abs().max())
        torch.testing.assert_close(got[name].to(DOUBLE), right, rtol=tolerance, atol=tolerance * scale, msg=name)


def way_of(network: nn.Module, inputs: Tensor, power: int = 2) -> str:
    """What computes the importances: the parts of the layerwise way, or one example at a time."""
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    network = network.eval()
    return described(importance._find_way(network, inputs[:3], parameters, power))


def described(way: importance.Way) -> str:
    return " ".join(type(part).__name__ for part in way._parts) if isinstance(way, Layerwise) else "OneByOne"


# The networks


class Sequence(nn.Module):
    """Embedding, recurrent layer, and a linear layer at each step."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, recurrent.input_size, padding_idx=0)
        self.recurrent = recurrent
        size = (recurrent.proj_size or recurrent.hidden_size) * (2 if recurrent.bidirectional else 1)
        self.out = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        if self.recurrent.batch_first:
            return self.out(self.recurrent(h)[0])
        return self.out(self.recurrent(h.transpose(0, 1))[0]).transpose(0, 1)


class LastState(nn.Module):
    """Uses an LSTM's final states, h and c, and starts from a state that its input decides."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(3, 8)
        self.recurrent = nn.LSTM(3, 4, 2)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        start = self.start(x[:, 0]).view(len(x), 2, 4).transpose(0, 1).contiguous()
        _, (h, c) = self.recurrent(x.transpose(0, 1), (start, start.sin()))
        return self.out(torch.cat([h, c.tanh()]).transpose(0, 1).flatten(1))


class Unrolled(nn.Module):
    """A cell called at every step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.out = cell, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


class MinimalCell(nn.RNNCellBase):
    """Somebody's own cell."""

    def __init__(self) -> None:
        super().__init__(3, 4, bias=True, num_chunks=1)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        entering = nn.functional.linear(x, self.weight_ih, self.bias_ih)
        return entering.tanh() if h is None else (entering + h @ self.weight_hh.T + self.bias_hh).tanh()


class Tied(nn.Module):
    """A language model whose decoder has the weight of its embedding, on rows of all steps."""

    def __init__(self, time_first: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.recurrent = nn.GRU(4, 4, batch_first=True)
        self.decoder = nn.Linear(4, VOCABULARY)
        self.decoder.weight = self.embedding.weight
        self.time_first = time_first

    def forward(self, x: Tensor) -> Tensor:
        h = self.recurrent(self.embedding(x))[0]
        if self.time_first:
            rows = self.decoder(h.transpose(0, 1).reshape(-1, 4))
            return rows.view(x.shape[1], len(x), VOCABULARY).transpose(0, 1)
        return self.decoder(h.reshape(-1, 4)).view(len(x), -1, VOCABULARY)


class Functional(nn.Module):
    """Uses a layer's weight outside of the layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(nn.functional.linear(x, self.layer.weight) + self.layer(x)))


class Own(nn.Module):
    """Has parameters of its own beside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.gain = nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gain


class Twice(nn.Module):
    """Calls a layer twice, and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.never = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(input=x))) + x


class Attention(nn.Module):
    """Attention with a mask that all examples share and one of each example's own."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        hidden = x[:, :, 0] > 0.9
        hidden[:, 0] = False
        h = x if self.batch_first else x.transpose(0, 1)
        made, weights = self.attention(h, h, h.sin(), attn_mask=mask, key_padding_mask=hidden)
        made = made if self.batch_first else made.transpose(0, 1)
        return made + weights.sum(-2).unsqueeze(-1)


class Positions(nn.Module):
    """An embedding that all examples look up alike."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.out = nn.Embedding(VOCABULARY, 4), nn.Embedding(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.tokens(x) * self.places(torch.arange(x.shape[1])))


class TwoInputs(nn.Module):
    """A layer with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(5, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.cos())


class Adapted(nn.Linear):
    """A linear layer with a parameter that torch's has not."""

    def __init__(self) -> None:
        super().__init__(5, 3)
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Centered(nn.Module):
    """Mixes examples, as it must not; each is looked at alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h.tanh() - 0.5 * h.mean(0)


class Packed(nn.Module):
    """Packs its sequences, whose lengths are where the padding starts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 3)
        self.recurrent = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x > 0).sum(1).clamp(min=1)
        packed = pack_padded_sequence(self.embedding(x), lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class Experts(nn.Module):
    """Each example goes to one of two experts; an expert without examples is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor) -> Tensor:
        made = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            rows = (x[:, 0] > 0).long() == number
            if bool(rows.any()):
                made[rows] = expert(x[rows])
        return made


class Sorted(nn.Module):
    """Sorts its examples in between, as for packing; a layer is called before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.argsort((x[:, 0] > 0).long(), stable=True)
        return self.layer(torch.tanh(self.layer(x))[order])[torch.argsort(order)]


class UntilPadding(nn.Module):
    """Calls its cell until nothing but padding is left."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(VOCABULARY, 3), nn.GRUCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 4, dtype=self.embedding.weight.dtype)
        for tokens in x[:, : int((x > 0).sum(1).max())].unbind(1):
            h = torch.where((tokens > 0).unsqueeze(1), self.cell(self.embedding(tokens), h), h)
        return h


def stack(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


def warmed(module: nn.Module) -> nn.Module:
    """With statistics that are not those of a fresh layer."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.normal_(part.weight)
    return module


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(requires_grad=False)
    return module


def vectors(*shape: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, *shape, dtype=DOUBLE)


def tokens(count: int) -> Tensor:
    """Sequences with padding at the end; with nine tokens and six places, some come twice."""
    made = torch.randint(1, 6, (count, 6))
    return made.masked_fill(torch.arange(6) >= torch.randint(3, 7, (count, 1)), 0)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    way: str


def rnn(name: str, make: Callable[[], nn.RNNBase]) -> Case:
    return Case(name, lambda: Sequence(make()), tokens, "Lookup SideBySide SideBySide")


def tf(**settings: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **settings)


CASES = [
    Case("linear", lambda: nn.Linear(5, 3), vectors(5), "Rows"),
    Case("linear without bias", lambda: nn.Linear(5, 3, bias=False), vectors(5), "Rows"),
    Case(
        "mlp",
        lambda: stack(
 nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)),
        vectors(5),
        "Rows Rows Rows",
    ),
    Case("linear on steps", lambda: stack(nn.Linear(5, 4), nn.ELU(inplace=True), nn.Linear(4, 2, bias=False)),
         vectors(3, 5), "SideBySide SideBySide"),
    Case("frozen weight", lambda: frozen(stack(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), "0.weight", "2.bias"),
         vectors(5), "Rows Rows"),
    Case("frozen layer", lambda: frozen(stack(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), "0.weight", "0.bias"),
         vectors(5), "Rows"),
    Case("prelu", lambda: stack(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 3)), vectors(5), "Rows SideBySide Rows"),
    Case("bilinear", TwoInputs, vectors(5), "SideBySide"),
    Case(
        "conv2d",
        lambda: stack(
            nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 2), groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, (2, 3), dilation=(2, 1), bias=False),
            nn.Flatten(),
            nn.Linear(6 * 1 * 5, 2),
        ),
        vectors(2, 5, 5),
        "SideBySide SideBySide Rows",
    ),
    Case("conv2d same", lambda: stack(nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(2, 1)), nn.Tanh()),
         vectors(2, 4, 5), "SideBySide"),
    Case("conv2d same, even, dilated", lambda: nn.Conv2d(1, 2, (4, 2), padding="same", dilation=(1, 3)),
         vectors(1, 4, 5), "SideBySide"),
    Case("conv2d valid", lambda: nn.Conv2d(2, 2, 2, padding="valid", groups=2), vectors(2, 3, 4), "SideBySide"),
    Case("conv2d circular", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), vectors(2, 4, 4),
         "SideBySide"),
    Case("conv2d reflect", lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), vectors(2, 4, 4),
         "SideBySide"),
    Case("conv2d frozen bias", lambda: frozen(nn.Conv2d(2, 3, 2), "bias"), vectors(2, 4, 4), "SideBySide"),
    Case(
        "conv1d",
        lambda: stack(nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2), nn.Tanh(), nn.Conv1d(6, 2, 2, dilation=2)),
        vectors(4, 8),
        "SideBySide SideBySide",
    ),
    Case("conv1d same", lambda: nn.Conv1d(2, 3, 4, padding="same"), vectors(2, 5), "SideBySide"),
    Case("conv1d circular", lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), vectors(2, 5),
         "SideBySide"),
    Case("conv3d", lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), vectors(2, 3, 3, 3), "SideBySide"),
    Case("transposed 1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), vectors(2, 4), "SideBySide"),
    Case("transposed 2d", lambda: nn.ConvTranspose2d(2, 4, 2, groups=2, output_padding=1, stride=2), vectors(2, 3, 3),
         "SideBySide"),
    Case("batchnorm", lambda: warmed(stack(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))),
         vectors(5), "Rows SideBySide Rows"),
    Case("batchnorm 2d", lambda: warmed(stack(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True))),
         vectors(2, 4, 4), "SideBySide SideBySide"),
    Case("layernorm", lambda: stack(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)), vectors(5),
         "Rows SideBySide Rows"),
    Case("groupnorm", lambda: stack(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)),
         vectors(2, 4, 4), "SideBySide SideBySide SideBySide"),
    Case("embedding", lambda: stack(nn.Embedding(VOCABULARY, 3, padding_idx=0), nn.Flatten(), nn.Linear(18, 2)),
         tokens, "Lookup Rows"),
    Case("embedding, last is padding", lambda: stack(nn.Embedding(6, 3, padding_idx=-1), nn.Tanh()), tokens, "Lookup"),
    Case("embedding by frequency", lambda: nn.Embedding(VOCABULARY, 3, scale_grad_by_freq=True), tokens, "SideBySide"),
    Case("sparse embedding", lambda: nn.Embedding(VOCABULARY, 3, sparse=True), tokens, "OneByOne"),
    Case("embedding bag", lambda: stack(nn.EmbeddingBag(VOCABULARY, 3), nn.Linear(3, 2)), tokens, "SideBySide Rows"),
    Case("embedding frozen", lambda: frozen(stack(nn.Embedding(VOCABULARY, 3), nn.Linear(3, 2)), "0.weight"), tokens,
         "SideBySide"),
    Case("positions", Positions, tokens, "SideBySide"),
    rnn("lstm", lambda: nn.LSTM(3, 4, batch_first=True)),
    rnn("lstm both ways", lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, dropout=0.5)),
    rnn("lstm time first", lambda: nn.LSTM(3, 4, 2)),
    rnn("lstm projected", lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True)),
    rnn("lstm without bias", lambda: nn.LSTM(3, 4, bias=False, batch_first=True)),
    rnn("gru", lambda: nn.GRU(3, 4, 2, bidirectional=True)),
    rnn("gru without bias", lambda: nn.GRU(3, 4, bias=False, batch_first=True)),
    rnn("rnn tanh", lambda: nn.RNN(3, 4, 2, batch_first=True)),
    rnn("rnn relu", lambda: nn.RNN(3, 4, nonlinearity="relu", bidirectional=True)),
    Case("lstm states", LastState, vectors(4, 3), "Rows SideBySide Rows"),
    Case("lstm cell", lambda: Unrolled(nn.LSTMCell(3, 4)), vectors(4, 3), "SideBySide Rows"),
    Case("gru cell", lambda: Unrolled(nn.GRUCell(3, 4, bias=False)), vectors(4, 3), "SideBySide Rows"),
    Case("rnn cell", lambda: Unrolled(nn.RNNCell(3, 4)), vectors(4, 3), "SideBySide Rows"),
    Case("rnn cell relu", lambda: Unrolled(nn.RNNCell(3, 4, nonlinearity="relu")), vectors(4, 3), "SideBySide Rows"),
    Case("own cell", lambda: Unrolled(MinimalCell()), vectors(4, 3), "*"),
    Case("packed", Packed, tokens, "OneByOne"),
    Case("attention", lambda: Attention(batch_first=True), vectors(4, 8), "SideBySide"),
    Case("attention time first", lambda: Attention(batch_first=False), vectors(4, 8), "SideBySide"),
    Case("transformer", lambda: stack(tf(), nn.Flatten(), nn.Linear(24, 2)), vectors(3, 8), "SideBySide " * 5 + "Rows"),
    Case("transformer norm first", lambda: stack(tf(norm_first=True), nn.LayerNorm(8)), vectors(3, 8),
         " ".join(["SideBySide"] * 6)),
    Case("tied", Tied, tokens, "SideBySide SideBySide"),
    Case("tied, time first", lambda: Tied(time_first=True), tokens, "*"),
    Case("functional", Functional, vectors(5), "SideBySide"),
    Case("own parameters", Own, vectors(5), "SideBySide"),
    Case("twice and never", Twice, vectors(5), "SideBySide SideBySide"),
    Case("weight norm", lambda: stack(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 2)),
         vectors(5), "*"),
    Case("weight norm on steps", lambda: stack(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh()),
         vectors(3, 5), "*"),
    Case("weight norm, no bias", lambda: stack(parametrizations.weight_norm(nn.Linear(5, 4, bias=False)), nn.Tanh()),
         vectors(5), "SideBySide"),
    Case("weight norm, convolution", lambda: stack(parametrizations.weight_norm(nn.Conv2d(2, 3, 2)), nn.Tanh()),
         vectors(2, 3, 3), "*"),
    Case("spectral norm", lambda: stack(parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Tanh()), vectors(5), "*"),
    Case("spectral norm, convolution", lambda: stack(parametrizations.spectral_norm(nn.Conv1d(2, 3, 2)), nn.Tanh()),
         vectors(2, 4), "*"),
    Case("adapted", Adapted, vectors(5), "*"),
    Case("adapted on steps", lambda: stack(Adapted(), nn.Tanh()), vectors(3, 5), "*"),
    Case("mixed examples", Centered, vectors(5), "OneByOne"),
]  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SAME = pytest.mark.filterwarnings("ignore:Using padding='same'")


# Importances


@SAME
@EACH
def test_importances_are_those_of_single_backward_passes_in_any_batches(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    power = 1 + CASES.index(case) % 2  # neighbours are alike
    network, taken = case.make().double().train(), []
    find = importance._find_way
    monkeypatch.setattr(importance, "_find_way", lambda *args: taken.append(find(*args)) or taken[-1])
    inputs, labels = case.inputs(4), torch.arange(4)
    split = list(zip(inputs.split([1, 3]), labels.split([1, 3]), strict=True))
    wanted = oracle(network, inputs, labels, power)
    assert any(bool((part > 0).any()) for part in wanted.values())
    for data in ((inputs, labels), split) if CASES.index(case) % 3 == 0 else ((inputs, labels),):
        got, count = importances(network, data, directions, power=power, names=trainable(network))
        assert count == 4
        agree(got, wanted)
    assert case.way in {described(taken[0]), "*"}


@pytest.mark.parametrize("case", CASES[::5], ids=lambda case: case.name)
def test_importances_leave_the_network_as_it_was(case: Case, rng_untouched: Callable) -> None:
    network = case.make().double().train()
    modules = list(network.modules())
    modules[-1].eval()
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(network)
    inputs = case.inputs(4)
    kept = inputs.clone()
    with rng_untouched():
        importances(network, inputs, directions, power=2, names=trainable(network))
    assert torch.equal(inputs, kept)
    for module, other in zip(network.modules(), before.modules(), strict=True):
        assert module.training == other.training
        assert not module._forward_hooks
    for (name, tensor), other in zip(network.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    for p, other in zip(network.parameters(), before.parameters(), strict=True):
        assert p.grad is not None
        assert bool((p.grad == 1).all())
        assert p.requires_grad == other.requires_grad


@pytest.mark.parametrize(("name", "count"), [("mlp", 1), ("mlp", 2), ("mlp", 257), ("conv1d", 3), ("conv1d", 70)])
def test_importances_of_any_number_of_examples(name: str, count: int) -> None:
    (case,) = [case for case in CASES if case.name == name]
    network, inputs, labels = case.make().double(), case.inputs(count), torch.arange(count)
    got, counted = importances(network, (inputs, labels), directions, power=2, names=trainable(network))
    assert counted == count
    agree(got, oracle(network, inputs, labels, 2))


@pytest.mark.parametrize("size", [1, 5, 300])
def test_importances_from_a_loader_are_those_from_tensors(size: int) -> None:
    network = stack(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs, labels = torch.randn(11, 5, dtype=DOUBLE), torch.arange(11)
    wanted = oracle(network, inputs, labels, 2)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=size, shuffle=True)
    for data in (loader, iter(loader), (pair for pair in loader), (inputs, labels)):
        agree(importances(network, data, directions, power=2, names=trainable(network))[0], wanted)


@pytest.mark.parametrize(
    ("name", "budget"),
    [("conv2d", 1), ("conv2d", 700), ("tied", 1), ("lstm", 700), ("attention", 1), ("twice and never", 1)],
)
def test_a_small_budget_changes_nothing(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = [case for case in CASES if case.name == name]
    network, inputs = case.make().double(), case.inputs(7)
    monkeypatch.setattr(layerwise, "_BUDGET", budget)
    assert way_of(network, inputs) == case.way
    agree(
        importances(network, inputs, directions, power=1, names=trainable(network))[0],
        oracle(network, inputs, None, 1),
    )


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    power=st.integers(1, 2),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_importances_of_any_network_of_linear_layers(
    sizes: list[int], rows: list[int], power: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes)]
    network = stack(*[part for layer in layers for part in (layer, nn.Tanh())]).double()
    inputs = torch.randn(sum(rows) + 3, sizes[0], dtype=DOUBLE)
    data = inputs.split([3, *rows])
    got, _ = importances(network, iter(data), directions, power=power, names=trainable(network))
    agree(got, oracle(network, inputs, None, power))


@SAME
@settings(max_examples=12)
@given(
    groups=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from([(0, 0), (1, 0), (0, 2), "same", "valid"]),
    one=st.booleans(),
    bias=st.booleans(),
)
def test_importances_of_any_convolution(
    groups: int, kernel: tuple, stride: tuple, dilation: tuple, padding: tuple | str, one: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    if padding == "same":
        stride = (1, 1)
    if one:
        layer: nn.Module = nn.Conv1d(
            2, 2 * groups, kernel[0], stride[0], padding if isinstance(padding, str) else padding[0], dilation[0],
            groups, bias,
        )  # fmt: skip
    else:
        layer = nn.Conv2d(2, 2 * groups, kernel, stride, padding, dilation, groups, bias)
    inputs = torch.randn(3, 2, *(6,) * (1 if one else 2), dtype=DOUBLE)
    network = layer.double()
    assert way_of(network, inputs) == "SideBySide"
    got, _ = importances(network, inputs, directions, power=2, names=trainable(network))
    agree(got, oracle(network, inputs, None, 2))


def test_squares_are_of_examples_and_not_of_batches() -> None:
    network = nn.Linear(3, 2, bias=False).double()
    inputs = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0]], dtype=DOUBLE)

    def up(outputs: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
        yield torch.ones_like(outputs)

    for power, wanted in ((1, [2.0, 2, 0]), (2, [2.0, 4, 0])):
        got, _ = importances(network, inputs, up, power=power, names=("weight",))
        assert got["weight"].tolist() == [wanted, wanted]


def test_a_token_that_comes_twice_in_an_example_has_one_gradient() -> None:
    network = nn.Embedding(4, 1, padding_idx=3).double()
    inputs = torch.tensor([[0, 0, 1], [0, 3, 3], [2, 2, 2]])

    def up(outputs: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
        yield torch.ones_like(outputs)

    got, _ = importances(network, inputs, up, power=2, names=("weight",))
    assert way_of(network, inputs) == "Lookup"
    assert got["weight"].flatten().tolist() == [5.0, 1, 9, 0]


@pytest.mark.parametrize("make", [lambda: Sequence(nn.GRU(3, 4)), Tied, lambda: Unrolled(nn.RNNCell(3, 4))])
def test_batches_of_sequences_may_differ_in_length(make: Callable[[], nn.Module]) -> None:
    network = make().double()
    longs, shorts = tokens(4), tokens(4)[:, :3]
    if isinstance(network, Unrolled):
        longs, shorts = vectors(6, 3)(4), vectors(4, 3)(4)
    for first, second in ((longs, shorts), (shorts, longs)):
        got, _ = importances(network, iter([first, second]), directions, power=2, names=trainable(network))
        one, other = oracle(network, first, None, 2), oracle(network, second, None, 2)
        agree(got, {name: one[name] + other[name] for name in one})


def test_the_number_of_calls_may_depend_on_the_examples() -> None:
    network, inputs = UntilPadding().double(), tokens(8)
    inputs[:3, 3:] = 0  # the first ones are shorter
    inputs[3] = 1
    data = iter([inputs[:3], inputs[3:]])
    agree(
        importances(network, data, directions, power=2, names=trainable(network))[0], oracle(network, inputs, None, 2)
    )
    agree(
        importances(network, inputs, directions, power=2, names=trainable(network))[0],
        oracle(network, inputs, None, 2),
    )


@pytest.mark.parametrize("make", [Experts, Sorted])
def test_the_first_examples_may_be_unlike_the_others(make: Callable[[], nn.Module]) -> None:
    network, inputs = make().double(), torch.randn(8, 5, dtype=DOUBLE)
    if make is Experts:
        inputs[:, 0] = torch.tensor([1.0, 1, 1, -1, 1, -1, -1, 1])
    wanted = oracle(network, inputs, None, 2)
    agree(importances(network, inputs, directions, power=2, names=trainable(network))[0], wanted)
    got, _ = importances(network, iter([inputs[:3], inputs[3:]]), directions, power=2, names=trainable(network))
    agree(got, wanted)


def test_first_examples_that_are_all_zero_or_all_alike() -> None:
    network = stack(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    inputs = torch.randn(8, 5, dtype=DOUBLE)
    inputs[:4] = 0
    agree(
        importances(network, inputs, directions, power=2, names=trainable(network))[0],
        oracle(network, inputs, None, 2),
    )
    with torch.no_grad():
        network[0].bias.fill_(-9)  # dead: no gradient at all reaches the first layer
    inputs[4:] *= 9
    agree(
        importances(network, inputs, directions, power=2, names=trainable(network))[0],
        oracle(network, inputs, None, 2),
    )


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(nn.functional.dropout(x, training=True))


def test_a_network_that_is_random_in_evaluation_takes_one_example_at_a_time(rng_untouched: Callable) -> None:
    network, inputs = Noisy(), torch.randn(9, 5)
    with rng_untouched():
        got, _ = importances(network, inputs, directions, power=2, names=trainable(network))
    assert way_of(network, inputs) == "OneByOne"
    assert bool((got["layer.weight"] > 0).any())


def test_parameters_that_were_not_asked_for_are_left_out() -> None:
    network, inputs = stack(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), vectors(5)(6)
    got, _ = importances(network, inputs, directions, power=2, names=("0.bias", "2.weight"))
    wanted = oracle(network, inputs, None, 2)
    agree(got, {name: wanted[name] for name in ("0.bias", "2.weight")})


def test_single_precision_is_near_double() -> None:
    for name in ("mlp", "conv2d", "lstm", "embedding", "transformer"):
        (case,) = [case for case in CASES if case.name == name]
        network, inputs = case.make().double(), case.inputs(7)
        wanted = oracle(network, inputs, None, 2)
        small = network.float()
        inputs = inputs.float() if inputs.is_floating_point() else inputs
        assert way_of(small, inputs) == case.way
        got, _ = importances(small, inputs, directions, power=2, names=trainable(small))
        agree(got, wanted, 2e-5)


def test_half_precision_is_summed_in_single() -> None:
    network = stack(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).bfloat16()
    got, _ = importances(network, torch.randn(40, 5).bfloat16(), directions, power=2, names=trainable(network))
    assert {part.dtype for part in got.values()} == {torch.float32}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_importances_without_gradients_around(mode: Callable) -> None:
    for name in ("mlp", "lstm", "mixed examples"):
        (case,) = [case for case in CASES if case.name == name]
        network, inputs = case.make().double(), case.inputs(5)
        wanted = oracle(network, inputs, None, 2)
        with mode():
            agree(importances(network, inputs, directions, power=2, names=trainable(network))[0], wanted)
            made = inputs.clone()  # in inference mode, a tensor that autograd refuses
            agree(importances(network, made, directions, power=2, names=trainable(network))[0], wanted)


def test_autocast_does_not_reach_the_importances() -> None:
    network, inputs = stack(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(9, 5)
    wanted, _ = importances(network, inputs, directions, power=2, names=trainable(network))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = importances(network, inputs, directions, power=2, names=trainable(network))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            raise ArithmeticError("no number")
        return self.norm(self.layer(x))


def test_an_error_halfway_leaves_the_network_as_it_was(rng_untouched: Callable) -> None:
    network = Raises()
    network.norm.eval()
    before = copy.deepcopy(network.state_dict())
    good, bad = torch.randn(4, 5), torch.full((4, 5), torch.nan)
    with rng_untouched(), pytest.raises(ArithmeticError, match="no number"):
        importances(network, iter([good, bad]), directions, power=2, names=trainable(network))
    assert (network.training, network.layer.training, network.norm.training) == (True, True, False)
    assert not network._forward_hooks
    assert not network.layer._forward_hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


class Remembers(nn.Module):
    """Keeps what it made last, as attention maps are kept for plots."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = (x @ self.weight).detach()
        return self.last.tanh() + x @ self.weight


def test_what_a_layer_keeps_for_itself_stays_a_tensor_that_can_be_used() -> None:
    network, inputs = Remembers().double(), vectors(5)(5)
    wanted = oracle(network, inputs, None, 2)
    agree(importances(network, inputs, directions, power=2, names=("weight",))[0], wanted)
    assert network.last is not None
    assert bool(network.last.cpu().isfinite().all())
    network.last.numpy()


# What layers saw


def test_units_are_the_outermost_modules_with_parameters_of_their_own() -> None:
    attention = nn.MultiheadAttention(4, 2)
    shared = nn.Linear(2, 2)
    network = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()), attention, shared, shared, nn.Dropout()])
    assert [type(unit) for unit in units(network)] == [nn.Linear, nn.MultiheadAttention, nn.Linear]
    assert [type(unit) for unit in units(Own())] == [Own]
    assert units(frozen(nn.Linear(2, 2), "weight", "bias")) == []


def test_a_recording_keeps_inputs_and_outputs_and_changes_no_result() -> None:
    network = stack(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    inputs = torch.randn(6, 5)
    output, calls = record(network, [network[0], network[2]], inputs)
    assert torch.equal(output, network(inputs))
    (first,), (second,) = calls
    assert torch.equal(first.inputs[0], inputs)
    assert torch.equal(first.outputs[0], network[0](inputs))  # not what the in-place function made of it
    assert torch.equal(second.inputs[0], network[0](inputs).relu())


RECURRENT = [
    lambda **s: nn.LSTM(3, 4, 2, **s),
    lambda **s: nn.LSTM(3, 4, 2, proj_size=2, **s),
    lambda **s: nn.GRU(3, 4, 2, **s),
    lambda **s: nn.RNN(3, 4, 2, **s),
    lambda **s: nn.RNN(3, 4, nonlinearity="relu", **s),
]


@pytest.mark.parametrize("make", RECURRENT)
@pytest.mark.parametrize(
    ("bidirectional", "batch_first", "bias", "started"),
    [(False, False, False, True), (False, True, True, False), (True, False, True, True), (True, True, False, False)],
)
def test_recurrent_layers_step_by_step_are_torchs(
    make: Callable, bidirectional: bool, batch_first: bool, bias: bool, started: bool
) -> None:
    layer = make(bidirectional=bidirectional, batch_first=batch_first, bias=bias).double()
    x = torch.randn(5, 6, 3, dtype=DOUBLE)
    size, ways = 5 if batch_first else 6, layer.num_layers * (2 if bidirectional else 1)
    h = torch.randn(ways, size, layer.proj_size or 4, dtype=DOUBLE)
    start = (h, torch.randn(ways, size, 4, dtype=DOUBLE)) if isinstance(layer, nn.LSTM) else h
    run = unrolled(layer)
    assert run is not None
    arguments = (x, start) if started else (x,)
    torch.testing.assert_close(run(dict(layer.named_parameters()), *arguments), layer(*arguments), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda a, b: nn.RNNCell(a, b, nonlinearity="relu")]
)
def test_cells_written_out_are_torchs(make: Callable) -> None:
    cell = make(3, 4).double()
    x, h = torch.randn(5, 3, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE)
    state = (h, h.sin()) if isinstance(cell, nn.LSTMCell) else h
    run = unrolled(cell)
    assert run is not None
    for arguments in ((x,), (x, state)):
        torch.testing.assert_close(run(dict(cell.named_parameters()), *arguments), cell(*arguments), rtol=1e-12, atol=0)


def test_other_layers_are_not_written_out() -> None:
    assert unrolled(nn.Linear(2, 2)) is None


# Examples


def test_batches_of_a_pair_are_in_order_and_not_larger_than_asked() -> None:
    inputs, labels = torch.arange(7.0).view(7, 1), torch.arange(7)
    for data in ((inputs, labels), [(inputs, labels)], DataLoader(TensorDataset(inputs, labels), 7)):
        made = list(batches(data, 3))
        assert [len(batch.inputs) for batch in made] == [3, 3, 1]
        assert torch.equal(torch.cat([batch.inputs for batch in made]), inputs)
        assert torch.equal(torch.cat([batch.labels for batch in made if batch.labels is not None]), labels)
    assert Batch(inputs, None).labels is None


def test_inputs_alone_have_no_labels() -> None:
    inputs = torch.randn(5, 2)
    for data in (inputs, [inputs], iter([inputs[:2], inputs[2:]]), [inputs[:1], inputs[1:2], inputs[2:]]):
        made = list(batches(data, 2))
        assert torch.equal(torch.cat([batch.inputs for batch in made]), inputs)
        assert all(batch.labels is None for batch in made)


def test_a_list_of_two_tensors_is_refused_as_it_could_be_either() -> None:
    with pytest.raises(SettingError, match=r"Pass a tuple \(inputs, labels\)"):
        list(batches([torch.randn(4, 2), torch.randn(4, 2)], 9))
    assert sum(len(batch.inputs) for batch in batches([torch.randn(4, 2)] * 3, 9)) == 12
    assert [batch.labels for batch in batches([[torch.randn(4, 2)]], 9)] == [None]  # a loader of inputs alone


def test_empty_batches_are_passed_over() -> None:
    inputs, labels = torch.randn(2, 3), torch.arange(2)
    assert len(list(batches([(inputs[:0], labels[:0]), (inputs, labels)], 9))) == 1


@pytest.mark.parametrize(
    "data", [iter([]), [], torch.zeros(0, 3), (torch.zeros(0, 3), torch.zeros(0)), [torch.zeros(0, 3)]]
)
def test_no_examples_at_all_are_refused(data: object) -> None:
    with pytest.raises(SettingError, match=r"no examples.*used up: pass a list"):
        list(batches(data, 3))


@pytest.mark.usefixtures("untyped")
def test_what_is_no_tensor_is_refused() -> None:
    x = torch.zeros(2, 3)
    for data in ([(x, [0, 1])], ["word"], [(x, x[:, 0], x)], [x, 3], [None], [{"x": x}]):
        with pytest.raises(DtypeError, match=r"a tensor, a pair .* or an iterable of those, got"):
            list(batches(data, 3))
    for data in (None, 5):
        with pytest.raises(DtypeError, match=r"a tensor, a pair .* or an iterable of those, got"):
            list(batches(data, 3))


def test_inputs_and_labels_must_go_together() -> None:
    with pytest.raises(
        ShapeError, match=r"one label for each input, got inputs of shape \(3, 2\) and labels of shape \(2,\)"
    ):
        list(batches((torch.zeros(3, 2), torch.zeros(2)), 5))
    with pytest.raises(ShapeError, match=r"labels of shape \(\)"):
        list(batches([(torch.zeros(3, 2), torch.tensor(1))], 5))


def test_a_single_number_is_no_example() -> None:
    with pytest.raises(ShapeError):
        list(batches(torch.tensor(1.0), 5))


# Outputs


@pytest.mark.parametrize(
    "outputs", [[0, 2], (2, 0), torch.tensor([0, 2]), torch.tensor([2, 0], dtype=torch.int32), range(0, 3, 2)]
)
def test_a_mask_marks_the_outputs(outputs: object) -> None:
    assert output_mask(outputs, 4).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "outputs", [[], [0, 0], [0.5], torch.tensor([True, False]), torch.tensor([[0]]), torch.tensor(1), "01", [None]]
)
@pytest.mark.usefixtures("untyped")
def test_outputs_must_be_distinct_numbers(outputs: object) -> None:
    with pytest.raises(SettingError, match="outputs must be the numbers of some outputs, each once, got"):
        output_mask(outputs, 4)


@pytest.mark.parametrize("outputs", [[4], [-1, 0], [0, 99]])
def test_outputs_must_be_those_of_the_network(outputs: list[int]) -> None:
    with pytest.raises(SettingError, match="outputs must be from 0 to 3 for this network, got"):
        output_mask(outputs, 4)


def identity(outputs: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
    yield outputs if labels is None else outputs * (1 + labels.view(-1, 1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_restricted_directions_see_these_outputs_alone_and_labels_among_them(dtype: torch.dtype) -> None:
    full = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    (made,) = restricted(identity, [3, 1])(full, torch.tensor([3, 1], dtype=dtype))
    assert made.tolist() == [[0, 4, 0, 8], [0, 6, 0, 8]]  # the outputs keep their order
    (made,) = restricted(identity, [3, 1])(full, None)
    assert made.tolist() == [[0, 2, 0, 4], [0, 6, 0, 8]]
    assert restricted(identity, None) is identity


@pytest.mark.parametrize("label", [0, 2, -1, 4, 99])
def test_labels_outside_of_the_outputs_are_refused(label: int) -> None:
    with pytest.raises(LabelError, match=rf"the label {label} is not among the task's outputs, \[1, 3\]"):
        list(restricted(identity, [1, 3])(torch.zeros(2, 4), torch.tensor([1, label])))


def test_restricted_directions_need_a_matrix_of_outputs() -> None:
    with pytest.raises(ShapeError, match=r"outputs \(b, c\), but its output for 2 has shape \(2, 3, 4\)"):
        list(restricted(identity, [1])(torch.zeros(2, 3, 4), None))
