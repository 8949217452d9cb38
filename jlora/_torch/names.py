"""Rules from the paths of a params tree to the names of torch's modules."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from .._errors import AdapterError
from .._params.paths import nearest

TRANSFORMS = (
    "conv",
    "embedding",
    "fan_in_fan_out",
    "experts",
    "linear",
    "mha",
    "parameter",
    "rope",
    "same",
    "swapped",
    "tied",
)

_FIELD = re.compile(r"\{(\w+)\}")
_PART = re.compile(r"(.*)\[(\d+)\]")
_WIDTH = re.compile(r"(.*)=(\d+)")
_TRANSFORM = re.compile(r"(\w+)(?:\(([\w.]+)\))?")

# What torch calls the leaves that Flax gives these names; any other is a weight.
_LEAVES = {"bias": "bias", "mean": "running_mean", "var": "running_var"}
# What Flax and the Gemma library call tables that are looked up.
TABLES = ("embedding", "input_embedding")
_WEIGHTS = ("kernel", "scale", *TABLES, "weight")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where some leaves of a params tree live among the modules of a torch model.

    The first rule that matches a leaf decides. A tuple of the fields will do where a
    rule is expected.

    Args:
        path: a regex for the whole path of a leaf without its last segment (`kernel`,
            `bias`, …), or with it.
        module: the torch module, a template. `{name}` stands for the group `name` of
            the regex, with dots for its slashes; a name that is no group counts along a
            batch axis of the leaf, which is how a scanned stack maps onto numbered
            layers (the first such name is the first batch axis). Several templates are
            the modules that a kernel fused in JAX is made of, along its output axes:
            equal parts, or of the width that `module=width` gives. `module[i]` is part
            `i` of a module that is fused in torch alone.
        transform: how the layouts differ, several joined by "+". None: a Flax kernel
            `(in, out)` is a torch weight `(out, in)`.

            - "conv": `(*window, in, out)` is `(out, in, *window)`.
            - "embedding": a table is kept as it is, and its factors are torch's
              `lora_embedding_A` and `_B`. Leaves called `embedding` or
              `input_embedding` have it without being told.
            - "fan_in_fan_out": torch, too, keeps `(in, out)`, as the `Conv1D` of GPT-2.
            - "experts": the template names a parameter, not a module, with an axis of
              experts: PEFT's `target_parameters`. List such rules in the order in which
              torch's module defines its parameters. Of a leaf of three axes or more it
              is the batch axis behind those that the name counts, or the first axis
              there where the program does not tell.
            - "linear": torch has one axis of inputs where the kernel has several, and
              this is no convolution, as in the last product of an attention. Said only
              where nothing else tells: neither a plan, nor a query beside it.
            - "mha": a part of the fused input projection of torch's MultiheadAttention,
              `attn[0]`, `attn[1]`, `attn[2]` for queries, keys and values. PEFT adapts
              `attn.out_proj` along with it.
            - "parameter": the template names a parameter, not a module, that is kept as
              it is.
            - "rope" or "rope(head_dim)": the JAX model rotates features 2i and 2i+1,
              torch's i and i + head_dim/2. The head size is that of the last output
              axis, if there are several.
            - "same": the leaf has torch's own layout, `(out, in, *window)`. Leaves that
              are called `weight` have it in the mechanical map.
            - "swapped", beside "experts+fan_in_fan_out": torch's `(experts, in, out)`
              is a parameter of a module that does not say so, as in Llama 4; PEFT takes
              its inputs for outputs then.
            - "tied(lm_head)": the table is the weight of that module, too, and PEFT
              keeps its factors under both names (`ensure_weight_tying`).

    Example:
        >>> Rule(r"params/block_(?P<i>\\d+)/query", "layers.{i}.q_proj").module
        'layers.{i}.q_proj'
    """

    path: str
    module: str | tuple[str, ...]
    transform: str | None = None

    def __post_init__(self) -> None:
        """Checks the regex, the templates and the transform."""
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f"{self!r}: the path is no regex: {error}") from error
        several = [self.module] if isinstance(self.module, str) else list(self.module)
        if not several or not all(isinstance(m, str) and m for m in several):
            raise TypeError(f"{self!r}: the module is one name or a tuple of them")
        fields = {tuple(_FIELD.findall(m)) for m in several}
        if len(fields) > 1:
            raise ValueError(f"{self!r}: its modules need the same {{fields}}")
        self.steps()

    def steps(self) -> dict[str, str | None]:
        """Returns the transforms by name, with what one is given in parentheses."""
        found: dict[str, str | None] = {}
        for step in (self.transform or "").split("+") if self.transform else []:
            match = _TRANSFORM.fullmatch(step.strip())
            if match is None or match[1] not in TRANSFORMS:
                raise ValueError(
                    f"{self!r}: the transform {step!r} is none of {TRANSFORMS}"
                )
            found[match[1]] = match[2]
        if not (found.get("rope") or "2").isdigit() or found.get("tied", "-") is None:
            raise ValueError(f'{self!r}: write "rope(64)" and "tied(lm_head)"')
        return found


