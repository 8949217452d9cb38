"""Random programs: adapted, each gives what it gives with its kernels merged.

A program that fails is shrunk and shown as Python. Others are to be had by
`python -m programs --first 5000 --programs 1000` in this folder.
"""

from collections.abc import Callable

import jax
import pytest
from programs.check import Outcome, check
from programs.generate import Program, draw, shrink, text
from programs.tally import Tally, alike

pytestmark = pytest.mark.usefixtures("fast_compile")

CHUNK = 25
# Of all 5,000 programs about a fifth is refused; these are bounds for any 25.
MOST_REFUSED, MOST_UNFIT = 17, 6


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each 25 of the programs that are asked for."""
    if "first" in metafunc.fixturenames:
        programs = metafunc.config.getoption("--programs")
        metafunc.parametrize("first", range(0, programs, CHUNK))


def test_programs(first: int, record_property: Callable[[str, object], None]) -> None:
    tally, failures = Tally(), []
    for seed in range(first, first + CHUNK):
        program = draw(seed)
        outcome = check(program)
        tally.add(outcome)
        if outcome.kind == "failed":
            failures.append((program, outcome))
    record_property("programs", tally.plain())
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
