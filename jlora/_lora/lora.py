"""`jlora.lora`: from an apply function to one that takes an adapter beside params."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._adapter.config import LoraConfig
from .._adapter.variants import variant_of_config
from .._product.choice import Contraction
from .arguments import check_configs, check_function
from .measurements import read_measurements
from .transform import Backward, Lora, Materialize

_CONTRACTIONS = ("fast", "factored", "merged", "auto", "fused")


def lora(
    fn: Callable[..., Any],
    config: LoraConfig | Sequence[LoraConfig],
    *,
    argnum: int = 0,
    materialize: Materialize = "error",
    backward: Backward = "custom",
    contraction: Contraction | str | os.PathLike[str] = "fast",
) -> Lora:
    """Returns `fn` as a function of frozen params and a low-rank adapter.

    Args:
        fn: any function of a params tree and other arguments: `model.apply`, a plain
            JAX function, a split and merged NNX model.
        config: what is adapted; of several configs that match a leaf, the first
            that can use it decides.
        argnum: which argument of `fn` is the params tree.
        materialize: "error" raises where an adapted kernel reaches an operation without
            a low-rank rule; "allow" forms `W + s·a·b` there, and only there.
        backward: "custom" uses the hand-derived backward pass; "autodiff" leaves the
            product to JAX, for forward mode (`jax.jvp`, `jax.linearize`, `jax.jacfwd`);
            `jax.hessian` does without it.
        contraction: "fast" and "factored" never form `W + s·a·b`. "fast" takes the form
            that suits what the program is lowered for, and on Hopper GPUs a kernel of
            ours, in 16-bit dtypes, where it fills half of the GPU; the kernel rests on
            an API that JAX calls experimental, and so it is tried first, once in a
            process (2 seconds). "factored" does without it. "merged" forms `W + s·a·b`
            at each use in a product, rounded to the dtype of `W`, and keeps the
            factors' gradients factored: fewer FLOPs for many tokens, but in bfloat16 an
            update of less than 2⁻⁹ of a weight is lost. "auto" is merged in float32
            where that takes fewer FLOPs, else "fast". "fused" is "fast" with the kernel
            wherever sizes divide into its tiles (256 rows, 128 columns), and with
            another one on a TPU, which was compiled for TPUs and never run on one: for
            measurements. The path of the file in which `benchmarks/tune.py` says what
            is fastest on your device ("forms.json") takes that there, and "fast" for
            sizes that it does not name. The plan says what each product does on one
            device of the default platform.

    Returns:
        A `Lora`, with `plan`, `init` and `apply`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((5, 7)), "w2": jnp.ones((7, 3))}
        >>> x = jnp.ones((2, 5))
        >>> lora = jlora.lora(model, jlora.LoraConfig("w1", rank=2, alpha=4.0))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> jax.tree.map(jnp.shape, adapter)
        {'w1': LoraFactors(a=(5, 2), b=(2, 7), axes=..., scaling=2.0)}
        >>> bool((lora.apply(params, adapter, x) == model(params, x)).all())
        True

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
        <https://arxiv.org/abs/2106.09685>, 2021.
    """
    check_function(fn)
    several = check_configs(config)
    for one in several:
        variant_of_config(one)  # raises if there is none of that name
    if isinstance(argnum, bool) or not isinstance(argnum, int) or argnum < 0:
        raise TypeError(f"`argnum` must be an int of at least 0, got {argnum!r}")
    _one_of("materialize", materialize, ("error", "allow"))
    _one_of("backward", backward, ("custom", "autodiff"))
    return Lora(fn, several, argnum, materialize, backward, _contraction(contraction))


def _contraction(given: Any) -> Any:
    """Returns a contraction, or what its file says."""
    if isinstance(given, os.PathLike) or str(given).endswith(".json"):
        return read_measurements(Path(given))
    _one_of("contraction", given, _CONTRACTIONS)
    return given


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(
            f"`jlora.lora({name}=...)` must be one of {known}, got {value!r}"
        )
