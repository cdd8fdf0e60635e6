"""The positions a model was made for."""

import warnings

from torch import nn

EXTENSION = "_seal_extension"  # where `seal_ops.extend` keeps what it did, in the model's __dict__


def extension_of(model: nn.Module):
    """The `Extension` that is on ``model`` or on the model inside its wrappers; None where there is none."""
    return next((m.__dict__[EXTENSION] for m in model.modules() if EXTENSION in m.__dict__), None)


def window(model: nn.Module) -> int | None:
    """The most positions that ``model`` is to read: what its extension reaches, else what its config speaks of.

    None where there is no bound, or the config names none.
    """
    extension = extension_of(model)
    return trained_length(model) if extension is None else extension.positions


def trained_length(model: nn.Module) -> int | None:
    """The most positions that the config of ``model`` speaks of; None where it names none.

    A scaled rotary embedding counts.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx"))
    most = next((number for number in found if isinstance(number, int) and number > 0), None)
    scaled = getattr(config, "rope_parameters", None) or {}
    if most is None or not isinstance(scaled.get("factor"), (int, float)):
        return most
    return max(most, int((scaled.get("original_max_position_embeddings") or most) * scaled["factor"]))


def warn_beyond_window(model: nn.Module, tokens: int, call: str) -> None:
    """Warns, in the name of ``call``, where ``tokens`` are more than the model was made for."""
    most = window(model)
    if most is not None and tokens > most:
        warnings.warn(
            f"{call}: {tokens} tokens are more than the {most} positions that the model's config speaks of; without an "
            f"extended rotary embedding (docs/context_extension.md) the model has not learned to read so far",
            stacklevel=3,
        )