Names: TypeAlias = Sequence[Rule | tuple[Any, ...]] | None


@dataclasses.dataclass(frozen=True)
class Slot:
    """One torch module that a leaf, or a part of it, lives in.

    Attributes:
        template: its name, with a field for each batch axis that it counts.
        part: which part of it, if it is fused in torch alone.
        width: how many outputs of the leaf are its, if the rule says so.
    """

    template: str
    part: int | None = None
    width: int | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the batch axes, in order."""
        return tuple(_FIELD.findall(self.template))

    def module(self, index: Sequence[int]) -> str:
        """Returns the name with the fields filled in."""
        numbers = iter(index)
        return _FIELD.sub(lambda _: str(next(numbers)), self.template)

    def pattern(self) -> re.Pattern[str]:
        """Returns a regex for the name, with a group for each field."""
        pieces = _FIELD.split(self.template)
        number = "(0|[1-9][0-9]*)"  # as torch writes it: 03 is not 3
        texts = [number if i % 2 else re.escape(t) for i, t in enumerate(pieces)]
        return re.compile("".join(texts))


@dataclasses.dataclass(frozen=True)
class Binding:
    """What the rules say of one leaf.

    Attributes:
        path: the leaf.
        slots: the modules that it is made of; one unless it is fused in JAX.
        leaf: what torch calls it within its module: "weight", "bias", …
        steps: the transforms, see `Rule.transform`.
        order: the number of the rule.
    """

    path: str
    slots: tuple[Slot, ...]
    leaf: str
    steps: dict[str, str | None]
    order: int

    @property
    def n_fields(self) -> int:
        """How many batch axes the names of the modules count."""
        return len(self.slots[0].fields)

    def widths(self, fan_out: int) -> list[int]:
        """Returns how many of the leaf's outputs each slot has.

        Raises:
            AdapterError: if they do not add up, or equal parts are not whole.
        """
        count = len(self.slots)
        given = [slot.width for slot in self.slots]
        widths = [fan_out // count if w is None else w for w in given]
        if sum(widths) != fan_out:
            raise AdapterError(
                f"{self.path!r} has {fan_out} outputs, and its {count} modules "
                f"{widths}; give the widths in the rule, as in 'q_proj=64'"
            )
        return widths

    def window(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the window of a convolution, of the sizes of the leaf's inputs."""
        if "same" in self.steps and "experts" not in self.steps:
            return inputs[1:]
        return inputs[:-1] if "conv" in self.steps else ()

    def parameter(self, module: str) -> str:
        """Returns torch's name of the leaf, given that of its module."""
        if {"experts", "parameter"} & set(self.steps):
            return module
        return f"{module}.{'in_proj_' if 'mha' in self.steps else ''}{self.leaf}"


