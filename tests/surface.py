"""The public surface as a table: a name, and a call of it that returns arrays.

`FEATURES[name](place)` is the call with its operands where `place` says: on no mesh, or
on one with params, inputs and factors replicated or sharded. What it returns may not
depend on the place, nor on JAX's rules of promotion. A feature that is added here is
tried on all meshes and under all rules.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from use import ALPHA, RANK

import jlora
import jlora.optim

# Paths of the kernels, with the roles of their axes: b(atch), i(n), o(ut).
ROLES = {
    "table": "io",
    "dense/kernel": "io",
    "dense/bias": "o",
    "layers/up": "bio",
    "layers/down": "bio",
    "heads": "ioo",
    "experts": "bio",
}
SHAPES = {
    "table": (12, 16),
    "dense/kernel": (16, 24),
    "dense/bias": (24,),
    "layers/up": (3, 24, 20),
    "layers/down": (3, 20, 24),
    "heads": (24, 4, 6),
    "experts": (4, 6, 10),
}
ROWS, EXAMPLES = 12, 8
KERNELS = [path for path in ROLES if path not in ("table", "dense/bias")]
# What the axes of a role are sharded over.
LAYOUTS = {
    "whole": {},
    "in": {"i": "model"},
    "out": {"o": "model"},
    "both": {"i": "data", "o": "model"},
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where operands are.

    Attributes:
        kind: the type of the axes of the mesh; None for no mesh.
        kernels: the name of one of `LAYOUTS`.
        batch: whether the examples are sharded over the axis "data".
        follow: whether factors are laid out like their kernels, and not replicated.
        dtype: the dtype of params and inputs.
    """

    kind: AxisType | None = None
    kernels: str = "whole"
    batch: bool = False
    follow: bool = True
    dtype: Any = jnp.float32

    def __str__(self) -> str:
        """Returns a name for tests."""
        if self.kind is None:
            return "no mesh"
        rows, factors = "-rows" * self.batch, "" if self.follow else "-whole_factors"
        return f"{self.kind.name}-{self.kernels}{rows}{factors}"

    @property
    def mesh(self) -> Any:
        """The mesh, of four devices."""
        if self.kind is None:
            return None
        devices = jax.devices()[:4]
        return jax.make_mesh(
            (2, 2), ("data", "model"), (self.kind,) * 2, devices=devices
        )

    @property
    def rows(self) -> str | None:
        """What the axis of the examples is sharded over."""
        return "data" if self.batch else None

    @property
    def outs(self) -> str | None:
        """What outputs are sharded over."""
        return LAYOUTS[self.kernels].get("o")

    def put(self, value: Any, *spec: Any) -> Any:
        """Returns a value on the mesh."""
        value = (
            value
            if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
            else jnp.asarray(value)
        )
        mesh = self.mesh
        if mesh is None:
            return value
        return jax.device_put(value, NamedSharding(mesh, P(*spec)))

    def out(self, *spec: Any) -> Any:
        """Returns what an Explicit mesh wants to know of a result."""
        return P(*spec) if self.kind is AxisType.Explicit else None

    def spec(self, path: str) -> P:
        """Returns how a leaf of the params is laid out."""
        layout = [LAYOUTS[self.kernels].get(role) for role in ROLES[path]]
        second = [i for i, name in enumerate(layout) if name in layout[:i]]
        return P(*(None if i in second else name for i, name in enumerate(layout)))

    def params(self) -> dict[str, Any]:
        """Returns the params of `model`."""
        rng, tree = np.random.default_rng(0), {}
        for path, shape in SHAPES.items():
            value = 0.3 * rng.normal(size=shape)
            *above, name = path.split("/")
            node = tree.setdefault(above[0], {}) if above else tree
            node[name] = self.put(jnp.asarray(value, self.dtype), *self.spec(path))
        return tree

    def ids(self) -> jax.Array:
        """Returns the inputs of `model`, of shape (examples, 3)."""
        ids = np.random.default_rng(1).integers(0, ROWS, (EXAMPLES, 3))
        return self.put(jnp.asarray(ids, jnp.int32), self.rows, None)

    def model(self, params: Any, ids: jax.Array) -> jax.Array:
        """A lookup, a dense layer with a bias, a stack, heads and experts."""
        rows, out = self.rows, self.out
        x = params["table"].at[ids].get(out_sharding=out(rows, None, self.outs))
        x = self.gathered(x.mean(1))
        x = self.einsum("bi,io->bo", x, params["dense"]["kernel"])
        x = self.gathered(jnp.tanh(x + params["dense"]["bias"][None]))

        def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
            up = self.gathered(jnp.tanh(self.einsum("bi,io->bo", x, own["up"])))
            return x + self.gathered(self.einsum("bi,io->bo", up, own["down"])), None

        x, _ = lax.scan(layer, x, params["layers"])
        x = self.gathered(jnp.tanh(self.einsum("bi,ihd->bhd", x, params["heads"])))
        return self.einsum("bhd,hdo->bho", x, params["experts"])

    def einsum(self, expression: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """A product with a kernel; an Explicit mesh is told where its result is."""
        out = expression.split("->")[1]
        last = [self.outs if c in "ho" else None for c in out[1:]]
        if "h" in expression.split(",")[0]:
            last = [None, self.outs]
        elif "h" in out:
            last = [self.outs, None]
        return jnp.einsum(expression, x, w, out_sharding=self.out(self.rows, *last))

    def gathered(self, x: jax.Array) -> jax.Array:
        """Returns activations whole along all but the axis of the examples."""
        if self.kind is not AxisType.Explicit:
            return x
        return jax.sharding.reshard(x, P(self.rows, *[None] * (x.ndim - 1)))

    def lora(self, target: Any = None, **settings: Any) -> jlora.Lora:
        """Returns the model with its kernels, or those that are named, adapted."""
        how = ("materialize", "backward", "contraction")
        kwargs = {k: settings.pop(k) for k in how if k in settings}
        return jlora.lora(self.model, config(target, **settings), **kwargs)

    def adapter(self, lora: jlora.Lora, seed: int = 0, params: Any = None) -> Any:
        """Returns a new adapter with all of its arrays moved."""
        params = self.params() if params is None else params
        return self.moved(lora.init(jax.random.key(3), params, self.ids()), seed)

    def moved(self, adapter: Any, seed: int = 0) -> Any:
        """Returns an adapter with random changes of its arrays, where they belong."""
        rng = np.random.default_rng(seed)

        def change(value: jax.Array) -> jax.Array:
            new = np.asarray(value, np.float64) + 0.3 * rng.normal(size=value.shape)
            new = jnp.asarray(new, value.dtype)
            if self.mesh is None:
                return new
            return jax.device_put(
                new, value.sharding if self.follow else NamedSharding(self.mesh, P())
            )

        return jax.tree.map(change, adapter)

    def weights(self, shape: tuple[int, ...] = (EXAMPLES, 4, 10)) -> jax.Array:
        """Returns weights that make a scalar of the outputs."""
        values = np.random.default_rng(2).normal(size=shape)
        return self.put(jnp.asarray(values, self.dtype), *[None] * len(shape))

    def loss(self, out: jax.Array, weights: jax.Array) -> jax.Array:
        """Returns the weighted sum of outputs of the model."""
        return (jnp.sin(out) * weights).sum()


def config(target: Any = None, **settings: Any) -> jlora.LoraConfig:
    """Returns a config in which alpha is not the rank."""
    settings = {"rank": RANK, "alpha": ALPHA, **settings}
    return jlora.LoraConfig(target, **settings)


Feature = Callable[[Place], Any]
FEATURES: dict[str, Feature] = {}


def feature(run: Feature) -> Feature:
    """Adds a feature under the name of its function."""
    FEATURES[run.__name__.lstrip("_")] = run
    return run


def _trained(place: Place, lora: jlora.Lora, params: Any = None, **kwargs: Any) -> Any:
    """Returns the outputs, and the gradients of the adapter."""
    params = place.params() if params is None else params
    adapter, ids, weights = (
        place.adapter(lora, params=params),
        place.ids(),
        place.weights(),
    )

    def loss(adapter: Any, params: Any, ids: Any, weights: Any) -> Any:
        out = lora.apply(params, adapter, ids, **kwargs)
        return place.loss(out, weights), out

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return step(adapter, params, ids, weights)


def _each_training(name: str, target: Any = None, **settings: Any) -> None:
    FEATURES[name] = lambda place: _trained(place, place.lora(target, **settings))


EVERY = ".*(table|kernel|up|down|heads|experts)"
SLICES = [(0, 8), (16, 24)]
_each_training("train")
_each_training("train_every", EVERY)
_each_training("train_table", "table")
_each_training("train_autodiff", EVERY, backward="autodiff")
_each_training("train_merged", EVERY, contraction="merged")
_each_training("train_auto", EVERY, contraction="auto")
_each_training("train_fused", EVERY, contraction="fused")
_each_training("train_dora", EVERY, dora=True)
_each_training("train_rslora", rslora=True)
_each_training("train_bfloat16_factors", EVERY, dtype=jnp.bfloat16)
_each_training("train_rows", "table", rows=[1, 5, 7])
_each_training("train_slices", "dense/kernel", slices=SLICES)
_each_training("train_slices_heads", "heads", slices=SLICES)
_each_training("train_bias_adapted", "dense/kernel", bias="adapted")
_each_training("train_bias_all", "heads", bias="all")
_each_training("train_full", "dense|table|layers/up", full=True)
_each_training("train_zero_a", EVERY, init="zero_a")
_each_training("train_orthogonal", EVERY, init="orthogonal", rank=4)
_each_training("train_gaussian", EVERY, init="gaussian")


@feature
def init(place: Place) -> Any:
    key, params, ids = jax.random.key(5), place.params(), place.ids()
    found = {}
    for name in ("kaiming_uniform", "gaussian", "orthogonal", "zero_a"):
        lora = place.lora(EVERY, init=name, rank=4)
        found[name] = lora.init(key, params, ids)
        jax.tree.map(
            np.testing.assert_allclose,
            found[name],
            jax.jit(lora.init)(key, params, ids),
        )
    return found


@feature
def dropout(place: Place) -> Any:
    lora = place.lora(dropout=0.5)
    return _trained(place, lora, lora_dropout_key=jax.random.key(7))


@feature
def eager(place: Place) -> Any:
    lora, params = place.lora(EVERY), place.params()
    return lora.apply(params, place.adapter(lora), place.ids())


@feature
def remat(place: Place) -> Any:
    model = jax.checkpoint(place.model)
    return _trained(place, jlora.lora(model, config(EVERY)))


@feature
def params_trained_too(place: Place) -> Any:
    lora, params, ids, weights = (
        place.lora(EVERY),
        place.params(),
        place.ids(),
        place.weights(),
    )
    adapter = place.adapter(lora)
    loss = lambda p, a: place.loss(lora.apply(p, a, ids), weights)
    return jax.jit(jax.grad(loss, (0, 1)))(params, adapter)


@feature
def jvp(place: Place) -> Any:
    lora, params, ids = (
        place.lora(EVERY, backward="autodiff"),
        place.params(),
        place.ids(),
    )
    adapter = place.adapter(lora)
    run = lambda adapter: lora.apply(params, adapter, ids)
    return jax.jit(lambda a: jax.jvp(run, (a,), (a,)))(adapter)


@feature
def second_derivatives(place: Place) -> Any:
    lora, params, ids = place.lora(backward="autodiff"), place.params(), place.ids()
    adapter, weights = place.adapter(lora), place.weights()
    loss = lambda a: place.loss(lora.apply(params, a, ids), weights)
    norm = lambda a: sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss)(a)))
    return jax.jit(jax.grad(norm))(adapter)


