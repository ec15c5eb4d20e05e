"""``save`` and ``load``: a model or a memory as a folder of two files, without pickle.

config.json describes what to build: classes by name, their settings, and who shares what with whom. The names are
those of the tables below and nothing else, so a folder from a stranger runs no code of theirs. The tensors lie
beside it; ``snapshot.py`` writes and reads the two files.
"""

import contextlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recollect import snapshot
from recollect.adaptation import LocalAdaptation, rules
from recollect.errors import FormatError, SettingError
from recollect.kernels import dot_product, gaussian, inverse_distance
from recollect.likelihoods import Categorical, Gaussian
from recollect.mbpa import MbPA
from recollect.memory import DurableMemory, EpisodicMemory, ExactIndex, MilvusMemory, NeuralDictionary, Static
from recollect.meta import LSTMOptimizer, MetaLSTM, Policy
from recollect.predictors import Mixture, NonParametric, Parametric
from recollect.snapshot import Tensors

Node = dict[str, Any]  # one module in config.json

_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_EMBEDDING = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

# The constructor's arguments of each layer, which are also its attributes ("bias": whether there is one).
_LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Conv1d: (*_CONVOLUTION, "padding_mode"),
    nn.Conv2d: (*_CONVOLUTION, "padding_mode"),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.Embedding: _EMBEDDING,
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    nn.AvgPool2d: _AVERAGE,
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.Identity: (),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.GELU: ("approximate",),
    nn.Softplus: ("beta", "threshold"),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    **dict.fromkeys((nn.Dropout, nn.AlphaDropout), ("p", "inplace")),
    **dict.fromkeys((nn.ELU, nn.CELU), ("alpha", "inplace")),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid), ("inplace",)),
    **dict.fromkeys((nn.Tanh, nn.Sigmoid, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink), ()),
}
# Likewise; those that are modules are described as such. The first two take any number of modules besides.
_CONTAINERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Sequential: (),
    Mixture: ("weights",),
    Parametric: ("head", "likelihood"),
    NonParametric: ("memory", "classes", "neighbors", "kernel", "likelihood"),
    MbPA: ("head", "memory", "neighbors", "adaptation", "kernel", "likelihood"),
    Static: ("memory",),
}
_RULES: dict[type[nn.Module], tuple[str, ...]] = {
    MetaLSTM: ("hidden", "p"),
    LSTMOptimizer: ("sizes", "p", "scale"),
    Policy: ("history", "current"),
}
# A memory's other arguments are the shapes and dtypes of its tensors; so are the sizes of a policy.
_ARGUMENTS = _LAYERS | _CONTAINERS | _RULES | {EpisodicMemory: ("history",), NeuralDictionary: ("rate",)}
_MODULES = {kind.__name__: kind for kind in _ARGUMENTS}
_KERNELS, _LIKELIHOODS = (inverse_distance, gaussian, dot_product), (Categorical, Gaussian)
_ADAPTATIONS = (LocalAdaptation, rules.sgd, rules.rmsprop, rules.adam)
_SETTINGS = {kind.__name__: kind for kind in (*_KERNELS, *_LIKELIHOODS, *_ADAPTATIONS)}


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Saves a predictor, a memory, or a network around them to a folder that ``load`` reads.

    Saved are ``EpisodicMemory``, ``NeuralDictionary``, ``Static``, ``MbPA``, ``Parametric``, ``NonParametric``,
    ``Mixture``, the learned rules ``MetaLSTM``, ``LSTMOptimizer`` and ``Policy``, ``nn.Sequential`` and common layers
    of ``torch.nn``, with all that they share: a memory or a parameter that two of them use is used by both again after
    loading. Of any other module (your own network or rule, a layer with hooks or parametrizations, a memory with
    another index than ``ExactIndex``) only the tensors are saved, and ``load`` asks for an instance. Tensors are stored
    contiguously, from any device.

    Of a ``DurableMemory`` the entries of this moment are saved; ``load`` returns them as an ``EpisodicMemory``, and
    what lies in the memory's own folder stays as it is.

    The folder holds either the old save or the new one, complete, whenever the process is killed. Only one process
    at a time may save to a folder. A killed one leaves ``.<folder>.<number>.partial`` beside it, which the next save
    to the folder removes.

    Args:
        model: What to save.
        folder: Where to. It is created if need be; a folder that holds an older save is overwritten.

    Raises:
        SettingError: If ``model`` is no module, or uses a kernel, likelihood, rule or adaptation that is not this
            library's own.
        DtypeError: If a tensor cannot be stored: sparse, quantized, or of a dtype that safetensors lacks.
        FormatError: If ``folder`` is a file, or holds something other than a save. It stays as it is.
        OSError: If writing fails (a full disk). What was saved before stays as it is.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
        >>> memory = EpisodicMemory(capacity=100, key_size=2)
        >>> slots = memory.write(torch.eye(2), torch.tensor([2, 0]))
        >>> adapt = LocalAdaptation(rules.sgd(1.0), steps=5)
        >>> model = MbPA(torch.nn.Linear(2, 3), memory, neighbors=1, adaptation=adapt)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, folder)
        ...     loaded = load(folder)
        >>> torch.equal(loaded(torch.eye(2)), model(torch.eye(2)))
        True
    """
    if isinstance(model, MilvusMemory):
        raise SettingError(f"{model!r} is stored already, in Milvus. Open it again with the same arguments.")
    if not isinstance(model, nn.Module):
        raise SettingError(f"save takes a module (a predictor, a memory, a network), got {type(model).__name__}.")
    with contextlib.ExitStack() as stack:
        for part in model.modules():
            if isinstance(part, DurableMemory):  # another thread may write to it
                stack.enter_context(part.held())
        found = _Description(model)
        parameters = {name: t.requires_grad for name, t in found.tensors.items() if isinstance(t, nn.Parameter)}
        evaluating = [path for path, module in model.named_modules() if not module.training]
        description = {"model": found.model, "parameters": parameters, "evaluating": evaluating}
        snapshot.write(Path(folder), description, found.tensors)


def load(folder: str | os.PathLike[str], *, modules: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """Loads what ``save`` saved: it predicts the same, bit for bit, and goes on the same when written to.

    Everything is loaded to the CPU (``.to(device)`` moves it, memories included), with the dtypes, the sharing, and
    the ``requires_grad`` and ``training`` flags that it had. A memory's index is built anew. Nothing on disk changes.

    Args:
        folder: A folder written by ``save``.
        modules: An instance for each saved module that this library cannot build by itself, by its dotted path in the
            saved model (``"0"``, ``"components.1.head"``; ``""`` is the model itself). The instances are used, not
            copied: their parameters and buffers are replaced by the saved ones.

    Raises:
        MissingDataError: If there is no such folder.
        FormatError: If it is not a complete, undamaged save of this format version, or an instance in ``modules`` does
            not fit.
        SettingError: If ``modules`` lacks an instance, or names a module that needs none.

    Example:
        >>> import tempfile
        >>> import torch
        >>> class Double(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(torch.nn.Sequential(Double(), torch.nn.Flatten()), folder)
        ...     model = load(folder, modules={"0": Double()})
        >>> model(torch.ones(1, 2))
        tensor([[2., 2.]])
    """
    config, tensors = snapshot.read(Path(folder))
    flags = config["parameters"]
    tensors = {name: nn.Parameter(t, requires_grad=False) if name in flags else t for name, t in tensors.items()}
    builder = _Builder(tensors, dict(modules or {}))
    model = builder.build(config["model"], "")
    builder.require_all_used()
    for name, requires_grad in flags.items():  # last: load_state_dict sets them too
        tensors[name].requires_grad_(requires_grad)
    evaluating = set(config["evaluating"])
    for path, module in model.named_modules():
        module.training = path not in evaluating
    return model


class _Description:
    """What config.json says of a model, and the tensors by the names that it gives them."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: Tensors = {}
        self._names: dict[int, str] = {}  # of each tensor by its identity
        self._paths: dict[int, str] = {}  # of each module by its identity
        self.model = self._describe(model, "")

    def _describe(self, module: nn.Module, path: str) -> Node:
        if id(module) in self._paths:
            return {"shared": self._paths[id(module)]}
        self._paths[id(module)] = path
        if isinstance(module, DurableMemory):
            module = module.ring
        if not _is_known(module):
            return self._describe_foreign(module, path)
        children, settings = _parts(module)
        settings = {name: _setting(value, _join(path, name)) for name, value in settings.items()}
        node: Node = {"class": type(module).__name__, "settings": settings}
        if type(module) in _CONTAINERS:
            nodes = {name: self._describe(child, _join(path, name)) for name, child in children.items()}
            return node | {"modules": nodes}
        return node | {"tensors": self._name_tensors(module, path)}

    def _describe_foreign(self, module: nn.Module, path: str) -> Node:
        """Describes a module that only its author can build, and what it shares with the rest of the model."""
        parts = {}
        for name, part in module.named_modules():
            known = self._paths.setdefault(id(part), _join(path, name))
            if known != _join(path, name):
                parts[name] = known
        return {"foreign": type(module).__name__, "parts": parts, "tensors": self._name_tensors(module, path)}

    def _name_tensors(self, module: nn.Module, path: str) -> dict[str, str]:
        names = {}
        for local, tensor in module.state_dict(keep_vars=True).items():
            if not _is_storable(tensor):
                raise SettingError(
                    f"{_join(path, local)!r} is a {type(tensor).__name__} that cannot be saved: only dense tensors "
                    "with contents can. Run a lazy network once first; keep extra state of your own in buffers."
                )
            names[local] = self._names.setdefault(id(tensor), _join(path, local))
            self.tensors[names[local]] = tensor
        return names


class _Builder:
    """Builds modules from their description and fills them with the saved tensors."""

    def __init__(self, tensors: Tensors, supplied: dict[str, nn.Module]) -> None:
        self._tensors = tensors
        self._unused = set(tensors)
        self._supplied = supplied
        self._built: dict[str, nn.Module] = {}

    def build(self, node: Node, path: str) -> nn.Module:
        if "shared" in node:
            return self._built[node["shared"]]
        instance = self._take_instance(node["foreign"], path) if "foreign" in node else None
        children = {name: self.build(child, _join(path, name)) for name, child in node.get("modules", {}).items()}
        try:
            state = self._state(node)
            if instance is None:
                settings = {name: _build_setting(value, children) for name, value in node["settings"].items()}
                module = _make(_MODULES[node["class"]], settings, children, state)
            else:
                module = instance
            if not children:  # a module that holds others has no tensors of its own
                # assign: the very tensors, so that what two modules share is shared again
                module.load_state_dict(state, assign=True)
            for name, source in node.get("parts", {}).items():
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, self._built[source])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise FormatError(
                f"the module at {path!r} cannot be restored: {str(error).rstrip('.')}. If it is one of yours, pass in "
                "modules= an instance that is built like the saved one; otherwise the save is not valid."
            ) from error
        for name, part in module.named_modules() if instance is not None else (("", module),):
            self._built[_join(path, name)] = part
        return module

    def _take_instance(self, kind: str, path: str) -> nn.Module:
        if path not in self._supplied:
            why = " (its index was another than ExactIndex)" if kind == EpisodicMemory.__name__ else ""
            raise SettingError(
                f"the module at {path!r} is a {kind} that recollect cannot build by itself{why}: call "
                f"load(folder, modules={{{path!r}: ...}}) with an instance to fill. Got {list(self._supplied)}."
            )
        instance = self._supplied.pop(path)
        if not isinstance(instance, nn.Module):
            raise SettingError(f"modules[{path!r}] must be a module, got {instance!r}.")
        return instance

    def _state(self, node: Node) -> Tensors:
        names = node.get("tensors", {})
        if missing := [name for name in names.values() if name not in self._tensors]:
            raise FormatError(f"the tensor file lacks {missing}")
        self._unused -= set(names.values())
        return {local: self._tensors[name] for local, name in names.items()}

    def require_all_used(self) -> None:
        if self._supplied:
            raise SettingError(f"modules names {list(self._supplied)}, which need no instance. Leave them out.")
        if self._unused:
            raise FormatError(f"the tensor file holds {sorted(self._unused)}, which belong to no module of the save.")


