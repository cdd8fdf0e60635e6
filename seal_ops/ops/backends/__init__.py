"""Backends without a compiler: ATen on the CPU, Triton, and the readable oracle. One contract (docs/ops.md)."""
