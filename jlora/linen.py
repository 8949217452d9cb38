"""The door to Flax Linen: a module whose variables have a "lora" collection."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import FrozenDict, meta
from flax.core.scope import in_filter, subtract_filters
from jax.tree_util import keystr, tree_flatten_with_path

from ._adapter.config import LoraConfig
from ._adapter.entries import axes_of
from ._adapter.factors import Adapter, LoraFactors
from ._adapter.merge import merge
from ._errors import AdapterError
from ._jax.keys import key_of
from ._lora.lora import lora
from ._lora.modules import check_variables, no_module
from ._lora.state_dicts import register_if_imported
from ._lora.transform import Backward, Lora, Materialize
from ._params.given import check_key
from ._params.paths import PyTree
from ._plan.plan import Plan

Variables = Mapping[str, Any]

COLLECTION = "lora"
RANK_NAME = "lora_rank"
register_if_imported()  # `flax.serialization` of adapters


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """A Linen module with low-rank factors beside its frozen params.

    Made by `jlora.linen.wrap`. `init` and `apply` take what the module's own take; the
    variables have one collection more, "lora", which holds the adapter: the only thing
    to differentiate, optimise and save. Only kernels of the collection "params" are
    adapted.

    Attributes:
        module: the module, as it was.
        lora: the transformed apply function, `(params, adapter, state, *args, **kwargs)
            -> out`, with params being `{"params": ...}` and state the collections that
            are neither "params" nor "lora".
    """

    module: nn.Module
    lora: Lora

    def init(
        self, rngs: jax.Array | dict[str, jax.Array], /, *args: Any, **kwargs: Any
    ) -> dict[str, Any] | FrozenDict[str, Any]:
        """Returns the variables of a new module, and a new adapter among them.

        Args:
            rngs: a key or a dict of keys, as `Module.init` takes. The adapter's key is
                the one of the stream "lora", or is derived from that of "params".
            *args: the arguments of the module.
            **kwargs: the keyword arguments of the module and of `Module.init`
                (`method`, `mutable`, `capture_intermediates`).

        Returns:
            `{"params": ..., "lora": adapter, ...}`. The params are those that
            `Module.init` makes from the same keys.

        Raises:
            TargetError: if the config does not fit the params.
            MaterializationError: if a kernel reaches an operation without a low-rank
                rule.
            ValueError: if the module has a collection "lora" of its own, or there is no
                key for the adapter.
        """
        key = _adapter_key(rngs)
        variables = self.module.init(rngs, *args, **kwargs)
        if COLLECTION in variables:
            raise ValueError(
                f"{type(self.module).__name__} has a collection {COLLECTION!r} of its "
                "own; `jlora.lora(module.apply, config)` keeps the adapter apart"
            )
        # Other collections are made by the traced call, as `Module.init` makes them: a
        # cache that exists already would turn a prompt into one step of decoding.
        call = {k: v for k, v in kwargs.items() if k != "capture_intermediates"}
        hidden = ("params", "intermediates")
        call["mutable"] = subtract_filters(kwargs.get("mutable", True), hidden)
        params, _ = _split(variables)
        adapter = self.init_adapter(key, params, *args, rngs=rngs, **call)
        return _updated(variables, {COLLECTION: adapter})

    def apply(self, variables: Variables, /, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module's own `apply` returns, with `W + ΔW` as kernels.

        Args:
            variables: the variables, with the adapter as collection "lora".
            *args: the arguments of the module.
            **kwargs: the keyword arguments of the module and of `Module.apply`
                (`rngs`, `method`, `mutable`, `capture_intermediates`).

        Returns:
            The outputs; with `mutable`, outputs and the collections that it names. The
            params are frozen: where `mutable` names them, they come back unchanged.

        Raises:
            AdapterError: if there is no collection "lora", or it does not belong to the
                params.
            MaterializationError: if a kernel reaches an operation without a low-rank
                rule.
        """
        params, state = _split(variables)
        adapter = self.adapter(variables)
        out = self.lora.apply(params, adapter, state, *args, **_frozen(kwargs))
        if not in_filter(kwargs.get("mutable", False), "params"):
            return out
        return out[0], _updated(out[1], params)

    def plan(self, variables: Variables, /, *args: Any, **kwargs: Any) -> Plan:
        """Returns what will be trained, from an abstract trace of `apply`.

        Args:
            variables: the variables, with or without "lora"; the result of
                `jax.eval_shape(module.init, ...)` will do.
            *args: the arguments of the module, or their `jax.ShapeDtypeStruct`s.
            **kwargs: the keyword arguments of the module and of `Module.apply`.

        Raises:
            TargetError: if the config does not fit the params.
            MaterializationError: if a kernel reaches an operation without a low-rank
                rule.
        """
        return self.lora.plan(*_call(variables, args, kwargs), **_frozen(kwargs))

    def init_adapter(
        self, key: jax.Array, variables: Variables, /, *args: Any, **kwargs: Any
    ) -> Adapter:
        """Returns a new adapter for variables that exist, such as pretrained ones.

        Args:
            key: a PRNG key.
            variables: the variables, with or without "lora"; abstract ones will do.
            *args: the arguments of the module.
            **kwargs: the keyword arguments of the module and of `Module.apply`.

        Returns:
            The collection "lora": a dict from path to `LoraFactors`. Where a kernel is
            boxed in `nn.Partitioned` or `nn.LogicallyPartitioned`, `a` and `b` are
            boxed with the kernel's names of their axes. The rank axis is named None,
            or "lora_rank" among logical names.

        Raises:
            TargetError: if the config does not fit the params.
            MaterializationError: if a kernel reaches an operation without a low-rank
                rule.
        """
        call = _call(variables, args, kwargs)
        adapter = self.lora.init(key, *call, **_frozen(kwargs))
        boxes = _boxes(call[0])
        return {path: _boxed(entry, boxes.get(path)) for path, entry in adapter.items()}

    def adapter(self, variables: Variables) -> Adapter:
        """Returns the adapter in `variables`, unboxed: what the rest of jlora takes.

        Raises:
            AdapterError: if there is no collection "lora".
        """
        check_variables(variables)
        if COLLECTION not in variables:
            raise AdapterError(
                f"`variables` has no collection {COLLECTION!r}, only "
                f"{sorted(variables)}. Make one with `init_adapter(key, variables, "
                "*args)`, or call the module itself for the frozen model"
            )
        return dict(unbox(variables[COLLECTION]))

    def merge(
        self, variables: Variables, *, dequantize: bool = False
    ) -> dict[str, Any] | FrozenDict[str, Any]:
        """Returns plain variables for `module`: kernels `W + ΔW`, and no "lora".

        Args:
            variables: the variables, with the adapter as collection "lora".
            dequantize: as for `jlora.merge`.

        Raises:
            AdapterError: if there is no collection "lora", or it does not belong to the
                params.
        """
        params, state = _split(variables)
        adapter = self.adapter(variables)
        merged = {**state, **merge(params, adapter, dequantize=dequantize)}
        return _updated(type(variables)(), merged)


