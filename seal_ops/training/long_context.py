"""LongLoRA and SinkLoRA: a model learns a longer context cheaply, and runs with full attention afterwards.

While training, attention is cut into groups, moved by half of one in some heads (S²-Attn; with sinks SF-Attn), or left
in full, which is what both are held against. What learns is LoRA on the attention's projections, the embeddings and the
norms, on positions of the longer context.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings

import torch
from torch import nn

from ..huggingface.context_extension.extending import extend
from ..huggingface.context_window import extension_of, trained_length
from ..huggingface.discovery import find_attention_layers
from ..huggingface.patch import TRAINING, Patch, patch_on
from ..huggingface.projection import is_linear
from ..huggingface.wrappers import unwrapped
from ..ops import masks

CALL = "seal_ops.train"
FULL_ATTENTION = "full_attention"
RECIPES = {
    "longlora": dict(shifted_heads=0.5, sinks=0),
    "sinklora": dict(shifted_heads=0.25, sinks=4),
    FULL_ATTENTION: dict(shifted_heads=0.0, sinks=0),
}
GROUPING = ("group", "shifted_heads", "sinks")  # options of the first two alone
LEARNING_RATE = 2e-5  # LongLoRA's


@dataclasses.dataclass(frozen=True)
class LongContextRecipe:
    """LongLoRA (arXiv 2309.12307) and SinkLoRA (2406.05678), by their options; and the same with full attention.

    Attributes:
        name: "longlora", "sinklora" or "full_attention".
        length: tokens of the longer context.
        group: tokens of an attention group while training (default: a quarter of the length).
        shifted_heads: share of the heads whose groups are moved by half of one, rounded to whole groups of query heads
            that share a key/value head, at least one and not all.
        sinks: first tokens that every query sees while training.
        positions: method of `seal_ops.extend` with which a model that is not extended yet reads ``length`` tokens.
        rank, alpha: LoRA's.
    """

    name: str
    length: int
    group: int
    shifted_heads: float
    sinks: int
    positions: str = "linear"
    rank: int = 8
    alpha: int = 16


def recipe_of(name: str, options: dict) -> LongContextRecipe:
    """The recipe with these options.  Raises ValueError, one sentence."""
    if name not in RECIPES:
        raise ValueError(f"{CALL}: recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    known = [field.name for field in dataclasses.fields(LongContextRecipe)][1:]
    if name == FULL_ATTENTION:
        known = [option for option in known if option not in GROUPING]
    if set(options) - set(known) or "length" not in options:
        raise ValueError(
            f"{CALL}: recipe_options must be length and any of {', '.join(known[1:])}, got {list(options)}"
        )
    options = RECIPES[name] | options
    for option, least in (("length", 2), ("group", 1), ("sinks", 0), ("rank", 1), ("alpha", 1)):
        value = options.get(option)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{CALL}: {option} must be an integer of at least {least}, got {value!r}")
    if name == FULL_ATTENTION:
        options["group"] = options["length"]
    options["group"] = options.get("group") or max(1, options["length"] // 4)
    if options["group"] > options["length"]:
        raise ValueError(f"{CALL}: group must be at most the length {options['length']}, got {options['group']}")
    if name != FULL_ATTENTION and not 0 < options["shifted_heads"] < 1:
        raise ValueError(f"{CALL}: shifted_heads must be a share above 0 and below 1, got {options['shifted_heads']}")
    if options.get("positions", "linear") not in ("linear", "ntk", "yarn"):
        raise ValueError(f"{CALL}: positions must be linear, ntk or yarn, got {options['positions']!r}")
    return LongContextRecipe(name, **options)


def prepare(model: nn.Module, recipe: LongContextRecipe, seed: int):
    """``(adapted, patch)``: a PEFT model round ``model`` with what the recipe trains, and the patch for its masks.

    ``model``'s frequencies are extended where they do not reach the recipe's length.  Raises ValueError, one sentence,
    for a model with scales or adapters, one whose attention the masks do not reach, or where PEFT is not installed.
    """
    owner = unwrapped(model, "train")
    if owner is not model or hasattr(owner, "seal_scales"):
        raise ValueError(f"{CALL}: model must be a plain one for a recipe, got one with scales or adapters")
    try:
        import peft
    except ImportError:
        raise ImportError(f"{CALL}: recipe needs the package peft, which is not installed (pip install peft)") from None
    patch = patch_on(owner) or Patch(owner, _layers(owner))
    shifted = [_share(recipe, layer) for layer in patch.layers]
    linear = {
        name.rpartition(".")[2] for layer in patch.layers for name, m in layer.module.named_modules() if is_linear(m)
    }
    trained = trained_length(owner)
    if trained is None:
        raise ValueError(f"{CALL}: model must have a config that names its positions, {type(owner).__name__} has not")
    if recipe.length > trained and extension_of(owner) is None:
        extend(owner, recipe.positions, factor=recipe.length / trained)
    for layer, share in zip(patch.layers, shifted):
        layer.training_mask = None if share is None else masks.shifted_groups(recipe.group, share, recipe.sinks)
    config = dict(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=sorted(linear), modules_to_save=_whole(owner))
    if getattr(owner.config.get_text_config(), "tie_word_embeddings", False):
        if "ensure_weight_tying" not in inspect.signature(peft.LoraConfig).parameters:
            raise ValueError(f"{CALL}: recipe on a model with tied embeddings needs a PEFT with ensure_weight_tying")
        config["ensure_weight_tying"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(owner, peft.LoraConfig(**config)), patch


def _layers(model: nn.Module):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return find_attention_layers(model)
    except ValueError as error:
        raise ValueError(str(error).replace("seal_ops.attach: ", f"{CALL}: ", 1)) from error


def _share(recipe: LongContextRecipe, layer) -> float | None:
    """The share of a layer's query heads that are moved; None for a layer that keeps its own attention."""
    if layer.windowed or recipe.name == FULL_ATTENTION:
        return None
    name = type(layer.module).__name__
    if layer.composed is not None:
        raise ValueError(f"{CALL}: recipe needs attention that runs in the fused ops, {name} has {layer.composed}")
    if layer.program is not None:
        raise ValueError(f"{CALL}: recipe needs a model without a position program; call seal_ops.unextend first")
    if layer.num_kv_heads < 2:
        raise ValueError(f"{CALL}: recipe needs at least 2 key/value heads, of which some are moved, {name} has 1")
    moved = min(max(1, round(recipe.shifted_heads * layer.num_kv_heads)), layer.num_kv_heads - 1)
    return moved / layer.num_kv_heads


def _whole(model: nn.Module) -> list[str]:
    """The names of the embeddings and norms, whose weights train as they are."""
    embeddings = model.get_input_embeddings()
    norms = lambda m: "norm" in type(m).__name__.lower() and any(True for _ in m.parameters(recurse=False))
    found = {name.rpartition(".")[2] for name, m in model.named_modules() if m is embeddings or norms(m)}
    return sorted(found)


@contextlib.contextmanager
def training_masks(patch: Patch):
    """Inside, layers in training mode attend under their recipe's masks; afterwards the model's own attention."""
    patch.install(TRAINING)
    try:
        yield
    finally:
        for layer in patch.layers:
            layer.training_mask = None
        patch.remove(TRAINING)
