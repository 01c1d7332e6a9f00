"""Where queries and keys come from, and which tokens of a joint sequence are text: small modules, then real ones."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from blade_compile.passes.lineage import Lineage
from blade_compile.passes.shadow import trace_shadow
from blade_compile.passes.sources import Sources, classify_sources

B, S, T, H, C = 2, 24, 10, 4, 32


def graphs_of(
    module: Any, *args: Any, dynamic: bool = False, grad: bool = False, **kwargs: Any
) -> list[fx.GraphModule]:
    """The Dynamo graphs of one call."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, _inputs: Any, **_options: Any) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    with torch.set_grad_enabled(grad):
        torch.compile(module, backend=record, dynamic=dynamic)(*args, **kwargs)
    return graphs


def classified(graph: fx.Graph, lineage: Lineage) -> list[Sources]:
    """Every SDPA call of a graph, in order."""
    calls = [n for n in graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    keys = ("query", "key", "value")
    return [
        classify_sources(*[*n.args, *(n.kwargs[k] for k in keys if k in n.kwargs)][:3], lineage=lineage) for n in calls
    ]


def sources(module: Any, *args: Any, **kwargs: Any) -> list[Sources]:
    """Classification on the shadow graphs; the Dynamo graphs themselves must give the same."""
    out: list[Sources] = []
    for gm in graphs_of(module, *args, **kwargs):
        shadow = trace_shadow(gm.graph)
        names = {node: str(shadow.dynamo[node].target) for node in shadow.inputs if node in shadow.dynamo}
        found = classified(shadow.graph, Lineage.of(shadow.graph, names))
        direct = classified(gm.graph, Lineage.of(gm.graph))
        assert [(f.kind, plain(f.protect_q), plain(f.protect_k)) for f in found] == [
            (f.kind, plain(f.protect_q), plain(f.protect_k)) for f in direct
        ]
        out += found
    return out


def plain(ranges: Any) -> list[tuple[str, str]]:
    return [(str(part.start), str(part.length)) for part in ranges]


class Attention(nn.Module):
    """Queries of x, keys and values of y (of x if absent)."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(C, C) for _ in range(4))
        self.qkv = nn.Linear(C, 3 * C)
        self.packed = packed

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (H, C // H)).transpose(1, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        y = x if y is None else y
        if self.packed:
            q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self.heads(self.to_q(x)), self.heads(self.to_k(y)), self.heads(self.to_v(y))
        o = F.scaled_dot_product_attention(q, k, v)
        return self.out(o.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """A module around a function of itself and the inputs, with a few attentions and weights to use."""

    def __init__(self, body: Any, packed: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.attn = nn.ModuleList(Attention(packed) for _ in range(layers))
        self.cls = nn.Parameter(torch.randn(1, 3, C))
        self.positions = nn.Parameter(torch.randn(1, S + 3, C))
        self.embed = nn.Linear(C, C)
        self.mix = nn.Conv1d(C, C, 3, padding=1, groups=C)
        self.mix2 = nn.Conv1d(C, C, 3, padding=1, groups=C)
        self.patch = nn.Conv2d(C, C, 2, stride=2)
        self.body = body

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.body(self, *args)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding with halves of the feature axis."""
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.ones(x.shape[-1])
    one, two = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-two, one], dim=-1) * angle.sin()


def complex_rotate(x: torch.Tensor) -> torch.Tensor:
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.ones(x.shape[-1] // 2)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3)


def written_rotate(x: torch.Tensor) -> torch.Tensor:
    """The way Wan does it: halves written into an empty buffer."""
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] - x[..., 1::2]
    out[..., 1::2] = x[..., 0::2] + x[..., 1::2]
    return out


def with_rotation(turn: Any) -> Any:
    def body(m: Model, x: torch.Tensor) -> torch.Tensor:
        a = m.attn[0]
        q, k = turn(a.heads(a.to_q(x))), turn(a.heads(a.to_k(x)))
        return F.scaled_dot_product_attention(q, k, a.heads(a.to_v(x)))

    return body