def _is_known(module: nn.Module) -> bool:
    """Whether class and settings say all that there is to say of the module, but for its tensors."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if type(module) is EpisodicMemory:
        return type(module.index) is ExactIndex
    if type(module) is NeuralDictionary:
        return True
    if type(module) in _CONTAINERS:
        return not (module._parameters or module._buffers)
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    if hooked or type(module) not in _LAYERS | _RULES:
        return False
    twin = _make(type(module), _parts(module)[1], {}, {})
    return _shapes(twin) == _shapes(module)  # not so where a layer was pruned or resized


def _is_storable(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or nn.parameter.is_lazy(tensor):
        return False
    return tensor.layout is torch.strided and not tensor.is_meta


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _parts(module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Returns the modules that a module holds, by their path in it, and its other arguments."""
    values = {name: getattr(module, name) for name in _ARGUMENTS[type(module)]}
    if "bias" in values:
        values["bias"] = values["bias"] is not None
    if isinstance(module, Policy):
        values |= {"parameters": module.output.out_features, "hidden": module.hidden.out_features}
    children = {name: value for name, value in values.items() if isinstance(value, nn.Module)}
    settings = {name: value for name, value in values.items() if name not in children}
    if isinstance(module, MbPA) and module.rule is not None:
        children["rule"] = module.rule
    elif isinstance(module, nn.Sequential):
        children = {name: child for name, child in module._modules.items() if child is not None}
    elif isinstance(module, Mixture):
        children = {f"components.{i}": child for i, child in enumerate(module.components)}
    return children, settings


