"""Arrays that are not NumPy's, in and out through DLPack: by hand-made capsules, and by torch.

`Exporter` is another library's array, in miniature: it hands out legacy or versioned capsules
with the type codes that NumPy does not know, and counts what it handed out and got back.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import capsules
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import cumla
from cumla import ArgumentError, ArgumentTypeError, BackendUnavailable, flash_mla
from cumla.backends.arrays import Arrays
from cumla.layouts import BF16, V4_FP8, V32_FP8, pack_kv

Array = NDArray[Any]
bf16 = ml_dtypes.bfloat16
e4m3 = ml_dtypes.float8_e4m3fn
e8m0 = ml_dtypes.float8_e8m0fnu


@pytest.fixture(autouse=True)
def _all_given_back() -> Iterator[None]:
    """After a test every capsule's struct was given back, once (a second time is a KeyError)."""
    before = set(capsules.live)  # of a test that failed
    capsules.freed.clear()
    yield
    gc.collect()
    assert not set(capsules.live) - before


class Memory(np.ndarray[Any, Any]):
    """A NumPy array that can be watched by weakref."""


class Exporter:
    """An array of a library that speaks DLPack, which gives and takes versioned capsules or not."""

    def __init__(
        self,
        array: Array,
        *,
        versioned: bool = False,
        read_only: bool = False,
        device: int = capsules.CPU,
        owner: object = None,
    ) -> None:
        self.array, self.versioned, self.read_only = array, versioned, read_only
        self.device, self.owner = device, owner

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, *, stream: Any = None, **how: Any) -> Any:
        if how and not self.versioned:
            raise TypeError("an exporter from before max_version")
        modern = self.versioned and (how.get("max_version") or (0, 0)) >= (1, 0)
        if self.read_only and not modern:
            raise BufferError("a read-only array needs a versioned capsule")
        address, device = self.array.ctypes.data, (self.device, 0)
        return capsules.make(
            self.array, address, device, versioned=modern, read_only=self.read_only
        )

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return Namespace


def from_dlpack(foreign: Any) -> Exporter:
    """The other library's way in: the capsule's memory, by the type code that is in it."""
    capsule = foreign.__dlpack__(max_version=(1, 0))
    tensor, shape, strides, dtype = capsules.read(capsule)
    size = int(np.prod(shape)) * dtype.itemsize
    data = (ctypes.c_uint8 * size).from_address(tensor.data + tensor.byte_offset)
    array = np.frombuffer(data, dtype).reshape(shape)
    # An unconsumed capsule gives its struct back when it goes.
    strided = np.lib.stride_tricks.as_strided(array, shape, strides or array.strides)
    return Exporter(strided, owner=capsule)


class Namespace:
    """What `Exporter.__array_namespace__` returns."""

    from_dlpack = staticmethod(from_dlpack)


class PlainExporter:
    """An array of a library without __array_namespace__, as torch: its module has from_dlpack."""

    def __init__(self, array: Array) -> None:
        self.inner = Exporter(array)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.inner.__dlpack_device__()

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.inner.__dlpack__(stream=stream)


EXPORTERS: dict[str, Callable[[Array], Any]] = {
    "legacy": Exporter,
    "versioned": lambda array: Exporter(array, versioned=True),
    "module": PlainExporter,
}
every_exporter = pytest.mark.parametrize("export", EXPORTERS.values(), ids=EXPORTERS)


def normal(seed: int, *shape: int, dtype: Any = bf16) -> Array:
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32) / 4
    return numbers.astype(dtype)


def ints(*values: Any) -> NDArray[np.int32]:
    return np.array(values, np.int32)


# One call of each of FlashMLA's functions, on NumPy arrays.


def _decode(**call: Any) -> Any:
    holder, _ = flash_mla.get_mla_metadata()
    return flash_mla.flash_mla_with_kvcache(head_dim_v=512, tile_scheduler_metadata=holder, **call)


def _dense() -> dict[str, Any]:
    return {
        "q": normal(1, 2, 2, 3, 576),
        "k_cache": pack_kv(normal(2, 4, 8, 1, 576), BF16, 8),
        "block_table": ints([0, 3], [2, 1]),
        "cache_seqlens": ints(16, 1),
        "causal": True,
    }


