"""All the ways in which a kernel is used; the tests cross them with `wrappers`."""

from uses_carried import CARRIED
from uses_conv import CONVS as CONVS
from uses_dense import DENSE
from uses_lookup import LOOKUPS
from uses_materializing import MATERIALIZING as MATERIALIZING
from uses_mixed import MIXED
from uses_stacks import STACKS

USES = [*DENSE, *CARRIED, *LOOKUPS, *CONVS, *STACKS, *MIXED]
