"""What the abstract pass remembers of jaxprs that are called more than once.

JAX keeps one jaxpr of a jitted function for all calls with the same types. What the
pass finds out of it depends on the views of its inputs but for names: which kernels
they are, and where the operations stand that they have passed. So it is kept under the
views with these names left out, and told again with the names of each call.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from .._rules.view import Body, Log, Place, Value, View


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a jaxpr.

    Attributes:
        key: the jaxpr, and its inputs without names.
        paths: the kernels among the inputs, in the order in which they occur.
        places: the places that their views have passed, likewise.
        place: where the call stands.
    """

    key: Hashable
    paths: tuple[str, ...]
    places: tuple[Place, ...]
    place: Place

    @classmethod
    def of(
        cls,
        jaxpr: Any,
        inputs: Sequence[Value],
        place: Place,
        ends: frozenset[Place],
        kinds: "Kinds",
    ) -> "Call":
        """Returns a call.

        Args:
            jaxpr: what is called.
            inputs: what is known of its inputs.
            place: where the call stands.
            ends: the places at which kernels come to an end.
            kinds: what else is known of a kernel, by path, and of the call.
        """
        views = [view for value in inputs for view in value.views]
        paths = tuple(dict.fromkeys(view.path for view in views))
        passed = [one.place for view in views for one in view.passed]
        places = tuple(dict.fromkeys(passed))
        names = {path: str(i) for i, path in enumerate(paths)}
        numbers = {place: (-i - 1,) for i, place in enumerate(places)}
        nameless = Renaming(names, numbers, (), ())
        known = tuple(nameless.value(value) for value in inputs)
        depth = len(place)
        inside = frozenset(end[depth:] for end in ends if end[:depth] == place)
        of_paths = tuple(map(kinds.of_path, paths))
        key = (id(jaxpr), known, inside, of_paths, kinds.of_call)
        return cls(key, paths, places, place)


@dataclasses.dataclass(frozen=True)
class Kinds:
    """What else decides the outcome of a call: of each kernel, and of the call."""

    of_path: Any
    of_call: Hashable


@dataclasses.dataclass(frozen=True)
class Renaming:
    """From the names of one call to those of another."""

    paths: dict[str, str]
    places: dict[Place, Place]
    before: Place
    after: Place

    @classmethod
    def between(cls, one: Call, other: Call) -> "Renaming | None":
        """Returns the renaming between two calls, None if they have the same names."""
        if (one.paths, one.places, one.place) == (
            other.paths,
            other.places,
            other.place,
        ):
            return None
        paths = dict(zip(one.paths, other.paths, strict=True))
        places = dict(zip(one.places, other.places, strict=True))
        return cls(paths, places, one.place, other.place)

    def place(self, place: Place) -> Place:
        """Renames a place: one that a view came with, or one inside of the call."""
        if place in self.places:
            return self.places[place]
        return self.after + place[len(self.before) :]

    def view(self, view: View) -> View:
        """Renames a view."""
        passed = tuple(
            dataclasses.replace(one, place=self.place(one.place)) for one in view.passed
        )
        return dataclasses.replace(view, path=self.paths[view.path], passed=passed)

    def value(self, value: Value) -> Value:
        """Renames what is known of a value."""
        views = tuple(map(self.view, value.views))
        return dataclasses.replace(value, views=views)

    def log(self, log: Log) -> Log:
        """Renames what was seen."""
        path = lambda entry: dataclasses.replace(entry, path=self.paths[entry.path])
        at = lambda vote: dataclasses.replace(vote, place=self.place(vote.place))
        return Log(
            uses=list(map(path, log.uses)),
            obstacles=list(map(path, log.obstacles)),
            votes=[at(path(vote)) for vote in log.votes],
            met=set(map(self.place, log.met)),
            needed=set(map(self.place, log.needed)),
            lost={self.place(place): kind for place, kind in log.lost.items()},
        )


class Recall:
    """The memory of a pass."""

    def __init__(self) -> None:
        # The jaxprs are kept alive, so that no other has the same id.
        self._found: dict[Hashable, tuple[Any, Call, Body, Log]] = {}

    def get(self, call: Call) -> tuple[Body, Log] | None:
        """Returns what is known of a call, in its own names."""
        if call.key not in self._found:
            return None
        _, first, body, log = self._found[call.key]
        renaming = Renaming.between(first, call)
        if renaming is None:
            return body, log
        outputs = tuple(map(renaming.value, body.outputs))
        return Body(body.program, outputs), renaming.log(log)

    def put(self, call: Call, jaxpr: Any, body: Body, log: Log) -> None:
        """Remembers what was found out of a call."""
        self._found[call.key] = (jaxpr, call, body, log)
