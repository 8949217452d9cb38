"""`models.Decoder` as a Flax NNX module of `nnx.Linear`s.

As in the Linen one, what happens between the products is `Decoder.layer` itself.
"""

from collections.abc import Callable, Sequence

import jax
from flax import nnx
from models import Decoder, Layer, Params, cross_entropy, rms_norm

NORMS = ("norm_1", "norm_2")


class NnxLayer(nnx.Module):
    """One layer."""

    def __init__(self, model: Decoder, rngs: nnx.Rngs):
        self.model = model
        for name, (ins, outs) in model.kernel_shapes().items():
            linear = nnx.Linear(
                ins, outs, use_bias=False, param_dtype=model.dtype, rngs=rngs
            )
            setattr(self, name, linear)
        for name in NORMS:
            ones = nnx.initializers.ones(rngs.params(), (model.d,), model.dtype)
            setattr(self, name, nnx.Param(ones))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the outputs (batch, seq, d)."""

        def linears(x: jax.Array, _: Layer, names: Sequence[str]) -> list[jax.Array]:
            return [getattr(self, name)(x) for name in names]

        norms = {name: getattr(self, name)[...] for name in NORMS}
        return self.model.layer(x, norms, linears)


Adapted = Callable[[NnxLayer, nnx.Rngs], nnx.Module]


def as_is(layer: NnxLayer, _: nnx.Rngs) -> nnx.Module:
    """Returns the layer."""
    return layer


class NnxDecoder(nnx.Module):
    """The decoder and its loss, scanned and rematerialized as `model` says.

    `adapted(layer, rngs)` may put something else in the place of each new layer: a
    scan over layers has no room for params that are made while it runs.
    """

    def __init__(self, model: Decoder, rngs: nnx.Rngs, adapted: Adapted = as_is):
        self.model = model
        make = lambda rngs: adapted(NnxLayer(model, rngs), rngs)
        init = nnx.initializers.lecun_normal()
        own = lambda *shape: nnx.Param(init(rngs.params(), shape, model.dtype))
        if model.scan:
            self.layers = nnx.vmap(make)(rngs.fork(split=model.layers))
        else:
            self.layers = nnx.List([make(rngs) for _ in range(model.layers)])
        self.embedding = own(model.vocab, model.d)
        self.head = own(model.d, model.vocab)
        ones = nnx.initializers.ones(rngs.params(), (model.d,), model.dtype)
        self.norm = nnx.Param(ones)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the mean cross-entropy of tokens (batch, seq + 1)."""
        model = self.model
        run = lambda x, layer: layer(x)
        if model.remat:
            run = nnx.remat(run, prevent_cse=not model.scan)
        x = self.embedding[...][tokens[:, :-1]]
        if model.scan:
            x = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )
        else:
            for layer in self.layers:
                x = run(x, layer)
        x, targets = rms_norm(x, self.norm[...]), tokens[:, 1:]
        return cross_entropy(x, self.head[...], targets, model.loss_chunks)


def nnx_values(
    model: Decoder, params: Params
) -> dict[tuple[str | int, ...], jax.Array]:
    """Returns path -> array of the NNX module, the same arrays as in `params`."""
    names = ("embedding", "norm", "head")
    values = {(name,): params[name] for name in names}
    layers = params["layers"]
    places = [((), layers)] if model.scan else [((i,), v) for i, v in enumerate(layers)]
    for place, layer in places:
        for name, array in layer.items():
            leaf = (name,) if name in NORMS else (name, "kernel")
            values[("layers", *place, *leaf)] = array
    return values
