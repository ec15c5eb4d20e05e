"""Families of small problems on which optimizers are learned and compared; many problems stand side by side."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from recollect.adaptation.rules import Params
from recollect.errors import DtypeError, SettingError, ShapeError, require_tensor, require_whole

_DECAY = 5e-4  # lambda of Li and Malik (2017)


class Problem(NamedTuple):
    """What to minimize, and where from."""

    objective: Callable[[Params], Float[Tensor, "*b"]]
    """Maps parameters to the loss, or to one loss for each of ``b`` problems."""
    start: Params
    """The first parameters; those of ``b`` problems have a row for each."""


def quadratics(
    count: int, *, dimension: int = 10, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Problem:
    """Draws functions ``f(theta) = |W theta - y|^2`` with Gaussian W and y.

    Paper: Andrychowicz et al. (2016), Section 3.1. *Differs from the authors' code:* there W and y are uniform in
    [0, 1). The start is as there: normal, with a deviation of 0.01.

    Args:
        count: How many.
        dimension: Of theta (10 in the paper).
        generator: Draws them, on its device; torch's global random state does when None.
        dtype: Of all tensors.

    Raises:
        SettingError: If a size is no whole number above 0.
        DtypeError: If ``dtype`` is not one of floating-point numbers.

    Example:
        >>> problem = quadratics(128, generator=torch.Generator().manual_seed(0))
        >>> problem.objective(problem.start).shape
        torch.Size([128])
    """
    _require(dtype, count=count, dimension=dimension)
    draw = _normal(generator, dtype)
    matrix, target = draw(count, dimension, dimension), draw(count, dimension)

    return Problem(partial(_squares, matrix=matrix, target=target), {"theta": 0.01 * draw(count, dimension)})


def logistic_regression(
    count: int, *, dimension: int = 3, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Problem:
    """Draws logistic regressions: the mean cross-entropy of 100 points of two classes, + 5e-4 / 2 |w|^2.

    Paper: Li and Malik (2017): d = 3, so 4 parameters. *Our choice:* each class is a Gaussian of 50 points whose mean
    is standard normal, and its covariance ``A A^T / d`` with a standard normal A; the start is standard normal.

    Args:
        count: How many.
        dimension: d of the points (3 in the paper).
        generator: Draws them, on its device; torch's global random state does when None.
        dtype: Of all tensors.

    Raises:
        SettingError: If a size is no whole number above 0.
        DtypeError: If ``dtype`` is not one of floating-point numbers.

    Example:
        >>> problem = logistic_regression(90, generator=torch.Generator().manual_seed(0))
        >>> {name: tuple(p.shape) for name, p in problem.start.items()}
        {'weight': (90, 3), 'bias': (90,)}
    """
    _require(dtype, count=count, dimension=dimension)
    draw = _normal(generator, dtype)
    points = _clusters(draw, count, 2, 50, dimension)
    labels = torch.arange(2, device=points.device).repeat_interleave(50).to(dtype).expand(count, -1)

    start = {"weight": draw(count, dimension), "bias": draw(count)}
    return Problem(partial(_logistic, points=points, labels=labels), start)


def robust_regression(
    count: int, *, dimension: int = 3, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Problem:
    """Draws linear regressions under the Geman-McClure loss: the mean of ``r^2 / (1 + r^2)`` over 100 residuals r.

    Paper: Li and Malik (2017): c = 1, d = 3, four Gaussians of 25 points. The loss is not convex. *Our choice:* the
    means of the Gaussians are standard normal, their covariances the identity; each has its own standard normal vector
    and bias that make the targets, with noise of deviation 0.1; the start is standard normal.

    Args:
        count: How many.
        dimension: d of the points (3 in the paper).
        generator: Draws them, on its device; torch's global random state does when None.
        dtype: Of all tensors.

    Raises:
        SettingError: If a size is no whole number above 0.
        DtypeError: If ``dtype`` is not one of floating-point numbers.

    Example:
        >>> problem = robust_regression(120, generator=torch.Generator().manual_seed(0))
        >>> bool((problem.objective(problem.start) < 1).all())
        True
    """
    _require(dtype, count=count, dimension=dimension)
    draw = _normal(generator, dtype)
    points = draw(count, 4, 1, dimension) + draw(count, 4, 25, dimension)
    vectors, biases = draw(count, 4, dimension, 1), draw(count, 4, 1)
    targets = (points @ vectors).squeeze(-1) + biases + 0.1 * draw(count, 4, 25)
    start = {"weight": draw(count, dimension), "bias": draw(count)}
    return Problem(partial(_geman_mcclure, points=points.flatten(1, 2), targets=targets.flatten(1)), start)


def relu_network(
    count: int, *, size: int = 2, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Problem:
    """Draws small classifiers to train: mean cross-entropy of 100 points, + 5e-4 / 2 times the squared weights.

    Paper: Li and Malik (2017): one hidden layer of ReLU, d = h = p = 2 inputs, hidden units and classes, so 12
    parameters. *Our choice:* four Gaussians of 25 points, drawn as in ``logistic_regression``, belong to the classes
    in turn, so that few problems are separable by a line; biases do not decay; the start is standard normal.

    Args:
        count: How many.
        size: d, h and p (2 in the paper).
        generator: Draws them, on its device; torch's global random state does when None.
        dtype: Of all tensors.

    Raises:
        SettingError: If a size is no whole number above 0.
        DtypeError: If ``dtype`` is not one of floating-point numbers.

    Example:
        >>> problem = relu_network(80, generator=torch.Generator().manual_seed(0))
        >>> sum(p[0].numel() for p in problem.start.values())
        12
    """
    _require(dtype, count=count, size=size)
    draw = _normal(generator, dtype)
    points = _clusters(draw, count, 4, 25, size)
    labels = (torch.arange(4, device=points.device) % size).repeat_interleave(25).expand(count, -1)

    start = {"hidden": draw(count, size, size), "hidden_bias": draw(count, size)}
    start |= {"output": draw(count, size, size), "output_bias": draw(count, size)}
    return Problem(partial(_network, points=points, labels=labels), start)


def margin_of_victory(losses: dict[str, Float[Tensor, "t b"]]) -> dict[str, Float[Tensor, " t"]]:
    """Returns by how much each optimizer beats the best of the others after each step, as a mean over the problems.

    Paper: Li and Malik (2017): the lowest loss that another optimizer has on the problem at that step, less the
    optimizer's own. Above zero it wins.

    *Ours:* NaN counts as infinite, as the steps have diverged, which is worst. Where the best of the others is as
    infinite, the margin is 0.

    Args:
        losses: Of each optimizer, at the start and after each step, of each problem; all on the same problems.

    Raises:
        SettingError: If there are fewer than two optimizers.
        ShapeError: If their losses are not of as many steps and problems.

    Example:
        >>> margin_of_victory({"ours": torch.tensor([[3.0], [1.0]]), "theirs": torch.tensor([[3.0], [2.0]])})
        {'ours': tensor([0., 1.]), 'theirs': tensor([ 0., -1.])}
    """
    if len(losses) < 2:
        raise SettingError(f"a margin of victory needs at least two optimizers, got {list(losses)}.")
    for name, loss in losses.items():
        require_tensor(f"the losses of {name!r}", loss)
    shapes = {name: tuple(loss.shape) for name, loss in losses.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ShapeError(
            f"all losses must be of the same shape (steps, problems), got {shapes}. Let each optimizer take as many "
            "steps on the same problems."
        )
    losses = {name: loss.masked_fill(loss.isnan(), torch.inf) for name, loss in losses.items()}
    best = {name: torch.stack([loss for rival, loss in losses.items() if rival != name]).amin(0) for name in losses}
    # Of equal ones the difference is 0, where infinity less infinity would be NaN.
    return {name: (best[name] - own).masked_fill(best[name] == own, 0.0).mean(1) for name, own in losses.items()}


def _squares(params: Params, *, matrix: Float[Tensor, "b n n"], target: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    return ((matrix @ params["theta"].unsqueeze(-1)).squeeze(-1) - target).square().sum(-1)


def _linear(params: Params, points: Float[Tensor, "b p d"]) -> Float[Tensor, "b p"]:
    return (points @ params["weight"].unsqueeze(-1)).squeeze(-1) + params["bias"].unsqueeze(-1)


def _logistic(params: Params, *, points: Float[Tensor, "b p d"], labels: Float[Tensor, "b p"]) -> Float[Tensor, " b"]:
    loss = binary_cross_entropy_with_logits(_linear(params, points), labels, reduction="none").mean(-1)
    return loss + _DECAY / 2 * params["weight"].square().sum(-1)


def _geman_mcclure(
    params: Params, *, points: Float[Tensor, "b p d"], targets: Float[Tensor, "b p"]
) -> Float[Tensor, " b"]:
    squares = (targets - _linear(params, points)).square()
    return (squares / (1 + squares)).mean(-1)


def _network(params: Params, *, points: Float[Tensor, "b p d"], labels: Int[Tensor, "b p"]) -> Float[Tensor, " b"]:
    hidden = torch.relu(points @ params["hidden"].mT + params["hidden_bias"].unsqueeze(1))
    logits = hidden @ params["output"].mT + params["output_bias"].unsqueeze(1)
    squares = params["hidden"].square().sum((1, 2)) + params["output"].square().sum((1, 2))
    return cross_entropy(logits.mT, labels, reduction="none").mean(-1) + _DECAY / 2 * squares


def _require(dtype: torch.dtype, **sizes: int) -> None:
    for name, size in sizes.items():
        require_whole(name, size)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise DtypeError(f"problems are of floating-point numbers, such as dtype=torch.float64, got dtype={dtype!r}.")


def _normal(generator: torch.Generator | None, dtype: torch.dtype) -> Callable[..., Tensor]:
    device = None if generator is None else generator.device
    return partial(torch.randn, generator=generator, dtype=dtype, device=device)


def _clusters(draw: Callable[..., Tensor], count: int, clusters: int, points: int, dimension: int) -> Tensor:
    """Returns points of Gaussians with random means and covariances, cluster after cluster."""
    means, roots = draw(count, clusters, 1, dimension), draw(count, clusters, dimension, dimension)
    noise = draw(count, clusters, points, dimension)
    return (means + noise @ roots * dimension**-0.5).flatten(1, 2)
