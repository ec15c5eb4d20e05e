"""Avalanche's EWC, where the package is installed: the same network, data, batches and terms as everybody else's."""

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.learning import Term

NAME = "Avalanche"
MISSING = "not installed"
ADVICE = """\
Avalanche is not installed here, so it is left out. It needs an environment of its own, because its torchvision pins an
older torch than both work with:
  python3 -m venv ENV
  ENV/bin/pip install -c constraints.txt 'torch==2.13.0' jaxtyping safetensors dill gdown gputil matplotlib numpy \\
      packaging psutil pytorchcv qpsolvers scikit-learn setuptools tensorboard torchmetrics tqdm wandb
  ENV/bin/pip install --no-deps 'torchvision==0.15.2' 'avalanche-lib==0.6.0'
  PYTHONPATH=src ENV/bin/python -m benchmarks continual --full --threads 1"""


def installed() -> bool:
    """Returns whether Avalanche can be imported."""
    return importlib.util.find_spec("avalanche") is not None


def epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    *,
    terms: Sequence[Term],
    strength: float,
    batch: int,
    short: int,
) -> Callable[[], None]:
    """Returns the call that trains for one epoch, with all that comes before and after it done or left out.

    A strategy first learns as many short experiences as there are terms, so that it is where it would be. Then its
    terms are replaced by the given ones, which are no more and no fewer: the same sum for all contenders.

    Args:
        network: The network; it moves.
        optimizer: Of its parameters.
        data: Inputs and labels, in the order in which they are learned.
        terms: Of earlier tasks; with none, the strategy is one without a penalty.
        strength: lambda of ``strength / 2 * sum``.
        batch: Examples in a step.
        short: Examples of each experience before.
    """
    with warnings.catch_warnings():  # extensions of torchvision, solvers and loggers that are not needed
        warnings.simplefilter("ignore")
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.benchmarks.utils import as_taskaware_classification_dataset
        from avalanche.training.plugins import EWCPlugin
        from avalanche.training.supervised import EWC, Naive
        from avalanche.training.utils import ParamData

        settings = {"model": network, "optimizer": optimizer, "criterion": nn.CrossEntropyLoss()}
        settings |= {"train_mb_size": batch, "train_epochs": 1, "evaluator": None}
        # Its lambda stands before the sum without the half.
        strategy = EWC(ewc_lambda=0.5 * strength, mode="separate", **settings) if terms else Naive(**settings)
        parts = [tuple(tensor[:short] for tensor in data)] * len(terms) + [data]
        made = [as_taskaware_classification_dataset(TensorDataset(*part)) for part in parts]
        *before, last = benchmark_from_datasets(train=made).train_stream
        for experience in before:
            strategy.train(experience, eval_streams=[])
    plugins = [plugin for plugin in strategy.plugins if isinstance(plugin, EWCPlugin)]
    for plugin, (number, term) in itertools.product(plugins, enumerate(terms)):
        for kind, values in ((plugin.importances, term.importance), (plugin.saved_params, term.anchor)):
            if kind[number].keys() != values.keys():
                raise RuntimeError("Avalanche holds other parameters than recollect.")
            kind[number] = {name: ParamData(name, init_tensor=value.clone()) for name, value in values.items()}

    # What `train` does once for an experience, before its epochs: the loader, hooks.
    strategy.is_training = True
    strategy.model.train()
    strategy.experience = last
    strategy._before_training(shuffle=False)
    strategy._before_training_exp(shuffle=False)

    def call() -> None:
        strategy._before_training_epoch()
        strategy.training_epoch()
        strategy._after_training_epoch()

    return call
