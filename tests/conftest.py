"""Settings that all tests share: jaxtyping's shapes are checked at run time, one thread, no deadlines."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import hypothesis
import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook("recollect", "beartype.beartype")  # works only before recollect is first imported
torch.set_num_threads(1)
hypothesis.settings.register_profile("recollect", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("recollect")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Networks made without a generator are the same in every run, whatever tests run before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def rng_untouched() -> Callable[[], AbstractContextManager[None]]:
    """Gives ``with rng_untouched(): ...``, which fails where the block uses the global random state of torch."""

    @contextmanager
    def check() -> Iterator[None]:
        before = torch.get_rng_state()
        yield
        assert torch.equal(torch.get_rng_state(), before), "the global random state has moved"

    return check


@pytest.fixture
def untyped() -> Iterator[None]:
    """Switches the run-time type checks off: what is left are the checks that users have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
