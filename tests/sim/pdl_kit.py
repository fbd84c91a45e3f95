"""Kernels and launches for tests of programmatic dependent launch."""

from __future__ import annotations

import numpy as np

BLOCKS, THREADS = 3, 64
N = BLOCKS * THREADS

SOURCE = (
    f"#define N {N}\n"
    + r"""
#define WAIT asm volatile("griddepcontrol.wait;" ::: "memory")
#define LAUNCH asm volatile("griddepcontrol.launch_dependents;" ::: "memory")
#define I (blockIdx.x * blockDim.x + threadIdx.x)

extern "C" __global__ void produce(int *x) {
    x[I] = I + 1;  // before the launch
    LAUNCH;
    x[N + I] = 2 * I + 1;  // after the launch
}

extern "C" __global__ void forgetful(const int *x, int *y, int at) {
    int early = x[at * N + I];  // reads early
    WAIT;
    y[I] = early;
}
"""
)


def stream_of(module, start=None):
    return module.device.stream(start)


def add(stream, module, name, *args, programmatic=True, **options):
    stream.launch(module.kernel(name), BLOCKS, THREADS, args, programmatic=programmatic, **options)


def buffers_of(module):
    """x of 2 N, y and own of N ints, none of them written."""
    device = module.device
    x = device.alloc(2 * N, np.int32, name="x")
    return x, device.alloc(N, np.int32, name="y"), device.alloc(N, np.int32, name="own")
