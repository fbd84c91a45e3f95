"""GpuDevice and GpuCall over a stand-in for the driver: what they ask of CuPy."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cumla import ArgumentError, ArgumentTypeError, BackendUnavailable
from cumla.backends import gpu
from cumla.backends.gpu import GpuDevice, target_for
from cumla.backends.streams import as_stream, current
from cumla.jit.build import Build
from cumla.kernels import schedule
from cumla.kernels.device import Program
from cumla.layouts import LAYOUTS, KVLayout
from gpu.stand_in import StandIn, cupy

# Every kind of parameter that a kernel has, and dynamic shared memory to the last byte.
SOURCE = r"""
extern "C" __global__ void scale(
    const float* x, float* y, long long n, unsigned factor, float shift, const int* more)
{
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] * factor + shift + (more ? *more : 0);
}
extern "C" __global__ void shared(float* y, unsigned n)
{
    extern __shared__ float s[];
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) s[i] = i;
    __syncthreads();
    if (threadIdx.x == 0) y[0] = s[n - 1];
}
"""
SCALE, SHARED = Program("test.cu", "scale"), Program("test.cu", "shared")


@pytest.fixture
def driver() -> Iterator[StandIn]:
    made = StandIn(targets=("sm_80", "sm_90"), sources={"test.cu": SOURCE})
    with made.in_place():
        yield made


@pytest.fixture
def device(driver: StandIn) -> GpuDevice:
    return GpuDevice()


def scale(call: Any, x: Any, y: Any, factor: int = 2, shift: float = 1, more: Any = None) -> None:
    args = [call.read(x), call.write(y), np.int64(x.size), np.uint32(factor), np.float32(shift)]
    args.append(None if more is None else call.read(more))
    call.launch(SCALE, grid=-(-x.size // 64), block=64, args=args)


def use_shared(call: Any, nbytes: int) -> Any:
    y = cupy.empty(1, np.float32)
    args = [y, np.uint32(nbytes // 4)]
    call.launch(SHARED, grid=(1,), block=(32, 1), args=args, shared_bytes=nbytes)
    return y


def test_a_kernel_runs_on_the_callers_arrays(driver: StandIn, device: GpuDevice) -> None:
    x, more = np.arange(200, dtype=np.float32), np.array([5], np.int32)
    given, result = driver.array(x), cupy.empty(200, np.float32)
    with device.call() as call:
        assert call.read(given) is given
        assert call.write(result) is result
        scale(call, given, result, factor=3, shift=0.5)
    assert (driver.numpy(result) == 3 * x + 0.5).all()
    with device.call() as call:
        scale(call, given, result, more=driver.array(more))
    assert (driver.numpy(result) == 2 * x + 6).all()
    assert (driver.numpy(given) == x).all()
    # Compiled and loaded once; nothing copied, nobody waited.
    assert driver.modules == ["test.cu/sm_80/scale"]
    assert (driver.waits, driver.uploads) == (0, 0)


def test_a_view_is_passed_as_the_address_of_its_first_element(
    driver: StandIn, device: GpuDevice
) -> None:
    x = np.arange(200, dtype=np.float32)
    result = cupy.empty(50, np.float32)
    with device.call() as call:
        scale(call, driver.array(x)[100:150], result, factor=1, shift=0)
    assert (driver.numpy(result) == x[100:150]).all()


@pytest.mark.parametrize("wrong", [3, 2.5, True])
def test_python_numbers_are_no_arguments(device: GpuDevice, wrong: Any) -> None:
    with device.call() as call, pytest.raises(ArgumentTypeError, match=r"^args\[1\]: got"):
        call.launch(SHARED, grid=1, block=32, args=[cupy.empty(1, np.float32), wrong])


@pytest.mark.parametrize("grid", [0, (4, 0), (2, 3, 0), -1])
def test_an_empty_grid_is_refused(driver: StandIn, device: GpuDevice, grid: Any) -> None:
    """CuPy would launch one block."""
    with device.call() as call, pytest.raises(ArgumentError, match=r"^grid: got"):
        call.launch(SHARED, grid=grid, block=32, args=[None, np.uint32(0)])
    assert not driver.launches


def test_dynamic_shared_memory_up_to_the_last_byte(driver: StandIn, device: GpuDevice) -> None:
    most = 166912
    with device.call() as call:
        assert call.shared_bytes == most
        # The driver's leave is asked for above 48 KB, and never taken back.
        for nbytes in (1024, 49152, 49156, 100_000, most, 2048, most):
            assert driver.numpy(use_shared(call, nbytes)) == nbytes // 4 - 1
        with pytest.raises(AssertionError, match="cudaErrorInvalidValue"):
            use_shared(call, most + 4)
    assert len(driver.modules) == 1


# ------------------------------------------------------------------------------------ memory


def test_scratch_memory_comes_from_cupys_pool(driver: StandIn, device: GpuDevice) -> None:
    before = len(driver.allocations)
    with device.call() as call:
        scratch = call.empty((3, 5), ml_dtypes.bfloat16)
    assert (scratch.shape, scratch.dtype) == ((3, 5), np.dtype(ml_dtypes.bfloat16))
    assert scratch.data.ptr % gpu.ALIGNMENT == 0
    assert driver.allocations[before:] == [30]


@pytest.mark.parametrize("offset", [0, 1, 255])
def test_scratch_memory_is_carved_from_a_workspace(
    driver: StandIn, device: GpuDevice, offset: int
) -> None:
    memory = cupy.empty(offset + 2048, np.uint8)
    workspace = memory[offset:]
    before = len(driver.allocations)
    with device.call(workspace=workspace) as call:
        parts = [
            call.empty((), np.int32),
            call.empty((10, 7), np.float32),  # 280 bytes
            call.empty((0, 4), np.int32),
            call.empty((65,), ml_dtypes.bfloat16),
        ]
    begins = [one.data.ptr - memory.data.ptr for one in parts]
    first = -(-offset // 256) * 256
    assert begins == [first + one for one in (0, 256, 768, 768)]
    assert [one.shape for one in parts] == [(), (10, 7), (0, 4), (65,)]
    assert parts[1].strides == (28, 4)
    assert len(driver.allocations) == before
    # A new call begins at the start again.
    with device.call(workspace=workspace) as call:
        assert call.empty((4,), np.int64).data.ptr == parts[0].data.ptr


def test_a_workspace_that_is_too_small(device: GpuDevice) -> None:
    workspace = cupy.empty(300, np.uint8)
    with device.call(workspace=workspace) as call:
        call.empty((1,), np.int32)
        assert call.empty((11,), np.float32).nbytes == 44
    with device.call(workspace=workspace) as call:
        call.empty((1,), np.int32)
        with pytest.raises(ArgumentError, match=r"^workspace: got 300 bytes; .* at least 304\."):
            call.empty((12,), np.float32)


def test_host_arrays_of_a_plan_are_copied_once(driver: StandIn, device: GpuDevice) -> None:
    plan = np.arange(12, dtype=np.int32).reshape(3, 4).copy()
    plan.flags.writeable = False
    with device.call() as call:
        copy = call.read(plan)
        assert isinstance(copy, cupy.ndarray)
        assert (driver.numpy(copy) == plan).all()
        assert call.read(plan) is copy
    with device.call() as call:
        assert call.read(plan) is copy
    # Another stream does not know when the copy is ready, another device cannot read it.
    with device.call(stream=77) as call:
        other = call.read(plan)
        assert other is not copy
    with current(1), device.call() as call:
        assert call.read(plan).data.device_id == 1
    assert (driver.uploads, driver.waits) == (3, 0)
    assert len(device._copies) == 3
    # They go with the plan.
    del plan, call
    gc.collect()
    assert not device._copies


def test_host_arrays_that_may_change_are_copied_each_time(
    driver: StandIn, device: GpuDevice
) -> None:
    lengths = np.array([3, 4], np.int32)
    view = lengths[:]
    view.flags.writeable = False  # but its memory may be
    for array in (lengths, view):
        with device.call() as call:
            call.read(array)
            lengths[0] += 1
            assert driver.numpy(call.read(array))[0] == lengths[0]
    assert not device._copies


def test_results_are_not_written_to_host_arrays(device: GpuDevice) -> None:
    with device.call() as call, pytest.raises(ArgumentTypeError, match="NumPy|numpy"):
        call.write(np.zeros(3))


def test_a_plan_is_not_copied_while_a_graph_is_captured(driver: StandIn, device: GpuDevice) -> None:
    plan = np.arange(4, dtype=np.int32)
    plan.flags.writeable = False
    stream = as_stream(77)
    match = r"^plan: .*captured"
    with driver.capture(stream), device.call() as call, pytest.raises(ArgumentError, match=match):
        call.read(plan)
    with device.call(stream=stream) as call:
        copy = call.read(plan)
    with driver.capture(stream), device.call() as call:
        assert call.read(plan) is copy


def test_a_call_is_captured_in_a_graph_and_replayed(driver: StandIn, device: GpuDevice) -> None:
    x, y = driver.array(np.arange(100, dtype=np.float32)), cupy.empty(100, np.float32)
    with driver.capture(as_stream(77)) as graph, device.call() as call:
        scale(call, x, y)
    assert not driver.launches
    graph.launch()
    assert (driver.numpy(y) == 2 * np.arange(100) + 1).all()
    driver.write(x, np.full(100, 4, np.float32))
    graph.launch()
    assert (driver.numpy(y) == 9).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_page_pools_are_as_the_cpus(driver: StandIn, device: GpuDevice, layout: KVLayout) -> None:
    pool, expected = device.empty_pages(layout, 3, 5), layout.empty_pages(3, 5)
    assert (pool.shape, pool.strides, pool.dtype) == (
        expected.shape,
        expected.strides,
        expected.dtype,
    )
    assert (driver.numpy(pool) == 0).all()
    assert driver.allocations[-1] == 3 * layout.page_stride(5)


# ----------------------------------------------------------------------------------- streams


class Torch:
    cuda_stream = 501


class Protocol:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 502


class Plain:
    ptr = 503


@pytest.mark.filterwarnings("ignore:ExternalStream:DeprecationWarning")
def test_streams_in_all_their_forms(driver: StandIn, device: GpuDevice) -> None:
    x, y = driver.array(np.zeros(8, np.float32)), cupy.empty(8, np.float32)
    own = cupy.cuda.Stream.from_external(Protocol())
    forms = {
        None: 0,
        500: 500,
        np.int64(499): 499,
        Torch(): 501,
        Protocol(): 502,
        Plain(): 503,
        own: 502,
        cupy.cuda.ExternalStream(504): 504,
        cupy.cuda.Stream.null: 0,
        2: 2,
    }
    for form in forms:
        with device.call(stream=form) as call:
            scale(call, x, y)
    assert [one.stream for one in driver.launches] == [*forms.values()]
    assert as_stream(own) is own
    # CuPy's current stream is the caller's again, and is the default.
    assert len(driver.streams) == 1
    with own, device.call() as call:
        scale(call, x, y)
    assert driver.launches[-1].stream == 502


class BadProtocol:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 7, 502


@pytest.mark.parametrize(
    "wrong", ["s", 1.5, True, -1, object(), [5], SimpleNamespace(ptr="x"), BadProtocol()]
)
def test_what_is_no_stream(device: GpuDevice, wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^stream: got"), device.call(stream=wrong):
        raise AssertionError("inside")


def test_the_callers_stream_comes_back_after_an_error(driver: StandIn, device: GpuDevice) -> None:
    def fail() -> None:
        with device.call(stream=5):
            assert driver.streams[-1].ptr == 5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(driver.streams) == 1


# ----------------------------------------------------------------------------------- devices


def test_work_goes_to_the_current_device(driver: StandIn, device: GpuDevice) -> None:
    x = np.arange(100, dtype=np.float32)
    for number in (1, 0, 1):
        with current(number), device.call() as call:
            assert call.target == ("sm_80", "sm_90a")[number]
            y = call.empty((100,), np.float32)
            scale(call, driver.array(x, number), y)
        assert y.data.device_id == number
        assert (driver.numpy(y) == 2 * x + 1).all()
    assert driver.device == 0
    assert [one.device for one in driver.launches] == [1, 0, 1]
    assert driver.modules == ["test.cu/sm_90a/scale", "test.cu/sm_80/scale"]


def test_shared_memory_is_allowed_on_each_device(driver: StandIn, device: GpuDevice) -> None:
    for number in (0, 1):
        with current(number), device.call() as call:
            assert driver.numpy(use_shared(call, 120_000)) == 29999


def test_a_stream_of_another_device(driver: StandIn) -> None:
    stream = cupy.cuda.Stream.from_external(Protocol())
    stream.device_id = 1
    with pytest.raises(ArgumentError, match=r"^stream: got a stream of GPU 1; .* on GPU 0"):
        current(0, stream)
    with current(1, stream):
        assert (driver.device, driver.streams[-1].ptr) == (1, 502)
    assert (driver.device, len(driver.streams)) == (0, 1)


def test_facts_are_asked_for_once(
    driver: StandIn, device: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with device.call() as call:
        assert (call.target, call.num_sms, call.shared_bytes) == ("sm_80", 4, 166912)
    assert device.facts(1) == gpu.Facts("sm_90a", 4, 232448)

    def asked(*what: int) -> int:
        raise AssertionError("asked again")

    monkeypatch.setattr(cupy.cuda.runtime, "deviceGetAttribute", asked)
    with device.call() as call:
        assert call.num_sms == 4


NVRTC_12_8 = [50, 75, 80, 86, 87, 89, 90, 100, 101, 120]


@pytest.mark.parametrize(
    ("capability", "target"),
    {
        (8, 0): "sm_80",
        (8, 6): "sm_86",
        (8, 7): "sm_87",
        (8, 9): "sm_89",
        (9, 0): "sm_90a",
        (10, 0): "sm_100",
        (10, 3): "sm_100",
        (12, 0): "sm_120",
        (12, 1): "sm_120",
    }.items(),
)
def test_targets(capability: tuple[int, int], target: str) -> None:
    assert target_for(*capability, NVRTC_12_8) == target


@pytest.mark.parametrize("capability", [(7, 5), (3, 0), (11, 0), (13, 0), (9, 1)])
def test_gpus_that_no_kernel_runs_on(capability: tuple[int, int]) -> None:
    number = f"{capability[0]}.{capability[1]}"
    with pytest.raises(BackendUnavailable, match=f"^backend 'cupy': .*{number}"):
        target_for(*capability, NVRTC_12_8)


def test_a_gpu_gets_a_cubin(
    driver: StandIn, device: GpuDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the real compiler, from the cache; and only what is launched is compiled."""
    monkeypatch.setenv("CUMLA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu, "build", lambda *what: Build(*what))
    loaded: list[Path] = []

    class Module:
        def __init__(self, *, path: str) -> None:
            loaded.append(Path(path))

        def get_function(self, name: str) -> Any:
            assert name.encode() in loaded[-1].read_bytes()
            return lambda *launch, **how: None

    monkeypatch.setattr(cupy, "RawModule", Module)
    program, *_ = next(iter(schedule.instances(device.facts(0).shared_bytes)))
    for _ in range(2):
        with device.call() as call:
            call.launch(program, grid=1, block=32, args=[])
    (path,) = loaded
    assert path.is_relative_to(tmp_path)
    code = path.read_bytes()
    assert code[:4] == b"\x7fELF"
    assert int.from_bytes(code[18:20], "little") == 190, "e_machine is not EM_CUDA"


# --------------------------------------------------------------------------------- not there


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        BackendUnavailable, match=r"^backend 'cupy': .*NotFoundError.*Install cupy-"
    ):
        GpuDevice()


def test_with_a_broken_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *more: object) -> None:
            if name == "cupy":
                raise OSError("libcudart.so: cannot open")

    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(BackendUnavailable, match=r"OSError: libcudart.so"):
        GpuDevice()


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = cupy.cuda.runtime

    def no_driver() -> int:
        raise runtime.CUDARuntimeError(35)

    monkeypatch.setattr(runtime, "getDeviceCount", no_driver)
    with pytest.raises(BackendUnavailable, match=r"^backend 'cupy': .*InsufficientDriver.*nvidia"):
        GpuDevice()


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(BackendUnavailable, match=r"^backend 'cupy': .*CUDA_VISIBLE_DEVICES"):
        GpuDevice()
