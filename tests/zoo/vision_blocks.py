"""Vision transformer and DiT blocks as timm and the DiT authors write them, in plain torch.

timm itself needs torchvision, which must not be installed beside a CPU build of torch. What matters to the passes is
how attention is spelled: packed QKV, the fused and the explicit form, queries and keys normed, rotary embeddings that
skip prefix tokens, talking heads, attention over channels. Each spelling follows the named class of timm 1.0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import Draw, Entry, Inputs, prepare_weights

FAMILY = "vision blocks"
DIM, HEADS = 64, 2


class Attention(nn.Module):
    """timm.layers.Attention: packed QKV; `fused` picks SDPA or the explicit product."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, *, qk_norm: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.head_dim, self.fused = heads, dim // heads, fused
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            attn = attn.softmax(dim=-1)
            attn = self.attn_drop(attn)
            x = attn @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class EvaAttention(nn.Module):
    """timm.models.eva.EvaAttention: a packed projection with a bias for q and v only, rotary after the prefix."""

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.prefix = prefix
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(DIM))
        self.v_bias = nn.Parameter(torch.zeros(DIM))
        self.register_buffer("k_bias", torch.zeros(DIM), persistent=False)
        self.register_buffer("angle", torch.linspace(0, 30, 96)[:, None] / torch.arange(1, 17), persistent=False)
        self.proj = nn.Linear(DIM, DIM)

    def rotate(self, x: Tensor, like: Tensor) -> Tensor:
        sin, cos = (f(self.angle).repeat_interleave(2, -1) for f in (torch.sin, torch.cos))
        image = x[:, :, self.prefix :]
        turned = torch.stack([-image[..., 1::2], image[..., ::2]], -1).reshape(image.shape)
        return torch.cat([x[:, :, : self.prefix], image * cos + turned * sin], dim=2).type_as(like)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.rotate(q, v), self.rotate(k, v)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class BeitAttention(nn.Module):
    """timm.models.beit.Attention: a learned bias for each pair of positions."""

    def __init__(self, tokens: int = 96) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(2 * tokens, HEADS))
        place = torch.arange(tokens)
        self.register_buffer("index", place[:, None] - place[None] + tokens, persistent=False)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1).contiguous().unsqueeze(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class TalkingHeads(nn.Module):
    """timm.models.cait.TalkingHeadAttn: heads are mixed before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj_l, self.proj_w = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (C // HEADS) ** -0.5, qkv[1], qkv[2]
        attn = q @ k.transpose(-2, -1)
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        attn = attn.softmax(dim=-1)
        attn = self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class ChannelAttention(nn.Module):
    """timm.models.xcit.XCA: softmax over channels, a look-alike that isn't attention over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, HEADS, C // HEADS).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attn = (q @ k.transpose(-2, -1)) * self.temperature
        attn = attn.softmax(dim=-1)
        return self.proj((attn @ v).permute(0, 3, 1, 2).reshape(B, N, C))


class ReducedAttention(nn.Module):
    """timm.models.pvt_v2.Attention: keys and values from a downsampled copy of the tokens."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.width = width
        self.q, self.kv, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)
        self.sr, self.norm = nn.Conv2d(DIM, DIM, kernel_size=2, stride=2), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, HEADS, -1).permute(0, 2, 1, 3)
        small = self.sr(x.permute(0, 2, 1).reshape(B, C, -1, self.width)).reshape(B, C, -1).permute(0, 2, 1)
        k, v = self.kv(self.norm(small)).reshape(B, -1, 2, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    """timm.models.vision_transformer.Block with LayerScale: norm, attention, norm, MLP."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = attention
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class ParallelBlock(nn.Module):
    """timm.models.vision_transformer.ParallelScalingBlock (ViT-22B): one projection for the MLP and for q, k, v."""

    def __init__(self) -> None:
        super().__init__()
        self.in_norm = nn.LayerNorm(DIM)
        self.in_proj = nn.Linear(DIM, 4 * DIM + 3 * DIM)
        self.q_norm, self.k_norm = nn.LayerNorm(DIM // HEADS), nn.LayerNorm(DIM // HEADS)
        self.attn_out_proj, self.mlp_out_proj = nn.Linear(DIM, DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        y = self.in_proj(self.in_norm(x))
        hidden, q, k, v = torch.split(y, [4 * DIM, DIM, DIM, DIM], dim=-1)
        q = self.q_norm(q.view(B, N, HEADS, -1)).transpose(1, 2)
        k = self.k_norm(k.view(B, N, HEADS, -1)).transpose(1, 2)
        v = v.view(B, N, HEADS, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0).transpose(1, 2).reshape(B, N, C)
        return x + self.attn_out_proj(mixed) + self.mlp_out_proj(F.gelu(hidden))


class VisionTransformer(nn.Module):
    """Patches, a class token and registers in front, blocks, and the pooled head `pool` (or all tokens)."""

    def __init__(self, blocks: list[nn.Module], prefix: int = 1, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, kernel_size=4, stride=4)
        self.prefix_tokens = nn.Parameter(torch.zeros(1, prefix, DIM)) if prefix else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 96, DIM))
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head, self.pool = nn.LayerNorm(DIM), nn.Linear(DIM, 10), pool

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image).flatten(2).transpose(1, 2) + self.pos_embed
        if self.prefix_tokens is not None:
            x = torch.cat([self.prefix_tokens.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x))
        return self.head(x if self.pool is None else self.pool(x))


