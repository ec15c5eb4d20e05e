"""Reading a head as linear layers with elementwise functions between them, where it is that and nothing else."""

from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from recollect.adaptation.head import Head

ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid),
    *(nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink),
)
_NEUTRAL = (nn.Identity, nn.Dropout, nn.AlphaDropout)  # nothing to compute in evaluation mode


class Layer(NamedTuple):
    """A linear layer, whether its weight and bias adapt, and the elementwise functions that follow it."""

    linear: nn.Linear
    weight_adapts: bool
    bias_adapts: bool
    activations: list[nn.Module]


def split(head: Head, names: tuple[str, ...]) -> tuple[Head | None, list[Layer]] | None:
    """Splits a head before the first layer that adapts.

    Returns:
        What comes before, frozen (None: nothing), and the linear layers from there on. None where there is more from
        there on than linear layers with elementwise functions between them.
    """
    modules = _flatten(head.module)
    if modules is None:
        return None
    adapting = [any(f"{name}.{p}".lstrip(".") in names for p, _ in m.named_parameters()) for name, m in modules]
    start = adapting.index(True)
    layers = _linear_layers(modules[start:], names)
    if layers is None:
        return None
    return Head(nn.Sequential(*(m for _, m in modules[:start]))) if start else None, layers


def _flatten(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]] | None:
    """Returns the modules of a (nested) Sequential in order; None where something else may happen in between."""
    if type(module) is nn.Sequential and not _watched(module):
        parts: list[tuple[str, nn.Module]] = []
        for name, child in module._modules.items():  # named_children would skip a function used twice
            inner = _flatten(child, f"{prefix}{name}.")
            if inner is None:
                return None
            parts += inner
        return parts
    return None if _watched(module) else [(prefix.rstrip("."), module)]


def _watched(module: nn.Module) -> bool:
    """Whether hooks or parametrizations make the module more than its type says."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or parametrize.is_parametrized(module)


def _linear_layers(modules: list[tuple[str, nn.Module]], names: tuple[str, ...]) -> list[Layer] | None:
    layers: list[Layer] = []
    seen: set[int] = set()
    for name, module in modules:
        if type(module) is nn.Linear:
            shared = {id(p) for p in module.parameters()} & seen
            if shared:
                return None
            seen |= {id(p) for p in module.parameters()}
            weight, bias = (f"{name}.{p}".lstrip(".") in names for p in ("weight", "bias"))
            layers.append(Layer(module, weight, bias, []))
        elif type(module) in ELEMENTWISE:
            layers[-1].activations.append(module)
        elif type(module) not in _NEUTRAL:
            return None
    return layers
