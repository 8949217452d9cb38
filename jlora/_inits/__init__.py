"""Factors that start from the kernel or from data.

Plain random ones are in `_adapter/initializers.py`. Begin at `from_kernel.py`.
"""