def _sparse(layout: Any = V4_FP8) -> dict[str, Any]:
    return {
        "q": normal(1, 2, 1, 3, layout.d_qk),
        "k_cache": pack_kv(normal(2, 4, 8, 1, layout.d_qk), layout, 8),
        "block_table": None,
        "cache_seqlens": None,
        "is_fp8_kvcache": True,
        "indices": np.random.default_rng(3).integers(-1, 32, (2, 1, 20), np.int32),
        "attn_sink": np.array([0.5, 1, -np.inf], np.float32),
        "extra_k_cache": pack_kv(normal(4, 2, 5, 1, layout.d_qk), layout, 5),
        "extra_indices_in_kvcache": np.random.default_rng(3).integers(-1, 10, (2, 1, 7), np.int32),
        "topk_length": ints(3, 20),
        "extra_topk_length": ints(0, 7),
    }


def _prefill() -> dict[str, Any]:
    return {
        "q": normal(1, 4, 3, 576),
        "kv": normal(2, 9, 1, 576),
        "indices": np.random.default_rng(3).integers(-1, 10, (4, 1, 6), np.int32),
        "sm_scale": 0.1,
        "topk_length": ints(0, 6, 3, 6),
    }


_BOUNDS = {"cu_seqlens_qo": ints(0, 3, 9), "cu_seqlens_kv": ints(0, 7, 7)}
_LONGEST = {"max_seqlen_qo": 6, "max_seqlen_kv": 7}


def _mha() -> dict[str, Any]:
    arrays = {"q": normal(1, 9, 4, 24), "k": normal(2, 7, 2, 24), "v": normal(3, 7, 2, 16)}
    return arrays | _BOUNDS | _LONGEST


def _qkv_packed() -> dict[str, Any]:
    bounds = {"cu_seqlens": ints(0, 3, 9), "max_seqlen": 6, "head_dim_qk": 24}
    return {"qkv": normal(1, 9, 4, 64)} | bounds


def _kv_packed() -> dict[str, Any]:
    arrays = {"q": normal(1, 9, 4, 24), "kv": normal(2, 7, 2, 40)}
    return arrays | _BOUNDS | _LONGEST | {"head_dim_qk": 24}


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "dense": (_decode, _dense),
    "sparse_v4": (_decode, _sparse),
    "sparse_v32": (_decode, lambda: _sparse(V32_FP8)),
    "prefill": (flash_mla.flash_mla_sparse_fwd, _prefill),
    "mha": (flash_mla.flash_attn_varlen_func, _mha),
    "mha_qkv_packed": (flash_mla.flash_attn_varlen_qkvpacked_func, _qkv_packed),
    "mha_kv_packed": (flash_mla.flash_attn_varlen_kvpacked_func, _kv_packed),
}
every_call = pytest.mark.parametrize("name", CALLS)


def convert(call: dict[str, Any], export: Callable[[Array], Any]) -> dict[str, Any]:
    return {name: export(one) if isinstance(one, np.ndarray) else one for name, one in call.items()}


def assert_same(found: Array, expected: Array) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


# In.


@every_exporter
@pytest.mark.parametrize("dtype", [bf16, e4m3, e8m0, np.float16, np.float32, np.int32, np.uint8])
def test_import_shares_memory_and_keeps_values(export: Any, dtype: Any) -> None:
    whole = np.arange(1, 61).reshape(3, 4, 5).astype(dtype)
    for array in (whole, whole[1:, ::2], whole[0, 0, :1], whole.transpose(2, 0, 1)):
        found = Arrays(x=export(array))["x"]
        assert_same(found, array)
        assert np.shares_memory(found, array)
        assert found.ctypes.data == array.ctypes.data
    scalar = np.array(3, dtype)
    assert_same(Arrays(x=export(scalar))["x"], scalar)


@every_exporter
def test_import_keeps_the_memory_alive_and_then_lets_go(export: Any) -> None:
    memory = np.arange(4).astype(bf16).view(Memory)
    watch = weakref.ref(memory)
    exporter = export(memory)
    found = Arrays(x=exporter)["x"]
    del memory, exporter
    gc.collect()
    assert found.tolist() == [0, 1, 2, 3]
    assert watch() is not None
    del found
    gc.collect()
    assert watch() is None


def test_looking_at_a_capsule_does_not_outlive_it() -> None:
    """A peek at the type code must hold the capsule; the freed struct says something else."""
    for dtype in (np.float32, np.int32, e4m3):
        found = Arrays(x=Exporter(np.ones(4, dtype)))["x"]
        assert found.dtype == dtype
        del found


