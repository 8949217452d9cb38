"""Canonical paths of a params tree, pattern matching, and hints for typos."""

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
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
    """A params tree as a list of leaves with their canonical paths."""

    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    treedef: Any

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
        return cls(tuple(paths), tuple(leaves), treedef)

    def by_path(self) -> dict[str, Any]:
        """Returns the leaves by path."""
        return dict(zip(self.paths, self.leaves, strict=True))

    def replace(self, new: dict[str, Any]) -> Any:
        """Returns the tree with the leaves at the paths of `new` replaced."""
        pairs = zip(self.paths, self.leaves, strict=True)
        return self.treedef.unflatten([new.get(path, leaf) for path, leaf in pairs])


def _reject_duplicates(paths: Sequence[str]) -> None:
    twice = sorted(path for path, times in Counter(paths).items() if times > 1)
    if twice:
        raise ValueError(
            f"several leaves of params share the path(s) {twice}; jlora needs one path "
            "per leaf. Do any keys of the tree contain '/'?"
        )


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern that must match a run of whole path segments.

    >>> bool(compile_pattern("query").search("params/attention/query/kernel"))
    True
    >>> bool(compile_pattern("query").search("params/query_norm/scale"))
    False
    """
    return re.compile(rf"(?:^|(?<=/))(?:{pattern})(?:$|(?=/))")


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths that `pattern` matches, in order."""
    compiled = compile_pattern(pattern)
    return [path for path in paths if compiled.search(path)]


def nearest(pattern: str, paths: Iterable[str], n: int = 3) -> list[str]:
    """Returns up to `n` paths that look like `pattern`, the likeliest first."""
    plain = re.sub(r"[\\^$.|?*+()\[\]{}]+", "/", pattern).strip("/").lower()

    def likeness(path: str) -> float:
        segments = path.lower().split("/")
        tails = ["/".join(segments[i:]) for i in range(len(segments))]
        runs = [*segments, *tails]
        return max(difflib.SequenceMatcher(None, plain, run).ratio() for run in runs)

    return sorted(paths, key=likeness, reverse=True)[:n]
