"""The scikit-learn estimators: scikit-learn's own checks, and what these can do beyond them."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits, load_iris, make_blobs
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import recollect
from recollect import EpisodicMemory, Gaussian, LocalAdaptation, MbPA, grow, rules
from recollect.errors import (
    FormatError,
    LabelError,
    MissingDataError,
    MissingExtraError,
    NonFiniteError,
    SettingError,
    ShapeError,
)
from recollect.integrations import sklearn_memory
from recollect.integrations.sklearn import MbPAClassifier, MbPARegressor

ALL_CHECKS = """
import json, torch
from sklearn.utils.estimator_checks import check_estimator
from recollect.integrations.sklearn import MbPAClassifier, MbPARegressor
torch.set_num_threads(1)
for model in (MbPAClassifier(), MbPARegressor()):
    results = check_estimator(model, on_skip=None, on_fail=None)
    print(json.dumps([(r["check_name"], r["status"], repr(r["exception"])) for r in results]))
"""
EITHER = pytest.mark.parametrize("kind", [MbPAClassifier, MbPARegressor])


def test_scikit_learns_own_checks_pass() -> None:
    """In a process of its own: the checks pass wrong types on purpose, and want an environment variable."""
    environment = os.environ | {"SCIPY_ARRAY_API": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", ALL_CHECKS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    classifier, regressor = map(json.loads, done.stdout.splitlines())
    assert len(classifier) > 45
    assert len(regressor) > 45
    assert [result for result in classifier + regressor if result[1] != "passed"] == []


def iris(*, names: bool = False) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = load_iris(return_X_y=True)
    return inputs, load_iris().target_names[labels] if names else labels


def quick(kind: type = MbPAClassifier, **settings: Any) -> Any:
    return kind(**{"hidden_sizes": (16,), "epochs": 15, "random_state": 0, **settings})


@pytest.mark.parametrize("dtype", [int, float, str, object, bool])
@pytest.mark.parametrize("first", ["a", "b", "c"])
def test_a_class_may_come_at_any_time(dtype: type, first: str) -> None:
    """Whatever its place among the sorted classes."""
    inputs, numbers = make_blobs(240, n_features=6, centers=3, cluster_std=1.0, random_state=0)[:2]
    words = {int: [10, 2, 33], float: [1.0, -2.0, 0.0], str: ["b", "c", "a"], bool: [True, False, True]}
    labels = np.array(words.get(dtype, ["bb", "c", "aaaa"]), dtype=dtype)[numbers]
    late = np.unique(labels)[min("abc".index(first), len(np.unique(labels)) - 1)]
    old, new = labels != late, np.flatnonzero(labels == late)
    model = quick().fit(inputs[old], labels[old])
    before = model.predict_proba(inputs[old])
    assert late not in model.classes_
    model.partial_fit(inputs[new[:10]], labels[new[:10]])
    assert model.classes_.tolist() == np.unique(labels).tolist()
    assert model.classes_.dtype.kind == labels.dtype.kind
    assert model.predict(inputs).dtype.kind == labels.dtype.kind
    assert (model.predict(inputs[new[10:]]) == late).mean() > 0.8
    place = model.classes_.tolist().index(late)
    after = model.predict_proba(inputs[old])
    assert np.allclose(after.sum(1), 1)
    same = (np.delete(after, place, axis=1).argmax(1) == before.argmax(1)).mean()
    assert same > 0.95  # the columns of the old classes are still theirs
    assert model.score(inputs[old], labels[old]) > 0.95


def test_a_class_of_one_example_and_classes_one_after_the_other() -> None:
    inputs, labels = load_digits(return_X_y=True)
    model = quick(hidden_sizes=(64,)).partial_fit(inputs[:200][labels[:200] < 5], labels[:200][labels[:200] < 5])
    for digit in (9, 7, 5, 8, 6):
        rows = np.flatnonzero(labels == digit)[:20]
        model.partial_fit(inputs[rows[:1]], labels[rows[:1]])
        assert model.predict(inputs[rows[:1]]) == digit  # one is enough for itself
        model.partial_fit(inputs[rows[1:]], labels[rows[1:]])
    assert model.labels_.tolist() == [0, 1, 2, 3, 4, 9, 7, 5, 8, 6]
    assert model.classes_.tolist() == list(range(10))
    assert model.score(inputs[1000:], labels[1000:]) > 0.7


def test_partial_fit_first_is_fit_and_later_trains_nothing() -> None:
    inputs, labels = iris()
    fitted, taught = quick().fit(inputs, labels), quick().partial_fit(inputs, labels)
    assert np.array_equal(fitted.predict_proba(inputs), taught.predict_proba(inputs))
    before = {name: tensor.clone() for name, tensor in taught.network_.state_dict().items()}
    taught.partial_fit(inputs + 0.5, labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in taught.network_.state_dict().items())
    assert len(taught.memory_) > len(fitted.memory_)
    targets = labels.astype(float)
    values = [getattr(quick(MbPARegressor), how)(inputs, targets).predict(inputs) for how in ("fit", "partial_fit")]
    assert np.array_equal(*values)


def test_fit_starts_anew() -> None:
    inputs, labels = iris()
    model = quick().fit(inputs[:, :2], labels + 5).partial_fit(inputs[:, :2], labels + 7)
    assert model.fit(inputs, labels).classes_.tolist() == [0, 1, 2]
    assert np.array_equal(model.predict_proba(inputs), quick().fit(inputs, labels).predict_proba(inputs))


def test_announced_classes_have_outputs() -> None:
    inputs, labels = iris()
    model = quick().partial_fit(inputs, labels, classes=[0, 1, 2, 9])
    assert model.classes_.tolist() == [0, 1, 2, 9]
    assert model.predict_proba(inputs)[:, 3].max() < 0.2
    model.partial_fit(inputs[:1], labels[:1], classes=[-1, 2])
    assert model.classes_.tolist() == [-1, 0, 1, 2, 9]
    assert model.score(inputs, labels) > 0.9
    assert model.network_.head.out_features == 5


@pytest.mark.parametrize("classes", [[np.nan], [0, 1, 2.5], [0, 1, np.inf]])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_what_is_no_label_is_not_announced(classes: list[float]) -> None:
    inputs, labels = iris()
    model = quick().fit(inputs, labels)
    before = model.classes_
    with pytest.raises(ValueError, match=r"NaN|infinity|Unknown label type"):
        model.partial_fit(inputs[:1], labels[:1], classes=classes)
    assert model.classes_ is before


@EITHER
def test_a_refused_fit_leaves_the_last_one(kind: type) -> None:
    inputs, labels = iris()
    model = quick(kind).fit(inputs, labels)
    neighbors, before = model.neighbors, model.predict(inputs)
    with pytest.raises(SettingError, match="neighbors"):
        model.set_params(neighbors=0).fit(inputs[:, :2], labels)
    assert np.array_equal(model.set_params(neighbors=neighbors).predict(inputs), before)


def test_a_label_is_corrected_by_forget_and_partial_fit() -> None:
    """Even one that it was trained with."""
    inputs, labels = load_digits(return_X_y=True)
    inputs, labels = inputs[:300], labels[:300].copy()
    truth, labels[7] = labels[7], (labels[7] + 1) % 10
    model = quick().fit(inputs, labels)
    size = len(model.memory_)
    assert model.predict(inputs[7:8]) == labels[7]
    assert model.forget(inputs[[7, 7]]) == 1
    model.partial_fit(inputs[7:8], [truth])
    assert model.predict(inputs[7:8]) == truth
    assert len(model.memory_) == model.memory_.capacity == size  # in the place that became free
    others = np.delete(np.arange(300), 7)
    assert model.score(inputs[others], labels[others]) > 0.98


def test_a_target_is_corrected_by_forget_and_partial_fit() -> None:
    inputs, targets = load_diabetes(return_X_y=True)
    model = quick(MbPARegressor, neighbors=1, local_rate=1.0).fit(inputs, targets)
    assert model.forget(inputs[:1]) == 1
    model.partial_fit(inputs[:1], [1000.0])
    assert model.predict(inputs[:1])[0] == pytest.approx(1000, abs=50)


@EITHER
def test_forget_takes_back_exactly_these_inputs(kind: type) -> None:
    inputs, labels = iris()
    inputs = np.unique(inputs, axis=0)
    labels = np.arange(len(inputs)) % 3
    model = quick(kind, hidden_sizes=()).fit(np.repeat(inputs, 3, axis=0), np.repeat(labels, 3))
    ask = model.predict_proba if kind is MbPAClassifier else model.predict
    before, (size, slots) = ask(inputs), (len(model.memory_), model.memory_.capacity)
    assert model.forget(inputs + 1e-3) == 0
    assert np.array_equal(ask(inputs), before)
    assert model.partial_fit(inputs[[4, 4]], labels[[4, 4]]).forget(inputs[[4, 9]]) == 8
    assert model.forget(inputs[[4, 9]]) == 0
    assert len(model.memory_) == size - 6
    far = model.memory_.read(model.network_.keys(torch.tensor(inputs[[4, 9]])), 1).distances
    assert far.min() > 0
    near = model.memory_.read(model.network_.keys(torch.tensor(np.delete(inputs, [4, 9], axis=0))), 3).distances
    assert near.max() == 0  # all others are there
    model.set_params(local_steps=0)
    alone = ask(inputs)
    model.set_params(local_steps=10)
    assert model.forget(inputs) == size - 6
    assert np.array_equal(ask(inputs), alone)  # what the network predicts by itself
    assert model.forget(inputs) == 0
    assert model.partial_fit(inputs, labels).memory_.capacity <= 2 * slots
    with pytest.raises(ValueError, match="has 3 features"):
        model.forget(inputs[:, :3])
    with pytest.raises(NotFittedError):
        quick(kind).forget(inputs)


def test_zeros_of_either_sign_are_equal() -> None:
    model = quick(hidden_sizes=()).fit([[-1.0, 1.0], [1.0, -1.0], [0.0, -0.0]], [0, 1, 0])
    assert set(model.memory_.keys.sign().flatten().tolist()) == {-1, 0, 1}
    assert model.forget([[-0.0, 0.0]]) == 1
    assert model.forget([[0.0, 0.0]]) == 0  # an empty slot is no memory, though it is filled with zeros


def test_forgetting_is_fast_with_thousands_of_twins_and_a_large_memory() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(40_000, 8))
    inputs[::8] = 0.5
    model = quick(hidden_sizes=(64,)).fit(inputs[:50], np.arange(50) % 3)
    model.partial_fit(inputs[50:], np.zeros(39_950, dtype=int))
    looked_up = []
    index_search = model.memory_.index.search
    model.memory_.index.search = lambda *given: looked_up.append(1) or index_search(*given)
    start = time.process_time()
    assert model.forget(inputs[:200]) == 5000 + 175
    assert time.process_time() - start < 5  # about 0.1
    assert looked_up == []


@EITHER
def test_one_batch_is_the_same_as_row_by_row(kind: type) -> None:
    """Replicates with different labels included; classes in another order."""
    inputs, labels = iris()
    more = np.repeat(inputs[:40], 3, axis=0)[::-1]
    more_labels = np.random.default_rng(0).integers(0, 5, 120)
    batch, rows = (quick(kind).fit(inputs, labels) for _ in range(2))
    batch.partial_fit(more, more_labels)
    for row, label in zip(more, more_labels, strict=True):
        rows.partial_fit(row[None], [label])
    assert len(batch.memory_) == len(rows.memory_) == 270
    ask = [model.predict_proba if kind is MbPAClassifier else model.predict for model in (batch, rows)]
    assert np.allclose(ask[0](inputs), ask[1](inputs), atol=1e-10)
    assert np.array_equal(batch.predict(inputs), rows.predict(inputs)) or kind is MbPARegressor


def test_replicates_and_noisy_labels_are_kept() -> None:
    """Four inputs, of which all labels but a fifth are the one that is predicted."""
    inputs = np.array([[0.0, 0], [0, 1], [1, 0], [1, 1]])[np.arange(400) % 4]
    noisy = np.where(np.random.default_rng(0).random(400) < 0.2, 1 - inputs[:, 0], inputs[:, 0]).astype(int)
    model = quick(neighbors=100).fit(inputs, noisy)
    for row in range(20):
        model.partial_fit(inputs[row : row + 1], 1 - noisy[row : row + 1])
    assert len(model.memory_) == 420
    assert np.array_equal(model.predict(inputs[:4]), inputs[:4, 0])
    regressor = quick(MbPARegressor, neighbors=40).fit(np.zeros((30, 2)), np.arange(30.0))
    regressor.partial_fit(np.zeros((10, 2)), np.full(10, 100.0))
    assert regressor.predict(np.zeros((1, 2)))[0] == pytest.approx((435 + 1000) / 40, rel=0.05)


@EITHER
@pytest.mark.parametrize("hidden_sizes", [(), (16,)])
def test_what_is_far_away_changes_no_prediction_elsewhere(kind: type, hidden_sizes: tuple[int, ...]) -> None:
    inputs, labels = iris()
    model = quick(kind, hidden_sizes=hidden_sizes).fit(inputs, labels)
    ask = model.predict_proba if kind is MbPAClassifier else model.predict
    before = ask(inputs)
    model.partial_fit(1e3 * np.ones((1, 4)), [1])
    assert np.array_equal(ask(inputs), before)
    model.partial_fit(1e4 * np.random.default_rng(0).normal(size=(400, 4)), np.full(400, 2))
    taken = model.memory_.read(model.network_.keys(torch.tensor(inputs)), model.neighbors).slots.max(1).values
    elsewhere = (taken < 150).numpy()
    assert elsewhere.sum() > 20
    assert np.array_equal(ask(inputs)[elsewhere], before[elsewhere])


def test_a_regressor_learns_from_far_longer_keys() -> None:
    """Gradient descent on keys 1000 times as long as those in fit: a smaller step, and the same outcome."""
    inputs, targets = load_diabetes(return_X_y=True)
    model = quick(MbPARegressor, hidden_sizes=(), local_rate=1.0, neighbors=1).fit(inputs, targets)
    far = 1e3 * inputs[:40]
    model.partial_fit(far, targets[:40])
    assert np.allclose(model.predict(far), targets[:40], rtol=1e-6)
    model.set_params(neighbors=8, local_rate=1.9, local_steps=500)
    assert np.isfinite(model.predict(far)).all()
    assert np.abs(model.predict(inputs) - targets.mean()).max() < 5 * targets.std()


def by_hand(model: Any, values: torch.Tensor, inputs: np.ndarray, rate: float, **settings: Any) -> torch.Tensor:
    keys = model.network_.keys(torch.tensor(inputs))
    memory = EpisodicMemory(1000, keys.shape[1], value_shape=tuple(values.shape[1:]), value_dtype=values.dtype)
    memory.write(keys, values)
    adaptation = LocalAdaptation(rules.sgd(rate), steps=model.local_steps)
    return MbPA(model.network_.head, memory, neighbors=model.neighbors, adaptation=adaptation, **settings)(keys)


@pytest.mark.parametrize("hidden_sizes", [(), (8,), (8, 5)])
def test_equals_mbpa_assembled_by_hand(hidden_sizes: tuple[int, ...]) -> None:
    inputs, labels = load_diabetes(return_X_y=True)[0], np.arange(442) % 3
    model = quick(hidden_sizes=hidden_sizes, neighbors=5, local_rate=3.0, local_steps=4).fit(inputs, labels)
    lengths = model.network_.keys(torch.tensor(inputs)).double().square().sum(1)
    expected = by_hand(model, torch.tensor(labels), inputs, 3.0 / (1 + float(lengths.median())))
    assert np.allclose(model.predict_proba(inputs), expected.exp().numpy(), atol=1e-12)

    targets = load_diabetes(return_X_y=True)[1]
    model = quick(MbPARegressor, hidden_sizes=hidden_sizes, neighbors=5, local_rate=0.7, local_steps=4)
    model.fit(inputs, targets)
    lengths = model.network_.keys(torch.tensor(inputs)).double().square().sum(1)
    values = torch.tensor((targets - targets.mean()) / targets.std()).unsqueeze(1)
    rate = 0.7 / (1 + float(lengths.max()))
    expected = by_hand(model, values, inputs, rate, likelihood=Gaussian()) * targets.std() + targets.mean()
    assert np.allclose(model.predict(inputs), expected[:, 0].numpy(), rtol=1e-9)


def test_a_grown_classifier_equals_grow_by_hand() -> None:
    inputs, labels = iris()
    model = quick(local_steps=0).fit(inputs[50:], labels[50:])
    head = grow(model.network_.head, 3)
    model.partial_fit(inputs[:50], labels[:50])
    expected = head(model.network_.keys(torch.tensor(inputs)).double()).softmax(1)[:, [2, 0, 1]]
    assert np.allclose(model.predict_proba(inputs), expected.detach().numpy(), atol=1e-12)


@EITHER
def test_zero_steps_and_an_empty_memory_are_the_network(kind: type) -> None:
    inputs, labels = iris()
    model = quick(kind).fit(inputs, labels)
    ask = model.predict_proba if kind is MbPAClassifier else model.predict
    adapted = ask(inputs)
    model.set_params(local_steps=0)
    plain = ask(inputs)
    model.set_params(local_steps=10).memory_.clear()
    assert np.array_equal(ask(inputs), plain)
    assert not np.allclose(adapted, plain, atol=1e-3)


@EITHER
def test_rows_do_not_depend_on_each_other(kind: type) -> None:
    inputs, labels = load_digits(return_X_y=True)
    inputs, labels = np.repeat(inputs[:50], 2, axis=0), np.arange(100) % 4  # ties: each twice, with two labels
    model = quick(kind, neighbors=3).fit(inputs, labels)
    ask = model.predict_proba if kind is MbPAClassifier else model.predict
    whole, order = ask(inputs), np.random.default_rng(0).permutation(100)
    assert np.allclose(whole[::4], np.concatenate([ask(row[None]) for row in inputs[::4]]), atol=1e-10)
    assert np.allclose(whole[order], ask(inputs[order]), atol=1e-10)
    assert np.allclose(whole, ask(np.asfortranarray(inputs)[::-1])[::-1], atol=1e-10)


@EITHER
def test_random_state_decides_everything_and_torchs_is_left_alone(
    kind: type, rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    inputs, labels = iris()
    with rng_untouched():
        models = [quick(kind, random_state=seed).fit(inputs, labels).partial_fit(inputs, labels) for seed in (3, 3, 4)]
        one, same = (model.predict(inputs + 0.3) for model in models[:2])
        quick(kind, random_state=None).fit(inputs, labels)
    assert np.array_equal(one, same)
    weights = [model.network_.head.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_capacity_is_a_limit_and_no_claim() -> None:
    inputs, labels = iris()
    model = quick(capacity=10**12).fit(inputs, labels)
    assert model.memory_.capacity == 150
    assert quick(capacity=10**30).fit(inputs[:3], [0, 1, 1]).memory_.capacity == 3
    model.set_params(capacity=400).partial_fit(inputs[:1], labels[:1])
    assert (len(model.memory_), model.memory_.capacity) == (151, 300)
    for _ in range(2):
        model.partial_fit(inputs + 0.1, labels)
    assert len(model.memory_) == model.memory_.capacity == 400
    model.set_params(capacity=10)
    assert model.forget(inputs[:1] - 5) == 0
    assert len(model.memory_) == 400  # until the next write
    model.partial_fit(inputs[:3] + 0.2, labels[:3])
    assert len(model.memory_) == model.memory_.capacity == 10
    newest = torch.tensor(np.concatenate([inputs[-7:] + 0.1, inputs[:3] + 0.2]))
    order = model.memory_.written.argsort()
    assert torch.equal(model.memory_.keys[order], model.network_.keys(newest))
    model.set_params(capacity=None).partial_fit(inputs[:1], labels[:1])
    assert (len(model.memory_), model.memory_.capacity) == (11, 20)
    model.set_params(capacity=5).partial_fit(inputs, labels)
    assert (len(model.memory_), model.memory_.capacity) == (5, 5)


@EITHER
def test_a_refused_write_changes_nothing(kind: type) -> None:
    model = quick(kind, hidden_sizes=()).fit(*iris())
    memory, state = model.memory_, {name: tensor.clone() for name, tensor in model.memory_.state_dict().items()}
    for capacity in (None, 10):
        with pytest.raises(NonFiniteError, match="row 1"):
            model.set_params(capacity=capacity).partial_fit([[0.0] * 4, [1e30] * 4], [0, 1])
        assert model.memory_ is memory
    assert all(torch.equal(tensor, state[name]) for name, tensor in memory.state_dict().items())


@EITHER
def test_many_rows_are_predicted_a_part_at_a_time(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, labels = iris()
    model = quick(kind, hidden_sizes=()).fit(inputs, labels)
    ask = model.predict_proba if kind is MbPAClassifier else model.predict
    many, sizes = np.repeat(inputs, 20, axis=0), []
    keys = model.network_.keys
    monkeypatch.setattr(model.network_, "keys", lambda rows: sizes.append(len(rows)) or keys(rows))
    in_parts = ask(many)
    assert sizes == [1024, 1024, 952]
    monkeypatch.setattr(sklearn_memory, "_PREDICTED", 3000)
    assert np.allclose(in_parts, ask(many), atol=1e-12)
    monkeypatch.undo()
    many[2900] = 1e30
    with pytest.raises(NonFiniteError, match="row 2900 of X is so far away"):
        model.predict(many)


def test_the_memory_grows_or_keeps_to_its_capacity() -> None:
    inputs, labels = iris()
    generator = np.random.default_rng(0)
    growing, fixed = quick().fit(inputs, labels), quick(capacity=40).fit(inputs, labels)
    assert (len(growing.memory_), len(fixed.memory_)) == (150, 40)
    assert set(fixed.memory_.values.tolist()) == {0, 1, 2}  # although the data are sorted
    for step in range(5):
        more = inputs + generator.normal(size=inputs.shape)
        growing.partial_fit(more, labels)
        fixed.partial_fit(more[:30], labels[:30])
        assert len(growing.memory_) == 150 * (step + 2)
        assert len(fixed.memory_) == fixed.memory_.capacity == 40
    keys = growing.network_.keys(torch.tensor(more))
    latest = growing.memory_.read(keys, 1)
    assert torch.equal(latest.distances, torch.zeros(150, 1))
    assert int(growing.memory_.step) == 900
    first = growing.memory_.read(growing.network_.keys(torch.tensor(inputs)), 1).slots[:, 0]
    assert int(growing.memory_.written[first].max()) < 150
    assert torch.equal(growing.memory_.written[latest.slots[:, 0]], torch.arange(750, 900))  # their order has survived


def test_a_regressor_follows_a_change() -> None:
    inputs, targets = load_diabetes(return_X_y=True)
    model = MbPARegressor(random_state=0).fit(inputs[:300], targets[:300])
    before = model.score(inputs[300:], targets[300:] + 200)
    model.partial_fit(inputs[:300], targets[:300] + 200)
    after = model.score(inputs[300:], targets[300:] + 200)
    assert before < -1
    assert after > before + 2


@pytest.mark.parametrize("hidden_sizes", [(), (16,)])
def test_no_step_of_a_regressor_runs_away(hidden_sizes: tuple[int, ...]) -> None:
    inputs, targets = load_diabetes(return_X_y=True)
    model = quick(MbPARegressor, hidden_sizes=hidden_sizes, local_rate=1.99, local_steps=200).fit(inputs, targets)
    far = inputs[:5] * 1000
    model.partial_fit(far, targets[:5])
    assert np.abs(model.predict(inputs) - targets.mean()).max() < 20 * targets.std()
    assert np.isfinite(model.predict(far)).all()


def test_targets_may_have_several_columns() -> None:
    inputs, target = load_diabetes(return_X_y=True)
    targets = np.stack([target, 1e6 - 1e3 * target], 1)
    model = quick(MbPARegressor).fit(inputs, targets)
    assert model.predict(inputs).shape == targets.shape
    assert model.score(inputs, targets) > 0.5
    one = quick(MbPARegressor).fit(inputs, target[:, None])
    assert one.predict(inputs).shape == (442, 1)
    model.partial_fit(inputs[:1], [[0.0, 5e6]])
    assert model.predict(inputs[:1])[0, 1] > 2e6


@EITHER
def test_small_and_flat_data(kind: type) -> None:
    one = quick(kind).fit([[1.0, 2.0]], [3])
    assert one.predict([[1.0, 2.0]]).tolist() == pytest.approx([3], abs=1e-3)
    flat = quick(kind).fit(np.full((5, 2), 0.1), [1, 1, 1, 1, 1])  # fewer than neighbors, and constant
    assert flat.predict([[0.1, 0.1]]).tolist() == pytest.approx([1], abs=1e-3)
    assert flat.network_.scale.tolist() == [1, 1]
    inputs, labels = iris()
    wide = np.concatenate([inputs, np.full((150, 1), 1e9 / 3)], 1)
    assert quick(kind).fit(wide, labels).score(wide, labels) > 0.8
    single, double = (quick(kind).fit(inputs.astype(d), labels).predict(inputs) for d in (np.float32, np.float64))
    assert np.mean(np.isclose(single, double, atol=1e-2)) > 0.97


def test_text_of_any_length_and_no_labels_at_all() -> None:
    inputs, labels = iris(names=True)
    model = quick().fit(inputs[:100], labels[:100]).partial_fit(inputs[100:], np.array(["a much longer name"] * 50))
    assert model.classes_.tolist() == ["a much longer name", "setosa", "versicolor"]
    model.partial_fit(inputs[:1], labels[:1], classes=[])
    assert len(model.classes_) == 3


def folder_of(model: Any, tmp_path: Path) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [int, float, str, object, bool, np.int8])
@pytest.mark.parametrize("hidden_sizes", [(), (16,), (8, 4)])
def test_a_classifier_is_restored_bit_for_bit(dtype: type, hidden_sizes: tuple[int, ...], tmp_path: Path) -> None:
    inputs, numbers = iris()
    labels = (np.array(["x", "ab", "y"])[numbers] if dtype in {str, object} else numbers).astype(dtype)
    model = quick(hidden_sizes=hidden_sizes, neighbors=np.int64(4), local_rate=np.float64(3)).fit(inputs, labels)
    model.partial_fit(inputs[:9] + 0.1, labels[-9:])
    if dtype in {int, str}:
        model.partial_fit(inputs[:9] - 3, np.array(["new"] * 9 if dtype is str else [-5] * 9))
    model.feature_names_in_ = np.array(["a", "b", "c", "ü"], dtype=object)
    folder = folder_of(model, tmp_path)
    again = MbPAClassifier.load(folder)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    assert again.get_params() == model.get_params()
    assert again.classes_.dtype == model.classes_.dtype
    assert again.feature_names_in_.tolist() == ["a", "b", "c", "ü"]
    for part in (model, again):
        del part.feature_names_in_
    assert np.array_equal(again.predict_proba(inputs), model.predict_proba(inputs))
    for part in (model, again):
        part.partial_fit(inputs[20:30] + 0.2, labels[:10])
    assert np.array_equal(again.predict_proba(inputs), model.predict_proba(inputs))
    assert np.array_equal(again.predict(inputs), model.predict(inputs))
    assert clone(again).fit(inputs, labels).score(inputs, labels) > 0.8


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_a_regressor_is_restored_bit_for_bit(columns: int, tmp_path: Path) -> None:
    inputs, target = load_diabetes(return_X_y=True)
    targets = np.stack([target / 3 + i for i in range(columns)], 1) if columns else target / 3
    model = quick(MbPARegressor, capacity=100).fit(inputs, targets).partial_fit(inputs[:7], targets[:7])
    again = MbPARegressor.load(folder_of(model, tmp_path))
    assert np.array_equal(again.predict(inputs), model.predict(inputs))
    again.partial_fit(inputs[:50] + 0.01, targets[:50]).save(tmp_path / "model")  # in place of the first
    model.partial_fit(inputs[:50] + 0.01, targets[:50])
    assert np.array_equal(MbPARegressor.load(tmp_path / "model").predict(inputs), model.predict(inputs))


def test_only_a_whole_save_of_this_class_is_loaded(tmp_path: Path) -> None:
    inputs, labels = iris()
    model = quick().fit(inputs, labels)
    folder = folder_of(model, tmp_path)
    with pytest.raises(FormatError, match=r"holds a MbPAClassifier, need a MbPARegressor"):
        MbPARegressor.load(folder)
    with pytest.raises(MissingDataError, match="no folder"):
        MbPAClassifier.load(tmp_path / "nowhere")
    with pytest.raises(SettingError, match=r"MbPAClassifier for scikit-learn \(use MbPAClassifier\.load of recollect"):
        recollect.load(folder)
    recollect.save(model.memory_, tmp_path / "memory")
    with pytest.raises(FormatError, match=r"no estimator\. Use recollect\.load"):
        MbPAClassifier.load(tmp_path / "memory")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(FormatError, match="holds no save"):
        model.save(tmp_path / "other")
    (tensors,) = folder.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    with pytest.raises(FormatError, match="damaged"):
        MbPAClassifier.load(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("sizes",), [4, 3]),
        (("sizes",), "none"),
        (("learned",), {}),
        (("learned", "labels"), [1, 2]),
        (("learned", "dtype"), "no such"),
        (("learned", "reference"), -1.0),
        (("learned", "reference"), "long"),
        (("settings",), {"depth": 3}),
    ],
)
def test_what_contradicts_itself_is_not_loaded(path: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    inputs, labels = iris()
    folder = folder_of(quick().fit(inputs, labels), tmp_path)
    description, tensors = recollect.persistence.snapshot.read(folder)
    inside = {key: description[key] for key in ("model", "parameters", "evaluating", "estimator")}
    part = inside["estimator"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    recollect.persistence.snapshot.write(folder, inside, tensors)
    with pytest.raises(FormatError, match="cannot be restored"):
        MbPAClassifier.load(folder)


def test_a_save_of_an_older_version_says_so(tmp_path: Path) -> None:
    folder = folder_of(quick().fit(*iris()), tmp_path)
    description, tensors = recollect.persistence.snapshot.read(folder)
    inside = {key: description[key] for key in ("model", "parameters", "evaluating", "estimator")}
    del inside["estimator"]["learned"]["reference"]
    recollect.persistence.snapshot.write(folder, inside, tensors)
    with pytest.raises(FormatError, match=r"no save of an older recollect does\. Fit and save it again\."):
        MbPAClassifier.load(folder)


def test_a_random_state_object_cannot_be_saved(tmp_path: Path) -> None:
    model = quick(random_state=np.random.RandomState(0)).fit(*iris())
    with pytest.raises(SettingError, match=r"random_state must be a number or None to be saved, got RandomState"):
        model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(NotFittedError):
        quick().save(tmp_path / "model")


@EITHER
def test_pickling_works_too(kind: type) -> None:
    inputs, labels = iris()
    model = quick(kind).fit(inputs, labels)
    again = pickle.loads(pickle.dumps(model))
    for part in (model, again):
        part.partial_fit(inputs + 0.1, labels)
    assert np.array_equal(again.predict(inputs), model.predict(inputs))


@EITHER
def test_pipelines_searches_and_cross_validation(kind: type) -> None:
    order = np.random.default_rng(0).permutation(150)
    inputs, labels = (part[order] for part in iris())
    grid = {"model__neighbors": np.arange(2, 6, 2), "model__hidden_sizes": [(), (8,), [8]]}
    pipeline = make_pipeline(StandardScaler(), quick(kind))
    pipeline.steps[-1] = ("model", pipeline.steps[-1][1])
    search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(inputs[::2], labels[::2])
    assert search.best_score_ > 0.6
    assert search.score(inputs[1::2], labels[1::2]) > 0.8
    scores = cross_val_score(quick(kind), inputs, labels, cv=3, error_score="raise")
    assert scores.shape == (3,)
    copy = clone(search.best_estimator_)
    assert copy.get_params()["model__neighbors"] == search.best_params_["model__neighbors"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_sizes": 128}, r"hidden_sizes must be a tuple of widths, such as \(128,\), got 128"),
        ({"hidden_sizes": (8, 0)}, "each of hidden_sizes must be a whole number above 0, got 0"),
        ({"neighbors": 0}, "neighbors must be a whole number above 0, got 0"),
        ({"neighbors": 2.5}, "neighbors must be a whole number above 0, got 2.5"),
        ({"local_steps": -1}, "local_steps must be a whole number of at least 0, got -1"),
        ({"local_rate": -0.1}, "local_rate must be a finite number of at least 0, got -0.1"),
        ({"capacity": 0}, "capacity must be a whole number above 0, got 0"),
        ({"epochs": 0}, "epochs must be a whole number above 0"),
        ({"batch_size": True}, "batch_size must be a whole number above 0"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number of at least 0"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_settings_are_checked_when_they_are_used(settings: dict[str, Any], message: str) -> None:
    inputs, labels = iris()
    for kind in (MbPAClassifier, MbPARegressor):
        model = kind(**settings)
        with pytest.raises(SettingError, match=message):
            model.fit(inputs, labels)
        fitted = quick(kind).fit(inputs, labels).set_params(**settings)
        for use in (lambda model=fitted: model.predict(inputs), lambda model=fitted: model.partial_fit(inputs, labels)):
            with pytest.raises(SettingError, match=message):
                use()


def test_large_local_rates_are_for_classifiers() -> None:
    inputs, labels = iris()
    assert quick(local_rate=50.0).fit(inputs, labels).score(inputs, labels) > 0.8
    with pytest.raises(SettingError, match=r"local_rate must be below 2 here, as larger steps may run away, got 2\.0"):
        quick(MbPARegressor, local_rate=2.0).fit(inputs, labels)


def test_wrong_data_are_refused_and_nothing_of_them_is_kept() -> None:
    inputs, labels = iris()
    model = quick().fit(inputs, labels)
    before = model.predict_proba(inputs)
    with pytest.raises(LabelError, match="labels must be numbers like 0, got 'seven'"):
        model.partial_fit(inputs[:1], ["seven"])
    with pytest.raises(LabelError, match="labels must be numbers like 0, got 'seven'"):
        model.partial_fit(inputs[:1], [0], classes=["seven"])
    with pytest.raises(LabelError, match="labels must be numbers like 0, got True"):
        model.partial_fit(inputs[:1], [True])
    with pytest.raises(LabelError, match="labels must be text like"):
        quick().partial_fit(inputs[:2], ["a", "b"], classes=[1, 2])
    with pytest.raises(ValueError, match="Unknown label type"):
        model.partial_fit(inputs, labels + 0.5)
    with pytest.raises(ValueError, match="NaN"):
        model.partial_fit(np.full((1, 4), np.nan), [1])
    with pytest.raises(ValueError, match="has 3 features, but MbPAClassifier is expecting 4"):
        model.partial_fit(inputs[:, :3], labels)
    linear = quick(hidden_sizes=()).fit(inputs, labels)
    for use in (lambda: linear.partial_fit([[1e30] * 4], [7]), lambda: linear.predict([[1e30] * 4])):
        with pytest.raises(NonFiniteError, match="row 0"):
            use()
    assert linear.classes_.tolist() == model.classes_.tolist() == [0, 1, 2]
    assert len(linear.memory_) == len(model.memory_) == 150
    assert np.array_equal(model.predict_proba(inputs), before)


def test_wrong_targets_are_refused() -> None:
    inputs, labels = iris()
    model = quick(MbPARegressor).fit(inputs, labels)
    with pytest.raises(ShapeError, match=r"y must have rows of shape \(\) as in fit, got \(2,\)"):
        model.partial_fit(inputs, np.stack([labels, labels], 1))
    with pytest.raises(ValueError, match="infinity"):
        model.partial_fit(inputs, np.full(150, np.inf))
    with pytest.raises(NonFiniteError, match="column 0 holds numbers whose squares overflow float64"):
        quick(MbPARegressor).fit(inputs, labels * 1e200)
    with pytest.raises(NonFiniteError, match="column 2"):
        quick(MbPARegressor).fit(inputs * [1, 1, 1e200, 1], labels)
    with pytest.warns(DataConversionWarning):
        quick().fit(inputs, labels[:, None])


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    path = Path(recollect.__file__).parent / "integrations" / "sklearn.py"
    spec = importlib.util.spec_from_file_location("without_scikit_learn", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(MissingExtraError, match=r"pip install 'recollect\[sklearn\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
