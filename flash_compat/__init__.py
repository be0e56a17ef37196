"""flash-attn's functions over kvspan's tensors, or any others, on any device.

Code written for ``flash_attn`` runs here by changing its import. On a GPU the installed flash-attn
packages do the work, else torch's kernels; on a CPU a kernel of our own decodes, and
`torch.nn.functional.scaled_dot_product_attention` does the rest.
"""

from flash_compat.interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
