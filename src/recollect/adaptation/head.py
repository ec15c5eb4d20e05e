"""``Head``: a module seen as a pure function of its parameters and its input.

The function always computes what the module computes in evaluation mode, whatever mode the module is in, and changes
nothing of it: it runs an empty shell of the module with the live parameters put in for one call.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from recollect.adaptation.shell import empty_shell, select
from recollect.errors import HeadError, require

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm,)


class Head:
    """The output network g as a function ``g(params, keys) -> outputs``.

    Args:
        module: Maps keys ``(b, d)`` to outputs ``(b, c)``, each row by itself.

    Raises:
        HeadError: If the module holds something that cannot be adapted query by query, by the submodule's name.
    """

    def __init__(self, module: nn.Module) -> None:
        require("head", module, nn.Module, "a torch.nn.Module that maps keys to outputs")
        self.module = module
        _check(module)
        self._shell = empty_shell(module, what="head").eval()

    def parameters(self) -> dict[str, Tensor]:
        """Returns the live parameters by name, detached."""
        return {name: _detached(p) for name, p in self.module.named_parameters()}

    def __call__(self, params: dict[str, Tensor], keys: Float[Tensor, "*b d"]) -> Float[Tensor, "*b c"]:
        """Returns the outputs with ``params`` in place of the module's own parameters of these names."""
        state = {name: _detached(b) for name, b in self.module.named_buffers()}
        state.update((name, _detached(p)) for name, p in self.module.named_parameters() if name not in params)
        state.update(params)
        return functional_call(self._shell, state, (keys.clone(),))  # a head may begin with a function in place

    def dtype(self) -> torch.dtype:
        """Returns the dtype in which the module computes (float32 if it has no parameters)."""
        return next((p.dtype for p in self.module.parameters()), torch.float32)

    def select(self, names: tuple[str, ...] | None) -> tuple[str, ...]:
        """Returns the names of the parameters that adapt: those named, or inside a submodule named; all for None.

        A parameter that several submodules share adapts in all of them, and is returned by its first name.

        Raises:
            HeadError: If a name matches nothing, or the head has no parameters.
        """
        if next(self.module.parameters(), None) is None:
            raise HeadError(
                f"the head ({type(self.module).__name__}) has no parameters, so nothing can adapt. "
                "Pass the network's last layers as the head, or use NonParametric."
            )
        return select(self.module, names, what="head")


def _detached(tensor: Tensor) -> Tensor:
    # What was made under inference_mode can take part in no gradient, except as a copy.
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _check(module: nn.Module) -> None:
    for name, part in module.named_modules():
        where = f"submodule {name!r}" if name else "the head itself"
        if isinstance(part, _RECURRENT):
            raise HeadError(
                f"{where} is a {type(part).__name__}: a recurrent layer maps sequences, while a head maps single keys. "
                "Leave it in the embedding network and pass its output as the key."
            )
        if isinstance(part, _BATCH_STATISTICS) and part.running_mean is None:
            raise HeadError(
                f"{where} is a {type(part).__name__} without running statistics: its output for one key depends on "
                "the other keys of the batch. Use track_running_stats=True, or LayerNorm."
            )
