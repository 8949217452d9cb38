"""Which of the configs that match a leaf decides what is trained of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from .._adapter.config import LoraConfig
from .._adapter.variants import variant_of_config
from .._params.axes import with_batch
from .._params.paths import FlatParams, is_empty, is_floating, is_quantized
from .._params.quantized import qtype_of
from .conflicts import no_batch
from .kernels import Kernel
from .match import hit
from .problems import FROZEN, NO_BATCH
from .target import Target, Unusable


def with_biases(
    targets: Sequence[Target], configs: Sequence[LoraConfig], params: FlatParams
) -> list[Target]:
    """Adds the biases that configs train beside their kernels, as `bias` says."""
    found: dict[str, Target] = {}
    leaves = params.by_path()
    taken = {target.path for target in targets}
    for config in configs:
        if config.bias == "none":
            continue
        own = {t.path.rpartition("/")[0] for t in targets if t.config is config}
        left_out = taken | hit(config.exclude, list(leaves))
        for path, leaf in leaves.items():
            module, _, name = path.rpartition("/")
            every = config.bias == "all" and params.collection(path) is None
            wanted = every or module in own
            wanted = wanted and name == "bias" and path not in left_out
            if wanted and is_floating(leaf) and not is_empty(leaf):
                shape = tuple(leaf.shape)
                found.setdefault(path, Target(path, shape, leaf.dtype, None, config))
    return [*targets, *found.values()]


def choose(
    params: FlatParams,
    configs: Sequence[LoraConfig],
    matches: Sequence[set[str]],
    kernels: Mapping[str, Kernel],
) -> tuple[list[Target], list[Unusable]]:
    """Returns the targets, and the leaves that were matched in vain, each with why.

    The first config that can use the leaf decides: a bias beside an adapted kernel is
    left for a later config that trains it whole.

    Args:
        params: the flattened params.
        configs: the configs.
        matches: the paths that each of them matches.
        kernels: what is known of the leaves at these paths.
    """
    leaves, targets, unusable = params.by_path(), [], []
    for path in params.paths:
        own = [c for c, paths in zip(configs, matches, strict=True) if path in paths]
        tried = [_target(path, leaves[path], config, kernels) for config in own]
        usable = [one for one in tried if isinstance(one, Target)]
        refused = [one for one in tried if isinstance(one, Unusable)]
        targets += usable[:1]
        if not usable:
            # The reason of the first config, unless another has one to warn of.
            unusable += sorted(refused, key=lambda one: not one.is_doubtful)[:1]
    return targets, unusable


def _target(
    path: str, leaf: Any, config: LoraConfig, kernels: Mapping[str, Kernel]
) -> Target | Unusable:
    shape = tuple(getattr(leaf, "shape", ()))
    known, variant = kernels[path], variant_of_config(config)
    if not variant.has_roles and is_quantized(leaf):
        return Unusable(path, shape, f"is quantised ({qtype_of(leaf)}): {FROZEN}")
    if not variant.has_roles:
        if is_floating(leaf) and not is_empty(leaf):
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
