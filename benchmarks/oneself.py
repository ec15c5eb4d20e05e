"""What one would write instead of ``recollect.meta``: a loop over tasks, and a memory head by head."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, softmax

from recollect.meta import MANN, LRUAccess

Loss = Callable[[Tensor, Tensor], Tensor]


def maml(net: nn.Module, tasks: Iterable[tuple[Tensor, ...]], *, rate: float, loss: Loss) -> list[Tensor]:
    """Returns the gradients of MAML with one step, task by task, in the way of learn2learn's examples.

    Args:
        net: The start; its gradients are set.
        tasks: Support, targets, queries and their answers of each.
        rate: Of the step.
        loss: Of outputs and targets, in both places.
    """
    net.zero_grad()
    for support, targets, queries, answers in tasks:
        params = {name: p.clone() for name, p in net.named_parameters()}
        error = loss(functional_call(net, params, (support,)), targets)
        grads = torch.autograd.grad(error, tuple(params.values()), create_graph=True)
        params = {name: p - rate * grad for (name, p), grad in zip(params.items(), grads, strict=True)}
        loss(functional_call(net, params, (queries,)), answers).backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def mann(model: MANN, inputs: Tensor) -> Tensor:
    """Returns the logits of a MANN with an LSTM and least recently used access, step by step and head by head.

    Args:
        model: Whose weights are used.
        inputs: ``(episodes, steps, inputs)``.
    """
    access, batch = model.access, len(inputs)
    assert isinstance(access, LRUAccess)
    hidden, cell = (inputs.new_zeros(batch, model.hidden) for _ in range(2))
    memory, usage = inputs.new_full((batch, access.slots, access.width), 1e-6), inputs.new_zeros(batch, access.slots)
    reads = [inputs.new_zeros(batch, access.width) for _ in range(access.reads)]
    weights = [torch.zeros_like(usage) for _ in range(access.reads)]
    logits = []
    for step in inputs.unbind(1):
        hidden, cell = model.controller(torch.cat([step, *reads], 1), (hidden, cell))
        numbers = access.heads(hidden)
        least = usage.sort(dim=1, stable=True).indices
        marked = torch.zeros_like(usage).scatter(1, least[:, : access.reads], 1.0)
        memory = memory * (1 - torch.zeros_like(usage).scatter(1, least[:, :1], 1.0)).unsqueeze(2)
        keys = [torch.tanh(numbers[:, i * access.width : (i + 1) * access.width]) for i in range(access.reads)]
        written = []
        for head, key in enumerate(keys):
            gate = torch.sigmoid(numbers[:, access.reads * access.width + head]).unsqueeze(1)
            written.append(gate * weights[head] + (1 - gate) * marked)
            memory = memory + written[head].unsqueeze(2) * key.unsqueeze(1)
        for head, key in enumerate(keys):
            cosines = cosine_similarity(memory, key.unsqueeze(1).expand_as(memory), dim=2)
            weights[head] = softmax(cosines, dim=1)
            reads[head] = (weights[head].unsqueeze(2) * memory).sum(1)
        usage = access.gamma * usage + sum(one.detach() for one in (*weights, *written))
        logits.append(model.output(torch.cat([hidden, *reads], 1)))
    return torch.stack(logits, 1)
