"""Writes the source of a program, line by line, with the shape of each value known."""

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Sizes of kernels, of the axes of activations that no kernel has, and the rank. No
# product of the first is divisible by one of the others, so that a value of a kernel's
# size that is no kernel can be told from all others.
SIZES, TOKENS = (4, 5, 7, 8, 10), (11, 13)
ON_MESHES = (4, 8, 10), (22, 26)
RANK = 3
NAME = re.compile(r"[A-Za-z_]\w*")


class Unfit(Exception):
    """A step can't be applied to the values that there are."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of params; `shape` and `dtype` are what the program is given."""

    shape: tuple[int, ...]
    dtype: str
    adapted: bool


@dataclasses.dataclass(frozen=True)
class Input:
    """An input: normal floats, or whole numbers in `[low, high)`."""

    shape: tuple[int, ...]
    low: int = 0
    high: int | None = None


@dataclasses.dataclass(frozen=True)
class Written:
    """The source of `fn(p, *inputs)`, and what it takes."""

    source: str
    leaves: dict[str, Leaf]
    inputs: dict[str, Input]
    whole: frozenset[int]
    reverse: bool
    done: tuple[str, ...]

    def function(self, low: Any, eight: Any) -> Callable[..., Any]:
        """The function, with these as its narrow floats."""
        names = namespace(low, eight)
        exec(self.source, names)
        return names["fn"]


def namespace(low: Any, eight: Any) -> dict[str, Any]:
    """The names that a program may use; LOW and F8 are its narrow floats."""
    return {"jax": jax, "jnp": jnp, "np": np, "lax": lax, "LOW": low, "F8": eight}


@dataclasses.dataclass
class Scope:
    """A function that is being written: its values, its lines, its parameters.

    Attributes:
        values: shapes and dtypes of the values that can be seen, outer ones included.
        defs: the text of the functions that can be seen.
        kernels: names of values that are linear in kernels and have not been used.
        acts: names of activations.
        size: the size of the axis that fresh inputs lose on their way in, if any.
        params: of each fresh input that became a parameter: its name in here, the one
            outside, and the axis that is mapped or scanned.
    """

    values: dict[str, jax.ShapeDtypeStruct]
    defs: dict[str, str]
    kernels: list[str]
    acts: list[str]
    lines: list[str] = dataclasses.field(default_factory=list)
    params: list[tuple[str, str, int | None]] = dataclasses.field(default_factory=list)
    size: int | None = None
    leading: bool = True


