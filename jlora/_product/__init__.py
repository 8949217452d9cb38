"""`x·W + s·(x·a)·b` on matrices, forward and backward.

No jaxpr, no adapter. Begin at `group.py`, then `forms.py`.
"""
