"""The record of a saved adapter: everything in it that is no array, as strict JSON."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapter.config import LoraConfig
from .._adapter.entries import arrays_of, axes_of
from .._adapter.variants import variant_of_config, variant_of_entry, variants
from .._adapter.variants.variant import Variant
from .._errors import CorruptFileError, FormatVersionError
from .._files.untrusted import parse_json
from .._params.axes import KernelAxes, Shape
from .._params.quantized import KNOWN
from .fingerprint import Kernel

FORMAT = "jlora.checkpoint"
VERSION = 1
LIMIT = 64 << 20  # bytes; a kernel takes about 600 of them

Configs = LoraConfig | tuple[LoraConfig, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a checkpoint says of one entry of the adapter.

    Attributes:
        path: the path of its kernel in the params.
        value: its shapes and dtypes: a `LoraFactors` of `jax.ShapeDtypeStruct`s with
            its axes and scaling, or one struct for a leaf that is trained whole.
        alpha: the alpha of its config; None for a leaf that is trained whole.
        kernel: shape of its kernel, and dtype and a digest of its values if known.
        checksums: a checksum of each of its arrays, by name.
    """

    path: str
    value: Any
    alpha: float | None
    kernel: Kernel
    checksums: Mapping[str, str]

    @property
    def rank(self) -> int | None:
        """The rank; None for a leaf that is trained whole."""
        return getattr(self.value, "rank", None)

    @property
    def scaling(self) -> float | None:
        """The scaling; None for a leaf that is trained whole."""
        return getattr(self.value, "scaling", None)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of the adapter in it, without any of its values.

    Attributes:
        config: the config or configs, as they were given to `save`.
        entries: the entries of the adapter, sorted by path.
        version: the version of the format.
    """

    config: Configs
    entries: tuple[Entry, ...]
    version: int = VERSION

    @property
    def adapter(self) -> dict[str, Any]:
        """The adapter as `jax.ShapeDtypeStruct`s, such as `jlora.shardings` takes."""
        return {entry.path: entry.value for entry in self.entries}

    @property
    def kernels(self) -> dict[str, Kernel]:
        """What is known of the kernels, by path."""
        return {entry.path: entry.kernel for entry in self.entries}

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as plain JSON values."""
        several = isinstance(self.config, tuple)
        configs = self.config if isinstance(self.config, tuple) else (self.config,)
        plain = [config.to_dict() for config in configs]
        return sealed(
            {
                "format": FORMAT,
                "version": self.version,
                "config": plain if several else plain[0],
                "entries": [_entry_to_dict(entry) for entry in self.entries],
            }
        )

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Record":
        """Returns the record that a text holds.

        Args:
            data: the text.
            where: what it is called in messages.

        Raises:
            FormatVersionError: if a newer jlora wrote it.
            CorruptFileError: if it is anything but what `to_dict` gives.
        """
        values = parse_json(data, where, limit=LIMIT)
        try:
            return _record(values, where)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, FormatVersionError):
                raise
            raise CorruptFileError(f"{where} is no record: {error}") from error


# --- to JSON ---


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a record with a digest of all others among them."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True)
    return {**rest, "digest": hashlib.sha256(text.encode()).hexdigest()}


def _entry_to_dict(entry: Entry) -> dict[str, Any]:
    arrays = {
        name: {
            "shape": list(array.shape),
            "dtype": np.dtype(array.dtype).name,
            "checksum": entry.checksums[name],
        }
        for name, array in arrays_of(entry.value).items()
    }
    kernel = {**dataclasses.asdict(entry.kernel), "shape": list(entry.kernel.shape)}
    plain: dict[str, Any] = {"path": entry.path, "kernel": kernel, "arrays": arrays}
    value, axes = entry.value, axes_of(entry.value)
    variant = variant_of_entry(value)
    plain |= {"variant": variant.name} if variant.is_named else {}
    if axes is None:
        return plain
    if variant.rank is not None:
        scaling = float(value.scaling)
        plain |= {"rank": value.rank, "alpha": entry.alpha, "scaling": scaling}
    plain |= {name: _listed(v) for name, v in variant.settings_of(value).items()}
    roles = {"batch": list(axes.batch), "in": list(axes.in_), "out": list(axes.out)}
    return {**plain, "axes": roles}


