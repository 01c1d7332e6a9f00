"""Global tokens of ASA_G: keys and values pooled over windows of n tokens (BLADE section 3.3, algorithms 1.3).

    K' = [K ; mean_n(K)]    V' = [V ; mean_n(V)]    scores of pooled keys + ln(number of tokens in the window)

so that a pooled token weighs like the tokens it stands for. Under a key mask b a window's mean is weighted by exp(b)
and ln n becomes log sum exp(b): a hidden token counts nothing, a bool mask leaves the plain mean of the visible tokens
and the logarithm of their number, and a window without a visible token gets minus infinity.

Windows never mix modalities: each protected range and each stretch between them has its own, the last of which may be
shorter. They run over the sequence as it lies, that is after reordering.

Plain differentiable ATen: Inductor fuses it with what makes k and v. Sizes may be symbolic.

Shapes: B batch, H query heads, Hkv key heads, T key tokens, D head dim, G = sum of ceil(length / n) over the stretches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import reference


def pooled(
    k: Tensor, v: Tensor, key_mask: Tensor | None, window: int, protect: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """The global tokens of k and v.

    Args:
        k, v: [B, Hkv, T, D].
        key_mask: bool [B|1, T] or [B|1, H|1, T] (True: attend), or additive float; None: all visible.
        window: n, tokens in a window.
        protect: flat (start, length, start, length, ...) ranges of another modality; a negative start counts from the
            end.

    Returns:
        global_k and global_v [B, Hkv, G, D] in the dtype of k, differentiable in k and v ([B, H, G, D] where query
        heads that share keys have masks of their own), and global_bias fp32 (fp64 for fp64) [B|1, H|1, G].

    Raises:
        ValueError: a window below 1.
    """
    if window < 1:
        raise ValueError(f"the window of global tokens is {window}; valid is an integer from 1 on.")
    compute = torch.float64 if k.dtype == torch.float64 else torch.float32
    bias = reference.additive_mask(key_mask, compute)
    if bias is not None:
        bias = bias.detach().squeeze(2)
        if bias.shape[1] > k.shape[1]:
            k, v = (x.repeat_interleave(bias.shape[1] // x.shape[1], 1) for x in (k, v))
    parts = [_stretch(k, v, bias, window, a, b, compute) for a, b in stretches(k.shape[2], protect)]
    if not parts:
        return k[:, :, :0], v[:, :, :0], k.new_zeros(1, 1, 0, dtype=compute)
    if len(parts) == 1:
        return parts[0]
    keys, values, biases = zip(*parts)
    return torch.cat(keys, 2), torch.cat(values, 2), torch.cat(biases, 2)


def stretches(num_tokens: int, protect: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of the protected ranges and of what lies between them, ascending; together all tokens.

    Ranges that touch stay two, as two texts do. Comparisons only: sizes may be symbolic.
    """
    ranges: list[tuple[int, int]] = []
    for start, length in zip(protect[::2], protect[1::2], strict=True):
        if length <= 0:
            continue
        first = start + num_tokens if start < 0 else start
        place = len(ranges)
        while place > 0 and first < ranges[place - 1][0]:
            place -= 1
        ranges.insert(place, (first, first + length))
    found: list[tuple[int, int]] = []
    position = 0
    for first, last in [*ranges, (num_tokens, num_tokens)]:
        start, stop = (max(position, min(end, num_tokens)) for end in (first, last))
        found += [(a, b) for a, b in ((position, start), (start, stop)) if b > a]
        position = stop
    return found


def _stretch(
    k: Tensor, v: Tensor, bias: Tensor | None, window: int, start: int, stop: int, compute: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled tokens and their bias of the tokens start..stop."""
    count = (stop - start + window - 1) // window
    tail = count * window - (stop - start)

    def windows(x: Tensor) -> Tensor:
        x = x[:, :, start:stop].to(compute)
        # A symbolic tail is always padded: asking whether it is 0 would make a graph for each answer.
        x = pad(x, (0, 0, 0, tail)) if not isinstance(tail, int) or tail else x
        return x.reshape(*x.shape[:2], count, window, x.shape[3])

    if bias is None:
        size = torch.full((count,), window, dtype=compute, device=k.device)
        size = torch.where(torch.arange(count, device=k.device) == count - 1, window - tail, size)
        means = (windows(x).sum(3) / size[:, None] for x in (k, v))
        added = size.log()[None, None]
    else:
        cut = pad(bias[:, :, start:stop], (0, tail), value=-math.inf)
        cut = cut.reshape(*cut.shape[:2], count, window)
        added = cut.logsumexp(3)
        weights = (cut - added.masked_fill(added == -math.inf, 0)[..., None]).exp()[..., None]
        # A hidden NaN must not reach a mean through 0 * NaN.
        means = ((windows(x).masked_fill(weights == 0, 0) * weights).sum(3) for x in (k, v))
    global_k, global_v = (mean.to(k.dtype) for mean in means)
    return global_k, global_v, added
