"""What jlora knows of each primitive: how factors pass it, and how they are used.

No adapter, no config. Begin at `rule.py`; each file has the rules of its primitives.
"""

from . import (
    branches,
    calls,
    collectives,
    conv,
    cutting,
    dot_general,
    gather,
    joining,
    passing,
    ragged_dot,
    reshaping,
    scaling,
    scan,
    select,
    shard_map,
    summing,
)
from .rule import CarryRule, ConsumeRule, ControlFlowRule

# The rules by the names of their primitives. An operation may be in both tables: what
# has a frozen operand besides the kernel carries it, if that is not its use.
CARRY: dict[str, CarryRule] = {
    **collectives.CARRY,
    **cutting.CARRY,
    **dot_general.CARRY,
    **gather.CARRY,
    **joining.CARRY,
    **passing.CARRY,
    **reshaping.CARRY,
    **scaling.CARRY,
    **summing.CARRY,
}
CONSUME: dict[str, ConsumeRule] = {
    **conv.CONSUME,
    **dot_general.CONSUME,
    **ragged_dot.CONSUME,
}
CONTROL_FLOW: dict[str, ControlFlowRule] = {
    **branches.CONTROL_FLOW,
    **calls.CONTROL_FLOW,
    **scan.CONTROL_FLOW,
    **select.CONTROL_FLOW,
    **shard_map.CONTROL_FLOW,
}
