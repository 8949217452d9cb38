"""The operations with a function inside, by the names of their primitives.

Each rule has two halves: `analyze` gives the programs inside their steps, `run` emits
the operation again, around an evaluation of them, through the public functions of `jax`
and `jax.lax`. Adapted values are pytrees, so that factors pass as ordinary operands.

`jax.vmap` and `jax.grad` make equations that the public function of a primitive does
not: a loop whose condition is a bool for each example, a checkpoint that is part of a
backward pass. The file of each rule says what becomes of each parameter.
"""

from .._jax.versions import JIT, REMAT
from .branches import COND, WHILE
from .calls import CALL, JIT_RULE, REMAT_RULE
from .rule import ControlFlowRule
from .scan import SCAN
from .select import SELECT
from .shard_map import SHARD_MAP

CONTROL_FLOW: dict[str, ControlFlowRule] = {
    **dict.fromkeys(JIT, JIT_RULE),
    **dict.fromkeys(REMAT, REMAT_RULE),
    **dict.fromkeys(("closed_call", "core_call", "composite"), CALL),
    "scan": SCAN,
    "while": WHILE,
    "cond": COND,
    "select_n": SELECT,
    "shard_map": SHARD_MAP,
}