# --- many adapters ---


def _several(place: Place, lora: jlora.Lora, count: int = 3) -> list[Any]:
    return [place.adapter(lora, seed) for seed in range(count)]


@feature
def stack(place: Place) -> Any:
    lora = place.lora(EVERY)
    one, two, three = _several(place, lora)
    del two["heads"]
    three["dense/kernel"] = dataclasses.replace(three["dense/kernel"], scaling=0.5)
    stacked = jlora.stack([one, two, three], rank=RANK + 2)
    new = jax.jit(jlora.put)(stacked, jnp.asarray(1), three)
    return (
        stacked,
        jlora.unstack(stacked),
        jlora.unstack(stacked, trim=True),
        jlora.put(stacked, 0, two),
        new,
        jlora.take(stacked, 2),
        jax.jit(jlora.take)(stacked, jnp.asarray(2)),
    )


@feature
def vmap_of_stacked(place: Place) -> Any:
    lora, params, ids = place.lora(EVERY), place.params(), place.ids()
    stacked = jlora.stack(_several(place, lora))
    return jax.jit(jax.vmap(lora.apply, (None, 0, None)))(params, stacked, ids)


def _mixed(place: Place, rows: Any, **settings: Any) -> Any:
    lora = place.lora(**settings)
    full = jlora.LoraConfig("dense/bias", full=True)
    lora = jlora.lora(place.model, [*lora.configs, full])
    params, ids, weights = place.params(), place.ids(), place.weights()
    stacked = jlora.stack(_several(place, lora))
    index = place.put(np.array([0, 1, 2, -1] * 2, np.int32), rows)
    loss = lambda a, i: place.loss(lora.apply_mixed(params, a, i, ids), weights)
    out = jax.jit(lora.apply_mixed)(params, stacked, index, ids)
    return out, jax.jit(jax.grad(loss))(stacked, index)


