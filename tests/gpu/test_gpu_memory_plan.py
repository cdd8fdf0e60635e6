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
from seal_ops.training.memory_plan.execution import ATTENTION, EVERYTHING, INPUT, OFFLOADED
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


def step(planner, keeps, group, tile):
    """``(gradients, expected bytes, measured bytes)`` of one step; all layers' scales in one vector."""
    model = planner.model
    plan = dataclasses.replace(planner.uniform(False), keeps=keeps, group=group, tile=tile)
    ids = torch.randint(0, 32_000, (1, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()
    positions = torch.arange(LENGTH - 513, LENGTH - 1)
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
    assert 0.9 * measured <= wanted <= 1.25 * measured, f"expected {wanted:,}, measured {measured:,}"


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
