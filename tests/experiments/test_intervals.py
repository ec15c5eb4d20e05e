"""Intervals of means against the standard library."""

import statistics

import pytest
import torch

from recollect.experiments.meta.intervals import half_width, standard_errors


def test_intervals_and_standard_errors() -> None:
    samples = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    widths = half_width(samples)
    errors = [statistics.stdev(row) / 20**0.5 for row in samples.tolist()]
    assert widths.tolist() == pytest.approx([1.96 * error for error in errors])
    assert standard_errors(widths.tolist()) == pytest.approx(errors)
