"""From a config, a params tree and a program to targets: what will be trained."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from .._adapter.config import LoraConfig
from .._adapter.variants import variant_of_config
from .._errors import MaterializationError
from .._jax.versions import OWN_DERIVATIVE
from .._params.alternatives import alternatives
from .._params.axes import KernelAxes, Shape, with_batch
from .._params.paths import FlatParams, is_array, is_quantized, matching, names
from .._params.quantized import Quantized, qtype_of
from .._product.choice import Contraction
from .._program.decide import OF_DORA, OF_SCALE, OF_SUM, decide
from .._program.discover import discover, settle
from .._program.trace import Traced
from .._rules import CARRY, CONSUME
from .._rules.elementwise import is_elementwise
from .._rules.view import Flow, Log, Use, Value, View, Vote
from .conflicts import conflicts, no_batch, other_batch, other_roles
from .problems import DOUBT, EMPTY, FROZEN, NO_BATCH, check, several
from .target import Target, Unusable

# The collections of Linen's own layers and transforms: nobody means them by a pattern.
KEPT_BY_LAYERS = {
    "batch_stats",
    "cache",
    "intermediates",
    "params_axes",
    "perturbations",
    "_overwrite_with_gradient",
}


def resolve(
    params: FlatParams, configs: Sequence[LoraConfig], traced: Traced | None
) -> tuple[list[Target], list[Unusable]]:
    """Returns the targets and the matched leaves that are none.

    Args:
        params: the flattened params.
        configs: the configs; of those that match, the first that can use it decides.
        traced: the traced program, or None to rely on names and shapes alone.

    Raises:
        TargetError: if a pattern matches no usable leaf, or a config is shadowed by
            those before it. All offenders are collected.
    """
    matches = [_match(config, params) for config in configs]
    wanted = set().union(*matches)
    leaves = params.by_path()
    kernels = _discover(traced, leaves, wanted) if traced else _guess(leaves, wanted)
    elsewhere = _elsewhere(params, configs)
    targets, unusable = [], []
    for path in params.paths:
        matching_ones = [c for c, m in zip(configs, matches, strict=True) if path in m]
        tried = [_target(path, leaves[path], c, kernels) for c in matching_ones]
        tried += [elsewhere[path]] if path in elsewhere and not tried else []
        usable = [found for found in tried if isinstance(found, Target)]
        # The first config that can use the leaf decides: a bias beside an adapted
        # kernel is left for a later config that trains it whole.
        targets.extend(usable[:1])
        unusable.extend([] if usable else _first(tried))
    check(configs, matches, targets, unusable, params.paths)
    targets += _biases(configs, targets, params)
    trained = {target.path for target in targets}
    order = {path: i for i, path in enumerate(params.paths)}
    targets.sort(key=lambda target: order[target.path])
    return targets, [u for u in unusable if u.path not in trained]


def dropout_rates(
    params: FlatParams, configs: Sequence[LoraConfig], traced: Traced
) -> dict[str, float]:
    """Returns the dropout of each target, and of leaves that are matched in vain.

    The targets are only looked for where configs that match one leaf do not agree: the
    first that can use it decides.
    """
    rates: dict[str, set[float]] = {}
    for config in configs:
        for path in _match(config, params):
            rates.setdefault(path, set()).add(config.dropout)
    if all(len(of_path) == 1 for of_path in rates.values()):
        return {path: rate for path, (rate,) in rates.items()}
    targets, _ = resolve(params, configs, traced)
    return {target.path: target.config.dropout for target in targets}


def _biases(
    configs: Sequence[LoraConfig], targets: Sequence[Target], params: FlatParams
) -> list[Target]:
    """Returns the biases that configs train beside their kernels, as `bias` says."""
    found: dict[str, Target] = {}
    leaves = params.by_path()
    taken = {target.path for target in targets}
    for config in configs:
        if config.bias == "none":
            continue
        own = {t.path.rpartition("/")[0] for t in targets if t.config is config}
        left_out = taken | _hit(config.exclude, list(leaves))
        for path, leaf in leaves.items():
            module, _, name = path.rpartition("/")
            every = config.bias == "all" and params.collection(path) is None
            wanted = every or module in own
            wanted = wanted and name == "bias" and path not in left_out
            if wanted and _is_floating(leaf) and not _is_empty(leaf):
                shape = tuple(leaf.shape)
                found.setdefault(path, Target(path, shape, leaf.dtype, None, config))
    return list(found.values())


def _match(config: LoraConfig, params: FlatParams) -> set[str]:
    """Returns the paths that a config matches: of params, and what its patterns name.

    A statistic or a cache is none of the params, unless a pattern names its collection.
    """
    excluded = _hit(config.exclude, params.paths)
    if config.target is None:
        found = {path for path in params.paths if params.collection(path) is None}
        return found - excluded
    found = _hit(config.target, params.paths)
    apart = {path for path in found if params.collection(path) is not None}
    patterns = several(config.target)
    each = [*patterns, *(one.alone for p in patterns for one in alternatives(p))]
    named = {path for path in apart if any(names(one, path) for one in each)}
    return (found - apart | named) - excluded


def _hit(patterns: str | Sequence[str] | None, paths: Sequence[str]) -> set[str]:
    return set().union(*(matching(p, paths) for p in several(patterns)))


def _elsewhere(
    params: FlatParams, configs: Sequence[LoraConfig]
) -> dict[str, Unusable]:
    """Returns the leaves that a config matches but for the collection they are in."""
    apart = [path for path in params.paths if params.collection(path) is not None]
    leaves, found = params.by_path(), {}
    is_whole = lambda config: not variant_of_config(config).has_roles
    hits = [(c, _hit(c.target, apart) - _hit(c.exclude, apart)) for c in configs]
    for path in set().union(*(paths for _, paths in hits)):
        collection, leaf = params.collection(path), leaves[path]
        shape = tuple(getattr(leaf, "shape", ()))
        whole = any(is_whole(c) for c, paths in hits if path in paths)
        doubtful = collection not in KEPT_BY_LAYERS and _is_floating(leaf)
        reason = (
            f"is in the collection {collection!r}, which is left alone unless a "
            f"pattern names it, as '{collection}/...' does"
        )
        doubtful = doubtful and (whole or len(shape) > 1)
        found[path] = Unusable(path, shape, reason, is_doubtful=doubtful)
    return found


def _first(tried: Sequence[Target | Unusable]) -> list[Unusable]:
    """Returns the reason of the first config, unless another has one to warn of."""
    told = [one for one in tried if isinstance(one, Unusable)]
    return sorted(told, key=lambda one: not one.is_doubtful)[:1]


# --- which leaves are kernels ---


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What is known of a leaf: its axes if it is a kernel, else why it is none."""

    axes: KernelAxes | None
    reason: str = ""
    looked_up: bool = False
    is_opaque: bool = False


