"""A call of the function, before it has an adapter: its params, its trace, its plan."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .._adapter.config import LoraConfig
from .._errors import TargetError
from .._params.paths import FlatParams, PyTree
from .._plan.plan import Plan, make_plan
from .._plan.program import with_uses
from .._plan.select import left_frozen, select
from .._plan.target import Target, Unusable
from .._product.choice import Contraction
from .._program.trace import Traced, trace
from .arguments import check_place_of_params, where_params_are


@dataclasses.dataclass(frozen=True)
class Call:
    """A function with its arguments, params among them, and the configs for it.

    Attributes:
        fn: the function.
        configs: the configs.
        argnum: which argument is the params tree.
        args: the positional arguments.
        kwargs: the keyword arguments.
    """

    fn: Callable[..., Any]
    configs: tuple[LoraConfig, ...]
    argnum: int
    args: Sequence[Any]
    kwargs: dict[str, Any]

    @property
    def params(self) -> PyTree:
        """The params.

        Raises:
            TypeError: if they are not where they should be.
        """
        if self.argnum >= len(self.args):
            raise TypeError(
                f"`jlora.lora(..., argnum={self.argnum})` needs the params as "
                f"positional argument {self.argnum}, got {len(self.args)} positional "
                f"ones{self._keywords()}"
            )
        place = self.fn, self.configs, self.argnum
        check_place_of_params(*place, self.args, self.kwargs)
        return self.args[self.argnum]

    def _keywords(self) -> str:
        return f" and the keywords {sorted(self.kwargs)}" if self.kwargs else ""

    def select(
        self, params: FlatParams, traced: Traced | None
    ) -> tuple[list[Target], list[Unusable]]:
        """Returns what `jlora._plan.select.select` does.

        Raises:
            TargetError: that says where the params are, if they are elsewhere.
        """
        try:
            return select(params, self.configs, traced)
        except TargetError as error:
            place = self.fn, self.configs, self.argnum
            hint = where_params_are(*place, self.args, self.kwargs)
            if not hint:
                raise
            raise TargetError(f"{error}\n{hint}") from None

    def trace(self, params: FlatParams) -> Traced:
        """Returns the traced call."""
        return trace(self.fn, self.argnum, self.args, self.kwargs, params)

    def plan(
        self,
        params: FlatParams,
        materialize: str,
        contraction: Contraction,
        *,
        frozen: bool = False,
    ) -> Plan:
        """Returns the plan; on request with the kernels that are left frozen."""
        traced = self._trace_if_whole(params)
        targets, unusable = self.select(params, traced)
        if traced is not None:
            targets = with_uses(targets, traced, materialize, contraction)
        others = left_frozen(params, targets, unusable, traced) if frozen else ()
        return make_plan(params, targets, unusable, traced, others)

    def _trace_if_whole(self, params: FlatParams) -> Traced | None:
        """Traces the call; with the params alone, only if `fn` takes them alone."""
        alone = len(self.args) == 1 and not self.kwargs
        try:
            return self.trace(params)
        except TypeError:
            if not alone:
                raise
            return None
