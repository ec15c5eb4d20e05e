"""Linear-Gaussian steps: fitted to samples, made best for a quadratic loss, and how far two of them are apart.

A step ``u`` leads from the location x to ``x + u``, at all of t times; many problems stand side by side.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class LinearGaussian(NamedTuple):
    """Steps ``u ~ N(K_t x + k_t, G_t)``."""

    gain: Float[Tensor, "t *b d d"]
    """K."""
    offset: Float[Tensor, "t *b d"]
    """k."""
    covariance: Float[Tensor, "t *b d d"]
    """G."""

    def mean(self, x: Float[Tensor, "t m b d"]) -> Float[Tensor, "t m b d"]:
        """Returns ``K_t x + k_t`` of m locations at each time and for each problem."""
        return times(self.gain.unsqueeze(1), x) + self.offset.unsqueeze(1)


class Quadratic(NamedTuple):
    """What a step costs: ``u'Uu / 2 + u'Mx + x'Xx / 2 + u'r + x's``."""

    uu: Float[Tensor, "t *b d d"]
    """U."""
    ux: Float[Tensor, "t *b d d"]
    """M."""
    xx: Float[Tensor, "t *b d d"]
    """X."""
    u: Float[Tensor, "t *b d"]
    """r."""
    x: Float[Tensor, "t *b d"]
    """s."""


def times(matrix: Float[Tensor, "*#b d d"], vector: Float[Tensor, "*#b d"]) -> Float[Tensor, "*#b d"]:
    """Returns the product of each matrix and vector."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def regression(x: Float[Tensor, "t m b d"], u: Float[Tensor, "t m b d"], *, ridge: float) -> LinearGaussian:
    """Fits steps to m samples at each time and for each problem.

    ``K = S_ux (S_xx + ridge I)^-1, k = mean(u) - K mean(x)``, and G is the mean square of what is left; S are the
    covariances of the samples. So K and k minimize the mean of ``|u - K x - k|^2``, plus ``ridge |K|^2``.

    Args:
        x: Locations.
        u: Steps.
        ridge: Keeps K finite where the locations have no spread, as at the start.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0, 5.0]).reshape(1, 4, 1, 1)
        >>> fit = regression(x, 3 - x / 2, ridge=0.0)
        >>> round(fit.gain.item(), 4), round(fit.offset.item(), 4), round(fit.covariance.item(), 4)
        (-0.5, 3.0, 0.0)
    """
    centers, means = x.mean(1, keepdim=True), u.mean(1, keepdim=True)
    away, steps = (x - centers).transpose(1, 2), (u - means).transpose(1, 2)
    spread = away.mT @ away / x.shape[1] + ridge * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    gain = torch.linalg.solve(spread, away.mT @ steps / x.shape[1]).mT
    rest = steps - away @ gain.mT
    offset = means.squeeze(1) - times(gain, centers.squeeze(1))
    return LinearGaussian(gain, offset, rest.mT @ rest / x.shape[1])


def surprise(steps: LinearGaussian) -> Quadratic:
    """Returns ``-log N(u; K x + k, G)``, less what depends on neither u nor x."""
    precision = torch.linalg.inv(steps.covariance)
    pull = precision @ steps.gain
    shift = times(precision, steps.offset)
    return Quadratic(precision, -pull, steps.gain.mT @ pull, -shift, times(steps.gain.mT, shift))


def lqr(cost: Quadratic, curvature: Float[Tensor, "t *b d d"], slope: Float[Tensor, "t *b d"]) -> LinearGaussian:
    """Returns the steps that make the expected cost, less their entropy, the least.

    Where a step leads to, ``y = x + u``, costs ``y'Cy / 2 + y'c`` more. From the last step back, with V and v of what
    is still to be paid, at first zero:

        W = V + C, w = v + c
        G = (U + W)^-1, K = -G (M + W), k = -G (r + w)
        V = X + W + (M + W)' K, v = s + w + (M + W)' k

    Then the density of a whole way is proportional to ``exp(-cost)``.

    Paper: Levine and Abbeel (2014), Section 3, with the dynamics ``x + u``.

    Args:
        cost: Of the steps.
        curvature: C. With U it must be positive definite at each step.
        slope: c.
    """
    found = list[tuple[Tensor, Tensor, Tensor]]()
    ahead, tilt = torch.zeros_like(curvature[0]), torch.zeros_like(slope[0])
    for uu, ux, xx, u, x, here, drop in zip(*(part.flip(0) for part in (*cost, curvature, slope)), strict=True):
        ahead, tilt = ahead + here, tilt + drop
        mixed = ux + ahead
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(uu + ahead))
        gain, offset = -covariance @ mixed, -times(covariance, u + tilt)
        found.append((gain, offset, covariance))
        ahead, tilt = xx + ahead + mixed.mT @ gain, x + tilt + times(mixed.mT, offset)
        ahead = (ahead + ahead.mT) / 2  # rounding adds up
    gains, offsets, covariances = (torch.stack(part[::-1]) for part in zip(*found, strict=True))
    return LinearGaussian(gains, offsets, covariances)


def divergence(new: LinearGaussian, old: LinearGaussian, start: Float[Tensor, "*b d"]) -> Float[Tensor, "t *b"]:
    """Returns the Kullback-Leibler divergence of new steps from old ones, at each time, as a mean over the new way.

    ``KL = (tr(G'^-1 (G + E e e')) - d + log|G'| - log|G|) / 2`` with ``e = (K - K') x + k - k'``. The location x is
    Gaussian, with ``m <- m + K m + k, S <- (I + K) S (I + K)' + G`` from step to step.

    Args:
        new: Their way is taken.
        old: K', k' and G'.
        start: The first location.
    """
    precision, gains, offsets = torch.linalg.inv(old.covariance), new.gain - old.gain, new.offset - old.offset
    mean, spread, squares = start, torch.zeros_like(new.gain[0]), list[Tensor]()
    one = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    for t, (gain, offset, covariance) in enumerate(zip(*new, strict=True)):
        away = times(gains[t], mean) + offsets[t]
        second = away.unsqueeze(-1) * away.unsqueeze(-2) + gains[t] @ spread @ gains[t].mT + covariance
        squares.append((precision[t] * second).sum((-2, -1)))
        mean, spread = mean + times(gain, mean) + offset, (one + gain) @ spread @ (one + gain).mT + covariance
    sizes = torch.logdet(old.covariance) - torch.logdet(new.covariance)
    return (torch.stack(squares) - start.shape[-1] + sizes) / 2
