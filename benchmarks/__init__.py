"""The benchmarks: recollect and what else one could use, measured side by side in one process.

``python -m benchmarks`` (or ``make bench``) runs them all at a scale of minutes, ``python -m benchmarks NAME --full``
records one in ``benchmarks/results``, and ``python -m benchmarks --docs`` puts what is recorded into
``docs/performance.md``. A benchmark is a module with ``NAME``, ``TITLE``, ``count(full)``, the number of its cases,
and ``cases(full, device)``, which makes one after the other; ``case.py`` says what a case is.
"""
