"""Random programs over kernels, and the comparison with a merge that they must pass.

`steps_carry`, `steps_use` and `steps_wrap` say what a program can do, each step as a
line of Python. `build` writes a program of such lines, `generate` draws its steps from
a seed and drops them again to shrink a failure, `check` runs it. `python -m programs`
in `tests` runs as many as one likes.
"""
