"""Policy ``vsa``: attention between mean-pooled blocks, the coarse stage of VSA (arXiv 2505.13389, section 2).

    Qc, Kc = means of the blocks' queries and keys        map = softmax(scale * Qc Kc^T)

The published method keeps the top k blocks of 64 tokens (4 x 4 x 4 of the video, which ``order="tile"`` gives) and adds
the coarse attention's own output with a learned gate; that needs training, and only the selection stands here.
"""

from __future__ import annotations

from torch import Tensor

from .block_pooling import block_scores, key_heads, mean_pooled, softmax
from .policies import MapPolicy, Request, register


def block_map(request: Request) -> Tensor:
    """Softmax over key blocks of the scores of block means, [1, H, nQ, nK]."""
    q, _ = mean_pooled(request.q, request.block_size, request.compute)
    keys = key_heads(request.k, request.q.shape[1], request.bias)
    k, added = mean_pooled(keys, request.block_size, request.compute, request.bias)
    return softmax(*block_scores(q, k, added, request.scale))


register(MapPolicy("vsa", block_map, defaults={"sparsity": 0.8, "block_size": 64}))
