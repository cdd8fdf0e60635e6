"""Numbers and paths that a caller gives: taken as they are meant, or refused in one sentence."""

import math
import pathlib

import numpy
import pytest
import torch

from seal_ops.utils.arguments import integer, number, path, shown


def test_what_is_taken():
    assert integer("f", "n", numpy.int64(3), 3) == 3 and integer("f", "n", -2) == -2
    assert number("f", "x", 3) == 3.0 and number("f", "x", torch.tensor(0.5), 0, 0.1) == 0.5
    assert math.isinf(number("f", "x", math.inf, infinite=True))
    assert path("f", "p", pathlib.Path("a")) == path("f", "p", "a") == "a"


@pytest.mark.parametrize(
    "check, value, sentence",
    [
        (integer, "3", "f: n must be an integer, got '3'"),
        (integer, 1.5, "f: n must be an integer, got 1.5"),
        (integer, math.nan, "f: n must be an integer, got nan"),
        (integer, None, "f: n must be an integer, got None"),
        (integer, 0, "f: n must be at least 1, got 0"),
        (number, "1", "f: n must be a finite number, got '1'"),
        (number, math.nan, "f: n must be a finite number, got nan"),
        (number, -math.inf, "f: n must be a finite number, got -inf"),
        (number, torch.ones(2), r"f: n must be a finite number, got tensor\(\[1., 1.\]\)"),
        (number, [1.0], r"f: n must be a finite number, got \[1.0\]"),
        (number, 0, "f: n must be at least 1, got 0"),
        (path, 3, "f: n must be a path, got 3"),
        (path, b"a", "f: n must be a path, got b'a'"),
        (path, "", "f: n must be a path, got ''"),
    ],
)
def test_what_is_refused(check, value, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        check("f", "n", value, *([] if check is path else [1]))


def test_above():
    with pytest.raises(ValueError, match="^f: x must be above 0, got 0$"):
        number("f", "x", 0, above=0)


def test_a_long_value_is_cut():
    text = shown("x\n" * 500)
    assert len(text) == 80 and text.endswith("...") and "\n" not in text
