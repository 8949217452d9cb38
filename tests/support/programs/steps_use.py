"""What multiplies a value that is linear in kernels with an activation.

Each function takes the builder and the name of the value, and returns an expression
whose result has an axis of tokens, so that no activation has the size of a kernel.
"""

import itertools
import string
from collections.abc import Callable

import jax

from programs.build import Builder, Unfit
from programs.steps_carry import ints

# Plain JAX is wrong on a CPU for a convolution that is padded before its input by more
# than its taps reach (the gradient of that input), or cut there, padded by less than
# nothing (its values too): seen in jax 0.8.2 to 0.11.2, right in 0.12.0.1.
PADDING_WITHIN_TAPS = jax.__version_info__ < (0, 12)

Use = Callable[[Builder, str], str]
USE: dict[str, tuple[float, Use]] = {}


def use(weight: float) -> Callable[[Use], Use]:
    """Registers a step under the name of its function."""

    def register(step: Use) -> Use:
        USE[step.__name__] = (weight, step)
        return step

    return register


def operand(b: Builder, shape: tuple[int, ...]) -> str:
    """An activation of a shape: one that is there, at times, or a fresh input."""
    found = [y for y in b.scope.acts if b.shape(y) == shape]
    if found and b.flip(0.7) and not b.eight:
        return b.rng.choice(found)
    return b.input(shape)


def narrow(b: Builder, k: str, x: str) -> str:
    """Casts an operand as a product with a narrow kernel has it."""
    if b.dtype(k) == "float8_e4m3fn":
        return f"{x}.astype(F8)"
    if b.dtype(k) == "bfloat16" and b.flip(0.6):
        return f"{x}.astype(LOW)"
    return x


# einsums


@use(8)
def einsum(b: Builder, k: str) -> str:
    """Letters of any roles, in any order, the kernel on either side."""
    letters = string.ascii_lowercase[: len(b.shape(k))]
    size = dict(zip(letters, b.shape(k), strict=True))
    x, letters_x = _einsum_operand(b, letters, size)
    shared = [c for c in letters_x if c in letters]
    contracted = [c for c in shared if b.flip(0.75)]
    if b.flip(0.9):  # a product has a letter that is summed, and one that is new
        contracted = contracted or shared[:1]
    out = [c for c in {*letters, *letters_x} if c not in contracted]
    dropped = [c for c in out if c in letters]
    if dropped and b.flip(0.07):
        out.remove(b.rng.choice(sorted(dropped)))
    out = b.shuffled(sorted(out))
    pairs = [(letters_x, narrow(b, k, x)), (letters, k)]
    if b.flip(0.12) and b.dtype(k) != "float8_e4m3fn":
        pairs.append(_third(b, out, size))
    pairs = b.shuffled(pairs)
    spec = ",".join("".join(c) for c, _ in pairs)
    wide = _wide(b, k, x)
    values = ", ".join(v for _, v in pairs)
    return f'jnp.einsum("{spec}->{"".join(out)}", {values}{wide})'


def _wide(b: Builder, k: str, x: str) -> str:
    needed = b.dtype(k) == "float8_e4m3fn"
    if needed or (b.dtype(k) != "complex64" and b.flip(0.15)):
        # The real part of a complex product: JAX's own gradient of it is wrong.
        complex_one = "complex" in b.dtype(x)
        return "" if complex_one else ", preferred_element_type=jnp.float32"
    return b.rng.choice(["", "", ', precision="highest"'])


def _einsum_operand(
    b: Builder, letters: str, size: dict[str, int]
) -> tuple[str, list[str]]:
    """An activation and its letters, some of them the kernel's."""
    by_size = {n: c for c, n in size.items()}
    for y in b.shuffled(b.scope.acts * (not b.eight)):
        names = [by_size.get(n) for n in b.shape(y)]
        shared = [c for c in names if c]
        alone = len(shared) == len(set(shared)) and None in names
        if shared and alone and len(shared) < len(letters) and b.flip(0.7):
            others = iter("nmlopq")
            named = [c or next(others) for c in names]
            size.update(zip(named, b.shape(y), strict=True))
            return y, named
    some = [c for c in letters if b.flip(0.5)] or list(letters[-1:])
    if len(some) == len(letters) > 1 and b.flip(0.9):
        some.remove(b.rng.choice(some))
    tokens = ["n"] + ["m"] * b.flip(0.25)
    size.update(n=b.tokens[0], m=b.tokens[1])
    named = b.shuffled([*some, *tokens])
    return b.input(tuple(size[c] for c in named)), named


