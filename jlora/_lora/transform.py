"""`Lora`: an apply function with factors beside its frozen params."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from .._adapter.check import as_varying, check_adapter
from .._adapter.config import LoraConfig
from .._adapter.entries import axes_of
from .._adapter.factors import Adapter
from .._adapter.instead import check_unboxed
from .._adapter.variants import variant_of_entry
from .._errors import LeftOutWarning
from .._jax.keys import key_of
from .._params.axes import KernelAxes
from .._params.given import check_key
from .._params.input_stats import InputStats
from .._params.paths import FlatParams, PyTree
from .._params.quantized import Quantized
from .._plan.new_entry import new_entry
from .._plan.plan import Plan
from .._plan.problems import left_out
from .._plan.program import program_of, scale_of
from .._plan.select import dropout_rates
from .._plan.shared import shared_kernels
from .._product.choice import Contraction
from .._program.inputs import input_stats
from .._program.trace import Traced, trace
from .._rules.view import Log
from .adapt import Given, adapted, evaluated, frozen, lazily
from .arguments import FORGOTTEN_KEY
from .call import Call
from .mixed import run_mixed
from .shards import InputShards, input_cuts
from .state_dicts import register_if_imported

Materialize = Literal["error", "allow"]


Backward = Literal["custom", "autodiff"]


@dataclasses.dataclass(frozen=True)
class Lora:
    """An apply function with low-rank factors beside its frozen params.

    Made by `jlora.lora`. It holds no arrays: `plan`, `init` and `apply` are pure
    functions.

    Attributes:
        fn: the apply function.
        configs: the configs; of those that match, the first that can use it decides.
        argnum: which argument of `fn` is the params tree.
        materialize: what to do where a kernel reaches an operation without a rule.
        backward: who derives the backward pass of the low-rank product.
        contraction: in which order `x`, `W`, `a` and `b` are multiplied.
    """

    fn: Callable[..., Any]
    configs: tuple[LoraConfig, ...]
    argnum: int = 0
    materialize: Materialize = "error"
    backward: Backward = "custom"
    contraction: Contraction = "fast"

    def plan(self, /, *args: Any, **kwargs: Any) -> Plan:
        """Returns what will be trained, from an abstract trace.

        Args:
            *args: the arguments of `fn`, params among them; `jax.ShapeDtypeStruct`s
                will do, and no array is allocated. The params alone are enough when the
                roles of all axes are beyond doubt: two-axis dense kernels, embedding
                tables and convolution kernels under Flax's names.
            **kwargs: the keyword arguments of `fn`.

        Raises:
            TargetError: if the config does not fit the params.
            MaterializationError: if a kernel reaches an operation without a low-rank
                rule.
        """
        call = self._call(args, kwargs)
        params = FlatParams.of(call.params)
        return call.plan(params, self.materialize, self.contraction, frozen=True)

    def init(self, key: jax.Array, /, *args: Any, **kwargs: Any) -> Adapter:
        """Returns a new adapter from the configs' initialisers, such that ΔW = 0.

        Args:
            key: a PRNG key, typed or legacy. Each target folds a hash of its path in,
                so that adding a target changes no other.
            *args: the arguments of `fn`, as for `plan`.
            **kwargs: the keyword arguments of `fn`.

        Returns:
            A dict from path to `LoraFactors`, or to an array for a leaf that is trained
            whole. On an Explicit mesh that is set, factors are sharded like their
            kernels; on an Auto mesh, under `jax.jit` with the `out_shardings` that
            `jlora.shardings` gives, each is made where it lives.

        Raises:
            TargetError: if the config does not fit the params.
            MaterializationError: if a kernel reaches an operation without a low-rank
                rule.

        Warns:
            LeftOutWarning: if patterns match leaves that look like kernels and go into
                operations that have no low-rank rule, and into no other; or leaves of a
                collection beside "params" that none of Flax's layers keeps.
        """
        check_key(key, "key", FORGOTTEN_KEY)
        register_if_imported()
        call = self._call(args, kwargs)
        params = FlatParams.of(call.params)
        plan = call.plan(params, self.materialize, self.contraction)
        leaves = params.by_path()
        if message := left_out(plan.unusable):
            warnings.warn(message, LeftOutWarning, stacklevel=2)
        return {t.path: new_entry(key, t, leaves[t.path]) for t in plan.targets}

    def apply(
        self,
        params: PyTree,
        adapter: Mapping[str, Any],
        /,
        *args: Any,
        lora_dropout_key: jax.Array | None = None,
        lora_input_shards: InputShards = None,
        **kwargs: Any,
    ) -> Any:
        """Returns what `fn` returns with `W + ΔW` for each adapted kernel `W`.

        Computed as `x·W + s·(x·a)·b` at each use, forward and backward; the sum of
        kernel and delta is never formed. Outputs have the structure and the dtypes that
        `fn` gives them.

        Args:
            params: the frozen params.
            adapter: the factors by path, as `init` returns them.
            *args: the other arguments of `fn`, in order.
            lora_dropout_key: a PRNG key, typed or legacy, another for each step: the
                input of each low-rank branch then has its config's dropout. None is
                evaluation, without dropout.
            lora_input_shards: inside of a `jax.shard_map`, for DoRA: from patterns of
                paths to the mesh axes (a name, a tuple, `()` for none) along which the
                input axes of those kernels are cut, and their norms are summed. Needed
                where kernel and `a` both differ along a mesh axis; with
                `check_vma=False` nothing tells where that is.
            **kwargs: the keyword arguments of `fn`.

        Raises:
            AdapterError: if the adapter does not belong to `params`, or the roles that
                it gives to axes are not those of `fn` and keep it from being evaluated.
            MaterializationError: if a kernel reaches an operation without a low-rank
                rule.
            UnsupportedFeatureError: if a DoRA kernel may be one of several shards.
        """
        given = Given(adapter, adapter, lambda log: adapter)
        key, shards = lora_dropout_key, lora_input_shards
        return self._apply(params, given, args, kwargs, key, shards)

    def _apply(
        self,
        params: PyTree,
        given: Given,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        key: jax.Array | None,
        shards: InputShards = None,
    ) -> Any:
        """Returns what `apply` does, with the entries that are given for the uses."""
        if key is not None:
            check_key(key, "lora_dropout_key")
        flat = FlatParams.of(params)
        check_adapter(flat, given.shapes)
        check_unboxed(given.shapes)
        cuts = input_cuts(flat, given.shapes, shards)
        flat = as_varying(flat, given.arrays)
        call = [*args[: self.argnum], params, *args[self.argnum :]]
        traced = trace(self.fn, self.argnum, call, kwargs, flat)
        shared = shared_kernels(traced, given.shapes) if given.mixed else {}
        program, log = self._program(traced, given.shapes, shared)
        inputs = lazily(traced)
        for path in shared:
            inputs[traced.positions[path]] = frozen(inputs[traced.positions[path]])
        dropout = self._dropout(flat, traced, key)
        for path, entry in given.entries(log).items():
            place = traced.positions[path]
            inputs[place] = adapted(
                inputs[place], entry, *dropout(path), cuts.get(path, ())
            )
        found = evaluated(program, inputs, self.backward, mixed=given.mixed)
        return traced.rebuild(found)

    def apply_mixed(
        self,
        params: PyTree,
        stacked: Mapping[str, Any],
        index: Any,
        /,
        *args: Any,
        lora_dropout_key: jax.Array | None = None,
        in_axes: Any = 0,
        out_axes: Any = 0,
        **kwargs: Any,
    ) -> Any:
        """Returns what `apply` returns when each example has an adapter of its own.

        The base product stays one product over all examples. Where it is cheaper, as in
        decoding, the low-rank ones do too: `x·a` of all adapters side by side, of which
        each example keeps its own columns. Elsewhere (long prompts, many more adapters
        than examples, convolutions) each example takes a copy of its factors. Experts
        of a ragged product always lie side by side, with the rows of all examples in
        one product.

        `fn` sees one example at a time, with an axis of size 1 in the place of the
        examples: what it computes over a batch (a mean loss, batch statistics) is over
        that one. Under `jax.jit` other adapters of the same shapes (`jlora.put`) and
        other indices run the same program.

        Args:
            params: the frozen params.
            stacked: the adapters, as `jlora.stack` returns them; or `jlora.prepare`,
                which spares work at each call.
            index: which adapter each example uses, of shape (examples,); a negative one
                is none, the base alone. Out of range is an error; where it is traced,
                so that nobody can look at it, that example's outputs are NaN.
            *args: the other arguments of `fn`. Arrays have the examples along axis 0;
                anything else, such as a flag, is the same for all. A single typed PRNG
                key is split, and each example sees a key of its own; an array of keys
                is like any other, and each example sees one of size 1.
            lora_dropout_key: a PRNG key, typed or legacy, as for `apply`. It is split
                into one for each example, by `jax.random.split`.
            in_axes: where the examples are, if elsewhere; None for what all examples
                share (a mask, a legacy PRNG key). An int for every argument, a tuple
                with one entry for each positional argument after `index`, or a dict
                from position (from 0) or name to it, the others being 0. An entry may
                be a tree, as in `jax.vmap`.
            out_axes: where the examples are in the outputs, likewise; None for outputs
                without an axis for them (a scalar loss), of which there is then one for
                each example, along axis 0.
            **kwargs: the keyword arguments of `fn`.

        Raises:
            AdapterError: if `stacked` is no stacked adapter or does not fit the params.
            IndexError: if a concrete index is out of range.
            ValueError: if an array has not one entry for each example.
            UnsupportedFeatureError: if a kernel reaches a ragged product that cannot be
                one for all examples: with further batch axes, beside other uses than
                products and lookups of an adapted kernel, of a kernel that is computed
                from others, or on a mesh with Explicit axes.
        """
        call = (args, kwargs, lora_dropout_key, in_axes, out_axes)
        return run_mixed(self._apply, params, stacked, index, *call)

    def inputs(
        self, /, *args: Any, lora_sketch: int | None = None, **kwargs: Any
    ) -> dict[str, InputStats]:
        """Returns the second moments `Σ xᵀ·x` of what goes into each target.

        One forward pass of `fn` with its own params, in which every use of a target as
        `x·W` counts: each step of a loop, each expert with its own rows, each patch of
        a convolution, each lookup as a row of the identity. Shared kernels add up their
        uses, and pieces of a kernel that are used apart are uses each. Not counted are
        transposed uses (of a tied head), products whose result nobody needs, the
        conditions of while loops, and what is materialized.

        Args:
            *args: the arguments of `fn`, as for `plan`, as arrays.
            lora_sketch: the number of columns `k` of a random projection `Ω`, for
                `Σ xᵀ·(x·Ω)` in place of the whole matrix, whose size is that of the
                input squared. A few times the rank is enough for `jlora.eva`.
            **kwargs: the keyword arguments of `fn`.

        Returns:
            `InputStats` by path, without the leaves that are trained whole. Sums: add
            those of more batches by `jax.tree.map(jnp.add, stats, more)`. Under
            `jax.jit` nothing is kept but these sums; on a mesh they are reduced.

        Raises:
            TargetError: if the config does not fit the params.
            MaterializationError: if a kernel reaches an operation without a low-rank
                rule.
            UnsupportedFeatureError: if a kernel is used inside of a `shard_map` with
                `check_vma=False`.

        Example:
            >>> import jax, jax.numpy as jnp, jlora
            >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig(rank=2))
            >>> x = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
            >>> stats = jax.jit(lora.inputs)({"w": jnp.ones((3, 4))}, x)
            >>> stats["w"].moment.tolist()
            [[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [2.0, 1.0, 5.0]]
            >>> int(stats["w"].rows)
            2

        References:
            Paischer et al., One Initialization to Rule them All: Fine-tuning via
            Explained Variance Adaptation, <https://arxiv.org/abs/2410.07170>, 2024.
        """
        if lora_sketch is not None and not lora_sketch >= 1:
            raise ValueError(f"`lora_sketch` must be at least 1, got {lora_sketch!r}")
        call = self._call(args, kwargs)
        params = FlatParams.of(call.params)
        traced = call.trace(params)
        targets, _ = call.select(params, traced)
        axes = {t.path: t.axes for t in targets if t.axes is not None}
        # Quantised params are made dense first, so that the program is of dense ones.
        made = [v.dense() if isinstance(v, Quantized) else v for v in traced.inputs]
        traced = dataclasses.replace(traced, inputs=made)
        program, _ = program_of(traced, axes, self.materialize, "factored")
        return input_stats(traced, program, axes, lora_sketch)

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        return Call(self.fn, self.configs, self.argnum, args, kwargs)

    def _program(
        self, traced: Traced, adapter: Mapping[str, Any], shared: dict[str, KernelAxes]
    ) -> tuple[Any, Log]:
        """Returns the program to evaluate, and the uses of kernels in it.

        Beside the adapted ones, these are frozen ones that a mixed batch shares.
        """
        axes = {p: a for p, e in adapter.items() if (a := axes_of(e)) is not None}
        has_magnitude = lambda e: getattr(e, "magnitude", None) is not None
        scales = {
            p: scale
            for p, e in adapter.items()
            if (scale := scale_of(variant_of_entry(e), e, has_magnitude(e)))
        }
        whole = adapter.keys() - axes.keys()
        known = (axes | shared, self.materialize, self.contraction, scales, whole)
        return program_of(traced, *known, frozen=shared)

    def _dropout(
        self, params: FlatParams, traced: Traced, key: jax.Array | None
    ) -> Callable[[str], tuple[jax.Array | None, float]]:
        """Returns a function from the path of a target to its key and its rate."""
        if key is None or not any(config.dropout for config in self.configs):
            return lambda path: (None, 0.0)
        rates = dropout_rates(params, self.configs, traced)
        return lambda path: (key_of(key, path), rates.get(path, 0.0))
