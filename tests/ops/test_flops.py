"""PyTorch's flop counter counts the ops as it counts SDPA."""

import subprocess
import sys

import pytest
import torch
from families import FAMILIES, tokens
from installed import environment
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import seal_ops

aten = torch.ops.aten

LLAMA = FAMILIES["llama"]


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def inputs(*shape, kv_heads=2):
    *rows, heads, width = shape
    make = lambda h: torch.randn(*rows, h, width, requires_grad=True)
    return make(heads), make(kv_heads), make(kv_heads)


def sdpa(q, k, v):
    """What PyTorch says of its own attention (on a GPU; the op of its CPU has a formula since torch 2.14 or 2.15 only),
    forward and backward. Torch 2.11 says it of as many heads of keys as of queries only."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (
        flop_registry[aten._scaled_dot_product_flash_attention](q, k, v, 0.0, True),
        flop_registry[aten._scaled_dot_product_flash_attention_backward](q, q, k, v),
    )


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 4}])
def test_attention_counts_as_sdpa_forward_and_backward_whatever_the_mask(options):
    q, k, v = inputs(2, 24, 4, 16)
    scale = torch.ones(4, 16, requires_grad=True)
    forward, backward = sdpa(q, k, v)
    assert (forward, backward) == (2 * 2 * 4 * 24 * 24 * 16 * 2, 5 * 2 * 4 * 24 * 24 * 16 * 2)
    assert counted(lambda: seal_ops.attention(q, k, v, scale=scale, **options)) == forward
    assert counted(lambda: seal_ops.attention(q, k, v, scale=scale, **options).sum().backward()) == forward + backward


def test_rope_attention_counts_the_same(backend, device):
    q, k, v = (t.to(device, torch.float16 if backend == "cuda" else t.dtype) for t in inputs(1, 16, 4, 16))
    cos, sin = (t.to(device) for t in seal_ops.rope_tables(16, *seal_ops.rope_frequencies(16)))
    run = lambda: seal_ops.rope_attention(q, k, v, cos, sin, backend=backend)
    assert counted(run) == 2 * (4 * 16 * 16 * 16 * 2)
    assert counted(lambda: run().sum().backward()) == 7 * (4 * 16 * 16 * 16 * 2)
    assert counted(lambda: seal_ops.rope(q, k, cos, sin, backend=backend)) == 0, "no matrix product"


def test_packed_sequences_count_each_by_itself_as_flash_attention_does():
    q, k, v = inputs(20, 4, 16)
    whole_k, whole_v = (t.repeat_interleave(2, 1) for t in (k, v))  # as torch 2.11 counts
    starts = torch.tensor([0, 5, 20], dtype=torch.int32)
    run = lambda: seal_ops.attention(q, k, v, cu_seqlens=starts, max_seqlen=15).sum().backward()
    assert counted(run) == 7 * (4 * (5 * 5 + 15 * 15) * 16 * 2)
    assert flop_registry[torch.ops.seal.attention](q, k, v, None, None, starts) == (
        flop_registry[aten._flash_attention_forward](q, whole_k, whole_v, starts, starts, 15, 15, 0.0, True, False)
    )
    longer, keys = (torch.randn(24, 2, 16, requires_grad=True) for _ in "kv"), starts + torch.tensor([0, 2, 4])
    run = lambda: seal_ops.attention(q, *longer, cu_seqlens=starts, cu_seqlens_k=keys.int(), causal=False)
    assert counted(lambda: run().sum().backward()) == 7 * (4 * (5 * 7 + 15 * 17) * 16 * 2)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:  # lengths that nobody knows
        made = [fake.from_tensor(t.detach()) for t in (q, k, v, starts)]
        got = counted(lambda: torch.ops.seal.attention(*made[:3], None, None, made[3], max_seqlen=15))
    assert got == 2 * (2 * 4 * 15 * 15 * 16 * 2)


def test_a_model_counts_the_same_with_scales_and_without():
    model, ids = LLAMA.build(), tokens(2, 21)

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()

    q, k, v = (torch.randn(2, 21, heads, LLAMA.head_dim, requires_grad=True) for heads in (4, 2, 2))
    attention = sum(sdpa(q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    on_cpu = counted(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward())
    assert on_cpu in (0, attention), "what PyTorch counts of its attention on the CPU: nothing up to torch 2.13"
    model.set_attn_implementation("sdpa")
    plain = counted(step)
    seal_ops.attach(model, "channel")
    model.requires_grad_(True)
    assert counted(step) - plain == model.config.num_hidden_layers * (attention - on_cpu)


@pytest.mark.parametrize("first", ["seal_ops", "torch.utils.flop_counter"])
def test_whichever_is_imported_first_and_importing_us_imports_no_counter(first):
    script = (
        f"import sys, {first}\nwas = 'torch.utils.flop_counter' in sys.modules, 'triton' in sys.modules\n"
        "import seal_ops, torch, torch.utils.flop_counter as counter\n"
        "q = torch.randn(1, 8, 2, 16)\n"
        "with counter.FlopCounterMode(display=False) as found: torch.ops.seal.attention(q, q, q)\n"
        "print(*was, found.get_total_flops(), sum('_WhenImported' in str(f) for f in sys.meta_path))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    counter = first != "seal_ops"
    assert done.stdout.split()[0] == str(counter) and (counter or done.stdout.split()[1] == "False"), done.stderr
    assert done.stdout.split()[2:] == [str(2 * (2 * 8 * 8 * 16 * 2)), "0"]
