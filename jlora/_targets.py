"""From a config, a params tree and a program to targets: what will be trained."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ._analyze import Log, Use, View
from ._axes import KernelAxes, Shape
from ._choice import Contraction
from ._config import LoraConfig
from ._decide import decide
from ._discover import Vote, discover, settle
from ._errors import MaterializationError, TargetError
from ._paths import FlatParams, is_quantized, matching, nearest
from ._quantized import qtype_of
from ._target import Target, Unusable
from ._trace import Traced, is_array


def resolve(
    params: FlatParams, configs: Sequence[LoraConfig], traced: Traced | None
) -> tuple[list[Target], list[Unusable]]:
    """Returns the targets and the matched leaves that are none.

    Args:
        params: the flattened params.
        configs: the configs; of those that match, the first that can use it decides.
        traced: the traced program, or None to rely on names and shapes alone.

    Raises:
        TargetError: if a pattern matches no usable leaf, a config is shadowed by those
            before it, or a rank is too large. All offenders are collected.
    """
    matches = [_match(config, params.paths) for config in configs]
    wanted = set().union(*matches)
    leaves = params.by_path()
    kernels = _discover(traced, leaves, wanted) if traced else _guess(leaves, wanted)
    targets, unusable = [], []
    for path in params.paths:
        matching_ones = [c for c, m in zip(configs, matches, strict=True) if path in m]
        tried = [_target(path, leaves[path], c, kernels) for c in matching_ones]
        usable = [found for found in tried if isinstance(found, Target)]
        # The first config that can use the leaf decides: a bias beside an adapted
        # kernel is left for a later config that trains it whole.
        targets.extend(usable[:1])
        unusable.extend([] if usable else tried[:1])
    _check(configs, matches, targets, unusable, params.paths)
    targets += _biases(configs, matches, targets, leaves)
    trained = {target.path for target in targets}
    order = {path: i for i, path in enumerate(params.paths)}
    targets.sort(key=lambda target: order[target.path])
    return targets, [u for u in unusable if u.path not in trained]


def _biases(
    configs: Sequence[LoraConfig],
    matches: Sequence[set[str]],
    targets: Sequence[Target],
    leaves: Mapping[str, Any],
) -> list[Target]:
    """Returns the biases that configs train beside their kernels, as `bias` says."""
    found: dict[str, Target] = {}
    taken = {target.path for target in targets}
    for config in configs:
        if config.bias == "none":
            continue
        own = {t.path.rpartition("/")[0] for t in targets if t.config is config}
        for path, leaf in leaves.items():
            module, _, name = path.rpartition("/")
            wanted = config.bias == "all" or module in own
            if name == "bias" and wanted and path not in taken and _is_floating(leaf):
                shape = tuple(leaf.shape)
                found.setdefault(path, Target(path, shape, leaf.dtype, None, config))
    return list(found.values())


def _match(config: LoraConfig, paths: Sequence[str]) -> set[str]:
    found = set(paths)
    if config.target is not None:
        found = set().union(*(matching(p, paths) for p in _several(config.target)))
    for pattern in _several(config.exclude):
        found -= set(matching(pattern, paths))
    return found


def _several(patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    if patterns is None:
        return ()
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


# --- which leaves are kernels ---


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What is known of a leaf: its axes if it is a kernel, else why it is none."""

    axes: KernelAxes | None
    reason: str = ""
    looked_up: bool = False


def _discover(
    traced: Traced, leaves: Mapping[str, Any], wanted: set[str]
) -> dict[str, _Kernel]:
    """Learns the roles of the axes from the operations of the program."""
    views: list[View | None] = [None] * len(traced.inputs)
    for path in wanted & set(traced.positions):
        if _is_floating(leaves[path]) and leaves[path].shape:
            views[traced.positions[path]] = View.whole(path, leaves[path].shape)
    votes, log = discover(traced.jaxpr, views)
    return {p: _learnt(p, leaves[p], votes.get(p, []), log) for p in wanted}


