"""What the fuzz tests share: how much they try, damage to bytes, odd JSON values, and what counts as refused.

CELLDETR_FUZZ=20 tries 20 times as many inputs, other ones in every run; without it every run tries the same ones.
"""

import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from celldetr.runtime.errors import CellDETRError

FACTOR = int(os.environ.get("CELLDETR_FUZZ", "0"))
COMMON = {
    "deadline": None,
    "derandomize": FACTOR == 0,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def tries(examples):
    """Return the settings of a test that tries so many inputs."""
    return settings(max_examples=examples * max(1, FACTOR), **COMMON)


def refused(read, *arguments, **options):
    """Return (error, None) when our own error refuses the input, else (None, result); any other exception passes."""
    try:
        return None, read(*arguments, **options)
    except CellDETRError as error:
        text = str(error)
        assert text.strip()
        return error, None


@st.composite
def damages(draw):
    """Ways to damage bytes: a function that takes the bytes and returns other ones."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "drop", "zero", "insert", "swap", "empty"]))
    where = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=4))
    bit = draw(st.integers(0, 7))
    extra = draw(st.binary(min_size=1, max_size=9))

    def apply(data):
        if kind == "empty" or not data:
            return b""
        places = [int(share * len(data)) for share in where]
        first, second = sorted(places[:2])
        second = min(len(data), first + 1 + (second - first) % 64)
        changed = bytearray(data)
        if kind == "flip":
            for place in places:
                changed[place] ^= 1 << bit
        elif kind == "cut":
            del changed[first:]
        elif kind == "drop":
            del changed[first:second]
        elif kind == "zero":
            changed[first:second] = bytes(second - first)
        elif kind == "insert":
            changed[first:first] = extra
        else:
            changed[first:second] = changed[first:second][::-1]
        return bytes(changed)

    return apply


NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([10**19, -(2**63), 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
)
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["", "nan", "1e-4", "../..", "\x00", "\ud800", "a" * 300]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)
DEEP = b"[" * 200_000


def paths(value, at=()):
    """All places in a JSON value, the top included."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from paths(item, (*at, key))


@st.composite
def mutations(draw, value, most=2):
    """Return (changed copy of a JSON value, places that changed): values replaced, removed, renamed, or added."""
    changed, places = json.loads(json.dumps(value)), []
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(list(paths(changed))))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        holder = changed
        for key in place[:-1]:
            holder = holder[key]
        if not place:
            if kind == "replace":
                return draw(VALUES), [()]
            if isinstance(changed, dict):
                changed[draw(st.text(max_size=4))] = draw(VALUES)
        elif kind == "remove":
            del holder[place[-1]]
        elif kind == "add" and isinstance(holder[place[-1]], dict):
            holder[place[-1]]["zzz"] = draw(VALUES)
            place = (*place, "zzz")
        else:
            holder[place[-1]] = draw(VALUES)
        places.append(place)
    return changed, places


def dump(value):
    """Encode a JSON value with NaN, infinity and lone surrogates as Python's own encoder writes them."""
    return json.dumps(value).encode()
