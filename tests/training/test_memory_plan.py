"""The plan of what layers keep: the same gradients under every plan, and the memory that was expected of it."""

import dataclasses
import gc
import json
import pathlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, randomise, tokens
from retrieval_fixtures import one_thread  # noqa: F401

import seal_ops
from seal_ops.huggingface.logits import logits_at
from seal_ops.huggingface.modes import mode
from seal_ops.training.memory_plan import memory
from seal_ops.training.memory_plan.execution import ATTENTION, EVERYTHING, INPUT, OFFLOADED
from seal_ops.training.memory_plan.live_bytes import LiveBytes, Saved
from seal_ops.training.memory_plan.operations import operations_of
from seal_ops.training.memory_plan.planning import Planner
from seal_ops.training.memory_plan.short_samples import Growth
from seal_ops.training.memory_plan.simulation import expected, seconds

ROOT = pathlib.Path(__file__).parents[2]
POSITIONS = torch.tensor([3, 11, 12, 18])


def scaled(family="llama", dtype=torch.float32, **overrides):
    lm = FAMILIES[family].build(dtype, **overrides).requires_grad_(False)
    randomise(seal_ops.attach(lm, "channel"))
    return lm


def batch(length=21):
    """Two rows, one of them padded."""
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def gradients(lm, run, positions=POSITIONS, **inputs):
    """The loss at some positions and the gradients of all that is trained."""
    lm.zero_grad(set_to_none=True)
    logits = run(lm, positions, **(inputs or batch()))
    loss = F.cross_entropy(logits.float().flatten(0, 1), torch.arange(logits.shape[:2].numel()) % 97)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in lm.parameters() if p.requires_grad)]


def run_as(planner, keeps, **rest):
    """A context for a plan that is given."""
    return planner.running(dataclasses.replace(planner.uniform(False), keeps=keeps, **rest))


def planner_of(lm, length=21, labels=4, rows=2):
    with mode(lm, True):
        return Planner(lm, length, labels, rows)


PLANS = {
    "attention": dict(keeps=ATTENTION),
    "input": dict(keeps=INPUT),
    "offloaded": dict(keeps=OFFLOADED),
    "groups of two": dict(keeps=INPUT, group=2),
    "offloaded groups of three": dict(keeps=OFFLOADED, group=3),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mistral", "mixtral"])
def test_every_plan_gives_the_same_bits(family):
    lm = scaled(family)
    planner, layers = planner_of(lm), len(lm.model.layers)
    assert planner.reason is None and planner.measurement.rows_reason is None
    with mode(lm, True):
        with run_as(planner, (EVERYTHING,) * layers) as run:
            plain = gradients(lm, run.logits_at)
        for name, plan in PLANS.items():
            with run_as(planner, (plan["keeps"],) * layers, group=plan.get("group", 1)) as run:
                found = gradients(lm, run.logits_at)
            assert all(torch.equal(one, other) for one, other in zip(plain, found)), name
        with run_as(planner, (INPUT,) + (ATTENTION,) * (layers - 2) + (EVERYTHING,)) as run:
            assert all(torch.equal(one, other) for one, other in zip(plain, gradients(lm, run.logits_at)))
    assert not any("forward" in module.__dict__ for module in lm.modules()), "the model is left as it was"


@pytest.mark.parametrize("family", ["llama", "llama-mqa-head_dim-32", "qwen2", "qwen3", "gemma2", "phi3", "cohere"])
def test_cut_last_layer_and_tiles_give_the_plain_gradients(family):
    """Against the model as transformers runs it; apart by the rounding of products of other sizes."""
    lm = scaled(family)
    planner, layers = planner_of(lm), len(lm.model.layers)
    tiled = planner.measurement.tiled
    assert planner.measurement.rows_reason is None or family == "cohere"
    assert {type(m) for m in tiled} >= {type(lm.model.layers[0].mlp), type(lm.model.layers[0].input_layernorm)}
    with mode(lm, True):
        plain = gradients(lm, logits_at)
        for what in (EVERYTHING, INPUT, ATTENTION):
            with run_as(planner, (what,) * layers, tile=8) as run, LiveBytes() as live:
                shapes = []
                hook = lm.lm_head.register_forward_pre_hook(lambda _m, x: shapes.append(tuple(x[0].shape[:2])))
                found = gradients(lm, run.logits_at)
                hook.remove()
            assert shapes == [(2, 4)] and live.peak > 0
            for one, other in zip(plain, found):
                torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6 * one.abs().max().item())