@feature
def mixed(place: Place) -> Any:
    return _mixed(place, place.rows)


@feature
def mixed_every(place: Place) -> Any:
    return _mixed(place, place.rows, target=EVERY)


@feature
def mixed_whole_index(place: Place) -> Any:
    return _mixed(place, None)


@feature
def mixed_sharded_index(place: Place) -> Any:
    return _mixed(place, "data" if place.mesh is not None else None)


@feature
def mixed_dropout(place: Place) -> Any:
    lora, params, ids = place.lora(dropout=0.5), place.params(), place.ids()
    stacked = jlora.stack(_several(place, lora))
    index = place.put(np.array([0, 1, 2, -1] * 2, np.int32), place.rows)
    run = lambda key: lora.apply_mixed(
        params, stacked, index, ids, lora_dropout_key=key
    )
    return jax.jit(run)(jax.random.key(11))


# --- a base that is quantised ---


def _quantized(qtype: str, planned: bool) -> Feature:
    def run(place: Place) -> Any:
        params, lora = place.params(), place.lora(EVERY)
        which = lora.plan(params, place.ids()) if planned else EVERY
        params = jlora.quantize(params, which, qtype, tile=4)
        adapter = place.adapter(lora, params=params)
        trained = _trained(place, lora, params)
        merged = jlora.merge(params, adapter, dequantize=True)
        inputs = jax.jit(lora.inputs)(params, place.ids())
        return trained, merged, inputs, jlora.optim.delta_norms(params, adapter)

    return run


