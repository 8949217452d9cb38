"""Canonical paths of a params tree, pattern matching, and hints for typos."""

import dataclasses
import difflib
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path


def is_box(node: Any) -> bool:
    """Returns whether `node` wraps one array in metadata, as Flax's boxes do.

    Both kinds are known by what they offer, so that Flax need not be imported:
    `nn.Partitioned` and its relatives (`unbox`, `replace_boxed`), and `nnx.Variable`
    (`get_raw_value`, `set_raw_value`).
    """
    kind = type(node)
    linen = hasattr(kind, "unbox") and hasattr(kind, "replace_boxed")
    return linen or (hasattr(kind, "get_raw_value") and hasattr(kind, "set_raw_value"))


def is_quantized(node: Any) -> bool:
    """Returns whether `node` is a quantised kernel, as `qwix.QArray` is.

    It is known by its fields, so that qwix need not be imported; of its class, for a
    box has the attributes of what it holds.
    """
    fields = getattr(type(node), "__dataclass_fields__", {})
    return {"qvalue", "scale", "zero_point", "qtype"} <= set(fields)


@dataclasses.dataclass(frozen=True)
class FlatParams:
    """A params tree as a list of leaves with their canonical paths.

    Attributes:
        paths: the paths of the leaves.
        leaves: the leaves.
        treedef: the structure of the tree.
        collections: the collections beside "params", if these are Linen's variables.
    """

    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    treedef: Any
    collections: frozenset[str] = frozenset()

    @classmethod
    def of(cls, params: Any) -> "FlatParams":
        """Flattens `params`; boxes are left out of the paths, not out of the tree.

        A quantised kernel is one leaf.
        """
        paths = []
        whole = lambda node: is_box(node) or is_quantized(node)
        for key_path, node in tree_flatten_with_path(params, is_leaf=whole)[0]:
            path = keystr(key_path, simple=True, separator="/")
            paths.extend([path] * len(jax.tree.leaves(node, is_leaf=is_quantized)))
        _reject_duplicates(paths)
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_quantized)
        return cls(tuple(paths), tuple(leaves), treedef, _collections(params))

    def collection(self, path: str) -> str | None:
        """Returns the collection of a leaf that is no parameter, such as a statistic.

        None for a parameter: in Linen's variables one of "params", else any leaf.
        """
        first = path.partition("/")[0]
        return first if first in self.collections else None

    def by_path(self) -> dict[str, Any]:
        """Returns the leaves by path."""
        return dict(zip(self.paths, self.leaves, strict=True))

    @property
    def tree(self) -> Any:
        """The tree itself."""
        return self.treedef.unflatten(self.leaves)

    def replace(self, new: dict[str, Any]) -> Any:
        """Returns the tree with the leaves at the paths of `new` replaced."""
        pairs = zip(self.paths, self.leaves, strict=True)
        return self.treedef.unflatten([new.get(path, leaf) for path, leaf in pairs])


def _collections(params: Any) -> frozenset[str]:
    """Returns the names of what Linen's variables have beside "params".

    They are known as a dict, or Flax's frozen one, that has params as a dict in it.
    """
    is_dict = lambda node: isinstance(node, dict) or hasattr(type(node), "unfreeze")
    if not is_dict(params) or not is_dict(params.get("params")):
        return frozenset()
    return frozenset(map(str, params)) - {"params"}


def _reject_duplicates(paths: Sequence[str]) -> None:
    twice = sorted(path for path, times in Counter(paths).items() if times > 1)
    if twice:
        raise ValueError(
            f"several leaves of params share the path(s) {twice}; jlora needs one path "
            "per leaf. Do any keys of the tree contain '/'?"
        )


def flags_of(pattern: str) -> str:
    """Returns the flags for a whole pattern, which stand at its beginning.

    >>> flags_of("(?i)(query|value)")
    '(?i)'
    """
    found = _FLAGS.match(pattern)
    return found[0] if found else ""


_FLAGS = re.compile(r"(?:\(\?[aiLmsux]+\))*")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern that must match a run of whole path segments.

    >>> bool(compile_pattern("query").search("params/attention/query/kernel"))
    True
    >>> bool(compile_pattern("query").search("params/query_norm/scale"))
    False
    >>> bool(compile_pattern("(?i)Query").search("params/attention/query/kernel"))
    True
    """
    flags = flags_of(pattern)
    # With the flag for comments one may end the pattern, and the line ends it.
    end = "\n" if "x" in flags else ""
    run = pattern[len(flags) :] + end
    return re.compile(rf"{flags}(?:^|(?<=/))(?:{run})(?:$|(?=/))")


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths that `pattern` matches, in order."""
    compiled = compile_pattern(pattern)
    return [path for path in paths if compiled.search(path)]


def names(pattern: str, path: str) -> bool:
    """Returns whether a pattern matches a path for what its first segment is called.

    >>> names("batch_stats/.*", "batch_stats/bn/mean"), names("bn", "batch_stats/bn/m")
    (True, False)
    """
    compiled = compile_pattern(pattern)
    first, slash, rest = path.partition("/")
    other = first.translate(_OTHER) + slash + rest
    return bool(compiled.search(path)) and not compiled.search(other)


# Each letter is another one of its kind: what matches that, matches any name.
_LETTERS = string.ascii_letters
_OTHER = str.maketrans(
    _LETTERS, _LETTERS[13:26] + _LETTERS[:13] + _LETTERS[39:] + _LETTERS[26:39]
)


def nearest(pattern: str, paths: Iterable[str], n: int = 3) -> list[str]:
    """Returns up to `n` paths that look like `pattern`, the likeliest first."""
    plain = re.sub(r"[\\^$.|?*+()\[\]{}]+", "/", pattern).strip("/").lower()

    def likeness(path: str) -> float:
        segments = path.lower().split("/")
        tails = ["/".join(segments[i:]) for i in range(len(segments))]
        runs = [*segments, *tails]
        return max(difflib.SequenceMatcher(None, plain, run).ratio() for run in runs)

    return sorted(paths, key=likeness, reverse=True)[:n]


def is_array(leaf: Any) -> bool:
    """Returns whether a leaf is traced; any other leaf is closed over as it is."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return True
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


PyTree: TypeAlias = Any


def is_floating(leaf: Any) -> bool:
    """Returns whether a leaf is an array of floating numbers."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_empty(leaf: Any) -> bool:
    """Returns whether an array has no values."""
    return 0 in leaf.shape