class Builder:
    """A program in the making: what steps are given to write with."""

    def __init__(self, rng: random.Random, *, mesh: bool = False, eight: bool = False):
        self.rng = rng
        # Products of eight bits take fresh inputs alone, which can be given without
        # rounding them; results would be rounded to an error of percents.
        self.eight = eight
        self.sizes, self.tokens = ON_MESHES if mesh else (SIZES, TOKENS)
        self.leaves: dict[str, Leaf] = {}
        self.inputs: dict[str, Input] = {}
        self.scopes = [Scope({}, {}, [], [])]
        self.count = 0
        self.reverse = True
        self.whole: set[int] = set()
        self.names = namespace(jnp.bfloat16, jnp.float8_e4m3fn)

    # values

    @property
    def scope(self) -> Scope:
        return self.scopes[-1]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.scope.values[name].shape

    def dtype(self, name: str) -> str:
        return self.scope.values[name].dtype.name

    def fresh(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def struct(self, expression: str) -> Any:
        """The shape and dtype of an expression; `Unfit` if JAX refuses it."""
        used, defs = self._used(expression)
        body = "\n".join("    " + line for line in "\n".join(defs).splitlines())
        source = f"def probe({', '.join(used)}):\n{body}\n    return {expression}\n"
        names = dict(self.names)
        try:
            exec(source, names)
            structs = [self.scope.values[name] for name in used]
            return jax.eval_shape(names["probe"], *structs)
        except (TypeError, ValueError, IndexError, AssertionError, Warning) as error:
            raise Unfit(f"{expression}: {error}") from error
        except (NotImplementedError, ZeroDivisionError, KeyError) as error:
            raise Unfit(f"{expression}: {error}") from error

    def _used(self, expression: str) -> tuple[list[str], list[str]]:
        """The values and functions that an expression needs, in order."""
        wanted, texts, pending = set(), [], [expression]
        while pending:
            for name in NAME.findall(pending.pop()):
                if name in self.scope.defs and self.scope.defs[name] not in texts:
                    texts.append(self.scope.defs[name])
                    pending.append(self.scope.defs[name])
                elif name in self.scope.values:
                    wanted.add(name)
        order = list(self.scope.defs.values())
        return sorted(wanted), sorted(texts, key=order.index)

    def let(self, letter: str, expression: str) -> str:
        """Writes a line that names an expression, and returns the name."""
        struct = self.struct(expression)
        if not isinstance(struct, jax.ShapeDtypeStruct):
            raise Unfit(f"{expression} is {type(struct).__name__}")
        name = self.fresh(letter)
        self.scope.values[name] = struct
        self.scope.lines.append(f"{name} = {expression}")
        return name

    def kernel(self, expression: str) -> str:
        """Names a value that is linear in kernels and is to be used."""
        name = self.let("k", expression)
        self.scope.kernels.append(name)
        return name

    def act(self, expression: str) -> str:
        """Names an activation."""
        name = self.let("y", expression)
        self.scope.acts.append(name)
        return name

    # what a program takes

    def leaf(self, shape: Sequence[int], *, adapted: bool, dtype: str = "") -> str:
        """Adds a leaf to params and returns the value of it."""
        name = f"{'w' if adapted else 'c'}{len(self.leaves)}"
        self.leaves[name] = Leaf(tuple(shape), dtype or "float32", adapted)
        kind = jnp.dtype(dtype or "float32")
        for scope in self.scopes:
            scope.values[name] = jax.ShapeDtypeStruct(tuple(shape), kind)
        return name

    def input(self, shape: Sequence[int], low: int = 0, high: int | None = None) -> str:
        """Adds an input and returns the name of it in here.

        In the body of a loop or of `vmap` it may be that of one step.
        """
        name = self._input(len(self.scopes) - 1, tuple(shape), low, high)
        if high is None:
            self.scope.acts.append(name)
        return name

    def _input(
        self, depth: int, shape: tuple[int, ...], low: int, high: int | None
    ) -> str:
        if depth == 0:
            name = f"x{len(self.inputs)}"
            self.inputs[name] = Input(shape, low, high)
            kind = jnp.float32 if high is None else jnp.int32
            for scope in self.scopes:
                scope.values[name] = jax.ShapeDtypeStruct(shape, kind)
            return name
        scope, axis, outer_shape = self.scopes[depth], None, shape
        if self.rng.random() < 0.35:
            return self._input(depth - 1, shape, low, high)
        if scope.size is not None:
            axis = 0 if scope.leading else self.rng.randint(0, len(shape))
            outer_shape = (*shape[:axis], scope.size, *shape[axis:])
        outer = self._input(depth - 1, outer_shape, low, high)
        name = self.fresh("z")
        kind = jnp.float32 if high is None else jnp.int32
        for inner in self.scopes[depth:]:
            inner.values[name] = jax.ShapeDtypeStruct(shape, kind)
        scope.params.append((name, outer, axis))
        return name

    # functions inside of the program

    def function(
        self,
        values: dict[str, Any],
        write: Callable[[], str],
        *,
        size: int | None = None,
        leading: bool = True,
    ) -> tuple[str, Scope]:
        """Writes a function and returns its name, and its scope with what it takes.

        Args:
            values: shapes of its own parameters, by name, which come first.
            write: writes the body and returns the name of the result.
            size: the size of the axis that is mapped or scanned.
            leading: whether that is the first axis of each input.
        """
        outer = self.scope
        seen = Scope({**outer.values, **values}, dict(outer.defs), [], [])
        seen.size, seen.leading = size, leading
        self.scopes.append(seen)
        try:
            result = write()
        finally:
            self.scopes.pop()
        name = self.fresh("f")
        params = [*values, *(inner for inner, _, _ in seen.params)]
        lines = [f"def {name}({', '.join(params)}):"]
        for line in [*seen.lines, f"return {result}"]:
            lines += ["    " + part for part in line.splitlines()]
        outer.defs[name] = "\n".join(lines)
        outer.lines.append(outer.defs[name])
        return name, seen

    # chance

    def flip(self, chance: float) -> bool:
        return self.rng.random() < chance

    def shuffled(self, items: Any) -> list[Any]:
        items = list(items)
        self.rng.shuffle(items)
        return items

    def axis(self, name: str, least: int = 1) -> int:
        """An axis of a value, of some size at least."""
        found = [i for i, n in enumerate(self.shape(name)) if n >= least]
        if not found:
            raise Unfit("no axis is long enough")
        return self.rng.choice(found)

    def noted(self, name: str) -> None:
        """Notes that a value holds a whole kernel, so that its size is telling."""
        shape = self.shape(name)
        if sum(n > 1 for n in shape) > 1:
            self.whole.add(int(np.prod(shape)))

    def written(self, done: Sequence[str]) -> Written:
        """The finished program."""
        unpack = [f'{name} = p["{name}"]' for name in self.leaves]
        results = [y for y in self.scope.acts if y.startswith("y")]
        lines = [*unpack, *self.scope.lines, f"return ({', '.join(results)},)"]
        body = "\n".join("    " + part for x in lines for part in x.splitlines())
        source = f"def fn({', '.join(['p', *self.inputs])}):\n{body}\n"
        whole = frozenset(self.whole)
        return Written(
            source, self.leaves, self.inputs, whole, self.reverse, tuple(done)
        )
