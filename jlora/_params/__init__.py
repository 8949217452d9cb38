"""The frozen tree: paths of leaves, roles of axes, quantised and lazy values.

Nothing that is trained. Begin at `paths.py` and `axes.py`.
"""