def test_read_only_memory_is_read_and_not_written() -> None:
    locked = Exporter(np.arange(4, dtype=np.float32), versioned=True, read_only=True)
    with pytest.raises(ArgumentTypeError, match=r"^x: got a Exporter that does not export"):
        Arrays(x=Exporter(np.zeros(2), read_only=True))
    found = Arrays(x=locked)["x"]
    assert_same(found, np.arange(4, dtype=np.float32))
    assert not found.flags.writeable


# Out.


@every_call
@every_exporter
def test_results_in_the_callers_array_type(name: str, export: Any) -> None:
    function, make = CALLS[name]
    expected = function(**make())
    found = function(**convert(make(), export))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is Exporter
        assert_same(one.array, other)


@pytest.mark.parametrize("name", ["dense", "sparse_v4", "prefill"])
def test_out_reaches_the_exporters_memory(name: str) -> None:
    function, make = CALLS[name]
    expected = function(**make())
    memory = np.full(expected[0].shape, np.nan, bf16)
    out = Exporter(memory, versioned=True)
    found = function(**convert(make(), Exporter), out=out)
    assert found[0] is out
    assert_same(memory, expected[0])
    assert_same(found[1].array, expected[1])


@pytest.mark.parametrize(
    "export", [Exporter, lambda array: Exporter(array, versioned=True, read_only=True)]
)
def test_out_that_may_be_read_only_is_refused(export: Callable[[Array], Any]) -> None:
    """A legacy capsule cannot say that its memory is read-only (JAX's is), so NumPy takes it so."""
    call = convert(_dense(), Exporter)
    memory = np.full((2, 2, 3, 512), 3, bf16)
    with pytest.raises(ArgumentError, match=r"^out: got a read-only array"):
        _decode(**call, out=export(memory))
    assert (memory == 3).all()


def test_results_outlive_their_inputs() -> None:
    watches = []

    def export(array: Array) -> Exporter:
        memory = array.view(Memory)
        watches.append(weakref.ref(memory))
        return Exporter(memory)

    expected = _decode(**_dense())
    call = convert(_dense(), export)
    found = _decode(**call)
    del call
    gc.collect()
    assert len(watches) == 4
    assert not any(watch() is not None for watch in watches)
    for one, other in zip(found, expected, strict=True):
        assert_same(one.array, other)


def test_capsules_are_given_back_call_after_call() -> None:
    call = convert(_mha(), Exporter)
    for _ in range(5):
        flash_mla.flash_attn_varlen_func(**call)
    gc.collect()
    assert len(capsules.freed) >= 5 * 5


def test_failed_calls_give_capsules_back() -> None:
    call = convert(_mha(), Exporter)
    for change in ({"max_seqlen_qo": 1}, {"k": Exporter(normal(1, 7, 2, 25))}, {"causal": 3}):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            flash_mla.flash_attn_varlen_func(**(call | change))
    gc.collect()
    assert len(capsules.freed) >= 3 * 5


def test_numpy_and_exporters_mixed() -> None:
    expected = _decode(**_dense())
    call = _dense()
    call["k_cache"] = Exporter(call["k_cache"])
    out, lse = _decode(**call)
    assert isinstance(out, np.ndarray)
    assert_same(out, expected[0])
    # The first array decides.
    call = _dense()
    call["q"] = Exporter(call["q"])
    memory = np.empty_like(expected[0])
    out, lse = _decode(**call, out=memory)
    assert out is memory
    assert_same(lse.array, expected[1])


def test_holder_passes_between_array_types() -> None:
    holder, _ = flash_mla.get_mla_metadata()
    call: dict[str, Any] = {"head_dim_v": 512, "tile_scheduler_metadata": holder}
    first = flash_mla.flash_mla_with_kvcache(**_dense(), **call)
    second = flash_mla.flash_mla_with_kvcache(**convert(_dense(), Exporter), **call)
    assert_same(second[0].array, first[0])
    stale = _dense() | {"cache_seqlens": Exporter(ints(16, 2))}
    with pytest.raises(ArgumentError, match=r"^tile_scheduler_metadata: .*cache_seqlens"):
        flash_mla.flash_mla_with_kvcache(**stale, **call)


def test_subclass_from_another_module() -> None:
    """A user's subclass of a library's array: the library makes the results."""
    Subclass = type("Subclass", (PlainExporter,), {"__module__": "collections"})
    call = convert(_mha(), Subclass)
    out, _ = flash_mla.flash_attn_varlen_func(**call)
    assert_same(out.array, flash_mla.flash_attn_varlen_func(**_mha())[0])