def _discover(
    traced: Traced, leaves: Mapping[str, Any], wanted: set[str]
) -> dict[str, _Kernel]:
    """Learns the roles of the axes from the operations of the program."""
    shapes = {
        path: tuple(leaves[path].shape)
        for path in wanted & set(traced.positions)
        if _is_floating(leaves[path])
        and leaves[path].shape
        and not _is_empty(leaves[path])
    }
    found = discover(traced.jaxpr, _known(traced, shapes))
    votes, log = found.votes, found.log
    return {p: _learnt(p, leaves[p], votes.get(p, []), log) for p in wanted}


def _is_floating(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_empty(leaf: Any) -> bool:
    return 0 in leaf.shape


def _learnt(path: str, leaf: Any, votes: Sequence[Vote], log: Log) -> _Kernel:
    if not _is_floating(leaf):
        kind = leaf.dtype if is_array(leaf) else type(leaf).__name__
        return _Kernel(None, f"is {kind}, not floating")
    if _is_empty(leaf):
        return _Kernel(None, EMPTY)
    axes = settle(votes, leaf.shape)
    if axes is not None:
        return _Kernel(axes, looked_up=any(v.kind == "lookup" for v in votes))
    if votes:
        return _Kernel(None, _disagreement(votes), is_opaque=True)
    reached = [use for use in log.obstacles if use.path == path]
    if not reached:
        return _Kernel(None, "is not used as a kernel by the function")
    opaque = [use for use in reached if use.is_matrix and not _is_known(use.primitive)]
    first = [*opaque, *reached][0]
    where = f"reaches {first.kind} at {first.source}"
    # A norm scale beside the input of a product has no output axis there.
    why = "gives it no roles of a kernel" if first.primitive in CONSUME else _NO_RULE
    return _Kernel(None, f"{where}, which {why}", is_opaque=bool(opaque))


_NO_RULE = "has no low-rank rule"


def _disagreement(votes: Sequence[Vote]) -> str:
    """Returns why uses of a kernel leave it without input or output axes."""

    def told(vote: Vote) -> str:
        by_role = {
            role: ",".join(
                str(axis) for axis, own in sorted(vote.roles.items()) if own == role
            )
            for role in ("batch", "in", "out")
        }
        roles = " ".join(f"{role} {axes}" for role, axes in by_role.items() if axes)
        return f"{vote.kind} ({roles})"

    uses = list(dict.fromkeys(map(told, votes)))
    if len(uses) == 1:
        return f"has a use that leaves it no input or no output axes: {uses[0]}"
    return f"has uses that disagree on the roles of its axes: {' and '.join(uses)}"


def _is_known(primitive: str) -> bool:
    """Whether it is known of an operation that it is no product by another name.

    A bias or a position table is added, and a norm scale multiplied. A product with a
    rule is not the one of a kernel where it gives no roles.
    """
    known = primitive in CARRY or primitive in CONSUME or is_elementwise(primitive)
    return known or primitive == "output" or primitive.startswith(("reduce_", "arg"))


def _guess(leaves: Mapping[str, Any], wanted: set[str]) -> dict[str, _Kernel]:
    """Learns the axes from Flax's names and shapes, where they are beyond doubt."""
    return {path: _named(path, leaves[path]) for path in wanted}


def _named(path: str, leaf: Any) -> _Kernel:
    if not _is_floating(leaf):
        return _Kernel(None, "is not a floating array")
    if _is_empty(leaf):
        return _Kernel(None, EMPTY)
    *module, name = path.split("/")
    ndim = len(leaf.shape)
    if name == "kernel" and ndim == 2:
        return _Kernel(KernelAxes((), (0,), (1,)))
    if name == "embedding" and ndim == 2:
        return _Kernel(KernelAxes((), (0,), (1,)), looked_up=True)
    if name == "kernel" and 3 <= ndim <= 5 and _is_conv(module):
        return _Kernel(KernelAxes((), tuple(range(ndim - 1)), (ndim - 1,)))
    if ndim < 2:
        return _Kernel(None, f"has {ndim} axes; a kernel has at least two")
    return _Kernel(None, DOUBT)


def named_axes(path: str, leaf: Any) -> tuple[KernelAxes, bool]:
    """Returns the axes of a leaf of two or more, and whether it is a table of rows.

    Where its name says nothing the last two are the input and the output axis.
    """
    known, ndim = _named(path, leaf), len(leaf.shape)
    if known.axes is not None:
        return known.axes, known.looked_up
    return KernelAxes(tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,)), False


