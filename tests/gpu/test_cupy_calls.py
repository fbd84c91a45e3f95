"""Everything that the package asks of CuPy for a GPU is there, and takes what it is given.

No driver is needed to see that. CuPy tells the parameters of what Cython compiled in the first
line of its docstring.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cumla

cupy = pytest.importorskip("cupy")

PACKAGE = Path(cumla.__file__).parent
FILES = [
    *(PACKAGE / "backends" / name for name in ("arrays.py", "dlpack.py", "gpu.py", "streams.py")),
    *(PACKAGE / "attention").glob("*.py"),
]

# Functions, classes and constants by full name, with the parameters that we rely on.
NAMED = {
    "cupy.RawModule": "RawModule(str code=None, *, str path=None, ",
    "cupy.cuda.Device": "Device(device=None)",
    "cupy.cuda.ExternalStream": "(ptr, device_id=-1)",
    "cupy.cuda.Stream": "(null=False, non_blocking=False, ",
    "cupy.cuda.Stream.from_external": "(obj)",
    "cupy.cuda.get_current_stream": "get_current_stream(int device_id=-1)",
    "cupy.cuda.runtime.CUDARuntimeError": "(status)",
    "cupy.cuda.runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin": None,
    "cupy.cuda.runtime.cudaDevAttrMultiProcessorCount": None,
    "cupy.cuda.runtime.deviceGetAttribute": "deviceGetAttribute(int attrib, int device) -> int",
    "cupy.cuda.runtime.getDevice": "getDevice() -> int",
    "cupy.cuda.runtime.getDeviceCount": "getDeviceCount() -> int",
    "cupy.empty": "(shape, dtype",
    "cupy.from_dlpack": "from_dlpack(array, *, device=None, copy=None)",
    "cupy.ndarray": "__init__(shape, dtype=float, memptr=None, strides=None, order='C')",
    "cupy.zeros": "(shape, dtype",
}
# Methods and properties, of objects whose class the source does not name.
METHODS = {
    "cupy.RawModule.get_function": "RawModule.get_function(self, str name)",
    "cupy.RawKernel.__call__": "RawKernel.__call__(self, grid, block, args, **kwargs)",
    "cupy.RawKernel.max_dynamic_shared_size_bytes": None,
    "cupy.cuda.Stream.is_capturing": "(self)",
    "cupy.cuda.Stream.__enter__": "(self)",
    "cupy.cuda.Device.__enter__": None,
    "cupy.cuda.MemoryPointer.ptr": None,
    "cupy.cuda.MemoryPointer.device_id": None,
    "cupy.ndarray.__dlpack__": "_ndarray_base.__dlpack__(self, *, stream=None, tuple max_version=",
    "cupy.ndarray.__dlpack_device__": "_ndarray_base.__dlpack_device__(self)",
    "cupy.ndarray.get": "_ndarray_base.get(self, stream=None, ",
    "cupy.ndarray.set": "_ndarray_base.set(self, arr, stream=None)",
    "cupy.ndarray.view": "(self, dtype=None, ",
}


def parameters(thing: Any) -> str:
    """What it takes, in short: a Python signature without annotations, or Cython's first line."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return (thing.__doc__ or "").strip().splitlines()[0]
    if [one.kind for one in found.parameters.values()][:1] == [inspect.Parameter.VAR_POSITIONAL]:
        return (thing.__doc__ or "").strip().splitlines()[0]
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize(("name", "expected"), [*NAMED.items(), *METHODS.items()])
def test_it_is_there_and_takes_these_parameters(name: str, expected: str | None) -> None:
    thing: Any = cupy
    for part in name.split(".")[1:]:
        thing = getattr(thing, part)
    if expected is None:
        return
    found = parameters(thing)
    assert found.startswith(expected), found


def full_names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that begins with cupy, under what it is called in the package too."""
    aliases = {"cupy": "cupy", "self._cupy": "cupy", "device._cupy": "cupy"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = ast.unparse(node.value)
            if value in ("cupy.cuda.runtime", "self._cupy.cuda.runtime"):
                aliases[node.targets[0].id] = "cupy.cuda.runtime"
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            text = ast.unparse(node).split("(")[0]  # what is asked of a result is in METHODS
            for alias, name in aliases.items():
                if text.startswith(alias + "."):
                    yield name + text.removeprefix(alias)


def test_the_list_is_complete() -> None:
    found = {name for file in FILES for name in full_names(ast.parse(file.read_text()))}
    assert found - {"cupy.cuda.runtime"} == set(NAMED)


def test_a_kernel_takes_its_shared_memory_by_keyword() -> None:
    """RawKernel hands its keywords on to Function, which tells nobody what it takes."""
    function = cupy.cuda.function.Function.__new__(cupy.cuda.function.Function)
    if cupy.cuda.is_available():
        pytest.skip("it would launch")
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        function((1, 2), (1,), (None,), shared_mem=5)
    with pytest.raises(TypeError, match="unexpected keyword"):
        function((1, 2), (1,), (None,), no_such=5)


class Stream:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 12345


def test_a_foreign_stream_is_wrapped_and_not_destroyed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = cupy.cuda.Stream.from_external(Stream())
    assert isinstance(stream, cupy.cuda.Stream)
    assert (stream.ptr, stream.device_id) == (12345, -1)
    del stream  # with filterwarnings = error, a complaint of its __del__ would fail the test
    assert cupy.cuda.Stream.null.ptr == 0


def pretended(nbytes: int = 1 << 20) -> Any:
    """A pointer to memory that is not there; without a driver nobody can touch it."""
    memory = cupy.cuda.UnownedMemory(0x7F00_0000_0000, nbytes, None, 0)
    return cupy.cuda.MemoryPointer(memory, 0)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.int32, np.uint8]
)
def test_arrays_of_every_dtype_can_be_made_and_viewed(dtype: Any) -> None:
    array = cupy.ndarray((3, 4, 8), dtype, pretended())
    size = np.dtype(dtype).itemsize
    assert array.dtype == np.dtype(dtype)
    assert array.strides == (32 * size, 8 * size, size)
    assert array[1:, ::2].data.ptr == array.data.ptr + 32 * size
    view = array[:, ::2].view(f"u{size}")
    assert (view.shape, view.strides[:2]) == ((3, 2, 8), (32 * size, 16 * size))
    strided = cupy.ndarray((2, 2), dtype, pretended() + 16, (64, -size))
    assert (strided.data.ptr, strided.strides) == (pretended().ptr + 16, (64, -size))
    assert isinstance(array, cupy.ndarray)
    assert not isinstance(array, np.ndarray)


def test_from_dlpack_takes_a_capsule() -> None:
    """As it does for an exporter, but without asking the driver for the device."""
    import capsules

    array = cupy.ndarray((3, 4), np.uint16, pretended())
    found = cupy.from_dlpack(capsules.make(array, array.data.ptr, (capsules.CUDA, 0)))
    assert (found.data.ptr, found.shape, found.dtype) == (array.data.ptr, (3, 4), np.uint16)
    assert found.data.device_id == 0
    with pytest.raises(ValueError, match="DLPack"):
        cupy.from_dlpack(object())


def test_nvrtc_tells_its_targets() -> None:
    from cumla.backends.gpu import nvrtc_targets, target_for

    assert {80, 86, 89, 90, 100, 120} <= set(nvrtc_targets())
    assert target_for(9, 0, nvrtc_targets()) == "sm_90a"