def _third(b: Builder, out: list[str], size: dict[str, int]) -> tuple[list[str], str]:
    """A frozen third operand: a vector along an axis, or a matrix to a new one."""
    letter = b.rng.choice(out)
    shape = [size[letter]]
    named = [letter]
    if letter != "n" and letter != "m" and b.flip(0.5):
        out[out.index(letter)] = "z"
        named.append("z")
        shape.append(b.rng.choice(b.sizes))
    return named, b.leaf(shape, adapted=False)


# products by other names


@use(4)
def matmul(b: Builder, k: str) -> str:
    shape = b.shape(k)
    if len(shape) < 2:
        raise Unfit("a vector")
    *batch, i, o = shape
    n = b.tokens[0]
    left = b.flip(0.6)
    lead = tuple(batch) if b.flip(0.6) else (1,) * len(batch)
    if len(shape) == 2:
        x = operand(b, (n, i) if left else (o, n))
    else:
        x = b.input((*lead, n, i) if left else (*lead, o, n))
    x = narrow(b, k, x)
    if b.dtype(k) == "float8_e4m3fn":
        pair = f"{x}, {k}" if left else f"{k}, {x}"
        return f"jnp.matmul({pair}, preferred_element_type=jnp.float32)"
    kinds = [f"{x} @ {k}", f"jnp.matmul({x}, {k})"]
    if not left:
        kinds = [f"{k} @ {x}", f"jnp.matmul({k}, {x})"]
    if len(shape) == 2:
        kinds.append(f"jnp.dot({x}, {k})" if left else f"jnp.dot({k}, {x})")
    return b.rng.choice(kinds)


@use(1.5)
def tensordot(b: Builder, k: str) -> str:
    shape = b.shape(k)
    if not shape:
        raise Unfit("a scalar")
    axes = b.shuffled(range(len(shape)))[: b.rng.randint(1, max(len(shape) - 1, 1))]
    x = operand(b, (b.tokens[0], *(shape[i] for i in axes)))
    spec = [list(range(1, len(axes) + 1)), axes]
    x = narrow(b, k, x)
    wide = ", preferred_element_type=jnp.float32" if "F8" in x else ""
    if b.flip(0.5):
        return f"jnp.tensordot({x}, {k}, axes={spec}{wide})"
    return f"jnp.tensordot({k}, {x}, axes={spec[::-1]}{wide})"


@use(2)
def dot_general(b: Builder, k: str) -> str:
    shape = b.shape(k)
    if len(shape) < 2:
        raise Unfit("a vector")
    order = b.shuffled(range(len(shape)))
    n_contract = b.rng.randint(1, len(shape) - 1)
    contract, rest = order[:n_contract], order[n_contract:]
    batch = rest[: b.rng.randint(0, 1)] if len(rest) > 1 or b.flip(0.1) else []
    mine = (contract, batch)
    names = b.shuffled([*contract, *batch, "n"])
    sizes = tuple(b.tokens[0] if i == "n" else shape[i] for i in names)
    theirs = ([names.index(i) for i in contract], [names.index(i) for i in batch])
    x = narrow(b, k, operand(b, sizes))
    kinds = f"{x}.astype({k}.dtype)"
    wide = ", preferred_element_type=jnp.float32"
    wide = wide if "F8" in x or (b.dtype(k) == "bfloat16" and b.flip(0.5)) else ""
    if b.flip(0.5):
        dims = ((theirs[0], mine[0]), (theirs[1], mine[1]))
        return f"lax.dot_general({kinds}, {k}, {dims}{wide})"
    dims = ((mine[0], theirs[0]), (mine[1], theirs[1]))
    return f"lax.dot_general({k}, {kinds}, {dims}{wide})"


# convolutions


