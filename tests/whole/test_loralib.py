"""What microsoft/loralib does, and how the same is said in jlora.

Each formula of loralib (`layers.py` and `utils.py`) is written down here in NumPy, in
torch's layouts: weights `(out, in, ...)`, `lora_A (r, in)`, `lora_B (out, r)`. Neither
torch nor loralib is needed. Both factors are random, for with one of them zero nothing
could differ.

References:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>, 2021, and its code
    <https://github.com/microsoft/LoRA/tree/main/loralib>.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle import assert_close

import jlora
from jlora import LoraConfig, LoraFactors

Array = np.ndarray
Key = Callable[[], jax.Array]
RANK, ALPHA = 3, 5.0  # alpha is no multiple of the rank
SCALING = ALPHA / RANK
IN, OUT, VOCAB = 7, 11, 13
pytestmark = pytest.mark.usefixtures("fast_compile")


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(found: Any, expected: Any) -> None:
    """Equal to a reference in float64, up to the rounding of float32."""
    assert_close(jnp.asarray(found), jnp.asarray(expected, jnp.float32), 1e-5)


def with_factors(factors: LoraFactors, a: Array, b: Array) -> LoraFactors:
    """Factors with the values of loralib's `lora_A` and `lora_B`."""
    assert (factors.a.shape, factors.b.shape) == (a.T.shape, b.T.shape)
    return dataclasses.replace(factors, a=jnp.asarray(a.T), b=jnp.asarray(b.T))


# --- Linear ---


def linear(
    weight: Array, bias: Array, a: Array, b: Array, x: Array, fan_in_fan_out: bool
) -> Array:
    """`Linear.forward`, in float64: `x·T(W)ᵀ + bias + (x·Aᵀ·Bᵀ)·alpha/r`."""
    weight, bias, a, b, x = (v.astype(np.float64) for v in (weight, bias, a, b, x))
    kernel = weight if fan_in_fan_out else weight.T
    return x @ kernel + bias + (x @ a.T @ b.T) * SCALING


def merged_weight(weight: Array, a: Array, b: Array, fan_in_fan_out: bool) -> Array:
    """The weight of a `Linear` after `.eval()`: `W + T(B·A)·alpha/r`."""
    change = b.astype(np.float64) @ a * SCALING
    return weight + (change.T if fan_in_fan_out else change)


@dataclasses.dataclass(frozen=True)
class Linear:
    """The same linear layer on both sides.

    loralib's `fan_in_fan_out` says that the weight is stored as (in, out). In jlora
    nothing says so: the function does, by what it contracts.
    """

    fan_in_fan_out: bool

    @property
    def params(self) -> dict[str, Array]:
        shape = (IN, OUT) if self.fan_in_fan_out else (OUT, IN)
        return {"kernel": normal(0, *shape), "bias": normal(1, OUT)}

    @property
    def x(self) -> Array:
        return normal(2, 2, IN)

    @property
    def a(self) -> Array:
        return normal(3, RANK, IN)

    @property
    def b(self) -> Array:
        return normal(4, OUT, RANK)

    @property
    def lora(self) -> jlora.Lora:
        return jlora.lora(self.fn, LoraConfig("kernel", rank=RANK, alpha=ALPHA))

    @functools.cached_property
    def new(self) -> LoraFactors:
        new = self.lora.init(jax.random.key(0), self.params, self.x)["kernel"]
        assert isinstance(new, LoraFactors)
        return new

    @property
    def adapter(self) -> dict[str, LoraFactors]:
        return {"kernel": with_factors(self.new, self.a, self.b)}

    def fn(self, params: Any, x: jax.Array) -> jax.Array:
        kernel = params["kernel"]
        return x @ (kernel if self.fan_in_fan_out else kernel.T) + params["bias"][None]

    def expected(self) -> Array:
        weight, bias = self.params["kernel"], self.params["bias"]
        return linear(weight, bias, self.a, self.b, self.x, self.fan_in_fan_out)


both_layouts = pytest.mark.parametrize("layer", [Linear(False), Linear(True)], ids=str)