for _qtype in ("nf4", "int8", "int4", "fp8"):
    FEATURES[f"quantize_{_qtype}"] = _quantized(_qtype, planned=True)
FEATURES["quantize_by_pattern"] = _quantized("nf4", planned=False)


@feature
def quantize_under_jit(place: Place) -> Any:
    lora, params = place.lora(EVERY), place.params()
    plan = lora.plan(params, place.ids())
    params = jax.jit(lambda p: jlora.quantize(p, plan, "int8", tile=4))(params)
    return _trained(place, lora, params)


@feature
def quantize_dora(place: Place) -> Any:
    lora, params = place.lora(dora=True), place.params()
    params = jlora.quantize(params, lora.plan(params, place.ids()), "nf4", tile=4)
    return _trained(place, lora, params)


@feature
def quantize_autodiff(place: Place) -> Any:
    lora, params = place.lora(EVERY, backward="autodiff"), place.params()
    params = jlora.quantize(params, lora.plan(params, place.ids()), "nf4", tile=4)
    return _trained(place, lora, params)


# --- initialisers that move the base, or look at data ---


def _start(place: Place, rank: int = RANK) -> tuple[Any, Any, Any]:
    lora, params = place.lora(EVERY, rank=rank), place.params()
    return lora, params, lora.init(jax.random.key(3), params, place.ids())


