"""FlashMLA's functions under their own names and signatures, on top of cumla's ops.

A program written for FlashMLA changes its import:

    import cumla.flash_mla as flash_mla

Names, order and defaults of the arguments, shapes of the results and what stands in rows without
a key are FlashMLA's. Results come back in the caller's array type, NumPy or any CPU array that
exports through DLPack (a torch tensor, bfloat16 included).

Wider than FlashMLA: any number of query heads, any page size, any topk, float16, BF16 and FP16
rows in the sparse decode, topk_length [b, s_q], any head dims in the MHA functions, any invalid
index, `out=` to write into. Stricter: a holder that was planned for other lengths is refused
instead of giving wrong results, and so is an is_fp8_kvcache that does not say what the cache is.

There is no autograd here: for gradients of the MHA functions call `cumla.mha_varlen_backward`
with their results.
"""

from cumla.flash_mla.decode import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
from cumla.flash_mla.prefill import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
)

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
