"""KV caches for Hugging Face transformers: what `generate` uses a DynamicCache for, over kvspan.

::

    from kvspan.transformers import SpanCache
    model.generate(**inputs, past_key_values=SpanCache(model.config))

Importing this package also makes ``attn_implementation="kvspan"`` known to transformers: attention
through `flash_compat`, which reads keys and values where they lie.
"""

from kvspan.transformers import attention
from kvspan.transformers.cache import EncoderDecoderSpanCache, SpanCache
from kvspan.transformers.layer import SpanLayer, SpanSlidingLayer

__all__ = ["EncoderDecoderSpanCache", "SpanCache", "SpanLayer", "SpanSlidingLayer"]

attention.register()
