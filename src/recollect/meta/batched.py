"""``Batched``: a network as a function of its parameters, for many tasks side by side, each with its own."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap

from recollect.adaptation.shell import aliases, empty_shell, select
from recollect.errors import DtypeError, HeadError, ShapeError, require
from recollect.meta.folded import batch_norm, convolution

_NORMS = (nn.modules.batchnorm._NormBase,)  # BatchNorm and InstanceNorm, which may keep running statistics
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # themselves, not what is made of them
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RANDOM = (nn.modules.dropout._DropoutNd,)
_RECURRENT = (nn.RNNBase, nn.LSTMCell)
_REFUSALS = ("vmap", "Batching rule", "Batch norm got a batched tensor")  # how the messages of torch.func begin
_SINGLE = "Expected more than 1"  # how those of normalization without running statistics do


class Batched:
    """A network seen as ``(parameters of each task, inputs of each task) -> outputs of each task``.

    It computes what the network computes in training mode, whatever mode that is in, except that batch and instance
    normalization know no running statistics: they use those of the task's own inputs, and keep none. Nothing of the
    network changes: an empty shell of it runs, with the parameters put in for one call.

    Only this forward pass runs under ``vmap``. Whoever wants derivatives takes them outside of it, of any order: under
    ``vmap`` the second derivatives of affine normalization layers are silently wrong.

    Args:
        net: Maps a task's inputs ``(n, *)`` to outputs ``(n, c)``.

    Raises:
        HeadError: If the network has no parameters, or holds a part that cannot run for many tasks side by side.

    Example:
        >>> batched = Batched(nn.Linear(3, 2))
        >>> batched({"weight": torch.zeros(4, 2, 3)}, torch.zeros(4, 5, 3)).shape
        torch.Size([4, 5, 2])
    """

    def __init__(self, net: nn.Module) -> None:
        require("net", net, nn.Module, "a torch.nn.Module that maps a task's inputs to outputs")
        _check(net)
        self.net = net
        self._shell = empty_shell(net, what="network").train()
        for part in self._shell.modules():
            if isinstance(part, _NORMS):
                part.track_running_stats = False
                part.running_mean = part.running_var = part.num_batches_tracked = None
            if isinstance(part, _BATCH_NORMS) and type(part) in _BATCH_NORMS:
                part.__dict__["forward"] = partial(_normalize, part)
            elif isinstance(part, _CONVOLUTIONS) and type(part) in _CONVOLUTIONS:
                part.__dict__["forward"] = partial(convolution, layer=part)
        self._buffers = tuple(name for name, _ in self._shell.named_buffers(remove_duplicate=False))
        self._first = aliases(net)

    def __call__(
        self, params: dict[str, Tensor], inputs: Shaped[Tensor, "t n *x"], *, constant: bool = False
    ) -> Float[Tensor, "t n c"]:
        """Returns the outputs of each task under its own parameters. Their gradients go to the network's other ones.

        Args:
            params: The parameters that the tasks do not share, by name, each with a dimension of tasks in front.
            inputs: What the network reads, of each task.
            constant: Whether the parameters that the tasks share are numbers, which no derivative reaches.

        Raises:
            HeadError: If the forward pass cannot run for many tasks side by side, or returns something else than a row
                of outputs for each input.
            DtypeError: If it fails on inputs of this dtype and would not on others.
            ShapeError: If batch or instance normalization has a single number to take statistics of.
        """
        live = dict(self.net.named_parameters(remove_duplicate=False))
        buffers = dict(self.net.named_buffers(remove_duplicate=False))
        own = {name: params[first] for name, first in self._first.items() if first in params}
        shared = {name: p.detach() if constant else p for name, p in live.items() if name not in own}
        shared.update((name, buffers[name].detach().clone()) for name in self._buffers)
        task = vmap(lambda own, x: functional_call(self._shell, shared | own, (x,), tie_weights=False))
        try:
            outputs = task(own, inputs.clone())  # a network may begin with a function in place
        except RuntimeError as error:
            if not str(error).startswith(_REFUSALS):
                _blame_dtype(task, own, inputs, self.dtype(), error)
                error.add_note(
                    f"The network ran on {len(inputs)} tasks side by side, each with inputs of shape "
                    f"{tuple(inputs.shape[1:])}."
                )
                raise
            raise HeadError(
                f"the network ({type(self.net).__name__}) cannot run for many tasks side by side: a part of it is "
                "random, decides by the values in a tensor, changes a buffer, or is one that torch.func.vmap does not "
                f"know. Take it out, or write it in simpler operations. ({error})"
            ) from error
        except ValueError as error:
            if not str(error).startswith(_SINGLE):
                raise
            raise ShapeError(
                f"batch and instance normalization use the statistics of a task's own inputs, in any mode, but inputs "
                f"of shape {tuple(inputs.shape[1:])} give a single number for each channel. Pass more examples or "
                "queries of a task at once, or use nn.LayerNorm or nn.GroupNorm."
            ) from error
        if not isinstance(outputs, Tensor) or outputs.dim() != 3 or outputs.shape[:2] != inputs.shape[:2]:
            got = f"{tuple(outputs.shape[1:])}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise HeadError(
                f"the network must return a row of outputs for each input, ({inputs.shape[1]}, outputs) for inputs "
                f"{tuple(inputs.shape[1:])}, got {got}. Flatten images before a linear layer, and return logits alone."
            )
        return outputs

    def select(self, names: tuple[str, ...] | None) -> tuple[str, ...]:
        """Returns the names of the parameters that are meant: those named, or inside a submodule named; all for None.

        A parameter that several submodules share is returned by its first name.

        Raises:
            HeadError: If a name matches nothing.
        """
        return select(self.net, names, what="network")

    def dtype(self) -> torch.dtype:
        """Returns the dtype in which the network computes: its first parameter's."""
        return next(self.net.parameters()).dtype


def _normalize(part: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> Tensor:
    part._check_input_dim(x)
    return batch_norm(x, part.weight, part.bias, part.eps)


@torch.no_grad()
def _blame_dtype(
    task: Callable[..., object], own: dict[str, Tensor], inputs: Tensor, dtype: torch.dtype, error: RuntimeError
) -> None:
    """Refuses the dtype of inputs on which the network has failed if that is why: with another one it runs.

    Whole numbers are right for a network that begins with ``nn.Embedding``, and wrong for one that begins with
    ``nn.Linear``; only a try can tell what any network takes.
    """
    right = torch.long if inputs.is_floating_point() else dtype
    try:
        task(own, torch.zeros_like(inputs, dtype=right))
    except (RuntimeError, ValueError, TypeError, IndexError):  # the fault is another one
        return
    raise DtypeError(
        f"the network takes inputs of {right}, got {inputs.dtype}. Use .to({right}), after scaling or numbering them "
        f"as it needs. ({error})"
    ) from error


def _check(net: nn.Module) -> None:
    for name, part in net.named_modules():
        where = f"submodule {name!r}" if name else "the network itself"
        if isinstance(part, _RECURRENT):
            raise HeadError(
                f"{where} is a {type(part).__name__}, which cannot run for many tasks side by side. Write its gates "
                "in simpler operations (linear, sigmoid, tanh)."
            )
        if isinstance(part, _RANDOM) and part.p > 0:
            raise HeadError(
                f"{where} is a {type(part).__name__}: a loss that changes by chance has no exact gradient through the "
                "steps on it. Take it out, or set its p to 0."
            )
    if next(net.parameters(), None) is None:
        raise HeadError(f"the network ({type(net).__name__}) has no parameters, so nothing can adapt.")