def _is_conv(module: Sequence[str]) -> bool:
    return bool(module) and re.match(r"conv(_?\d+)?$", module[-1].lower()) is not None


def _target(
    path: str, leaf: Any, config: LoraConfig, kernels: Mapping[str, _Kernel]
) -> Target | Unusable:
    shape = tuple(getattr(leaf, "shape", ()))
    known, variant = kernels[path], variant_of_config(config)
    if not variant.has_roles and is_quantized(leaf):
        return Unusable(path, shape, f"is quantised ({qtype_of(leaf)}): {FROZEN}")
    if not variant.has_roles:
        if _is_floating(leaf) and not _is_empty(leaf):
            return Target(path, shape, leaf.dtype, None, config)
        return Unusable(path, shape, known.reason)
    if known.axes is None:
        opaque = known.is_opaque and config.target is not None
        return Unusable(path, shape, known.reason, is_doubtful=opaque)
    axes = with_batch(known.axes, config.batch_axes)
    if axes is None:
        reason = no_batch(known.axes, config.batch_axes)
        return Unusable(path, shape, f"{reason}{NO_BATCH}")
    reason = variant.misfit(axes, shape, **variant.settings_of(config))
    if reason:
        return Unusable(path, shape, reason)
    if config.target is None and known.looked_up:
        return Unusable(
            path, shape, "is a table that is looked up; name it to adapt it"
        )
    qtype = qtype_of(leaf) if is_quantized(leaf) else None
    return Target(path, shape, leaf.dtype, axes, config, qtype=qtype)


