"""The choice among the forms of `_product.forms` for a group of adapted products.

A part of it is made while the program is traced, from shapes and dtypes alone:
"merged", "separate", or `ByPlatform`, which is decided when the program is lowered.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from .._jax.platforms import Target
from .._jax.symbolic import are_known, exceeds
from . import few_kernel
from .fused import joining_pays
from .gpu_probe import Kernel, fault, runs_on
from .group import Form, GroupDims, compute_dtype
from .hopper_tiles import divides, filled, fits
from .measured import Measurements, OfSize
from .tpu_kernel import tiles

Contraction = Literal["fast", "factored", "merged", "auto", "fused"] | Measurements

# Features and outputs from which on a kernel is extended: 768 lost, 2048 gains.
_LEAST_EXTENDED = 1024
# With less than this the kernel fills no GPU at any usual number of tokens.
_LEAST_FUSED = 512
# The part of a GPU that a product must fill for the kernel to pay. In a loop it does so
# earlier: other products copy the layer's kernel first. (An H200, d = 2048, over the
# separate form: in a loop 0.86 with 128 rows, which fill 0.15; outside of one 1.05 with
# 256 rows, 0.30, and 0.96 with 512 rows, 0.61.)
_LEAST_FILLED = {"filled": 0.5, "in a loop": 0.15, "always": 0.0}
# Rows for which the kernel for few was ahead in a loop over tokens too: with 64 it took
# 1.28 of the base's time there, and products apart 1.15 (H200; outside 1.04 and 1.15).
_MOST_IN_LOOPS = 16
# Forms with a kernel for GPUs, by whether they are for several devices.
_WITH_KERNEL: dict[tuple[Kernel, bool], Form] = {
    ("few", False): "few",
    ("few", True): "ruled_few",
    ("sum", False): "fused",
    ("sum", True): "partitioned",
}
# TPUs on which another form costs less than a fusion that joins two arrays.
_ON_TPU: dict[str, Form] = {"TPU v6 lite": "copied", "TPU v4": "separate"}


class Where(NamedTuple):
    """Where the kernels of a group lie, and the group.

    Attributes:
        whole: whether each kernel is an array of the params as it lies: no part of one,
            nor turned, nor cast.
        loops: whether the group is in a loop of the program.
    """

    whole: bool
    loops: bool


class ByPlatform(NamedTuple):
    """A form that is chosen when the program is lowered, see `form_on`.

    Attributes:
        fused: whether the fused kernel may be used: never, where it fills enough of
            the GPU, less of it in a loop, or wherever its tiles divide the products.
        few: the most rows for which the kernel for few may be used.
        summed: whether it may be one sum on a mesh: rounded as the program asks for.
        tokens, features, outputs: the sizes of the largest product of the group.
            (`jax.vmap` makes more tokens of them: nothing depends on those before.)
        timed: what was measured of kernels of this size, if anything was.
    """

    fused: Literal["never", "filled", "in a loop", "always"]
    few: int
    summed: bool
    tokens: int
    features: int
    outputs: int
    timed: OfSize | None = None

    @property
    def has_rules(self) -> bool:
        """Whether a form with a partitioning rule may be chosen."""
        return self.summed or self.fused != "never"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, features and outputs."""
        return self.tokens, self.features, self.outputs

    def of_rows(self, times: int) -> "ByPlatform":
        """The same for that many times as many tokens."""
        return self._replace(tokens=self.tokens * times)


