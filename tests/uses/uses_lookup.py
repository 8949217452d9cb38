"""Tables of rows: indexing in all its forms, one-hot products, tied heads."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from use import Kernel, Use, fixed, ids, normal, use


def _tied(table: Array, tokens: Array) -> Array:
    """Lookup and attend with one table."""
    return jnp.tanh(table[tokens]) @ table.T


def _scaled(table: Array, tokens: Array) -> Array:
    """The embedding of the Gemma models: scaled by the root of the width."""
    rows = table[tokens]
    return rows * jnp.sqrt(jnp.asarray(5.0)).astype(rows.dtype)


def _take(**settings: object) -> object:
    return lambda w, i: jnp.take(w, i, axis=0, **settings)


LOOKUPS = [
    use("lookup", lambda w, i: w[i], ids(11, 3), w=(11, 5)),
    use("lookup_two_axes", lambda w, i: w[i], ids(11, 3, 4), w=(11, 5)),
    use("lookup_take", _take(), ids(11, 3, 4), w=(11, 5)),
    use("lookup_negative", lambda w, i: w[i], fixed(-1, 2, -11, 0), w=(11, 5)),
    use("lookup_clip", _take(mode="clip"), fixed(0, 12, 4, -3), w=(11, 5)),
    use("lookup_fill_nan", _take(mode="fill"), fixed(0, 12, 4, -20), w=(11, 5)),
    use(
        "lookup_fill_value",
        _take(mode="fill", fill_value=3.0),
        fixed(0, 12, 4),
        w=(11, 5),
    ),
    use(
        "lookup_at_get",
        lambda w, i: w.at[i].get(mode="drop", fill_value=-2.0),
        fixed(0, 40, 4),
        w=(11, 5),
    ),
    use("lookup_wrap", _take(mode="wrap"), fixed(0, 12, -14), w=(11, 5)),
    use(
        "lookup_sorted_unique",
        _take(unique_indices=True, indices_are_sorted=True),
        fixed(1, 4, 10),
        w=(11, 5),
    ),
    use(
        "lookup_wide_rows",
        lambda w, i: w[i],
        ids(11, 4),
        w=(11, 3, 5),
        delta="vr,rhd->vhd",
    ),
    use(
        "lookup_columns",
        lambda w, i: jnp.take(w, i, axis=1),
        ids(11, 3),
        w=(5, 11),
        delta="vr,rd->dv",
    ),
    use("lookup_one_token", lambda w, i: jnp.tanh(w[i]), ids(11), w=(11, 5)),
    use("lookup_static_token", lambda w, i: w[i] * w[3][None], ids(11, 4), w=(11, 5)),
    use(
        "lookup_two_indices",
        lambda w, i, j: w[i, j],
        ids(7, 4),
        ids(5, 4),
        w=(7, 5, 3),
        delta="ijr,rh->ijh",
    ),
    use(
        "lookup_codebooks",
        lambda w, i: jax.vmap(lambda table, i: table[i])(w, i),
        ids(11, 3, 4),
        w=(3, 11, 5),
        delta="nvr,nrd->nvd",
    ),
    use(
        "lookup_vmap",
        lambda w, i: jax.vmap(lambda i: w[i])(i),
        ids(11, 3, 4),
        w=(11, 5),
    ),
    use("lookup_scaled", _scaled, ids(11, 3), w=(11, 5)),
    use(
        "lookup_cast",
        lambda w, i: w.astype(jnp.float32)[i],
        ids(11, 3),
        w=(11, 5),
    ),
    use(
        "one_hot",
        lambda w, i: jax.nn.one_hot(i, 11, dtype=w.dtype) @ w,
        ids(11, 3),
        w=(11, 5),
    ),
    use("attend", lambda w, x: x @ w.T, normal(3, 5), w=(11, 5), delta="ir,ro->oi"),
    use("tied", _tied, ids(11, 3), w=(11, 5)),
    use(
        "tied_einsum",
        lambda w, i: jnp.einsum("bsd,vd->bsv", jnp.tanh(jnp.take(w, i, axis=0)), w),
        ids(11, 3, 4),
        w=(11, 5),
    ),
    Use(
        name="lookup_then_dense",
        fn=lambda layer, i: jnp.tanh(layer["table"][i]) @ layer["w"],
        kernels={"table": Kernel((11, 5)), "w": Kernel((5, 7))},
        inputs=(ids(11, 3),),
    ),
    use(
        "lookup_in_scan",
        lambda w, i: lax.scan(lambda h, t: (jnp.tanh(h + w[t]),) * 2, w[i[0]], i)[1],
        ids(11, 3),
        w=(11, 5),
    ),
]