def test_tiles_let_go_of_each_layers_input_in_the_backward_pass():
    """Not only when the whole graph is gone, which a loss that is still there keeps alive."""
    lm = scaled(num_hidden_layers=6)
    planner = planner_of(lm)
    with mode(lm, True), run_as(planner, (INPUT,) * 6, tile=8) as run, LiveBytes() as live:
        loss = run.logits_at(lm, torch.tensor(POSITIONS), **batch()).square().sum()
        kept = live.live
        loss.backward()
        gradients_alone = sum(p.grad.nbytes for p in lm.parameters() if p.grad is not None)
        states = batch()["input_ids"].numel() * lm.config.hidden_size * 4
        assert kept > 5 * states and live.live < gradients_alone + states
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_tiles_go_over_all_rows():
    """Short rows of a large batch are as many tokens as one long row."""
    lm = scaled()
    shapes, planner = [], planner_of(lm, length=21, rows=4)
    hook = lm.model.layers[0].mlp.register_forward_pre_hook(lambda _m, x: shapes.append(tuple(x[0].shape[:2])))
    with mode(lm, True), run_as(planner, (INPUT,) * 2, tile=64) as run:
        found = gradients(lm, run.logits_at, input_ids=tokens(4, 21), use_cache=False)
        hook.remove()
    assert shapes[0] == (4, 21), "hooks lie outside"
    with mode(lm, True):
        plain = gradients(lm, logits_at, input_ids=tokens(4, 21), use_cache=False)
    for one, other in zip(plain, found):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6 * one.abs().max().item())