def _make(kind: type, settings: dict[str, Any], children: dict[str, nn.Module], state: Tensors) -> nn.Module:
    """Returns a module of this kind; a layer comes with its tensors on the meta device."""
    if kind in {EpisodicMemory, NeuralDictionary}:
        return _make_memory(kind, settings, state["keys"], state["values"])
    if kind is nn.Sequential:
        return nn.Sequential(OrderedDict(children))
    if kind is Mixture:
        components: list[Any] = list(children.values())  # predictors, as they were when they were saved
        return Mixture(*components, **settings)
    if kind in _CONTAINERS:
        return kind(**{name: child for name, child in children.items() if name in _CONTAINERS[kind]}, **settings)
    if kind in _RULES:
        return kind(**settings, generator=torch.Generator())
    with torch.device("meta"):  # no memory is filled, no random number drawn
        return kind(**settings)


def _make_memory(kind: type, settings: dict[str, Any], keys: Tensor, values: Tensor) -> nn.Module:
    history = settings.get("history", 0)  # a dictionary has none, nor have older saves
    slots, key_size = keys.shape
    shape, dtype = tuple(values.shape[1:]), values.dtype
    return kind(slots - history, key_size, value_shape=shape, value_dtype=dtype, key_dtype=keys.dtype, **settings)


