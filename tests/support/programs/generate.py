"""Draws the steps of a program from a seed, writes it, and shrinks one that fails."""

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator

from programs import steps_lookup as steps_lookup  # which adds to USE
from programs import steps_scale as steps_scale  # which adds to CARRY
from programs.build import Builder, Unfit, Written
from programs.steps_carry import CARRY
from programs.steps_use import USE
from programs.steps_wrap import WRAP


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: its kind, what its choices are drawn from, and steps of its body."""

    kind: str
    seed: int
    inner: tuple["Step", ...] = ()

    def __str__(self) -> str:
        body = f"({', '.join(map(str, self.inner))})" if self.inner else ""
        return self.kind + body


@dataclasses.dataclass(frozen=True)
class Program:
    """What a seed stands for. The same fields always give the same source.

    Attributes:
        seed: what shapes and numbers are drawn from.
        steps: the steps, in order; those that do not fit are passed over.
        leaf: the dtype of the first kernel.
        mesh: "", "Auto" or "Explicit".
        settings: of `jlora.lora`, as a tuple of pairs.
        mixed: whether the factors of all kernels but the first are bfloat16.
    """

    seed: int
    steps: tuple[Step, ...]
    leaf: str = "float32"
    mesh: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    mixed: bool = False


def draw(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    steps = tuple(_step(rng, 0) for _ in range(rng.choice([1, 2, 2, 3, 3, 4, 5, 6])))
    leaf = rng.choices(["float32", "bfloat16", "float8_e4m3fn"], [16, 3, 1])[0]
    mesh = rng.choices(["", "Auto", "Explicit"], [20, 1, 1])[0]
    settings = []
    if rng.random() < 0.15:
        forms = ["auto", "fused", "merged"]
        settings.append(("contraction", rng.choice(forms)))
    if rng.random() < 0.05:
        settings.append(("backward", "autodiff"))
    mixed = rng.random() < 0.08
    return Program(seed, steps, leaf, mesh, tuple(settings), mixed)


def _step(rng: random.Random, depth: int) -> Step:
    kinds = [(0.62, CARRY), (0.16, USE), (0.22 / (1 + depth), WRAP)]
    table = rng.choices([t for _, t in kinds], [w for w, _ in kinds])[0]
    kind = rng.choices(list(table), [weight for weight, _ in table.values()])[0]
    inner: tuple[Step, ...] = ()
    if table is WRAP:
        inner = tuple(_step(rng, depth + 1) for _ in range(rng.randint(0, 2)))
    return Step(kind, rng.randrange(1 << 30), inner)


def write(program: Program) -> Written:
    """The source of a program."""
    rng = random.Random(program.seed)
    eight = program.leaf == "float8_e4m3fn"
    b = Builder(rng, mesh=bool(program.mesh), eight=eight)
    shape = rng.sample(b.sizes, min(rng.choice([2, 2, 2, 2, 3, 3, 3, 4]), len(b.sizes)))
    ndim = len(shape)
    if rng.random() < 0.02:
        shape[rng.randrange(ndim)] = 0
    if rng.random() < 0.03:
        shape[rng.randrange(ndim)] = rng.choice([1, 2])
    kernel = b.leaf(shape, adapted=True, dtype=program.leaf)
    b.scope.kernels.append(kernel)
    b.noted(kernel)
    done: list[str] = []
    for step in program.steps:
        _apply(b, step, done)
    _finish(b, rng, done)
    return b.written(done)


def _apply(b: Builder, step: Step, done: list[str]) -> None:
    """Writes a step; one that does not fit leaves the program as it was."""
    before = _state(b)
    outer_rng, b.rng = b.rng, random.Random(step.seed)
    told = list(done)
    try:
        _write(b, step, done)
    except Unfit:
        _restore(b, before)
        done[:] = told
    b.rng = outer_rng


def _state(b: Builder) -> tuple[object, ...]:
    held = (b.leaves, b.inputs, b.scopes, b.whole)
    return (*copy.deepcopy(held), b.count, b.reverse)


def _restore(b: Builder, state: tuple[object, ...]) -> None:
    (b.leaves, b.inputs, scopes, b.whole, b.count, b.reverse) = state  # type: ignore
    # The scope that is written to must stay the one that its caller holds.
    for scope, old in zip(b.scopes, scopes, strict=True):  # type: ignore
        vars(scope).update(vars(old))


def _write(b: Builder, step: Step, done: list[str]) -> None:
    kernels = b.scope.kernels
    if step.kind in CARRY:
        k = _pick(b)
        name = b.kernel(CARRY[step.kind][1](b, k))
        b.noted(name)
        if k in kernels and b.flip(0.93):
            kernels.remove(k)
    elif step.kind in USE:
        k = _pick(b)
        y = b.act(USE[step.kind][1](b, k))
        _after(b, y)
        if b.flip(0.9):
            kernels.remove(k)
    else:
        k = _pick(b)
        inner = lambda name: _body(b, name, step.inner, done)
        y = b.act(WRAP[step.kind][1](b, k, inner))
        _after(b, y)
        if b.flip(0.9):
            kernels.remove(k)
    done.append(step.kind)


def _pick(b: Builder) -> str:
    """A kernel that is not used up, mostly the last; or any leaf again."""
    if b.scope.kernels:
        return b.scope.kernels[-1 if b.flip(0.7) else 0]
    adapted = [name for name, leaf in b.leaves.items() if leaf.adapted]
    k = b.rng.choice(adapted)
    b.scope.kernels.append(k)
    return k


def _after(b: Builder, y: str) -> None:
    """At times an activation function, whose input is no result any more."""
    if b.flip(0.6) or b.dtype(y) == "complex64":
        return
    kind = b.rng.choice(["jnp.tanh", "jnp.sin", "jax.nn.silu", "jax.nn.softplus"])
    b.act(f"{kind}(0.3 * {y})")
    b.scope.acts.remove(y)


def _body(b: Builder, k: str, steps: tuple[Step, ...], done: list[str]) -> str:
    """Writes the body of a function; all that it computes goes into its result."""
    b.scope.kernels = [k]
    for step in steps:
        _apply(b, step, done)
    _finish(b, b.rng, done)
    *others, result = (y for y in b.scope.acts if y.startswith("y"))
    for y in others:
        result = b.let("y", f"{result} + 0.1 * jnp.nansum(jnp.real({y}))")
    return result


def _finish(b: Builder, rng: random.Random, done: list[str]) -> None:
    """Uses what has not been used: by a product, a lookup or a convolution."""
    rest = list(b.scope.kernels)
    for k in rest:
        b.scope.kernels = [k]
        for _ in range(4):
            kind = rng.choices(list(USE), [weight for weight, _ in USE.values()])[0]
            before = len(done)
            _apply(b, Step(kind, rng.randrange(1 << 30)), done)
            if len(done) > before:
                break
        else:
            b.scope.kernels = [k]
            b.act(USE["einsum"][1](b, k))
            done.append("einsum")


def text(program: Program) -> str:
    """The program as Python, with what it takes, for people to read."""
    written = write(program)
    steps = ", ".join(map(str, program.steps))
    lines = [f"# seed {program.seed}, steps: {steps}"]
    if program.mesh or program.settings or program.mixed:
        mixed = ", factors of two dtypes" if program.mixed else ""
        lines.append(
            f"# mesh: {program.mesh or 'none'}, {dict(program.settings)}{mixed}"
        )
    for name, leaf in written.leaves.items():
        frozen = "" if leaf.adapted else ", not adapted"
        lines.append(f"# {name}: {leaf.dtype}{list(leaf.shape)}{frozen}")
    for name, spec in written.inputs.items():
        kind = "floats" if spec.high is None else f"ids in [{spec.low}, {spec.high})"
        lines.append(f"# {name}: {kind}, {list(spec.shape)}")
    return "\n".join([*lines, written.source])


# shrinking


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Drops steps, settings and dtypes for as long as the program still fails."""
    while True:
        for smaller in _smaller(program):
            if fails(smaller):
                program = smaller
                break
        else:
            return program


def _smaller(program: Program) -> Iterator[Program]:
    for steps in _fewer(program.steps):
        yield dataclasses.replace(program, steps=steps)
    if program.settings:
        yield dataclasses.replace(program, settings=())
    if program.mixed:
        yield dataclasses.replace(program, mixed=False)
    if program.mesh:
        yield dataclasses.replace(program, mesh="")
    if program.leaf != "float32":
        yield dataclasses.replace(program, leaf="float32")


def _fewer(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    for i, step in enumerate(steps):
        yield steps[:i] + steps[i + 1 :]
        for inner in _fewer(step.inner):
            smaller = dataclasses.replace(step, inner=inner)
            yield (*steps[:i], smaller, *steps[i + 1 :])