def conv_projections(m: Model, x: torch.Tensor) -> torch.Tensor:
    a = m.attn[0]
    q, k = m.mix(x.transpose(1, 2)).transpose(1, 2), m.mix2(x.transpose(1, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(a.heads(a.to_q(q)), a.heads(a.to_k(k)), a.heads(a.to_v(x)))


def flattened_linears(m: Model, x: torch.Tensor) -> torch.Tensor:
    """Projections on [B*S, C], heads merged into the batch for the attention."""
    a, flat = m.attn[0], x.reshape(-1, C)
    q, k, v = (p(flat).view(B, S, H, -1).transpose(1, 2).reshape(B * H, S, -1) for p in (a.to_q, a.to_k, a.to_v))
    return F.scaled_dot_product_attention(q, k, v)


def windows(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.attn[0](x.view(B, S // 6, 6, C).flatten(0, 1))


def detr(m: Model, x: torch.Tensor) -> torch.Tensor:
    a, placed = m.attn[0], x + m.positions[:, :S]
    return F.scaled_dot_product_attention(a.heads(a.to_q(placed)), a.heads(a.to_k(placed)), a.heads(a.to_v(x)))


def keys_placed(m: Model, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    a = m.attn[0]
    return F.scaled_dot_product_attention(a.heads(a.to_q(x)), a.heads(a.to_k(x + pos)), a.heads(a.to_v(x)))


X, Y = torch.randn(B, S, C), torch.randn(B, S, C)
TEXT = torch.randn(B, T, C)

SELF = {
    "plain": (lambda m, x: m.attn[0](x), (X,)),
    "residual stream": (lambda m, x: m.attn[1](F.layer_norm(x + m.attn[0](x), (C,))), (X,)),
    "after modulation": (lambda m, x, t: m.attn[0](x * (1 + t[:, None]) + t[:, None]), (X, X[:, 0])),
    "halves rotation": (with_rotation(rotate), (X,)),
    "complex rotation": (with_rotation(complex_rotate), (X,)),
    "written rotation": (with_rotation(written_rotate), (X,)),
    "separate convolutions": (conv_projections, (X,)),
    "flattened linears": (flattened_linears, (X,)),
    "windows": (windows, (X,)),
    "positions on q and k": (detr, (X,)),
    "positions on k only": (keys_placed, (X, Y)),
    "feature map": (lambda m, x: m.attn[0](m.patch(x).flatten(2).transpose(1, 2)), (torch.randn(B, C, 8, 6),)),
    "same input, no projection": (lambda m, x: F.scaled_dot_product_attention(x, x, x), (X,)),
}


@pytest.mark.parametrize("case", SELF)
def test_self_attention(case: str) -> None:
    body, args = SELF[case]
    for found in sources(Model(body), *args):
        assert found.kind == "self", found.reason
        assert found.protect_q == found.protect_k == ()


def test_packed_projection() -> None:
    assert sources(Model(lambda m, x: m.attn[0](x), packed=True), X)[0].kind == "self"


CROSS = {
    "another input": (lambda m, x, y: m.attn[0](x, y), (X, TEXT)),
    "equally long": (lambda m, x, y: m.attn[0](x, y), (X, Y)),
    "same positions on both": (lambda m, x, y, p: m.attn[0](x + p, y + p), (X, Y, torch.randn(B, S, C))),
    "after self-attention": (lambda m, x, y: m.attn[1](x + m.attn[0](x), y), (X, Y)),
    "another attention's output": (lambda m, x, y: m.attn[1](x, m.attn[0](y)), (X, Y)),
    "learned queries": (lambda m, x: m.attn[0](m.cls.expand(B, -1, -1), x), (X,)),
    "two halves": (lambda m, x: m.attn[0](x[:, : S // 2], x[:, S // 2 :]), (X,)),
}


@pytest.mark.parametrize("case", CROSS)
def test_cross_attention(case: str) -> None:
    body, args = CROSS[case]
    assert sources(Model(body), *args)[-1].kind == "cross"


class Named(Model):
    """The text input keeps its name in the graph."""

    def forward(self, x: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return self.body(self, x, encoder_hidden_states)


def test_reason_names_the_tensor() -> None:
    found = sources(Named(lambda m, x, text: m.attn[0](x, text)), X, Y)[0]
    assert found.reason == "keys come from another tensor: encoder_hidden_states"


def test_separate_inputs_are_unknown() -> None:
    q, k, v = (torch.randn(B, H, S, 8) for _ in range(3))
    assert sources(F.scaled_dot_product_attention, q, k, v)[0].kind == "unknown"


def longer_keys(order: str, before: bool) -> Any:
    def body(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = m.attn[0]
        q = a.heads(a.to_q(x))
        if before:
            both = torch.cat([x, y] if order == "prefix" else [y, x], dim=1)
            return F.scaled_dot_product_attention(q, a.heads(a.to_k(both)), a.heads(a.to_v(both)))
        one, two = a.heads(a.to_k(x)), a.heads(a.to_k(m.embed(y)))
        k = torch.cat([one, two] if order == "prefix" else [two, one], dim=2)
        return F.scaled_dot_product_attention(q, k, k)

    return body


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("order", ["prefix", "suffix"])
def test_queries_are_part_of_longer_keys(order: str, before: bool) -> None:
    found = sources(Model(longer_keys(order, before)), X, TEXT)[0]
    assert found.kind == order
    assert found.protect_q == ()
    assert found.protect_k == ((S, T) if order == "prefix" else (0, T),)


def test_cache_in_front_of_a_chunk_is_image() -> None:
    """Keys = a long cache and the new chunk: neither is text, though the chunk is the shorter part."""

    def body(m: Model, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        a = m.attn[0]
        k = torch.cat([cache, a.heads(a.to_k(x))], dim=2)
        return F.scaled_dot_product_attention(a.heads(a.to_q(x)), k, k)

    found = sources(Model(body), X, torch.randn(B, H, 3 * S, C // H))[0]
    assert (found.kind, found.protect_k) == ("suffix", ())


def joint(first: str) -> Any:
    """Two streams, joined after the projections, split again, layer after layer."""

    def body(m: Model, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for a in m.attn:
            pair = (x, text) if first == "image" else (text, x)
            q, k, v = (torch.cat([a.heads(p(s)) for s in pair], dim=2) for p in (a.to_q, a.to_k, a.to_v))
            o = a.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            n = pair[0].shape[1]
            one, two = pair[0] + o[:, :n], pair[1] + o[:, n:]
            x, text = (one, two) if first == "image" else (two, one)
        return x

    return body


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("first", ["image", "text"])
def test_joint_streams(first: str, grad: bool) -> None:
    found = sources(Model(joint(first), layers=4), X, TEXT, grad=grad)
    text = ((S, T),) if first == "image" else ((0, T),)
    assert [(f.kind, f.protect_q, f.protect_k) for f in found] == [("self", text, text)] * 4


@pytest.mark.parametrize("first", ["image", "text"])
def test_joint_streams_with_symbolic_sizes(first: str) -> None:
    model = Model(joint(first), layers=3)
    for part in (p for f in sources(model, X, TEXT, dynamic=True) for p in (*f.protect_q, *f.protect_k)):
        assert isinstance(part.length, torch.SymInt)
        assert part.length.node.hint == T
        assert (part.start if first == "text" else part.start.node.hint) == (0 if first == "text" else S)


def registers(m: Model, x: torch.Tensor) -> torch.Tensor:
    x = torch.cat([m.cls.expand(B, -1, -1), m.embed(x)], dim=1) + m.positions
    for a in m.attn:
        x = x + a(F.layer_norm(x, (C,)))
        x = x + F.gelu(m.embed(x)) * x.mean(1, keepdim=True)
    return x[:, 3:]


def test_registers_stay_protected_in_every_layer_and_fast() -> None:
    graph = graphs_of(Model(registers, layers=30), X)[0].graph
    start = time.process_time()
    found = classified(graph, Lineage.of(graph))
    assert time.process_time() - start < 1.0
    assert [(f.kind, f.protect_q, f.protect_k) for f in found] == [("self", ((0, 3),), ((0, 3),))] * 30


def test_text_by_name_even_when_it_is_the_longest() -> None:
    model = Named(lambda m, x, text: m.attn[0](torch.cat([text, x], dim=1)))
    assert sources(model, X, torch.randn(B, 3 * S, C))[0].protect_k == ((0, 3 * S),)


def test_nothing_to_find_in_a_concatenated_input() -> None:
    found = sources(Model(lambda m, x: m.attn[0](x)), torch.cat([TEXT, X], dim=1))[0]
    assert (found.kind, found.protect_q) == ("self", ())


def test_padding_of_a_ragged_batch() -> None:
    """Text and image written into a zero buffer, its tail left empty."""

    def body(m: Model, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(B, T + S + 6, C)
        out[:, :T] = m.embed(text)
        out[:, T : T + S] = x
        return m.attn[0](out)

    found = sources(Model(body), X, TEXT)[0]
    assert (found.kind, found.protect_q) == ("self", ((0, T), (T + S, 6)))


def test_never_raises() -> None:
    graph = fx.Graph()
    q, k = graph.placeholder("q"), graph.placeholder("k")
    assert classify_sources(q, k, k).kind == "unknown"
    odd = graph.call_function(torch.mul, (q, k))
    assert classify_sources(odd, k, k, q_dim=7).kind == "unknown"


def diffusers_model(name: str, **config: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


STEP = torch.tensor([10])
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
MODELS: dict[str, tuple[dict, dict, list[tuple[str, tuple]]]] = {
    "WanTransformer3DModel": (
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "num_layers": 2,
         "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "rope_max_seq_len": 32},
        {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 32, 16), "timestep": STEP},
        [("self", ()), ("cross", ())] * 2,
    ),
    "FluxTransformer2DModel": (
        {**HEADS, "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 32,
         "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]},
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": (1, 7, 32), "pooled_projections": (1, 32),
         "timestep": STEP / 10, "img_ids": (16, 3), "txt_ids": (7, 3)},
        [("self", ((0, 7),))] * 3,
    ),
    "SD3Transformer2DModel": (
        {**HEADS, "sample_size": 32, "patch_size": 1, "in_channels": 4, "num_layers": 2, "caption_projection_dim": 32,
         "joint_attention_dim": 32, "pooled_projection_dim": 64, "out_channels": 4, "dual_attention_layers": (0,)},
        {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 13, 32), "pooled_projections": (1, 64),
         "timestep": STEP},
        [("self", ((64, 13),)), ("self", ()), ("self", ((64, 13),))],
    ),
    "CogVideoXTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
         "text_embed_dim": 8, "num_layers": 3, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
         "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 9},
        {"hidden_states": (1, 2, 4, 8, 8), "encoder_hidden_states": (1, 9, 8), "timestep": STEP},
        [("self", ((0, 9),))] * 3,
    ),
    "HunyuanVideoTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
         "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16,
         "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4), "guidance_embeds": True},
        {"hidden_states": (1, 4, 3, 4, 4), "encoder_hidden_states": (1, 12, 16), "pooled_projections": (1, 8),
         "encoder_attention_mask": torch.ones(1, 12), "guidance": torch.tensor([1000.0]), "timestep": STEP},
        [("self", ()), *[("self", ((48, 12),))] * 3],
    ),
    "LTXVideoTransformer3DModel": (
        {**HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 2,
         "qk_norm": "rms_norm_across_heads", "caption_channels": 32},
        {"hidden_states": (1, 32, 8), "encoder_hidden_states": (1, 32, 32), "timestep": torch.rand(1),
         "encoder_attention_mask": torch.ones(1, 32), "num_frames": 2, "height": 4, "width": 4},
        [("self", ()), ("cross", ())] * 2,
    ),
    "PixArtTransformer2DModel": (
        {"sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
         "caption_channels": 32, "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8,
         "use_additional_conditions": False},
        {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 16, 32), "timestep": STEP,
         "added_cond_kwargs": {"aspect_ratio": None, "resolution": None}},
        [("self", ()), ("cross", ())] * 2,
    ),
    "QwenImageTransformer2DModel": (
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 3, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)},
        {"hidden_states": (1, 16, 16), "encoder_hidden_states": (1, 7, 16), "img_shapes": [(1, 4, 4)],
         "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.long), "timestep": STEP},
        [("self", ((0, 7),))] * 2,
    ),
}  # fmt: skip


def drawn(inputs: dict) -> dict:
    sizes = {k: v for k, v in inputs.items() if isinstance(v, tuple) and all(isinstance(n, int) for n in v)}
    return {**inputs, **{k: normal(*v) for k, v in sizes.items()}, "return_dict": False}


@pytest.mark.parametrize("name", MODELS)
def test_diffusers(name: str) -> None:
    config, inputs, expected = MODELS[name]
    found = sources(diffusers_model(name, **config), **drawn(inputs))
    assert [(f.kind, f.protect_q) for f in found] == expected
    assert all(f.protect_q == f.protect_k for f in found)


def test_diffusers_with_symbolic_sizes() -> None:
    config, inputs, expected = MODELS["FluxTransformer2DModel"]
    found = sources(diffusers_model("FluxTransformer2DModel", **config), **drawn(inputs), dynamic=True)
    assert len(found) == len(expected)
    for start, length in (part for f in found for part in f.protect_k):
        assert start == 0
        assert isinstance(length, torch.SymInt)


def test_image_queries_with_text_and_image_keys() -> None:
    from tests.zoo.image_joint import ENTRIES

    entry = next(e for e in ENTRIES if e.name == "PRXTransformer2DModel")
    args, kwargs = entry.inputs(0)
    for found in sources(entry.build(), *args, **kwargs):
        assert (found.kind, found.protect_q, found.protect_k) == ("suffix", (), ((0, 12),))
