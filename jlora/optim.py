"""The optax door: learning rates, weight decay, masks and norms of an adapter.

An adapter is a plain pytree, so every optax optimizer takes it as it is, and frozen
leaves need no mask: they are not in the tree that is differentiated. What is here
tells the parts of an adapter apart (`factor_labels`, `lora_plus`, `decay_mask`),
measures it (`adapter_norms`, `delta_norms`), and serves those who keep base and
adapter in one tree (`trainable_mask`, `frozen_mask`, `freeze_base`).

Example:
    Flax's `TrainState` holds the adapter as its params; the base is an argument of the
    step, never part of the state:

    >>> import jax, jax.numpy as jnp, jlora, jlora.optim, optax
    >>> from flax.training.train_state import TrainState
    >>> def model(params, x):
    ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
    >>> base = {"w1": jnp.ones((5, 7)), "w2": jnp.ones((7, 3))}
    >>> x, y = jnp.ones((2, 5)), jnp.zeros((2, 3))
    >>> lora = jlora.lora(model, jlora.LoraConfig(rank=2))
    >>> adapter = lora.init(jax.random.key(0), base, x)
    >>> tx = jlora.optim.lora_plus(optax.adam, 1e-2)
    >>> state = TrainState.create(apply_fn=lora.apply, params=adapter, tx=tx)
    >>> @jax.jit
    ... def step(state, base, x, y):
    ...     def loss(adapter):
    ...         return jnp.mean((state.apply_fn(base, adapter, x) - y) ** 2)
    ...     value, grads = jax.value_and_grad(loss)(state.params)
    ...     return state.apply_gradients(grads=grads), value
    >>> state, before = step(state, base, x, y)
    >>> state, after = step(state, base, x, y)
    >>> bool(after < before)
    True

    `nnx.Optimizer` wants variables, so each array of the adapter becomes one, and
    `nnx.as_pure` (before Flax 0.12.7 `nnx.pure`) gives the adapter back:

    >>> from flax import nnx
    >>> as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure
    >>> trainable = jax.tree.map(nnx.Param, adapter)
    >>> optimizer = nnx.Optimizer(trainable, tx, wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(trainable, optimizer, base, x, y):
    ...     def loss(trainable):
    ...         return jnp.mean((lora.apply(base, as_pure(trainable), x) - y) ** 2)
    ...     value, grads = nnx.value_and_grad(loss)(trainable)
    ...     optimizer.update(trainable, grads)
    ...     return value
    >>> before = step(trainable, optimizer, base, x, y)
    >>> bool(step(trainable, optimizer, base, x, y) < before)
    True
"""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_map_with_path

from ._adapter.variants import variant_of_entry, variants
from ._adapter.variants.variant import Variant
from ._algebra.norms import adapter_norms as adapter_norms
from ._algebra.norms import delta_norms as delta_norms
from ._params.paths import PyTree

Groups = dict[Hashable, optax.GradientTransformation]
MakeOptimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


def factor_labels(adapter: PyTree) -> PyTree:
    """Returns the adapter's tree with a label in place of each array.

    The label is "a" or "b" for the factors, "magnitude" for that of DoRA, "full" for a
    leaf that is trained whole, and "frozen" for an array that an entry holds and that
    is not trained, as `a` of LoRA-FA. Its gradient is zero, which most optimizers leave
    as it is; weight decay does not, without `decay_mask`.

    Args:
        adapter: an adapter, abstract or not; any tree of the same structure
            (gradients, updates) will do, and so will the `nnx.State` of its variables,
            in which each `LoraFactors` has become a mapping with the keys "a" and "b".

    Returns:
        A tree of strings, as `optax.partition` takes it. The function itself is also
        a valid `param_labels`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> fn = lambda params, x: x @ params["w"] + params["c"]
        >>> params = {"w": jnp.ones((5, 7)), "c": jnp.ones((1, 7))}
        >>> low, full = jlora.LoraConfig("w", rank=2), jlora.LoraConfig("c", full=True)
        >>> lora = jlora.lora(fn, [low, full])
        >>> adapter = lora.init(jax.random.key(0), params, jnp.ones((2, 5)))
        >>> labels = factor_labels(adapter)
        >>> labels["w"].a, labels["w"].b, labels["c"]
        ('a', 'b', 'full')
        >>> fast, slow = optax.adam(1e-2), optax.adam(1e-3)
        >>> tx = optax.partition({"a": slow, "b": fast, "full": slow}, factor_labels)
    """

    # The adapter itself is a mapping too, and may hold leaves called a and b.
    is_all = lambda node: node is adapter and isinstance(node, Mapping)
    variant_of = lambda node: None if is_all(node) else _variant_of(node)

    def label(node: Any) -> Any:
        variant = variant_of(node)
        if variant is None:
            return "full"
        name = lambda path: keystr(path[:1], simple=True)
        return tree_map_with_path(lambda path, _: variant.label(name(path)), node)

    return jax.tree.map(label, adapter, is_leaf=lambda n: variant_of(n) is not None)


