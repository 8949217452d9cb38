"""The dtypes in which sums and products are formed: one rule for all forms.

The rank-sized values of a product (`x·a`, `dy·bᵀ`) and the factors beside them have the
dtype of what flows: of the input and of the kernel, as long as that

* holds at least 16 bits: eight-bit floats and integers are what a program stores, and
  no dtype to compute a delta or its gradient in;
* reaches as far as the result: a float32 cotangent of a float16 product would vanish
  in float16, whose smallest value is 6e-8. (bfloat16 has float32's range: a bfloat16
  product with a float32 result stays as it is.)
* is complex where any of them is.

A gradient is summed in float32 at least, and takes the dtype of its primal at the end;
that of a real value, where complex ones flow, is the real part, as in `jax.grad`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def summed_in(dtype: Any, *operands: Any) -> Any:
    """Returns float32, or a dtype that is wider as it is; complex if an operand is.

    Unlike `jnp.promote_types`, which raises for floats of eight bits and fewer: it
    leaves it to the program to say when they are widened, and here it is said.
    """
    dtype = jnp.dtype(dtype)
    narrow = dtype.itemsize < 4
    wide = jnp.dtype("float32") if narrow else common(dtype, jnp.float32)
    complex_ones = [kind for kind in operands if _is_complex(kind)]
    return common(wide, jnp.complex64) if complex_ones else wide


def common(*dtypes: Any) -> Any:
    """Returns the dtype that holds values of all dtypes.

    As JAX promotes by default: where a program forbids promotion
    (`jax.numpy_dtype_promotion("strict")`), it means its own.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def widest(*arrays: Any) -> Any:
    """Returns the dtype that holds sums and products of arrays: float32 or float64."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def product_dtype(x: Any, kernel: Any, result: Any) -> Any:
    """Returns the dtype of the skinny products beside one product, see above.

    Args:
        x: the dtype of the input.
        kernel: the dtype of the kernel.
        result: the dtype of the product, and so of its cotangent.

    Example:
        >>> half, f8 = jnp.float16, jnp.float8_e4m3fn
        >>> str(product_dtype(half, half, half)), str(product_dtype(half, half, "f4"))
        ('float16', 'float32')
        >>> str(product_dtype(f8, f8, f8)), str(product_dtype("c8", "f4", "c8"))
        ('bfloat16', 'complex64')
    """
    flowing = [kind for kind in (x, kernel) if is_workable(kind)]
    if flowing:
        found = common(*flowing)
    elif is_workable(result):
        found = jnp.dtype(result)
    else:
        eights = any(jnp.issubdtype(kind, jnp.inexact) for kind in (x, kernel))
        found = jnp.dtype(jnp.bfloat16 if eights else jnp.float32)
    if is_workable(result) and not _reaches(found, result):
        return common(found, result)
    return found


def is_workable(dtype: Any) -> bool:
    """Whether products are computed in a dtype: a float of 16 bits, or wider."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize > 1


def workable(value: Any, dtype: Any) -> Any:
    """Returns an operand of a skinny product, in its `dtype` where it must be."""
    return value if is_workable(value.dtype) else value.astype(dtype)


def summands_in(dtype: Any, computed: Any) -> Any:
    """Returns the dtype of the terms of a sum that will be given in `dtype`.

    That is `dtype`, or that of the products where `dtype` is too narrow to add in or
    would lose an imaginary part before the sum is there.
    """
    loses = _is_complex(computed) and not _is_complex(dtype)
    return computed if loses or not is_workable(dtype) else dtype


def narrowed(value: jax.Array, dtype: Any) -> jax.Array:
    """Returns a value in a dtype; of a complex one in a real dtype the real part."""
    loses = _is_complex(value.dtype) and not _is_complex(dtype)
    return lax.convert_element_type(lax.real(value) if loses else value, dtype)


def _is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _reaches(dtype: Any, other: Any) -> bool:
    """Whether a dtype has the range of another one, and its imaginary part."""
    exponents = jnp.finfo(dtype).maxexp >= jnp.finfo(other).maxexp
    return exponents and (_is_complex(dtype) or not _is_complex(other))
