"""Reading what a stranger wrote, and writing so that no half file is ever seen.

No format of adapters. Begin at `untrusted.py`.
"""
