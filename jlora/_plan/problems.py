"""What does not fit between configs and leaves, told in one error."""

import re
from collections.abc import Callable, Mapping, Sequence

from .._adapter.config import LoraConfig
from .._errors import TargetError
from .._params.alternatives import failing
from .._params.given import some
from .._params.paths import matching, nearest
from .target import Target, Unusable

FROZEN = "its values are frozen and cannot be trained whole"
EMPTY = "is empty"
NO_BATCH = ", and so it cannot have factors of its own there"
DOUBT = "has axes whose roles cannot be told from its name and shape"


def several(patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the patterns of a field of a config."""
    if patterns is None:
        return ()
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def check(
    configs: Sequence[LoraConfig],
    matches: Sequence[set[str]],
    targets: Sequence[Target],
    unusable: Sequence[Unusable],
    paths: Sequence[str],
) -> None:
    """Raises one error that lists everything that does not fit.

    Args:
        configs: the configs.
        matches: the paths that each matches.
        targets: the leaves that will be trained.
        unusable: the leaves that were matched in vain.
        paths: all paths of the params.

    Raises:
        TargetError: if there is any problem.
    """
    problems = [
        problem
        for config, matched in zip(configs, matches, strict=True)
        for problem in _config_problems(config, matched, targets, unusable, paths)
    ]
    frozen = [u for u in unusable if u.reason.endswith(FROZEN)]
    problems += [
        f"`LoraConfig(full=True)` matches {u.path!r}, which {u.reason}. Leave it out "
        "with `exclude`, or adapt it"
        for u in frozen
    ]
    problems += [
        f"{u.path!r} {u.shape} {u.reason}. Give `LoraConfig(batch=...)` for the "
        "kernels alone that have such an axis besides"
        for u in unusable
        if u.reason.endswith(NO_BATCH)
    ]
    doubtful = [u.path for u in unusable if u.reason == DOUBT]
    if doubtful:
        problems.append(
            f"the axes of {doubtful} cannot be told from their names and shapes; pass "
            "the example arguments of the function too, as arrays or "
            "`jax.ShapeDtypeStruct`s"
        )
    if problems:
        raise TargetError("\n".join(problems))


def left_out(unusable: Sequence[Unusable]) -> str | None:
    """Returns what to warn of: leaves that may be kernels, and are matched in vain."""
    told = [_why(u.path, u) for u in unusable if u.is_doubtful]
    if not told:
        return None
    return (
        "`LoraConfig.target` matches what may be wanted and is left out:\n"
        + "\n".join(told)
        + "\nLeave them out with `exclude`, or train kernels whole with `full=True`"
    )


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
    for pattern in several(config.target):
        finds = lambda one: bool(usable & set(matching(one, paths)))
        for one, said in _failing("target", pattern, finds):
            hits = matching(one, paths)
            if _told_apart(hits, reasons):
                continue
            problems.append(
                _useless(said, hits, reasons, len(paths))
                if hits
                else _dead(said, one, paths)
            )
    for pattern in several(config.exclude):
        finds = lambda one: bool(matching(one, paths))
        for one, said in _failing("exclude", pattern, finds):
            problems.append(_dead(said, one, paths))
    apart = any(_told_apart([path], reasons) for path in matched)
    if not (problems or apart or any(t.config is config for t in targets)):
        problems.append(_nothing(config, matched, usable, reasons))
    return problems


def _told_apart(hits: Sequence[str], reasons: Mapping[str, Unusable]) -> bool:
    """Whether all that a pattern matches is told by lines of its own."""
    return bool(hits) and all(
        hit in reasons and reasons[hit].reason.endswith(NO_BATCH) for hit in hits
    )


def _failing(
    field: str, pattern: str, finds: Callable[[str], bool]
) -> list[tuple[str, str]]:
    """Returns the pattern, or those of its alternatives, that find nothing.

    Each as a pattern of its own, and as it is called in an error.
    """
    said = f"`LoraConfig.{field}` {pattern!r}"
    if not finds(pattern):
        return [(pattern, said)]
    failed = failing(pattern, finds)
    return [(one.alone, f"The alternative {one.text!r} of {said}") for one in failed]


def _useless(
    said: str, hits: Sequence[str], reasons: Mapping[str, Unusable], total: int
) -> str:
    told = [_why(path, reasons.get(path)) for path in hits]
    stacks = any("`layers` names" in why for why in told)
    whole = ". A leaf that is no kernel can be trained whole with `full=True`"
    return (
        f"{said} matches no usable kernel of the {total} leaves: "
        f"{some(told, between='; ')}{'' if stacks else whole}"
    )


def _dead(said: str, pattern: str, paths: Sequence[str]) -> str:
    near = ", ".join(map(repr, nearest(pattern, paths)))
    told = f"{said} matches none of the {len(paths)} leaves of params. "
    if meant := _meant(pattern, paths):
        return told + meant
    return f"{told}Nearest: {near}. A pattern must match a run of whole path segments"


def _meant(pattern: str, paths: Sequence[str]) -> str:
    """Returns how to write what is a path rather than a pattern; empty if it is none.

    A path may have letters that mean something in a regex, or may be written as JAX
    does, `['a']['b'][0]`, or with a slash before it or behind it.
    """
    if matching(re.escape(pattern), paths):
        return (
            "It is a path with letters that mean something in a pattern: write "
            f"r'{re.escape(pattern)}', as `re.escape` does"
        )
    for place, segment in enumerate(segments := pattern.split("/")):
        rest = "/".join([*segments[:place], *segments[place + 1 :]])
        if re.search(r"\d", segment) and rest and _fits(rest, paths):
            return (
                f"Without {segment!r} it matches {matching(rest, paths)[0]!r}: where "
                "layers are an axis of a stack, as under a scan, `LoraConfig(layers="
                "[...])` names them"
            )
    plain = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r"/\1", pattern)
    for path in (plain, plain.replace(".", "/")):
        path = path.strip("/")
        if path != pattern and matching(re.escape(path), paths):
            return f"The segments of a path are joined by slashes: write {path!r}"
    return ""


def _fits(pattern: str, paths: Sequence[str]) -> bool:
    """Whether what is left of a pattern is one, and matches a path."""
    try:
        return bool(matching(pattern, paths))
    except re.error:
        return False


def _why(path: str, found: Unusable | None) -> str:
    if found is None:
        return f"{path!r} is excluded"
    return f"{path!r} {found.shape} {found.reason}"


def _nothing(
    config: LoraConfig,
    matched: set[str],
    usable: set[str],
    reasons: Mapping[str, Unusable],
) -> str:
    if matched & usable:
        return (
            f"{config} decides for no leaf: an earlier config takes each of "
            f"{sorted(matched & usable)[:5]}. Of the configs that match, the first "
            "that can use a leaf decides; put the narrower one first"
        )
    said = "" if config.target is None else f" with target {config.target!r}"
    told = [_why(path, reasons[path]) for path in sorted(matched & reasons.keys())]
    return (
        f"`LoraConfig`{said} matches no kernel that the function uses in a product"
        f"{': ' if told else ''}{some(told, between='; ')}"
    )
