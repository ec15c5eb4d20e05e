"""``MAML``: a start for a network's parameters from which a few steps on a new task's examples suffice.

``MetaSGD`` learns the rates of those steps as well.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.autograd.graph import Node

from recollect.adaptation.rules import Params, Rule
from recollect.adaptation.workspace import workspace
from recollect.errors import (
    DtypeError,
    HeadError,
    LabelError,
    NonFiniteError,
    SettingError,
    ShapeError,
    require,
    require_number,
    require_tensor,
    require_whole,
)
from recollect.likelihoods import Categorical, Gaussian, Likelihood
from recollect.meta.batched import Batched

_BUDGET = 21 * 2**18  # bytes of parameter copies and inputs at once, for each thread (measured)


class MAML(nn.Module):
    """Adapts a network to each task by ``steps`` steps of a rule on its support, and answers the task's queries.

    With L the mean of ``-log p`` over a task's support, each task's parameters start at the network's own, theta:

        theta_0 = theta,    theta_{s+1} = theta_s + rule(grad L(theta_s))

    The outputs are differentiable in theta through all steps, and in what a learned rule learns: train both on any
    loss of the outputs at the queries.

    Paper: Finn et al. 2017, Eq. (1), Algorithm 2; first order: Section 5.2. With ``MetaSGD`` as the rule it is
    Meta-SGD (Li et al. 2017), with the last layer as ``parameters`` ANIL (Raghu et al. 2020).

    All tasks run side by side. The gradients are exact, also through normalization layers. Batch and instance
    normalization use the statistics of the inputs at hand, in training and in the test, as the paper's code does:
    running statistics are neither read nor changed, and the outputs at a task's queries depend on its other queries
    (the evaluation is transductive). Nothing depends on the network's mode.

    *Differs from the paper:* in regression the likelihood is ``Gaussian(variance=0.5)`` for the gradients of the mean
    squared error (of one output); with the usual variance of 1 they are half as large.

    Args:
        net: Maps a task's inputs ``(n, *)`` to outputs ``(n, c)``. Without dropout, and without ``nn.LSTM`` and its
            like. Attention must run by ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, or in first order.
        rule: How a gradient becomes a step; see ``recollect.rules``, and ``MetaSGD``. One that is an ``nn.Module``
            becomes a part of this one. (Paper: ``rules.sgd``, for 5-way Omniglot at a rate of 0.4, for the sinusoid
            and mini-ImageNet at 0.01.)
        steps: The number of steps. (Paper: 1 for 5-way Omniglot and the sinusoid, 5 for 20-way and mini-ImageNet.)
        first_order: Whether gradients and losses on the support are taken as constants, so that no second derivatives
            are needed. What a rule makes of them stays differentiable. (Paper, Section 5.2: about as accurate.)
        parameters: Which parameters adapt: names of parameters or of submodules; all when None. The start of the others
            is learned no less. (``requires_grad`` says whether a start is learned, not whether it adapts.)
        chunk_size: How many tasks run side by side; chosen to fit the caches when None. The result is the same.
        likelihood: What outputs say about targets: ``Categorical()`` of labels, ``Gaussian()`` of real numbers.

    Raises:
        HeadError: If the network has no parameters, or not those named, or a part that cannot run for many tasks side
            by side.
        SettingError: If a setting is outside its range, or a ``MetaSGD`` is that of another network.

    Example:
        >>> from recollect import rules
        >>> maml = MAML(nn.Linear(3, 5), rule=rules.sgd(0.4))
        >>> support, labels = torch.randn(32, 5, 3), torch.arange(5).expand(32, 5)  # 32 tasks, 5-way 1-shot
        >>> outputs = maml(support, labels, torch.randn(32, 10, 3))
        >>> outputs.shape
        torch.Size([32, 10, 5])
        >>> nn.functional.cross_entropy(outputs.flatten(0, 1), labels.repeat(1, 2).flatten()).backward()
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        rule: Rule,
        steps: int = 1,
        first_order: bool = False,
        parameters: tuple[str, ...] | None = None,
        chunk_size: int | None = None,
        likelihood: Likelihood = Categorical(),
    ) -> None:
        super().__init__()
        self._batched = Batched(net)
        require("rule", rule, Rule, "a rule with init and update, such as rules.sgd(0.4)")
        require("likelihood", likelihood, Likelihood, "a likelihood, such as Categorical() or Gaussian()")
        require("first_order", first_order, bool, "True or False")
        require_whole("steps", steps, low=0)
        if chunk_size is not None:
            require_whole("chunk_size", chunk_size)
        if not (parameters is None or (isinstance(parameters, tuple) and all(isinstance(n, str) for n in parameters))):
            raise SettingError(f"parameters must be a tuple of names, such as ('fc',), or None, got {parameters!r}.")
        if parameters == ():
            raise SettingError("parameters=() lets nothing adapt: use steps=0 for that, or None for all parameters.")
        self.net = net
        self.rule = rule
        self.steps = steps
        self.first_order = first_order
        self.chunk_size = chunk_size
        self.likelihood = likelihood
        self._names = self._batched.select(parameters)
        self._explained = False
        if isinstance(rule, MetaSGD):
            rule.check({name: net.get_parameter(name) for name in self._names})

    def forward(
        self,
        support: Shaped[Tensor, "t n *x"],
        targets: Shaped[Tensor, "t n *y"],
        queries: Shaped[Tensor, "t m *x"],
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "t m c"]:
        """Returns the outputs at each task's queries of the network that has adapted to the task's support.

        Under ``torch.no_grad`` they have no graph, and none is kept through the steps.

        Args:
            support: The examples of ``t`` tasks to adapt to.
            targets: Their labels ``(t, n)`` or values ``(t, n, c)``.
            queries: The inputs to answer.
            steps: The number of steps, where it is to be another one than in training.

        Raises:
            ShapeError: If the three disagree in the number of tasks or examples or the shape of an input, or one is
                empty, or batch normalization has a single number to take statistics of.
            DtypeError: If inputs or targets are not of the dtype that the network or the likelihood needs.
            LabelError: If a label does not name one of the network's outputs.
            NonFiniteError: If NaN or infinite numbers turn up, by the task and the step.
            HeadError: If the network cannot run for many tasks side by side. From ``backward``: if a part of it, such
                as attention, has no second derivative.
        """
        self._check(support, targets, steps)
        self._check_inputs("queries", queries)
        if len(queries) != len(support):
            raise ShapeError(
                f"queries must be of the same tasks as the support, of {len(support)}, got those of {len(queries)}."
            )
        if queries.shape[2:] != support.shape[2:]:
            raise ShapeError(
                f"queries must be inputs of the same shape as the support's, {tuple(support.shape[2:])}, got "
                f"{tuple(queries.shape[2:])}."
            )
        if torch.is_inference_mode_enabled():  # in which there are no gradients
            with torch.inference_mode(False), torch.no_grad():
                return self.forward(support.clone(), targets.clone(), queries.clone(), steps=steps)
        outputs, losses = [], []
        for rows in self._chunks(support, queries):
            params, trace = self._adapt(support[rows], targets[rows], steps)
            outputs.append(self._batched(params, queries[rows]))
            losses.append(trace)
        outputs = torch.cat(outputs)
        _check_finite(torch.cat(losses, 1), outputs, queries)
        self._explain([outputs])
        return outputs

    def adapt(
        self, support: Shaped[Tensor, "t n *x"], targets: Shaped[Tensor, "t n *y"], *, steps: int | None = None
    ) -> dict[str, Shaped[Tensor, "t *p"]]:
        """Returns each task's adapted parameters by name, with a dimension of tasks in front.

        Only those that adapt are among them. Arguments and errors are those of calling this module.
        """
        self._check(support, targets, steps)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self.adapt(support.clone(), targets.clone(), steps=steps)
        parts = [self._adapt(support[rows], targets[rows], steps) for rows in self._chunks(support, support)]
        params = {name: torch.cat([part[name] for part, _ in parts]) for name in self._names}
        flat = torch.cat([p.detach().flatten(1) for p in params.values()], 1)
        _check_finite(torch.cat([trace for _, trace in parts], 1), flat)
        self._explain(list(params.values()))
        return params

    def _explain(self, results: list[Tensor]) -> None:
        # The first graph tells: a walk over each would take a tenth of a small network's time.
        if not (self.first_order or self._explained) and results[0].requires_grad:
            self._explained = True
            _explain_missing(results)

    def _chunks(self, support: Tensor, queries: Tensor) -> Iterator[slice]:
        largest = max(inputs[0].numel() * inputs.element_size() for inputs in (support, queries))
        copies = sum(p.numel() * p.element_size() for name, p in self.net.named_parameters() if name in self._names)
        size = self.chunk_size or max(2, workspace(_BUDGET, support.device) // (copies + largest))
        return (slice(start, start + size) for start in range(0, len(support), size))

    def _adapt(self, support: Tensor, targets: Tensor, steps: int | None) -> tuple[Params, Float[Tensor, "s t"]]:
        """Returns the adapted parameters, and the losses on the way to them."""
        live = dict(self.net.named_parameters())
        params = {name: live[name].expand(len(support), *live[name].shape) for name in self._names}
        state = self.rule.init(params)
        trace = []
        for _ in range(self.steps if steps is None else steps):
            grads, losses = self._gradients(params, support, targets, first=not trace)
            delta, state = self.rule.update(grads, state, params, losses)
            params = {name: p + delta[name] for name, p in params.items()}
            trace.append(losses.detach())
        return params, torch.stack(trace) if trace else live[self._names[0]].new_zeros(0, len(support))

    def _gradients(
        self, params: Params, support: Tensor, targets: Tensor, *, first: bool
    ) -> tuple[Params, Float[Tensor, " t"]]:
        """Returns the gradient of each task's loss in its own parameters, and the losses."""
        exact = torch.is_grad_enabled() and not self.first_order
        with torch.enable_grad():
            leaves = {n: p if exact and p.requires_grad else p.detach().requires_grad_() for n, p in params.items()}
            outputs = self._batched(leaves, support, constant=not exact)
            if first:
                self._check_targets(targets, outputs)
            losses = -self.likelihood.log_prob(outputs, targets).mean(1)
            # No task's loss depends on another task's parameters: the gradient of the sum is that of each.
            parts = torch.autograd.grad(
                losses.sum(), tuple(leaves.values()), create_graph=exact, materialize_grads=True
            )
        return dict(zip(leaves, parts, strict=True)), losses if exact else losses.detach()

    def _check(self, support: Tensor, targets: Tensor, steps: int | None) -> None:
        if steps is not None:
            require_whole("steps", steps, low=0)
        self._check_inputs("support", support)
        require_tensor("targets", targets)
        if targets.shape[:2] != support.shape[:2]:
            raise ShapeError(
                f"targets must have one target for each example of the support, {tuple(support.shape[:2])}, got shape "
                f"{tuple(targets.shape)}."
            )

    def _check_inputs(self, name: str, inputs: Tensor) -> None:
        require_tensor(name, inputs)
        if inputs.dim() < 2 or 0 in inputs.shape[:2]:
            raise ShapeError(
                f"{name} must have shape (tasks, examples, ...), with at least one of each, got {tuple(inputs.shape)}. "
                "For a single task use unsqueeze(0)."
            )
        dtype = self._batched.dtype()
        if (inputs.is_floating_point() or inputs.is_complex()) and inputs.dtype != dtype:
            raise DtypeError(f"{name} must be {dtype} as the network's parameters are, got {inputs.dtype}.")

    def _check_targets(self, targets: Tensor, outputs: Float[Tensor, "t n c"]) -> None:
        classes = outputs.shape[-1]
        if isinstance(self.likelihood, Categorical):
            if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
                raise DtypeError(
                    f"targets must be labels, which are whole numbers, got {targets.dtype}. For regression pass "
                    "likelihood=Gaussian()."
                )
            if targets.dim() != 2:
                raise ShapeError(f"targets must be one label for each example, (t, n), got {tuple(targets.shape)}.")
            low, high = (int(bound) for bound in targets.aminmax())
            if low < 0 or high >= classes:
                raise LabelError(
                    f"targets hold labels from {low} to {high}, but the network has {classes} outputs (0 to "
                    f"{classes - 1}). Number the classes anew in each task, or give the network one output per class."
                )
        elif isinstance(self.likelihood, Gaussian):
            if targets.dtype != outputs.dtype:
                raise DtypeError(f"targets must be {outputs.dtype} as the network's outputs are, got {targets.dtype}.")
            if targets.shape != outputs.shape:
                raise ShapeError(
                    f"targets must have the shape of the network's outputs, {tuple(outputs.shape)}, got "
                    f"{tuple(targets.shape)}. For a single output use unsqueeze(-1)."
                )
        else:
            self.likelihood.check_values(targets, classes)


class MetaSGD(nn.Module):
    """Gradient descent with a learned rate for each number in the parameters: ``delta = -rate * g``, elementwise.

    Paper: Li et al. 2017, "Meta-SGD". Rates may become negative.

    Args:
        net: The network whose parameters will take the steps; its parameters are not changed.
        rate: What all rates start at.

    Raises:
        SettingError: If ``rate`` is no finite number.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> maml = MAML(net, rule=MetaSGD(net, 0.1))
        >>> [name for name, _ in maml.named_parameters()]
        ['net.weight', 'net.bias', 'rule.rates.weight', 'rule.rates.bias']
    """

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        require("net", net, nn.Module, "the torch.nn.Module whose parameters adapt")
        require_number("rate", rate)
        self.rates = nn.Module()  # a tree of modules like the network's own, so that the names are the same
        for name, parameter in net.named_parameters():
            *path, last = name.split(".")
            part = self.rates
            for step in path:
                if step not in part._modules:
                    part.add_module(step, nn.Module())
                part = part.get_submodule(step)
            part.register_parameter(last, nn.Parameter(torch.full_like(parameter, rate, requires_grad=True)))

    def check(self, params: Params) -> None:
        """Refuses parameters for which it has no rates.

        Raises:
            SettingError: If a parameter has none of its name, shape and dtype.
        """
        rates = dict(self.rates.named_parameters())
        for name, parameter in params.items():
            rate = rates.get(name)
            if rate is None or rate.shape != parameter.shape or rate.dtype != parameter.dtype:
                got = "none" if rate is None else f"those of shape {tuple(rate.shape)} and {rate.dtype}"
                raise SettingError(
                    f"MetaSGD needs rates for {name!r}, of shape {tuple(parameter.shape)} and {parameter.dtype}, but "
                    f"has {got}. Make it of the same network: MAML(net, rule=MetaSGD(net, 0.1))."
                )

    def init(self, params: Params) -> Params:
        """Returns the state before the first step: none."""
        return {}

    def update(self, grads: Params, state: Params, params: Params, loss: Tensor) -> tuple[Params, Params]:
        """Returns ``-rate * g``."""
        rates = dict(self.rates.named_parameters())
        return {name: -rates[name] * g for name, g in grads.items()}, state


def _explain_missing(results: list[Tensor]) -> None:
    """Lets ``backward`` say what to do where it comes to an operation without a second derivative.

    Only there is it known that the derivative is wanted.
    """
    seen, nodes = set[Node](), [result.grad_fn for result in results]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("NotImplemented"):
            node.register_prehook(_refuse_second)
        nodes.extend(next_node for next_node, _ in node.next_functions)


def _refuse_second(grads: tuple[Tensor, ...]) -> None:
    raise HeadError(
        "a part of the network has no second derivative, which training through the steps needs; PyTorch's fused "
        "attention (nn.MultiheadAttention, scaled_dot_product_attention) is one. Call MAML under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or take first_order=True."
    )


def _check_finite(
    losses: Float[Tensor, "s t"], results: Float[Tensor, "t *r"], queries: Shaped[Tensor, "t m *x"] | None = None
) -> None:
    """Refuses losses before each step, and results after the last, that are NaN or infinite."""
    finite = torch.cat([losses.isfinite(), results.detach().isfinite().flatten(1).all(1).unsqueeze(0)])
    if bool(finite.all()):
        return
    step, task = (int(place) for place in (~finite).nonzero()[0])
    if step == len(losses) and queries is not None and not bool(queries[task].isfinite().all()):
        raise NonFiniteError(f"the queries of task {task} hold NaN or infinite numbers. Clean or drop them.")
    if step == 0:
        reason = "Its inputs or targets, or the learned parameters themselves, are not finite or far too large."
    else:
        reason = "Lower the rate of the rule, or take fewer steps."
    raise NonFiniteError(
        f"task {task} has come to NaN or infinite numbers after {step} of {len(losses)} steps. {reason}"
    )
