"""A small class-conditional video diffusion transformer (DiT) for the digit clips.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (adaLN-Zero), over 3-D patches, with query-key
normalisation, 3-D rotary embeddings and learned axial positions. All tokens attend to all in one
``scaled_dot_product_attention`` per block, in raster order (t, h, w), so that ``torch.compile(backend="blade")``
rewrites it as it does any model's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blade_compile.distill.digits_data import NUM_CLASSES, ClipSpec
from blade_compile.distill.schedules import wide

NULL_CLASS = NUM_CLASSES
_TIME_FEATURES = 64
CLIP_MEAN, CLIP_DEVIATION = -0.8, 0.47  # of 16 x 16 clips in [-1, 1]; only roughly right is enough


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Sizes of the transformer. Raises ``ValueError`` where they don't fit together."""

    frames: int = 8
    "frames of a clip, T"
    size: int = 16
    "height and width of a frame"
    patch: tuple[int, int, int] = (2, 2, 2)
    "frames, rows and columns of a token"
    width: int = 96
    "channels of a token"
    depth: int = 4
    "number of blocks"
    heads: int = 3
    "attention heads; width / heads is a multiple of 8"

    def __post_init__(self) -> None:
        sizes = (self.frames, self.size, self.size)
        if any(n % p for n, p in zip(sizes, self.patch)):
            raise ValueError(f"patch is {self.patch}: it has to divide (frames, size, size) = {sizes}")
        if self.width % self.heads or (self.width // self.heads) % 8:
            raise ValueError(
                f"width is {self.width} and heads is {self.heads}: width / heads has to be a multiple of 8"
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        t, h, w = self.patch
        return self.frames // t, self.size // h, self.size // w

    @property
    def clips(self) -> ClipSpec:
        """The clips this model is made for."""
        return ClipSpec(frames=self.frames, size=self.size)


def rotary_angles(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    """Angles of 3-D rotary embeddings: the channel pairs are shared out to time, height and width.

    Su et al., "RoFormer", eq. 15, per axis. Frequencies fall from 1 to 1/32, which suits grids of up to some 30 tokens.

    Returns:
        fp32 ``[T * H * W, head_dim / 2]``, in raster order.
    """
    pairs = head_dim // 2
    shares = (pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8)
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = [p.flatten()[:, None] * 32.0 ** (-torch.arange(n) / n) for p, n in zip(places, shares)]
    return torch.cat(angles, dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + D/2) of ``[B, H, S, D]`` by angles given as ``[S, D/2]``."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def zero(linear: nn.Linear) -> nn.Linear:
    """Start a layer at zero, so that its block starts as the identity."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: ``x (1 + scale) + shift``."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Self-attention over all tokens, with RMS-normalised queries and keys and rotary embeddings."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.Parameter(torch.ones(width // heads))
        self.norm_k = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[B, S, width]`` to the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = rotate(F.rms_norm(q, q.shape[-1:]) * self.norm_q, cos, sin).to(v.dtype)
        k = rotate(F.rms_norm(k, k.shape[-1:]) * self.norm_k, cos, sin).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """One DiT block: attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = zero(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` ``[B, S, width]`` and ``condition`` ``[B, width]`` to ``[B, S, width]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1), cos, sin)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


def precondition(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the velocity into its best linear estimate and a residual of known size.

    Karras et al. (EDM, section 5 and appendix B.6) for x_s = (1 - s) x0 + s eps, with the mean and the deviation of
    the clips: with D = (1 - s)^2 sigma^2 + s^2 and u = x_s - (1 - s) mean, the linear estimate of x0 is
    mean + (1 - s) sigma^2 u / D, its error has the deviation s sigma / sqrt(D), and v = (x_s - x0) / s. The division
    cancels, so nothing is singular at s = 0.

    Args:
        x: noisy clips.
        s: times, broadcastable against ``x``.

    Returns:
        The network's input (mean 0, variance 1), the linear part of v, and the factor of the network's output, which
        is subtracted from it.
    """
    centred = x - (1 - s) * CLIP_MEAN
    spread = (1 - s) ** 2 * CLIP_DEVIATION**2 + s**2
    linear = centred * (s - (1 - s) * CLIP_DEVIATION**2) / spread - CLIP_MEAN
    return centred * spread.rsqrt(), linear, CLIP_DEVIATION * spread.rsqrt()


class DigitsTransformer(nn.Module):
    """Velocity of flow matching for digit clips.

    With x_s = (1 - s) x0 + s eps the model predicts v = eps - x0 (Lipman et al., "Flow Matching for Generative
    Modeling", with linear paths); what the network itself estimates is said in ``precondition``.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor
    frequencies: Tensor

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__()
        self.config = config
        width, values = config.width, math.prod(config.patch)
        self.patch_in = nn.Linear(values, width)
        self.position = nn.ParameterList(torch.randn(n, width) * 0.1 for n in config.grid)
        self.label = nn.Embedding(NUM_CLASSES + 1, width)
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero(nn.Linear(width, 2 * width))
        self.patch_out = zero(nn.Linear(width, values))
        angles = rotary_angles(config.grid, width // config.heads)
        self.register_buffer("rotary_cos", angles.cos(), persistent=False)
        self.register_buffer("rotary_sin", angles.sin(), persistent=False)
        frequencies = torch.logspace(0, math.log10(200.0), _TIME_FEATURES // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        nn.init.normal_(self.label.weight, std=0.5)

    def patchify(self, x: Tensor) -> Tensor:
        """``[B, 1, T, H, W]`` to tokens in raster order, ``[B, S, values of a patch]``."""
        (t, h, w), (pt, ph, pw) = self.config.grid, self.config.patch
        x = x.reshape(-1, t, pt, h, ph, w, pw).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(-1, t * h * w, pt * ph * pw)

    def unpatchify(self, x: Tensor) -> Tensor:
        """The inverse of ``patchify``."""
        (t, h, w), (pt, ph, pw) = self.config.grid, self.config.patch
        x = x.reshape(-1, t, h, w, pt, ph, pw).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(-1, 1, t * pt, h * ph, w * pw)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """The velocity at noisy clips.

        Args:
            x: ``[B, 1, T, H, W]``, any float dtype.
            time: s in [0, 1], ``[B]``; 1 is pure noise.
            label: classes int64 ``[B]``; ``NULL_CLASS`` for none.

        Returns:
            v fp32 (fp64 for fp64) ``[B, 1, T, H, W]``.
        """
        x = wide(x)
        s = time.to(x.dtype).view(-1, 1, 1, 1, 1)
        scaled, linear, factor = precondition(x, s)
        t, h, w = self.position
        tokens = self.patch_in(self.patchify(scaled)) + (t[:, None, None] + h[:, None] + w).flatten(0, 2)
        phase = time[:, None].to(x.dtype) * self.frequencies
        condition = F.silu(self.time(torch.cat((phase.sin(), phase.cos()), dim=1)) + self.label(label))
        for block in self.blocks:
            tokens = block(tokens, condition, self.rotary_cos, self.rotary_sin)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        residual = self.unpatchify(self.patch_out(modulate(self.norm(tokens), shift, scale)).to(x.dtype))
        return linear - factor * residual


def guided(model: nn.Module, x: Tensor, time: Tensor, label: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance in its standard form, ``v_u + cfg_scale (v_c - v_u)`` (Ho and Salimans).

    Shapes as in ``DigitsTransformer.forward``; one call of the model with twice the batch, or once at scale 1.
    """
    if cfg_scale == 1:
        velocity: Tensor = model(x, time, label)
        return velocity
    both = model(x.repeat(2, 1, 1, 1, 1), time.repeat(2), torch.cat((label, torch.full_like(label, NULL_CLASS))))
    conditional, unconditional = both.chunk(2)
    guided_velocity: Tensor = unconditional + cfg_scale * (conditional - unconditional)
    return guided_velocity


@torch.no_grad()
def sample(
    model: nn.Module,
    noise: Tensor,
    label: Tensor,
    *,
    steps: int,
    cfg_scale: float = 1.0,
    shift: float = 1.0,
) -> Tensor:
    """Euler's method from s = 1 to 0 on the grid of a flow-matching scheduler with a shift.

    Args:
        model: predicts v; see ``DigitsTransformer.forward``.
        noise: ``[B, 1, T, H, W]``, standard normal.
        label: int64 ``[B]``.
        steps: number of model evaluations (of double batch with guidance).
        cfg_scale: 1 is no guidance.
        shift: s' = shift s / (1 + (shift - 1) s) (Esser et al., "Scaling Rectified Flow Transformers", eq. 23).

    Returns:
        Clips fp32 ``[B, 1, T, H, W]``, not clamped.
    """
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = (shift * even / (1 + (shift - 1) * even)).tolist()
    x = noise.float()
    for now, after in pairwise(times):
        velocity = guided(model, x, torch.full((len(x),), now, device=x.device), label, cfg_scale)
        x = x + (after - now) * velocity
    return x
