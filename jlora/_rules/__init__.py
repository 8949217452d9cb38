"""What jlora knows of each primitive: how factors pass it, and how they are used.

No adapter, no config. Begin at `rule.py`.
"""
