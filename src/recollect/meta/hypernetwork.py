"""``Hypernetwork``: the kernels of a network's convolutions, generated from a few numbers each by one small network."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from recollect.errors import DtypeError, SettingError, require, require_whole


class _Place(NamedTuple):
    """Where the tiles of one layer go."""

    weight: str  # the name of the weight in the network
    rows: int  # blocks of input channels
    columns: int  # blocks of output channels


class Hypernetwork(nn.Module):
    """Runs a network whose convolution kernels are generated from layer embeddings by a shared linear network.

    A basic kernel K of N_in x N_out channels has an embedding z and is the concatenation of the K_i over its inputs:

        a_i = W_i z + B_i,    K_i = <W_out, a_i> + B_out,    i = 1 .. N_in

    with W_i of size d x N_z, d = N_z, and W, B, W_out, B_out shared by all kernels: N_z D + d (N_z + 1) N_in +
    f N_out f (d + 1) parameters for D basic kernels of f x f. A layer of more channels is tiled from basic kernels,
    each with an embedding of its own, numbered along the output channels first: inputs x outputs of 2 x 4 tiles are
    ((1, 2, 3, 4), (5, 6, 7, 8)).

    The kernels have no gradient of their own: what trains are the embeddings and the generator, through the loss of the
    network, together with the parameters that the network keeps (biases, other layers). All tiles of all layers are
    generated at once, anew in each call.

    Paper: Ha, Dai and Le 2017, "HyperNetworks", Eq. (2) and (3). Source of the initial values: hardmaru/supercell, the
    MNIST notebook: W and W_out truncated normal with deviation 0.01, B and B_out zero, z truncated normal with
    mean 0.01 and deviation 1 (all cut off at two deviations).

    Args:
        net: Any network. *It is changed:* the chosen layers lose their weights, and it runs only through this wrapper
            from then on. An optimizer must be made of the wrapper's parameters.
        layers: The names of ``nn.Conv2d`` layers in it, as in ``net.named_modules()``. Their kernels must be square and
            of one size, without groups, with channels that are multiples of ``basic``.
        embedding: N_z, the numbers in an embedding. (Paper: 4 for MNIST, 64 for CIFAR-10.)
        basic: Input and output channels of a basic kernel, N_in and N_out. (Paper: 16 x 16.)
        generator: Draws the initial values, on the device of the network; torch's global random state does when None.

    Raises:
        SettingError: If a setting is outside its range, or a layer cannot be generated, by its name. The network is
            as it was then.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 16, 7), nn.ReLU(), nn.Conv2d(16, 16, 7))
        >>> model = Hypernetwork(net, layers=("2",), embedding=4)
        >>> model(torch.zeros(5, 1, 28, 28)).shape, model.kernels()["2"].shape
        (torch.Size([5, 16, 16, 16]), torch.Size([16, 16, 7, 7]))
        >>> sum(p.numel() for p in (model.embeddings, *model.inner.parameters(), *model.outer.parameters()))
        4244
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        layers: tuple[str, ...],
        embedding: int,
        basic: tuple[int, int] = (16, 16),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require("net", net, nn.Module, "a torch.nn.Module with convolutions")
        require_whole("embedding", embedding)
        if not (isinstance(basic, tuple) and len(basic) == 2):
            raise SettingError(f"basic must be input and output channels, such as (16, 16), got {basic!r}.")
        for side, size in zip(("input", "output"), basic, strict=True):
            require_whole(f"the {side} channels of basic", size)
        chosen = _chosen(net, layers, basic)
        kind = next(iter(chosen.values())).weight
        self.net = net
        self._basic = basic
        self._size = kind.shape[-1]
        self._places = [
            _Place(f"{name}.weight".lstrip("."), layer.in_channels // basic[0], layer.out_channels // basic[1])
            for name, layer in chosen.items()
        ]
        tiles = sum(place.rows * place.columns for place in self._places)
        self.embeddings = nn.Parameter(kind.new_empty(tiles, embedding))
        self.inner = _empty(embedding, basic[0] * embedding, kind)
        self.outer = _empty(embedding, basic[1] * self._size**2, kind)
        with torch.no_grad():
            _truncated_normal(self.embeddings, 0.01, 1.0, generator)
            for linear in (self.inner, self.outer):
                _truncated_normal(linear.weight, 0.0, 0.01, generator)
                linear.bias.zero_()
        for layer in chosen.values():
            del layer.weight
            # Keeps the place of the kernel that each call puts in, out of parameters and state_dict.
            layer.register_buffer("weight", kind.new_empty(0), persistent=False)

    def kernels(self) -> dict[str, Float[Tensor, "o i f f"]]:
        """Returns the generated kernels by the names of their layers, in the layout of ``nn.Conv2d.weight``."""
        return {name.removesuffix("weight").rstrip("."): kernel for name, kernel in self._weights().items()}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Returns what the network makes of its inputs with the generated kernels.

        Args:
            inputs: What the network takes.
            named: What it takes by name.

        Raises:
            DtypeError: If the network fails, and an input is of another floating dtype than the kernels.
        """
        try:
            return functional_call(self.net, self._weights(), inputs, named)
        except RuntimeError as error:
            dtype = self.embeddings.dtype
            for value in (*inputs, *named.values()):
                if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
                    raise DtypeError(
                        f"the network failed on an input of {value.dtype}, where the generated kernels are {dtype}. "
                        f"Use .to({dtype}) on it. ({error})"
                    ) from error
            raise

    def _weights(self) -> dict[str, Tensor]:
        inputs, outputs = self._basic
        hidden = self.inner(self.embeddings).unflatten(1, (inputs, -1))
        tiles = self.outer(hidden).unflatten(2, (outputs, self._size, self._size))
        parts = tiles.split([place.rows * place.columns for place in self._places])
        return {place.weight: _assembled(part, place) for place, part in zip(self._places, parts, strict=True)}


def _assembled(tiles: Float[Tensor, "n i o f f"], place: _Place) -> Float[Tensor, "outputs inputs f f"]:
    """Returns the kernel that the tiles of a layer make up."""
    table = tiles.unflatten(0, (place.rows, place.columns))
    return table.permute(1, 3, 0, 2, 4, 5).flatten(2, 3).flatten(0, 1)


def _empty(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    """Returns a layer whose weights are not drawn yet."""
    return nn.Linear(inputs, outputs, device="meta", dtype=like.dtype).to_empty(device=like.device)


def _truncated_normal(tensor: Tensor, mean: float, deviation: float, generator: torch.Generator | None) -> None:
    low, high = mean - 2 * deviation, mean + 2 * deviation
    nn.init.trunc_normal_(tensor, mean, deviation, low, high, generator=generator)


def _chosen(net: nn.Module, layers: tuple[str, ...], basic: tuple[int, int]) -> dict[str, nn.Conv2d]:
    """Returns the layers of these names, once all of them can be generated together."""
    if not isinstance(layers, tuple) or not layers or len(set(layers)) < len(layers):
        example = f"({layers!r},)" if isinstance(layers, str) else "('conv2', 'conv3')"
        raise SettingError(f"layers must be a tuple of different names, such as layers={example}, got {layers!r}.")
    modules = dict(net.named_modules(remove_duplicate=False))
    chosen: dict[str, nn.Conv2d] = {}
    for name in layers:
        layer = modules.get(name)
        if not isinstance(layer, nn.Conv2d):
            there = [known for known, module in modules.items() if isinstance(module, nn.Conv2d)]
            found = "is nothing in the network" if layer is None else f"is a {type(layer).__name__}"
            raise SettingError(f"layers must name nn.Conv2d layers, but {name!r} {found}. There are: {there}.")
        _check(net, name, layer, basic)
        chosen[name] = layer
    first = next(iter(chosen))
    for name, layer in chosen.items():
        if layer.kernel_size != chosen[first].kernel_size:
            raise SettingError(
                f"all kernels must be of one size: {first!r} has {_by(chosen[first].kernel_size)}, {name!r} has "
                f"{_by(layer.kernel_size)}. Generate only those of the same size."
            )
    return chosen


def _check(net: nn.Module, name: str, layer: nn.Conv2d, basic: tuple[int, int]) -> None:
    weight = layer._parameters.get("weight")
    if weight is None:
        raise SettingError(f"{name!r} has no weight of its own: it is generated or parametrized already.")
    if nn.parameter.is_lazy(weight):
        raise SettingError(f"the weight of {name!r} has no shape yet. Run the network once before wrapping it.")
    if sum(parameter is weight for module in net.modules() for parameter in module._parameters.values()) > 1:
        raise SettingError(f"the weight of {name!r} is shared with another layer, which would keep the old one.")
    if layer.groups != 1:
        raise SettingError(f"{name!r} has groups={layer.groups}; a kernel can be generated for groups=1 alone.")
    if layer.kernel_size[0] != layer.kernel_size[1]:
        raise SettingError(f"the kernel of {name!r} must be square, got {_by(layer.kernel_size)}.")
    channels = (layer.in_channels, layer.out_channels)
    if channels[0] % basic[0] or channels[1] % basic[1]:
        raise SettingError(
            f"the channels of {name!r}, {_by(channels)} (inputs x outputs), must be multiples of basic={basic}. Choose "
            "basic so that it divides the channels of all the layers, or leave this one out."
        )


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