def lora_plus(
    make_optimizer: MakeOptimizer,
    learning_rate: optax.ScalarOrSchedule,
    ratio: float = 16.0,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer of the adapter in which `b` learns `ratio` times faster.

    `b` gets `make_optimizer(ratio · learning_rate)`; `a`, the magnitudes of DoRA, and
    leaves that are trained whole get `make_optimizer(learning_rate)`; what an entry
    holds frozen stays. The groups do not see each other, so a clip by global norm
    belongs in front:
    `optax.chain(optax.clip_by_global_norm(1.0), lora_plus(optax.adam, 1e-4))`.

    Args:
        make_optimizer: a function from a learning rate to an optimizer: `optax.adamw`,
            or `functools.partial(optax.adamw, weight_decay=0.1)`.
        learning_rate: a number or a schedule.
        ratio: how many times faster `b` learns.

    Returns:
        An optimizer that takes adapters, and whole trees inside `freeze_base`.

    Raises:
        TypeError: if `make_optimizer` is no function.
        ValueError: if `ratio` is not positive; from `init` and `update`, if the tree
            holds no factors.

    Example:
        >>> import optax
        >>> schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-4, 100, 1000)
        >>> tx = lora_plus(optax.adamw, schedule, ratio=16.0)

    References:
        Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models,
        <https://arxiv.org/abs/2402.12354>, 2024.
    """
    if not callable(make_optimizer):
        raise TypeError(
            "`lora_plus` takes a function from a learning rate to an optimizer, "
            f"such as `optax.adam`, got {type(make_optimizer).__name__}"
        )
    if isinstance(ratio, int | float) and not ratio > 0:
        raise ValueError(f"`lora_plus(ratio=...)` must be positive, got {ratio}")
    rate = learning_rate
    faster = (lambda count: ratio * rate(count)) if callable(rate) else ratio * rate
    groups: Groups = {"slow": make_optimizer(rate), "fast": make_optimizer(faster)}
    return optax.partition({**groups, "frozen": _no_update()}, _speeds)


def decay_mask(adapter: PyTree) -> PyTree:
    """Returns True for the arrays of an adapter that weight decay should act on.

    These are the factors, and of the leaves that are trained whole those with two or
    more axes: biases, norm scales and the magnitudes of DoRA are left out. Decay of the
    factors pulls the model back to its base; decay of a leaf that is trained whole
    pulls that to zero.

    Args:
        adapter: an adapter, abstract or not, or a tree of the same structure.

    Returns:
        A tree of bools. The function itself is also a valid `mask`.

    Example:
        >>> import optax
        >>> tx = optax.adamw(1e-4, weight_decay=0.1, mask=decay_mask)
    """

    def decays(label: str, leaf: Any) -> bool:
        return label in ("a", "b") or (label == "full" and np.ndim(leaf) > 1)

    return jax.tree.map(decays, factor_labels(adapter), adapter)


def trainable_mask(tree: PyTree, *, collection: str = "lora") -> PyTree:
    """Returns True for each leaf of a tree of base and adapter that is trained.

    The rule: a leaf is trained if it lies inside a `LoraFactors`, wherever that stands,
    or below a key that is called `collection`, and is not an array that its entry holds
    frozen (`factor_labels`). The second half is for leaves that are
    trained whole, which are plain arrays; a tree that has some must keep its adapter
    below such a key. Keys are compared whole: "lora" is not found in "my_lora", nor in
    the path "params/lora/kernel" of an adapter.

    Args:
        tree: any tree, abstract or not: `{"params": base, "lora": adapter}`, say.
        collection: the key that holds the adapter.

    Returns:
        A tree of bools, True = trained.

    Example:
        >>> tree = {"params": {"w": 1.0}, "lora": {"params/c": 2.0}}
        >>> trainable_mask(tree)
        {'lora': {'params/c': True}, 'params': {'w': False}}
    """

    def mark(path: tuple[Any, ...], node: Any) -> Any:
        keys = [keystr((key,), simple=True) for key in path]
        trained = _is_factors(node) or collection in keys
        if trained and _holds_frozen(node):
            (labels,) = factor_labels([node])
            return jax.tree.map(lambda label: label != "frozen", labels)
        return jax.tree.map(lambda _: trained, node)

    is_entry = lambda node: _is_factors(node) or _holds_frozen(node)
    return tree_map_with_path(mark, tree, is_leaf=is_entry)


def frozen_mask(tree: PyTree, *, collection: str = "lora") -> PyTree:
    """Returns True for each leaf of a tree of base and adapter that is frozen.

    The complement of `trainable_mask`, for functions that ask what to freeze.

    Args:
        tree: any tree, abstract or not.
        collection: the key that holds the adapter.

    Returns:
        A tree of bools, True = frozen.

    Example:
        >>> frozen_mask({"params": {"w": 1.0}, "lora": {"params/c": 2.0}})
        {'lora': {'params/c': False}, 'params': {'w': True}}
    """
    return jax.tree.map(lambda t: not t, trainable_mask(tree, collection=collection))


def freeze_base(
    tx: optax.GradientTransformation, *, collection: str = "lora"
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` as an optimizer of a tree that holds base and adapter.

    Trained leaves, by the rule of `trainable_mask`, are updated as `tx` would update
    them alone: its clip norms, averages and accumulators see nothing else, so they
    belong inside. Frozen leaves get the update zero, whatever their gradient, and no
    state; under `jax.jit` neither is computed. (`optax.masked` alone would add their
    gradients to them.) A tree that holds the adapter alone needs none of this.

    Args:
        tx: any optimizer.
        collection: the key that holds the adapter.

    Returns:
        An optimizer of the whole tree.

    Raises:
        ValueError: from `init` and `update`, if no leaf of the tree is trained.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tree = {"params": {"c": jnp.ones(3)}, "lora": {"params/c": jnp.ones(3)}}
        >>> clip = optax.clip_by_global_norm(1.0)
        >>> tx = freeze_base(optax.chain(clip, optax.sgd(1.0)))
        >>> updates, _ = tx.update(tree, tx.init(tree), tree)
        >>> tree = optax.apply_updates(tree, updates)
        >>> float(tree["params"]["c"][0]), round(float(tree["lora"]["params/c"][0]), 3)
        (1.0, 0.423)
    """
    groups: Groups = {"trained": tx, "frozen": _no_update()}
    return optax.partition(groups, partial(_states, collection=collection))


