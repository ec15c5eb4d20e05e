"""Batch normalization with the statistics of the inputs at hand, for many tasks at once, and its second derivative."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function


def batch_norm(
    x: Float[Tensor, "n c *s"], weight: Float[Tensor, " c"] | None, bias: Float[Tensor, " c"] | None, eps: float
) -> Float[Tensor, "n c *s"]:
    """Returns ``weight (x - mean) / sqrt(var + eps) + bias``, as ``torch.nn.functional.batch_norm`` does in training.

    Under ``torch.func.vmap`` the channels of one task lie beside those of the others, as in its convolutions, and one
    call of PyTorch's kernel does them all. (``vmap``'s own rule leaves weight and bias for further passes over x.) The
    second derivative takes a third as many passes over x as PyTorch's. Derivatives of any order are exact.

    Args:
        x: The inputs.
        weight: gamma; 1 when None.
        bias: beta; 0 when None.
        eps: What is added to the variance.

    Raises:
        ValueError: If a channel has a single number, as PyTorch's does.

    Example:
        >>> x = torch.randn(8, 3, 5, 5)
        >>> y = batch_norm(x, None, None, 1e-5)
        >>> torch.allclose(y, torch.nn.functional.batch_norm(x, None, None, training=True), atol=1e-6)
        True
    """
    channels = x.shape[1]
    if x.numel() == channels:
        raise ValueError(f"Expected more than 1 value per channel, got inputs of shape {tuple(x.shape)}.")
    weight = x.new_ones(channels) if weight is None else weight
    bias = x.new_zeros(channels) if bias is None else bias
    return _BatchNorm.apply(x, weight, bias, eps)[0]


class _BatchNorm(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, eps = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_Backward.apply(grad_outputs[0], *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        tasks, (x, weight, bias, eps), (at, *dims, _) = info.batch_size, args, in_dims
        x = x.unsqueeze(1).expand(-1, tasks, *x.shape[1:]) if at is None else x.movedim(at, 1)
        flat = [
            (p.expand(tasks, -1) if dim is None else p.movedim(dim, 0)).flatten()
            for p, dim in zip((weight, bias), dims, strict=True)
        ]
        y, *statistics = _BatchNorm.apply(x.flatten(1, 2), *flat, eps)
        return (y.unflatten(1, x.shape[1:3]), *(s.unflatten(0, x.shape[1:3]) for s in statistics)), (1, 0, 0)


class _Backward(Function):
    """The first derivative.

    With ``x^ = (x - mean) scale`` and ``P(u) = u - mean(u) - x^ mean(u x^)``, over the inputs of a channel:

        grad_x = weight scale P(g),  grad_weight = sum(g x^),  grad_bias = sum(g)
    """

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, scale, True, eps, [True, True, True]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        g, x, weight, mean, scale, eps = inputs
        ctx.save_for_backward(g, x, weight, mean, scale, *output[1:])
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        (v, by_weight, by_bias), (g, x, weight, mean, scale, g_normal, g_sum) = grad_outputs, ctx.saved_tensors
        over = (0, *range(2, x.dim()))
        count = x.numel() // x.shape[1]
        if torch.is_grad_enabled():  # a third derivative is wanted: it must see where these come from
            variance, mean = torch.var_mean(x, over, correction=0)
            scale = (variance + ctx.eps).rsqrt()
            g_sum = g.sum(over)
            g_normal = (g * _along(x, scale, -mean * scale)).sum(over)
        normal = _along(x, scale, -mean * scale)
        g_mean, g_along = g_sum / count, g_normal / count
        v_mean, v_along = v.sum(over) / count, (v * normal).sum(over) / count
        both = (v * g).sum(over) / count - v_mean * g_mean - v_along * g_along
        gain, square = weight * scale, weight * scale * scale
        to_g = _along(v, gain, by_bias - gain * v_mean).addcmul(normal, _wide(by_weight - gain * v_along, x))
        rest = square * (g_along * v_mean + v_along * g_mean) - by_weight * scale * g_mean
        to_x = _along(v, -square * g_along, rest)
        to_x = to_x.addcmul(g, _wide(by_weight * scale - square * v_along, x))
        to_x = to_x.addcmul(normal, _wide(square * (2 * v_along * g_along - both) - by_weight * scale * g_along, x))
        return to_g, to_x, scale * count * both, None, None, None


def _along(x: Float[Tensor, "n c *s"], factor: Float[Tensor, " c"], shift: Float[Tensor, " c"]) -> Tensor:
    return torch.addcmul(_wide(shift, x), x, _wide(factor, x))


def _wide(channel: Float[Tensor, " c"], x: Float[Tensor, "n c *s"]) -> Tensor:
    return channel.view(-1, *(1 for _ in x.shape[2:]))
