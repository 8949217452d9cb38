"""The `LoraConfig`s that would choose the targets of an adapter from a file."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .._adapter.config import LoraConfig
from .._adapter.variants import variant_of_entry
from .._params.paths import matching
from .named_params import Base


def configs_of(
    entries: Mapping[str, Any],
    base: Base,
    *,
    alphas: Collection[float] = (),
    rslora: bool = False,
    dropout: float = 0.0,
) -> LoraConfig | tuple[LoraConfig, ...]:
    """Returns one config, or one for each kind of target.

    Experts have factors of their own in the file, and so in any program that the
    configs are for.

    Args:
        entries: the adapter.
        base: the params.
        alphas: those that the file names; any other is worked out from the scaling.
        rslora: whether an alpha is by the root of the rank, as far as the file says.
        dropout: the rate of dropout.
    """
    paths = list(base.params.paths)
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for path, kind in _asked(entries, base).items():
        kinds.setdefault(kind, []).append(path)
    configs = [
        _config(kind, _patterns(own, paths), sorted({*alphas}), rslora, dropout)
        for kind, own in kinds.items()
    ]
    return configs[0] if len(configs) == 1 else tuple(configs)


def _kind(entry: Any, batch: tuple[int, ...] | None) -> tuple[Any, ...]:
    variant = variant_of_entry(entry)
    settings = tuple(sorted(variant.settings_of(entry).items()))
    if variant.rank is not None:
        dora = getattr(entry, "magnitude", None) is not None
        return entry.rank, entry.scaling, str(entry.a.dtype), dora, batch, settings
    dtypes = {str(array.dtype) for array in variant.arrays(entry).values()}
    if variant.is_named:
        settings = (("variant", variant.name), *settings)
    return (max(dtypes), settings if variant.has_roles else None)


def _asked(entries: Mapping[str, Any], base: Base) -> dict[str, tuple[Any, ...]]:
    """Returns for each path the kind whose config gives its entry.

    Factors whose rank is all that their kernel allows may have been asked for with a
    larger one: the least that others of the same scaling have.
    """
    kinds = {path: _kind(e, base.experts(path)) for path, e in entries.items()}
    capped = {path for path, entry in entries.items() if _may_be_capped(entry)}
    free = {kind for path, kind in kinds.items() if path not in capped}
    found = dict(kinds)
    for path in capped:
        rank, *rest = kinds[path]
        alike = [k for k in free if [*k[1:]] == rest and k[0] >= rank]
        others = [kinds[p] for p in capped if [*kinds[p][1:]] == rest]
        found[path] = min(alike) if alike else max(others)
    return found


def _may_be_capped(entry: Any) -> bool:
    if variant_of_entry(entry).rank is None:
        return False
    return entry.rank == min(entry.axes.fans(entry.kernel_shape))


def _config(
    kind: tuple[Any, ...],
    target: tuple[str, ...],
    alphas: Sequence[float],
    rslora: bool,
    dropout: float,
) -> LoraConfig:
    if len(kind) == 2:
        dtype, settings = kind
        own: dict[str, Any] = {"full": True} if settings is None else dict(settings)
        return LoraConfig(target, dtype=dtype, **own)
    rank, scaling, dtype, dora, batch, settings = kind
    own_kind: dict[str, Any] = {
        "rank": rank,
        "dtype": dtype,
        "dora": dora,
        "dropout": float(dropout),
        "batch": batch,
        **dict(settings),
    }
    for by_root in (rslora, not rslora):
        for alpha in (*alphas, scaling * (rank**0.5 if by_root else rank)):
            config = LoraConfig(target, alpha=float(alpha), rslora=by_root, **own_kind)
            if config.scaling == scaling:
                return config
    return LoraConfig(target, alpha=scaling * rank, **own_kind)


def _patterns(own: Sequence[str], paths: Sequence[str]) -> tuple[str, ...]:
    """Returns patterns that match these paths and no other, short ones if they can."""
    tails = dict.fromkeys("/".join(path.split("/")[-2:]) for path in own)
    short = tuple(re.escape(tail) for tail in tails)
    chosen = {path for pattern in short for path in matching(pattern, paths)}
    if chosen == set(own):
        return short
    return tuple(f"^{re.escape(path)}$" for path in own)
