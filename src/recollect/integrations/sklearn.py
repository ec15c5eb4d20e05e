"""``MbPAClassifier`` and ``MbPARegressor``: a network with an episodic memory as estimators of scikit-learn.

    model = MbPAClassifier(random_state=0).fit(X, y)     # trains a small network, and remembers the examples
    model.partial_fit(X_new, y_new)                      # remembers more, of classes old and new; trains nothing
    model.forget(X_wrong)                                # takes back what it learned for these inputs
    model.predict(X_test)                                # the head fits itself to the memories near each row
    model.save("model"), MbPAClassifier.load("model")    # JSON and safetensors, no pickle

Who imports this module has or wants scikit-learn, so it is imported at the top, where base classes must be.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from recollect.adaptation import Adaptation
from recollect.errors import MissingExtraError, ShapeError
from recollect.heads import grow
from recollect.integrations import sklearn_memory as store
from recollect.integrations import sklearn_network as inner
from recollect.integrations.sklearn_folder import Saveable
from recollect.likelihoods import Categorical, Gaussian, Likelihood
from recollect.memory import EpisodicMemory

try:
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import Tags, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise MissingExtraError(
        "recollect.integrations.sklearn needs scikit-learn 1.6 or newer: pip install 'recollect[sklearn]'."
    ) from error


class _Estimator(Saveable, BaseEstimator):
    """What classifier and regressor share: settings, one network, one memory, and a folder to keep them in."""

    _likelihood: Likelihood
    _loss: inner.Loss
    _too_fast: float  # what local_rate must be below
    _adaptation: Callable[[float, int, float], Adaptation]  # from local_rate, local_steps and the reference
    _typical: Callable[[Tensor], Tensor]  # which of the keys' squared lengths in ``fit`` sets the scale of steps
    _reference: float  # that squared length

    random_state: Any
    network_: inner.Network
    memory_: EpisodicMemory

    def forget(self, X: Any) -> int:
        """Takes back all that ``fit`` and ``partial_fit`` wrote to the memory for these inputs, and for no others.

        To correct a label, ``forget`` its input, then teach the right label by ``partial_fit``. The network, which
        ``fit`` trained, stays as it is, and so does an output for a class of which nothing is left. With nothing left
        at all the network predicts by itself.

        An input is the same where the memory's key, in float32, is exactly equal: it must be the very numbers that
        were taught. Inputs that the network cannot tell apart, such as some very far ones, go together.

        Args:
            X: Inputs, ``(n, features)``, as in ``fit``. Those that the memory does not hold are passed over.

        Returns:
            How many memories went.

        Raises:
            ValueError, TypeError: From scikit-learn, if ``X`` is not that, or nothing was fitted.
        """
        check_is_fitted(self)
        inputs = torch.tensor(validate_data(self, X, reset=False, dtype=np.float64, order="C"))
        slots = store.equal_slots(self.memory_, self.network_.keys(inputs))
        self.memory_.forget(slots)
        return len(slots)

    def _learn(self, inputs: Float[Tensor, "n f"], values: Shaped[Tensor, "n *c"], outputs: int) -> None:
        """Trains a new network and writes the examples to a new memory."""
        settings = self._settings()
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        network = inner.Network(inputs.shape[1], *settings.hidden_sizes, outputs, generator=generator)
        inner.train(network, inputs, values, self._loss, settings=settings, generator=generator)
        keys = network.keys(inputs)
        self.network_, self.memory_ = network, store.filled_memory(keys, values, settings.capacity, generator)
        self._reference = float(self._typical(store.squared_lengths(keys)))

    def _remember(self, inputs: Float[Tensor, "n f"], values: Shaped[Tensor, "n *c"]) -> None:
        capacity = self._settings().capacity
        self.memory_ = store.remember(self.memory_, self.network_.keys(inputs), values, capacity)

    def _adapted(self, X: Any) -> Float[Tensor, "n c"]:
        """Returns what ``MbPA`` predicts for each row."""
        check_is_fitted(self)
        settings = self._settings()
        inputs = validate_data(self, X, reset=False, dtype=np.float64, order="C")
        adaptation = self._adaptation(settings.local_rate, settings.local_steps, self._reference)
        how = {"neighbors": settings.neighbors, "adaptation": adaptation, "likelihood": self._likelihood}
        return store.predict(self.network_, self.memory_, inputs, **how)

    def _settings(self) -> inner.Settings:
        return inner.Settings.checked(self.get_params(deep=False), rate_below=self._too_fast)


class MbPAClassifier(ClassifierMixin, _Estimator):
    """A network with an episodic memory, which learns new classes from a few examples at any time.

    ``fit`` trains a network (standardization, hidden layers of tanh, a softmax layer) and writes what the softmax
    layer saw of each example, and its label, to a memory. ``predict`` is MbPA: for each row the softmax layer first
    takes ``local_steps`` steps of gradient descent on the ``neighbors`` nearest memories, and forgets them afterwards.
    ``partial_fit`` writes to the memory and trains nothing. What it has written counts at once. ``forget`` takes back.

    Paper: Section 2, Algorithm 1. The defaults were chosen by cross-validation on training rows of the data sets
    digits, iris and wine of scikit-learn, with and without one class that only ``partial_fit`` saw.

    Args:
        hidden_sizes: Widths of the hidden layers. With ``()`` the memory's keys are the standardized features, as fits
            embeddings that another network made.
        neighbors: How many memories the softmax layer is fitted to, K.
        local_rate: The step size, in units that depend on neither the width nor the scale of the keys: 1 moves the
            logits of a memory of the median length in ``fit`` by as much as its label is off, as the only neighbor.
        local_steps: The number of steps. With 0 the network predicts by itself.
        capacity: The most examples that the memory holds; then the oldest go. With None it grows without limit.
        epochs: How often ``fit`` goes through the examples.
        batch_size: How many examples one step of training sees.
        learning_rate: The first rate of AdamW, from which it falls to zero along a line.
        weight_decay: That of AdamW.
        random_state: Determines weights and order: a number for the same result in every run. The random state of
            torch is never used.

    Attributes:
        classes_: The labels in ascending order.
        network_: The trained network; ``network_.keys`` makes the keys, ``network_.head`` is the softmax layer.
        memory_: The ``EpisodicMemory``. Its labels count ``labels_``, in the order in which they came up.
        n_features_in_, feature_names_in_: As in every estimator of scikit-learn.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = MbPAClassifier(random_state=0).fit(X[:100], y[:100])
        >>> model = model.partial_fit(X[100:120], y[100:120])  # 20 examples of a class that it has never seen
        >>> model.classes_, bool(model.score(X[120:], y[120:]) > 0.8)
        (array([0, 1, 2]), True)
    """

    _likelihood = Categorical()
    _loss = staticmethod(functional.cross_entropy)
    _too_fast = math.inf  # a softmax's gradient is bounded: long keys do no harm
    _typical, _adaptation = staticmethod(torch.median), staticmethod(store.equal_steps)

    def __init__(
        self,
        hidden_sizes: Any = (128,),
        *,
        neighbors: Any = 8,
        local_rate: Any = 8.0,
        local_steps: Any = 10,
        capacity: Any = None,
        epochs: Any = 40,
        batch_size: Any = 32,
        learning_rate: Any = 3e-3,
        weight_decay: Any = 1e-2,
        random_state: Any = None,
    ) -> None:
        self.hidden_sizes = hidden_sizes
        self.neighbors = neighbors
        self.local_rate = local_rate
        self.local_steps = local_steps
        self.capacity = capacity
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "MbPAClassifier":
        """Trains a new network and fills a new memory.

        Args:
            X: The examples, ``(n, features)``; dense and finite.
            y: A label for each: text, whole numbers or truth values, ``(n,)``.

        Raises:
            SettingError: If a setting is out of its range.
            ValueError, TypeError: From scikit-learn, if ``X`` or ``y`` is not that.
        """
        self._settings()  # refused before anything of an earlier fit changes
        inputs, labels = self._check_examples(X, y, reset=True)
        self._learn_labels(inputs, labels, labels)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> "MbPAClassifier":
        """Writes examples to the memory, of classes old and new; without a ``fit`` before, it does what ``fit`` does.

        Every example is kept, those of equal inputs too: to correct a label, ``forget`` its input first. (Of equally
        near memories the oldest are the neighbors.) A class that was never seen gets an output of its own. As the
        softmax is shared, that may change a prediction where no example of the class is near, but it hardly ever does.

        *Differs from MLPClassifier*: nothing is trained after the first call, so nothing is forgotten either, and
        ``classes`` may be left out: new ones may come at any time.

        Args:
            X, y: As in ``fit``.
            classes: Labels that are to be among ``classes_`` although they may not be in ``y`` yet.

        Raises:
            LabelError: If labels are text where they were numbers before, or the reverse; and what ``fit`` raises.
        """
        new = "network_" not in vars(self)
        inputs, labels = self._check_examples(X, y, reset=new)
        known = labels[:0] if new else self.labels_
        announced = known[:0] if classes is None else self._checked_labels(classes)
        every = np.concatenate([known, inner.same_kind(labels, known), inner.same_kind(announced, labels)])
        if new:
            self._learn_labels(inputs, labels, every)
            return self
        unseen = np.setdiff1d(every, known)
        grown = np.concatenate([known, unseen]).astype(every.dtype)
        order = np.argsort(grown)
        values = order[np.searchsorted(grown, labels, sorter=order)]
        self._remember(inputs, torch.tensor(values))
        self.network_.head = grow(self.network_.head, len(grown))
        self.labels_, self.classes_ = grown, grown[order]
        return self

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n c"]:
        """Returns the probability of each of ``classes_``, ``(n, classes)``."""
        return self._adapted(X).exp().numpy()[:, np.argsort(self.labels_)]

    def predict(self, X: Any) -> Shaped[np.ndarray, " n"]:
        """Returns the most probable label of each row, ``(n,)``."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def _check_examples(self, X: Any, y: Any, *, reset: bool) -> tuple[Tensor, np.ndarray]:
        inputs, labels = validate_data(self, X, y, reset=reset, dtype=np.float64, order="C")
        check_classification_targets(labels)
        return torch.tensor(inputs), np.asarray(labels)

    @staticmethod
    def _checked_labels(classes: Any) -> np.ndarray:
        labels = np.ravel(np.asarray(classes))
        if len(labels):
            check_classification_targets(labels)
        return labels

    def _learn_labels(self, inputs: Tensor, labels: np.ndarray, every: np.ndarray) -> None:
        classes = np.unique(every)
        self._learn(inputs, torch.tensor(np.searchsorted(classes, labels)), len(classes))
        self.labels_ = self.classes_ = classes

    def _learned(self) -> dict[str, Any]:
        return {"labels": self.labels_.tolist(), "dtype": self.labels_.dtype.str}

    def _restore_learned(self, learned: dict[str, Any]) -> None:
        if len(learned["labels"]) != self.network_.head.out_features:
            raise ValueError(f"it has {len(learned['labels'])} labels")
        self.labels_ = np.array(learned["labels"], dtype=learned["dtype"])
        self.classes_ = np.sort(self.labels_)


