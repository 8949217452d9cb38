"""Torch's names and layouts of modules, and those of a params tree.

No file is opened here. Begin at `modules.py`, `assemble.py` and `names.py`.
"""
