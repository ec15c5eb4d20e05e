"""The command line as a user meets it: real processes, exit statuses, one clear line for every error."""

import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recollect.cli import EXPERIMENTS, Experiment, main
from recollect.data import data_folder


def recollect(*arguments: str, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "recollect", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        **settings,
    )


def one_line(process: subprocess.CompletedProcess) -> str:
    lines = [line for line in process.stderr.splitlines() if " left" not in line]
    assert len(lines) == 1, process.stderr
    return lines[0]


def test_demo_remembers_and_shows_it(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = recollect("demo", "--out", str(out))
    assert process.returncode == 0, process.stderr
    cells = [line.strip("| ").split(" | ") for line in process.stdout.splitlines() if line.startswith("| ")]
    scores = {cell[0]: float(cell[1]) for cell in cells[1:]}
    mbpa, vote, network = (scores[n] for n in ("MbPA, 40 per task", "k-NN vote, 40 per task", "network alone"))
    assert mbpa > vote + 1
    assert mbpa > network + 30
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    shown = recollect("show", str(out))
    assert shown.stdout.strip() in process.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "no command 'nonsense'"),
        (("reproduce", "figure99"), "no experiment 'figure99'"),
        (("reproduce", "figure3", "--nonsense", "1"), "--nonsense"),
        (("reproduce", "figure3", "--scale", "huge"), "'huge'"),
        (("reproduce", "figure3", "--steps", "0"), "--steps"),
        (("reproduce", "table1", "--scale", "huge"), "'huge'"),
        (("reproduce", "new-classes", "--images", "3"), "--images"),
        (("explain", "--image", "first"), "'first'"),
        (("explain", "7"), "7"),
        (("list", "more"), "unexpected argument"),
        (("show", "nowhere"), "holds no finished run"),
        (("show",), "needs one folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: tuple[str, ...], message: str, capsys) -> None:
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("command", ["reproduce table1", "reproduce figure5", "reproduce new-classes", "explain"])
def test_a_wrong_device_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, command: str
) -> None:
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    assert main([*command.split(), "--device", "abacus", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "device must be one that PyTorch can use here" in line
    assert not list(tmp_path.iterdir())


def test_help_and_list(capsys) -> None:
    assert main([]) == 0
    usage = capsys.readouterr().out
    for command in ("demo", "explain", "reproduce NAME", "list", "lm train|evaluate", "show DIR"):
        assert f"  recollect {command}" in usage
    assert main(["list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [experiment.name for experiment in EXPERIMENTS]
    assert {"figure3", "table1", "figure4", "figure5", "figure6", "figure7", "new-classes"} <= set(names)
    assert main(["--version"]) == 0
    process = recollect("reproduce", "figure3", "--help")
    assert process.returncode == 0
    assert "--vote-neighbors" in process.stdout


@pytest.mark.parametrize("arguments", [["lm", "--help"], ["lm", "-h"], ["lm"]])
def test_help_of_lm_names_both_commands(arguments: list[str], capsys) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert not printed.err
    for command in ("recollect lm train", "recollect lm evaluate"):
        assert f"{command} --text FILE" in printed.out
        assert f"{command} --help" in printed.out


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_every_experiment_lists_its_settings(experiment: Experiment, capsys) -> None:
    """Its module, its settings and what runs it are where the list says."""
    with pytest.raises(SystemExit) as caught:
        main(["reproduce", experiment.name, "--help"])
    assert not caught.value.code
    printed = capsys.readouterr().out
    assert f"recollect reproduce {experiment.name}" in printed
    assert "--out" in printed
    assert callable(importlib.import_module(f"recollect.experiments.{experiment.module}").run)


def test_explain_lists_its_settings(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["explain", "--help"])
    assert not caught.value.code
    printed = capsys.readouterr().out
    for flag in ("recollect explain", "--image", "--split", "--epochs", "--scale", "--out"):
        assert flag in printed


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.run(
        f"{sys.executable} -m recollect list | true", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in process.stderr


def test_figure2_is_drawn_and_the_adapted_network_is_nearest(tmp_path: Path) -> None:
    process = recollect("reproduce", "figure2", "--out", str(tmp_path))
    assert process.returncode == 0, process.stderr
    cells = [line.strip("| ").split(" | ") for line in process.stdout.splitlines() if line.startswith("| ")]
    errors = {cell[0]: float(cell[2]) for cell in cells[1:]}
    assert errors["adapted network"] < errors["attention"] / 3
    assert errors["adapted network"] < errors["network"] / 3
    assert (tmp_path / "figure.png").exists()


needs_mnist = pytest.mark.skipif(
    data_folder() is None or not (data_folder() / "mnist" / "train-images-idx3-ubyte.gz").is_file(),
    reason="MNIST is not at hand: set RECOLLECT_DATA to the folder that holds mnist/",
)


@needs_mnist
def test_figure3_and_its_tuning_run_at_their_smallest(tmp_path: Path) -> None:
    process = recollect("reproduce", "figure3", "--scale", "smoke", "--tasks", "2", "--out", str(tmp_path / "run"))
    assert process.returncode == 0, process.stderr
    assert "| MbPA, 100 per task |" in process.stdout
    assert (tmp_path / "run" / "figure.png").exists()
    grid = "--tasks 1 --queries 5 --neighbors 4 --bandwidths 2 --rates 0.05 --steps 1 --vote-neighbors 3"
    more = "--vote-bandwidths 1 --random-rates 0.01 --random-steps 1"
    process = recollect("reproduce", "figure3-tuning", *grid.split(), *more.split(), "--out", str(tmp_path / "grid"))
    assert process.returncode == 0, process.stderr
    for curve in ("mlp", "vote-250", "mbpa-1000", "random-1000"):
        assert f"| {curve} |" in process.stdout


def test_missing_data_is_one_line_that_says_where_to_get_it(tmp_path: Path) -> None:
    # An address that refuses at once stands for a machine without network.
    environment = {"RECOLLECT_DATA": str(tmp_path), "RECOLLECT_CACHE": str(tmp_path / "cache")}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    process = subprocess.run(
        [sys.executable, "-m", "recollect", "reproduce", "figure3", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment, **proxies},
    )
    assert process.returncode == 2
    line = process.stderr.splitlines()[-1]
    assert "RECOLLECT_DATA" in line
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("command", [("reproduce", "table1"), ("reproduce", "new-classes"), ("explain",)])
def test_missing_images_are_one_line_that_says_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path))
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "tiny-imagenet-200.zip is not in" in printed.err.splitlines()[-1]
    assert "RECOLLECT_DATA" in printed.err.splitlines()[-1]
    assert not printed.out


def test_control_c_is_one_line_and_status_130(tmp_path: Path) -> None:
    # Where the tests run as a shell's background job, SIGINT is ignored unless asked for.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from recollect.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "demo", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not (tmp_path / "results.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped" in errors


def test_a_full_disk_is_one_line_and_status_2(tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    process = recollect("demo", "--out", str(tmp_path), preexec_fn=small_files)
    assert process.returncode == 2
    assert "File too large" in one_line(process)
    assert "--out" in one_line(process)


def test_an_unwritable_folder_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    process = recollect("demo", "--out", str(tmp_path / "file" / "out"))
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
