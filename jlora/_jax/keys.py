"""PRNG keys by the path of a leaf."""

import hashlib

import jax


def key_of(key: jax.Array, path: str) -> jax.Array:
    """Returns a key for `path` alone, so that no target changes another's factors."""
    digest = hashlib.blake2b(path.encode(), digest_size=4).digest()
    return jax.random.fold_in(key, int.from_bytes(digest, "big"))