class LatentPool(nn.Module):
    """timm.layers.AttentionPoolLatent: one learned query over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, DIM))
        self.q, self.kv, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q = self.q(self.latent.expand(B, -1, -1)).reshape(B, 1, HEADS, -1).transpose(1, 2)
        k, v = self.kv(x).reshape(B, N, 2, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, 1, C))[:, 0]


class DiTBlock(nn.Module):
    """The block of facebookresearch/DiT: adaLN-Zero around timm's attention."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(fused=fused)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(approximate="tanh"), nn.Linear(4 * DIM, DIM))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(_modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), shift_m, scale_m))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiT(nn.Module):
    """facebookresearch/DiT, two blocks, 8 x 12 latent patches, one class label."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, DIM, kernel_size=2, stride=2)
        self.t_embedder = nn.Sequential(nn.Linear(32, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.y_embedder = nn.Embedding(11, DIM)
        self.blocks = nn.ModuleList([DiTBlock(fused=fused) for _ in range(2)])
        self.final = nn.Linear(DIM, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(16, device=x.device, dtype=x.dtype) / 2)
        angle = t[:, None].to(x.dtype) * frequencies
        c = self.t_embedder(torch.cat([angle.cos(), angle.sin()], dim=-1)) + self.y_embedder(y)
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, c)
        B = x.shape[0]
        return torch.einsum("nhwpqc->nchpwq", self.final(tokens).reshape(B, 8, 12, 2, 2, 4)).reshape(B, 4, 16, 24)


class TorchBlock(nn.Module):
    """torchvision's EncoderBlock: nn.MultiheadAttention without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.ln_1(tokens)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = x + tokens
        return x + self.mlp(self.ln_2(x))


def _images(seed: int) -> Inputs:
    return (Draw(seed).normal(2, 3, 32, 48),), {}


def _latents(seed: int) -> Inputs:
    return (Draw(seed).normal(2, 4, 16, 24), torch.tensor([37, 600]), torch.tensor([3, 7])), {}


def _vit(name: str, attention: Callable[[], nn.Module], **facts: int | str) -> Entry:
    """A `VisionTransformer` of two blocks around `attention`; `prefix` counts the tokens in front."""
    prefix = int(facts.pop("prefix", 1))

    def build() -> nn.Module:
        return prepare_weights(VisionTransformer([Block(attention()) for _ in range(2)], prefix=prefix))

    return Entry(name=name, build=build, inputs=_images, family=FAMILY, **facts)  # type: ignore[arg-type]


def _other(
    name: str, make: Callable[[], nn.Module], inputs: Callable[[int], Inputs] = _images, **facts: object
) -> Entry:
    def build() -> nn.Module:
        return prepare_weights(make())

    return Entry(name=name, build=build, inputs=inputs, family=FAMILY, **facts)  # type: ignore[arg-type]


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=True, norm_first=True)


ENTRIES = [
    _vit("ViT, fused", Attention, backward=True),
    _vit("ViT, explicit", lambda: Attention(fused=False), backward=True),
    _vit("ViT, qk-norm and registers", lambda: Attention(qk_norm=True), prefix=5),
    _vit("EVA, rotary after the prefix", EvaAttention),
    _vit("BEiT, relative position bias", BeitAttention, prefix=0, notes="a bias for each pair: dense"),
    _vit("CaiT, talking heads", TalkingHeads, not_self=2, notes="heads mixed around the softmax: dense"),
    _vit("XCiT, attention over channels", ChannelAttention, not_self=2, notes="a look-alike: untouched"),
    _vit("PVT, reduced keys", ReducedAttention, prefix=0, notes="keys from downsampled tokens: cross"),
    _other("ViT-22B, parallel block", lambda: VisionTransformer([ParallelBlock(), ParallelBlock()])),
    _other(
        "ViT, pooled by a latent query", lambda: VisionTransformer([Block(Attention())], prefix=0, pool=LatentPool())
    ),
    _other("torchvision ViT, nn.MultiheadAttention", lambda: VisionTransformer([TorchBlock(), TorchBlock()])),
    _other("nn.TransformerEncoderLayer", lambda: VisionTransformer([_encoder_layer(), _encoder_layer()])),
    _other("DiT, fused", lambda: DiT(fused=True), _latents, backward=True),
    _other("DiT, explicit", lambda: DiT(fused=False), _latents),
]
