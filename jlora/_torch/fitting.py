"""Which rules of names place the modules of a file among the params."""

from collections.abc import Iterable, Sequence
from typing import Any

from .._errors import AdapterError
from .families import FAMILIES, names
from .named_params import Base
from .names import Names


def hint_of_names(modules: Iterable[str], params_or_plan: Any, rules: Names) -> str:
    """Returns what rules to give where those that are given place less than others do.

    Empty if no others do, and these place anything.

    Args:
        modules: torch's names of modules, as a file has them.
        params_or_plan: the params, or a plan of them.
        rules: the rules that were given, or None.
    """
    wanted = list(modules)[:200]
    own = _placed(wanted, params_or_plan, rules)
    placed = {f: _placed(wanted, params_or_plan, names(f)) for f in FAMILIES}
    family = max(placed, key=lambda name: placed[name])  # the first of the best
    best = placed[family]
    if best > own:
        return (
            f'With `names=jlora.peft.names("{family}")` {best} of {len(wanted)} '
            f"modules have a place in the params, instead of {own}"
        )
    if own or not wanted:
        return ""
    return (
        "None of the modules has a place in the params: give `names`, rules between "
        "paths and torch's modules; those of well-known models are "
        '`jlora.peft.names("llama")`, and of '
        + ", ".join(f'"{name}"' for name in FAMILIES if name != "llama")
    )


def _placed(modules: Sequence[str], params_or_plan: Any, rules: Names) -> int:
    """Returns how many modules have a place under some rules."""
    try:
        base = Base.of(params_or_plan, rules)
    except (AdapterError, TypeError, ValueError):
        return 0
    forms = lambda name: (name, f"{name}.weight", f"{name}.in_proj_weight")
    return sum(any(map(base.homes, forms(module))) for module in modules)
