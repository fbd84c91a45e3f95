"""cumla: Multi-head Latent Attention over paged FP8 KV caches, for NumPy and CuPy arrays."""

from cumla import layouts
from cumla.attention import (
    decode_workspace_bytes,
    dense_decode,
    merge_attention,
    mha_varlen,
    mha_varlen_backward,
    plan_decode,
    sparse_decode,
    sparse_kv_lengths,
    sparse_prefill,
)
from cumla.backends import BackendUnavailable, get_backend, use_backend
from cumla.checks import ArgumentError, ArgumentTypeError
from cumla.layouts import pack_kv, unpack_kv
from cumla.paged import OutOfPages, PagedKVCache
from cumla.schedule import (
    DecodePlan,
    dense_num_parts,
    sparse_num_parts,
)

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BackendUnavailable",
    "DecodePlan",
    "OutOfPages",
    "PagedKVCache",
    "__version__",
    "decode_workspace_bytes",
    "dense_decode",
    "dense_num_parts",
    "get_backend",
    "layouts",
    "merge_attention",
    "mha_varlen",
    "mha_varlen_backward",
    "pack_kv",
    "plan_decode",
    "sparse_decode",
    "sparse_kv_lengths",
    "sparse_num_parts",
    "sparse_prefill",
    "unpack_kv",
    "use_backend",
]
