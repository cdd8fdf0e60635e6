"""Plans of what layers keep, on a GPU: the same gradients under each, and the memory that was expected of it."""

import dataclasses
import gc

import pytest
import torch
import torch.nn.functional as F

import seal_ops
from seal_ops.bench.training_sizes import Size
from seal_ops.bench.training_steps import random_model
from seal_ops.huggingface.modes import mode
from seal_ops.ops.dispatch import has_cuda_kernels
from seal_ops.ops.launch_overrides import key_tiles, launched_as
from seal_ops.training.memory_plan.execution import ATTENTION, EVERYTHING, INPUT, OFFLOADED
from seal_ops.training.memory_plan.memory import begin_peak, requested
from seal_ops.training.memory_plan.planning import TILE, Planner
from seal_ops.training.memory_plan.simulation import expected

# Alone: what other processes hold on the card decides what a plan may use.
pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.alone]
LENGTH, LAYERS = 12_345, 4
SIZE = Size(1024, 3584, 8, 2, 32_000, LAYERS, ())
# name: what the layers keep from the first to the last, layers of a group, tokens of a tile
PLANS = {
    "attention": ((ATTENTION,) * LAYERS, 1, None),
    "mixed": ((ATTENTION, ATTENTION, EVERYTHING, EVERYTHING), 1, None),
    "input": ((INPUT,) * LAYERS, 1, None),
    "input in tiles": ((INPUT,) * LAYERS, 1, TILE),
    "attention in tiles": ((ATTENTION,) * LAYERS, 1, TILE),
    "offloaded": ((OFFLOADED,) * LAYERS, 1, TILE),
    "groups": ((INPUT,) * LAYERS, 2, TILE),
    "offloaded groups": ((OFFLOADED,) * LAYERS, 2, TILE),
}


@pytest.fixture(scope="module")
def planner():
    model = random_model(SIZE, LAYERS, LENGTH, torch.bfloat16, torch.device("cuda"))
    seal_ops.attach(model, "channel")
    with mode(model, True):
        found = Planner(model, LENGTH, 512)
        assert found.reason is None and found.measurement.rows_reason is None and found.measurement.tiled
        yield found


def step(planner, keeps, group, tile, length=LENGTH):
    """``(gradients, expected bytes, measured bytes)`` of one step; all layers' scales in one vector."""
    model = planner.model
    plan = dataclasses.replace(planner.uniform(False), keeps=keeps, group=group, tile=tile)
    ids = torch.randint(0, 32_000, (1, length), generator=torch.Generator().manual_seed(0)).cuda()
    positions = torch.arange(length - 513, length - 1)
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with planner.running(plan) as run:
        logits = run.logits_at(model, positions, input_ids=ids, use_cache=False)
        F.cross_entropy(logits.float()[0], ids[0, positions + 1]).backward()
    del logits
    measured = torch.cuda.max_memory_allocated() - before
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return gradients, expected(planner.measurement.costs(tile), keeps, group, planner.trained).peak, measured


@pytest.mark.parametrize("name", PLANS)
def test_gradients_and_memory_of_a_plan(planner, name):
    plain, _, most = step(planner, (EVERYTHING,) * LAYERS, 1, None)
    found, wanted, measured = step(planner, *PLANS[name])
    assert (found - plain).norm() <= 0.02 * plain.norm() and found.isfinite().all()
    assert measured < most, "a plan that keeps less takes less"
    costs, samples = planner.measurement.costs(PLANS[name][2]), planner.measurement._taken[PLANS[name][2], False]
    seen = f"before {costs.before:,}, head {costs.head:,} from {[(s.before, s.head) for s in samples]}"
    assert 0.9 * measured <= wanted <= 1.25 * measured, f"expected {wanted:,}, measured {measured:,}; {seen}"


@pytest.mark.skipif(not has_cuda_kernels(), reason="needs the CUDA kernels, whose launch depends on the length")
def test_short_samples_take_the_workspace_of_real_rows():
    """Bytes of the attention's backward at a quarter of the length, times four; and the peak that follows, of 2 layers
    of 8B at 8,192 tokens, of which samples launched as short rows expected too little."""
    device, real, heads, kv_heads, head_dim = torch.device("cuda"), 8192, 32, 8, 128

    def taken(length):
        shapes = ((heads,), (kv_heads,), (kv_heads,))
        q, k, v = (torch.randn(1, length, *h, head_dim, device=device, dtype=torch.bfloat16) for h in shapes)
        scale = torch.ones(heads, head_dim, device=device)
        out, lse = torch.ops.seal.attention(q, k, v, scale)
        call = {"scale": scale, "needs": [True, True, True, True, False, False, False], "backend": "cuda"}
        grad_out = torch.ones_like(out)
        begin_peak(device)
        before = requested(device)
        result = torch.ops.seal.attention_backward(grad_out, None, q, k, v, out, lse, **call)
        most = requested(device, peak=True) - before
        del result
        return most

    tiles = [key_tiles(n, head_dim, 1, False) for n in (real // 4, real)]
    with launched_as(*tiles, device):
        short = taken(real // 4)
    assert abs(4 * short - taken(real)) < 0.01 * taken(real), "as the real rows"
    assert taken(real // 4) > 1.05 * short, "by itself a short row takes more"

    model = random_model(Size(4096, 14336, heads, kv_heads, 32_000, 2, ()), 2, real, torch.bfloat16, device)
    seal_ops.attach(model, "channel")
    with mode(model, True):
        planner = Planner(model, real, 512)
        for keeps, tile in (((EVERYTHING,) * 2, None), ((ATTENTION,) * 2, None)):
            _, wanted, measured = step(planner, keeps, 1, tile, real)
            assert 0.95 * measured <= wanted <= 1.1 * measured, f"{keeps}: expected {wanted:,}, measured {measured:,}"


def test_a_plan_fits_what_it_was_given(planner):
    """Down to a fifth of what everything takes, the plan holds its promise."""
    keeps = (EVERYTHING,) * LAYERS
    everything = expected(planner.measurement.costs(None, plain=True), keeps, 1, planner.trained).peak
    for share in (1.0, 0.7, 0.5, 0.35, 0.2):
        plan = planner.plan(round(share * everything))
        if plan.fits:
            _, wanted, measured = step(planner, plan.keeps, plan.group, plan.tile)
            assert measured <= 1.1 * share * everything, f"{share}: {plan.summary()}, measured {measured:,}"
    assert plan.keeps != keeps
