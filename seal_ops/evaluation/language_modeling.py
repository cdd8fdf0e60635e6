"""Perplexity of a model on a text: what a change of the model costs elsewhere."""

import math

import torch
import torch.nn.functional as F


@torch.inference_mode()
def perplexity(model, tokenizer, text: str, *, window: int = 2048, most: int | None = None) -> dict:
    """``{"perplexity", "nats", "tokens", "window_nats"}`` of ``text``, read in windows that do not overlap.

    Every token of a window but its first is predicted from those before it.  ``nats`` is the mean loss of a token, and
    ``window_nats`` each window's, so that two models can be compared window by window.  ``most``: read only so many.

    Raises:
        ValueError: the text is shorter than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // window
    if count < 1 or window < 2:
        raise ValueError(f"perplexity: text must hold at least one window of {window} tokens, got {len(ids)} tokens")
    count = count if most is None else min(count, most)
    losses = []
    for start in range(0, count * window, window):
        row = torch.tensor([ids[start : start + window]], device=model.device)
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, row[0, 1:]).item())
    mean = sum(losses) / count
    return {
        "perplexity": math.exp(mean), "nats": mean, "tokens": count * (window - 1),
        "window_nats": [round(loss, 5) for loss in losses],
    }  # fmt: skip