def _setting(value: object, path: str) -> object:
    """Returns a setting as JSON can hold it."""
    if isinstance(value, nn.Module):  # the learned rule of an adaptation, which the module beside it holds
        return {"module": path.rpartition(".")[2]}
    if _SETTINGS.get(type(value).__name__) is type(value):
        settings = {name: _setting(field, _join(path, name)) for name, field in vars(value).items()}
        return {"class": type(value).__name__, "settings": settings}
    if isinstance(value, list | tuple):
        return [_setting(item, path) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, MilvusMemory):
        raise SettingError(
            f"{path!r} is {value!r}, whose entries stay in Milvus. Save the head by itself, and make the predictor of "
            "the loaded head and this memory."
        )
    raise SettingError(
        f"{path!r} is {value!r}, which cannot be saved: settings must be numbers, text, or one of recollect's own "
        f"classes ({', '.join(_SETTINGS)}). Save memory and head by themselves and build the predictor from them."
    )


def _build_setting(value: Any, children: dict[str, nn.Module]) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_build_setting(item, children) for item in value)
    if not isinstance(value, dict):
        return value
    if "module" in value:
        return children[value["module"]]
    settings = {name: _build_setting(part, children) for name, part in value["settings"].items()}
    return _SETTINGS[value["class"]](**settings)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
