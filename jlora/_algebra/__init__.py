"""Sums, spectra, stacks and norms of adapters.

No program is traced here. Begin at `vectors.py`.
"""