def _variant_of(node: Any) -> Variant | None:
    """Returns the variant of an entry, or of its arrays by name in an `nnx.State`."""
    if _is_factors(node):
        return variant_of_entry(node)
    names = set(node) if isinstance(node, Mapping) else set()
    needed = lambda v: {*v.names} - {*v.optional}
    fits = lambda v: v.has_roles and needed(v) <= names <= {*v.names}
    return next((v for v in variants() if fits(v)), None)


def _is_factors(node: Any) -> bool:
    return variant_of_entry(node).has_roles


def _holds_frozen(node: Any) -> bool:
    """Whether it is an entry, or its arrays by name, of which some are not trained."""
    variant = _variant_of(node)
    return variant is not None and bool(variant.frozen)


def _speeds(adapter: PyTree) -> PyTree:
    """Returns which of the groups of `lora_plus` each array belongs to."""
    labels = factor_labels(adapter)
    found = set(jax.tree.leaves(labels))
    if found and "b" not in found:
        raise ValueError(
            f"`lora_plus` found no factors among {len(jax.tree.leaves(adapter))} "
            "leaves; what it optimizes is the adapter, `tx.init(adapter)`"
        )
    speeds = {"b": "fast", "frozen": "frozen"}
    return jax.tree.map(lambda label: speeds.get(label, "slow"), labels)


def _states(tree: PyTree, *, collection: str) -> PyTree:
    """Returns "trained" or "frozen" for each leaf."""
    mask = trainable_mask(tree, collection=collection)
    found = jax.tree.leaves(mask)
    if found and not any(found):
        raise ValueError(
            f"`freeze_base` found nothing to train among {len(found)} leaves: none is "
            f"inside a `LoraFactors` or below a key {collection!r}"
        )
    return jax.tree.map(lambda trained: "trained" if trained else "frozen", mask)


def _no_update() -> optax.GradientTransformation:
    """Returns the optimizer that changes nothing, down to the last bit.

    Unlike `optax.set_to_zero` it holds integers, whose gradients are of a dtype that
    cannot be added, and zeros of negative sign: -0.0 + 0.0 is 0.0.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        like = updates if params is None else params
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), like), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