# Refused.


def test_array_type_without_a_way_back_is_refused_before_anything_is_written() -> None:
    class Oneway:
        __module__ = "collections"

        def __init__(self, array: Array) -> None:
            self.inner = Exporter(array)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.inner.__dlpack_device__()

        def __dlpack__(self, **how: Any) -> Any:
            return self.inner.__dlpack__(**how)

    out = np.full((2, 2, 3, 512), 3, bf16)
    call = _dense()
    call["q"] = Oneway(call["q"])
    with pytest.raises(ArgumentTypeError, match=r"^q: .*from_dlpack"):
        _decode(**call, out=out)
    assert (out == 3).all()


def test_devices() -> None:
    call = _dense()
    with pytest.raises(BackendUnavailable, match=r"^q: "):
        _decode(**convert(call, lambda array: Exporter(array, device=capsules.CUDA)))
    call["k_cache"] = Exporter(call["k_cache"], device=capsules.CUDA)
    with pytest.raises(ArgumentError, match=r"^k_cache: got an array on the GPU.* q is on the CPU"):
        _decode(**call)
    call["k_cache"] = Exporter(_dense()["k_cache"], device=capsules.METAL)
    with pytest.raises(ArgumentError, match=r"^k_cache: got an array on DLPack device type 8"):
        _decode(**call)


@pytest.mark.parametrize(
    "error", [AttributeError, BufferError, RuntimeError, TypeError, ValueError]
)
def test_exporters_that_refuse(error: type[Exception]) -> None:
    class Refusing(Exporter):
        def __dlpack__(self, *, stream: Any = None, **how: Any) -> Any:
            raise error("not today")

    call = _dense()
    call["k_cache"] = Refusing(call["k_cache"])
    with pytest.raises(ArgumentTypeError, match=r"^k_cache: got a Refusing .*not today") as caught:
        _decode(**call)
    assert isinstance(caught.value.__cause__, error)


def test_devices_that_have_no_dlpack_number() -> None:
    class Nowhere(Exporter):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise ValueError("no device")

    call = _dense()
    call["k_cache"] = Nowhere(call["k_cache"])
    with pytest.raises(ArgumentTypeError, match=r"^k_cache: .*no device"):
        _decode(**call)


def test_missing_arrays_of_the_ops() -> None:
    q, bounds = normal(1, 9, 4, 24), ints(0, 9)
    with pytest.raises(ArgumentTypeError, match=r"^v: got None"):
        cumla.mha_varlen(q, q, None, bounds, bounds)
    with pytest.raises(ArgumentTypeError, match=r"^q: got None"):
        cumla.mha_varlen(None, None, None, None, None)


def test_wrong_dtypes_of_exporters() -> None:
    call = convert(_dense(), Exporter)
    call["q"] = Exporter(normal(1, 2, 2, 3, 576, dtype=np.float32))
    with pytest.raises(ArgumentTypeError, match=r"^q: got dtype float32"):
        _decode(**call)
    call = convert(_mha(), Exporter)
    call["cu_seqlens_qo"] = Exporter(np.array([0, 3, 9]))
    with pytest.raises(ArgumentTypeError, match=r"^cu_seqlens_qo: got dtype int64"):
        flash_mla.flash_attn_varlen_func(**call)


# The ops themselves.


@every_exporter
def test_ops_take_exporters(export: Any) -> None:
    q, k, v = normal(1, 9, 4, 24), normal(2, 7, 4, 24), normal(3, 7, 4, 16)
    bounds = (ints(0, 3, 9), ints(0, 7, 7))
    out, lse = cumla.mha_varlen(q, k, v, *bounds)
    grads = cumla.mha_varlen_backward(out, q, k, v, out, lse, *bounds)
    merged = cumla.merge_attention([out, out], [lse, lse])
    foreign = cumla.mha_varlen(*map(export, (q, k, v, *bounds)))
    results = [
        *cumla.mha_varlen_backward(*map(export, (out, q, k, v, out, lse, *bounds))),
        *cumla.merge_attention([export(out)] * 2, [export(lse)] * 2),
    ]
    for one, other in zip([*foreign, *results], [out, lse, *grads, *merged], strict=True):
        assert type(one) is Exporter
        assert_same(one.array, other)


