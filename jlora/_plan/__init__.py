"""Which leaves a config means, and the table of what will be trained.

No evaluation. Begin at `select.py`.
"""
