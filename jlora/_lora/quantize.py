"""`jlora.quantize`: which kernels are quantised, and in which tiles.

Qwix quantises, behind the door `jlora.quant`, which is opened when it is needed.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from .._errors import TargetError
from .._params.given import described
from .._params.paths import (
    FlatParams,
    PyTree,
    is_array,
    is_quantized,
    matching,
    nearest,
)
from .._params.quantized import QTYPES, tile_sizes
from .._plan.kernels import named_axes
from .._plan.plan import Plan


def quantize(
    params: PyTree,
    which: Plan | str | Sequence[str],
    qtype: Any = "nf4",
    *,
    tile: int | None = 64,
    dtype: Any = None,
) -> PyTree:
    """Returns the params with `qwix.QArray`s in place of kernels: the base of QLoRA.

    A kernel is stored as codes of a few bits and one scale per tile, `W ≈ code·scale`.
    `jlora.lora` takes the result in place of the params: each kernel is made dense
    where it is used, once forward and once again backward, and never kept.

    Args:
        params: the params: arrays, sharded ones too, or their
            `jax.ShapeDtypeStruct`s. Boxes are kept.
        which: a plan, whose targets are quantised, but for those that are trained
            whole; or regex patterns, as `LoraConfig.target` takes them, for floating
            leaves of two or more axes, adapted or not.
        qtype: "nf4", "int8", "int4", "fp8" or any other type that Qwix knows for
            weights.
        tile: the number of values that share a scale, at most. They are neighbours
            along the input axes; each layer of a stack, each expert and each output
            column has scales of its own. In a table that is looked up they are
            neighbours in a row. None: all values along the input axes.
        dtype: the dtype of the scales, which a kernel has when it is made dense; by
            default its own.

    Returns:
        A tree like `params`. A quantised kernel keeps its sharding, and its scales are
        laid out likewise where the mesh divides them.

    Raises:
        TargetError: if a pattern matches no such leaf, or the params are not those of
            the plan. With patterns the roles of axes are known from Flax's names alone;
            elsewhere the last axis but one counts as the input axis.
        ValueError: if `qtype`, `tile` or `dtype` is of no use, or a leaf is quantised
            already.
        ImportError: if Qwix is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.linspace(-1, 1, 128 * 32).reshape(128, 32)}
        >>> model, x = lambda params, x: x @ params["w"], jnp.ones((4, 128))
        >>> lora = jlora.lora(model, jlora.LoraConfig("w", rank=2))
        >>> quantized = jlora.quantize(params, lora.plan(params, x), "nf4")
        >>> quantized["w"].qvalue.dtype, quantized["w"].scale.shape
        (dtype(uint4), (2, 32))
        >>> adapter = lora.init(jax.random.key(0), quantized, x)
        >>> lora.apply(quantized, adapter, x).shape
        (4, 32)

    References:
        Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs,
        <https://arxiv.org/abs/2305.14314>, 2023.
    """
    one = _door().quantize_leaf
    flat = FlatParams.of(params)
    name = _checked(qtype, tile, dtype)
    tiles = _tiles(flat, which, tile)
    leaves = flat.by_path()
    twice = [path for path in tiles if is_quantized(leaves[path])]
    if twice:
        raise ValueError(f"{twice[:5]} are quantised already; leave them out")
    return flat.replace(
        {path: one(leaves[path], name, tiles[path], dtype) for path in tiles}
    )


def _door() -> Any:
    try:
        return importlib.import_module("jlora.quant")
    except ModuleNotFoundError as error:
        if error.name != "qwix":
            raise
        raise ImportError(
            "`jlora.quantize` needs Qwix, which is not installed: "
            "pip install 'jlora[quant]'",
            name="qwix",
        ) from error


def _checked(qtype: Any, tile: Any, dtype: Any) -> str:
    """Returns the name of a qtype.

    Raises:
        ValueError: if the qtype, the tile or the dtype of scales is of no use.
    """
    name = "float8_e4m3fn" if isinstance(qtype, str) and qtype == "fp8" else qtype
    if not isinstance(name, str):
        name = jnp.dtype(name).name
    if name not in QTYPES:
        raise ValueError(f"`qtype` must be one of fp8, {', '.join(QTYPES)}; got {name}")
    whole = isinstance(tile, int) and not isinstance(tile, bool) and tile > 0
    if tile is not None and not whole:
        raise ValueError(f"`tile` must be a positive int or None, got {tile!r}")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`dtype` must be floating, got {jnp.dtype(dtype).name}")
    return name


def _tiles(
    flat: FlatParams, which: Plan | str | Sequence[str], tile: int | None
) -> dict[str, Mapping[int, int]]:
    """Returns, for each leaf to quantise, how many values along its axes are a tile."""
    if isinstance(which, Plan):
        return _planned(flat, which, tile)
    patterns = [which] if isinstance(which, str) else which
    several = isinstance(patterns, list | tuple)
    if not several or not all(isinstance(one, str) for one in patterns):
        raise TypeError(
            "`jlora.quantize(params, which)` takes a plan, a pattern or several as "
            f"`which`, got {described(which)}"
        )
    leaves = flat.by_path()
    usable = [path for path, leaf in leaves.items() if _is_kernel(leaf)]
    for pattern in patterns:
        if not matching(pattern, usable):
            near = ", ".join(map(repr, nearest(pattern, usable)))
            raise TargetError(
                f"`jlora.quantize`: {pattern!r} matches none of the {len(usable)} "
                f"floating leaves of two or more axes. Nearest: {near}"
            )
    found: dict[str, Mapping[int, int]] = {}
    for path in dict.fromkeys(p for q in patterns for p in matching(q, usable)):
        shape = leaves[path].shape
        axes, rows = named_axes(path, leaves[path])
        found[path] = tile_sizes(shape, axes, tile, rows=rows)
    return found


def _is_kernel(leaf: Any) -> bool:
    floating = is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    return floating and len(leaf.shape) > 1


def _planned(
    flat: FlatParams, plan: Plan, tile: int | None
) -> dict[str, Mapping[int, int]]:
    shapes = {p: tuple(getattr(v, "shape", ())) for p, v in flat.by_path().items()}
    found = {}
    for target in plan.targets:
        if target.axes is None:
            continue
        if shapes.get(target.path) != target.shape:
            raise TargetError(
                f"`jlora.quantize`: the plan has the kernel {target.path!r} "
                f"{target.shape}, the params {shapes.get(target.path, 'none')}; plan "
                "with these params"
            )
        rows = any(use.kind == "lookup" for use in target.uses)
        found[target.path] = tile_sizes(target.shape, target.axes, tile, rows=rows)
    return found