# The same with real torch tensors, where torch is installed.


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def to_torch(torch: Any, array: Array) -> Any:
    """A copy as a tensor, not by the way under test."""
    names = {np.dtype(bf16): "bfloat16", np.dtype(e4m3): "float8_e4m3fn"}
    if array.dtype not in names:
        return torch.from_numpy(array.copy())
    plain = array.view(f"i{array.itemsize}").copy()
    return torch.from_numpy(plain).view(getattr(torch, names[array.dtype]))


def to_numpy(torch: Any, tensor: Any) -> Array:
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(bf16))
    return np.asarray(tensor.numpy())


def pages_to_torch(torch: Any, pages: Array) -> Any:
    """A copy of FP8 pages with their page stride, padding included."""
    stride = pages.strides[0]
    content = np.lib.stride_tricks.as_strided(pages, (len(pages), stride), (stride, 1))
    strides = [one // pages.itemsize for one in pages.strides]
    return torch.from_numpy(content.copy()).as_strided(pages.shape, strides)


def torch_call(torch: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    def export(array: Array) -> Any:
        if array.dtype == np.uint8:
            return pages_to_torch(torch, array)
        return to_torch(torch, array)

    return convert(make(), export)


@every_call
def test_torch_results(torch: Any, name: str) -> None:
    function, make = CALLS[name]
    expected = function(**make())
    call = torch_call(torch, make)
    found = function(**call)
    del call
    gc.collect()
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, torch.Tensor)
        assert one.dtype == (torch.bfloat16 if other.dtype == bf16 else torch.float32)
        assert_same(to_numpy(torch, one), other)
    # They are tensors like any other: writable, and usable by torch.
    assert torch.isfinite((found[0] * 2 + 1).float()).all()
    found[0].zero_()
    assert not found[0].any()


@pytest.mark.parametrize("name", ["dense", "sparse_v4", "prefill"])
def test_torch_out(torch: Any, name: str) -> None:
    function, make = CALLS[name]
    expected = function(**make())
    out = torch.full(expected[0].shape, float("nan"), dtype=torch.bfloat16)
    found = function(**torch_call(torch, make), out=out)
    assert found[0] is out
    assert_same(to_numpy(torch, out), expected[0])
    # A strided view writes through as well.
    wide = torch.full((*expected[0].shape[:-1], 640), 3.0, dtype=torch.bfloat16)
    function(**torch_call(torch, make), out=wide[..., 64:576])
    assert_same(to_numpy(torch, wide[..., 64:576]), expected[0])
    assert (wide[..., :64] == 3).all()
    assert (wide[..., 576:] == 3).all()


def test_torch_fp8_pages(torch: Any) -> None:
    expected = _decode(**_sparse(V32_FP8))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        call = torch_call(torch, lambda: _sparse(V32_FP8))
        for name in ("k_cache", "extra_k_cache"):
            call[name] = call[name].view(dtype)
        for one, other in zip(_decode(**call), expected, strict=True):
            assert_same(to_numpy(torch, one), other)


def test_torch_packed_tensors_that_are_not_contiguous(torch: Any) -> None:
    expected = flash_mla.flash_attn_varlen_qkvpacked_func(**_qkv_packed())
    call = torch_call(torch, _qkv_packed)
    wide = torch.full((9, 5, 80), float("nan"), dtype=torch.bfloat16)
    wide[:, 1:, 8:72] = call["qkv"]
    call["qkv"] = wide[:, 1:, 8:72]
    call["max_seqlen"] = torch.tensor(6)
    found = flash_mla.flash_attn_varlen_qkvpacked_func(**call)
    assert_same(to_numpy(torch, found[0]), expected[0])
    call["max_seqlen"] = torch.tensor(5)
    with pytest.raises(ArgumentError, match=r"^max_seqlen: got 5; "):
        flash_mla.flash_attn_varlen_qkvpacked_func(**call)


@every_call
def test_torch_autograd_is_refused(torch: Any, name: str) -> None:
    function, make = CALLS[name]
    call = torch_call(torch, make)
    first = next(iter(call))
    call[first].requires_grad_()
    with pytest.raises(ArgumentTypeError, match=rf"^{first}: .*[Dd]etach"):
        function(**call)
    call[first] = call[first].detach()
    function(**call)


def test_torch_memory_is_freed(torch: Any) -> None:
    """Results hold nothing of the inputs, and inputs nothing of the results."""
    call = torch_call(torch, _dense)
    watch = weakref.ref(call["q"].untyped_storage())
    found = _decode(**call)
    kept = found[0].clone()
    gc.collect()
    assert watch() is not None
    del call
    gc.collect()
    assert watch() is None
    assert torch.equal(found[0], kept)