def bind(paths: Iterable[str], names: Names) -> dict[str, Binding]:
    """Returns what the rules say of each path; without a word for some of them.

    Args:
        paths: the leaves.
        names: the rules, or None for the mechanical map: without a leading `params/`
            and the last segment, joined by dots.

    Raises:
        TypeError: if `names` holds anything but rules.

    Example:
        >>> bind(["params/layers/0/q_proj/kernel"], None).popitem()[1].slots[0].template
        'layers.0.q_proj'
    """
    if names is None:
        return {path: _mechanical(path) for path in paths}
    if isinstance(names, str):
        raise TypeError(
            f"`names` takes rules, got {names!r}; those of a family of models are "
            f"`jlora.peft.names({names!r})`"
        )
    rules = [rule_of(rule) for rule in names]
    compiled = [(rule, re.compile(rule.path)) for rule in rules]
    found = ((path, _bound(path, compiled)) for path in paths)
    return {path: binding for path, binding in found if binding is not None}


def bind_all(paths: Sequence[str], names: Names) -> dict[str, Binding]:
    """Returns what the rules say of each path, every one of which needs a rule.

    Raises:
        AdapterError: with every path that no rule matches.
    """
    found = bind(paths, names)
    missing = [path for path in paths if path not in found]
    if missing:
        patterns = [rule_of(rule).path for rule in names or ()]
        near = nearest(missing[0], patterns)
        raise AdapterError(
            f"no rule of `names` matches {missing[:10]} ({len(missing)} in all); the "
            f"nearest to the first: {near}. Add a rule (path regex, module template)"
        )
    return found


def rule_of(rule: Any) -> Rule:
    """Returns a rule, which may be a tuple of its fields.

    Raises:
        TypeError: if it is none.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, tuple | list) and 2 <= len(rule) <= 3:
        path, module, *rest = rule
        return Rule(path, module if isinstance(module, str) else tuple(module), *rest)
    raise TypeError(
        "`names` takes rules (path regex, module template[, transform]) or None, got "
        f"{rule!r}"
    )


def _mechanical(path: str) -> Binding:
    segments = path.removeprefix("params/").split("/")
    last = segments[-1]
    named = len(segments) > 1 and (last in _LEAVES or last in _WEIGHTS)
    module = ".".join(segments[:-1] if named else segments)
    steps: dict[str, str | None] = {"embedding": None} if last in TABLES else {}
    if named and last == "weight":  # torch's own name
        steps = {"same": None}
    return Binding(path, (Slot(module),), _LEAVES.get(last, "weight"), steps, 0)


def _bound(path: str, rules: Sequence[tuple[Rule, re.Pattern[str]]]) -> Binding | None:
    module, _, last = path.rpartition("/")
    for order, (rule, pattern) in enumerate(rules):
        steps = rule.steps()
        # A template for a module is for the path of a module first; one for a parameter
        # for that of the leaf.
        own = [path] if {"experts", "parameter"} & set(steps) else [module, path]
        tried = [pattern.fullmatch(text) for text in [*own, module] if text]
        found = next((match for match in tried if match), None)
        if found:
            if last in TABLES:
                steps.setdefault("embedding", None)
            slots = tuple(_slot(name, found) for name in _several(rule.module))
            return Binding(path, slots, _LEAVES.get(last, "weight"), steps, order)
    return None


def _several(module: str | tuple[str, ...]) -> tuple[str, ...]:
    return (module,) if isinstance(module, str) else module


def _slot(template: str, found: re.Match[str]) -> Slot:
    groups = found.groupdict()
    dotted = lambda name: (groups.get(name) or "").replace("/", ".")
    filled = _FIELD.sub(lambda m: dotted(m[1]) or m[0], template)
    if part := _PART.fullmatch(filled):
        return Slot(part[1], part=int(part[2]))
    if width := _WIDTH.fullmatch(filled):
        return Slot(width[1], width=int(width[2]))
    return Slot(filled)
