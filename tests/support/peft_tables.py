"""Which names PEFT's config selects, as plain data; rows of PEFT's own tests.

From `tests/test_tuners_utils.py` of huggingface/peft (Apache-2.0), commit 5d602fd.
"""

from typing import NamedTuple


class Selection(NamedTuple):
    """Whether a module is adapted, given three fields of the config."""

    key: str
    target_modules: str | list[str]
    layers_to_transform: list[int] | None
    layers_pattern: str | list[str] | None
    selected: bool


class Ranks(NamedTuple):
    """The ranks of `PATTERN_LAYERS` with a `rank_pattern` and `r=8`."""

    pattern: dict[str, int]
    ranks: tuple[int, ...]


_Q = "transformer.h.1.attn.attention.q_proj"

SELECTIONS = [
    Selection(*row)
    for row in [
        ("", [], None, None, False),
        ("", ["foo"], None, None, False),
        ("foo", [], None, None, False),
        ("foo", ["foo"], None, None, True),
        ("foo", ["bar"], None, None, False),
        ("foo", ["foo", "bar"], None, None, True),
        ("foo", "foo", None, None, True),
        ("foo", ".*oo", None, None, True),
        ("foo", "fo.*", None, None, True),
        ("foo", ".*bar.*", None, None, False),
        ("foobar", ".*oba.*", None, None, True),
        ("foo.bar.1.baz", ["baz"], [1], ["bar"], True),
        ("foo.bar.1.baz", ["baz"], [0], ["bar"], False),
        ("foo.bar.1.baz", ["baz"], [2], ["bar"], False),
        ("foo.bar.10.baz", ["baz"], [0], ["bar"], False),
        ("foo.bar.10.baz", ["baz"], [1], ["bar"], False),
        ("foo.bar.1.baz", ["baz"], [0, 1, 2], ["bar"], True),
        ("foo.bar.1.baz", ["baz", "spam"], [1], ["bar"], True),
        ("foo.bar.1.baz", ["baz", "spam"], [0, 1, 2], ["bar"], True),
        ("foo.whatever.1.baz", ["baz"], [1], [], True),
        ("foo.whatever.1.baz", ["baz"], [0], [], False),
        ("foo.whatever.1.baz", ["baz"], [1], "", True),
        ("foo.whatever.1.baz", ["baz"], [0], "", False),
        ("foo.whatever.1.baz", ["baz"], [1], None, True),
        ("foo.whatever.1.baz", ["baz"], [0], None, False),
        (f"{_Q}.foo", ["q_proj"], None, [], False),
        (_Q, [], None, [], False),
        (_Q, ["q_proj"], None, [], True),
        (_Q, ["q_proj", "v_proj"], None, [], True),
        (
            "transformer.h.1.attn.attention.resid_dropout",
            ["q_proj", "v_proj"],
            None,
            [],
            False,
        ),
        (_Q, ["q_proj"], [1], ["h"], True),
        (_Q, ["q_proj"], [0], ["h"], False),
        (_Q, ["q_proj"], [2], ["h"], False),
        (_Q, ["q_proj"], [0, 1, 2], ["h"], True),
        (_Q, ["q_proj", "v_proj"], [0, 1, 2], ["h"], True),
        ("foo.bar.q_proj", ["q_proj"], None, [], True),
        ("foo.bar.1.baz", ["baz"], [1], ["foo"], False),
        ("foo.bar.1.baz", ["baz"], [1], ["baz"], False),
        ("bar.1.baz", ["baz"], [1], ["bar"], False),
        ("foo.bar.001.baz", ["baz"], [1], ["bar"], True),
        ("foo.bar.1.spam.2.baz", ["baz"], [1], ["bar"], True),
        ("foo.bar.2.spam.1.baz", ["baz"], [1], ["bar"], False),
        ("blocks.1.weight", ["weight"], [1], ["blocks"], False),
        ("blocks.1.bias", ["weight"], [1], ["blocks"], False),
        ("mlp.blocks.1.weight", ["weight"], [1], ["blocks"], True),
        ("mlp.blocks.1.bias", ["weight"], [1], ["blocks"], False),
    ]
]

# The index of an expert is none of a layer, whichever pattern is given.
MOE_MODULES = [
    *(f"model.layers.{i}.self_attn.q_proj" for i in range(4)),
    *(f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(4) for e in range(2)),
]
MOE_TARGETS = ["q_proj", "up_proj"]
MOE_LAYERS = [1]
MOE_PATTERNS: list[str | list[str] | None] = [None, "layers", ["h", "layers"]]
MOE_SELECTED = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.layers.1.mlp.experts.1.up_proj",
]

PATTERN_LAYERS = (
    "foo",
    "bar",
    "module.foo",
    "module.foobar",
    "module.module.foo",
    "module.module.barfoo",
)
PATTERNS = [
    Ranks(*row)
    for row in [
        ({"foo": 16}, (16, 8, 16, 8, 16, 8)),
        ({"^foo": 16}, (16, 8, 8, 8, 8, 8)),
        ({"^module.foo": 16}, (8, 8, 16, 8, 8, 8)),
        ({"module.module.foo": 16}, (8, 8, 8, 8, 16, 8)),
        ({"^module.module.foo": 16}, (8, 8, 8, 8, 16, 8)),
        ({"module.foo": 16}, (8, 8, 16, 8, 16, 8)),
        ({"^module.foo": 16, "^module.module.foo": 24}, (8, 8, 16, 8, 24, 8)),
        ({"^foo": 16, "^module.foo": 24}, (16, 8, 24, 8, 8, 8)),
        ({"^foo": 16, "module.module.foo": 24}, (16, 8, 8, 8, 24, 8)),
        ({"^foo": 16, "^module.module.foo": 24}, (16, 8, 8, 8, 24, 8)),
        (
            {"^foo": 16, "^module.foo": 24, "^module.module.foo": 32},
            (16, 8, 24, 8, 32, 8),
        ),
        (
            {"^module.module.foo": 32, "^module.foo": 24, "^foo": 16},
            (16, 8, 24, 8, 32, 8),
        ),
        ({"bla": 4, "oof": 6}, (8, 8, 8, 8, 8, 8)),
    ]
]
# In memory the first key that matches decides, and `adapter_config.json` sorts its
# keys: `module.module.foo` has rank 16 before PEFT saves this, and 24 after.
AMBIGUOUS_PATTERN = Ranks(
    {"module.foo": 16, "^module.module.foo": 24}, (8, 8, 16, 8, 16, 8)
)