def wrap(
    module: nn.Module,
    config: LoraConfig | Sequence[LoraConfig],
    *,
    materialize: Materialize = "error",
    backward: Backward = "custom",
) -> LoraModule:
    """Returns `module` with low-rank factors in a collection "lora".

    Args:
        module: any Linen module. Its variables may be boxed (`nn.Partitioned`,
            `nn.LogicallyPartitioned`) or frozen.
        config: what is adapted; of several configs that match a leaf, the first
            decides. Paths begin with `params/`.
        materialize: as for `jlora.lora`.
        backward: as for `jlora.lora`.

    Returns:
        A `LoraModule`, whose `init` and `apply` replace the module's own.

    Raises:
        TypeError: if `module` is no Linen module.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jlora, jlora.linen
        >>> class Mlp(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(3, name="down")(nn.gelu(nn.Dense(7, name="up")(x)))
        >>> model = jlora.linen.wrap(Mlp(), jlora.LoraConfig("up", rank=2))
        >>> x = jnp.ones((4, 5))
        >>> variables = model.init(jax.random.key(0), x)
        >>> sorted(variables), list(variables["lora"])
        (['lora', 'params'], ['params/up/kernel'])
        >>> def loss(adapter):
        ...     return (model.apply({**variables, "lora": adapter}, x) ** 2).mean()
        >>> grads = jax.grad(loss)(variables["lora"])
        >>> jax.tree.map(jnp.shape, grads["params/up/kernel"])
        LoraFactors(a=(5, 2), b=(2, 7), axes=..., scaling=8.0)
    """
    if not isinstance(module, nn.Module):
        raise no_module(module, "linen")
    fn = _apply_of(module)
    return LoraModule(
        module, lora(fn, config, materialize=materialize, backward=backward)
    )


