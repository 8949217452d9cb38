"""The record of an adapter, and what is checked when it is restored.

Orbax is in `checkpoint.py`. Begin at `record.py`.
"""
