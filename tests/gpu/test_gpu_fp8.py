"""Frozen linear layers in fp8 on a GPU: rows, products at any number of tokens, gradients of a model, memory, weights.

Needs a GPU of compute capability 8.9 or later.  With -s the figures are printed.
"""

import pytest
import torch
import torch.nn.functional as F

import seal_ops
from seal_ops.bench import training_sizes, training_steps
from seal_ops.huggingface.modes import mode
from seal_ops.training.frozen_linears import fp8_product
from seal_ops.training.frozen_linears.conversion import converted_linears, no_fp8
from seal_ops.training.frozen_linears.fp8_product import Fp8Weight, fp8_linear, quantize_rows
from seal_ops.training.frozen_linears.gradient_error import relative_error
from seal_ops.training.losses import summed_cross_entropy
from seal_ops.training.memory_plan.planning import Planner

SHAPES = {
    "up": (14336, 4096),
    "down": (4096, 14336),
    "key": (1024, 4096),
    "small": (48, 80),
}  # [out, in]
MIB = 2**20


@pytest.fixture(autouse=True)
def capable(alone):
    reason = no_fp8(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    if reason is not None:
        pytest.skip(f"needs fp8, got {reason}")
    torch.manual_seed(0)


def relative(found, wanted):
    return float((found.detach().double() - wanted).norm() / wanted.norm())


def random(*shape, spread=0.0):
    rows = torch.randn(*shape, device="cuda")
    return (rows * (torch.randn(*shape[:-1], 1, device="cuda") * spread).exp2()).bfloat16()


@pytest.mark.parametrize("columns", [16, 80, 4096, 14336])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_have_the_bits_of_the_cpu(columns, dtype):
    """The kernel, and torch's operations on the GPU in its place."""
    rows = random(37, columns, spread=20).to(dtype)
    rows[0], rows[1], rows[2, 1:], rows[3, 2], rows[4, 5] = 0, 448, 0, torch.nan, torch.inf
    factor = torch.randint(-12, 1, (columns,), device="cuda").float().exp2()
    finite = torch.arange(37) != 3
    finite[4] = False
    assert fp8_product._kernel() is not None, "Triton is there"
    for given in ((rows,), (rows, factor)):
        wanted, by = quantize_rows(*(t.cpu() for t in given))
        for kernel in (fp8_product._kernel(), None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fp8_product, "_kernel", lambda kernel=kernel: kernel)
                values, scale = quantize_rows(*given)
            assert torch.equal(scale.cpu().nan_to_num(-1), by.nan_to_num(-1)) and scale[3:5].isnan().all()
            assert torch.equal(values.cpu().view(torch.uint8)[finite], wanted.view(torch.uint8)[finite])


@pytest.mark.parametrize("tokens", [1, 17, 128, 131, 4099])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_rounded_factors(shape, tokens):
    weight = random(*SHAPES[shape], spread=2) * 0.02
    fp8 = Fp8Weight.of(weight)
    assert torch.equal(fp8.transposed.view(torch.uint8), fp8.values.t().contiguous().view(torch.uint8))
    values, exact = fp8.values.double(), fp8.values.double() * fp8.scale.double()
    assert 0.02 < relative(exact, weight.double()) < 0.04
    x = random(1, tokens, weight.shape[1], spread=3).requires_grad_()
    bias = random(weight.shape[0])
    errors = []
    for shift in (None, bias):
        y = fp8_linear(x, fp8, shift)
        read, scale = quantize_rows(x.detach()[0])
        wanted = read.double() * scale.double() @ exact.t() + (0 if shift is None else shift.double())
        errors.append(relative(y[0], wanted))
    g = random(1, tokens, weight.shape[0], spread=3)
    (grad,) = torch.autograd.grad(y, x, g)
    read, scale = quantize_rows(g[0], fp8.scale.flatten())
    errors.append(relative(grad[0], read.double() * scale.double() @ values))
    print(f"{shape}, {tokens} tokens: errors {errors[0]:.1e}, with a bias {errors[1]:.1e}, gradient {errors[2]:.1e}")
    # A rounding to bf16, and in the forward pass the sums that the tensor cores keep (14 bits). Few rows run in 16
    # bits, where parts of a sum are rounded to bf16.
    assert errors[0] < 1e-2 and errors[1] < 1e-2 and errors[2] < (2**-7 if tokens < fp8_product.FEW else 2**-8)


@pytest.mark.alone
def test_a_large_model_states_its_error_keeps_to_its_memory_and_gets_its_weights_back():
    """Two layers of an 8B shape."""
    length = 8192
    size = training_sizes.SIZES["8b"]
    model = training_steps.random_model(size, 2, length, torch.bfloat16, torch.device("cuda", 0))
    before = {name: p.clone() for name, p in model.model.layers.named_parameters()}
    weights = sum(p.nbytes for p in before.values() if p.dim() == 2)
    ids = torch.randint(0, size.vocabulary, (1, length), device="cuda")
    positions, targets = training_steps._positions(ids)
    scales = seal_ops.attach(model, "channel")
    trained = [scale for _, scale in scales.items()]
    found, shares = {}, {}
    for name, linears in (("16 bits", None), ("fp8", "fp8")):
        torch.cuda.synchronize()
        used = torch.cuda.memory_allocated()
        with mode(model, True), converted_linears(model, linears, "test"):
            # Before the first product, which makes the libraries' workspaces.
            inside = torch.cuda.memory_allocated() - used
            planner = Planner(model, length, len(positions), frozen_linears=linears)
            plan = planner.plan()
            with planner.running(plan) as run:
                for _ in range(2):  # the first makes them, in the threads of both passes
                    torch.cuda.synchronize()
                    before_step = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    logits = run.logits_at(model, positions, input_ids=ids, use_cache=False)
                    loss = summed_cross_entropy(logits.flatten(0, 1), targets)
                    found[name] = torch.autograd.grad(loss, trained)
                    del logits, loss
                    peak = torch.cuda.max_memory_allocated() - before_step
        print(
            f"{name}: {inside / MIB:+.0f} MiB for weights of {weights / MIB:.0f}, "
            f"a step takes {peak / MIB:.0f} MiB, expected {plan.expected / MIB:.0f} MiB"
        )
        # Two layouts of one byte stand for the two bytes; the scales are small.
        assert abs(inside) < 0.01 * weights
        shares[name] = peak / plan.expected
    assert abs(shares["fp8"] / shares["16 bits"] - 1) < 0.05, "it is foretold as well as in 16 bits"
    error = relative_error(found["fp8"], found["16 bits"])
    print(f"gradients of 2 layers: {error:.3f} from those in 16 bits")
    assert 0.01 < error < 1
    training_steps.check_shallow("auto-fp8", seal_ops.detach(model), ids)
    assert all(torch.equal(p, before[name]) and p.is_cuda for name, p in model.model.layers.named_parameters())


def test_a_run_on_the_gpu_leaves_the_weights_and_states_what_it_did(tmp_path):
    size = training_sizes.Size(512, 1024, 8, 2, 128, 2, ((256, 2),))
    model = training_steps.random_model(size, 2, 256, torch.bfloat16, torch.device("cuda", 0))
    seal_ops.attach(model, "channel")
    before = {name: (p, p.clone()) for name, p in model.named_parameters() if not p.requires_grad}
    samples = [{"input_ids": torch.randint(0, 128, (256,)).tolist()} for _ in range(3)]
    result = seal_ops.train(model, samples, frozen_linears="fp8", output_dir=tmp_path, progress=False)
    facts = result.frozen_linears
    linears = sum(p.nbytes for name, (p, _) in before.items() if "layers" in name and p.dim() == 2)
    assert facts["host_bytes"] == linears and linears < facts["device_bytes"] < 1.05 * linears
    assert 0.01 < facts["gradient_error"] < 0.4 and all(map(torch.isfinite, torch.tensor(result.losses)))
    assert all(p is dict(model.named_parameters())[n] and torch.equal(p, v) for n, (p, v) in before.items())
    with pytest.raises(KeyboardInterrupt), converted_linears(model, "fp8", "test"):
        raise KeyboardInterrupt
    assert all(torch.equal(p, v) and p.is_cuda for p, v in before.values())


@pytest.mark.alone
def test_a_layer_takes_less_time_than_in_16_bits():
    """The products of an 8B MLP at 31,744 tokens, forward and backward, rows to fp8 and all."""
    x = random(31744, 4096).requires_grad_()
    weight = random(14336, 4096) * 0.02
    fp8, g = Fp8Weight.of(weight), random(31744, 14336)

    def milliseconds(function):
        times = []
        for _ in range(6):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.autograd.grad(function(), x, g)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times[1:])[2]

    own, plain = milliseconds(lambda: fp8_linear(x, fp8)), milliseconds(lambda: F.linear(x, weight))
    rows = 4 * 31744 * 4096 * 14336 / 1e9
    print(f"fp8 {own:.2f} ms ({rows / own:.0f} TFLOP/s), bf16 {plain:.2f} ms ({rows / plain:.0f} TFLOP/s)")
    assert own < plain
