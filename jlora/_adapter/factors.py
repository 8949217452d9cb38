"""`LoraFactors`, the two factors of one kernel, and the delta they stand for."""

import dataclasses
import functools
import json
from typing import Any, TypeAlias

import jax
import jax.export
import jax.numpy as jnp

from .._jax.dtypes import summed_in
from .._params.axes import KernelAxes, align, contract_rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraFactors:
    """The low-rank factors of one kernel: `ΔW = scaling · a · b`.

    A pytree with the leaves `a` and `b`, and with DoRA `magnitude`; `axes` and
    `scaling` are static.

    Attributes:
        a: the input side, of shape `(*batch, *in, rank)`.
        b: the output side, of shape `(*batch, rank, *out)`.
        axes: which axes of the kernel are batch, input and output axes.
        scaling: alpha/rank (or alpha/√rank), a Python float.
        magnitude: with DoRA the norm that each output of the adapted kernel has, of
            shape `(*batch, *out)`; else None.

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
        <https://arxiv.org/abs/2106.09685>, 2021, equation 3.
        Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation,
        <https://arxiv.org/abs/2402.09353>, 2024, equation 5.
    """

    a: jax.Array
    b: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})
    magnitude: jax.Array | None = None

    def __repr__(self) -> str:
        """Returns the fields; a magnitude only where there is one."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        told = {k: v for k, v in fields.items() if k != "magnitude" or v is not None}
        return f"LoraFactors({', '.join(f'{k}={v!r}' for k, v in told.items())})"

    @property
    def rank(self) -> int:
        """The size of the axis that `a` and `b` share."""
        return self.a.shape[-1]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the kernel that the factors belong to."""
        n_batch, n_in = len(self.axes.batch), len(self.axes.in_)
        return self.axes.kernel_shape(
            self.a.shape[: n_batch + n_in] + self.b.shape[n_batch + 1 :]
        )


def exportable(kind: type, name: str) -> None:
    """Lets functions of such entries be exported, stored and called elsewhere.

    Args:
        kind: a dataclass and pytree, whose static fields are axes, numbers and tuples.
        name: what it is called in files.
    """
    fields = dataclasses.fields(kind)
    static = [field.name for field in fields if field.metadata.get("static")]
    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=name,
        serialize_auxdata=_static_to_bytes,
        deserialize_auxdata=functools.partial(_static_from_bytes, static),
    )


def _static_to_bytes(static: Any) -> bytes:
    plain = lambda v: dataclasses.astuple(v) if isinstance(v, KernelAxes) else v
    return json.dumps([plain(value) for value in static]).encode()


def _static_from_bytes(names: list[str], data: bytes | bytearray) -> tuple[Any, ...]:
    values = map(_tuples, json.loads(bytes(data)))
    pairs = zip(names, values, strict=True)
    return tuple(KernelAxes(*v) if name == "axes" else v for name, v in pairs)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


Adapter: TypeAlias = dict[str, LoraFactors | jax.Array]


def delta(factors: LoraFactors, *, dtype: Any = jnp.float32) -> jax.Array:
    """Returns `ΔW = scaling · a · b` in the kernel's own layout.

    The product is formed in float32 at the highest precision and then cast to `dtype`.
    With DoRA this is the change of the direction: the magnitude is not looked at, and
    `merge` is what gives the adapted kernel.

    Args:
        factors: the factors of one kernel, as an adapter holds them.
        dtype: the dtype of the result.

    Returns:
        An array of shape `factors.kernel_shape`.

    Raises:
        TypeError: if the entry of an adapter is something else than `LoraFactors`.

    Example:
        >>> axes = KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = LoraFactors(jnp.ones((5, 2)), jnp.ones((2, 3)), axes, 0.5)
        >>> delta(factors).shape
        (5, 3)
        >>> float(delta(factors)[0, 0])
        1.0
    """
    if not isinstance(factors, LoraFactors):
        raise TypeError(
            f"`jlora.delta` takes `LoraFactors`, got {type(factors).__name__}. Of "
            "`SlicedFactors` give `factors.lowered()`; `jlora.merge` takes rows and "
            "leaves trained whole too"
        )
    wide = summed_in(dtype)
    a, b = align(factors.a.astype(wide), factors.b.astype(wide), factors.axes)
    product = contract_rank(a, b, dtype=wide, precision=jax.lax.Precision.HIGHEST)
    return (factors.scaling * product).astype(dtype)
