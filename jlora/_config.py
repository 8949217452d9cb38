"""`LoraConfig`: which kernels are adapted, and how."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ._init import INITIALIZERS


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
        rank: the number of columns of `a` and of rows of `b`.
        alpha: the numerator of the scaling.
        rslora: scale by `alpha/√rank` instead of `alpha/rank`.
        init: the initialiser: "kaiming_uniform" or "gaussian" for `a` (`b` is zero);
            "zero_a" for `b` (`a` is zero); "orthogonal" for both, with `a·b = 0` and
            an even rank. For those that look at kernels, gradients or inputs see
            `jlora.pissa` and its relatives, which take a new adapter.
        dtype: the dtype the factors are kept in; they are cast to the compute dtype
            where they are used.
        full: train the matched leaves whole instead of adapting them (norm scales,
            biases, heads); their adapter entry is a plain array.

    Raises:
        ValueError: if a value is out of its range or a pattern is no regex.
        TypeError: if a value has the wrong type.

    Example:
        >>> config = LoraConfig("attention/(query|value)", rank=8, alpha=16.0)
        >>> config.scaling
        2.0

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
        <https://arxiv.org/abs/2106.09685>, 2021.
        Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA,
        <https://arxiv.org/abs/2312.03732>, 2023.
    """

    target: str | Sequence[str] | None = None
    _: dataclasses.KW_ONLY
    exclude: str | Sequence[str] | None = None
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    init: str = "kaiming_uniform"
    dtype: Any = jnp.float32
    full: bool = False

    def __post_init__(self) -> None:
        """Normalises patterns and dtype, and checks every field."""
        for field in ("target", "exclude"):
            value = _patterns(field, getattr(self, field))
            object.__setattr__(self, field, value)
        object.__setattr__(self, "dtype", _floating(self.dtype))
        object.__setattr__(self, "alpha", _positive("alpha", self.alpha))
        _check_rank(self.rank)
        _check_init(self.init, self.rank)
        for field in ("rslora", "full"):
            _check_bool(field, getattr(self, field))
        if self.full and self.target is None:
            raise ValueError(
                "`LoraConfig(full=True)` without a target would train every leaf; name "
                "the leaves, or give '.*' if that is meant"
            )

    @property
    def scaling(self) -> float:
        """`alpha/rank`, or `alpha/√rank` with `rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as plain JSON values.

        >>> LoraConfig("query", rank=4).to_dict()["rank"]
        4
        """
        plain = dataclasses.asdict(self)
        return {**plain, "dtype": jnp.dtype(self.dtype).name}

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
            ) from error
    return value if isinstance(value, str) else several


def _check_rank(rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"`LoraConfig.rank` must be an int, got {rank!r}")
    if rank < 1:
        raise ValueError(f"`LoraConfig.rank` must be at least 1, got {rank}")


def _check_init(init: Any, rank: int) -> None:
    if init not in INITIALIZERS:
        known = ", ".join(map(repr, INITIALIZERS))
        raise ValueError(f"`LoraConfig.init` must be one of {known}; got {init!r}")
    if init == "orthogonal" and rank % 2:
        raise ValueError(
            "`LoraConfig(init='orthogonal')` shares an orthogonal matrix between both "
            f"factors and needs an even rank, got {rank}"
        )


def _check_bool(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`LoraConfig.{field}` must be True or False, got {value!r}")


def _positive(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`LoraConfig.{field}` must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"`LoraConfig.{field}` must be finite and greater than 0, got {value!r}"
        )
    return float(value)


def _floating(dtype: Any) -> Any:
    """Returns the dtype object of a floating dtype."""
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"`LoraConfig.dtype` {dtype!r} is no dtype") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"`LoraConfig.dtype` must be floating, got {found.name}")
    return found
