"""The command line: ``recollect demo | explain | reproduce | lm | memory | serve | list | show``.

An error is one line on standard error and exit status 2; Ctrl-C is one line and exit status 130.
"""

import contextlib
import errno
import importlib
import io
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from recollect.errors import MissingExtraError, RecollectError, SettingError


class Experiment(NamedTuple):
    """An experiment's name on the command line, what it shows, and where its code is."""

    name: str
    summary: str
    module: str
    config: str


EXPERIMENTS = (
    Experiment("figure2", "regression: what adapting the network to the neighbors does", "figure2", "Figure2"),
    Experiment("figure3", "permuted MNIST: 20 tasks in sequence, MbPA, EWC, MAS, replay", "figure3", "Figure3"),
    Experiment("figure3-tuning", "the grid behind figure3's settings", "figure3_tuning", "Figure3Tuning"),
    Experiment("continual", "EWC, MAS, SI, LwF, GEM and replay beside MbPA, on five streams", "continual", "Continual"),
    Experiment("table2", "language models: cache, MbPA, dynamic evaluation on PTB and WikiText-2", "table2", "Table2"),
    Experiment("table1", "Tiny-ImageNet: new classes, by five models", "incremental.table1", "Table1"),
    Experiment("figure4", "the curves behind table1", "incremental.table1", "Figure4"),
    Experiment("figure5", "Tiny-ImageNet: new classes with a tenth of the images", "incremental.figure5", "Figure5"),
    Experiment("figure6", "MbPA by the size of the memory and the learning rate", "incremental.figure6", "Figure6"),
    Experiment("figure7", "MbPA by the number of neighbors", "incremental.figure7", "Figure7"),
    Experiment("new-classes", "1 to 20 images of each new class", "incremental.new_classes", "NewClasses"),
    Experiment("mann-table1", "Omniglot, one look: MANN and LSTM, one-hot labels", "meta.mann", "MannTable1"),
    Experiment("mann-table2", "the same with labels of five letters", "meta.mann", "MannTable2"),
    Experiment("maml-omniglot", "few-shot Omniglot by MAML", "meta.maml_omniglot", "MamlOmniglot"),
    Experiment("maml-sinusoid", "sine waves from a few points by MAML", "meta.maml_sinusoid", "MamlSinusoid"),
    Experiment("meta-lstm", "few-shot Omniglot by the Meta-LSTM", "meta.few_shot", "MetaLstm"),
    Experiment("few-shot", "which memory? eight learners of the same tasks", "meta.few_shot", "FewShot"),
    Experiment("hypernet-mnist", "MNIST by a kernel made of four numbers", "meta.hypernet_mnist", "HypernetMnist"),
    Experiment("hyperlstm", "characters of PTB: HyperLSTM, layer-norm LSTM, LSTM", "meta.hyperlstm", "HyperLstmRun"),
    Experiment("dictionary", "an embedding trained through its memory, beside MbPA's", "dictionary", "Dictionary"),
    Experiment("learned-optimizer", "optimizers that are learned", "meta.learned_optimizer", "LearnedOptimizer"),
    Experiment("figure8", "which words MbPA helps, by training frequency", "figure8", "Figure8"),
)