@use(3)
def conv(b: Builder, k: str) -> str:
    shape = b.shape(k)
    spatial = len(shape) - 2
    if not 1 <= spatial <= 3 or 0 in shape:
        raise Unfit("no kernel of a convolution")
    # The smallest axes are the taps, the other two the features.
    order = sorted(range(len(shape)), key=shape.__getitem__)
    taps, (i, o) = order[:spatial], b.shuffled(order[spatial:])
    rhs = (o, i, *b.shuffled(taps))
    groups = b.rng.choice([1, 1, shape[o] if shape[i] < 3 else 1, 2])
    batch_groups = b.rng.choice([1] * 9 + [2])
    if shape[o] % groups or shape[o] % batch_groups or groups * batch_groups > 10:
        raise Unfit("no such groups")
    groups = 1 if batch_groups > 1 else groups
    n = b.tokens[0] * batch_groups
    dilated = [b.rng.choice([1, 1, 2]) for _ in taps]
    lhs = b.shuffled(range(len(shape)))
    sizes = [0] * len(shape)
    sizes[lhs[0]], sizes[lhs[1]] = n, shape[i] * groups
    for place, tap in zip(lhs[2:], rhs[2:], strict=True):
        sizes[place] = 2 * shape[tap] if spatial < 3 else shape[tap] + 1
    out = b.shuffled(range(len(shape)))
    pads = [(b.rng.randint(-1, 2), b.rng.randint(0, 2)) for _ in taps]
    if PADDING_WITHIN_TAPS:
        reach = [(shape[tap] - 1) * d for tap, d in zip(rhs[2:], dilated, strict=True)]
        pads = [
            (max(0, min(low, r)), high)
            for (low, high), r in zip(pads, reach, strict=True)
        ]
    padding = b.rng.choice(['"SAME"', '"VALID"', str(pads)])
    dilation = [1] * spatial
    if padding.startswith("["):
        dilation = [b.rng.choice([1, 1, 2]) for _ in taps]
    options = {
        "window_strides": [b.rng.choice([1, 1, 2]) for _ in taps],
        "padding": padding,
        "lhs_dilation": dilation,
        "rhs_dilation": dilated,
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
    }
    told = ", ".join(f"{key}={value}" for key, value in options.items())
    numbers = f"lax.ConvDimensionNumbers({tuple(lhs)}, {rhs}, {tuple(out)})"
    x = operand(b, tuple(sizes))
    call = f"lax.conv_general_dilated({x}.astype({k}.dtype), {k}, {told}"
    return f"{call}, dimension_numbers={numbers})"


@use(0.7)
def conv_transpose(b: Builder, k: str) -> str:
    shape = b.shape(k)
    if len(shape) != 3 or 0 in shape:
        raise Unfit("no kernel of a convolution along one axis")
    turned = b.flip(0.4)
    x = operand(b, (b.tokens[0], 7, shape[2] if turned else shape[1]))
    padding = b.rng.choice(["SAME", "VALID"])
    return (
        f"lax.conv_transpose({x}.astype({k}.dtype), {k}, "
        f"({b.rng.choice([1, 2, 3])},), {padding!r}, "
        f"rhs_dilation=({b.rng.choice([1, 2])},), "
        f'dimension_numbers=("NWC", "WIO", "NWC"), transpose_kernel={turned})'
    )


# ragged products


@use(2)
def ragged(b: Builder, k: str) -> str:
    shape = b.shape(k)
    if len(shape) != 3 or 0 in shape:
        raise Unfit("no stack of experts")
    groups, tokens = shape[0], b.tokens[0]
    cuts = sorted(b.rng.randint(0, tokens) for _ in range(groups - 1))
    edges = [0, *cuts, tokens]
    sizes = [j - i for i, j in itertools.pairwise(edges)]
    x = f"{operand(b, (tokens, shape[1]))}.astype({k}.dtype)"
    counts = f"{ints(sizes)}.astype(np.int32)"
    if b.flip(0.5):
        return f"lax.ragged_dot({x}, {k}, {counts})"
    numbers = (
        "lax.RaggedDotDimensionNumbers(dot_dimension_numbers=(([1], [1]), ([], [])), "
        "lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])"
    )
    return f"lax.ragged_dot_general({x}, {k}, {counts}, {numbers})"