def unbox(tree: PyTree) -> PyTree:
    """Returns `tree` without Flax's boxes, applying no sharding constraint.

    `nn.unbox` constrains the values to the names of their boxes where a mesh is set,
    which fails for logical names and on Explicit meshes.

    Example:
        >>> unbox({"a": nn.Partitioned(1.0, names=(None,))})
        {'a': 1.0}
    """
    return jax.tree.map(_raw, tree, is_leaf=meta.is_axis_metadata)


def _raw(node: Any) -> Any:
    if isinstance(node, nn.Partitioned):
        return unbox(node.unbox(apply_constraint=False))
    return unbox(node.unbox()) if meta.is_axis_metadata(node) else node


def _apply_of(module: nn.Module) -> Callable[..., Any]:
    """Returns `apply` with the state as an argument of its own: it is never adapted."""

    def apply(
        params: Variables, state: Variables | None = None, /, *args: Any, **kwargs: Any
    ) -> Any:
        return module.apply({**params, **(state or {})}, *args, **kwargs)

    return apply


def _split(variables: Variables) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the params, and the collections that are neither they nor the adapter."""
    check_variables(variables)
    params = {k: v for k, v in variables.items() if k == "params"}
    apart = ("params", COLLECTION)
    return params, {k: v for k, v in variables.items() if k not in apart}


def _updated(
    variables: Variables, new: Variables
) -> dict[str, Any] | FrozenDict[str, Any]:
    """Returns `variables` with the collections of `new`, frozen if it was."""
    made = {**variables, **new}
    return FrozenDict(made) if isinstance(variables, FrozenDict) else made


def _frozen(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments with params taken out of what is mutable."""
    if not in_filter(kwargs.get("mutable", False), "params"):
        return kwargs
    return {**kwargs, "mutable": subtract_filters(kwargs["mutable"], "params")}


def _call(
    variables: Variables, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Returns the arguments of a call; the params alone if there is nothing else."""
    params, state = _split(variables)
    return (params, state, *args) if args or kwargs else (params,)


def _adapter_key(rngs: Any) -> jax.Array:
    if not isinstance(rngs, Mapping):
        check_key(rngs, "rngs")
        return key_of(rngs, COLLECTION)
    for name in rngs.keys() & {COLLECTION, "params"}:
        check_key(rngs[name], f"rngs[{name!r}]")
    if COLLECTION in rngs:
        return rngs[COLLECTION]
    if "params" in rngs:
        return key_of(rngs["params"], COLLECTION)
    raise ValueError(
        f"`init` needs a key 'params' or {COLLECTION!r} to make the adapter from, got "
        f"{sorted(rngs)}"
    )


def _boxes(params: PyTree) -> dict[str, Any]:
    """Returns the boxes in `params` by the path of what they hold."""
    nodes, _ = tree_flatten_with_path(params, is_leaf=meta.is_axis_metadata)
    return {
        keystr(path, simple=True, separator="/"): node
        for path, node in nodes
        if meta.is_axis_metadata(node)
    }


def _boxed(entry: Any, box: Any) -> Any:
    """Boxes the factors of a kernel with names from its box; unknown boxes say none."""
    if box is None:
        return entry
    if axes_of(entry) is None:
        return box.replace_boxed(entry)
    # Rows, and slices that cut across axes, have no names.
    if not isinstance(box, nn.Partitioned) or not isinstance(entry, LoraFactors):
        return entry
    axes = entry.axes
    names = (*box.names, *[None] * (axes.ndim - len(box.names)))
    rank = RANK_NAME if isinstance(box, nn.LogicallyPartitioned) else None
    batch, in_, out = (
        [names[i] for i in ax] for ax in (axes.batch, axes.in_, axes.out)
    )
    a = dataclasses.replace(box, value=entry.a, names=(*batch, *in_, rank))
    b = dataclasses.replace(box, value=entry.b, names=(*batch, rank, *out))
    magnitude = entry.magnitude
    if magnitude is not None:
        magnitude = dataclasses.replace(box, value=magnitude, names=(*batch, *out))
    return dataclasses.replace(entry, a=a, b=b, magnitude=magnitude)