def _listed(value: Any) -> Any:
    return list(map(_listed, value)) if isinstance(value, tuple) else value


# --- from JSON ---


def _record(values: Any, where: str) -> Record:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"its `format` is not {FORMAT!r}")
    version = values.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"its `version` is {version!r}")
    if version > VERSION:
        raise FormatVersionError(
            f"{where} has version {version} of the format, and this jlora knows "
            f"{VERSION}; read it with a newer jlora"
        )
    if sealed(values) != values:
        raise ValueError("its values have another digest than it says")
    _, _, config, entries, _ = _fields(
        values,
        "it",
        format=str,
        version=int,
        config=(dict, list),
        entries=list,
        digest=str,
    )
    found = tuple(_entry(entry, f"entry {i}") for i, entry in enumerate(entries))
    paths = [entry.path for entry in found]
    if paths != sorted(set(paths)):
        raise ValueError("its entries are not sorted by path, each path once")
    return Record(_configs(config, where), found, version)


def _configs(values: Any, where: str) -> Configs:
    if isinstance(values, list):
        return tuple(_config(value, where) for value in values)
    return _config(values, where)


def _config(values: Any, where: str) -> LoraConfig:
    if not isinstance(values, dict):
        raise ValueError("a config is no object")
    unknown = sorted(values.keys() - {f.name for f in dataclasses.fields(LoraConfig)})
    if unknown:
        raise FormatVersionError(
            f"{where} has a `LoraConfig` with {unknown}, which this jlora does not "
            "know; read it with a newer jlora"
        )
    config = LoraConfig.from_dict(values)
    try:
        variant_of_config(config)
    except ValueError as error:
        raise _unknown(where, values["variant"]) from error
    return config


def _unknown(where: str, name: Any) -> FormatVersionError:
    return FormatVersionError(
        f"{where} has the variant {str(name)[:80]!r}, which this jlora does not know; "
        "read it with one that has it, or import the module that registers it first"
    )


def _entry(values: Any, where: str) -> Entry:
    variant = _variant(values, where)
    kinds: dict[str, Any] = {"path": str, "kernel": dict, "arrays": dict}
    kinds |= {"variant": str} if variant.is_named else {}
    kinds |= dict.fromkeys(variant.settings, _SETTING)
    if variant.rank is not None:
        kinds |= {"rank": int, "alpha": float, "scaling": float}
    kinds |= {"axes": dict} if variant.has_roles else {}
    path, kernel, arrays, *_ = _fields(values, where, **kinds)
    where = f"{where}, {path!r}"
    shape, dtype, samples = _fields(
        kernel, f"{where}, kernel", shape=list, dtype=_TEXT, samples=_TEXT
    )
    known = Kernel(_shape(shape, where), dtype and _stored(dtype, where), samples)
    names = [n for n in variant.names if n in arrays or n not in variant.optional]
    _fields(arrays, f"{where}, arrays", **dict.fromkeys(names, dict))
    read = {name: _array(arrays[name], f"{where}, {name}") for name in names}
    checksums = {name: arrays[name]["checksum"] for name in names}
    value = _value(variant, read, values, known.shape, where)
    return Entry(path, value, values.get("alpha"), known, checksums)


def _variant(values: Any, where: str) -> Variant:
    """Returns the variant of an entry: named, or told by the fields that it has."""
    has = set(values) if isinstance(values, dict) else set()
    if "variant" in has:
        name = str(values["variant"])
        named = (v for v in variants() if v.is_named and v.name == name)
        if (variant := next(named, None)) is None:
            raise _unknown(where, name)
        return variant
    needs = lambda v: {*v.settings, "axes"} if v.has_roles else set()
    return next(v for v in variants() if not v.is_named and needs(v) <= has)


