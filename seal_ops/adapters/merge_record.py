"""Which scales are part of a model's weights already: a field of its config, so that they are never applied twice.

A merged model looks like any other.  The field survives ``save_pretrained`` and ``from_pretrained``, and other programs
pass over it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from ..huggingface.identity import MERGED
from .files import ScalesConfig, shown

# A model with pictures may be loaded as the language model in it, whose config is this part.
_TEXT_PART = "text_config"


def digest(config: ScalesConfig, values: Mapping[int, Tensor]) -> str | None:
    """32 hexadecimal digits that name what scales compute; None where that is nothing, all being 1.

    A head's scale has the digest of channels that all have it, and a layer of ones that of a layer without.
    """
    facts = hashlib.sha256()
    multiplies = False
    for layer, heads, head_dim in sorted(zip(config.layers, config.num_heads, config.head_dim)):
        scale = values[layer].detach().to("cpu", torch.float32).reshape(heads, -1).expand(heads, head_dim)
        if bool((scale == 1).all()):
            continue
        multiplies = True
        facts.update(json.dumps([layer, heads, head_dim]).encode() + b"\n")
        # -0.0 and 0.0 multiply alike.
        facts.update(memoryview((scale + 0.0).contiguous().numpy()).cast("B"))
    return facts.hexdigest()[:32] if multiplies else None


def merged_into(model_config) -> list[str]:
    """The digests in a config, an object of transformers or the content of its file; ValueError for another thing."""
    found: list[str] = []
    for part in (model_config, _get(model_config, _TEXT_PART)):
        digests = _get(part, MERGED)
        if digests is None:
            continue
        if not isinstance(digests, list) or not all(isinstance(one, str) for one in digests):
            raise ValueError(f"seal_ops: {MERGED} of the model's config must be a list of texts, got {shown(digests)}")
        found += [one for one in digests if one not in found]
    return found


def check_not_merged(model_config, config: ScalesConfig, values: Mapping[int, Tensor], what: str, call: str) -> None:
    """ValueError in the name of ``call`` where scales, named by ``what``, are in the model's weights already."""
    name = digest(config, values)
    if name is not None and name in merged_into(model_config):
        raise ValueError(
            f"seal_ops.{call}: {what} must not be part of the model's weights already, got scales that were merged "
            f"into this model (its config says so in {MERGED}) and would be applied twice; use the model before the "
            f"merge, or delete the field where the weights are the old ones again"
        )


def record(model_config, config: ScalesConfig, values: Mapping[int, Tensor]) -> bool:
    """Writes into a config that scales are part of the weights from now on; whether there was anything to write."""
    name = digest(config, values)
    if name is None:
        return False
    digests = [*merged_into(model_config), name]
    _set(model_config, digests)
    text = _get(model_config, _TEXT_PART)
    if text is not None and text is not model_config:
        _set(text, list(digests))
    return True


def _get(part, name: str):
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)


def _set(part, digests: list[str]) -> None:
    if isinstance(part, MutableMapping):
        part[MERGED] = digests
    else:
        setattr(part, MERGED, digests)
