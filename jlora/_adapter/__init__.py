"""Configs, what an adapter holds of each leaf, and what is done with it alone.

No jaxpr. Begin at `config.py` and `factors.py`.
"""
