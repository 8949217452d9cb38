"""Where factors and optimizer state live: shardings that follow those of the params."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.tree_util import tree_flatten_with_path, tree_map_with_path

from .._params.axes import Shape
from .._params.layout import AnyMesh, Layout, Rules, fitting, following, unboxed
from .._params.layout import spread as spread_over
from .._params.paths import PyTree, is_box
from .entries import arrays_of, axes_of, entry_with
from .instead import check_order
from .variants import variant_of_entry


def shardings(
    params: PyTree,
    adapter: Mapping[str, Any],
    *,
    mesh: AnyMesh | None = None,
    rules: Rules | None = None,
    replicate: bool = False,
    spread: bool = False,
) -> dict[str, Any]:
    """Returns the sharding of each array of an adapter, from those of the params.

    `a` is laid out like the batch and input axes of its kernel and `b` like the batch
    and output axes; the rank axis is never sharded. So `x·a` is summed over devices
    where `x·W` is, and its product with `b` arrives where `x·W` does. An axis of the
    factor that its mesh axes do not divide is replicated. A leaf that is trained whole
    is laid out like its base.

    Of a kernel (in, out) whose input axis lies along the n devices of `fsdp`, each
    holds an nth of `a` and the whole of `b`, and `a` is gathered before its use. With
    `replicate=True` each holds both, and nothing is gathered; with `spread=True` each
    holds an nth of both, both are gathered, and the gradients are summed into their
    parts (a reduce-scatter, where XLA makes one). Optimizer state follows. Choose
    `spread` where factors and moments take room that a batch needs: many devices, high
    ranks, a quantised base; `replicate` where many small collectives cost more.

    Factors that are spread are no `in_specs` of a `jax.shard_map` around `lora.apply`,
    in which each device needs the factors of its own part of the kernel. On TPUs, with
    Auto axes, XLA can gather rows in their place: say in the loss that they are
    gathered, by `jax.lax.with_sharding_constraint(adapter, at_use)`, where `at_use` are
    the shardings without `spread`.

    Args:
        params: the frozen params, or a tree with their paths: arrays and
            `jax.ShapeDtypeStruct`s with a sharding, `NamedSharding`s, `PartitionSpec`s
            (None is replicated), or Flax's boxes with their names. One sharding or spec
            may stand for a whole subtree.
        adapter: the adapter, or its shapes: `jax.eval_shape(lora.init, key, params,
            x)`. Boxed factors will do.
        mesh: the mesh for specs and names; by default that of the params' shardings, or
            the one set by `jax.set_mesh`.
        rules: pairs of a logical name and the mesh axes it stands for (None: it is
            replicated), for boxes that have none; by default those that Flax has in
            force (`nn.logical_axis_rules`). A name without a rule is a mesh axis.
        replicate: whether all factors are whole on every device instead: no gathering
            of factors where the params are sharded over the axis of the data (FSDP),
            at the price of their memory.
        spread: whether factors are cut instead along those mesh axes too that only the
            other side of their kernel lies along, where sizes divide; never along the
            rank.

    Returns:
        A tree of shardings in the structure of the adapter, for `in_shardings`,
        `out_shardings` and `jax.device_put`.

    Raises:
        ValueError: if a leaf of the adapter has no place in `params`, a spec does not
            fit its leaf or its mesh, a name is known to neither rules nor mesh, or
            there is no mesh. All offenders are collected. Also if both `replicate` and
            `spread` are asked for.
        TypeError: if the leaves are traced: shardings are known outside of `jax.jit`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("model",), (AxisType.Auto,))
        >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=2))
        >>> params, x = {"w": jnp.ones((6, 8))}, jnp.ones((4, 6))
        >>> abstract = jax.eval_shape(lora.init, jax.random.key(0), params, x)
        >>> placed = jlora.shardings({"w": P(None, "model")}, abstract, mesh=mesh)
        >>> tuple(placed["w"].a.spec), tuple(placed["w"].b.spec)
        ((), (None, 'model'))
        >>> init = jax.jit(lora.init, out_shardings=placed)
        >>> adapter = init(jax.random.key(0), params, x)
        >>> specs = {"w": P(None, "model")}
        >>> placed = jlora.shardings(specs, abstract, mesh=mesh, spread=True)
        >>> tuple(placed["w"].a.spec), tuple(placed["w"].b.spec)
        (('model',), (None, 'model'))
    """
    if replicate and spread:
        raise ValueError(
            "`replicate=True` keeps factors whole on every device and `spread=True` "
            "cuts them along all mesh axes of their kernel; choose one"
        )
    order = "The order is `jlora.shardings(params, adapter)`"
    check_order(params, adapter, order)
    layout = Layout.of(params, mesh=mesh, rules=rules)
    problems: list[str] = []
    placed = {}
    for path, entry in adapter.items():
        try:
            placed[path] = _placed(layout, path, entry, replicate, spread)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return placed


def state_shardings(tx: Any, adapter: PyTree, shardings: PyTree) -> PyTree:
    """Returns the sharding of each array of an optimizer's state.

    What mirrors an array of the adapter (moments, averages, accumulated gradients)
    lives where that array does; all else (counts, rates, factored moments) is
    replicated.

    Args:
        tx: an optax optimizer, or anything with its `init`.
        adapter: the adapter or its shapes; any tree that `tx` optimizes will do.
        shardings: a tree of shardings in its structure, as `jlora.shardings` gives it.

    Returns:
        A tree of shardings in the structure of `tx.init(adapter)`.

    Raises:
        ValueError: if `shardings` has not the structure of `adapter`, or is empty.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("model",), (AxisType.Auto,))
        >>> adapter = {"head": jnp.ones((6, 8))}
        >>> placed = {"head": NamedSharding(mesh, P("model", None))}
        >>> tx = optax.adam(1e-3)
        >>> state = state_shardings(tx, adapter, placed)
        >>> tuple(state[0].mu["head"].spec), tuple(state[0].count.spec)
        (('model', None), ())
        >>> opt_state = jax.jit(tx.init, out_shardings=state)(adapter)
    """
    arrays = dict(tree_flatten_with_path(adapter, is_leaf=is_box)[0])
    places = dict(tree_flatten_with_path(shardings)[0])
    if not places or set(arrays) != set(places):
        raise ValueError(
            "`shardings` must have one sharding for each array of the adapter, got "
            f"{len(places)} for {len(arrays)}; `jlora.shardings(params, adapter)` "
            "gives them"
        )
    elsewhere = _replicated(next(iter(places.values())))

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        tails = (path[start:] for start in range(len(path)))
        mirrored = next((tail for tail in tails if tail in places), None)
        if mirrored is None or _shape(leaf) != _shape(arrays[mirrored]):
            return elsewhere
        return places[mirrored]

    state = jax.eval_shape(tx.init, adapter)
    return tree_map_with_path(place, state, is_leaf=is_box)


def _placed(
    layout: Layout, path: str, entry: Any, replicate: bool, spread: bool
) -> Any:
    """Returns the shardings of one entry of an adapter, in its structure."""
    axes, arrays = axes_of(entry), arrays_of(entry)
    if axes is None:
        place = lambda v: fitting(layout.sharding(path, len(_shape(v))), _shape(v))
        return entry_with(entry, {name: place(array) for name, array in arrays.items()})
    kernel = layout.sharding(path, axes.ndim)
    if replicate:
        kernel = _replicated(kernel)
    along = variant_of_entry(entry).along(axes)
    shapes = {name: _shape(array) for name, array in arrays.items()}
    follow = lambda name, shape: along.get(name, (None,) * len(shape))
    places = {n: following(kernel, follow(n, s), s) for n, s in shapes.items()}
    if spread:
        # Along batch axes, such as layers, programs walk.
        faces = lambda n, s: [None if i in axes.batch else i for i in follow(n, s)]
        places = {
            n: spread_over(places[n], kernel, faces(n, s), s) for n, s in shapes.items()
        }
    return entry_with(entry, places)


def _replicated(like: Sharding) -> Sharding:
    if not isinstance(like, NamedSharding):
        return like
    return NamedSharding(like.mesh, PartitionSpec())


def _shape(leaf: Any) -> Shape:
    return tuple(jnp.shape(unboxed(leaf)))
