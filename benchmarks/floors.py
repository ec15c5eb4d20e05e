"""The least work that a computation needs, in multiply-adds and in bytes from memory.

These are lower bounds of the method, not of the problem: for the adaptation by gradient descent they count the
factored form, which is cheaper than any form that holds a weight matrix for each query. What is made on the way
(logits, coefficients, products of keys) can stay in the caches and counts no bytes; elementwise work and the
selection of the nearest count nothing. Numbers are float32, of 4 bytes.
"""

import itertools
import math

from benchmarks.case import Work

FLOAT = 4


def together(*parts: Work) -> Work:
    """Returns the work of several computations that only read, one after the other."""
    return Work(sum(part.multiply_adds for part in parts), sum(part.bytes for part in parts))


def search(slots: int, size: int, batch: int) -> Work:
    """Exact search: each query meets each key in a product, and all keys pass once, however many queries there are."""
    return Work(batch * slots * size, FLOAT * slots * size)


def write(rows: int, size: int, *, ring: int) -> Work:
    """Storing rows in a ring of ``ring`` slots: each is read once and written once."""
    return Work(0, 2 * FLOAT * rows * size, moves="copy", footprint=FLOAT * ring * size)


def linear(size: int, classes: int, batch: int, neighbors: int, *, steps: int) -> Work:
    """A linear head under gradient descent.

    For each query the neighbors' logits under the given head (K C d), the products of the keys with each other where
    a second step needs them (K K d) and with the query (K d), in all steps but the first the change of the logits
    (K K C), and at the end the query's own logits (C d) and their change (K C). The neighbors' keys are read for each
    query, the head once for all of them, and the outputs are written.
    """
    later = steps - 1
    base = neighbors * classes * size + (neighbors * neighbors * size if later else 0) + neighbors * size
    change = later * neighbors * neighbors * classes + neighbors * classes + classes * size
    read = neighbors * size + size + classes
    return Work(batch * (base + change), FLOAT * (batch * read + classes * size))


def linear_kept(size: int, classes: int, batch: int, neighbors: int, *, steps: int, entries: int) -> Work:
    """The same where the given head's outputs at the entries are kept beside them: read, not computed.

    Args:
        size: d.
        classes: C.
        batch: How many queries.
        neighbors: K.
        steps: T.
        entries: How many different ones the batch has as neighbors; each is read once.
    """
    computed = linear(size, classes, batch, neighbors, steps=steps)
    kept = batch * neighbors * classes * size
    read = entries * (size + classes) + batch * (size + classes)
    return Work(computed.multiply_adds - kept, FLOAT * (read + classes * size))


def mlp(sizes: tuple[int, ...], batch: int, neighbors: int, *, steps: int) -> Work:
    """An MLP under gradient descent in all layers, its first layer in the factored form of ``linear``.

    Each later layer of i inputs and o outputs has a weight matrix for each query: per step the outputs, the gradient
    at the inputs and the gradient of the weights (3 K i o), once the query's outputs (i o).
    """
    first = linear(sizes[0], sizes[1], batch, neighbors, steps=steps)
    later = sum(inputs * outputs for inputs, outputs in itertools.pairwise(sizes[1:]))
    arithmetic = batch * (3 * steps * neighbors + 1) * later
    return Work(first.multiply_adds + arithmetic, first.bytes + FLOAT * later)


def elementwise(size: int, classes: int, batch: int, neighbors: int, *, steps: int, states: int) -> Work:
    """A linear head under a rule that is no sum over the neighbors (rmsprop, adam), so that each query has a matrix.

    Per step the logits and the gradient (2 K C d), at the end the query's logits (C d). The softmax needs all logits
    before any weight moves, so weights and states pass through the processor in each step, read and written.

    Args:
        size: d.
        classes: C.
        batch: How many queries.
        neighbors: K.
        steps: T.
        states: How many numbers the rule keeps for each weight.
    """
    weights = classes * size
    moved = 2 * FLOAT * (1 + states) * weights
    arithmetic = batch * (2 * steps * neighbors + 1) * weights
    return Work(arithmetic, batch * steps * moved, moves="copy", footprint=moved / 2)


