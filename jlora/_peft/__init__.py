"""PEFT's config, keys and files.

Layouts of torch are in `_torch`. Begin at `read.py` and `write.py`.
"""