def _value(
    variant: Variant,
    arrays: Mapping[str, Any],
    values: Mapping[str, Any],
    shape: Shape,
    where: str,
) -> Any:
    """Returns the entry of arrays that are described, if all of it fits together."""
    axes: Any = _axes(values["axes"], shape, where) if variant.has_roles else None
    rank: Any = values.get("rank")
    alpha: Any = values.get("alpha")
    if variant.rank is not None and not (alpha > 0 and rank > 0):
        raise ValueError(f"{where} has rank {rank} and alpha {alpha}")
    settings = _settings(variant, values, where)
    if misfit := variant.misfit(axes, shape, **settings):
        raise ValueError(f"{where} {misfit}")
    for name, wanted in variant.shapes(axes, shape, rank, **settings).items():
        if name in arrays:
            _same_shape(f"{where}, {name}", wanted, arrays[name].shape)
    return variant.built(arrays, axes, shape, values.get("scaling"), settings)


def _settings(variant: Variant, values: Mapping[str, Any], where: str) -> Any:
    """Returns the settings of a variant, as a config that is checked has them."""
    given = {name: values[name] for name in variant.settings}
    try:
        return variant.settings_of(LoraConfig(**given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has {str(given)[:80]}") from error


def _axes(roles: Any, shape: Shape, where: str) -> KernelAxes:
    batch, in_, out = _fields(roles, f"{where}, axes", batch=list, **_IN, out=list)
    axes = KernelAxes(*(_shape(role, where) for role in (batch, in_, out)))
    if axes.ndim != len(shape):
        raise ValueError(f"{where} has a kernel {shape} and the axes {axes}")
    return axes


_TEXT = (str, type(None))
_SETTING = (list, str, int, float)
_IN: dict[str, Any] = {"in": list}  # a keyword of Python


def _fields(values: Any, where: str, /, **kinds: Any) -> list[Any]:
    """Returns the fields of an object that has exactly these, of these types."""
    if not isinstance(values, dict) or set(values) != set(kinds):
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{where} needs the fields {sorted(kinds)}, got {got}")
    for name, kind in kinds.items():
        if isinstance(values[name], bool) or not isinstance(values[name], kind):
            raise ValueError(f"{where}: `{name}` is {str(values[name])[:80]!r}")
    return [values[name] for name in kinds]


def _array(values: Any, where: str) -> jax.ShapeDtypeStruct:
    shape, dtype, _ = _fields(values, where, shape=list, dtype=str, checksum=str)
    found = _dtype(dtype, where)
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{where} has dtype {dtype}")
    return jax.ShapeDtypeStruct(_shape(shape, where), found)


def _shape(values: Any, where: str) -> Shape:
    if any(type(size) is not int or size < 0 for size in values) or len(values) > 32:
        raise ValueError(f"{where} has the shape or axes {str(values)[:80]}")
    if math.prod(size or 1 for size in values) >= 2**63:
        raise ValueError(f"{where} has the shape {str(values)[:80]}")
    return tuple(values)


def _stored(name: str, where: str) -> str:
    """Checks the name of a kernel's dtype, which may tell how it is quantised."""
    qtype, of, dense = name.rpartition(" of ")
    if of and qtype not in KNOWN:
        raise ValueError(f"{where} has the dtype {name[:80]!r}")
    _dtype(dense, where)
    return name


def _dtype(name: str, where: str) -> np.dtype:
    found = jnp.dtype(name)
    if found.name != name or not jnp.issubdtype(found, jnp.number):
        raise ValueError(f"{where} has the dtype {name[:80]!r}")
    return found


def _same_shape(where: str, wanted: Shape, found: Shape) -> None:
    if wanted != found:
        raise ValueError(f"{where} has shape {found}, and its kernel needs {wanted}")
