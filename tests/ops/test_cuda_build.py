"""check_cuda_build.py reads ptxas and the disassembly rightly: what is wrong with a kernel is said."""

import pytest
from check_cuda_build import kernels, order_fault, register_fault, softmax_steps

MAIN = "_ZN4seal4sm9023attention_backward_mainINS0_14BackwardConfigI6__halfLi64ELNS0_12BackwardWorkE0ELb0EEEEEv"
WAIT_SCORES, WAIT_VALUES = "WARPGROUP.DEPBAR.LE gsb0, 0x1 ", "WARPGROUP.DEPBAR.LE gsb0, 0x0 "


def ptxas(registers=168, stack=0, spills=0, name=MAIN):
    return (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90a'\n"
        f"    {stack} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 3 barriers\n"
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"registers": 176}, "176 registers, at most 168 expected"),
        ({"spills": 8, "stack": 8}, "16 bytes spilled, 8 bytes of stack"),
        ({"name": "_ZN4seal4sm906pilferEv"}, "no entry in REGISTERS"),
    ],
)
def test_registers(change, words):
    ((name, used),) = kernels(ptxas(**change)).items()
    assert register_fault(name, used) == words


def step(before_release, after_release):
    early, late = ["MUFU.EX2 R1, R2 "] * before_release, ["MUFU.EX2 R1, R2 "] * after_release
    return [WAIT_SCORES, *early, "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ ", *late, WAIT_VALUES, "MUFU.EX2 R1, R2 "]


def test_the_order_of_the_softmax():
    assert softmax_steps(step(6, 2) + step(22, 1)) == [(8, 6), (23, 22)]
    assert order_fault(step(6, 2) + step(22, 1)) is None
    assert "0 to 11 a step, 0 before K is released" in order_fault(step(0, 0) + step(0, 11))
    assert "8 to 8 a step" in order_fault(step(6, 2) + step(6, 2))
    assert "4 before K is released" in order_fault(step(4, 4) + step(22, 1))
    assert "of 0" in order_fault(["MUFU.EX2 R1, R2 "])
