"""A likelihood's three parts agree with each other and with ``torch.distributions``."""

import math
from collections.abc import Iterator

import hypothesis.strategies as st
import jaxtyping
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Independent, Normal

from recollect.errors import DtypeError, EmptyMemoryError, LabelError, SettingError, ShapeError
from recollect.likelihoods import Categorical, Gaussian, Likelihood

LIKELIHOODS = [Categorical(), Gaussian(), Gaussian(variance=0.25)]


def data(likelihood: Likelihood, *batch: int, size: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs and values in float64."""
    g = torch.Generator().manual_seed(seed)
    outputs = 3 * torch.randn(*batch, size, generator=g, dtype=torch.float64)
    if isinstance(likelihood, Categorical):
        return outputs, torch.randint(size, batch, generator=g)
    return outputs, torch.randn(*batch, size, generator=g, dtype=torch.float64)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns jaxtyping's checks off: the errors are those that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_log_prob_is_that_of_torch(likelihood: Likelihood, batch: tuple[int, ...]) -> None:
    outputs, values = data(likelihood, *batch)
    if isinstance(likelihood, Gaussian):
        expected = Independent(Normal(outputs, math.sqrt(likelihood.variance)), 1)
    else:
        expected = TorchCategorical(logits=outputs)
    torch.testing.assert_close(likelihood.log_prob(outputs, values), expected.log_prob(values))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_the_gradient_is_that_of_log_prob(likelihood: Likelihood, batch: tuple[int, ...]) -> None:
    outputs, values = data(likelihood, *batch)
    kept = outputs.clone()
    outputs.requires_grad_()
    (expected,) = torch.autograd.grad(likelihood.log_prob(outputs, values).sum(), outputs)
    torch.testing.assert_close(likelihood.gradient(outputs, values).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(likelihood.gradient(outputs.detach(), values), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(outputs, kept)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_the_gradient_can_be_differentiated(likelihood: Likelihood) -> None:
    outputs, values = data(likelihood, 3)
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(likelihood.log_prob)))(outputs, values)
    jacobian = torch.func.vmap(torch.func.jacrev(likelihood.gradient))(outputs, values)
    torch.testing.assert_close(jacobian, hessian)
    outputs.requires_grad_()
    (product,) = torch.autograd.grad(likelihood.gradient(outputs, values).square().sum() / 2, outputs)
    gradient = likelihood.gradient(outputs.detach(), values)
    torch.testing.assert_close(product, torch.einsum("bij,bj->bi", hessian, gradient))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_the_fitted_constant_is_what_an_optimizer_finds(likelihood: Likelihood) -> None:
    """Appendix E: attention is the constant with the least weighted negative log-likelihood."""
    _, values = data(likelihood, 2, 12)
    if isinstance(likelihood, Categorical):
        values[:, :4] = torch.arange(4)  # every class occurs, so the optimum is finite
    weights = torch.rand(2, 12, dtype=torch.float64).softmax(-1)
    constant = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [constant], max_iter=200, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        nll = -(weights * likelihood.log_prob(constant.unsqueeze(1).expand(2, 12, 4), values)).sum()
        nll.backward()
        return nll

    optimizer.step(loss)
    fitted = likelihood.fit_constant(values, weights, 4)
    torch.testing.assert_close(fitted, likelihood.predict(constant.detach()), rtol=1e-6, atol=1e-6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 99))
def test_no_constant_fits_better_than_the_vote(labels: list[int], seed: int) -> None:
    likelihood, values = Categorical(), torch.tensor([labels])
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, len(labels), generator=g, dtype=torch.float64).softmax(-1)
    fitted = likelihood.fit_constant(values, weights, 4)
    torch.testing.assert_close(fitted.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    assert {c for c, p in enumerate(fitted[0].exp().tolist()) if p > 0} == set(labels)
    best = (weights * fitted.gather(1, values)).sum()
    for scale in (0.01, 1.0):
        other = fitted.clamp(min=-20) + scale * torch.randn(100, 4, generator=g, dtype=torch.float64)
        fits = (weights * other.log_softmax(-1)[:, values[0]]).sum(-1)
        assert bool((fits <= best + 1e-9).all())


def test_a_vote_without_neighbors_is_uniform() -> None:
    values, weights = torch.tensor([[1, 0], [2, 2]]), torch.tensor([[0.0, 0.0], [0.25, 0.75]])
    fitted = Categorical().fit_constant(values, weights, 4).exp()
    assert fitted.tolist() == [[0.25] * 4, [0, 0, 1, 0]]
    nothing = Categorical().fit_constant(torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 0), 2)
    assert nothing.exp().tolist() == [[0.5, 0.5]] * 3
    with pytest.raises(SettingError, match="pass classes="):
        Categorical().fit_constant(values, weights, None)


def test_a_mean_without_neighbors_is_an_error() -> None:
    with pytest.raises(EmptyMemoryError, match="Write to the memory first"):
        Gaussian().fit_constant(torch.zeros(1, 0, 2), torch.zeros(1, 0), None)
    with pytest.raises(EmptyMemoryError):
        Gaussian().fit_constant(torch.ones(2, 1, 2), torch.tensor([[1.0], [0.0]]), None)


@pytest.mark.usefixtures("unchecked")
def test_a_mean_of_single_numbers_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"value_shape=\(outputs,\)"):
        Gaussian().fit_constant(torch.ones(3, 3), torch.full((3, 3), 1 / 3), None)


def test_predictions() -> None:
    outputs, _ = data(Categorical(), 5)
    torch.testing.assert_close(Categorical().predict(outputs).exp(), outputs.softmax(-1))
    assert torch.equal(Gaussian().predict(outputs), outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_predictions_of_half_types_sum_to_one(dtype: torch.dtype) -> None:
    outputs = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    predicted = Categorical().predict(outputs)
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted, outputs.float().log_softmax(-1))
    assert bool((outputs.log_softmax(-1).float().logsumexp(-1).abs() > 1e-5).any())  # what they would be otherwise
    assert bool((predicted.logsumexp(-1).abs() < 1e-5).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_labels_of_every_whole_dtype(dtype: torch.dtype) -> None:
    outputs, values = data(Categorical(), 2, 3)
    labels, likelihood = values.to(dtype), Categorical()
    likelihood.check_values(labels, 4)
    assert torch.equal(likelihood.log_prob(outputs, labels), likelihood.log_prob(outputs, values))
    assert torch.equal(likelihood.gradient(outputs, labels), likelihood.gradient(outputs, values))
    weights = torch.full((2, 3), 1 / 3)
    assert torch.equal(likelihood.fit_constant(labels, weights, 4), likelihood.fit_constant(values, weights, 4))


@pytest.mark.parametrize(
    ("likelihood", "values", "error", "message"),
    [
        (Categorical(), torch.zeros(2, 3), DtypeError, "the memory's values are torch.float32.*value_dtype=torch.long"),
        (Categorical(), torch.zeros(2, 3, 1).long(), ShapeError, r"values have shape \(1,\).*value_shape=\(\)"),
        (Categorical(), torch.tensor([[0, 4]]), LabelError, r"labels from 0 to 4, but there are 4 classes \(0 to 3\)"),
        (Categorical(), torch.tensor([[-1, 2]]), LabelError, "labels from -1 to 2"),
        (
            Gaussian(),
            torch.zeros(2, 3, 4).long(),
            DtypeError,
            "the memory's are torch.int64.*value_dtype=torch.float32",
        ),
        (Gaussian(), torch.zeros(2, 3, 5), ShapeError, r"shape \(5,\), but the head has 4 outputs"),
        (Gaussian(), torch.zeros(2, 3), ShapeError, r"shape \(\), but the head has 4 outputs"),
    ],
)
def test_values_that_do_not_fit_are_refused(likelihood, values, error, message) -> None:
    with pytest.raises(error, match=message):
        likelihood.check_values(values, 4)


def test_values_that_fit_are_accepted() -> None:
    Categorical().check_values(torch.tensor([[0, 3]]), 4)
    Categorical().check_values(torch.zeros(2, 0, dtype=torch.long), 4)
    Gaussian().check_values(torch.zeros(2, 3, 4), 4)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_variance_is_positive(bad: float) -> None:
    with pytest.raises(SettingError, match=f"variance must be a finite number above 0, got {bad}"):
        Gaussian(variance=bad)


def test_protocol() -> None:
    assert all(isinstance(likelihood, Likelihood) for likelihood in LIKELIHOODS)