def choose(
    contraction: Contraction,
    dims: GroupDims,
    x: Any,
    kernels: Sequence[Any],
    where: Where,
) -> Form | ByPlatform:
    """Returns the form for a group, from shapes, dtypes and where kernels lie alone.

    Args:
        contraction: as `jlora.lora` takes it.
        dims: the static description of the products.
        x: the shared operand; shape and dtype are read.
        kernels: the kernels, likewise.
        where: where they lie.

    Where sizes are symbolic it is the form that is right for all of them.
    """
    if contraction == "merged":
        return "merged"
    size = lambda array, axes: math.prod(array.shape[i] for i in axes)
    features, shared = size(x, dims.contract), size(x, dims.batch)
    tokens = x.size // max(features * shared, 1)
    outputs = [w.size // max(features * shared, 1) for w in kernels]
    if contraction == "auto" and all(v.dtype == jnp.float32 for v in (x, *kernels)):
        # Formed twice, forward and backward: 4·r·m·k each against 2·n·r·(m + k).
        if all(exceeds(tokens * (features + k), 2 * features * k) for k in outputs):
            return "merged"
    if not are_known([tokens, features, *outputs]):
        return "separate"  # the others pay, or fit, for some sizes alone
    if not _extensible(dims, x, kernels):
        return "separate"
    # A group is what its largest kernel is: it shares `x`, and so its copy.
    largest, always = max(outputs), contraction == "fused"
    rounds = _rounds_to(dims, x.dtype)
    kernel = contraction != "factored" and rounds and _has_kernel(x.dtype)
    kernel = kernel and (always or min(features, largest) >= _LEAST_FUSED)
    fused = kernel and all(divides(features, k) for k in outputs)
    taken: Any = "in a loop" if where.loops else "filled"
    taken = ("always" if always else taken) if fused else "never"
    few = kernel and where.whole
    few = few and all(few_kernel.divides(features, k) for k in outputs)
    most = (_MOST_IN_LOOPS if where.loops else few_kernel.MOST_ROWS) if few else 0
    one_precision = len({k.precision for k in dims.kernels}) == 1
    timed = None
    if isinstance(contraction, Measurements):
        timed = contraction.of_size(x.dtype, features, largest)
    sizes = tokens, features, largest
    return ByPlatform(taken, most, rounds and one_precision, *sizes, timed)


def form_on(by: ByPlatform, target: Target) -> Form:
    """Returns the form that a group takes on what it is lowered for."""
    if (timed := _form_that_was_timed(by, target)) is not None:
        return timed
    if target.platform == "tpu":
        return _form_on_tpu(by, target)
    kernel = _kernel_for(by, target)
    if kernel is not None and runs_on(target, kernel):
        return _WITH_KERNEL[kernel, target.devices > 1]
    gpu = target.platform in ("cuda", "rocm")
    if target.devices == 1:
        return "extended" if gpu and _extended_pays(*by.sizes) else "separate"
    # On Explicit axes types say where all lies.
    return "ruled" if by.summed and target.rules and not target.typed else "separate"


def _form_that_was_timed(by: ByPlatform, target: Target) -> Form | None:
    """Returns the form that was fastest on such a device, where it is one and can."""
    if by.timed is None or target.devices > 1 or target.kind != by.timed.kind:
        return None
    form = by.timed.at(by.tokens)
    if form == "fused":
        can = by.fused != "never" and fits(*by.sizes) and runs_on(target)
    elif form == "few":
        can = _is_few(by, target) and runs_on(target, "few")
    elif form == "tiled":
        can = by.fused != "never" and _is_tiled(by, target)
    else:
        can = by.summed or form in ("separate", "extended")
    return form if can else None


def _form_on_tpu(by: ByPlatform, target: Target) -> Form:
    """Returns the form on TPUs, by the estimates of their compiler alone.

    In a program for several nothing may be joined: it is not known what is sharded.
    """
    if by.fused == "always" and _is_tiled(by, target):
        return "tiled"
    wide = min(by.features, by.outputs) >= _LEAST_EXTENDED
    if target.devices > 1 or not (by.summed and wide and joining_pays(by.tokens)):
        return "separate"
    return _ON_TPU.get(target.kind, "joined")


def form_here(form: Form | ByPlatform) -> Form:
    """Returns the form on one device of the default platform, as plans show it."""
    return form_on(form, Target.here()) if isinstance(form, ByPlatform) else form


def without_kernel(form: Form | ByPlatform) -> str | None:
    """Returns why a GPU does without the kernel that is wanted here, if it does."""
    target = Target.here()
    if not isinstance(form, ByPlatform) or target.platform != "cuda":
        return None
    kernel = _kernel_for(form, target)
    return None if kernel is None else fault(kernel)


def _kernel_for(by: ByPlatform, target: Target) -> Kernel | None:
    """Returns the kernel for GPUs that suits a group, if it runs there."""
    if _is_few(by, target):
        return "few"
    return "sum" if _is_fused(by, target) else None


def _is_few(by: ByPlatform, target: Target) -> bool:
    """Whether there are so few rows that reading kernels is what takes time."""
    can = target.devices == 1 or (by.summed and not target.typed)
    return target.platform == "cuda" and can and 0 < by.tokens <= by.few


def _is_fused(by: ByPlatform, target: Target) -> bool:
    """Whether the kernel divides a product, and has work for enough processors.

    On a mesh each device has its part of the blocks, whatever is sharded.
    """
    gpu = target.platform in ("cuda", "rocm")
    if not gpu or by.fused == "never" or not fits(*by.sizes):
        return False
    return filled(*by.sizes, target.devices) >= _LEAST_FILLED[by.fused]


def _is_tiled(by: ByPlatform, target: Target) -> bool:
    """Whether the kernel for TPUs divides a product and that of its gradient."""
    if target.platform != "tpu" or target.devices > 1 or not by.summed:
        return False
    ways = (by.features, by.outputs), (by.outputs, by.features)
    return all(tiles(by.tokens, [depth], columns) for depth, columns in ways)


def _extended_pays(tokens: int, features: int, outputs: int) -> bool:
    """Whether the copies of a kernel cost less than passes over its outputs.

    The kernel is copied forward and backward, 4·m·k values to and fro; saved are the
    delta, written and read forward, and one reading of `dy`, 3·n·k. (On an H100 the
    copy of `x` costs no more than the additions that it saves.) With a small side all
    is launches of short kernels: ViT-B, of 768, was slower than plain autodiff.
    """
    return 4 * features < 3 * tokens and min(features, outputs) >= _LEAST_EXTENDED


def _extensible(dims: GroupDims, x: Any, kernels: Sequence[Any]) -> bool:
    """Whether rows can be appended: contracted last by first, in one dtype."""
    if dims.batch:
        return False
    n = len(dims.contract)
    if dims.contract != tuple(range(x.ndim - n, x.ndim)):
        return False
    first = tuple(range(n))
    plain = all(not k.first and k.contract == first for k in dims.kernels)
    # Appended values have the dtype of what they are appended to.
    same = all(w.dtype == x.dtype for w in kernels)
    return plain and same and compute_dtype(dims, x, kernels) == x.dtype


def _rounds_to(dims: GroupDims, dtype: Any) -> bool:
    """Whether the program asks for results of a dtype, or for none other."""
    asked = [dict(k.params)["preferred_element_type"] for k in dims.kernels]
    return all(one in (None, dtype) for one in asked)


def _has_kernel(dtype: Any) -> bool:
    """Whether `hopper_kernel` computes in a dtype."""
    return dtype in (jnp.bfloat16, jnp.float16)
