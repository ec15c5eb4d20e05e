"""Each example runs as a user would run it, and what it claims is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output(name: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def accuracies(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


def test_a_deployed_classifier_learns_a_class_and_forgets_it(tmp_path: Path) -> None:
    _, before, corrected, forgotten = map(accuracies, output("correct_a_classifier.py", tmp_path).splitlines())
    assert before[0] == 0
    assert before[1] > 95
    assert corrected[0] > 80  # twenty examples were enough ...
    assert corrected[1] > before[1] - 1  # ... and cost the old classes nothing worth the name
    assert forgotten[0] == 0


def test_regression_beats_the_network_and_the_mean(tmp_path: Path) -> None:
    lines = output("regression.py", tmp_path).splitlines()[1:]
    network, mean, adapted = (float(line.split()[-1]) for line in lines)
    assert adapted < 0.7 * mean
    assert mean < 0.3 * network
    assert adapted < 0.05  # less than the noise of one measurement


def test_a_saved_model_goes_on(tmp_path: Path) -> None:
    text = output("save_and_load.py", tmp_path)
    assert "bit for bit: True" in text
    assert "stays as it was: True" in text
    assert accuracies(text)[0] > 80
    assert not list(tmp_path.iterdir())


def test_learning_in_sequence_forgets_least_with_a_memory(tmp_path: Path) -> None:
    lines = output("learn_in_sequence.py", tmp_path).splitlines()[1:]
    rows = {line.split()[0]: accuracies(line) for line in lines}  # accuracy, forgetting; the same with a memory
    assert rows.keys() == {"nothing", "EWC", "MAS", "replay"}
    assert all(rows[name][0] > rows["nothing"][0] for name in ("EWC", "MAS", "replay"))
    assert all(row[2] > row[0] + 1 for row in rows.values())
    assert all(row[3] < row[1] for row in rows.values())


def test_a_pipeline_learns_a_class_that_it_was_not_trained_for(tmp_path: Path) -> None:
    _, before, taught, loaded, other = output("sklearn_new_class.py", tmp_path).splitlines()
    before, taught, loaded = map(accuracies, (before, taught, loaded))
    assert before[0] == 0
    assert before[1] > 95
    assert taught[0] > 70
    assert taught[1] > before[1] - 1
    assert loaded == taught
    assert other.startswith("MLPClassifier: ")


def test_every_example_is_short_and_tested() -> None:
    tested = set(re.findall(r"output\(\"(\w+\.py)\"", Path(__file__).read_text()))
    scripts = {path.name: path.read_text().splitlines() for path in EXAMPLES.glob("*.py")}
    assert tested == scripts.keys()
    assert max(map(len, scripts.values())) <= 60
