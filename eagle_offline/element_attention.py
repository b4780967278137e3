"""Who reads whom among the elements of a P-EAGLE forward, and the attention that keeps to it.

Elements are flat: what one is follows from its anchor and depth, never from its place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# (batch, head, query, key) -> bool, indices of any shapes that broadcast.
MaskMod = Callable[[Any, Any, Tensor, Tensor], Tensor]

# Elements in one block of a block mask.
_BLOCK_ELEMENTS = 128
# Triton multiplies no matrices narrower than this.
_MIN_HEAD_SIZE = 16


def create_peagle_mask_mod(anchor_pos: Tensor, depth: Tensor, lengths: Tensor, total_seq_len: int) -> MaskMod:
    """Return the predicate "element ``query`` reads element ``key``", as `flex_attention` takes it.

    Inside a document an element reads depth 0 up to its own anchor, and its own chain up to its own depth. Elements
    whose anchor lies beyond the documents are padding: they read themselves, so that no softmax is over nothing, and
    nobody else reads them.

    Args:
        anchor_pos, depth: int64 ``[M]``.
        lengths: int64 ``[D]``, slots of the row's documents in order; zeros among them are no documents.
        total_seq_len: slots of the row.

    Example:
        The elements (0, 0), (1, 0), (0, 1) of one document: the last one reads its anchor and itself.

        >>> reads = create_peagle_mask_mod(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), torch.tensor([2]), 2)
        >>> reads(0, 0, torch.tensor([[0], [1], [2]]), torch.arange(3)).int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]

    Source: P-EAGLE, arXiv 2602.01469.
    """
    real = anchor_pos < lengths.sum().clamp_max(total_seq_len)
    document = torch.searchsorted(lengths.cumsum(0), anchor_pos, right=True)

    def mask_mod(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
        inside = real[query] & real[key] & (document[query] == document[key])
        context = (depth[key] == 0) & (anchor_pos[query] >= anchor_pos[key])
        chain = (anchor_pos[query] == anchor_pos[key]) & (depth[query] >= depth[key])
        return (query == key) | (inside & (context | chain))

    return mask_mod


class ElementAttention:
    """Attention among the elements of one forward, the same for all its layers; see `create_peagle_mask_mod`.

    On CUDA a mask is blocks and a predicate; elsewhere, and for states that its kernels do not take, it is dense.

    Args:
        anchor_pos, depth, lengths, total_seq_len: see `create_peagle_mask_mod`.
        first_query: elements from this one on are queries, ``Q`` of them; all ``M`` are keys.
    """

    def __init__(self, anchor_pos: Tensor, depth: Tensor, lengths: Tensor, total_seq_len: int, first_query: int = 0):
        self._num_keys, self._num_queries = len(anchor_pos), len(anchor_pos) - first_query
        self._first_query, self._device = first_query, anchor_pos.device
        # Whole blocks, so that compiled kernels serve every number of elements; a padded query is among the keys too.
        self._query_padding = -self._num_queries % _BLOCK_ELEMENTS
        self._key_padding = self._query_padding + -(self._num_keys + self._query_padding) % _BLOCK_ELEMENTS
        self._mask_mod = create_peagle_mask_mod(
            F.pad(anchor_pos, (0, self._key_padding), value=total_seq_len),
            F.pad(depth, (0, self._key_padding)),
            lengths,
            total_seq_len,
        )

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output ``[B, heads, Q, head_dim]``.

        Args:
            queries: ``[B, heads, Q, head_dim]``.
            keys, values: ``[B, kv_heads, M, head_dim]``.
        """
        enable_gqa = queries.shape[1] != keys.shape[1]
        if not flex_takes(queries):
            return F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=self.dense_mask, enable_gqa=enable_gqa
            )
        queries = F.pad(queries, (0, 0, 0, self._query_padding))
        keys, values = (F.pad(states, (0, 0, 0, self._key_padding)) for states in (keys, values))
        output = _compiled(flex_attention)(queries, keys, values, block_mask=self._block_mask, enable_gqa=enable_gqa)
        return output[:, :, : self._num_queries]

    @cached_property
    def dense_mask(self) -> Tensor:
        """Bool ``[Q, M]``: who reads whom."""
        elements = torch.arange(self._num_keys, device=self._device)
        return self._mask_mod(0, 0, elements[self._first_query :, None], elements[None, :])

    @cached_property
    def _block_mask(self) -> BlockMask:
        mask_mod, first_query = self._mask_mod, self._first_query

        def reads(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
            return mask_mod(batch, head, query + first_query, key)

        num_queries, num_keys = self._num_queries + self._query_padding, self._num_keys + self._key_padding
        return _compiled(create_block_mask)(reads, None, None, num_queries, num_keys, str(self._device))


def flex_takes(queries: Tensor) -> bool:
    """Return whether flex attention has kernels, forward and backward, for such states."""
    return queries.is_cuda and queries.dtype != torch.float64 and queries.shape[-1] >= _MIN_HEAD_SIZE


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of flex attention compiled whole: what is not compiled writes out all pairs of elements."""
    return torch.compile(function, fullgraph=True)
