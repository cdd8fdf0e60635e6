"""How others compute it: torch's SDPA and FlexAttention, FlashAttention-3, Hugging Face's rotary path, PEFT's (IA)³.

Each function here takes q [B, S, H, D], k, v [B, S, Hkv, D] and returns out [B, S, H, D], causal, as their own users
call them.
"""

from __future__ import annotations

import ctypes
import glob
import lzma
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops.masks import UNBOUNDED
from ..ops.visibility import Visibility

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(backend: SDPBackend | None) -> Attention:
    """torch.nn.functional.scaled_dot_product_attention on one backend; None leaves the choice to torch. One query sees
    every key."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        options = dict(is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return run


def flex(
    seqlen: int,
    seen: Visibility,
    heads: int,
    device: torch.device,
    fresh: bool = False,
    kernel: str | None = None,
) -> Attention:
    """Compiled FlexAttention with its block mask made beforehand, or `fresh` in every call; `kernel` "FLASH" has
    FlashAttention-4 run it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    parts = seen.by_heads(heads)
    # What the mask does not have is left out, as a user would.
    last, shift_from = parts[-1][1], parts[-1][0].start if len(parts) > 1 else 0

    def sees(_b, h, i, j):
        found = i >= j
        if last.lower > -UNBOUNDED:
            found = found & (j - i >= last.lower)
        if last.chunk:
            shift = torch.where(h >= shift_from, last.shift, 0) if len(parts) > 1 else last.shift
            found = found & ((i + shift) // last.chunk == (j + shift) // last.chunk)
        return found | ((j < last.sinks) & (i >= j)) if last.sinks else found

    # Compiled mask creation: the eager one holds a boolean [S, S], 16 GiB at 128k.
    create = torch.compile(create_block_mask)
    make = lambda: create(sees, None, heads if len(parts) > 1 else None, seqlen, seqlen, device=device)
    blocks = None if fresh else make()
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {} if kernel is None else dict(kernel_options={"BACKEND": kernel})

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = q.shape[2] != k.shape[2]
        mask = make() if fresh else blocks
        found = compiled(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask, enable_gqa=gqa, **options)
        return found.transpose(1, 2)

    return run


def load_fa3(folder: str | None) -> str | None:
    """Registers torch.ops.flash_attn_3; returns None, or one sentence why it is not there.

    Looks for an installed `flash_attn_3` package first, then in `folder` for its library: `*.so` or `*.so.xz` and,
    where it needs another CUDA runtime than torch's, an `nvidia_cuda_runtime*.whl` beside it.
    """
    if hasattr(torch.ops.flash_attn_3, "fwd"):
        return None
    try:
        import flash_attn_3._C  # noqa: F401  registers the ops

        return None
    except ImportError:
        pass
    if folder is None:
        return "FlashAttention-3 is not installed and no --fa3 FOLDER with its library was given"
    libraries = sorted(glob.glob(os.path.join(folder, "*.so")) + glob.glob(os.path.join(folder, "*.so.xz")))
    if not libraries:
        return f"--fa3 must name a folder with FlashAttention-3's *.so or *.so.xz, got {folder}"
    unpacked = tempfile.mkdtemp(prefix="fa3-")
    try:
        for wheel in glob.glob(os.path.join(folder, "nvidia_cuda_runtime*.whl")):
            zipfile.ZipFile(wheel).extractall(unpacked)
        for runtime in glob.glob(os.path.join(unpacked, "**", "libcudart.so.*"), recursive=True):
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        library = libraries[0]
        if library.endswith(".xz"):
            library = os.path.join(unpacked, "fa3.so")
            with lzma.open(libraries[0]) as packed, open(library, "wb") as target:
                shutil.copyfileobj(packed, target)
        torch.ops.load_library(library)
    except OSError as reason:
        return f"FlashAttention-3's library in {folder} does not load: {str(reason).splitlines()[0]}"
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)  # a loaded library outlives its file
    return None


class _FlashAttention3(torch.autograd.Function):
    """Its two ops as its own interface calls them: GQA unpacked, one split, not deterministic."""

    @staticmethod
    def forward(ctx, q, k, v, window):
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            q, k, v, softmax_scale=q.shape[-1] ** -0.5, is_causal=True, window_size_left=window, num_splits=1
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        torch.ops.flash_attn_3.bwd(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            *grads,
            softmax_scale=q.shape[-1] ** -0.5,
            is_causal=True,
            window_size_left=ctx.window,
        )
        return *grads, None


def fa3(window: int | None) -> Attention:
    """FlashAttention-3 with its own backward; load_fa3 first."""
    left = -1 if window is None else window - 1
    return lambda q, k, v: _FlashAttention3.apply(q, k, v, left)


def missing_fa4() -> str | None:
    """One sentence why FlashAttention-4 (the package flash-attn-4) cannot be a peer; None where it can."""
    try:
        import flash_attn.cute  # noqa: F401
    except Exception as reason:  # its compiler's packages fail in their own ways
        return f"FlashAttention-4 is not installed (pip install flash-attn-4): {str(reason).splitlines()[0] if str(reason) else reason!r}"  # noqa: E501
    return None


def fa4(window: int | None) -> Attention:
    """FlashAttention-4 (CuTe DSL) with its own backward."""
    from flash_attn.cute import flash_attn_func

    sizes = (None, None) if window is None else (window - 1, 0)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=True, window_size=sizes)
        return found[0] if isinstance(found, tuple) else found

    return run


def fa3_decode(window: int | None) -> Attention:
    """FlashAttention-3 without gradients, packing of a group's heads and number of splits left to it; load_fa3
    first."""
    left = -1 if window is None else window - 1
    return lambda q, k, v: torch.ops.flash_attn_3.fwd(
        q, k, v, softmax_scale=q.shape[-1] ** -0.5, is_causal=True, window_size_left=left, num_splits=0
    )[0]


def hf_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Hugging Face's own rotary function on q, k [B, S, H, D]; cos, sin [1, S, D] in their dtype, both halves
    filled."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def hf_by_hand(attention: Attention) -> Callable[..., Tensor]:
    """What someone who writes SEAL by hand on Hugging Face runs: rotary, attention, a multiplication by the scale."""

    def run(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: Tensor) -> Tensor:
        q, k = hf_rotary(q, k, cos, sin)
        return attention(q, k, v) * scale

    return run


def peft_ia3(weight: Tensor, scale: Tensor) -> tuple[torch.nn.Module, torch.nn.Parameter]:
    """An `o_proj` with frozen `weight` [hidden, H * D] under PEFT's (IA)³, and its trainable vector, set to `scale` [H,
    D]."""
    import peft

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.o_proj = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")

        def forward(self, x: Tensor) -> Tensor:
            return self.o_proj(x)

    block = Block()
    block.o_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = peft.get_peft_model(block, peft.IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"])).to(
        weight.device
    )
    (vector,) = (p for n, p in model.named_parameters() if "ia3_l" in n)
    with torch.no_grad():
        vector.copy_(scale.reshape(vector.shape))
    return model, vector
