"""Kernels are their formulas, as logarithms."""

import pytest
import torch

from recollect.errors import SettingError
from recollect.kernels import Kernel, dot_product, gaussian, inverse_distance


def pairs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 4, generator=g, dtype=dtype)
    keys = torch.randn(3, 5, 4, generator=g, dtype=dtype)
    return queries, keys, (keys - queries.unsqueeze(1)).square().sum(2)


@pytest.mark.parametrize("epsilon", [1e-3, 1.0, 7.0])
def test_inverse_distance(epsilon: float) -> None:
    queries, keys, distances = pairs()
    weights = inverse_distance(epsilon=epsilon).log_weights(queries, keys, distances).exp()
    torch.testing.assert_close(weights, 1 / (epsilon + (keys - queries.unsqueeze(1)).norm(dim=2) ** 2))


@pytest.mark.parametrize("bandwidth", [0.1, 1.0, 5.0])
def test_gaussian(bandwidth: float) -> None:
    queries, keys, distances = pairs()
    weights = gaussian(bandwidth=bandwidth).log_weights(queries, keys, distances)
    normal = torch.distributions.Normal(queries.unsqueeze(1), bandwidth)
    expected = normal.log_prob(keys).sum(2) - normal.log_prob(queries.unsqueeze(1)).sum(2)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("flatness", [-1.0, 0.0, 0.3, 2.0])
def test_dot_product(flatness: float) -> None:
    queries, keys, distances = pairs()
    expected = flatness * torch.einsum("bd,bkd->bk", queries, keys)
    torch.testing.assert_close(dot_product(flatness).log_weights(queries, keys, distances), expected)
    shared = dot_product(flatness).log_weights(queries, keys[0], distances)
    torch.testing.assert_close(shared, flatness * torch.einsum("bd,kd->bk", queries, keys[0]))


def test_a_gaussian_of_far_neighbors_does_not_underflow() -> None:
    weights = gaussian(0.1).log_weights(None, None, torch.tensor([[1e8, 1e8 + 64]]))
    assert weights.exp().tolist() == [[0.0, 0.0]]
    assert weights.softmax(-1).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("kernel", "name"), [(inverse_distance, "epsilon"), (gaussian, "bandwidth")])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_settings_must_be_positive(kernel: type, name: str, bad: float) -> None:
    with pytest.raises(SettingError, match=f"{name} must be a finite number above 0, got {bad}"):
        kernel(bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_flatness_must_be_finite(bad: float) -> None:
    with pytest.raises(SettingError, match=f"flatness must be a finite number, got {bad}"):
        dot_product(bad)


def test_defaults_and_protocol() -> None:
    assert inverse_distance() == inverse_distance(epsilon=1e-3)
    assert dot_product() == dot_product(flatness=1.0)
    assert inverse_distance(1.0) != inverse_distance(2.0)
    assert all(isinstance(kernel, Kernel) for kernel in (inverse_distance(), gaussian(1.0), dot_product()))