@both_layouts
def test_linear_forward(layer: Linear) -> None:
    found = layer.lora.apply(layer.params, layer.adapter, layer.x)
    close(found, layer.expected())
    plain = layer.fn(layer.params, layer.x)
    assert float(jnp.abs(found - plain).max()) > 1.0


@both_layouts
def test_linear_scaling_is_alpha_over_r(layer: Linear) -> None:
    assert layer.new.scaling == SCALING


@both_layouts
def test_linear_a_starts_between_the_bounds_of_kaiming_and_b_at_zero(
    layer: Linear,
) -> None:
    """`kaiming_uniform_(a=√5)` of a matrix (r, in) has the gain √(2/(1+5))."""
    gain, fan_in = math.sqrt(2 / (1 + math.sqrt(5) ** 2)), 64
    bound = math.sqrt(3) * gain / math.sqrt(fan_in)
    shape = (fan_in, 96) if layer.fan_in_fan_out else (96, fan_in)
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(96)}
    lora = jlora.lora(layer.fn, LoraConfig("kernel", rank=32))
    new: Any = lora.init(jax.random.key(0), params, jnp.zeros((2, fan_in)))["kernel"]
    assert float(jnp.abs(new.a).max()) <= bound
    assert float(jnp.abs(new.a).max()) > 0.99 * bound
    assert float(new.a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert float(new.a.mean()) == pytest.approx(0, abs=0.03 * bound)
    assert not new.b.any()


@both_layouts
def test_linear_starts_as_the_plain_layer(layer: Linear) -> None:
    # As arrays of JAX: NumPy's own product of its arrays is another order of sums.
    params, x = jax.tree.map(jnp.asarray, (layer.params, layer.x))
    found = layer.lora.apply(params, {"kernel": layer.new}, x)
    np.testing.assert_array_equal(found, layer.fn(params, x))


@both_layouts
def test_linear_merged_for_evaluation(layer: Linear) -> None:
    merged = jlora.merge(layer.params, layer.adapter)
    args = layer.params["kernel"], layer.a, layer.b, layer.fan_in_fan_out
    close(merged["kernel"], merged_weight(*args))
    close(layer.fn(merged, layer.x), layer.expected())
    np.testing.assert_array_equal(merged["bias"], layer.params["bias"])


@both_layouts
def test_training_after_evaluation_has_the_weight_of_before(layer: Linear) -> None:
    """loralib subtracts what it added, which rounds; in jlora the base stays."""
    weight = layer.params["kernel"]
    args = layer.a, layer.b, layer.fan_in_fan_out
    change = merged_weight(np.zeros_like(weight), *args).astype(np.float32)
    assert (weight + change - change != weight).any()
    params = layer.params
    jlora.merge(params, layer.adapter)
    np.testing.assert_array_equal(params["kernel"], weight)


@both_layouts
def test_the_weight_gets_no_gradient_and_the_factors_do(layer: Linear) -> None:
    """The loss is the sum of squares, whose gradients are written out."""
    loss = lambda adapter: jnp.sum(
        layer.lora.apply(layer.params, adapter, layer.x) ** 2
    )
    grads: Any = jax.grad(loss)(layer.adapter)
    assert [p for p, _ in jax.tree.leaves_with_path(grads)] == [
        p for p, _ in jax.tree.leaves_with_path(layer.adapter)
    ]
    dy = 2 * layer.expected()
    close(grads["kernel"].b.T, SCALING * dy.T @ (layer.x @ layer.a.T))
    close(grads["kernel"].a.T, SCALING * (dy @ layer.b).T @ layer.x)


def test_r_of_zero_is_a_kernel_that_is_left_out() -> None:
    """loralib's `r=0` leaves a layer plain; a rank of zero is refused here."""
    with pytest.raises(ValueError, match="rank"):
        LoraConfig("kernel", rank=0)
    layer = Linear(True)
    lora = jlora.lora(layer.fn, LoraConfig(full=True, target="bias"))
    assert set(lora.init(jax.random.key(0), layer.params, layer.x)) == {"bias"}


# --- Embedding ---


IDS = np.array([[0, 5, 5], [12, 1, 3]])


def lookup(params: Any, ids: jax.Array) -> jax.Array:
    return params["embedding"][ids]


def embedded() -> tuple[jlora.Lora, dict[str, Array], LoraFactors]:
    lora = jlora.lora(lookup, LoraConfig(".*", rank=RANK, alpha=ALPHA))
    params = {"embedding": normal(0, VOCAB, OUT)}
    new: Any = lora.init(jax.random.key(0), params, IDS)["embedding"]
    return lora, params, new


def test_embedding_forward_and_merge() -> None:
    """`emb[x] + (Aᵀ[x]·Bᵀ)·alpha/r`, and `W + (B·A)ᵀ·alpha/r`."""
    lora, params, new = embedded()
    a, b = normal(1, RANK, VOCAB), normal(2, OUT, RANK)
    adapter = {"embedding": with_factors(new, a, b)}
    table = params["embedding"].astype(np.float64)
    close(
        lora.apply(params, adapter, IDS),
        table[IDS] + a.T.astype(np.float64)[IDS] @ b.T * SCALING,
    )
    merged = jlora.merge(params, adapter)
    close(merged["embedding"], table + (b.astype(np.float64) @ a).T * SCALING)
    close(lookup(merged, IDS), lora.apply(params, adapter, IDS))


def test_embedding_starts_with_the_roles_reversed() -> None:
    """loralib starts with A zero and B normal; jlora like any kernel, b zero.

    Either way nothing changes at first. What does is which factor learns first: the
    one that is zero. loralib's start is two lines away.
    """
    lora, params, new = embedded()
    assert new.a.any()
    assert not new.b.any()
    theirs = dataclasses.replace(
        new,
        a=jnp.zeros_like(new.a),
        b=jax.random.normal(jax.random.key(1), new.b.shape),
    )
    weights = normal(3, *IDS.shape, OUT)

    def loss(factors: LoraFactors) -> jax.Array:
        return jnp.sum(weights * lora.apply(params, {"embedding": factors}, IDS))

    for factors, learns, waits in ((new, "b", "a"), (theirs, "a", "b")):
        found = lora.apply(params, {"embedding": factors}, IDS)
        np.testing.assert_array_equal(found, lookup(params, IDS))
        grads = jax.grad(loss)(factors)
        assert getattr(grads, learns).any()
        assert not getattr(grads, waits).any()


def test_only_the_rows_of_a_that_were_looked_up_get_a_gradient() -> None:
    lora, params, new = embedded()
    factors = dataclasses.replace(new, b=jnp.asarray(normal(2, RANK, OUT)))
    loss = lambda f: jnp.sum(lora.apply(params, {"embedding": f}, IDS) ** 2)
    grad = np.asarray(jax.grad(loss)(factors).a)
    assert set(np.flatnonzero(grad.any(axis=1))) == set(IDS.ravel())


# --- Conv1d, Conv2d, Conv3d ---

SPECS = {1: ("NCW", "OIW"), 2: ("NCHW", "OIHW"), 3: ("NCDHW", "OIDHW")}


@dataclasses.dataclass(frozen=True)
class Conv:
    """The same convolution on both sides, with the weight in torch's layout."""

    ndim: int
    size: int
    groups: int = 1
    stride: int = 1
    rank: int = 1
    channels: tuple[int, int] = (4, 14)

    @property
    def shape(self) -> tuple[int, ...]:
        in_, out = self.channels
        return (out, in_ // self.groups, *(self.size,) * self.ndim)

    @property
    def params(self) -> dict[str, Array]:
        return {"kernel": normal(0, *self.shape)}

    @property
    def x(self) -> Array:
        return normal(1, 2, self.channels[0], *range(5, 5 + self.ndim))

    @property
    def factors(self) -> tuple[Array, Array]:
        """`lora_A (r·k, in·k)` and `lora_B (out//groups·k, r·k)`, random."""
        (in_, out), k = self.channels, self.size
        narrow = self.rank * k
        a, b = normal(2, narrow, in_ * k), normal(3, out // self.groups * k, narrow)
        return a.astype(np.float64), b.astype(np.float64)

    @property
    def change(self) -> Array:
        """loralib's delta without the scaling: `(B·A).view(weight.shape)`."""
        a, b = self.factors
        return (b @ a).reshape(self.shape)

    def fn(self, params: Any, x: jax.Array) -> jax.Array:
        image, kernel = SPECS[self.ndim]
        return lax.conv_general_dilated(
            x,
            params["kernel"],
            (self.stride,) * self.ndim,
            "VALID",
            dimension_numbers=(image, kernel, image),
            feature_group_count=self.groups,
        )

    def adapted(self, a: Array, b: Array) -> tuple[jlora.Lora, dict[str, LoraFactors]]:
        """The adapted convolution; `a` and `b` are matrices, scaled by ALPHA/r.

        jlora's rank is another than loralib's r, and alpha follows it.
        """
        rank = a.shape[1]
        alpha = ALPHA * rank / self.rank
        lora = jlora.lora(self.fn, LoraConfig("kernel", rank=rank, alpha=alpha))
        new: Any = lora.init(jax.random.key(0), self.params, self.x)["kernel"]
        a, b = (jnp.asarray(v, jnp.float32) for v in (a, b))
        filled = dataclasses.replace(
            new, a=a.reshape(new.a.shape), b=b.reshape(new.b.shape)
        )
        return lora, {"kernel": filled}

    def expected(self, change: Array) -> Array:
        weight = self.params["kernel"] + change * (ALPHA / self.rank)
        return convolved(self.x.astype(np.float64), weight, self.stride, self.groups)


def convolved(x: Array, weight: Array, stride: int, groups: int) -> Array:
    """The convolution of torch without padding: a sum over the window's offsets."""
    window, n_out = weight.shape[2:], weight.shape[0] // groups
    n_in = weight.shape[1]
    sizes = [(n - k) // stride + 1 for n, k in zip(x.shape[2:], window, strict=True)]
    y = np.zeros((len(x), weight.shape[0], *sizes))
    for offset in np.ndindex(*window):
        spots = (slice(o, o + stride * n, stride) for o, n in zip(offset, sizes))  # noqa: B905
        patch = x[(slice(None), slice(None), *spots)]
        for g in range(groups):
            rows, columns = slice(g * n_out, (g + 1) * n_out), slice(g * n_in, None)
            w = weight[(rows, slice(None), *offset)]
            y[:, rows] += np.einsum("ni...,oi->no...", patch[:, columns][:, :n_in], w)
    return y


def check_carried(conv: Conv, a: Array, b: Array) -> None:
    """The factors have loralib's delta, output and merged weight."""
    lora, adapter = conv.adapted(a, b)
    apply = jax.jit(lora.apply)
    scaled = conv.change * (ALPHA / conv.rank)
    close(jlora.delta(adapter["kernel"]), scaled)
    close(apply(conv.params, adapter, conv.x), conv.expected(conv.change))
    merged = jlora.merge(conv.params, adapter)
    close(merged["kernel"], conv.params["kernel"] + scaled)


def stacked(conv: Conv) -> tuple[Array, Array]:
    """jlora's factors of loralib's, in closed form, where groups divide k.

    Row (o, s) of B·A is the s-th part of the flat window of output channel o: so
    `ΔW[o, (s, c)] = Σ_ρ B[(o, s), ρ]·A[ρ, c]`, of rank r·k in each of the k/groups
    parts, and a is block diagonal.
    """
    a, b = conv.factors
    parts = conv.size // conv.groups
    in_order = b.reshape(conv.channels[1], parts, -1).transpose(1, 2, 0)
    return np.kron(np.eye(parts), a.T), in_order.reshape(-1, conv.channels[1])


def by_svd(change: Array, rank: int) -> tuple[Array, Array]:
    """The factors of rank `rank` of a delta (out, in, ...): exact if that is its."""
    u, s, vt = np.linalg.svd(change.reshape(len(change), -1), full_matrices=False)
    return vt[:rank].T * s[:rank], u[:, :rank].T


def matrix_rank(change: Array) -> int:
    return int(np.linalg.matrix_rank(change.reshape(len(change), -1)))


CLOSED = [
    Conv(2, 2, rank=2),
    Conv(2, 3, rank=1, stride=2),
    Conv(2, 2, groups=2, rank=1),
]


@pytest.mark.parametrize("conv", CLOSED, ids=str)
def test_conv2d_is_carried_over_exactly_with_rank_r_k_squared(conv: Conv) -> None:
    a, b = stacked(conv)
    assert a.shape[1] == conv.rank * conv.size**2 // conv.groups
    assert matrix_rank(conv.change) == a.shape[1]  # and with no smaller rank
    check_carried(conv, a, b)


@pytest.mark.parametrize("conv", [CLOSED[1], Conv(2, 3, groups=2, rank=1)], ids=str)
def test_conv2d_is_carried_over_exactly_by_an_svd(conv: Conv) -> None:
    """Also where a row of B·A spans two output channels, as with 2 groups and k=3."""
    check_carried(conv, *by_svd(conv.change, matrix_rank(conv.change)))


def test_conv2d_is_not_of_rank_r() -> None:
    conv = Conv(2, 2, rank=2)
    best = by_svd(conv.change, conv.rank)
    with pytest.raises(AssertionError):
        check_carried(conv, *best)


def test_conv2d_has_other_numbers_of_values() -> None:
    """loralib has r·k²·(in + out) values; jlora R·(in·k² + out) with rank R."""
    conv = Conv(2, 3, rank=2)
    (in_, out), k, r = conv.channels, conv.size, conv.rank
    assert sum(v.size for v in conv.factors) == r * k**2 * (in_ + out)
    _, adapter = conv.adapted(*by_svd(conv.change, 5))
    assert sum(v.size for v in jax.tree.leaves(adapter)) == 5 * (in_ * k**2 + out)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_convolutions_with_a_window_of_one_are_linear_layers(ndim: int) -> None:
    conv = Conv(ndim, 1, rank=3)
    a, b = conv.factors
    check_carried(conv, a.T, b.T)


@pytest.mark.parametrize("ndim", [1, 3])
def test_loralib_has_no_conv1d_or_conv3d_with_a_larger_window(ndim: int) -> None:
    """B·A has out·in·k² / groups values, whatever the number of axes.

    jlora adapts them, with `a (in, *window, rank)` and `b (rank, out)`.
    """
    conv = Conv(ndim, 2, stride=2, rank=3)
    with pytest.raises(ValueError, match="reshape"):
        _ = conv.change
    fan_in = math.prod(conv.shape[1:])
    a, b = normal(4, fan_in, 3), normal(5, 3, conv.channels[1])
    lora, adapter = conv.adapted(a, b)
    change = (a.astype(np.float64) @ b).T.reshape(conv.shape)
    close(lora.apply(conv.params, adapter, conv.x), conv.expected(change))


def test_convolutions_start_between_other_bounds() -> None:
    """kaiming's fan is in·k for loralib's `lora_A (r·k, in·k)`, and here in·k²."""
    conv = Conv(2, 3, channels=(16, 10))
    lora = jlora.lora(conv.fn, LoraConfig("kernel", rank=8))
    new: Any = lora.init(jax.random.key(0), conv.params, conv.x)["kernel"]
    theirs, ours = 1 / math.sqrt(16 * 3), 1 / math.sqrt(16 * 3 * 3)
    assert 0.99 * ours < float(jnp.abs(new.a).max()) <= ours < theirs
    assert not new.b.any()


# --- mark_only_lora_as_trainable, lora_state_dict ---

MODEL_PARAMS: dict[str, dict[str, Array]] = {
    "query": {"kernel": normal(0, IN, OUT), "bias": normal(1, OUT)},
    "value": {"kernel": normal(2, OUT, IN), "bias": normal(3, IN)},
    "norm": {"scale": normal(4, IN), "bias": normal(5, IN)},
    "head": {"kernel": normal(6, IN, VOCAB)},  # has no bias
}
ADAPTED = ("query", "head")  # the layers that loralib replaced by its own
X = normal(7, 2, IN)


def model(params: Any, x: jax.Array) -> jax.Array:
    for name in ("query", "value"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    x = x * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    return x @ params["head"]["kernel"]


def torch_names() -> list[str]:
    """What `named_parameters` says of that model with loralib's layers in it."""
    names = [
        f"{layer}.{leaf}" for layer in MODEL_PARAMS for leaf in MODEL_PARAMS[layer]
    ]
    return names + [f"{layer}.lora_{side}" for layer in ADAPTED for side in "AB"]


def marked_trainable(bias: str) -> set[str]:
    """The names that `mark_only_lora_as_trainable` leaves trainable."""
    biases = {name for name in torch_names() if "bias" in name}
    own = {f"{layer}.bias" for layer in ADAPTED} & set(torch_names())
    more = {"none": set(), "all": biases, "lora_only": own}[bias]
    return {name for name in torch_names() if "lora_" in name} | more


def state_dict_names(bias: str) -> set[str]:
    """The keys that `lora_state_dict` returns."""
    names = torch_names()
    kept = {n for n in names if "lora_" in n or (bias == "all" and "bias" in n)}
    if bias == "lora_only":
        kept |= {f"{n.split('lora_')[0]}bias" for n in kept} & set(names)
    return kept


def names_of(adapter: Any) -> set[str]:
    """The entries of an adapter, under the names of loralib."""
    names = set()
    for path, entry in adapter.items():
        layer, _, leaf = path.rpartition("/")
        whole = not isinstance(entry, LoraFactors)
        leaves = (leaf,) if whole else ("lora_A", "lora_B")
        names |= {f"{layer}.{name}" for name in leaves}
    return names


def adapter_of(*configs: LoraConfig) -> tuple[jlora.Lora, Any]:
    lora = jlora.lora(model, configs)
    return lora, lora.init(jax.random.key(0), MODEL_PARAMS, X)


def check_trainable(lora: jlora.Lora, adapter: Any, bias: str) -> None:
    """What is in the adapter, and nothing else, is trained and saved."""
    assert names_of(adapter) == marked_trainable(bias) == state_dict_names(bias)
    loss = lambda adapter: jnp.sum(lora.apply(MODEL_PARAMS, adapter, X) ** 2)
    grads = jax.grad(loss)(adapter)
    assert names_of(grads) == marked_trainable(bias)
    for path, entry in grads.items():
        learns = entry.b if isinstance(entry, LoraFactors) else entry
        assert learns.any(), path


TARGET = "(query|head)/kernel"
SMALL: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
# What each `bias` is as configs that train leaves whole.
CONFIGS = {
    "none": (LoraConfig(TARGET, **SMALL),),
    "all": (LoraConfig(TARGET, **SMALL), LoraConfig("bias", full=True)),
    "lora_only": (LoraConfig(TARGET, **SMALL), LoraConfig("query/bias", full=True)),
}


@pytest.mark.parametrize("bias", CONFIGS)
def test_the_adapter_is_what_is_trained_and_saved(bias: str) -> None:
    check_trainable(*adapter_of(*CONFIGS[bias]), bias)


def test_the_three_choices_of_biases_differ() -> None:
    counts = {bias: len(marked_trainable(bias)) for bias in CONFIGS}
    assert counts == {"none": 4, "all": 7, "lora_only": 5}


def test_a_bias_in_the_adapter_takes_the_place_of_its_own() -> None:
    lora, adapter = adapter_of(*CONFIGS["all"])
    close(lora.apply(MODEL_PARAMS, adapter, X), model(MODEL_PARAMS, X))
    other = normal(9, OUT)
    changed = {**MODEL_PARAMS, "query": {**MODEL_PARAMS["query"], "bias": other}}
    found = lora.apply(MODEL_PARAMS, {**adapter, "query/bias": other}, X)
    close(found, model(changed, X))


has_bias = pytest.mark.skipif(
    not hasattr(LoraConfig(), "bias"), reason="`LoraConfig(bias=)` is not there yet"
)


@has_bias
@pytest.mark.parametrize(
    ("ours", "theirs"), [("none", "none"), ("all", "all"), ("adapted", "lora_only")]
)
def test_bias_is_that_of_loralib(ours: str, theirs: str) -> None:
    settings = {**SMALL, "bias": ours}
    check_trainable(*adapter_of(LoraConfig(TARGET, **settings)), theirs)


@has_bias
def test_an_unknown_bias_is_refused() -> None:
    """loralib raises NotImplementedError."""
    settings: dict[str, Any] = {"bias": "lora_only"}
    with pytest.raises(ValueError, match=r"bias.*adapted"):
        LoraConfig(TARGET, **settings)
