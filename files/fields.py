"""What a file says, before it is believed: the kind and the bounds of its numbers, texts and lists.

A kind is (its name for error messages, a function that tells whether a value is of it).
"""
import json
import re
import reprlib


def whole(low=0, high=1 << 31):
    return f"a whole number from {low} to {high}", lambda x: type(x) is int and low <= x <= high


def number(low, high):
    """Finite: JSON in Python may hold NaN and Infinity, and true counts as a number."""
    return (f"a number from {low:g} to {high:g}",
            lambda x: type(x) in (int, float) and low <= x <= high)  # which NaN is not


def text(longest=100_000):
    return f"a text of at most {longest} letters", lambda x: (
        isinstance(x, str) and len(x) <= longest and not any("\ud800" <= c <= "\udfff" for c in x))


def list_of(kind, longest=1 << 20, least=0):
    name, valid = kind
    return f"a list, each of its items {name}", lambda x: (
        isinstance(x, (list, tuple)) and least <= len(x) <= longest and all(map(valid, x)))


# in a message it must not look like something else
FILE = "a file's name", lambda x: (
    isinstance(x, str) and 0 < len(x) < 4096
    and not re.search("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", x))
FLAG = "true or false", lambda x: isinstance(x, bool)
SECONDS = "a number of seconds", number(0, 1e6)[1]


def short(x):
    """A value in a few letters, however long or deep it is."""
    return reprlib.repr(x)[:100]


def one_line(error, longest=200):
    """What an error says, which another library may have made of what stands in a file."""
    return " ".join(str(error).split())[:longest]


def check_fields(d, needed, optional=(), what="it"):
    """ValueError unless d is a dict with all of the needed fields {name: kind}, and what it has of them and
    of the optional ones is of its kind."""
    if not isinstance(d, dict):
        raise ValueError(f"{what} is an object {{...}}, not {short(d)}")
    for name, (kind, valid) in {**needed, **dict(optional)}.items():
        if name in needed and name not in d:
            raise ValueError(f"{what} needs the field {name!r}")
        if name in d and not valid(d[name]):
            raise ValueError(f"{what}'s field {name!r} is {kind}, not {short(d[name])}")


def parse_json(text):
    """ValueError for what is not JSON, too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def lines_of(f, longest=1 << 22):
    """The lines of a file opened for bytes. ValueError for one of more than `longest` bytes, before all of it
    is read."""
    while line := f.readline(longest + 1):
        if len(line) > longest:
            raise ValueError(f"has a line of more than {longest} bytes")
        yield line
