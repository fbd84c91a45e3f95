"""Another library's arrays on a GPU, in and out without a copy, and in the order of its stream.

`Tensor` is such a library in miniature. Its work is queued on a stream of its own, LIBRARY, and as
the array API standard has it, who exports an array makes the importer's stream wait for the own.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, ClassVar

import capsules
import ml_dtypes
import numpy as np
import pytest
from naive import same_bits
from numpy.typing import NDArray

from cumla import ArgumentError, ArgumentTypeError, BackendUnavailable, backends
from cumla.backends.arrays import Arrays
from gpu.calls import CALLS
from gpu.numpy_there import NumpyThere
from gpu.stand_in import StandIn, cupy

Array = NDArray[Any]
LIBRARY, CALLS_STREAM = 900, 77
DTYPES = [
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e8m0fnu,
    *(np.float16, np.float32, np.int32, np.uint8, np.int8),
]


class Tensor:
    """An array of another library, over memory that is CuPy's here.

    Attributes:
        waits: (stream, the stream it waits for) of all that was exported and imported.
    """

    waits: ClassVar[list[tuple[int, int]]] = []

    def __init__(
        self, array: Any, *, versioned: bool = True, read_only: bool = False, owner: Any = None
    ) -> None:
        self.array, self.versioned, self.read_only = array, versioned, read_only
        self.owner = owner

    def __dlpack_device__(self) -> tuple[int, int]:
        return capsules.CUDA, self.array.data.device_id

    def __dlpack__(self, *, stream: Any = None, **how: Any) -> Any:
        if how and not self.versioned:
            raise TypeError("an exporter from before max_version")
        # The standard: 1 and 2 are CUDA's default streams, 0 is refused, None means 1.
        assert type(stream) is int
        assert stream > 0
        self.waits.append((stream, LIBRARY))
        device = self.__dlpack_device__()
        return capsules.make(
            self.array,
            self.array.data.ptr,
            device,
            versioned=self.versioned and (how.get("max_version") or (0, 0)) >= (1, 0),
            read_only=self.read_only,
        )

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return Namespace


class Namespace:
    @staticmethod
    def from_dlpack(foreign: Any) -> Tensor:
        assert foreign.__dlpack_device__()[0] == capsules.CUDA
        capsule = foreign.__dlpack__(stream=LIBRARY, max_version=(1, 0))
        tensor, shape, strides, dtype = capsules.read(capsule)
        memory = cupy.cuda.UnownedMemory(tensor.data, 1 << 40, capsule, tensor.device_id)
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        return Tensor(cupy.ndarray(shape, dtype, pointer, strides), owner=capsule)


class Oneway(Tensor):
    """A library that cannot be handed anything."""

    __array_namespace__: ClassVar[Any] = None


Oneway.__module__ = "collections"


@pytest.fixture
def driver() -> Iterator[StandIn]:
    made = StandIn(targets=("sm_80", "sm_90"))
    before = set(capsules.live)
    Tensor.waits.clear()
    with made.in_place():
        backend = NumpyThere(made)
        backends._loaded["cupy"] = backend
        yield made
        backend.asked.clear()
        # Every struct was given back, once.
        gc.collect()
        assert not set(capsules.live) - before


def tensors(driver: StandIn, value: Any, **how: Any) -> Any:
    """NumPy arrays as tensors, in lists and dictionaries too."""
    if isinstance(value, np.ndarray):
        return Tensor(driver.array(value), **how)
    if isinstance(value, list):
        return [tensors(driver, one, **how) for one in value]
    if isinstance(value, dict):
        return {name: tensors(driver, one, **how) for name, one in value.items()}
    return value


every_call = pytest.mark.parametrize("name", CALLS)


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda one: np.dtype(one).name)
def test_memory_is_shared_and_the_dtype_kept(driver: StandIn, dtype: Any, versioned: bool) -> None:
    whole = driver.array(np.arange(60).reshape(3, 4, 5).astype(dtype))
    before = len(driver.allocations)
    for array in (whole, whole[1:, ::2], whole[0, 0, :1], whole.transpose(2, 0, 1), whole[2, 1, 1]):
        found: Any = Arrays(x=Tensor(array, versioned=versioned))["x"]
        assert isinstance(found, cupy.ndarray)
        assert (found.dtype, found.shape) == (np.dtype(dtype), array.shape)
        assert found.data.ptr == array.data.ptr
        assert found.strides == array.strides
        assert same_bits(driver.numpy(found), driver.numpy(array))
        del found
    assert len(driver.allocations) == before


@pytest.mark.parametrize(
    ("stream", "number"), [(None, 1), (CALLS_STREAM, CALLS_STREAM), (2, 2)], ids=str
)
@every_call
def test_results_in_the_callers_array_type_and_order(
    name: str, stream: Any, number: int, driver: StandIn
) -> None:
    op, arguments, results = CALLS[name]()
    found = op(**tensors(driver, arguments), stream=stream)
    for one, want in zip(found, op(**arguments), strict=True):
        assert type(one) is Tensor
        assert same_bits(driver.numpy(one.array), want)
    # The call's stream waited for the library's before, and the library's for the call's after.
    assert Tensor.waits
    assert set(Tensor.waits) == {(number, LIBRARY)}
    assert driver.orders == [(stream or 0, LIBRARY)] * len(results)
    assert (driver.waits, driver.uploads) == (0, 0)


@every_call
def test_results_go_where_the_caller_says_and_are_waited_for(name: str, driver: StandIn) -> None:
    op, arguments, results = CALLS[name]()
    given = {one: Tensor(cupy.empty(shape, dtype)) for one, (shape, dtype) in results.items()}
    found = op(**tensors(driver, arguments), **given, stream=CALLS_STREAM)
    assert all(one is given[other] for one, other in zip(found, results, strict=True))
    for one, want in zip(found, op(**arguments), strict=True):
        assert same_bits(driver.numpy(one.array), want)
    assert driver.orders == [(CALLS_STREAM, LIBRARY)] * len(results)


@pytest.mark.parametrize("how", [{"versioned": False}, {"read_only": True}], ids=str)
def test_results_that_may_be_read_only_are_refused(driver: StandIn, how: dict[str, bool]) -> None:
    """A legacy capsule cannot say that its memory is read-only; JAX's is."""
    op, arguments, results = CALLS["dense_bf16"]()
    out = Tensor(cupy.empty(*results["out"]), **how)
    with pytest.raises(ArgumentError, match=r"^out: got a read-only array"):
        op(**tensors(driver, arguments), out=out)
    found, _ = op(**tensors(driver, arguments, **how))
    assert same_bits(driver.numpy(found.array), op(**arguments)[0])


