"""The methods of `seal_ops.extend`: their options, what they default to, and how far they reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ...ops import position_programs
from .block_prefill import VERTICAL_SLASH, check_pattern

FAIL = "seal_ops.extend: "


@dataclasses.dataclass(frozen=True)
class Method:
    """``options``: name -> default, or a function of the trained length; REQUIRED where there is none.

    ``rope_type``: of `seal_ops.rope_frequencies`, for methods that replace frequencies.  ``run`` and ``rows``: the
    position program, and the positions that it turns to whatever the length.  ``positions``: whether the method
    changes positions at all.  ``reach``: positions of an extended
    model, of its options and the trained length; None: any number.
    """

    summary: str
    source: str
    options: dict
    reach: Callable[[dict, int], int | None]
    rope_type: str | None = None
    run: Callable | None = None
    rows: Callable[[dict], int] = lambda options: 1
    check: Callable[[dict, int], str | None] = lambda options, trained: None
    positions: bool = True


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


def _factor(options: dict, trained: int) -> str | None:
    factor = options["factor"]
    good = isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor >= 1
    return None if good else f"factor must be a number of at least 1, got {factor!r}"


def _whole(*least: tuple[str, int]) -> Callable:
    def check(options: dict, trained: int) -> str | None:
        for name, minimum in least:
            value = options[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                return f"{name} must be an integer of at least {minimum}, got {value!r}"
        return None

    return check


def _self_extend(options, trained):
    found = _whole(("group", 1), ("window", 1))(options, trained)
    if found is None and options["window"] > trained:
        return f"window must be at most the trained length {trained}, got {options['window']}"
    return found


def _dual_chunk(options, trained):
    found = _whole(("length", 1), ("chunk", 1))(options, trained)
    if found is None and options["length"] > trained:
        return f"length must be at most the trained length {trained}, got {options['length']}"
    if found is None and options["chunk"] > options["length"]:
        return f"chunk must be at most the trained length {options['length']}, got {options['chunk']}"
    return found


def _lm_infinite(options, trained):
    found = _whole(("sinks", 0), ("window", 1), ("limit", 1))(options, trained)
    for name in ("window", "limit"):
        if found is None and options[name] > trained:
            return f"{name} must be at most the trained length {trained}, got {options[name]}"
    if found is None and options["sinks"] > options["window"]:
        return f"sinks must be at most the window's {options['window']} keys, got {options['sinks']}"
    return found


def _streaming(options, trained):
    found = _whole(("sinks", 0), ("window", 1))(options, trained)
    if found is None and options["sinks"] + options["window"] > trained:
        both = f"{options['sinks']} + {options['window']}"
        return f"sinks + window must be at most the trained length {trained}, got {both}"
    return found


def _minference(options, trained):
    found = _whole(
        ("vertical", 0), ("slash", 0), ("last_q", 1), ("sinks", 0), ("window", 1), ("dense", 0), ("block", 32)
    )(options, trained)
    if found is None and options["block"] % 32:
        return f"block must be a multiple of 32, got {options['block']}"
    keeps = options["keeps"]
    if found is None and not (isinstance(keeps, (int, float)) and not isinstance(keeps, bool) and 0 <= keeps <= 1):
        return f"keeps must be a share from 0 to 1, got {keeps!r}"
    return check_pattern(options["pattern"]) if found is None else found


def _giraffe(options, trained):
    power, cut = options["k"] is not None, [options[n] is not None for n in ("low", "high", "rho")]
    if power == any(cut) or (any(cut) and not all(cut)):
        given = ", ".join(n for n in ("k", "low", "high", "rho") if options[n] is not None) or "none of them"
        return f"giraffe takes k (power basis), or low, high and rho (truncated basis), got {given}"
    return None


def _scaled(options, trained):
    return int(trained * options["factor"])


def _unbounded(options, trained):
    return None


FACTOR = {"factor": REQUIRED}
METHODS: dict[str, Method] = {
    "linear": Method("all positions divided by factor", "2306.15595", FACTOR, _scaled, "linear", check=_factor),
    "ntk": Method("a larger base, the same at every length", "NTK-aware", FACTOR, _scaled, "ntk", check=_factor),
    "dynamic_ntk": Method(
        "a base that grows with the text", "dynamic NTK-aware", FACTOR, _scaled, check=_factor
    ),
    "yarn": Method(
        "slow frequencies divided by factor, fast ones kept",
        "2309.00071",
        {**FACTOR, "beta_fast": 32, "beta_slow": 1},
        _scaled,
        "yarn",
        check=_factor,
    ),
    "giraffe": Method(
        "the slowest frequencies slowed (k) or stopped (low, high, rho); made to be fine-tuned with",
        "2308.10882",
        {"k": None, "low": None, "high": None, "rho": None},
        _unbounded,
        "giraffe",
        check=_giraffe,
    ),
    "self_extend": Method(
        "true positions in a window, positions of groups before it",
        "2401.01325",
        {"group": REQUIRED, "window": REQUIRED},
        lambda o, trained: o["window"] + o["group"] * (trained - o["window"]),
        run=position_programs.self_extend,
        check=_self_extend,
    ),
    "dual_chunk": Method(
        "positions within chunks, distances below the trained length",
        "2402.17463",
        {"length": lambda trained: trained, "chunk": lambda trained: max(1, trained * 3 // 4)},
        _unbounded,
        run=position_programs.dual_chunk,
        rows=lambda o: o["length"],
        check=_dual_chunk,
    ),
    "lm_infinite": Method(
        "a window, and the first tokens at a capped distance",
        "2308.16137",
        {"sinks": 10, "window": lambda trained: trained, "limit": lambda trained: trained},
        _unbounded,
        run=position_programs.capped,
        rows=lambda o: o["limit"] + 1,
        check=_lm_infinite,
    ),
    "streaming": Method(
        "a window and the first tokens, at their positions in a rolling cache",
        "2309.17453",
        {"sinks": 4, "window": lambda trained: max(1, trained - 4)},
        _unbounded,
        run=position_programs.streaming,
        rows=lambda o: o["sinks"] + o["window"],
        check=_streaming,
    ),
    "minference": Method(
        "long prompts read through the blocks that each head's last queries attend to; decoding as it is",
        "2407.02490",
        {
            "vertical": 1000, "slash": 6096, "last_q": 64, "sinks": 1024, "window": 4096, "pattern": VERTICAL_SLASH,
            "keeps": 0.95, "dense": 4096, "block": 64,
        },
        lambda o, trained: trained,
        check=_minference,
        positions=False,
    ),
}  # fmt: skip


def resolved(name: str, given: dict, trained: int) -> dict:
    """All options of a method, checked.  Raises ValueError, one sentence."""
    if name not in METHODS:
        raise ValueError(f"{FAIL}method must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    unknown = sorted(set(given) - set(method.options))
    missing = [n for n, default in method.options.items() if default is REQUIRED and n not in given]
    if unknown or missing:
        got = ", ".join(given) or "none"
        raise ValueError(f"{FAIL}{name} takes the options {_listed(method)}, got {got}")
    options = {
        option: given[option] if given.get(option) is not None else default(trained) if callable(default) else default
        for option, default in method.options.items()
    }
    if (sentence := method.check(options, trained)) is not None:
        raise ValueError(FAIL + sentence)
    return options


def _listed(method: Method) -> str:
    return ", ".join(n if default is REQUIRED else f"[{n}]" for n, default in method.options.items())
