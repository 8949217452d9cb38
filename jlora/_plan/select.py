"""From configs to targets: match, discover, choose, check."""

from collections.abc import Sequence

from .._adapter.config import LoraConfig
from .._params.paths import FlatParams, is_floating
from .._program.trace import Traced
from .choose import choose, with_biases
from .kernels import discovered, named
from .match import in_collections, match
from .problems import check
from .target import Target, Unusable


def select(
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
    matches = [match(config, params) for config in configs]
    leaves, wanted = params.by_path(), set().union(*matches)
    kernels = discovered(traced, leaves, wanted) if traced else named(leaves, wanted)
    targets, unusable = choose(params, configs, matches, kernels)
    unusable += in_collections(params, configs, wanted)
    order = {path: i for i, path in enumerate(params.paths)}
    place = lambda one: order[one.path]
    unusable.sort(key=place)
    check(configs, matches, targets, unusable, params.paths)
    targets = sorted(with_biases(targets, configs, params), key=place)
    trained = {target.path for target in targets}
    return targets, [one for one in unusable if one.path not in trained]


def left_frozen(
    params: FlatParams,
    targets: Sequence[Target],
    unusable: Sequence[Unusable],
    traced: Traced | None,
) -> list[str]:
    """Returns the paths of kernels that no config adapts, and any could.

    Args:
        params: the flattened params.
        targets: what is trained.
        unusable: leaves that are told of already.
        traced: the traced program, or None to rely on names and shapes alone.
    """
    leaves = params.by_path()
    told = {one.path for one in (*targets, *unusable)}
    others = {
        path
        for path, leaf in leaves.items()
        if path not in told
        and params.collection(path) is None
        and is_floating(leaf)
        and len(leaf.shape) > 1
    }
    kernels = discovered(traced, leaves, others) if traced else named(leaves, others)
    return [path for path in params.paths if path in others and kernels[path].axes]


def dropout_rates(
    params: FlatParams, configs: Sequence[LoraConfig], traced: Traced
) -> dict[str, float]:
    """Returns the dropout of each target, and of leaves that are matched in vain.

    The targets are only looked for where configs that match one leaf do not agree: the
    first that can use it decides.
    """
    rates: dict[str, set[float]] = {}
    for config in configs:
        for path in match(config, params):
            rates.setdefault(path, set()).add(config.dropout)
    if all(len(of_path) == 1 for of_path in rates.values()):
        return {path: rate for path, (rate,) in rates.items()}
    targets, _ = select(params, configs, traced)
    return {target.path: target.config.dropout for target in targets}
