"""Methods of `seal_ops.extend` side by side on one model: how far each reaches, and perplexity by length."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..evaluation.language_modeling import perplexity
from ..huggingface.context_extension.extending import extend, unextend
from ..huggingface.context_extension.methods import METHODS
from ..huggingface.context_window import trained_length

BASE = "none"


def suggested(trained: int, longest: int) -> list[tuple[str, dict]]:
    """Every method that needs no fine-tuning, with options that reach ``longest`` tokens.

    Raises ValueError for a length that the model was trained on.
    """
    if longest <= trained:
        raise ValueError(f"seal_ops.extend: lengths must go beyond the trained length {trained}, got {longest}")
    factor, window = longest / trained, max(1, trained // 4)
    group = -(-(longest - window) // (trained - window))
    own = {"self_extend": dict(group=group, window=window)}
    return [
        (name, own.get(name, dict(factor=factor) if "factor" in method.options else {}))
        for name, method in METHODS.items()
        if name != "giraffe" and method.positions
    ]


def compare_extensions(
    model,
    tokenizer,
    methods: Sequence[tuple[str, dict]],
    text: str | None = None,
    lengths: Sequence[int] = (),
    *,
    windows: int | None = None,
    log: Callable[[str], None] = print,
) -> list[dict]:
    """One row for the plain model and one for each method: ``{"method", "options", "positions", "layers", "refused",
    "perplexity", "seconds"}``, the last two by length.

    ``methods``: names of `seal_ops.extend` with options. ``windows``: read at most so many windows at each length.
    A method that the model cannot take has its sentence under ``refused``. The model is as it was afterwards.
    """
    rows = []
    for method, options in [(BASE, {}), *methods]:
        row = {"method": method, "options": options, "positions": trained_length(model), "layers": 0, "refused": None}
        rows.append(row)
        if method != BASE:
            try:
                extension = extend(model, method, **options)
            except ValueError as error:
                row["refused"], row["positions"] = str(error).removeprefix("seal_ops.extend: "), None
                log(f"{method}: {row['refused']}")
                continue
            row |= {"options": extension.options, "positions": extension.positions, "layers": extension.layers}
        try:
            row |= {"perplexity": {}, "seconds": {}}
            for length in lengths if text is not None else ():
                started = time.monotonic()
                found = perplexity(model, tokenizer, text, window=length, most=windows)
                row["perplexity"][length], row["seconds"][length] = found["perplexity"], time.monotonic() - started
                log(f"{method}, {length} tokens: perplexity {found['perplexity']:.3f}")
        finally:
            if method != BASE:
                unextend(model)
    return rows
