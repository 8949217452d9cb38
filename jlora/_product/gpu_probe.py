"""Whether a kernel for Hopper GPUs runs here: tried once in a process, at a small size.

JAX says of the APIs that they are written in that they may change any week. So each is
compiled and run before it is trusted: that finds an API that changed, a compiler that
refuses, and wrong numbers. It takes some seconds, where a program is lowered for a
Hopper GPU and has products that the kernel fits, and nowhere else. (The kernel for few
rows may run on other GPUs; it was measured on Hopper GPUs alone.)
"""

import concurrent.futures
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .._jax.platforms import Target
from .._jax.versions import MOSAIC_GPU_SINCE
from .few_kernel import LARGEST_OWN, MOST_ROWS, Linear, adapted_products
from .hopper_kernel import sum_of_products
from .hopper_tiles import TILES, local_gpu

# The sum of `hopper_kernel`, and the products of `few_kernel`.
Kernel = Literal["sum", "few"]
_ROWS, _DEPTH, _COLUMNS, _RANK = 512, 256, 128, 16
_logger = logging.getLogger("jlora")


def runs_on(target: Target, kernel: Kernel = "sum") -> bool:
    """Returns whether a kernel runs on what a program is lowered for.

    Not in a program that is exported, whose calls are those that JAX keeps stable, nor
    on several devices where nothing asks how it is partitioned.
    """
    if target.platform != "cuda" or target.exported:
        return False
    if target.devices > 1 and not target.rules:
        return False
    return fault(kernel) is None


def fault(kernel: Kernel = "sum") -> str | None:
    """Returns why a kernel does not run on this host's GPU, or None where it does."""
    gpu = local_gpu()
    if gpu is None:
        return "there is no GPU"
    capability = getattr(gpu, "compute_capability", None)
    if capability != "9.0":
        return f"the GPU has compute capability {capability}, and it is for 9.0"
    if jax.__version_info__ < MOSAIC_GPU_SINCE:
        first = ".".join(map(str, MOSAIC_GPU_SINCE))
        return f"it needs jax {first}, and this is {jax.__version__}"
    return _tried(gpu, kernel)


@functools.cache
def _tried(gpu: Any, kernel: Kernel) -> str | None:
    """Tries it in a thread of its own: no trace and no mesh of the caller is there."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            wrong = pool.submit(_TRIALS[kernel], gpu).result()
        except Exception as error:  # whatever a changed API raises
            found = f"it does not compile: {type(error).__name__}: {error}"
        else:
            found = "it computes something else" if wrong else None
    if found is not None:
        _logger.warning("jlora does without its kernel %r for GPUs: %s", kernel, found)
    return found


def _drawing() -> Callable[..., Any]:
    """Returns what draws a matrix of bfloat16."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    return lambda *shape: normal(*shape).astype(jnp.bfloat16)


def _is_near(found: Any, expected: np.ndarray) -> bool:
    found = np.asarray(found, np.float32)
    return np.allclose(found, expected, rtol=2.0**-7, atol=2.0**-5)


def _sum_differs(gpu: Any) -> bool:
    """Runs both orders of the kernel, turned for two adapters, and compares with NumPy.

    Each tile is tried in one order, and the largest in both.
    """
    draw = _drawing()
    x, w = draw(_ROWS, _DEPTH), draw(_DEPTH, _COLUMNS)
    h, bs = draw(_ROWS, _RANK), draw(2, _RANK, _COLUMNS)
    wide = [np.asarray(v, np.float32) for v in (x, w, h, bs)]
    base, each = wide[0] @ wide[1], wide[2].reshape(2, -1, _RANK)
    large, middle, small = TILES
    for tile, turned in ((large, False), (large, True), (middle, True), (small, False)):
        lies, b = (np.ascontiguousarray(w.T), bs) if turned else (w, bs[0])
        own = wide[3] if turned else wide[3][:1]
        expected = base + (each @ own).reshape(base.shape)
        args = jax.device_put(([x], [lies], h, b), gpu)
        run = jax.jit(functools.partial(sum_of_products, turned=turned, tile=tile))
        if not _is_near(run(*args), expected):
            return True
    return False


def _few_differ(gpu: Any) -> bool:
    """Runs one row and many, two kernels, `x·a` made, through a gate, and given.

    NumPy computes it too. One rank is a block, one a part of one, and one is large.
    What is made is rounded to bfloat16 and has another scale than the rest: hence the
    small factors.
    """
    draw, scalings = _drawing(), (0.5, 0.25)
    wide = lambda value: np.asarray(value, np.float32)
    small, large = (_RANK, _RANK // 2), (2 * LARGEST_OWN, _RANK)
    for rows, ranks in ((1, small), (MOST_ROWS, small), (1, large)):
        x, made, given, expected = draw(rows, _DEPTH), [], [], []
        for scaling, rank in zip(scalings, ranks, strict=True):
            gate: Any = np.float32(np.arange(rows * rank).reshape(rows, rank) % 3 > 0)
            w, b = draw(_DEPTH, _COLUMNS), draw(rank, _COLUMNS)
            a: Any = (wide(draw(_DEPTH, rank)) / 64).astype(jnp.bfloat16)
            h: Any = (gate * (scaling * wide(x) @ wide(a))).astype(jnp.bfloat16)
            made.append(Linear(w, a, None, b, gate))
            given.append(Linear(w, None, h, b))
            expected.append(wide(x) @ wide(w) + wide(h) @ wide(b))
        for linears in (made, given):
            args = jax.device_put((x, linears), gpu)
            found = adapted_products(*args, scalings=scalings)
            if not all(map(_is_near, found, expected)):
                return True
    return False


_TRIALS: dict[Kernel, Callable[[Any], bool]] = {
    "sum": _sum_differs,
    "few": _few_differ,
}
