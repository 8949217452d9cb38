"""What jlora knows of each primitive: how factors pass it, and how they are used.

No adapter, no config. Begin at `rule.py`.
"""

from . import branches, calls, scan, select, shard_map
from .rule import ControlFlowRule

# The rules by the names of their primitives.
CONTROL_FLOW: dict[str, ControlFlowRule] = {
    **branches.CONTROL_FLOW,
    **calls.CONTROL_FLOW,
    **scan.CONTROL_FLOW,
    **select.CONTROL_FLOW,
    **shard_map.CONTROL_FLOW,
}
