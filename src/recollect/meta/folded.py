"""Layers of many tasks at once: the channels of one task lie beside those of the others, in one call of the kernel.

``vmap``'s own rules move the tasks to and fro between two layers, and add biases and scales in passes of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.autograd import Function


def convolution(x: Shaped[Tensor, "..."], layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """Returns what a convolution returns.

    The second derivative is made of the kernels of the first, and of those that are needed only. (PyTorch's goes over
    groups one by one, and knows no inputs that are numbers.) Derivatives of any order are exact.

    Args:
        x: The inputs, ``(n, i, *s)``.
        layer: Its weight, bias and settings.
    """
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or x.dim() != layer.weight.dim():
        return layer._conv_forward(x, layer.weight, layer.bias)
    places = _Places(layer.stride, layer.padding, layer.dilation, layer.groups)
    return _Convolution.apply(x, layer.weight, layer.bias, places)


@dataclass(frozen=True)
class _Places:
    """Which numbers meet in a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        none = [0] * len(self.stride)
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, none, self.groups)

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Returns the derivatives by x, weight and bias that are needed; those that are not are None."""
        sizes, none = list(weight.shape[:1]) if needs[2] else None, [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            g, x, weight, sizes, self.stride, self.padding, self.dilation, False, none, self.groups, list(needs)
        )


class _Convolution(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, places: _Places) -> Tensor:
        return places.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.places = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        return *_ConvolutionBackward.apply(grad_outputs[0], *ctx.saved_tensors, ctx.places, needs), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        tasks, (x, weight, bias, places), (at, *dims, _) = info.batch_size, args, in_dims
        if dims == [None, None]:  # all tasks have the same weights: they are one batch
            return _Convolution.apply(x.movedim(at, 0).flatten(0, 1), *args[1:]).unflatten(0, (tasks, -1)), 0
        weight = _stacked(weight, dims[0], tasks)
        bias = None if bias is None else _stacked(bias, dims[1], tasks)
        places = replace(places, groups=places.groups * tasks)
        return _Convolution.apply(_beside(x, at, tasks).flatten(1, 2), weight, bias, places).unflatten(
            1, (tasks, -1)
        ), 1


class _ConvolutionBackward(Function):
    """The first derivative."""

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, places: _Places, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        return tuple(places.backward(g, x, weight, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        g, x, weight, ctx.places, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (by_x, by_weight, by_bias), (g, x, weight), places = grad_outputs, ctx.saved_tensors, ctx.places
        to_g = to_x = to_weight = None
        if by_x is not None:
            to_g = places.forward(by_x, weight, by_bias)
            if ctx.needs_input_grad[2]:
                to_weight = places.backward(g, by_x, weight, (False, True, False))[1]
        if by_weight is not None:
            more = places.forward(x, by_weight, by_bias if to_g is None else None)
            to_g = more if to_g is None else to_g + more
            if ctx.needs_input_grad[1]:
                to_x = places.backward(g, x, by_weight, (True, False, False))[0]
        if to_g is None and by_bias is not None:
            to_g = _wide(by_bias, g).expand_as(g)
        return to_g, to_x, to_weight, None, None


def batch_norm(
    x: Float[Tensor, "n c *s"], weight: Float[Tensor, " c"] | None, bias: Float[Tensor, " c"] | None, eps: float
) -> Float[Tensor, "n c *s"]:
    """Returns ``weight (x - mean) / sqrt(var + eps) + bias``, as ``torch.nn.functional.batch_norm`` does in training.

    The statistics are those of the inputs at hand. The second derivative takes a third as many passes over x as
    PyTorch's. Derivatives of any order are exact.

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
        x = _beside(x, at, tasks)
        flat = [_stacked(p, dim, tasks) for p, dim in zip((weight, bias), dims, strict=True)]
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


def _beside(x: Tensor, at: int | None, tasks: int) -> Shaped[Tensor, "n t c *s"]:
    """Returns inputs with the tasks before the channels."""
    return x.unsqueeze(1).expand(-1, tasks, *x.shape[1:]) if at is None else x.movedim(at, 1)


def _stacked(parameter: Tensor, at: int | None, tasks: int) -> Shaped[Tensor, "tc *p"]:
    """Returns a parameter of each task, one task after the other."""
    each = parameter.expand(tasks, *parameter.shape) if at is None else parameter.movedim(at, 0)
    return each.flatten(0, 1)
