"""PEFT's `trainable_token_indices`: new values of some rows of a table.

The file has the rows themselves, not a difference, in the order of their indices. A
head that is tied to the table has them, too, and is in no file.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._adapter.variants import variant_of_entry, variant_of_peft
from .._errors import AdapterError
from .._files.patterns import ends_of
from .._torch.named_params import Base
from .config import PeftConfig

FIELD = "trainable_token_indices"
KEY = ".token_adapter.trainable_tokens_delta"
_VARIANT = variant_of_peft(FIELD)
(_SETTING,) = _VARIANT.settings
(_VALUES,) = _VARIANT.names


def read_rows(
    rows: Mapping[str, np.ndarray], config: PeftConfig, base: Base, where: str
) -> dict[str, Any]:
    """Returns the entries of tables of which some rows are trained, by path.

    Args:
        rows: the new rows `(k, features)` by torch module.
        config: what the file's config says.
        base: the params.
        where: the name of the file, for messages.

    Raises:
        AdapterError: with everything that does not fit.
    """
    found, problems = {}, []
    for module, values in rows.items():
        try:
            path, entry = _entry(module, values, config, base)
        except AdapterError as error:
            problems.append(str(error))
            continue
        found[path] = entry
    said = config.trainable_token_indices or ()
    if said and not rows:
        problems.append(
            f"`{FIELD}` of adapter_config.json is {str(said)[:100]}, and there are no "
            "rows"
        )
    if isinstance(said, Mapping):
        ends = {end for module in rows for end in ends_of(module)}
        problems += [
            f"`{FIELD}` names {name[:100]!r}, of which there are no rows"
            for name in said
            if name not in ends and not config.is_left_out(name)
        ]
    if problems:
        raise AdapterError(f"{where}:\n" + "\n".join(problems[:50]))
    return found


def _entry(
    module: str, values: np.ndarray, config: PeftConfig, base: Base
) -> tuple[str, Any]:
    indices = _indices(module, config)
    if values.ndim != 2 or len(values) != len(indices):
        raise AdapterError(
            f"{module!r} has rows {values.shape}, and `{FIELD}` names {len(indices)}"
        )
    homes = base.homes(f"{module}.weight")
    if len(homes) != 1 or base.bindings[homes[0].path].n_fields:
        raise AdapterError(f"no leaf of the params is torch's table {module!r}")
    path = homes[0].path
    if "embedding" not in base.bindings[path].steps:
        raise AdapterError(
            f"{module!r} is a table of rows in the file; give the rule of {path!r} the "
            'transform "embedding"'
        )
    base.check_table(path)
    axes, shape = base.axes(path), base.shape(path)
    length, features = axes.fans(shape)
    if axes.batch or len(axes.in_) != 1 or values.shape[1] != features:
        raise AdapterError(
            f"{path!r} {shape} has {features} features, and the rows of {module!r} in "
            f"the file {values.shape[1]}"
        )
    if (last := max(indices)) >= length:
        raise AdapterError(
            f"{path!r} has {length} rows, and `{FIELD}` names row {last} of {module!r}"
        )
    own = {_VALUES: values.reshape(len(values), *(shape[i] for i in axes.out))}
    return path, _VARIANT.built(own, axes, shape, None, {_SETTING: indices})


def _indices(module: str, config: PeftConfig) -> tuple[int, ...]:
    """Returns which rows of a table the config names; a list is of any table."""
    said = config.trainable_token_indices
    if isinstance(said, Mapping):
        said = next((said[end] for end in ends_of(module) if end in said), None)
    if not said:
        raise AdapterError(f"{module!r} has rows, and `{FIELD}` names none of it")
    if len(set(said)) < len(said):
        raise AdapterError(f"`{FIELD}` names rows of {module!r} twice")
    return tuple(said)


# --- writing ---


def has_rows(entry: Any) -> bool:
    """Returns whether an entry is rows of a table."""
    return variant_of_entry(entry) is _VARIANT


def write_rows(
    entries: Mapping[str, Any], base: Base
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors by name, and the field of the config that says which rows.

    Args:
        entries: those of rows, on the host, by path.
        base: the params.

    Raises:
        AdapterError: if torch's table has other axes, or rows are named twice.
    """
    tensors, named = {}, {}
    for path, entry in entries.items():
        base.check_table(path)
        names = [name for _, name in base.names_of(path)]
        if len(names) != 1 or "embedding" not in base.bindings[path].steps:
            raise AdapterError(
                f"{path!r} has rows that are trained alone, which PEFT has of one "
                'table; give its rule the transform "embedding"'
            )
        module = names[0].rpartition(".")[0]
        values = np.asarray(_VARIANT.arrays(entry)[_VALUES])
        tensors[f"{module}{KEY}"] = values.reshape(len(values), -1)
        named[module] = [int(i) for i in _VARIANT.settings_of(entry)[_SETTING]]
    return tensors, {FIELD: named} if named else {}
