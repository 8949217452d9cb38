"""One torch module with its factors: what a file of an adapter is made of."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .._errors import AdapterError, NonFiniteError
from .names import Binding

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class TorchModule:
    """The factors of one torch module, or parameter, as matrices: `x·W + s·(x·a)·b`.

    A format makes them with `of_torch`, and takes them apart by `lora_a` and `lora_b`.

    Attributes:
        name: of the module or the parameter.
        a: `(in, rank)`; of a convolution its rows are `(in, *window)`.
        b: `(rank, out)`.
        scaling: what the product of both is multiplied by.
        magnitude: DoRA's, `(out,)`.
        bias: a bias of `b`, `(out,)`.
        window: of a convolution.
        is_table: whether its rows are looked up.
        expert: which expert it is, of a parameter that packs them.
        brought_by: the module that it is adapted along with, if any.
        binding: what the rules say of its leaf, or of one of several, once it has one.
    """

    name: str
    a: Array
    b: Array
    scaling: float = 1.0
    magnitude: Array | None = None
    bias: Array | None = None
    window: tuple[int, ...] = ()
    is_table: bool = False
    expert: int | None = None
    brought_by: str = ""
    binding: Binding | None = None

    @classmethod
    def of_torch(
        cls,
        name: str,
        lora_a: Array,
        lora_b: Array,
        scaling: float = 1.0,
        *,
        magnitude: Array | None = None,
        bias: Array | None = None,
        is_table: bool = False,
    ) -> "TorchModule":
        """Returns a module from factors as torch keeps them.

        Args:
            name: of the module.
            lora_a: `(rank, in, *window)`.
            lora_b: `(out, rank, 1, …)`.
            scaling: what the product of both is multiplied by.
            magnitude: DoRA's, of any shape.
            bias: a bias of `b`.
            is_table: whether its rows are looked up.

        Raises:
            AdapterError: if the factors are none of one module.

        Example:
            >>> conv = TorchModule.of_torch(
            ...     "conv", np.ones((2, 3, 5, 5)), np.ones((4, 2, 1, 1)), 0.5
            ... )
            >>> conv.a.shape, conv.b.shape, conv.lora_a.shape
            ((75, 2), (2, 4), (2, 3, 5, 5))
        """
        if problem := misfit(lora_a, lora_b):
            raise AdapterError(f"{name!r} {problem}")
        return cls(
            name,
            lora_a.reshape(lora_a.shape[0], -1).T,
            lora_b.reshape(lora_b.shape[:2]).T,
            scaling,
            None if magnitude is None else magnitude.reshape(-1),
            bias,
            lora_a.shape[2:],
            is_table,
        )

    # --- as torch keeps it ---

    @property
    def lora_a(self) -> Array:
        """Torch's `(rank, in, *window)`."""
        if not self.window:
            return self.a.T
        return self.a.T.reshape(self.a.shape[1], -1, *self.window)

    @property
    def lora_b(self) -> Array:
        """Torch's `(out, rank, 1, …)`."""
        return self.b.T.reshape(*self.b.shape[::-1], *self._ones)

    @property
    def lora_magnitude(self) -> Array | None:
        """DoRA's magnitude, of a convolution `(1, out, 1, …)`."""
        if self.magnitude is None or not self.window:
            return self.magnitude
        return self.magnitude.reshape(1, -1, *self._ones)

    @property
    def _ones(self) -> tuple[int, ...]:
        return (1,) * len(self.window)

    # --- what it is ---

    @property
    def rank(self) -> int:
        """The size of the axis that `a` and `b` share."""
        return self.a.shape[1]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of Flax's kernel, `(*window, in, out)`."""
        fan_in = self.a.shape[0] // math.prod(self.window)
        return (*self.window, fan_in, self.b.shape[1])

    @property
    def steps(self) -> Mapping[str, str | None]:
        """The transforms of its rule, if it has one."""
        return {} if self.binding is None else self.binding.steps

    @property
    def owner(self) -> str:
        """The name by which a config knows it: of what brings it along, or its own."""
        return self.brought_by or self.name

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, which a module may have beside others."""
        return "experts" in self.steps

    def check_ranks(self) -> None:
        """Raises if the factors do not share an axis.

        Raises:
            AdapterError: with both ranks.
        """
        if self.a.shape[1] != self.b.shape[0]:
            raise AdapterError(
                f"{self.name!r} has factors of the ranks {self.a.shape[1]} and "
                f"{self.b.shape[0]}"
            )

    # --- the same delta in other factors ---

    def scaled_to(self, scaling: float) -> "TorchModule":
        """Returns the same delta with another scaling; `b` takes the difference.

        Raises:
            NonFiniteError: if it is too large for the dtype.
        """
        if scaling == self.scaling:
            return self
        with np.errstate(over="ignore"):
            exact = self.b.astype(np.float64) * (self.scaling / scaling)
            b = exact.astype(self.b.dtype)
        if (np.isfinite(exact) & ~np.isfinite(b)).any():
            raise NonFiniteError(
                f"the scalings {self.scaling} and {scaling} of one kernel are too far "
                f"apart for factors in {b.dtype}"
            )
        return dataclasses.replace(self, b=b, scaling=scaling)

    def padded_to(self, rank: int) -> "TorchModule":
        """Returns the same delta with a larger rank; what is added stays zero."""
        more = rank - self.rank
        if not more:
            return self
        a = np.pad(self.a, ((0, 0), (0, more)))
        return dataclasses.replace(self, a=a, b=np.pad(self.b, ((0, more), (0, 0))))

    def trimmed(self) -> "TorchModule":
        """Returns the same delta without what `padded_to` adds; a rank is left."""
        used = self.a.any(axis=0) | self.b.any(axis=1)
        rank = max(int(np.flatnonzero(used).max(initial=0)) + 1, 1)
        return dataclasses.replace(self, a=self.a[:, :rank], b=self.b[:rank])

    def zeros(self, width: int) -> "TorchModule":
        """Returns no delta, of the same inputs and rank, for some outputs."""
        b = np.zeros((self.rank, width), self.b.dtype)
        return dataclasses.replace(self, a=np.zeros_like(self.a), b=b, magnitude=None)


def misfit(lora_a: Array, lora_b: Array) -> str | None:
    """Returns what is wrong with factors as torch keeps them, if they are none."""
    conv = lora_a.ndim > 2 and lora_b.shape[2:] == (1,) * (lora_a.ndim - 2)
    same = lora_a.ndim == lora_b.ndim and (lora_a.ndim == 2 or conv)
    if not (same and lora_a.size and lora_b.size):
        return f"has factors of the shapes {lora_a.shape} and {lora_b.shape}"
    if lora_a.dtype != lora_b.dtype:
        return f"has factors of the dtypes {lora_a.dtype} and {lora_b.dtype}"
    return None


def by_name(modules: Iterable[TorchModule]) -> dict[str, Sequence[TorchModule]]:
    """Returns the modules by name; under that of packed experts, each of them."""
    found: dict[str, list[TorchModule]] = {}
    for module in modules:
        found.setdefault(module.name, []).append(module)
    return {**found}
