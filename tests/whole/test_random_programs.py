"""Random programs: adapted, each gives what it gives with its kernels merged.

A program that fails is shrunk and shown as Python. Others are to be had by
`python -m programs --first 5000 --programs 1000` in this folder.
"""

from collections.abc import Callable

import jax
import pytest
from programs.check import Outcome, Run, check, evaluated, numbers
from programs.compare import difference, largest
from programs.generate import Program, draw, shrink, text, write
from programs.tally import Tally, alike

pytestmark = pytest.mark.usefixtures("fast_compile")

CHUNK = 25
# Three programs in ten are refused, and one in twenty-five is none to JAX itself; these
# are bounds for any 25.
MOST_REFUSED, MOST_UNFIT = 16, 5
# Grouped convolutions on an Auto mesh at which XLA's partitioner ends the process (jax
# 0.11.2, 0.12.0.1): in the first one at that of the plain program's gradient.
ENDED = (1315, 4182)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each 25 of the programs that are asked for."""
    if "first" in metafunc.fixturenames:
        programs = metafunc.config.getoption("--programs")
        metafunc.parametrize("first", range(0, programs, CHUNK))


def test_programs(first: int, record_property: Callable[[str, object], None]) -> None:
    tally, failures = Tally(), []
    for seed in range(first, first + CHUNK):
        if seed in ENDED:
            continue
        program = draw(seed)
        outcome = check(program)
        tally.add(outcome)
        if outcome.kind == "failed":
            failures.append((program, outcome))
    record_property("programs", tally.plain())
    if first % (8 * CHUNK) == 0:
        jax.clear_caches()
    assert not failures, "\n\n".join(map(shown, *zip(*failures[:3], strict=True)))
    assert tally.kinds["refused"] <= MOST_REFUSED, tally.plain()
    assert tally.kinds["unfit"] <= MOST_UNFIT, tally.plain()


def shown(program: Program, outcome: Outcome) -> str:
    """The smallest program that fails alike, as Python."""
    fails = lambda smaller: alike(check(smaller).told) == alike(outcome.told)
    smallest = shrink(program, fails)
    return f"seed {program.seed}: {check(smallest).told}\n{text(smallest)}"


# the generator


@pytest.mark.parametrize("seed", range(1, 13))
def test_numpy_gives_what_xla_gives(seed: int) -> None:
    program = draw(seed)
    written = write(program)
    run = Run(program, written, numbers(program, written))
    run.plain()
    args = run.arguments()
    numpy, xla = evaluated(run.merged, *args), run.merged.lower().compile()(*args)
    for x, y in zip(jax.tree.leaves(numpy), jax.tree.leaves(xla), strict=True):
        assert not difference("output", x, y, largest(y), 1e-4)


def test_a_program_is_its_fields() -> None:
    assert [text(draw(seed)) for seed in range(20)] == [
        text(draw(seed)) for seed in range(20)
    ]


def test_shrinking_leaves_the_step_that_fails() -> None:
    program = next(
        p
        for p in map(draw, range(1000))
        if len(p.steps) > 3 and "pad" in [step.kind for step in p.steps]
    )
    has_pad = lambda p: "pad" in [step.kind for step in p.steps]
    assert [step.kind for step in shrink(program, has_pad).steps] == ["pad"]
