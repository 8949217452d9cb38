"""Runs many programs: `python -m programs --programs 300 --first 0`, in `tests`."""

import argparse
import collections
import os
import re
import sys
import time
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
warnings.simplefilter("error")

from programs.check import check  # noqa: E402
from programs.generate import draw, shrink, write  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--show", action="store_true", help="also those that are right")
    args = parser.parse_args()
    kinds, refused = collections.Counter(), collections.Counter()
    began = time.time()
    for seed in range(args.first, args.first + args.programs):
        program = draw(seed)
        outcome = check(program)
        kinds[outcome.kind] += 1
        if outcome.kind == "refused":
            found = re.search(r"reach\w* `?([\w-]+)`?", outcome.told)
            refused[found[1] if found else outcome.told[:100]] += 1
        if args.show:
            print(seed, *program.steps, outcome, write(program).source, sep="\n")
        if outcome.kind == "failed":
            if args.shrink:
                known = re.sub(r"\d+|off.*", "", outcome.told)[:40]
                same = lambda p: re.sub(r"\d+|off.*", "", check(p).told)[:40] == known
                program = shrink(program, same)
                outcome = check(program)
            print("SEED", seed, outcome.told, program.settings, program.mesh)
            print(*program.steps)
            print(write(program).source, write(program).leaves, write(program).inputs, flush=True)
    took = time.time() - began
    print(dict(kinds), f"{took / args.programs:.3f} s a program")
    for told, n in refused.most_common():
        print(f"{n:5} {told}")
    return kinds["failed"] > 0


sys.exit(main())
