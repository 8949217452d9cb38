"""Which leaves a config means, by its patterns alone."""

from collections.abc import Sequence

from .._adapter.config import LoraConfig
from .._adapter.variants import variant_of_config
from .._params.alternatives import alternatives
from .._params.paths import FlatParams, is_floating, matching, names
from .problems import several
from .target import Unusable

# The collections of Linen's own layers and transforms: nobody means them by a pattern.
KEPT_BY_LAYERS = {
    "batch_stats",
    "cache",
    "intermediates",
    "params_axes",
    "perturbations",
    "_overwrite_with_gradient",
}


def match(config: LoraConfig, params: FlatParams) -> set[str]:
    """Returns the paths that a config matches: of params, and what its patterns name.

    A statistic or a cache is none of the params, unless a pattern names its collection.
    """
    excluded = hit(config.exclude, params.paths)
    if config.target is None:
        found = {path for path in params.paths if params.collection(path) is None}
        return found - excluded
    found = hit(config.target, params.paths)
    apart = {path for path in found if params.collection(path) is not None}
    patterns = several(config.target)
    each = [*patterns, *(one.alone for p in patterns for one in alternatives(p))]
    named = {path for path in apart if any(names(one, path) for one in each)}
    return (found - apart | named) - excluded


def hit(patterns: str | Sequence[str] | None, paths: Sequence[str]) -> set[str]:
    """Returns the paths that any of the patterns matches."""
    return set().union(*(matching(p, paths) for p in several(patterns)))


def in_collections(
    params: FlatParams, configs: Sequence[LoraConfig], taken: set[str]
) -> list[Unusable]:
    """Returns the leaves that a config matches but for the collection they are in.

    Args:
        params: the flattened params.
        configs: the configs.
        taken: the paths that a config matches and names.
    """
    beside = [path for path in params.paths if params.collection(path) is not None]
    apart = [path for path in beside if path not in taken]
    leaves, found = params.by_path(), []
    is_whole = lambda config: not variant_of_config(config).has_roles
    hits = [(c, hit(c.target, apart) - hit(c.exclude, apart)) for c in configs]
    for path in set().union(*(paths for _, paths in hits)):
        collection, leaf = params.collection(path), leaves[path]
        shape = tuple(getattr(leaf, "shape", ()))
        whole = any(is_whole(c) for c, paths in hits if path in paths)
        doubtful = collection not in KEPT_BY_LAYERS and is_floating(leaf)
        reason = (
            f"is in the collection {collection!r}, which is left alone unless a "
            f"pattern names it, as '{collection}/...' does"
        )
        doubtful = doubtful and (whole or len(shape) > 1)
        found.append(Unusable(path, shape, reason, is_doubtful=doubtful))
    return found
