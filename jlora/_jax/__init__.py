"""What differs between JAX releases, and small helpers over JAX alone.

No word of kernels or adapters. Begin at `versions.py`.
"""
