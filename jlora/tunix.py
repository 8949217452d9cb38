"""The door to states of Tunix, Qwix and `nnx.LoRA`: their factors as an adapter.

`restore` reads a step of a Tunix run, or any state of such a model that Orbax has
saved; `adapter_of` takes the state of a live model. Both need what the state does not
say. Qwix multiplies by alpha/rank and stores no alpha, so it is given; `nnx.LoRA` has
none. Which axes of a kernel are its inputs is told by the shape of the kernel, where
that stands beside the factors or is given, or by a plan.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ._adapter.config import LoraConfig
from ._checkpoint.steps import absolute
from ._errors import AdapterError, CorruptFileError
from ._formats.qwix import LORA, adapter_of_leaves, leaves_of
from ._formats.qwix_steps import METADATA, check_files, check_sizes, format_of, state_in
from ._params.given import check_path
from ._params.paths import PyTree

_Configs = LoraConfig | tuple[LoraConfig, ...]

_NAMES = ocp.path.step.standard_name_format()


def adapter_of(
    state: PyTree,
    params_or_plan: Any = None,
    *,
    alpha: float | Mapping[str, float] | None = None,
) -> tuple[_Configs, dict[str, Any]]:
    """Returns the configs and the adapter in the state of a model.

    The adapter is for the model without LoRA: the factors `q/kernel_lora_a` of Qwix
    belong to the kernel `q/kernel`, and so do `q/lora/lora_a` of `nnx.LoRALinear` and
    `q/lora_a` of an `nnx.LoRA` around a module.

    Args:
        state: an `nnx.State` or any tree, with the kernels beside the factors or
            without, such as `nnx.state(model, nnx.LoRAParam)`.
        params_or_plan: the params of the model without LoRA, their shapes, or a plan
            of them; needed where no kernel stands beside its factors and it has more
            than two axes, and a plan where the shape leaves several ways.
        alpha: that of the rules of Qwix's `LoraProvider`, or several by patterns of
            paths, of which the first that matches counts. None for `nnx.LoRA`.

    Returns:
        The configs, and the adapter: factors in the dtype that they have, of the
        shapes `(*batch, *in, rank)` and `(*batch, rank, *out)`.

    Raises:
        AdapterError: if there are no factors, an alpha is missing, or factors do not
            fit their kernels, or in several ways. All offenders are collected.
        NonFiniteError: if there are NaNs or infinities.
        ValueError: if an alpha is no positive number, or nothing takes it.

    Example:
        >>> import jax, jlora.tunix
        >>> from flax import nnx
        >>> model = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
        >>> config, adapter = jlora.tunix.adapter_of(nnx.state(model))
        >>> adapter["kernel"].a.shape, adapter["kernel"].b.shape, config.scaling
        ((3, 2), (2, 4), 1.0)
    """
    return _adapter(leaves_of(state), "the state", params_or_plan, alpha)


def restore(
    path: str | os.PathLike[str],
    params_or_plan: Any = None,
    *,
    alpha: float | Mapping[str, float] | None = None,
    step: int | None = None,
    item: str | None = None,
) -> tuple[_Configs, dict[str, Any]]:
    """Returns the configs and the adapter in a state that Orbax has saved.

    Only the factors are read, after their sizes and files have been checked.

    Args:
        path: the folder of a run, as that of Tunix's `CheckpointManager`, of one of its
            steps, or of a state itself; local, or a URL that Orbax can read.
        params_or_plan: as for `adapter_of`.
        alpha: as for `adapter_of`.
        step: the step of a run; by default the last.
        item: the name of the state among those of a step; by default Tunix's
            "model_params", or else the only one with factors.

    Returns:
        As `adapter_of`.

    Raises:
        FileNotFoundError: if there is no such state.
        CorruptFileError: if it cannot be read, or claims more than 4 GiB of factors.
        UnsafeFormatError: if there are links in its folder.
        AdapterError: as from `adapter_of`.
        NonFiniteError: as from `adapter_of`.
        ValueError: as from `adapter_of`.

    Example:
        >>> import os, tempfile, jax.numpy as jnp, jlora.tunix, orbax.checkpoint as ocp
        >>> shapes = {"w": (3, 4, 5), "w_lora_a": (3, 2), "w_lora_b": (2, 20)}
        >>> state = {"q": {name: jnp.ones(shape) for name, shape in shapes.items()}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = os.path.join(folder, "state")
        ...     with ocp.StandardCheckpointer() as saver:
        ...         saver.save(place, state)
        ...     config, adapter = jlora.tunix.restore(place, alpha=6.0)
        >>> factors = adapter["q/w"]
        >>> factors.a.shape, factors.b.shape, factors.scaling
        ((3, 2), (2, 4, 5), 3.0)
    """
    check_path(path, "jlora.tunix.restore(path, params, alpha=...)")
    place = _place(path, step, item)
    found = _described(place)
    factors = {p: leaf for p, leaf in found.items() if LORA.fullmatch(p)}
    check_sizes(factors, str(place))
    return _adapter(_read(place), str(place), params_or_plan, alpha)


def _adapter(
    leaves: Mapping[str, Any], where: str, params_or_plan: Any, alpha: Any
) -> tuple[_Configs, dict[str, Any]]:
    configs, entries = adapter_of_leaves(leaves, where, params_or_plan, alpha)
    return configs, jax.tree.map(jnp.array, entries)


# --- where it is, and what is read ---


def _place(path: Any, step: int | None, item: str | None) -> Any:
    """Returns the folder of a state, whose files are known to be files."""
    folder = absolute(path)
    root = ocp.path.step.build_step_path(folder, _NAMES, 0).parent
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    steps = {m.step: m.path for m in _NAMES.find_all(folder)}
    if step is not None and step not in steps:
        raise FileNotFoundError(
            f"{root} has no finished step {step}, but {sorted(steps)}"
        )
    is_state = (root / METADATA).exists()
    whole = is_state or not steps
    place = state_in(
        root if whole else steps[max(steps) if step is None else step], item
    )
    check_files(place)
    return place


def _described(place: Any) -> dict[str, Any]:
    """Returns what Orbax says of each leaf of a state, by path.

    Raises:
        CorruptFileError: if it cannot be read.
    """
    return leaves_of(_guarded(place, _tree_of))


def _tree_of(place: Any) -> Any:
    return ocp.PyTreeCheckpointHandler().metadata(place).tree


def _read(place: Any) -> dict[str, Any]:
    """Returns the factors of a state, and what Orbax says of all else, by path."""
    return leaves_of(_guarded(place, _restored))


def _restored(place: Any) -> Any:
    tree = _tree_of(place)
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    keys = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in flat]
    chosen = [bool(LORA.fullmatch(key.removesuffix("/value"))) for key in keys]
    wanted = [
        np.empty(leaf.shape, leaf.dtype) if factor else ocp.PLACEHOLDER
        for (_, leaf), factor in zip(flat, chosen, strict=True)
    ]
    item = treedef.unflatten(wanted)
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    args = ocp.args.PyTreeRestore(
        item=item, restore_args=treedef.unflatten([as_numpy] * len(flat))
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(place, args=args)
    read = treedef.flatten_up_to(restored)
    both = zip(read, flat, chosen, strict=True)
    return treedef.unflatten([x if own else told for x, (_, told), own in both])


def _guarded(place: Any, action: Any) -> Any:
    try:
        return action(place)
    except (AdapterError, jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds, and bare ones
        told = str(error)[:500]
        raise CorruptFileError(f"{place} cannot be read: {told}") from error


FORMAT = format_of(restore, lambda path: _described(_place(path, None, None)))
"""How `python -m jlora` finds and reads such states."""
