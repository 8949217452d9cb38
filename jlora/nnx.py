"""The door to Flax NNX: from a model to params, adapter and the rest, and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from ._adapter.config import LoraConfig
from ._adapter.factors import Adapter
from ._adapter.merge import merge
from ._errors import UnsupportedFeatureError
from ._lora.lora import lora as transform
from ._lora.modules import no_module
from ._lora.state_dicts import register_if_imported
from ._lora.transform import Backward, Lora, Materialize
from ._params.given import described, some
from ._params.paths import FlatParams

Method = str | Callable[..., Any]
register_if_imported()  # `flax.serialization` of adapters


class Wrapped(NamedTuple):
    """An NNX model taken apart for training.

    Attributes:
        lora: the transformed model, with
            `lora.apply(params, adapter, rest, *args, **kwargs) -> (out, new_rest)`.
        params: the frozen `nnx.Param`s, those of subclasses too.
        adapter: the factors by path: the only thing to differentiate and optimise.
        rest: every other variable (batch statistics, caches, counts and keys of random
            streams). A call returns it as the model leaves it.
    """

    lora: Lora
    params: nnx.State
    adapter: Adapter
    rest: nnx.State


def wrap(
    model: nnx.Module,
    config: LoraConfig | Sequence[LoraConfig],
    /,
    *args: Any,
    key: jax.Array | None = None,
    method: Method = "__call__",
    materialize: Materialize = "error",
    backward: Backward = "custom",
    **kwargs: Any,
) -> Wrapped:
    """Returns `(lora, params, adapter, rest)` of a model.

    The model itself is not changed, and later changes to it do not reach the result.

    Args:
        model: an NNX model. One from `nnx.eval_shape` will do: `params` and `rest` are
            then abstract, to be planned with, and the factors are real.
        config: what is adapted; of several configs that match a leaf, the first
            decides. A path names the attributes: `blocks/0/query/kernel`.
        *args: example arguments of the model, or their `jax.ShapeDtypeStruct`s.
        key: the adapter's PRNG key; `jax.random.key(0)` by default.
        method: what is run, as for `jlora.nnx.lora`.
        materialize: as for `jlora.lora`.
        backward: as for `jlora.lora`.
        **kwargs: example keyword arguments of the model.

    Raises:
        TypeError: if `model` is no NNX module.
        TargetError: if the config does not fit the params.
        MaterializationError: if a kernel reaches an operation without a low-rank rule.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.nnx
        >>> from flax import nnx
        >>> class Mlp(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.up = nnx.Linear(5, 7, rngs=rngs)
        ...         self.drop = nnx.Dropout(0.1, rngs=rngs)
        ...         self.down = nnx.Linear(7, 3, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.down(self.drop(nnx.gelu(self.up(x))))
        >>> model, x = Mlp(nnx.Rngs(0)), jnp.ones((4, 5))
        >>> config = jlora.LoraConfig("up", rank=2)
        >>> lora, params, adapter, rest = jlora.nnx.wrap(model, config, x)
        >>> def loss(adapter, params, rest, x):
        ...     out, rest = lora.apply(params, adapter, rest, x)
        ...     return (out**2).mean(), rest
        >>> grads, rest = jax.grad(loss, has_aux=True)(adapter, params, rest, x)
        >>> list(grads)
        ['up/kernel']
        >>> tuned = jlora.nnx.merge_into(model, adapter, rest)
    """
    _, params, rest = split(model)
    adapted = lora(
        model, config, method=method, materialize=materialize, backward=backward
    )
    key = jax.random.key(0) if key is None else key
    adapter = adapted.init(key, params, rest, *args, **kwargs)
    return Wrapped(adapted, params, adapter, rest)


def lora(
    model: nnx.Module,
    config: LoraConfig | Sequence[LoraConfig],
    *,
    method: Method = "__call__",
    materialize: Materialize = "error",
    backward: Backward = "custom",
) -> Lora:
    """Returns a method of a model as a function of params, adapter and the rest.

    The result fits the params, adapter and rest of any model of the same structure: use
    it for another method than the one that was trained, or after `model.eval()` for
    evaluation (whether a layer trains is part of the structure, not of the rest).

    Args:
        model: an NNX model, whose structure alone is used.
        config: what is adapted.
        method: the name of a method, or a function of the model and the arguments.
        materialize: as for `jlora.lora`.
        backward: as for `jlora.lora`.

    Returns:
        A `Lora` of `(params, rest, *args, **kwargs) -> (out, new_rest)`. What the
        method sows is dropped unless it is part of `out`.

    Raises:
        TypeError: if `model` is no NNX module, or `method` no method of it.

    Example:
        >>> import jax.numpy as jnp, jlora, jlora.nnx
        >>> from flax import nnx
        >>> model, ids = nnx.Embed(11, 5, rngs=nnx.Rngs(0)), jnp.array([3, 8])
        >>> config = jlora.LoraConfig("embedding", rank=2)
        >>> _, params, adapter, rest = jlora.nnx.wrap(model, config, ids)
        >>> attend = jlora.nnx.lora(model, config, method="attend")
        >>> logits, rest = attend.apply(params, adapter, rest, jnp.ones((2, 5)))
        >>> logits.shape
        (2, 11)
    """
    graphdef, *own = split(model)
    expected = [set(FlatParams.of(state).paths) for state in own]
    run = _method_of(model, method)

    def fn(params: Any, rest: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        _check_states(params, rest, *expected)
        model = nnx.merge(graphdef, params, rest)
        out = run(model, *args, **kwargs)
        nnx.pop(model, nnx.Intermediate)
        _, _, new_rest = nnx.split(model, nnx.Param, ...)
        _check_rest(rest, new_rest)
        return out, new_rest

    return transform(fn, config, materialize=materialize, backward=backward)


def split(model: nnx.Module) -> tuple[Any, nnx.State, nnx.State]:
    """Returns `(graphdef, params, rest)` of a model, as `wrap` takes it apart.

    This is `nnx.split(model, nnx.Param, ...)` with two differences: the states share no
    variable with the model, and intermediates are left out.

    Raises:
        TypeError: if `model` is no NNX module.
        UnsupportedFeatureError: if it has variables that are references or hijax
            types; all are named.
    """
    if not isinstance(model, nnx.Module):
        raise no_module(model, "nnx")
    _check_variables(model)
    own = nnx.clone(model)
    nnx.pop(own, nnx.Intermediate)
    graphdef, params, rest = nnx.split(own, nnx.Param, ...)
    return graphdef, params, rest


def merge_into(
    model: nnx.Module,
    adapter: Adapter,
    rest: nnx.State | None = None,
    *,
    params: nnx.State | None = None,
    dequantize: bool = False,
) -> nnx.Module:
    """Returns a new model with `W + ΔW` in place of each adapted kernel `W`.

    Give back what training returned: a model whose batch statistics, caches or counts
    moved does not compute the same with those that it had before.

    Args:
        model: the model; it is not changed and shares no variable with the result.
        adapter: the factors by path.
        rest: every variable that is no `nnx.Param`, as `apply` returned it last; those
            of `model` by default.
        params: the params that `adapter` was trained beside, where they are not those
            of `model`: `jlora.pissa` and its relatives move them.
        dequantize: as for `jlora.merge`.

    Raises:
        TypeError: if `model` is no NNX module.
        AdapterError: if the adapter does not belong to the model.
        ValueError: if `rest` or `params` are not of the model's structure.

    Example:
        >>> import jax.numpy as jnp, jlora, jlora.nnx
        >>> from flax import nnx
        >>> class Normed(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.up = nnx.Linear(5, 7, rngs=rngs)
        ...         self.norm = nnx.BatchNorm(7, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.norm(self.up(x))
        >>> model, x = Normed(nnx.Rngs(0)), jnp.arange(20.0).reshape(4, 5)
        >>> config = jlora.LoraConfig("up", rank=2)
        >>> lora, params, adapter, rest = jlora.nnx.wrap(model, config, x)
        >>> out, rest = lora.apply(params, adapter, rest, x)
        >>> tuned = jlora.nnx.merge_into(model, adapter, rest)
        >>> bool((tuned.norm.mean[...] == rest["norm"]["mean"][...]).all())
        True
    """
    graphdef, own_params, own_rest = split(model)
    params = own_params if params is None else params
    rest = own_rest if rest is None else rest
    for name, given, own in (("params", params, own_params), ("rest", rest, own_rest)):
        _check_like(name, given, own)
    merged = merge(params, adapter, dequantize=dequantize)
    return nnx.merge(graphdef, merged, rest, copy=True)


def _check_states(
    params: Any, rest: Any, own_params: set[str], own_rest: set[str]
) -> None:
    """Raises unless two states have the variables of the model."""
    given = _paths(params)
    if given != own_params:
        whole = given is not None and given >= own_params
        hint = "; these are all variables of a model" if whole else ""
        raise TypeError(
            f"`params` must be the `nnx.Param`s of the model, as `jlora.nnx.wrap` "
            f"returns them, or `nnx.split(model, nnx.Param, ...)`: "
            f"{_difference(params, given, own_params)}{hint}"
        )
    given = _paths(rest)
    if given != own_rest:
        raise TypeError(
            "`rest`, the variables that are no `nnx.Param`, is the argument after the "
            "adapter, as in `lora.apply(params, adapter, rest, x)` and "
            "`lora.init(key, params, rest, x)`; `jlora.nnx.wrap` returns it, and each "
            f"call. Is it forgotten? {_difference(rest, given, own_rest)}"
        )


def _paths(state: Any) -> set[str] | None:
    """Returns the paths of a state, of NNX or as a dict; None of anything else."""
    if not isinstance(state, Mapping):
        return None
    return set(FlatParams.of(state).paths)


def _difference(state: Any, given: set[str] | None, own: set[str]) -> str:
    if given is None:
        return f"got {described(state)}"
    told = [f"it lacks {sorted(own - given)[:3]}"] if own - given else []
    told += [f"it has {sorted(given - own)[:3]} besides"] if given - own else []
    return " and ".join(told)


def _check_like(name: str, given: Any, own: Any) -> None:
    """Raises if a state does not have the paths and shapes that the model has."""
    found, expected = (
        {
            path: tuple(np.shape(leaf))
            for path, leaf in FlatParams.of(v).by_path().items()
        }
        for v in (given, own)
    )
    differ = sorted(p for p in found | expected if found.get(p) != expected.get(p))
    if not differ:
        return
    told = [f"{p!r}: {found.get(p)} for {expected.get(p)}" for p in differ]
    raise ValueError(
        f"`jlora.nnx.merge_into`: `{name}` is not that of the model (shape given "
        f"for shape of the model): {some(told)}. Pass the {name} that "
        "`jlora.nnx.wrap` and `apply` returned for this model"
    )


# What a variable has that holds no array; before Flax 0.12.3 under other names.
_KINDS = ("hijax", "ref") if hasattr(nnx, "var_defaults") else ("is_hijax", "has_ref")
if hasattr(nnx, "with_vars"):
    _MADE_PLAIN = "nnx.with_vars(model, hijax=False, ref=False)"
elif hasattr(nnx, "vars_as"):  # before Flax 0.12.8
    _MADE_PLAIN = "nnx.vars_as(model, hijax=False, ref=False)"
else:  # before Flax 0.12.3
    _MADE_PLAIN = "nnx.as_pytree_vars(nnx.as_array_vars(model))"


def _check_variables(model: nnx.Module) -> None:
    """Raises with variables that are no arrays: what is traced could not hold them."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        nnx.state(model), is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    found = []
    for path, variable in flat:
        kinds = [kind for kind in _KINDS if getattr(variable, kind, False)]
        if kinds:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found.append(f"{name!r} ({', '.join(kinds)})")
    if found:
        raise UnsupportedFeatureError(
            f"{some(found)} of {type(model).__name__} are variables of "
            "arrays in references or of hijax types, which `jlora.nnx` cannot adapt. "
            f"Give it `{_MADE_PLAIN}`"
        )


def _method_of(model: nnx.Module, method: Method) -> Callable[..., Any]:
    if callable(method):
        return method
    if not callable(getattr(model, method, None)):
        raise TypeError(f"{type(model).__name__} has no method {method!r}")
    return lambda model, /, *args, **kwargs: getattr(model, method)(*args, **kwargs)


def _check_rest(before: Any, after: Any) -> None:
    """Raises if a call made or removed variables: it could not be called again."""
    old, new = (set(FlatParams.of(state).paths) for state in (before, after))
    if old != new:
        raise ValueError(
            f"the call added the state {sorted(new - old)} and removed "
            f"{sorted(old - new)}; the model needs all its variables before "
            "`jlora.nnx.wrap` (for a cache, call `init_cache` first)"
        )
