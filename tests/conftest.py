"""Shared set-up: eight host devices, strict broadcasting, fresh random keys."""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA ends a process in which one of the host's devices waits 40 seconds for another:
# where other work has the processors, that is not long.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)

# Workers share the processors: where each has threads for all of them they wait for one
# another, which takes a tenth of the time.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    share = max((os.cpu_count() or 1) // int(workers), 1)
    os.environ.setdefault("NPROC", str(share))

import jax
import pytest

# Both must be set before the first array exists: the CPU client is built then.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Scripts for a Python that has torch and PEFT; and a variant, which is registered once:
# under the name by which tests import it.
collect_ignore = ["oracle", "support/variant_of_tests.py"]

# What is one test for each use of a kernel, each wrapper of a function, or each model.
CROSSED = (
    "test_batch.py",
    "test_capped_rank.py",
    "test_dora.py",
    "test_formed.py",
    "test_joined.py",
    "test_mesh_surface.py",
    "test_mixed.py",
    "test_product_dtypes.py",
    "test_quant.py",
    "test_quant_wrappers.py",
    "test_strict_promotion.py",
    "test_symbolic.py",
    "test_uses.py",
    "test_wrappers.py",
    "test_zoo.py",
)

# What is slow, and one test for each pair of things: of each test of these files so
# many times the share of those above is run, and one case at least.
PAIRED = (
    "test_algebra_variants.py",
    "test_capped_tools.py",
    "test_control_flow.py",
    "test_conv.py",
    "test_dropout.py",
    "test_dropout_forms.py",
    "test_examples_qlora.py",
    "test_examples_sharded.py",
    "test_examples_sweep.py",
    "test_few_kernel.py",
    "test_filled_rows.py",
    "test_folders_fuzz.py",
    "test_fsdp_widths.py",
    "test_hadamard.py",
    "test_init_data.py",
    "test_init_moving.py",
    "test_kernel_scale.py",
    "test_layers.py",
    "test_linen.py",
    "test_memory.py",
    "test_memory_discipline.py",
    "test_mixed_experts.py",
    "test_mixed_forms.py",
    "test_modes.py",
    "test_mosaic.py",
    "test_moved_scales.py",
    "test_partitioned.py",
    "test_peft_convolutions.py",
    "test_peft_fuzz.py",
    "test_peft_golden.py",
    "test_platforms.py",
    "test_products.py",
    "test_quant_packed.py",
    "test_quant_tools.py",
    "test_relatives.py",
    "test_sharded_programs.py",
    "test_tpu_kernel.py",
    "test_variant_table.py",
)
TIMES = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--whole`, and what CI shares tests out among releases with."""
    told = "run every crossing, and 5,000 random programs: hours on two cores"
    parser.addoption("--whole", action="store_true", help=told)
    told = (
        "run one in N of the crossings of uses, wrappers and models, those of share K"
        " (0/48 where no file is named, else all)"
    )
    parser.addoption("--sample", metavar="K/N", help=told)
    parser.addoption("--thin", default="0/1", metavar="K/N", help="and of all others")
    told = "how many random programs test_random_programs.py runs (300)"
    parser.addoption("--programs", type=int, metavar="N", help=told)


def pytest_configure(config: pytest.Config) -> None:
    """Without a word a run takes a share of what is crossed: minutes, not hours."""
    whole, options = config.getoption("--whole"), config.option
    if options.programs is None:
        options.programs = 5000 if whole else 300
    if options.sample is None:
        named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
        options.sample = "0/1" if whole or named else "0/48"


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leaves tests out, by their names and so always the same ones."""
    share = {
        name: tuple(map(int, config.getoption(f"--{name}").split("/")))
        for name in ("sample", "thin")
    }
    k, n = share["sample"]
    few = max(1, n // TIMES)

    def chosen(item: pytest.Item) -> bool:
        if item.path.name in PAIRED:
            return _number(item) % few == k % few
        one, of = (k, n) if item.path.name in CROSSED else share["thin"]
        return _number(item) % of == one

    kept = set(filter(chosen, items))
    if share["thin"] == (0, 1):
        kept |= _first_of_each(i for i in items if i.path.name in PAIRED)
    config.hook.pytest_deselected(items=[i for i in items if i not in kept])
    items[:] = [item for item in items if item in kept]


def _number(item: pytest.Item) -> int:
    return zlib.crc32(item.nodeid.encode())


def _first_of_each(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Returns one case of each test."""
    found = {item.nodeid.partition("[")[0]: item for item in items}
    return set(found.values())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says what became of the random programs, if any ran."""
    from programs.tally import Tally

    tally = Tally()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, numbers in getattr(report, "user_properties", ()):
                if name == "programs" and report.when == "call":
                    tally.update(numbers)
    if tally.kinds:
        terminalreporter.write_line(str(tally))


@pytest.fixture
def getkey(request: pytest.FixtureRequest) -> Callable[[], jax.Array]:
    """A function that returns a new key at every call, the same ones in every run.

    The seed is made from the name of the test, so that adding a test does not change
    the numbers of the others, nor does a new folder; it is printed, and shown by
    pytest when a test fails.
    """
    _, _, test = request.node.nodeid.partition("::")
    seed = zlib.crc32(f"tests/{request.path.name}::{test}".encode())
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
