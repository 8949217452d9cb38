"""`LoraConfig`: which kernels are adapted, and how."""

import dataclasses
import math
import operator
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from .fields import (
    check_bool,
    check_factor,
    check_init,
    check_seed,
    floating,
    positive,
    rate,
    whole_rank,
)
from .other_names import knows_other_names


@knows_other_names
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels are adapted, with which rank and scaling.

    `y = x·W + scaling·(x·a)·b`, with `scaling = alpha/rank`, or `alpha/√rank` with
    rank-stabilised LoRA. Give one config, or a sequence of them to `jlora.lora`: of the
    configs that match a leaf, the first that can use it decides.

    Args:
        target: a regex, or several, that must match a run of whole segments of a path
            (`"query"` matches `params/attention/query/kernel`, not
            `params/query_norm/scale`). None adapts every kernel of a product,
            convolution or ragged product and leaves tables that are looked up alone.
            `".*"` adapts every kernel, tables too.
        exclude: a regex, or several, for paths that are left out again.
        rank: the number of columns of `a` and of rows of `b`. A kernel that maps from
            or to fewer features, such as a classifier of two labels, gets as many as it
            maps, of slices the smallest. The plan tells ("2 of 8"), and its scaling is
            that of this rank all the same.
        alpha: the numerator of the scaling.
        rslora: scale by `alpha/√rank` instead of `alpha/rank`.
        dora: train the norm of each output of the kernel besides: the kernel is
            `magnitude · (W + ΔW) / ‖W + ΔW‖`, the norm taken over the input axes. With
            `slices` or `layers` that holds for their outputs, and others stay as they
            are.
        dropout: the share of the inputs of the low-rank branch that are set to zero, in
            [0, 1), where `apply` gets a `lora_dropout_key`; without a key nothing is
            dropped. Lookups have no dropout, as in PEFT: their input is an index.
        init: the initialiser: "kaiming_uniform" or "gaussian" for `a` (`b` is zero);
            "zero_a" for `b` (`a` is zero); "orthogonal" for both, with `a·b = 0` and
            an even rank. Values are drawn as for `rank` where a kernel gets less of it.
            For those that look at kernels, gradients or inputs see
            `jlora.pissa` and its relatives, which take a new adapter.
        dtype: the dtype the factors are kept in; they are cast to the compute dtype
            where they are used. DoRA's magnitudes are kept in float32 at least, so that
            training starts at the base's outputs.
        bias: which biases are trained whole besides: "none"; "adapted" for those beside
            the kernels that this config adapts (`a/b/bias` beside `a/b/kernel`); "all"
            for every leaf called `bias`.
        rows: the rows of a table that is looked up, to train these alone: the adapter
            holds their new values. `rank` and `alpha` have no meaning then. A lookup
            gives the values, rounded once; a product with the table (a tied head) is
            that with the frozen table plus that with the change, in the precision of
            both. A NaN in a frozen row stays, until `merge` puts the values in its
            place.
        slices: runs of outputs of a fused kernel, as `[(0, 512), (1024, 1536)]`, each
            with factors of its own rank; the other outputs are not adapted.
        batch: an axis of the kernels, or several, along which each index gets factors
            of its own, though the program does not tell: that of experts which are all
            computed for every token (`td,edf->tef`) would share `a` otherwise, as its
            outputs. Negative ones count from the end. It holds for every leaf that this
            config adapts; at least one axis that the program contracts, and one that it
            does not, must be left. An axis that the program tells is fine.
        layers: the indices of the layers that are adapted, of kernels that are stacks
            of layers, as under a scan: the others have no factors. The layers are the
            first batch axis of a kernel.
        full: train the matched leaves whole instead of adapting them (norm scales,
            biases, heads); their adapter entry is a plain array.
        variant: "loha" for `HadamardFactors`, "lora_fa" for `FixedFactors`, "lora_xs"
            for `CoreFactors`, "vera" for `VectorFactors`, "lokr" for
            `KroneckerFactors`, "ia3" for `KernelScale`, or the name of another variant
            that has been added to `jlora/_adapter/variants`; "lora" for those that are
            told by the fields above. Those without a factor `a` that is drawn do not
            look at `init`.
        projection_seed: with "vera", what the random matrices follow from.
        decompose_factor: with "lokr", how many parts inputs and outputs are cut into,
            each where it divides them; -1 for near their square roots.
        scale_side: with "ia3", whether inputs ("in") or outputs ("out") are scaled.

    Raises:
        ValueError: if a value is out of its range or a pattern is no regex.
        TypeError: if a value has the wrong type.

    Example:
        >>> config = LoraConfig("attention/(query|value)", rank=8, alpha=16.0)
        >>> config.scaling
        2.0
        >>> LoraConfig("experts/up", batch=0).batch_axes
        (0,)

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
        <https://arxiv.org/abs/2106.09685>, 2021.
        Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA,
        <https://arxiv.org/abs/2312.03732>, 2023.
        Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation,
        <https://arxiv.org/abs/2402.09353>, 2024.
    """

    target: str | Sequence[str] | None = None
    _: dataclasses.KW_ONLY
    exclude: str | Sequence[str] | None = None
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    init: str = "kaiming_uniform"
    dtype: Any = jnp.float32
    full: bool = False
    bias: str = "none"
    rows: Sequence[int] | None = None
    slices: Sequence[tuple[int, int]] | None = None
    batch: int | Sequence[int] | None = None
    layers: Sequence[int] | None = None
    variant: str = "lora"
    projection_seed: int = 0
    decompose_factor: int = -1
    scale_side: str = "out"

    def __post_init__(self) -> None:
        """Normalises patterns and dtype, and checks every field."""
        for field in ("target", "exclude"):
            value = _patterns(field, getattr(self, field))
            object.__setattr__(self, field, value)
        object.__setattr__(self, "dtype", floating(self.dtype))
        object.__setattr__(self, "alpha", positive("alpha", self.alpha))
        object.__setattr__(self, "rank", whole_rank(self.rank))
        check_init(self.init, self.rank)
        object.__setattr__(self, "dropout", rate(self.dropout))
        for field in ("rslora", "dora", "full"):
            check_bool(field, getattr(self, field))
        if self.bias not in BIASES:
            hint = "; PEFT's 'lora_only' is 'adapted' here"
            hint = hint if self.bias == "lora_only" else ""
            raise ValueError(
                f"`LoraConfig.bias` is one of {BIASES}, got {self.bias!r}{hint}"
            )
        object.__setattr__(self, "rows", _numbers("rows", self.rows))
        layers = _numbers("layers", self.layers)
        object.__setattr__(self, "layers", layers and tuple(sorted(layers)))
        object.__setattr__(self, "slices", _slices(self.slices))
        object.__setattr__(self, "batch", _axes(self.batch))
        check_seed("projection_seed", self.projection_seed)
        check_factor(self.decompose_factor)
        if self.scale_side not in ("in", "out"):
            raise ValueError(
                f'`LoraConfig.scale_side` is "in" or "out", got {self.scale_side!r}'
            )
        if not isinstance(self.variant, str):
            raise TypeError(f"`LoraConfig.variant` is a name, got {self.variant!r}")
        _check_one_kind(self)
        if self.full and self.target is None:
            raise ValueError(
                "`LoraConfig(full=True)` without a target would train every leaf; name "
                "the leaves, or give '.*' if that is meant"
            )

    @property
    def scaling(self) -> float:
        """`alpha/rank`, or `alpha/√rank` with `rslora`; of the rank that is asked."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """`batch` as a tuple, empty if it is None."""
        given: Any = self.batch
        return given or ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as plain JSON values.

        >>> LoraConfig("query", rank=4).to_dict()["rank"]
        4
        """
        plain = {**dataclasses.asdict(self), "dtype": jnp.dtype(self.dtype).name}
        # So that a jlora that knows neither can read it.
        late = ("variant", "layers", "projection_seed", "decompose_factor")
        late += ("scale_side",)
        return {
            name: value
            for name, value in plain.items()
            if name not in late or value != getattr(LoraConfig, name)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoraConfig":
        """Returns the config that `to_dict` turned into `values`.

        >>> config = LoraConfig(["query", "value"], exclude="head", dtype="bfloat16")
        >>> LoraConfig.from_dict(config.to_dict()) == config
        True
        """
        return cls(**values)


def _patterns(field: str, value: Any) -> str | tuple[str, ...] | None:
    """Returns one pattern as it is and several as a tuple, each a valid regex."""
    if value is None:
        return None
    if not isinstance(value, str | list | tuple):
        raise TypeError(
            f"`LoraConfig.{field}` takes a regex string, or a sequence of them, got "
            f"{value!r}"
        )
    several = (value,) if isinstance(value, str) else tuple(value)
    if not several:
        raise ValueError(f"`LoraConfig.{field}` is empty; give a pattern, or None")
    for pattern in several:
        if not isinstance(pattern, str):
            raise TypeError(
                f"`LoraConfig.{field}` takes regex strings, got {pattern!r} "
                f"of type {type(pattern).__name__}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`LoraConfig.{field}` {pattern!r} is no regular expression: {error}"
                + ("; any text is `.*`" if pattern.startswith("*") else "")
            ) from error
    return value if isinstance(value, str) else several


BIASES = ("none", "adapted", "all")


def _numbers(field: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    found = tuple(value) if isinstance(value, list | tuple | range) else ()
    fine = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found)
    if not found or not fine or len(set(found)) < len(found):
        raise ValueError(
            f"`LoraConfig.{field}` takes numbers of {field} from 0, each once, got "
            f"{value!r}"
        )
    return found


def _slices(value: Any) -> tuple[tuple[int, int], ...] | None:
    if value is None:
        return None
    try:
        slices = tuple((operator.index(i), operator.index(j)) for i, j in value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`LoraConfig.slices` takes pairs of whole numbers, got {value!r}"
        ) from error
    ends = [0, *(end for pair in slices for end in pair)]
    empty = any(i == j for i, j in slices)
    if not slices or empty or ends != sorted(ends):
        raise ValueError(
            "`LoraConfig.slices` takes runs of outputs (first, behind the last) in "
            f"ascending order that do not overlap, got {value!r}"
        )
    return slices


def _axes(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    axes = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in axes):
        raise TypeError(f"`LoraConfig.batch` takes an axis, or several, got {value!r}")
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(
            f"`LoraConfig.batch` takes axes of the kernels, each once, got {value!r}; "
            "give None for those that the program tells"
        )
    return axes


def _check_one_kind(config: "LoraConfig") -> None:
    kinds = {
        "full": config.full,
        "rows": config.rows is not None,
        "slices": config.slices is not None,
        "layers": config.layers is not None,
        "dora": config.dora,
        "variant": config.variant != "lora",
    }
    chosen = [kind for kind, is_chosen in kinds.items() if is_chosen]
    if chosen in (["rows", "dora"], ["full", "dora"]):
        raise ValueError(
            f"`LoraConfig` takes one of {chosen} at a time: what is trained whole has "
            "its norms with it, and DoRA's would scale what is frozen beside it"
        )
    # Norms are those of the outputs of the slices, or of the layers.
    if len(chosen) > 1 and chosen not in (["slices", "dora"], ["layers", "dora"]):
        raise ValueError(f"`LoraConfig` takes one of {chosen} at a time")
    whole = config.full or config.rows is not None
    for field, is_given in (
        ("bias", config.bias != "none"),
        ("batch", config.batch is not None),
    ):
        if is_given and field == "bias" and config.layers is not None:
            raise ValueError(
                "`LoraConfig.bias` trains the biases of all layers, and `layers` names "
                "some; leave one of both out"
            )
        if is_given and whole:
            raise ValueError(
                f"`LoraConfig.{field}` goes with a config that adapts kernels"
            )
