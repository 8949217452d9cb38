"""Runs a program adapted and merged, and says how the two differ.

The merge is written here: `W + s·a·b` in float64, from the axes that an entry states.
The gradients of the factors come from the kernel's by the chain rule, in float64 too.
"""

import contextlib
import dataclasses
import math
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxpr_checks import base_indices, formed_by_size

import jlora
from programs.build import RANK, TOKENS, Unfit, Written
from programs.compare import apart, delta, difference, factor_gradients, largest
from programs.evaluate import closed
from programs.generate import Program, write

ALPHA = 4.0
REFUSALS = (jlora.TargetError, jlora.MaterializationError, jlora.AdapterError)
# Relative errors that are allowed, by the narrowest dtype of a program.
TOLERANCE = {"": 3e-4, "bfloat16": 5e-2, "float8_e4m3fn": 0.3}
# As far as a few roundings in float32: what a sum of many values gathers.
SHAKEN = 1e-6


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        kind: "right", "refused", "failed", or "unfit" if JAX itself refuses it.
        told: what the error says, or what differs.
    """

    kind: str
    told: str = ""


@dataclasses.dataclass(frozen=True)
class Data:
    """The numbers of a program, in NumPy."""

    params: dict[str, np.ndarray]
    inputs: tuple[np.ndarray, ...]
    floats: tuple[int, ...]


def check(program: Program) -> Outcome:
    """Writes and runs a program."""
    try:
        written = write(program)
    except Unfit as error:
        return Outcome("unfit", str(error))
    data = numbers(program, written)
    run = Run(program, written, data)
    try:
        run.plain()
    except Exception as error:
        return Outcome("unfit", f"{type(error).__name__}: {error}")
    try:
        return run.compared("error")
    except REFUSALS as error:
        told = f"{type(error).__name__}: {error}"
    try:
        outcome = run.compared("allow")
    except REFUSALS:
        return Outcome("refused", told)
    return Outcome("refused", told) if outcome.kind == "right" else outcome


def numbers(program: Program, written: Written) -> Data:
    """Normal numbers and ids for all that a program takes."""
    rng = np.random.default_rng(program.seed)
    narrow = jnp.float8_e4m3fn if program.leaf == "float8_e4m3fn" else np.float32
    params = {
        name: (0.5 * rng.normal(size=leaf.shape)).astype(jnp.dtype(leaf.dtype))
        for name, leaf in written.leaves.items()
    }
    inputs = []
    for spec in written.inputs.values():
        if spec.high is None:
            x = rng.normal(size=spec.shape).astype(narrow).astype(np.float32)
        else:
            x = rng.integers(spec.low, spec.high, size=spec.shape).astype(np.int32)
        inputs.append(np.asarray(x))
    floats = tuple(i for i, x in enumerate(inputs) if x.dtype == np.float32)
    return Data(params, tuple(inputs), floats)


class Run:
    """A program with its numbers."""

    def __init__(self, program: Program, written: Written, data: Data):
        self.program, self.written, self.data = program, written, data
        self.fn = written.function(jnp.bfloat16, jnp.float8_e4m3fn)
        self.wide = written.function(jnp.float32, jnp.float32)
        kinds = [leaf.dtype for leaf in written.leaves.values()]
        self.narrow = "bfloat16" if "LOW" in written.source or program.mixed else ""
        if narrow := {"bfloat16", "float8_e4m3fn"} & set(kinds):
            self.narrow = max(narrow)
        # XLA is another matter, and takes its time: one in eight, and all on meshes.
        self.compiled = bool(program.mesh) or program.seed % 8 == 0
        self.adapted = [n for n, leaf in written.leaves.items() if leaf.adapted]

    # plain

    def plain(self) -> None:
        """Traces the program merged; raises what JAX raises for the program."""
        with self.mesh():
            params, inputs = self.placed()
            self.shapes = jax.eval_shape(self.fn, params, *inputs)
        rng = np.random.default_rng(0)
        draw = lambda y: rng.uniform(0.5, 1.5, y.shape).astype(np.float32)
        self.weights = jax.tree.map(draw, self.shapes)
        trained, wide, _ = self.arguments()
        self.merged = self.traced(self.wide, trained, wide)
        if self.program.mesh == "Explicit":  # where more than shapes must fit
            with self.mesh():
                graded = self.graded(
                    lambda params, _, *inputs: self.fn(params, *inputs)
                )
                jax.eval_shape(graded, params, None, inputs)

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any], tuple[Any, ...]]:
        """The kernels to merge, all params, and the inputs, in float32."""
        wide = {n: v.astype(np.float32) for n, v in self.data.params.items()}
        return {n: wide[n] for n in self.adapted}, wide, self.data.inputs

    def traced(self, fn: Callable[..., Any], trained: Any, params: Any) -> Any:
        """Traces a function of params with its gradients, those of what is trained."""
        merged = lambda trained, params, *inputs: fn({**params, **trained}, *inputs)
        return jax.jit(self.graded(merged)).trace(trained, params, self.data.inputs)

    def graded(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the gradients of `fn(trained, frozen, *inputs)`, and its outputs.

        The gradients are those of what is trained, and of the inputs that are floats.
        """

        def value_and_grads(trained: Any, frozen: Any, inputs: Any) -> Any:
            if not self.written.reverse:
                return (), fn(trained, frozen, *inputs)

            def loss(trained: Any, floats: Any) -> Any:
                full = list(inputs)
                for i, x in zip(self.data.floats, floats, strict=True):
                    full[i] = x
                out = fn(trained, frozen, *full)
                return self.loss(out), out

            floats = [inputs[i] for i in self.data.floats]
            return jax.grad(loss, (0, 1), has_aux=True)(trained, floats)

        return value_and_grads

    def loss(self, out: Any) -> jax.Array:
        """A weighted sum of all outputs, real and imaginary; NaNs are left out."""
        total = jnp.float32(0)
        for y, c in zip(out, self.weights, strict=True):
            parts = [y.real, y.imag] if jnp.iscomplexobj(y) else [y]
            for part in parts:
                part = part.astype(jnp.float32)
                total += jnp.where(jnp.isnan(part), 0.0, part * c).sum()
        return total

    # meshes

    @contextlib.contextmanager
    def mesh(self) -> Iterator[None]:
        """Within it the mesh of the program is set, if it has one."""
        self.devices = None
        if not self.program.mesh:
            yield
            return
        kind = getattr(AxisType, self.program.mesh)
        self.devices = jax.make_mesh(
            (2, 2), ("data", "model"), (kind, kind), devices=jax.devices()[:4]
        )
        with jax.set_mesh(self.devices):
            yield

    def placed(self) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """Params and inputs as arrays, laid out on the mesh by the program's seed."""
        params = {n: jnp.asarray(v) for n, v in self.data.params.items()}
        inputs = tuple(map(jnp.asarray, self.data.inputs))
        if self.devices is None:
            return params, inputs
        rng = np.random.default_rng(self.program.seed + 1)

        def put(value: jax.Array) -> jax.Array:
            spec: list[str | None] = [None] * value.ndim
            names = [n for n in ("data", "model") if rng.random() < 0.6]
            even = [i for i, n in enumerate(value.shape) if n and n % 2 == 0]
            for name, axis in zip(names, rng.permutation(even), strict=False):
                spec[axis] = name
            return jax.device_put(
                value, NamedSharding(self.devices, PartitionSpec(*spec))
            )

        return {n: put(v) for n, v in params.items()}, tuple(map(put, inputs))

    # adapted

    def compared(self, materialize: str) -> Outcome:
        """Runs it adapted and merged; raises the refusals of jlora."""
        settings = {"materialize": materialize, **dict(self.program.settings)}
        try:
            lora = jlora.lora(self.fn, self.configs(), **settings)
            with self.mesh():
                params, inputs = self.placed()
                if self.program.seed % 4 == 0:
                    str(lora.plan(params, *inputs))
                adapter = self.adapter(lora, params, inputs)
                applied = lambda adapter, params, *x: lora.apply(params, adapter, *x)
                traced = jax.jit(self.graded(applied)).trace(adapter, params, inputs)
                formed = self.formed(traced.jaxpr, adapter, params, materialize)
                if formed and not self.makes_features(lora.plan(params, *inputs)):
                    return Outcome("failed", "formed: " + "; ".join(formed[:4]))
                if self.compiled:
                    compiled = traced.lower().compile()
                    got = jax.block_until_ready(compiled(adapter, params, inputs))
                else:
                    got = evaluated(traced, adapter, params, inputs)
                outcome = self.differences(adapter, got)
                if outcome.kind == "failed" and self.program.mesh == "Auto":
                    # Such a mesh is none of the program's, but XLA gives some values
                    # otherwise on it: halos of images that are added twice, 16-bit
                    # sums that are cut in other places (see findings/).
                    there = evaluated(traced, adapter, params, inputs)
                    if self.differences(adapter, there).kind == "right":
                        return Outcome("unfit", "XLA gives other values on a mesh")
        except REFUSALS:
            raise
        except Exception as error:
            unfit = "UNIMPLEMENTED" in str(error)  # XLA on CPUs lacks some products
            return Outcome("unfit" if unfit else "failed", _untyped(error))
        return outcome

    def configs(self) -> list[jlora.LoraConfig]:
        """One config, or two that differ in the dtype of the factors."""
        make = lambda names, dtype: jlora.LoraConfig(
            names, rank=RANK, alpha=ALPHA, dtype=dtype
        )
        first, *others = self.adapted
        if self.program.mixed and others:
            return [make(first, "float32"), make(others, "bfloat16")]
        return [make(self.adapted, "float32")]

    def adapter(self, lora: jlora.Lora, params: Any, inputs: Any) -> dict[str, Any]:
        """An adapter with random factors."""
        rng = np.random.default_rng(self.program.seed + 2)
        key = jax.random.key(0)
        if self.devices is None:
            like = jax.eval_shape(lora.init, key, params, *inputs)
        else:
            like = lora.init(key, params, *inputs)

        def fill(leaf: Any) -> Any:
            value = (0.5 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
            if self.devices is None:
                return jnp.asarray(value)
            return jax.device_put(value, leaf.sharding)

        return jax.tree.map(fill, like)

    def formed(
        self, jaxpr: Any, adapter: Any, params: Any, materialize: str
    ) -> list[str]:
        """Values of a kernel's size that depend on more than the base."""
        told = dict(self.program.settings).get("contraction", "factored")
        factors = [e for e in adapter.values() if isinstance(e, jlora.LoraFactors)]
        if materialize == "allow" or told != "factored" or self.program.mesh:
            return []
        if any(entry.rank != RANK for entry in factors):
            return []
        whole = {math.prod(entry.kernel_shape) for entry in factors}
        for entry in factors:  # a slice along batch axes is a kernel too
            whole.add(math.prod(entry.axes.fans(entry.kernel_shape)))
        whole |= {n for n in self.written.whole if n >= min(whole)}
        sizes = {n for n in whole if n and all(n % m for m in (RANK, *TOKENS))}
        return formed_by_size(jaxpr, base_indices(adapter, params, base=1), sizes)

    def makes_features(self, plan: jlora.Plan) -> bool:
        """Whether features may have a kernel's size without being one.

        They do where a use gives what the program calls a kernel, such as rows that
        constants look up, and where an einsum multiplies by a frozen vector first: an
        outer product is none of a kernel and the example.
        """
        lines = self.written.source.splitlines()
        uses = [use for target in plan.targets for use in target.uses]
        places = [use.source.rpartition(":") for use in uses]
        # A library's own jit may have no line of the program.
        own = [int(line) for file, _, line in places if file == "<string>"]
        at = {lines[line - 1].strip() for line in own}
        features = r"k\d+ = |y\d+ = jnp\.einsum\(.*\bc\d"
        return len(own) < len(uses) or any(re.match(features, line) for line in at)

    # merged

    def differences(self, adapter: Any, got: Any) -> Outcome:
        """Compares with the merge, in float32 throughout."""
        want = self.by_merge(adapter)
        measured = self.measured(adapter, got)
        # What is rounded to 16 or 8 bits may be off as far as plain JAX is, and more.
        rounded = self.by_merge(adapter, narrow=True) if self.narrow else want
        bad = [
            f"output {i} is {y.shape} {y.dtype}, not {like}"
            for i, (y, like) in enumerate(zip(got[1], self.shapes, strict=True))
            if (y.shape, y.dtype) != (like.shape, like.dtype)
        ]
        off = self.off(measured, want, rounded)
        if off:  # by more than roundings change the program itself?
            off = self.off(measured, want, self.by_merge(adapter, shaken=True))
        bad += off
        return Outcome("failed", "; ".join(bad)) if bad else Outcome("right")

    def off(self, measured: Any, want: Any, other: Any) -> list[str]:
        """What is farther from the merge than four times another merge is."""
        bad = []
        for name, (expected, scale) in want.items():
            near = other[name][0]
            allowed = max(TOLERANCE[self.narrow], 4 * apart(near, expected, scale))
            # Eight bits overflow to NaN.
            expected = np.where(np.isnan(near), np.nan, expected)
            bad += difference(name, measured[name], expected, scale, allowed)
        return bad

    def measured(self, adapter: Any, got: Any) -> dict[str, np.ndarray]:
        """What came out, by name."""
        found = {f"output {i}": y for i, y in enumerate(got[1])}
        if self.written.reverse:
            for name in adapter:
                for side in "ab":
                    found[f"gradient of {side} of {name}"] = getattr(
                        got[0][0][name], side
                    )
            for i, x in zip(self.data.floats, got[0][1], strict=True):
                found[f"gradient of x{i}"] = x
        return {name: np.asarray(value) for name, value in found.items()}

    def by_merge(
        self, adapter: Any, *, narrow: bool = False, shaken: bool = False
    ) -> dict[str, tuple[np.ndarray, float]]:
        """What the merged program gives, and the size of its terms, by name.

        It may be narrow; or shaken, each value of a kernel changed by `SHAKEN` of it,
        and computed by XLA: what a function that is nearly flat then gives is noise.
        """
        merged, params, _ = self.arguments()
        rng = np.random.default_rng(self.program.seed + 3)
        for name, entry in adapter.items():
            total = params[name].astype(np.float64) + delta(entry)
            if shaken:
                total = total * (1 + SHAKEN * rng.choice([-1, 1], total.shape))
            merged[name] = total.astype(np.float32)
        traced = self.merged
        if narrow:
            kind = {n: jnp.dtype(leaf.dtype) for n, leaf in self.written.leaves.items()}
            params = {n: v.astype(kind[n]) for n, v in params.items()}
            merged = {n: v.astype(kind[n]) for n, v in merged.items()}
            traced = self.traced(self.fn, merged, params)
        args = merged, params, self.data.inputs
        if shaken:
            found = jax.block_until_ready(traced.lower().compile()(*args))
            grads, outs = jax.tree.map(np.asarray, found)
        else:
            grads, outs = evaluated(traced, *args)
        found = {f"output {i}": (y, largest(y)) for i, y in enumerate(outs)}
        if self.written.reverse:
            kernels, floats = grads
            for name, entry in adapter.items():
                found |= factor_gradients(name, entry, kernels[name])
            size = 1e-2 * max(map(largest, floats), default=0.0)
            for i, x in zip(self.data.floats, floats, strict=True):
                found[f"gradient of x{i}"] = x, max(largest(x), size)
        return found


def evaluated(traced: Any, *args: Any) -> Any:
    """The outputs of a traced function, by NumPy."""
    outs = closed(traced.jaxpr, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), outs)


def _untyped(error: Exception) -> str:
    """An error that is none of jlora's, and where in jlora it came up."""
    last = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in last if "/jlora/" in frame.filename]
    where = f" at {ours[-1].name}:{ours[-1].lineno}" if ours else ""
    return f"untyped {type(error).__name__}{where}: {str(error)[:300]}"