def convolution(
    positions: int, weights: int, hidden: int, classes: int, batch: int, neighbors: int, steps: int
) -> Work:
    """A convolution, ReLU and a linear layer under gradient descent, with weights for each query.

    Args:
        positions: Places of the filter on one image.
        weights: Weights of the convolution; its inputs need no gradient: 2 K positions weights per step.
        hidden: Inputs of the linear layer: 3 K hidden classes per step.
        classes: Its outputs.
        batch: How many queries.
        neighbors: K.
        steps: T.
    """
    arithmetic = positions * weights * (2 * neighbors * steps + 1) + hidden * classes * (3 * neighbors * steps + 1)
    return Work(batch * arithmetic, FLOAT * (weights + hidden * classes))


def epoch(sizes: tuple[int, ...], examples: int, *, batch: int) -> Work:
    """Training an MLP for one epoch, with one importance and one anchor for each weight.

    For each example the outputs and the gradients of the weights, and the gradients at the inputs of all layers but the
    first. In each step weights, importances and anchors are read and weights written; each example is read once.
    """
    first, *later = _weights(sizes)
    weights = first + sum(later)
    moved = math.ceil(examples / batch) * 4 * weights + examples * sizes[0]
    return Work(examples * (2 * weights + sum(later)), FLOAT * moved, footprint=FLOAT * 3 * weights)


def importances(sizes: tuple[int, ...], examples: int, *, directions: int) -> Work:
    """How much each weight of an MLP matters: a power of its gradient, summed over examples and directions.

    For each example the outputs, for each direction the gradients at the layers' outputs, which go through all layers
    but the first, and for all directions together one product of powers, as large as the outputs'.
    """
    first, *later = _weights(sizes)
    each = 2 * (first + sum(later)) + directions * sum(later)
    return Work(examples * each, FLOAT * examples * sizes[0])


def _weights(sizes: tuple[int, ...]) -> list[int]:
    return [inputs * outputs for inputs, outputs in itertools.pairwise(sizes)]


def sample(rows: int, size: int, *, capacity: int) -> Work:
    """Keeping a uniform sample of a stream: all rows until it is full, later a row with the chance capacity / seen."""
    stored = capacity * (1 + math.log(rows / capacity))
    return Work(0, 2 * FLOAT * stored * size, moves="copy", footprint=FLOAT * capacity * size)


def cache(size: int, classes: int, batch: int, *, window: int) -> Work:
    """Mixing a model with a neural cache: each word's logits (C d) and its products with the window's keys (N d).

    The softmax layer and the keys are read once for all words, whose own keys are written. What the window's words add
    up to counts nothing.
    """
    return Work(batch * (classes + window) * size, FLOAT * (classes + window + 2 * batch) * size)


def projection(inputs: int | None, outputs: int, batch: int) -> Work:
    """A linear layer between key and head, once for each key that is read; none where ``inputs`` is None."""
    weights = 0 if inputs is None else inputs * outputs
    return Work(batch * weights, FLOAT * weights)


def recurrent(inputs: int, hidden: int, words: int) -> Work:
    """An LSTM that reads one text: all its weights meet each word, and those on its own outputs pass for each word."""
    weights = 4 * hidden * (inputs + hidden)
    return Work(words * weights, FLOAT * 4 * hidden * (inputs + words * hidden))


def maml(first: int, rest: int, *, tasks: int, support: int, queries: int, numbers: int) -> Work:
    """The gradient of MAML with one step, through that step.

    Of each layer ``y = W x`` three products belong to a gradient: y, dW and dx, and to the gradient through a gradient
    two for each of them. The first layer needs neither dx nor the derivatives by x: of its nine products four remain,
    and of three two. The parameters are read and their gradients written once: each task's own can stay in the caches.

    Args:
        first: Multiply-adds of the first layer, for one input.
        rest: Of the others.
        tasks: How many.
        support: Examples of a task.
        queries: Likewise.
        numbers: All parameters.
    """
    products = support * (4 * first + 9 * rest) + queries * (2 * first + 3 * rest)
    return Work(tasks * products, 2 * FLOAT * numbers)


def mann(
    inputs: int, hidden: int, outputs: int, *, slots: int, width: int, reads: int, episodes: int, steps: int
) -> Work:
    """The gradient of a MANN with an LSTM: three products for each one forward, two for what meets the inputs.

    At each step the gates meet inputs, reads and hidden units, the heads and the output layer the hidden units, and
    each head writes to, compares with and reads from all slots. The weights are read and their gradients written once.
    """
    entering, read = 4 * hidden * inputs, reads * width
    weights = 4 * hidden * (read + hidden) + hidden * reads * (width + 1) + (hidden + read) * outputs
    products = 2 * entering + 3 * (weights + 3 * slots * read)
    return Work(episodes * steps * products, 2 * FLOAT * (entering + weights))
