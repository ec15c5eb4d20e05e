"""GEM and A-GEM: gradients projected so that a step raises the loss on no stored example, to first order."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from recollect.continual.examples import Examples, batches
from recollect.continual.modes import aside, evaluation
from recollect.errors import (
    DtypeError,
    NonFiniteError,
    SettingError,
    ShapeError,
    require,
    require_number,
    require_whole,
)

Loss = Callable[[Tensor, Tensor], Tensor]  # outputs and labels to their mean loss, one number
_Pair = tuple[Tensor, Tensor]

_ADVICE = "Do not take this step (optimizer.zero_grad()); a lower learning rate or clipped gradients may help."


@runtime_checkable
class Buffer(Protocol):
    """What ``AGEM`` needs of a replay buffer: ``count`` rows drawn, fewer where it holds fewer."""

    def sample(self, count: int) -> tuple[Tensor, Tensor]: ...
    def __len__(self) -> int: ...


class GEM(nn.Module):
    """Gradient Episodic Memory: no step may raise the loss on the examples kept of any earlier task.

    Paper: Lopez-Paz and Ranzato (2017), arXiv 1706.08840, Eq. (11): with g the present gradient and the rows g_t of
    G those of the stored tasks, ``g <- g + G' v`` where some ``g_t . g < 0``, with v the argmin over ``v >= margin``
    of ``1/2 v' G G' v + g' G' v``. Without margin it is the gradient closest to g with ``g_t . g >= 0`` for all t.

    It costs a backward pass and a gradient's memory for each task. The passes are in evaluation mode (no dropout,
    BatchNorm's running statistics) and leave the network's modes and buffers and the global random state alone. The
    network is not in ``state_dict()``. With a ``GradScaler``, call ``scaler.unscale_(optimizer)`` first.

    Differs from the paper: the problem is solved exactly, with nothing added to its diagonal, even where tasks repeat
    or gradients vanish. The authors' code is in training mode, and keeps a task's last examples, not a sample.

    Args:
        network: What is trained: inputs ``(b, ...)`` to outputs. Frozen parameters play no part.
        examples: How many examples of each task are kept (256 in the authors' scripts).
        margin: The least weight of each stored gradient once one disagrees (0.5 in the authors' scripts).
        generator: Draws the examples to keep. None makes one of its own, with seed 0 (not the global one).

    Raises:
        SettingError: If a setting is outside its range, or the network has nothing to train.

    Example:
        >>> import torch
        >>> from recollect.continual.projections import GEM
        >>> squared, network = torch.nn.functional.mse_loss, torch.nn.Linear(1, 1, bias=False)
        >>> gem = GEM(network, margin=0.0)
        >>> gem.consolidate((torch.ones(4, 1), torch.full((4, 1), 5.0)))  # the first task wants 5 x
        >>> squared(network(torch.ones(1, 1)), torch.full((1, 1), -5.0)).backward()  # the second wants -5 x
        >>> gem.project(squared), network.weight.grad.abs().item() < 1e-5
        (True, True)
    """

    inputs: Shaped[Tensor, "n ..."]
    labels: Shaped[Tensor, "n ..."]
    starts: Int[Tensor, " t"]

    def __init__(
        self, network: nn.Module, *, examples: int = 256, margin: float = 0.5, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        _require_settings(network, examples)
        require_number("margin", margin, low=0.0)
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        require("generator", self._generator, torch.Generator, "a torch.Generator or None")
        self.examples = examples
        self.margin = margin
        self._network = (network,)  # in a tuple: no submodule
        self.register_buffer("inputs", torch.empty(0))
        self.register_buffer("labels", torch.empty(0))
        self.register_buffer("starts", torch.empty(0, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_resize)

    @property
    def network(self) -> nn.Module:
        """The network whose gradient is corrected."""
        return self._network[0]

    def extra_repr(self) -> str:
        return f"examples={self.examples}, margin={self.margin}"

    def project(self, loss: Loss = nn.functional.cross_entropy) -> bool:
        """Makes the gradient agree with all stored tasks; call it between ``backward()`` and ``step()``.

        Returns:
            Whether ``p.grad`` was changed; False without a stored task. A grad of None counts as zero.

        Raises:
            NonFiniteError: If a gradient holds NaN or infinity, or would; ``p.grad`` is unchanged.
            SettingError, DtypeError: If there is no gradient, or a sparse or complex one.
        """
        parts = (stored.tensor_split(self.starts.tolist()[1:]) for stored in (self.inputs, self.labels))
        return len(self.starts) > 0 and _project(self._network[0], [*zip(*parts, strict=True)], loss, self.margin)

    def consolidate(self, data: Examples) -> None:
        """Keeps a sample of a task, drawn without replacement, on the network's device; call it at the task's end.

        Args:
            data: Examples with labels, in any form that ``batches`` takes; the same rows are kept in every form.

        Raises:
            ShapeError, DtypeError: If their form differs among them or from what is stored. Nothing is changed then.
            SettingError: If there are no examples, or no labels.
        """
        device = _trainable(self._network[0])[0].device
        generator = self._generator.clone_state()
        old = [self.inputs.to(device), self.labels.to(device)] if len(self.starts) else []
        new: list[Tensor] = []  # inputs, labels, and random ranks, of which the lowest stay
        for inputs, labels in batches(data, max(self.examples, 1024)):
            if labels is None:
                raise SettingError("GEM needs examples with labels, got inputs alone: pass pairs (inputs, labels).")
            _require_alike([inputs, labels], new or old or [inputs, labels])
            ranks = torch.rand(len(inputs), generator=generator, dtype=torch.float64, device=generator.device)
            part = [tensor.detach().to(device) for tensor in (inputs, labels, ranks)]
            new = [torch.cat(pair) for pair in zip(new, part, strict=True)] if new else part
            lowest = new[-1].topk(min(self.examples, len(new[-1])), largest=False).indices.sort().values
            new = [tensor[lowest] for tensor in new]
        self.starts = torch.cat([self.starts, self.starts.new_tensor([len(self.inputs)])])
        self.inputs, self.labels = (torch.cat(pair) for pair in zip(old, new, strict=False)) if old else new[:2]
        self._generator.set_state(generator.get_state())

    def get_extra_state(self) -> Tensor:
        """Returns the generator's state."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Sets the generator's state."""
        self._generator.set_state(state.cpu())


class AGEM(nn.Module):
    """Averaged GEM: no step may raise the mean loss on a sample of what the replay buffer holds.

    Paper: Chaudhry et al. (2019), arXiv 1812.00420, Eq. (11): with g the present gradient and r that of the sample,
    ``g <- g - (g . r / r . r) r`` where ``g . r < 0``. It costs one backward pass, run as ``GEM`` runs its own.

    Args:
        network: What is trained: inputs ``(b, ...)`` to outputs. Frozen parameters play no part.
        buffer: Where the examples of past tasks come from. It is not in ``state_dict()``: the training loop fills it at
            each task's end, and saves it.
        examples: How many are drawn for each step (256 in the authors' scripts).

    Raises:
        SettingError: If a setting is outside its range, or the network has nothing to train.

    Example:
        >>> import torch
        >>> from recollect.continual.projections import AGEM
        >>> class One(list):
        ...     sample = lambda self, count: self[0]
        >>> squared, network = torch.nn.functional.mse_loss, torch.nn.Linear(1, 1, bias=False)
        >>> agem = AGEM(network, One([(torch.ones(1, 1), torch.full((1, 1), 5.0))]))
        >>> squared(network(torch.ones(1, 1)), torch.full((1, 1), -5.0)).backward()
        >>> agem.project(squared), network.weight.grad.abs().item() < 1e-5
        (True, True)
    """

    def __init__(self, network: nn.Module, buffer: Buffer, *, examples: int = 256) -> None:
        super().__init__()
        _require_settings(network, examples)
        require("buffer", buffer, Buffer, "a replay buffer, with sample(count) and len()")
        self.examples = examples
        self._parts = (network, buffer)  # in a tuple: no submodules

    @property
    def network(self) -> nn.Module:
        """The network whose gradient is corrected."""
        return self._parts[0]

    def extra_repr(self) -> str:
        return f"examples={self.examples}"

    @property
    def buffer(self) -> Buffer:
        """Where the examples come from."""
        return self._parts[1]

    def project(self, loss: Loss = nn.functional.cross_entropy) -> bool:
        """Makes the gradient agree with that of a sample: as ``GEM.project``, and False while the buffer is empty."""
        network, buffer = self._parts
        return len(buffer) > 0 and _project(network, [buffer.sample(self.examples)], loss, 0.0)

    def consolidate(self, data: Examples) -> None:
        """Does nothing: the examples come from the buffer, which the training loop writes to."""


def _require_settings(network: Any, examples: object) -> None:
    require("network", network, nn.Module, "a torch.nn.Module")
    _trainable(network)
    require_whole("examples", examples)


def _require_alike(new: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    for name, tensor, other in zip(("inputs", "labels"), new, old, strict=False):
        if tensor.shape[1:] != other.shape[1:]:
            need, got = ("n", *other.shape[1:]), tuple(tensor.shape)
            raise ShapeError(f"{name} must have shape {need} as those before, got {got}: reshape them.")
        if tensor.dtype != other.dtype:
            raise DtypeError(f"{name} must be {other.dtype} as those before, got {tensor.dtype}: convert them.")


def _resize(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Before loading: makes room for what comes."""
    for name in ("inputs", "labels", "starts"):
        if isinstance(state.get(prefix + name), Tensor):
            setattr(module, name, torch.empty_like(state[prefix + name], device=getattr(module, name).device))


def _trainable(network: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise SettingError("the network has no trainable parameters, so no gradient to project: unfreeze some.")
    return parameters


def _project(network: nn.Module, tasks: Sequence[_Pair], loss: Loss, margin: float) -> bool:
    """Projects ``p.grad`` by the gradients of some tasks; A-GEM's formula is that of one task without margin."""
    parameters = _trainable(network)
    present = [parameter.grad for parameter in parameters]
    if all(grad is None for grad in present):
        raise SettingError("there are no gradients: call project() after loss.backward() and before optimizer.step().")
    matrix = torch.stack([*_gradients(network, parameters, tasks, loss), _flat(present, parameters)])
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=1)
    if not largest.isfinite().all():
        which = "the stored examples' loss" if largest[-1].isfinite() else "the present loss"
        raise NonFiniteError(f"the gradient of {which} holds NaN or infinity. {_ADVICE}")
    if bool((matrix[:-1] @ (matrix[-1] / largest[-1].where(largest[-1] > 0, 1)) >= 0).all()):
        return False
    parts = _projected(matrix, margin).split([parameter.numel() for parameter in parameters])
    new = [part.to(p.device, p.dtype).view_as(p) for part, p in zip(parts, parameters, strict=True)]
    if not all(part.isfinite().all() for part in new):  # float16 overflows early
        raise NonFiniteError(f"the projected gradient does not fit {parameters[0].dtype}. {_ADVICE}")
    for parameter, part in zip(parameters, new, strict=True):
        if parameter.grad is not None:
            parameter.grad.detach().copy_(part)
        elif part.any():
            parameter.grad = part.clone()
    return True


def _flat(grads: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Float[Tensor, " p"]:
    """Returns gradients as one vector, in float32 at least."""
    dtype, vectors = torch.float32, []
    for grad, parameter in zip(grads, parameters, strict=True):
        if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
            raise DtypeError("gradients must be dense and real, got a sparse or complex one: try sparse=False.")
        dtype = torch.promote_types(dtype, parameter.dtype)
        vectors.append((torch.zeros_like(parameter) if grad is None else grad).detach().flatten())
    return torch.cat([vector.to(parameters[0].device, dtype) for vector in vectors])


def _gradients(
    network: nn.Module, parameters: Sequence[nn.Parameter], tasks: Sequence[_Pair], loss: Loss
) -> list[Float[Tensor, " p"]]:
    """Returns the gradient of each task's loss in evaluation mode; nothing of the network changes."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    first, rows = parameters[0].device, []
    with (
        evaluation(network),
        aside(),
        torch.random.fork_rng(list(devices)),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        for inputs, labels in tasks:
            value = loss(torch.func.functional_call(network, buffers, (inputs.to(first),)), labels.to(first))
            rows.append(_flat(torch.autograd.grad(value, parameters, allow_unused=True), parameters))
    return rows


def _projected(matrix: Float[Tensor, "t p"], margin: float) -> Float[Tensor, " p"]:
    """Returns the last row, projected by those before it, in float64.

    With u = v - margin, the result ``(g + margin G' 1) + G' u`` is the least in norm among all u >= 0. A QR
    decomposition of the rows, piece by piece, makes this small; unlike the Gram matrix, it loses no digits.
    """
    pieces = matrix.split(2**13 if matrix.device.type == "cpu" else 2**18, dim=1)  # on a CPU: what its cache holds
    corner = matrix.new_empty(0, len(matrix), dtype=torch.float64)
    for piece in pieces:
        corner = torch.linalg.qr(torch.cat([corner, piece.T.double()]), mode="r").R
    past = corner[:, :-1]
    norms = past.norm(dim=0)
    norms = norms.where(norms > 0, 1)
    extra = _nonnegative((past / norms).cpu(), (corner[:, -1] + margin * past.sum(1)).cpu()).to(norms.device) / norms
    return torch.cat([part[-1] + margin * part[:-1].sum(0) + extra @ part[:-1] for part in map(Tensor.double, pieces)])


def _nonnegative(columns: Float[Tensor, "r t"], target: Float[Tensor, " r"]) -> Float[Tensor, " t"]:
    """Returns the u >= 0 with the least ``|target + columns u|``, for columns of length one or zero.

    Lawson and Hanson (1974), chapter 23. A column that would enter with a weight that is not positive (by rounding)
    waits until another has entered. The number of rounds is bounded, and u >= 0 after each.
    """

    def fitted(free: Tensor) -> Tensor:
        return torch.linalg.lstsq(columns * free, -target.unsqueeze(1), driver="gelsd").solution.squeeze(1)

    weights = torch.zeros_like(columns[0])
    free, barred = weights > 0, weights > 0
    for _ in range(10 * len(weights)):
        slopes = (columns.T @ (target + columns @ weights)).where(~(free | barred), torch.inf)
        best = int(slopes.argmin())
        if slopes[best] >= -torch.finfo(slopes.dtype).eps * (100 * target.norm() + weights.sum()):
            break
        trial = free | (torch.arange(len(weights)) == best)
        goal = fitted(trial)
        if goal[best] <= 0:
            barred[best] = True
            continue
        while bool((goal[trial] <= 0).any()):
            shares = (weights / (weights - goal)).where(trial & (goal <= 0), torch.inf)
            weights = weights.lerp(goal, shares.min())
            trial &= (shares > shares.min()) & (weights > 0)
            weights, goal = weights.where(trial, 0), fitted(trial)
        weights, free = goal.where(trial, 0), trial
        barred.zero_()
    return weights
