"""`combine`: several adapters into one, exactly or by the merging methods of PEFT."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._adapter.factors import LoraFactors
from .._jax.keys import key_of
from .._params.given import check_key
from .._params.paths import PyTree
from .changes import Factored, factored, summable
from .matrices import Array, common_dtype, matrices, with_matrices
from .sums import Entries, check_number, weighted

Method = Literal["sum", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
Majority = Literal["total", "frequency"]


def combine(
    adapters: Sequence[Entries],
    weights: Sequence[float] | jax.Array,
    *,
    method: Method = "sum",
    density: float | None = None,
    key: jax.Array | None = None,
    majority: Majority = "total",
    params: PyTree = None,
) -> dict[str, Any]:
    """Returns one adapter made of several, each with a weight.

    "sum" is what the weights say, ΔW = Σ wᵢ·ΔWᵢ, exactly, and its rank is the sum of
    the ranks; `jlora.truncate` of it is the best there is of a smaller rank. Weights
    are folded in as `jlora.scale` and `jlora.add` do it, in float32 at least.

    The other methods are those of PEFT's `add_weighted_adapter`, and give what it
    gives. They keep the rank by working on the factors one by one: with tᵢ the factor
    `a` (or `b`) of adapter i and vᵢ = √|wᵢ·scalingᵢ|, signed for `a`,

    - "linear" is Σ vᵢ·tᵢ. ΔW is then no sum: (Σ vᵢaᵢ)(Σ vᵢbᵢ) has terms aᵢ·bⱼ of
      different adapters, which mean nothing unless the factors were trained together.
    - "magnitude_prune" is that sum of the largest values of each tᵢ alone.
    - "ties" (TIES-merging) keeps the largest values of each tᵢ, elects the sign of each
      position by their sum, and takes the mean of the vᵢ·tᵢ of that sign.
    - "dare_linear" (DARE) drops values of each tᵢ at random, divides the others by the
      density, and sums.
    - "dare_ties" does so too, and goes on as "ties".

    Layers of a stack and experts are treated one by one. The scaling of the result is 1
    for all methods but "sum", which keeps it where all terms have the same.

    Which entries stay what they are in "sum" is said by `jlora.add`. The other methods
    work on the factors of slices and layers, and on those that entries of any other
    variant are lowered to.

    Args:
        adapters: the entries by path, for the same kernels. A path need not be in all.
        weights: a number for each, of either sign; arrays may be traced.
        method: how to combine.
        density: the share of values to keep, for the methods that drop some.
        key: a PRNG key, for the methods that do so at random. Adapter i keeps what
            `jax.random.bernoulli` draws for its own key, made from the path, the factor
            and i.
        majority: how "ties" and "dare_ties" elect signs: by the sum of values
            ("total") or by counting ("frequency").
        params: the frozen params, for entries whose ΔW is counted from them: rows that
            are trained, and for "sum" leaves that are trained whole.

    Returns:
        A new adapter, with the paths of all.

    Raises:
        AdapterError: with every path whose kernels (or ranks, but for "sum") differ.
        UnsupportedFeatureError: with every entry that has no sum or, for the other
            methods, no factors; or none without `params`.
        ValueError: if an argument is missing, out of range, or of another method.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = jlora.LoraFactors(jnp.ones((5, 2)), jnp.ones((2, 3)), axes, 1.0)
        >>> one = {"w": factors}
        >>> both = jlora.combine([one, one], [0.75, -0.25])
        >>> both["w"].rank, float(jlora.delta(both["w"])[0, 0])
        (4, 1.0)
        >>> rough = jlora.combine([one, one], [0.5, 0.5], method="ties", density=0.5)
        >>> rough["w"].rank
        2

    References:
        Ilharco et al., Editing Models with Task Arithmetic,
        <https://arxiv.org/abs/2212.04089>, 2022, for "sum".
        Yadav et al., TIES-Merging: Resolving Interference When Merging Models,
        <https://arxiv.org/abs/2306.01708>, 2023, section 4 and algorithm 1.
        Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous
        Models as a Free Lunch, <https://arxiv.org/abs/2311.03099>, 2023, section 3.
    """
    numbers = _checked(adapters, weights)
    _check_options(method, density, key, majority)
    if method == "sum":
        return weighted(summable("jlora.combine", adapters, params), numbers)
    changes = factored("jlora.combine", adapters, params, ranks=True)
    recipe = _Recipe(method, density, key, majority)
    return {path: recipe.merged(path, one, numbers) for path, one in changes.items()}


# --- arguments ---


def _checked(adapters: Any, weights: Any) -> list[float | Array]:
    """Returns the weights one by one."""
    if isinstance(adapters, Mapping):
        raise TypeError(
            "`jlora.combine` takes a sequence of adapters; got one mapping. Pass "
            "`list(adapters.values())` if it holds adapters by name"
        )
    numbers = list(weights)
    if not adapters or len(adapters) != len(numbers):
        raise ValueError(
            "`jlora.combine` takes at least one adapter and a weight for each; got "
            f"{len(adapters)} adapters and {len(numbers)} weights"
        )
    return [
        check_number(f"jlora.combine(weights=...)[{i}]", number)
        for i, number in enumerate(numbers)
    ]


def _check_options(method: str, density: Any, key: Any, majority: str) -> None:
    if method != "sum" and method not in _METHODS:
        known = ("sum", *_METHODS)
        raise ValueError(
            f"`jlora.combine(method=...)` must be one of {known}; got {method!r}"
        )
    sparsify, elects = _METHODS.get(method, (_all, False))
    _check_given("density", density, method, needed=sparsify is not _all)
    _check_given("key", key, method, needed=sparsify is _random)
    if key is not None:
        check_key(key, "key")
    if density is not None and not 0 < density <= 1:
        raise ValueError(
            "`jlora.combine(density=...)` is the share of values to keep, above 0 and "
            f"at most 1; got {density!r}"
        )
    if majority not in ("total", "frequency") or (majority != "total" and not elects):
        raise ValueError(
            '`jlora.combine(majority=...)` is "total" or "frequency", and for "ties" '
            f'and "dare_ties" alone; got {majority!r} for {method!r}'
        )


def _check_given(name: str, value: Any, method: str, *, needed: bool) -> None:
    if (value is not None) != needed:
        told = "needs" if needed else "takes no"
        raise ValueError(f"`jlora.combine(method={method!r})` {told} `{name}`")


# --- factor by factor ---


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """A method that works on the factors one by one, and its options."""

    method: str
    density: float | None
    key: jax.Array | None
    majority: Majority

    def merged(
        self, path: str, change: Factored, numbers: Sequence[float | Array]
    ) -> Any:
        """Returns the entry of one path, from those of the adapters that have it."""
        several = [
            dict(zip(change.parts, own, strict=True))
            for own in zip(*change.parts.values(), strict=True)
        ]
        names = [path, *(f"{path}[{i}]" for i in range(1, len(several)))]
        pairs = zip(names, several, strict=True)
        return change.rejoined([self._part(*pair, numbers) for pair in pairs])

    def _part(
        self,
        path: str,
        found: Mapping[int, LoraFactors],
        numbers: Sequence[float | Array],
    ) -> LoraFactors:
        sides = zip(*[matrices(factors) for factors in found.values()], strict=True)
        products = [numbers[i] * factors.scaling for i, factors in found.items()]
        roots = jnp.stack([jnp.sqrt(abs(jnp.asarray(p, float))) for p in products])
        signs = jnp.stack([jnp.where(jnp.asarray(p) < 0, -1, 1) for p in products])
        # The sign of a weight goes to one side: on both it would cancel itself.
        weights = signs * roots, roots
        a, b = (
            self._side(tensors, own, self._keys(f"{path}/{name}", found))
            for name, tensors, own in zip("ab", sides, weights, strict=True)
        )
        return with_matrices(_form(list(found.values())), a, b)

    def _side(
        self, tensors: Sequence[Array], weights: jax.Array, keys: Sequence[Any]
    ) -> jax.Array:
        sparsify, elects = _METHODS[self.method]
        pairs = zip(tensors, keys, strict=True)
        kept = jnp.stack([sparsify(t, self.density, key) for t, key in pairs])
        own = weights.astype(kept.dtype).reshape(-1, *[1] * (kept.ndim - 1))
        if not elects:
            return (own * kept).sum(axis=0)
        agree = _agree(kept, self.majority).astype(kept.dtype)
        return (own * kept * agree).sum(axis=0) / jnp.maximum(agree.sum(axis=0), 1)

    def _keys(self, name: str, numbers: Iterable[int]) -> list[jax.Array | None]:
        if self.key is None:
            return [None for _ in numbers]
        own = key_of(self.key, name)
        return [jax.random.fold_in(own, i) for i in numbers]


def _form(entries: list[LoraFactors]) -> LoraFactors:
    """Returns factors whose axes, dtypes and shardings are those of the result."""
    first = entries[0]
    a = first.a.astype(common_dtype(*[f.a for f in entries]))
    b = first.b.astype(common_dtype(*[f.b for f in entries]))
    return LoraFactors(a, b, first.axes, 1.0)


def _agree(kept: jax.Array, majority: Majority) -> jax.Array:
    """Returns where each adapter has the sign that most have, by size or by number."""
    votes = kept if majority == "total" else jnp.sign(kept)
    elected = jnp.where(votes.sum(axis=0, keepdims=True) >= 0, 1.0, -1.0)
    return jnp.sign(kept) == elected.astype(kept.dtype)


def _all(tensor: Array, density: float | None, key: jax.Array | None) -> Array:
    return tensor


def _largest(tensor: Array, density: Any, key: jax.Array | None) -> jax.Array:
    """Returns each matrix with all but its largest values, by magnitude, at zero."""
    flat = jnp.asarray(tensor).reshape(*tensor.shape[:-2], -1)
    order = jnp.argsort(-jnp.abs(flat), axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1)
    kept = place < int(density * flat.shape[-1])
    return (flat * kept.astype(flat.dtype)).reshape(tensor.shape)


def _random(tensor: Array, density: Any, key: Any) -> jax.Array:
    """Returns values kept with the probability `density`, so that the mean stays."""
    kept = jax.random.bernoulli(key, float(density), tensor.shape)
    return tensor * kept.astype(tensor.dtype) / density


# How each method thins the factors out, and whether signs are elected.
_METHODS: dict[str, tuple[Callable[..., Array], bool]] = {
    "linear": (_all, False),
    "magnitude_prune": (_largest, False),
    "ties": (_largest, True),
    "dare_linear": (_random, False),
    "dare_ties": (_random, True),
}
