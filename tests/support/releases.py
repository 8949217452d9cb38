"""What older releases lack, or do wrongly: each test that is left out names which."""

import importlib.metadata
import re
from typing import Any

import jax
import pytest


def release(package: str) -> tuple[int, ...]:
    """Returns the first three numbers of the release that is installed."""
    numbers = re.findall(r"\d+", importlib.metadata.version(package))
    return tuple(map(int, numbers[:3]))


def is_before(package: str, first: str) -> bool:
    """Returns whether the release that is installed comes before another."""
    return release(package) < tuple(map(int, first.split(".")))


def since(package: str, first: str, why: str) -> pytest.MarkDecorator:
    """Marks a test, or a parameter of one, that needs a release or a later one.

    Args:
        package: as pip calls it.
        first: the first release that will do.
        why: what those before lack, or do wrongly.
    """
    return pytest.mark.skipif(
        is_before(package, first),
        reason=f"{package} before {first}: {why}",
    )


def varying(tree: Any, axis: str) -> Any:
    """Returns arrays marked as varying along an axis of `shard_map`."""
    if is_before("jax", "0.8.2"):
        return jax.tree.map(lambda v: jax.lax.pvary(v, (axis,)), tree)
    return jax.tree.map(lambda v: jax.lax.pcast(v, (axis,), to="varying"), tree)