def with_uses(
    targets: Sequence[Target],
    traced: Traced,
    materialize: str,
    contraction: Contraction,
) -> list[Target]:
    """Adds to each target where the program uses it."""
    axes = {t.path: t.axes for t in targets if t.axes is not None}
    dora = {t.path for t in targets if "magnitude" in t.array_shapes}
    whole = {t.path for t in targets if t.axes is None}
    _, log = program_of(
        traced, axes, materialize, contraction, dora, whole, misfit=other_batch
    )
    seen = [*log.uses, *log.obstacles]
    return [
        dataclasses.replace(t, uses=tuple(use for use in seen if use.path == t.path))
        for t in targets
    ]


def program_of(
    traced: Traced,
    axes: Mapping[str, KernelAxes],
    materialize: str,
    contraction: Contraction,
    dora: Collection[str] = (),
    whole: Collection[str] = (),
    *,
    misfit: Callable[[list[str]], Exception] | None = None,
) -> tuple[Any, Log]:
    """Returns the program to evaluate, and the uses of the kernels in it.

    Args:
        traced: the traced call.
        axes: the roles of the axes of the adapted kernels, by path.
        materialize: as `jlora.lora` takes it.
        contraction: likewise.
        dora: the paths of the kernels that have DoRA's scale.
        whole: the paths of the leaves that are trained whole.
        misfit: makes the error for kernels that could be evaluated with other roles; it
            is about the adapter by default.

    Raises:
        AdapterError: if the roles in the adapter are not those of the program, and keep
            it from being evaluated.
        MaterializationError: if a kernel reaches an operation without a low-rank rule,
            or one of `dora` a use that has none for DoRA, and `materialize` is "error".
    """
    shapes = {p: tuple(traced.inputs[traced.positions[p]].shape) for p in axes}
    inputs = _known(traced, shapes, whole)
    program, log = decide(traced.jaxpr, inputs, axes, contraction, dora)
    if log.obstacles and materialize == "error":
        told = conflicts(traced.jaxpr, inputs, axes, log.obstacles, contraction, dora)
        if told:
            raise (misfit or other_roles)(told)
        raise MaterializationError(_obstacles(log.obstacles, shapes))
    return program, log


def _known(
    traced: Traced, kernels: Mapping[str, Shape], whole: Collection[str] = ()
) -> list[Value]:
    """Returns what is known of the inputs of a program, given the shapes of kernels."""
    inputs = [Value(active=Flow(active=True))] * len(traced.inputs)
    for path, place in traced.positions.items():
        view = (View.whole(path, kernels[path]),) if path in kernels else ()
        lazy = isinstance(traced.inputs[place], Quantized)
        inputs[place] = Value(view, Flow(adapter=path in whole), lazy=lazy)
    return inputs


def _obstacles(uses: Sequence[Use], shapes: Mapping[str, tuple[int, ...]]) -> str:
    lines = [
        f"adapted kernel {use.path!r} {shapes[use.path]} reaches {use.kind} at "
        f"{use.source}, which has no low-rank rule"
        for use in dict.fromkeys(uses)
    ]
    of_own = any(use.primitive in OWN_DERIVATIVE for use in uses)
    has = lambda text: any(use.kind.endswith(text) for use in uses)
    apart = ", leave DoRA off for them with a config of their own"
    apart = apart if has(OF_DORA) else ""
    moved = has(OF_SCALE) or has(OF_SUM)
    apart += ", do not train what is beside them there" if moved else ""
    return (
        "\n".join(lines)
        + f"\nLeave these paths out of `LoraConfig.target`{apart}, or pass "
        '`materialize="allow"` to `jlora.lora` to form W + s·a·b there and only there'
        + (_OF_OWN if of_own else "")
    )


_OF_OWN = (
    ", with exact gradients. A function with a derivative of its own takes whole "
    "kernels, as its rule does; in a variant without one they stay factored (for "
    "Diffrax: `adjoint=diffrax.DirectAdjoint()`)"
)
