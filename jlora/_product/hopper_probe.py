"""Whether the fused kernel runs here: tried once in a process, at a small size.

JAX says of the API that the kernel is written in that it may change any week. So it is
compiled and run before it is trusted: that finds an API that changed, a compiler that
refuses, and wrong numbers. It takes about two seconds, where a program is lowered for a
Hopper GPU and has products that the kernel fits, and nowhere else.
"""

import concurrent.futures
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._jax.platforms import Target
from .._jax.versions import MOSAIC_GPU_SINCE
from .hopper_kernel import local_gpu, sum_of_products

_ROWS, _DEPTH, _COLUMNS, _RANK = 512, 256, 128, 16
_logger = logging.getLogger("jlora")


def runs_on(target: Target) -> bool:
    """Returns whether the kernel runs on what a program is lowered for.

    Not in a program that is exported, whose calls are those that JAX keeps stable, nor
    on several devices where nothing asks how it is partitioned.
    """
    if target.platform != "cuda" or target.exported:
        return False
    if target.devices > 1 and not target.rules:
        return False
    return fault() is None


def fault() -> str | None:
    """Returns why the kernel does not run on this host's GPU, or None where it does."""
    gpu = local_gpu()
    if gpu is None:
        return "there is no GPU"
    capability = getattr(gpu, "compute_capability", None)
    if capability != "9.0":
        return f"the GPU has compute capability {capability}, and it is for 9.0"
    if jax.__version_info__ < MOSAIC_GPU_SINCE:
        first = ".".join(map(str, MOSAIC_GPU_SINCE))
        return f"it needs jax {first}, and this is {jax.__version__}"
    return _tried(gpu)


@functools.cache
def _tried(gpu: Any) -> str | None:
    """Tries it in a thread of its own: no trace and no mesh of the caller is there."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            wrong = pool.submit(_differs, gpu).result()
        except Exception as error:  # whatever a changed API raises
            found = f"it does not compile: {type(error).__name__}: {error}"
        else:
            found = "it computes something else" if wrong else None
    if found is not None:
        _logger.warning("jlora does without its kernel for Hopper GPUs: %s", found)
    return found


def _differs(gpu: Any) -> bool:
    """Runs both orders of the kernel, one for two adapters, and compares with NumPy."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)
    x, w = draw(_ROWS, _DEPTH), draw(_DEPTH, _COLUMNS)
    h, bs = draw(_ROWS, _RANK), draw(2, _RANK, _COLUMNS)
    wide = [np.asarray(v, np.float32) for v in (x, w, h, bs)]
    base, each = wide[0] @ wide[1], wide[2].reshape(2, -1, _RANK)
    for turned in (False, True):
        lies, b = (np.ascontiguousarray(w.T), bs) if turned else (w, bs[0])
        own = wide[3] if turned else wide[3][:1]
        expected = base + (each @ own).reshape(base.shape)
        args = jax.device_put(([x], [lies], h, b), gpu)
        run = jax.jit(functools.partial(sum_of_products, turned=turned))
        found = np.asarray(run(*args), np.float32)
        if not np.allclose(found, expected, rtol=2.0**-7, atol=2.0**-5):
            return True
    return False
