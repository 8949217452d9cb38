"""Runs many programs: `python -m programs --programs 300 --first 0`, in `tests`."""

import argparse
import dataclasses
import os
import sys
import time
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
warnings.simplefilter("error")

from programs.check import Outcome, check  # noqa: E402
from programs.generate import Program, Step, draw, shrink, text  # noqa: E402
from programs.tally import Tally, alike  # noqa: E402


def main() -> int:
    """Runs programs, shows those that fail, and counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--shrink", action="store_true", help="those that fail")
    parser.add_argument("--show", action="store_true", help="all others too")
    parser.add_argument("--without", nargs="*", default=[], help="kinds of steps")
    args = parser.parse_args()
    tally, began = Tally(), time.process_time()
    for seed in range(args.first, args.first + args.programs):
        program = without(draw(seed), args.without)
        outcome = check(program)
        tally.add(outcome)
        if outcome.kind == "failed" and args.shrink:
            program, outcome = shrunk(program, outcome)
        if outcome.kind == "failed" or args.show:
            print(f"{outcome.kind}: {outcome.told}\n{text(program)}", flush=True)
    print(tally)
    print(f"{(time.process_time() - began) / args.programs:.3f} s of CPU a program")
    return tally.kinds["failed"] > 0


def without(program: Program, kinds: list[str]) -> Program:
    """The program without its steps of some kinds."""

    def kept(steps: tuple[Step, ...]) -> tuple[Step, ...]:
        return tuple(
            dataclasses.replace(step, inner=kept(step.inner))
            for step in steps
            if step.kind not in kinds
        )

    return dataclasses.replace(program, steps=kept(program.steps))


def shrunk(program: Program, outcome: Outcome) -> tuple[Program, Outcome]:
    """The smallest program that fails alike."""
    fails = lambda smaller: alike(check(smaller).told) == alike(outcome.told)
    smallest = shrink(program, fails)
    return smallest, check(smallest)


sys.exit(main())