def _is_floating(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _learnt(path: str, leaf: Any, votes: Sequence[Vote], log: Log) -> _Kernel:
    if not _is_floating(leaf):
        kind = leaf.dtype if is_array(leaf) else type(leaf).__name__
        return _Kernel(None, f"is {kind}, not floating")
    axes = settle(votes, leaf.shape)
    if axes is not None:
        return _Kernel(axes, looked_up=any(v.kind == "lookup" for v in votes))
    reached = [use for use in log.obstacles if use.path == path]
    if not reached:
        return _Kernel(None, "is not used as a kernel by the function")
    first = reached[0]
    where = f"reaches {first.kind} at {first.source}"
    return _Kernel(None, f"{where}, which has no low-rank rule")


def _guess(leaves: Mapping[str, Any], wanted: set[str]) -> dict[str, _Kernel]:
    """Learns the axes from Flax's names and shapes, where they are beyond doubt."""
    return {path: _named(path, leaves[path]) for path in wanted}


def _named(path: str, leaf: Any) -> _Kernel:
    if not _is_floating(leaf):
        return _Kernel(None, "is not a floating array")
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
    return _Kernel(None, _DOUBT)


def named_axes(path: str, leaf: Any) -> tuple[KernelAxes, bool]:
    """Returns the axes of a leaf of two or more, and whether it is a table of rows.

    Where its name says nothing the last two are the input and the output axis.
    """
    known, ndim = _named(path, leaf), len(leaf.shape)
    if known.axes is not None:
        return known.axes, known.looked_up
    return KernelAxes(tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,)), False


_FROZEN = "its values are frozen and cannot be trained whole"
_DOUBT = "has axes whose roles cannot be told from its name and shape"


def _is_conv(module: Sequence[str]) -> bool:
    return bool(module) and re.match(r"conv(_?\d+)?$", module[-1].lower()) is not None


def _target(
    path: str, leaf: Any, config: LoraConfig, kernels: Mapping[str, _Kernel]
) -> Target | Unusable:
    shape = tuple(getattr(leaf, "shape", ()))
    known = kernels[path]
    if config.full and is_quantized(leaf):
        return Unusable(path, shape, f"is quantised ({qtype_of(leaf)}): {_FROZEN}")
    if config.full:
        if _is_floating(leaf):
            return Target(path, shape, leaf.dtype, None, config)
        return Unusable(path, shape, known.reason)
    if known.axes is None:
        return Unusable(path, shape, known.reason)
    fans = known.axes.fans(shape)
    reason = _misfit(config, known.axes, shape)
    if reason:
        return Unusable(path, shape, reason)
    if config.target is None and known.looked_up:
        return Unusable(
            path, shape, "is a table that is looked up; name it to adapt it"
        )
    low = config.rows is None
    if config.target is None and low and config.rank > min(fans):
        reason = f"is {fans[0]} to {fans[1]}, less than the rank {config.rank}"
        return Unusable(path, shape, reason)
    qtype = qtype_of(leaf) if is_quantized(leaf) else None
    return Target(path, shape, leaf.dtype, known.axes, config, qtype=qtype)


def _misfit(config: LoraConfig, axes: KernelAxes, shape: Shape) -> str | None:
    """Returns why a kernel has not the rows or slices that a config names."""
    if config.rows is not None:
        last = max(config.rows)
        if axes.batch or len(axes.in_) != 1:
            return "is no table: `rows` need one input axis and no batch axes"
        if last >= shape[axes.in_[0]]:
            return f"has {shape[axes.in_[0]]} rows, and `rows` names row {last}"
    if config.slices is not None:
        _, outputs = axes.fans(shape)
        if config.slices[-1][1] > outputs:
            return f"has {outputs} outputs, and `slices` end at {config.slices[-1][1]}"
    return None


# --- checks ---


def _check(
    configs: Sequence[LoraConfig],
    matches: Sequence[set[str]],
    targets: Sequence[Target],
    unusable: Sequence[Unusable],
    paths: Sequence[str],
) -> None:
    """Raises one error that lists everything that does not fit."""
    problems = [
        problem
        for config, matched in zip(configs, matches, strict=True)
        for problem in _config_problems(config, matched, targets, unusable, paths)
    ]
    problems += [p for target in targets if (p := _rank_problem(target))]
    frozen = [u for u in unusable if u.reason.endswith(_FROZEN)]
    problems += [
        f"`LoraConfig(full=True)` matches {u.path!r}, which {u.reason}. Leave it out "
        "with `exclude`, or adapt it"
        for u in frozen
    ]
    doubtful = [u.path for u in unusable if u.reason == _DOUBT]
    if doubtful:
        problems.append(
            f"the axes of {doubtful} cannot be told from their names and shapes; pass "
            "the example arguments of the function too, as arrays or "
            "`jax.ShapeDtypeStruct`s"
        )
    if problems:
        raise TargetError("\n".join(problems))