class MbPARegressor(RegressorMixin, _Estimator):
    """A network with an episodic memory, which follows a changing world as soon as it is told.

    ``fit`` trains a network (standardization, hidden layers of tanh, a linear layer) on standardized targets and
    writes what the linear layer saw of each example, and its target, to a memory. ``predict`` is MbPA: for each row
    the linear layer first takes ``local_steps`` steps of gradient descent on the ``neighbors`` nearest memories, and
    forgets them afterwards. ``partial_fit`` writes to the memory and trains nothing.

    Paper: Algorithm 1 with a mean squared error (Appendix E). The defaults were chosen by cross-validation on training
    rows of scikit-learn's diabetes data and ``make_friedman1``.

    Args:
        hidden_sizes, neighbors, local_steps, capacity, epochs, batch_size, learning_rate, weight_decay,
            random_state: As in ``MbPAClassifier``.
        local_rate: The step size as a part of the one that fits, in a single step, the longest key in ``fit``, or the
            longest neighbor of a row where that is longer. Up to 1 no step overshoots, whatever the scale of the data
            and whatever comes later; 2 and more is refused, as it may run away.

    Attributes:
        network_, memory_, n_features_in_, feature_names_in_: As in ``MbPAClassifier``. The memory's values are
            standardized targets.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = MbPARegressor(random_state=0).fit(X[:300], y[:300])
        >>> before = model.predict(X[300:301])
        >>> after = model.partial_fit(X[300:301], before + 100).predict(X[300:301])
        >>> bool(after > before + 50)
        True
    """

    _likelihood = Gaussian()
    _loss = staticmethod(functional.mse_loss)
    _too_fast, _typical, _adaptation = 2.0, staticmethod(torch.max), store.Bounded

    def __init__(
        self,
        hidden_sizes: Any = (128,),
        *,
        neighbors: Any = 16,
        local_rate: Any = 0.5,
        local_steps: Any = 10,
        capacity: Any = None,
        epochs: Any = 40,
        batch_size: Any = 32,
        learning_rate: Any = 3e-3,
        weight_decay: Any = 1e-2,
        random_state: Any = None,
    ) -> None:
        self.hidden_sizes = hidden_sizes
        self.neighbors = neighbors
        self.local_rate = local_rate
        self.local_steps = local_steps
        self.capacity = capacity
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "MbPARegressor":
        """Trains a new network and fills a new memory.

        Args:
            X: The examples, ``(n, features)``; dense and finite.
            y: The targets, ``(n,)`` or ``(n, outputs)``.

        Raises:
            SettingError, NonFiniteError: If a setting is out of its range, or the square of a number overflows.
            ValueError, TypeError: From scikit-learn, if ``X`` or ``y`` is not that.
        """
        self._settings()  # refused before anything of an earlier fit changes
        inputs, targets = self._check_examples(X, y, reset=True)
        columns = targets.reshape(len(targets), -1)
        mean, scale = inner.mean_and_scale(columns)
        self._learn(inputs, (columns - mean) / scale, columns.shape[1])
        self._shape, self._mean, self._scale = tuple(targets.shape[1:]), mean, scale
        return self

    def partial_fit(self, X: Any, y: Any) -> "MbPARegressor":
        """Writes examples to the memory; without a ``fit`` before, it does what ``fit`` does.

        Every example is kept, those of equal inputs too: to correct a target, ``forget`` its input first. Nothing is
        trained after the first call.

        Raises:
            ShapeError: If a target is not of the shape that it had in ``fit``; and what ``fit`` raises.
        """
        if "network_" not in vars(self):
            return self.fit(X, y)
        inputs, targets = self._check_examples(X, y, reset=False)
        if targets.shape[1:] != self._shape:
            raise ShapeError(f"y must have rows of shape {self._shape} as in fit, got {tuple(targets.shape[1:])}.")
        self._remember(inputs, (targets.reshape(len(targets), -1) - self._mean) / self._scale)
        return self

    def predict(self, X: Any) -> Float[np.ndarray, "n *c"]:
        """Returns the expected target of each row, of the shape that ``y`` had."""
        columns = self._adapted(X) * self._scale + self._mean
        return columns.reshape(len(columns), *self._shape).numpy()

    def _check_examples(self, X: Any, y: Any, *, reset: bool) -> tuple[Tensor, Tensor]:
        given = {"dtype": np.float64, "order": "C", "multi_output": True, "y_numeric": True}
        inputs, targets = validate_data(self, X, y, reset=reset, **given)
        return torch.tensor(inputs), torch.tensor(np.asarray(targets, dtype=np.float64))

    def _learned(self) -> dict[str, Any]:
        return {"shape": self._shape, "mean": self._mean.tolist(), "scale": self._scale.tolist()}

    def _restore_learned(self, learned: dict[str, Any]) -> None:
        mean, scale = (torch.tensor(learned[name], dtype=torch.float64) for name in ("mean", "scale"))
        if not len(mean) == len(scale) == self.network_.head.out_features == math.prod(learned["shape"]):
            raise ValueError(f"it has targets of shape {learned['shape']}, and {len(mean)} means of them")
        self._shape, self._mean, self._scale = tuple(learned["shape"]), mean, scale

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
