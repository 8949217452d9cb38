"""Shared set-up: eight host devices, strict broadcasting, fresh random keys."""

import os
import zlib
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# Both must be set before the first array exists: the CPU client is built then.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Scripts for a Python that has torch and PEFT.
collect_ignore = ["peft_oracle"]

# Every use of a kernel is crossed with every wrapper, in each of these modules.
CROSSED = ("test_uses.py", "test_wrappers.py", "test_zoo.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--sample`, for a second JAX release on which the others have passed."""
    told = "run one in N of the crossings of uses, wrappers and models (by their names)"
    parser.addoption("--sample", type=int, default=1, metavar="N", help=told)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leaves crossings out, always the same ones."""
    n = config.getoption("--sample")
    out = [
        item
        for item in items
        if item.path.name in CROSSED and zlib.crc32(item.nodeid.encode()) % n
    ]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]


@pytest.fixture
def getkey(request: pytest.FixtureRequest) -> Callable[[], jax.Array]:
    """A function that returns a new key at every call, the same ones in every run.

    The seed is made from the name of the test, so that adding a test does not change
    the numbers of the others; it is printed, and shown by pytest when a test fails.
    """
    seed = zlib.crc32(request.node.nodeid.encode())
    print(f"getkey: seed {seed}")
    count = iter(range(1 << 30))
    return lambda: jax.random.fold_in(jax.random.key(seed), next(count))


@pytest.fixture(scope="module")
def fast_compile() -> Iterator[None]:
    """Compiles with few optimizations: for tests that compile much and run little.

    Programs compiled before, in another module, are forgotten: two operations that a
    test compares bit for bit must not be compiled in two ways.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
