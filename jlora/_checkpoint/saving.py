"""From an adapter to its record, with all checks before anything is written."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._adapter.check import check_adapter
from .._adapter.config import LoraConfig
from .._adapter.entries import (
    arrays_of,
    entry_with,
    given_shapes,
    kernel_shape,
    wanted_shapes,
)
from .._adapter.variants import variant_of_config, variant_of_entry
from .._errors import AdapterError, NonFiniteError
from .._params.layout import unboxed
from .._params.paths import FlatParams, PyTree, matching
from .fingerprint import Kernel, contents, fingerprint
from .record import Entry, Record


def record_of(
    adapter: Any, config: LoraConfig | Sequence[LoraConfig], base: PyTree | None
) -> tuple[Record, dict[str, Any]]:
    """Returns the record of an adapter, and the adapter sorted and without boxes.

    Raises:
        TypeError: if the adapter is no dict by path, or the config is none.
        AdapterError: with every entry that cannot be saved, or does not fit.
        NonFiniteError: with every array that holds NaNs or infinities.
    """
    configs = _configs(config)
    plain = _plain(adapter)
    alphas = _alphas(plain, configs)
    kernels = _kernels(plain, base)
    checksums = _checksums(plain)
    shape = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype)
    entries = tuple(
        Entry(p, jax.tree.map(shape, entry), alphas[p], kernels[p], checksums[p])
        for p, entry in plain.items()
    )
    given = config if isinstance(config, LoraConfig) else configs
    return Record(given, entries), plain


def _configs(config: Any) -> tuple[LoraConfig, ...]:
    configs = tuple(config) if isinstance(config, list | tuple) else (config,)
    wrong = [c for c in configs if not isinstance(c, LoraConfig)]
    if wrong:
        raise TypeError(f"`config` is a `LoraConfig` or several, got {wrong[0]!r}")
    return configs


def _plain(adapter: Any) -> dict[str, Any]:
    """Returns the adapter in the order of its paths, its arrays out of their boxes."""
    if not isinstance(adapter, Mapping) or not all(isinstance(p, str) for p in adapter):
        raise TypeError(
            "an adapter is a dict from path to `LoraFactors` or array, got "
            f"{type(adapter).__name__}"
        )
    plain, problems = {}, [] if adapter else ["it is empty"]
    for path in sorted(adapter):
        arrays = {n: unboxed(array) for n, array in arrays_of(adapter[path]).items()}
        plain[path] = entry_with(adapter[path], arrays)
        found = [_unfit(f"{path!r}, {n}", array) for n, array in arrays.items()]
        problems += [problem for problem in found if problem]
        if not any(found) and not _consistent(plain[path]):
            shapes = {n: tuple(array.shape) for n, array in arrays.items()}
            problems.append(f"{path!r} has {shapes}, and {plain[path].axes}")
    _raise_if(problems, "the adapter cannot be saved")
    return plain


def _unfit(what: str, array: Any) -> str | None:
    if isinstance(array, Tracer) or not isinstance(array, jax.Array | np.ndarray):
        return f"{what} is no array but a {type(array).__name__}"
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"{what} has the dtype {array.dtype}, which is not floating"
    if not math.prod(array.shape):
        return f"{what} has no values: its shape is {tuple(array.shape)}"
    return None


def _consistent(entry: Any) -> bool:
    """Returns whether the shapes of arrays are those that their axes say."""
    try:
        return wanted_shapes(entry, kernel_shape(entry)) == given_shapes(entry)
    except IndexError:  # an array has too few axes to tell the kernel's shape
        return False


def _alphas(
    adapter: Mapping[str, Any], configs: Sequence[LoraConfig]
) -> dict[str, float | None]:
    """Returns the alpha of the first config that gives each entry as it is."""
    alphas, problems = {}, []
    for path, entry in adapter.items():
        found = [config for config in configs if _explains(config, path, entry)]
        if not found:
            problems.append(_unexplained(path, entry))
        else:
            ranked = variant_of_entry(entry).rank is not None
            alphas[path] = found[0].alpha if ranked else None
    _raise_if(problems, "the adapter is not one of `config`")
    return alphas


def _explains(config: LoraConfig, path: str, entry: Any) -> bool:
    several = lambda p: (p,) if isinstance(p, str) else p or ()
    hit = lambda patterns: any(matching(p, [path]) for p in several(patterns))
    if hit(config.exclude):
        return False
    variant = variant_of_entry(entry)
    if not variant.has_roles and path.rpartition("/")[2] == "bias":
        if config.bias != "none":
            return True
    if config.target is not None and not hit(config.target):
        return False
    settings = variant.settings_of
    if variant_of_config(config) is not variant or settings(config) != settings(entry):
        return False
    arrays = variant.arrays(entry)
    if any(asks(config) != (n in arrays) for n, asks in variant.optional.items()):
        return False
    if variant.rank is None:
        return True
    # One that a file brought may have the rank that was asked all the same.
    capped = variant.rank(config, entry.axes, entry.kernel_shape)
    same = math.isclose(config.scaling, entry.scaling, rel_tol=1e-6)
    return same and entry.rank in (capped, config.rank)


def _unexplained(path: str, entry: Any) -> str:
    variant = variant_of_entry(entry)
    if not variant.has_roles:
        return f"{path!r} is trained whole, and no config that matches it is `full`"
    if variant.rank is None:
        settings = variant.settings_of(entry).items()
        told = " and ".join(f"{name} {value}" for name, value in settings)
        return f"{path!r} has {told}, and no config that matches it has them"
    rank, scaling = entry.rank, float(entry.scaling)
    dora = ", dora=True" if getattr(entry, "magnitude", None) is not None else ""
    named = f", variant={variant.name!r}" if variant.is_named else ""
    return (
        f"{path!r} has rank {rank} and scaling {scaling}"
        f"{' and a magnitude' if dora else ''}, and no config that matches "
        f"it does; `LoraConfig({re.escape(path)!r}, rank={rank}, "
        f"alpha={scaling * rank}{dora}{named})` would"
    )


def _kernels(adapter: Mapping[str, Any], base: PyTree | None) -> dict[str, Kernel]:
    """Returns what is known of the kernels, from the base if it is given."""
    if base is not None:
        check_adapter(FlatParams.of(base), adapter)
        return fingerprint(base, adapter)
    return {path: Kernel(kernel_shape(entry)) for path, entry in adapter.items()}


def _checksums(adapter: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    named = {
        (path, name): array
        for path, entry in adapter.items()
        for name, array in arrays_of(entry).items()
    }
    found = dict(zip(named, contents(list(named.values())), strict=True))
    bad = [
        f"{path!r}, {name}: {content.nonfinite} of {named[path, name].size} values"
        for (path, name), content in found.items()
        if content.nonfinite
    ]
    if bad:
        raise NonFiniteError(
            "the adapter holds NaNs or infinities and is not saved:\n" + "\n".join(bad)
        )
    checksums: dict[str, dict[str, str]] = {path: {} for path in adapter}
    for (path, name), content in found.items():
        checksums[path][name] = content.checksum
    return checksums


def _raise_if(problems: Sequence[str], what: str) -> None:
    if problems:
        raise AdapterError(f"{what}:\n" + "\n".join(problems))