def _config_problems(
    config: LoraConfig,
    matched: set[str],
    targets: Sequence[Target],
    unusable: Sequence[Unusable],
    paths: Sequence[str],
) -> list[str]:
    usable = {t.path for t in targets}
    reasons = {u.path: u for u in unusable}
    problems = []
    for pattern in _several(config.target):
        hits = matching(pattern, paths)
        if not hits:
            problems.append(_dead("target", pattern, paths))
        elif not usable & set(hits):
            told = [_why(path, reasons.get(path)) for path in hits[:5]]
            more = f" and {len(hits) - 5} more" if len(hits) > 5 else ""
            problems.append(
                f"`LoraConfig.target` {pattern!r} matches no usable kernel of the "
                f"{len(paths)} leaves: {'; '.join(told)}{more}. A leaf that is no "
                "kernel can be trained whole with `full=True`"
            )
    for pattern in _several(config.exclude):
        if not matching(pattern, paths):
            problems.append(_dead("exclude", pattern, paths))
    if not problems and not any(t.config is config for t in targets):
        problems.append(_nothing(config, matched, usable))
    return problems


def _dead(field: str, pattern: str, paths: Sequence[str]) -> str:
    near = ", ".join(map(repr, nearest(pattern, paths)))
    return (
        f"`LoraConfig.{field}` {pattern!r} matches none of the {len(paths)} leaves of "
        f"params. Nearest: {near}. A pattern must match a run of whole path segments"
    )


def _why(path: str, found: Unusable | None) -> str:
    if found is None:
        return f"{path!r} is excluded"
    return f"{path!r} {found.shape} {found.reason}"


def _nothing(config: LoraConfig, matched: set[str], usable: set[str]) -> str:
    if matched & usable:
        return (
            f"{config} decides for no leaf: an earlier config takes each of "
            f"{sorted(matched & usable)[:5]}. Of the configs that match, the first "
            "that can use a leaf decides; put the narrower one first"
        )
    return f"{config} matches no kernel that the function uses in a product"


def _rank_problem(target: Target) -> str | None:
    if target.axes is None or not target.is_low_rank:
        return None
    fan_in, fan_out = target.axes.fans(target.shape)
    if target.config.slices is not None:
        fan_out = min(stop - first for first, stop in target.config.slices)
    if target.config.rank <= min(fan_in, fan_out):
        return None
    return (
        f"`LoraConfig.rank` {target.config.rank} is larger than {target.path!r} "
        f"{target.shape} allows: it maps {fan_in} to {fan_out}. Give it a config with "
        f"a rank of at most {min(fan_in, fan_out)}, or train it whole with `full=True`"
    )


def with_uses(
    targets: Sequence[Target],
    traced: Traced,
    materialize: str,
    contraction: Contraction,
) -> list[Target]:
    """Adds to each target where the program uses it."""
    axes = {t.path: t.axes for t in targets if t.axes is not None}
    _, log = program_of(traced, axes, materialize, contraction)
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
) -> tuple[Any, Log]:
    """Returns the program to evaluate, and the uses of the kernels in it.

    Raises:
        MaterializationError: if a kernel reaches an operation without a low-rank rule
            and `materialize` is "error".
    """
    views: list[View | None] = [None] * len(traced.inputs)
    shapes = {}
    for path in axes:
        place = traced.positions[path]
        shapes[path] = tuple(traced.inputs[place].shape)
        views[place] = View.whole(path, shapes[path])
    program, log = decide(traced.jaxpr, views, axes, contraction)
    if log.obstacles and materialize == "error":
        raise MaterializationError(_obstacles(log.obstacles, shapes))
    return program, log


def _obstacles(uses: Sequence[Use], shapes: Mapping[str, tuple[int, ...]]) -> str:
    lines = [
        f"adapted kernel {use.path!r} {shapes[use.path]} reaches {use.kind} at "
        f"{use.source}, which has no low-rank rule"
        for use in dict.fromkeys(uses)
    ]
    return (
        "\n".join(lines) + "\nLeave these paths out of `LoraConfig.target`, or pass "
        '`materialize="allow"` to `jlora.lora` to form W + s·a·b there and only there'
    )