def test_cut_last_layer_and_tiles_with_adapters_of_another_library():
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    lm = peft.get_peft_model(
        FAMILIES["qwen2"].build(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    planner = planner_of(lm)
    assert planner.reason is None and planner.measurement.rows_reason is None and planner.measurement.tiled
    with mode(lm, True):
        plain = gradients(lm, logits_at)
        with run_as(planner, (INPUT, ATTENTION), tile=5) as run:
            found = gradients(lm, run.logits_at)
    assert len(found) == 1 + 2 * 2 * len(targets)
    for one, other in zip(plain, found):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def test_labels_in_most_rows_leave_the_last_layer_whole():
    lm = scaled()
    planner = planner_of(lm, labels=20)
    assert not planner.uniform(False).cuts_last_layer
    with mode(lm, True), run_as(planner, (EVERYTHING,) * 2) as run:
        every = torch.arange(20)
        assert all(map(torch.equal, gradients(lm, run.logits_at, every), gradients(lm, logits_at, every)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_expected_peak_is_the_measured_one(dtype):
    """Bytes alive at most in a step, counted operation by operation, beside what short samples have told."""
    lm = scaled("llama", dtype, num_hidden_layers=6, max_position_embeddings=512)
    planner = planner_of(lm, 128, 20)
    ids = tokens(2, 128)
    plans = [
        (0.03, (EVERYTHING,) * 6, 1, None),
        (0.02, (ATTENTION,) * 6, 1, None),
        (0.02, (INPUT,) * 6, 1, None),
        (0.02, (ATTENTION,) * 3 + (EVERYTHING,) * 3, 1, None),
        (0.15, (INPUT,) * 6, 3, None),  # an upper bound: where a group is recomputed, not everything lives at once
        (0.05, (ATTENTION,) * 6, 1, 32),
        (0.05, (INPUT,) * 6, 1, 100),
        (0.03, (EVERYTHING,) * 6, 1, 1000),
        (0.3, (ATTENTION,) * 6, 1, 4),  # an upper bound: so many tiles that the samples have fewer
    ]
    for margin, keeps, group, tile in plans:
        told = expected(planner.measurement.costs(tile), keeps, group, planner.trained)
        with mode(lm, True), run_as(planner, keeps, group=group, tile=tile) as run, LiveBytes() as live:
            gradients(lm, run.logits_at, torch.arange(108, 128), input_ids=ids, use_cache=False)
        assert live.peak * 0.99 <= told.peak <= live.peak * (1 + margin), (keeps, group, tile, told.peak, live.peak)


def test_what_a_library_makes_at_its_first_product_is_no_cost_of_a_length():
    """As cuBLAS makes a workspace for the thread of the backward pass: the first sample alone would hold it."""
    workspaces = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if not workspaces:
                workspaces.append(torch.empty(1 << 20))
            return gradient.clone()

    class Activation(torch.nn.Module):
        def forward(self, x):
            return Product.apply(x)

    def told(made):
        workspaces[:] = made
        lm = scaled("llama", num_hidden_layers=2, max_position_embeddings=512)
        for layer in lm.model.layers:
            layer.mlp.act_fn = Activation()
        return planner_of(lm, 256, 40).measurement.costs(None)

    assert told([]) == told([torch.empty(1)]), "with the workspace to be made, and with one that is there"


def test_what_lies_in_reference_cycles_is_freed_before_the_samples_and_not_within():
    """A GPU's allocator counts for the whole process: an old model that goes in the middle of a sample would show."""
    lm = scaled("llama", num_hidden_layers=2, max_position_embeddings=512)
    with mode(lm, True):
        planner, collections, alive = Planner(lm, 128, 20, 2), [], []

        class Old:
            pass

        hook = lm.model.layers[0].register_forward_pre_hook(lambda *_: alive.append(gone() is not None))
        threshold = gc.get_threshold()
        gc.disable()  # so that nobody else collects before
        try:
            old = Old()
            old.itself, gone = old, weakref.ref(old)
            del old
            planner.measurement.costs(None)
            assert len(alive) >= 5 and not any(alive) and not gc.isenabled()
            gc.enable()
            gc.set_threshold(1, 1, 1)
            gc.callbacks.append(lambda phase, _: collections.append(len(alive)))
            before = len(alive)
            planner.measurement.costs(32)
            gc.callbacks.pop()
        finally:
            gc.enable()
            gc.set_threshold(*threshold)
            hook.remove()
    assert len(alive) > before and not [count for count in collections if before < count < len(alive)]


@pytest.mark.parametrize("tile", [None, 32])
def test_a_plan_leaves_no_tensor_behind(tile):
    lm = scaled("llama", num_hidden_layers=3, max_position_embeddings=512)
    with LiveBytes() as live, mode(lm, True):
        planner = Planner(lm, 128, 20, 2)
        assert planner.measurement.rows is not None
        planner.measurement.costs(tile)
        with run_as(planner, (INPUT,) * 3, tile=tile) as run:
            found = gradients(lm, run.logits_at, torch.arange(108, 128), input_ids=tokens(2, 128), use_cache=False)
        lm.zero_grad(set_to_none=True)
        del planner, run, found
        gc.collect()
        assert live.peak > 0 and live.live == 0


def test_the_bytes_that_layers_keep_are_those_that_autograd_saves():
    lm = scaled("llama", num_hidden_layers=4, max_position_embeddings=512)
    planner = planner_of(lm, 256, 16)
    with mode(lm, True), run_as(planner, (EVERYTHING,) * 4) as run:
        inputs = {"input_ids": tokens(2, 256), "use_cache": False}
        given, before = [*lm.parameters(), *lm.buffers()], {}

        def note(layer, args, kwargs):
            before["given"] = [args[0], *kwargs["position_embeddings"], *given]
            before.setdefault("first", Saved(before["given"])).__enter__()

        hooks = [lm.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)]
        hooks.append(lm.model.layers[-1].register_forward_hook(lambda *_: before["first"].__exit__(None, None, None)))
        logits = run.logits_at(lm, torch.arange(240, 256), **inputs)
        for hook in hooks:
            hook.remove()
        assert logits.requires_grad
    told = expected(planner.measurement.costs(None), (EVERYTHING,) * 4, 1, planner.trained)
    assert told.kept == pytest.approx(before["first"].bytes, rel=0.01)


def test_nothing_is_kept_or_differentiated_below_the_first_scale():
    lm = scaled("llama", num_hidden_layers=4)
    for layer in (0, 1):
        lm.seal_scales.layers[str(layer)].scale.requires_grad_(False)
    planner = planner_of(lm)
    costs = planner.measurement.costs(None)
    assert [c.differentiates for c in costs.layers] == [False, False, True, True]
    assert [c.kept > 0 for c in costs.layers] == [False, False, True, True]
    needs = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.seal.attention_backward.default:
                needs.append(list(kwargs["needs"]))
            return func(*args, **(kwargs or {}))

    for what in (EVERYTHING, ATTENTION, INPUT):
        needs.clear()
        with mode(lm, True), run_as(planner, (what,) * 4) as run, Watch():
            gradients(lm, run.logits_at)
        assert needs[0][:4] == [True] * 4, "the last layer"
        assert len(needs) == 2 and needs[1][:4] == [False, False, False, True], "the first scale's"


# ------------------------------------------------------------------------------------------------------- choosing


def test_less_memory_keeps_less_and_the_plan_says_what():
    lm = scaled("llama", num_hidden_layers=6, max_position_embeddings=512)
    whole = seal_ops.plan(lm, 128, 2, labels=16)
    assert whole.keeps == (EVERYTHING,) * 6 and whole.fits and whole.seconds is None
    text = str(whole)
    assert repr(whole) == text and "layers     0-5  keep everything" in text and "seconds         not known" in text
    assert "none was measured on a cpu" in text
    order, seen = [EVERYTHING, ATTENTION, INPUT], []
    for share in (0.9, 0.6, 0.4):
        plan = seal_ops.plan(lm, 128, 2, memory=round(share * whole.expected), labels=16)
        assert plan.fits and plan.expected <= plan.memory < whole.expected
        ranks = [order.index(what) for what in plan.keeps]
        assert ranks == sorted(ranks, reverse=True), "the last layers keep most"
        seen.append(sum(ranks))
    assert seen == sorted(seen) and seen[0] < seen[-1]
    tight = seal_ops.plan(lm, 128, 2, memory=1000, labels=16)
    assert not tight.fits and "expected to run out of memory" in str(tight)
    assert tight.keeps[0] == INPUT and tight.expected < plan.expected


def test_groups_come_last(monkeypatch):
    lm = scaled("llama", num_hidden_layers=8, max_position_embeddings=512)
    planner = planner_of(lm, 400, 16)
    costs = planner.measurement.costs(None)
    least = expected(costs, (INPUT,) * 8, 1, planner.trained).peak
    # Layers so light that their inputs are what counts, as at a million tokens with tiles.
    light = [dataclasses.replace(c, forward=0.0, free=0.0, backward=0.0) for c in costs.layers]
    light = dataclasses.replace(costs, layers=tuple(light), head=0.0)
    monkeypatch.setattr(planner.measurement, "costs", lambda tile, plain=False: light)
    one = expected(light, (INPUT,) * 8, 1, planner.trained).peak
    plan = planner.plan(memory=one - 1)
    assert plan.group > 1 and plan.fits and plan.expected < one < least
    assert f"{plan.group} layers under one checkpoint" in str(plan)


def test_a_growth_goes_through_its_points():
    points = [(64, 16), (64, 24), (128, 16), (256, 16)]
    for truth in ((5, 3, 0, 7), (1000, 20, 2, 0), (0, 0, 0, 0)):
        a, b, c, d = truth
        fit = Growth.through(points, [a + b * n + c * n * n + d * k for n, k in points])
        assert fit(10_000, 500) == pytest.approx(a + b * 10_000 + c * 10_000**2 + d * 500, rel=1e-9)
    rounded = Growth.through(points, [1024 * -(-3000 * n // 1024) for n, k in points])
    assert rounded(1_000_000, 16) == pytest.approx(3e9, rel=0.01), "the allocator's rounding is no square"
    bent = [max(500 + 2 * n, 9 * n) for n, _ in points]  # a weight that is written out decides in the shortest sample
    assert Growth.through(points, bent, straight=True)(10_000, 16) == 90_000 < Growth.through(points, bent)(10_000, 16)


@pytest.mark.parametrize("tile", [None, 512])
def test_noise_in_a_sample_is_no_square_of_the_head(tile):
    """The head has no square, and its rows with labels take nearly all of it: of the rest, a hundredth is little."""
    lm = scaled("llama", num_hidden_layers=2, max_position_embeddings=512)
    planner = planner_of(lm, 1543, 64, 1)  # 24 times the shortest sample, as 12,345 tokens on a GPU
    measurement = planner.measurement
    told = measurement.costs(tile).head
    samples, points = measurement._taken[tile, False], planner._samples.points

    def again():
        measurement._costs.clear()
        return measurement.costs(tile).head

    for sample in samples:
        true, noise = sample.head, round(0.05 * samples[-1].head)
        for sign in (1, -1):
            sample.head = true + sign * noise
            assert abs(again() - told) <= 13 * noise, "as far as straight lines carry it"
        sample.head = true
    assert again() == told
    for sample, (n, k) in zip(samples, points):  # a mask, which dies before the loss
        sample.before, sample.head = 4 * n * n, 10**7 + 300 * k - 4 * n * n
    assert again() == 10**7 + 300 * 64 - 4 * 1543**2


def test_speeds_are_those_of_the_committed_results():
    for name, speed in memory.THROUGHPUTS.items():
        stored = json.loads((ROOT / speed.source).read_text())
        assert stored["environment"]["gpu"] == name
        assert float(stored["environment"]["matmul_tflops"]) * 1e12 == speed.linear
        rows = {
            r["direction"]: r["tflops"] * 1e12
            for r in stored["rows"]
            if (r["operation"], r["contestant"], r["model"]) == ("attention", "seal-cuda", "llama-3.1-8b")
            and r["seqlen"] == 131072
        }
        assert (rows["forward"], rows["backward"]) == pytest.approx((speed.attention, speed.attention_backward))


def test_seconds_count_what_is_recomputed():
    lm = scaled("llama", num_hidden_layers=2)
    costs = planner_of(lm, 64, 4).measurement.costs(None)
    linear = 2 * 2 * 64 * sum(p.numel() for p in lm.model.layers[0].parameters() if p.dim() == 2)
    assert costs.layers[0].linear_operations == pytest.approx(linear, rel=0.01)
    pairs = 64 * 65 / 2
    assert costs.layers[0].attention_operations == pytest.approx(4 * 2 * 4 * 16 * pairs, rel=0.02)
    speed = memory.Throughput(1.0, 1.0, 2.5, "")
    l, a = (sum(getattr(c, f"{n}_operations") for c in costs.layers) for n in ("linear", "attention"))
    base = 3 * costs.head_operations + 2 * l + 2 * a
    for keeps, group, more in ((EVERYTHING, 1, 0), (ATTENTION, 1, l), (INPUT, 1, l + a), (INPUT, 2, 2 * (l + a))):
        assert seconds(costs, (keeps,) * 2, group, False, speed) == pytest.approx(base + more), keeps


@pytest.mark.parametrize(
    "make, options, message",
    [
        (scaled, {"length": 0}, "seal_ops.plan: length must be at least 1, got 0"),
        (scaled, {"length": 9, "memory": 0}, "seal_ops.plan: memory must be at least 1, got 0"),
        (lambda: FAMILIES["llama"].build().requires_grad_(False), {"length": 9}, "model must have something to train"),
    ],
)
def test_bad_sizes_get_one_sentence(make, options, message):
    with pytest.raises(ValueError, match=message):
        seal_ops.plan(make(), **options)


# ------------------------------------------------------------------------------------------ what cannot be planned


def test_a_last_layer_that_cannot_be_cut_is_whole_and_says_why():
    lm = scaled("llama")
    lm.model.layers[-1].mlp = torch.nn.Sequential(lm.model.layers[-1].mlp, torch.nn.Dropout(0.1))
    assert "has dropout" in str(seal_ops.plan(lm, 32, labels=4))
    lm = scaled("llama")
    forward = type(lm.model.layers[-1]).forward
    # Looks at all rows at once behind attention.
    lm.model.layers[-1].forward = lambda x, *a, **k: forward(lm.model.layers[-1], x, *a, **k) * x.shape[1]
    assert "gives other rows when only some are computed" in str(seal_ops.plan(lm, 32, labels=4))


def test_a_module_that_looks_at_neighbours_is_not_tiled():
    lm = scaled("llama")
    mlp = lm.model.layers[0].mlp
    lm.model.layers[0].mlp.forward = lambda x, forward=mlp.forward: forward(x).cumsum(1)
    tiled = planner_of(lm).measurement.tiled
    assert not any(m is mlp for m in tiled) and any(m is lm.model.layers[1].mlp for m in tiled)


def test_layers_that_are_no_chain_are_treated_alike():
    lm = scaled("llama", num_hidden_layers=3)
    forward = lm.model.layers[1].forward
    lm.model.layers[1].forward = lambda x, *a, **k: forward(x + 1, *a, **k)
    assert planner_of(lm).reason is None, "a layer may do what it likes"
    hook = lm.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] + 1, *args[1:]))
    plan = seal_ops.plan(lm, 64, labels=4)
    assert "all layers are treated alike, because it works on the states between two layers" in str(plan)
    assert plan.keeps == (EVERYTHING,) and not plan.cuts_last_layer
    less = seal_ops.plan(lm, 64, labels=4, memory=plan.expected - 1)
    assert less.keeps[0] in (ATTENTION, INPUT) and less.expected < plan.expected
    planner = planner_of(lm)
    with mode(lm, True):
        plain = gradients(lm, logits_at)
        with planner.running(less) as run:
            found = gradients(lm, run.logits_at)
    hook.remove()
    for one, other in zip(plain, found):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_operations_of_pytorchs_attention_with_few_heads_of_keys():
    """transformers hands them to SDPA as they are on a GPU, where torch's own formula raises."""
    q, k, v = (torch.empty(2, heads, n, 16, device="meta") for heads, n in ((8, 5), (2, 7), (2, 7)))
    op = torch.ops.aten._scaled_dot_product_flash_attention
    assert operations_of(op.default, (q, k, v), {}, None) == (0, 4 * 2 * 8 * 5 * 7 * 16)
    assert operations_of(torch.ops.aten.mm.default, (q[0, 0], k[0, 0].T), {}, q.new_empty(5, 7)) == (2 * 5 * 7 * 16, 0)


def test_what_the_allocator_adds_is_no_growth(monkeypatch):
    """A MiB more in one of the samples was 46 GiB at 131,072 tokens, on an H200."""
    stats = {"requested_bytes.all.current": 70, "requested_bytes.all.peak": 100}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda *_: stats)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 512)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 1024)
    device = torch.device("cuda")
    assert (memory.requested(device), memory.requested(device, peak=True)) == (70, 100)
    stats.clear()  # another allocator
    assert (memory.requested(device), memory.requested(device, peak=True)) == (512, 1024)
