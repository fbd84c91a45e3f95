"""The ops. Each checks its arguments into one frozen problem, plans, and hands it to a backend."""

from cumla.attention.dense import dense_decode
from cumla.attention.merge import merge_attention
from cumla.attention.mha import mha_varlen, mha_varlen_backward
from cumla.attention.plan import decode_workspace_bytes, plan_decode, sparse_kv_lengths
from cumla.attention.prefill import sparse_prefill
from cumla.attention.sparse import sparse_decode

__all__ = [
    "decode_workspace_bytes",
    "dense_decode",
    "merge_attention",
    "mha_varlen",
    "mha_varlen_backward",
    "plan_decode",
    "sparse_decode",
    "sparse_kv_lengths",
    "sparse_prefill",
]
