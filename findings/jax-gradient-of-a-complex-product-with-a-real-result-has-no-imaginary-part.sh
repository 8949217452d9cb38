#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1: a product of complex values with a real `preferred_element_type` has a gradient without imaginary part.
#
# Guessed: `jnp.einsum(..., preferred_element_type=jnp.float32)` of complex values gives
# the real part of the complex product, and `jax.grad` the gradient of that real part.
# Seen: the value is so. The gradient is that product of the cotangent and the other
# operand, in float32 too: its imaginary part is dropped, without a word. What comes
# before it (an `fft`, a phase) gets a wrong gradient; `jnp.real` of the product without
# the option gives the right one.
# For LoRA in JAX: a Fourier mixer or a state space model that asks its products for
# float32 trains what lies before them on wrong gradients.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.10.2 0.12.0.1; do
  "$python" -m venv --clear "$folder/venv"
  "$folder/venv/bin/pip" install -q "jax==$version" "jaxlib==$version"
  JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
draw = lambda *shape: (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype("c8")
x, w = draw(5, 4), draw(4, 3)


def asked(x):
    return jnp.einsum("nk,km->nm", x, w, preferred_element_type=jnp.float32)


def taken(x):
    return jnp.real(jnp.einsum("nk,km->nm", x, w))


def off(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


values = off(asked(x), taken(x))
of_asked, of_taken = (jax.grad(lambda x: jnp.sum(f(x)))(x) for f in (asked, taken))
# JAX's gradient of a real function of x: that along the real part minus i times the
# other. Both are measured here by differences, which are exact for a linear function.
by_hand = np.zeros(x.shape, "c16")
for i in np.ndindex(x.shape):
    for step in (1, 1j):
        moved = x.copy()
        moved[i] += step
        change = float(np.sum(np.real(moved @ w) - np.real(x @ w), dtype="f8"))
        by_hand[i] += change if step == 1 else -1j * change
right, wrong = off(of_taken, by_hand), off(of_asked, by_hand)
imaginary = float(np.abs(np.imag(of_asked)).max())
print(
    f"jax {jax.__version__}: values differ by {values:.0e}; the gradient of jnp.real is "
    f"off by {right:.0e}, that of the option by {wrong:.2f}, its imaginary part {imaginary}"
)
assert values < 1e-5 and right < 1e-4, (values, right)
assert wrong > 0.1 and imaginary == 0, (wrong, imaginary)
PY
done