_USAGE = """recollect: episodic memory for PyTorch networks

  recollect demo                  a network that does not forget, on real digits, in under a minute
  recollect explain               one prediction: a picture, its neighbors, and what each of them added
  recollect reproduce NAME        a table or figure of the paper; --help after the name lists its settings
  recollect list                  the names
  recollect lm train|evaluate     a language model of your own text files; --help lists the settings
  recollect memory ...            look into a durable memory, check, export, import it; --help says how
  recollect show DIR              the table of a finished run
  recollect serve FOLDER|--demo   a model and its memory behind HTTP, with a page to try them; --help lists the settings

Each run writes its settings, results, table and figure into the folder given by --out, and goes on where it was
when it is started again."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    try:
        return _dispatch(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("\nrecollect: stopped. A run goes on from what it last saved with the same command.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: `recollect list | head -1`
        sys.stderr.close()
        return 141
    except (RecollectError, OSError) as error:
        print(f"recollect: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, RecollectError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        return f"{error.strerror}{where}.{' Make room, or choose another folder with --out.' if full else ''}"
    return " ".join(str(error).split())


def _dispatch(arguments: list[str]) -> int:
    command, *rest = arguments or ["--help"]
    if command in {"--help", "-h", "help"}:
        print(_USAGE)
    elif command == "--version":
        from recollect import __version__

        print(__version__)
    elif command == "demo":
        _run("demo", "Demo", rest, "recollect demo")
    elif command == "explain":
        _run("incremental.explain", "Explain", rest, "recollect explain")
    elif command == "list":
        _refuse_more(rest)
        for experiment in EXPERIMENTS:
            print(f"{experiment.name:18}{experiment.summary}")
    elif command == "show":
        _show(rest)
    elif command == "reproduce":
        _reproduce(rest)
    elif command == "lm":
        _language_model(rest)
    elif command == "memory":
        from recollect import cli_memory

        return cli_memory.main(rest)
    elif command == "serve":
        from recollect.serve.run import run

        run(rest)
    else:
        commands = "demo, explain, reproduce, lm, memory, serve, list, show"
        raise SettingError(f"there is no command {command!r}. There are: {commands}.")
    return 0


def _refuse_more(rest: list[str]) -> None:
    if rest:
        raise SettingError(f"unexpected argument {rest[0]!r}.")


def _reproduce(rest: list[str]) -> None:
    names = ", ".join(experiment.name for experiment in EXPERIMENTS)
    if not rest or rest[0] in {"--help", "-h"}:
        print(f"usage: recollect reproduce NAME [--out DIR] ...\n\nNAME: {names}")
        print("recollect reproduce NAME --help lists the settings.")
        return
    for experiment in EXPERIMENTS:
        if experiment.name == rest[0]:
            _run(experiment.module, experiment.config, rest[1:], f"recollect reproduce {rest[0]}")
            return
    raise SettingError(f"there is no experiment {rest[0]!r}. There are: {names}.")


def _language_model(rest: list[str]) -> None:
    configs = {"train": "Train", "evaluate": "Evaluate"}
    if not rest or rest[0] in {"--help", "-h"}:
        print("usage: recollect lm train --text FILE --valid FILE [--out DIR] ...")
        print("       recollect lm evaluate --text FILE [--model DIR] ...\n")
        print("train      trains a language model on a text file, and chooses cache and MbPA by another")
        print("evaluate   reads a text with it, and says what learning from the text word by word is worth\n")
        print("recollect lm train --help and recollect lm evaluate --help list the settings.")
        return
    if rest[0] not in configs:
        raise SettingError(
            f"there is no recollect lm {rest[0]}. There are recollect lm train and recollect lm evaluate: --help after "
            "either lists its settings."
        )
    from recollect.experiments import lm

    print(lm.run(_parse(getattr(lm, configs[rest[0]]), rest[1:], f"recollect lm {rest[0]}")), end="")


def _run(module: str, config: str, rest: list[str], program: str) -> None:
    experiment = importlib.import_module(f"recollect.experiments.{module}")
    settings = _parse(getattr(experiment, config), rest, program)
    run: Callable[[Any], str] = experiment.run
    print(run(settings), end="")
    print(f"\nWritten to {settings.out}: {', '.join(sorted(p.name for p in Path(settings.out).glob('*.*')))}")


def _parse(config: type, rest: list[str], program: str) -> Any:
    """Reads the flags of an experiment; each field of its dataclass is one."""
    try:
        import tyro
    except ImportError as error:
        raise MissingExtraError("experiments need more packages: pip install 'recollect[experiments]'.") from error
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, args=rest, prog=program)
    except SystemExit as error:
        if not error.code:  # --help
            raise
        raise SettingError(f"{_message_in_box(complaint.getvalue())} See {program} --help.") from error


def _message_in_box(text: str) -> str:
    """Returns what tyro says in a box: the lines between its title and the pointer to --help."""
    stripped = (line.strip("│|╭╮╰╯─ ") for line in text.splitlines())
    _, *lines = (line for line in stripped if set(line) - {"-"})
    return " ".join(itertools.takewhile(lambda line: not line.startswith("For full helptext"), lines))


def _show(rest: list[str]) -> None:
    if len(rest) != 1:
        raise SettingError("show needs one folder: recollect show DIR.")
    table = Path(rest[0]) / "table.md"
    if not table.is_file():
        raise SettingError(f"{rest[0]} holds no finished run: there is no {table.name}. Name the --out of a run.")
    print(table.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    sys.exit(main())