def _meaning(params: Any, adapter: Any) -> Any:
    """Signs of singular vectors are free: what counts is the kernel and the change."""
    return params, {path: jlora.delta(entry) for path, entry in adapter.items()}


def _moving(name: str, **settings: Any) -> Feature:
    def run(place: Place) -> Any:
        _, params, adapter = _start(place)
        start = lambda p, a: getattr(jlora, name)(p, a, **settings)
        return _meaning(*start(params, adapter)), _meaning(
            *jax.jit(start)(params, adapter)
        )

    return run


_quarters = lambda w: jnp.round(4 * w) / 4
FEATURES["pissa"] = _moving("pissa")
FEATURES["pissa_fast"] = _moving("pissa", method="fast", key=jax.random.key(1))
FEATURES["milora"] = _moving("milora")
FEATURES["olora"] = _moving("olora")
FEATURES["loftq"] = _moving("loftq", quantize=_quarters, steps=2)


@feature
def loftq_quantized(place: Place) -> Any:
    import qwix

    _, params, adapter = _start(place)
    quantize = lambda w: qwix.quantize(w, "int8", channelwise_axes=[w.ndim - 1])
    params, adapter = jlora.loftq(
        params, adapter, quantize=quantize, dequantize=qwix.dequantize, steps=2
    )
    return _meaning(jax.tree.map(lambda v: v.astype(jnp.float32), params), adapter)


@feature
def inputs(place: Place) -> Any:
    lora, params, ids = place.lora(EVERY), place.params(), place.ids()
    return lora.inputs(params, ids), jax.jit(lora.inputs)(params, ids)


@feature
def inputs_sketch(place: Place) -> Any:
    lora, params, ids = place.lora(EVERY), place.params(), place.ids()
    return lora.inputs(params, ids, lora_sketch=5)


def _energy(adapter: Any) -> Any:
    """Projections on the columns of `a`, whose signs are free."""
    square = lambda a: jnp.einsum("...ir,...jr->...ij", a, a)
    matrix = lambda e: jnp.asarray(
        np.asarray(e.a).reshape(*e.a.shape[: len(e.axes.batch)], -1, e.rank)
    )
    return {path: square(matrix(e)) for path, e in adapter.items()}


@feature
def eva(place: Place) -> Any:
    lora, params, adapter = _start(place)
    stats = lora.inputs(params, place.ids())
    return _energy(jlora.eva(adapter, stats)), _energy(jlora.eva(adapter, stats, rho=1))


@feature
def corda(place: Place) -> Any:
    lora, params, adapter = _start(place)
    stats = lora.inputs(params, place.ids())
    found = [
        jlora.corda(params, adapter, stats, mode=mode, damping=0.5)
        for mode in ("knowledge", "instruction")
    ]
    return [_meaning(*one) for one in found]


@feature
def lora_ga(place: Place) -> Any:
    _, params, adapter = _start(place, rank=2)
    ids, weights = place.ids(), place.weights()
    loss = lambda p: place.loss(place.model(p, ids), weights)
    grads = _by_path(jax.jit(jax.grad(loss))(params))
    found = jlora.lora_ga(params, adapter, grads)
    return {p: jnp.abs(jnp.asarray(np.asarray(e.a))) for p, e in found[1].items()}


def _by_path(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): leaf for path, leaf in flat}


# --- the algebra of adapters ---


@feature
def merge(place: Place) -> Any:
    full = jlora.LoraConfig("dense/bias", full=True)
    rows = jlora.LoraConfig("table", rows=[0, 3])
    lora = jlora.lora(place.model, [config(KERNELS, dora=True), full, rows])
    params, adapter = place.params(), place.adapter(lora)
    return jlora.merge(params, adapter), jax.jit(jlora.merge)(params, adapter)