def test_cupys_arrays_and_others_mixed(driver: StandIn) -> None:
    op, arguments, results = CALLS["dense_bf16"]()
    mixed = tensors(driver, arguments)
    mixed["q"] = mixed["q"].array
    out, lse = op(**mixed)
    assert isinstance(out, cupy.ndarray)
    assert isinstance(lse, cupy.ndarray)
    mixed = tensors(driver, arguments)
    given = cupy.empty(*results["out"])
    out, lse = op(**mixed, out=given)
    assert out is given
    assert type(lse) is Tensor


def test_other_devices(driver: StandIn) -> None:
    op, arguments, _ = CALLS["dense_bf16"]()
    on_other = {
        name: Tensor(driver.array(one, device=1)) if isinstance(one, np.ndarray) else one
        for name, one in arguments.items()
    }
    out, _ = op(**on_other)
    assert out.array.data.device_id == 1
    assert driver.device == 0
    with pytest.raises(ArgumentError, match=r"^kv_cache: got an array on GPU 1; .* q is on GPU 0"):
        op(**on_other | {"q": Tensor(driver.array(arguments["q"]))})
    with pytest.raises(ArgumentError, match=r"^kv_cache: got an array on the CPU; .*the GPU"):
        op(**arguments | {"q": Tensor(driver.array(arguments["q"]))})


@pytest.mark.parametrize("argument", ["q", "kv_cache", "out"])
def test_a_library_that_cannot_wait_is_refused(driver: StandIn, argument: str) -> None:
    op, arguments, results = CALLS["dense_bf16"]()
    on_gpu = tensors(driver, arguments) | {"out": Tensor(cupy.empty(*results["out"]))}
    on_gpu[argument] = Oneway(on_gpu[argument].array)
    with pytest.raises(ArgumentTypeError, match=rf"^{argument}: .*from_dlpack"):
        op(**on_gpu)


@pytest.mark.parametrize(
    "error", [AttributeError, BufferError, RuntimeError, TypeError, ValueError]
)
def test_exporters_that_refuse(driver: StandIn, error: type[Exception]) -> None:
    class Refusing(Tensor):
        def __dlpack__(self, **how: Any) -> Any:
            raise error("not today")

    op, arguments, _ = CALLS["dense_bf16"]()
    on_gpu = tensors(driver, arguments)
    on_gpu["kv_cache"] = Refusing(on_gpu["kv_cache"].array)
    with pytest.raises(ArgumentTypeError, match=r"^kv_cache: got a Refusing .*not today") as caught:
        op(**on_gpu)
    assert isinstance(caught.value.__cause__, error)


def test_dtypes_that_cupy_does_not_have(driver: StandIn) -> None:
    class Strange(Tensor):
        def __dlpack__(self, **how: Any) -> Any:
            capsule = super().__dlpack__(**how)
            capsules.tensor_of(capsule).code = 77
            return capsule

    with pytest.raises(ArgumentTypeError, match=r"^x: got a Strange that does not export"):
        Arrays(x=Strange(cupy.empty(3, np.float32)))


def test_without_a_driver(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    op, arguments, _ = CALLS["dense_bf16"]()
    on_gpu = tensors(driver, arguments)
    monkeypatch.delitem(backends._loaded, "cupy")
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(BackendUnavailable, match=r"^q: it is on a GPU"):
        op(**on_gpu)
    # Nothing was imported for it.
    assert not Tensor.waits
