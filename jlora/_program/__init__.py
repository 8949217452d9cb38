"""From a function to a program of steps, and its evaluation.

What single primitives do is in `_rules`. Begin at `trace.py` and `analysis.py`.
"""
