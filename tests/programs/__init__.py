"""Random programs over kernels, and the comparison with a merge that they must pass.

`steps_*` say what a program can do to a kernel, each in a line of Python; `build` writes
a program from steps; `generate` draws the steps from a seed, and drops them again to
shrink a failure; `check` runs a program. `python -m programs` in `tests` runs many.
"""