@feature
def merge_slices(place: Place) -> Any:
    lora, params = place.lora("dense/kernel", slices=SLICES), place.params()
    adapter = place.adapter(lora)
    lowered = jlora.delta(adapter["dense/kernel"].lowered())
    return jlora.merge(params, adapter), lowered


@feature
def delta(place: Place) -> Any:
    adapter = place.adapter(place.lora(EVERY))
    run = lambda a: {path: jlora.delta(entry) for path, entry in a.items()}
    return run(adapter), jax.jit(run)(adapter)


@feature
def algebra(place: Place) -> Any:
    one, two, _ = _several(place, place.lora(EVERY))
    two = {p: dataclasses.replace(f, scaling=0.7) for p, f in two.items()}
    factor = jnp.float32(0.3)
    return (
        jlora.add(one, two),
        jlora.subtract(one, two),
        jlora.scale(one, 2.0),
        jlora.scale(one, factor),
        jax.jit(jlora.add)(one, two),
    )


@feature
def truncate(place: Place) -> Any:
    adapter = place.adapter(place.lora(EVERY))
    cut = lambda a: {p: jlora.delta(e) for p, e in a.items()}
    under_jit = jax.jit(lambda a: cut(jlora.truncate(a, 2)))(adapter)
    return (
        cut(jlora.truncate(adapter, 2)),
        under_jit,
        cut(jlora.truncate(adapter, energy=0.9)),
    )


@feature
def spectrum(place: Place) -> Any:
    adapter = place.adapter(place.lora(EVERY))
    values = jlora.spectrum(adapter)
    told = (jlora.effective_rank, jlora.stable_rank, jlora.entropy_rank)
    ranks = [{p: one(v) for p, v in values.items()} for one in told]
    kept = {p: jlora.energy_kept(v, 2) for p, v in values.items()}
    return values, jax.jit(jlora.spectrum)(adapter), ranks, kept


def _combined(method: str, **settings: Any) -> Feature:
    def run(place: Place) -> Any:
        adapters, weights = _several(place, place.lora(EVERY)), [0.5, -0.25, 1.0]
        join = lambda x, w: jlora.combine(x, w, method=method, **settings)
        return join(adapters, weights), jax.jit(join)(adapters, jnp.asarray(weights))

    return run


_KEY = {"density": 0.5, "key": jax.random.key(2)}
FEATURES["combine_sum"] = _combined("sum")
FEATURES["combine_linear"] = _combined("linear")
FEATURES["combine_magnitude_prune"] = _combined("magnitude_prune", density=0.5)
FEATURES["combine_ties"] = _combined("ties", density=0.5)
FEATURES["combine_ties_frequency"] = _combined(
    "ties", density=0.5, majority="frequency"
)
FEATURES["combine_dare_linear"] = _combined("dare_linear", **_KEY)
FEATURES["combine_dare_ties"] = _combined("dare_ties", **_KEY)


