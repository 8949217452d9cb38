#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1: `jax.random.categorical` of bfloat16 logits draws few tokens but the first thousand of 32768 equal ones, and draws unequal ones as at a lower temperature.
#
# Guessed: logits rounded to bfloat16 are off by less than a percent, and samples by as
# much. Seen: the noise that is added to them has their dtype, and is made of a uniform
# value of 7 bits: 128 values, none above 4.9, where float32's reach 16. Of equal logits the
# maximum is tied, and the first of them wins. The same logits cast to float32 are drawn
# rightly. `mode="high"` is nearer and still ties. The documentation speaks of events below
# 1E-7, which is float32's limit.
# For LoRA in JAX: completions of a tuned model, or rollouts for a reward, that are drawn
# from bfloat16 logits are not from the policy whose log probabilities are trained: cast
# logits to float32 before they are drawn from.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - 2>/dev/null <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

TOKENS, DRAWS = 32768, 1024


def draw(logits, dtype, **how):
    """Tokens drawn from the same bfloat16 logits, in `dtype`."""
    logits = logits.astype(jnp.bfloat16).astype(dtype)
    one = jax.jit(lambda key: jax.random.categorical(key, logits, **how))
    return np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(1), DRAWS), batch_size=64))


equal = jnp.zeros(TOKENS)
peaked = 4 * jax.random.normal(jax.random.key(8), (TOKENS,))
log_p = np.asarray(jax.nn.log_softmax(peaked.astype(jnp.bfloat16).astype(jnp.float32)))
entropy = -float(np.sum(np.exp(log_p) * log_p))

noise = np.asarray(jax.random.gumbel(jax.random.key(2), (10**6,), jnp.bfloat16), np.float32)
assert len(np.unique(noise)) == 128 and noise.max() < 4.9, noise.max()
low, right = draw(equal, jnp.bfloat16), draw(equal, jnp.float32)
assert low.mean() < 200 and low.max() < 4000, (low.mean(), low.max())
assert abs(right.mean() - TOKENS / 2) < 1000, right.mean()
assert 9000 < draw(equal, jnp.bfloat16, mode="high").mean() < 13000
surprise = {d: -float(log_p[draw(peaked, d)].mean()) for d in (jnp.bfloat16, jnp.float32)}
assert abs(surprise[jnp.float32] - entropy) < 0.15, (surprise, entropy)
assert surprise[jnp.bfloat16] < entropy - 1, (surprise, entropy)
print(
    f"of {TOKENS} equal logits the mean id drawn is {low.mean():.0f} in bfloat16 and {right.mean():.0f} in float32; "
    f"of an entropy of {entropy:.2f} nats {surprise[jnp.bfloat16]:.2f} are seen in bfloat16 and "
    f"{surprise[jnp.float32]:.2f} in float32"
)
PY