@feature
def adalora(place: Place) -> Any:
    lora, params = place.lora(EVERY), place.params()
    ids, weights, tool = place.ids(), place.weights(), jlora.adalora
    fresh = tool.init(jax.random.key(9), lora.init(jax.random.key(3), params, ids))
    svd = tool.from_factors(place.adapter(lora))
    state = tool.start(svd)

    def loss(svd: Any, params: Any) -> Any:
        out = lora.apply(params, tool.to_factors(svd), ids)
        return place.loss(out, weights) + 0.1 * tool.orthogonality_penalty(svd)

    @jax.jit
    def step(svd: Any, state: Any, params: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(svd, params)
        state = tool.update(state, svd, grads)
        svd = jax.tree.map(lambda v, g: v - 0.01 * g, svd, grads)
        scores = tool.scores(state)
        kept = tool.allocate(scores, 20)
        return value, tool.masked(svd, kept), kept, state

    value, svd, kept, state = step(svd, state, params)
    merged = jlora.merge(params, tool.prune(svd, kept))
    return value, merged, kept, jlora.merge(params, tool.to_factors(fresh))


# --- training and files ---


@feature
def norms(place: Place) -> Any:
    full = jlora.LoraConfig("dense/bias", full=True)
    rows = jlora.LoraConfig("table", rows=[0, 3])
    lora = jlora.lora(place.model, [config(KERNELS, dora=True), full, rows])
    params, adapter = place.params(), place.adapter(lora)
    plain = place.adapter(place.lora(EVERY))
    return (
        jlora.optim.adapter_norms(adapter),
        jlora.optim.delta_norms(params, adapter),
        jax.jit(jlora.optim.delta_norms)(params, plain),
    )


def _optimized(make: Callable[[], Any]) -> Feature:
    def run(place: Place) -> Any:
        full = jlora.LoraConfig("dense/bias", full=True)
        lora = jlora.lora(place.model, [config(EVERY, dora=True), full])
        params, ids, weights, tx = place.params(), place.ids(), place.weights(), make()
        adapter = place.adapter(lora)
        state = tx.init(adapter)
        if place.mesh is not None:
            placed = jlora.shardings(params, adapter, replicate=not place.follow)
            places = jlora.state_shardings(tx, adapter, placed)
            state = jax.jit(tx.init, out_shardings=places)(adapter)

        @jax.jit
        def step(adapter: Any, state: Any, params: Any) -> Any:
            loss = lambda a: place.loss(lora.apply(params, a, ids), weights)
            updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
            return jax.tree.map(lambda v, u: v + u, adapter, updates), state

        for _ in range(2):
            adapter, state = step(adapter, state, params)
        return adapter

    return run


def _sgd() -> Any:
    import optax

    return jlora.optim.lora_plus(lambda rate: optax.sgd(rate, momentum=0.9), 1e-2)


def _clipped() -> Any:
    import optax

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1, jlora.optim.decay_mask),
        optax.sgd(0.1, momentum=0.9),
    )


FEATURES["lora_plus"] = _optimized(_sgd)
FEATURES["clip_and_decay"] = _optimized(_clipped)


@feature
def freeze_base(place: Place) -> Any:
    import optax

    lora, ids, weights = place.lora(EVERY), place.ids(), place.weights()
    tree = {"params": place.params(), "lora": place.adapter(lora)}
    tx = jlora.optim.freeze_base(optax.sgd(0.1, momentum=0.9))
    state = jax.jit(tx.init)(tree)

    @jax.jit
    def step(tree: Any, state: Any) -> Any:
        run = lambda t: lora.apply(t["params"], t["lora"], ids)
        grads = jax.grad(lambda t: place.loss(run(t), weights))(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates)

    return step(tree, state)


@feature
def checkpoint(place: Place) -> Any:
    import tempfile

    import jlora.checkpoint

    configs = [
        config(KERNELS, dora=True),
        jlora.LoraConfig("dense/bias", full=True),
        jlora.LoraConfig("table", rows=[0, 3]),
    ]
    lora, params = jlora.lora(place.model, configs), place.params()
    adapter = place.adapter(lora)
    with tempfile.TemporaryDirectory() as folder:
        jlora.checkpoint.save(folder, adapter, config=configs, base=params)
        found = jlora.checkpoint.restore(folder, base=params, like=adapter)
        record = jlora.checkpoint.describe(folder)
    digests = str(list(record.entries)), str(record)
    return found, _as_numbers(digests)


def _as_numbers(text: Any) -> np.ndarray:
    """Returns text as numbers that can be compared."""
    return np.frombuffer(str(text).encode(), np.uint8).astype(np.float32)


@feature
def peft(place: Place) -> Any:
    import tempfile

    import jlora.peft

    lora = place.lora("dense/kernel")
    params, adapter = place.params(), place.adapter(lora)
    with tempfile.TemporaryDirectory() as folder:
        jlora.peft.save(f"{folder}/one", params, adapter, lora.configs)
        return jlora.peft.load(f"{folder}/one", params)[1]


@feature
def plan_and_memory(place: Place) -> Any:
    import optax

    lora, params = place.lora(EVERY), place.params()
    plan = lora.plan(params, place.ids())
    assert str(plan)
    assert plan._repr_html_()
    assert str(plan.memory(optimizer=optax.adam(1e-3)))
    return np.float32(plan.trainable)
