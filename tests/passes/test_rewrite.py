"""Rewritten graphs compute what the user's did: training, checkpoints, autocast, other dtypes, libraries, export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import Library
from torch.utils.checkpoint import checkpoint

from blade_compile.passes.find_attention import find_sites
from blade_compile.passes.rewrite import RewriteError, rewrite_site
from tests.passes.harness import DENSE, Rewriting, compiled, copies
from tests.passes.spellings import REWRITTEN, B, D, H, S, Spelling, mha, qkv, rand, with_keys

TRAINED = [s for s in REWRITTEN if s.name in {
    "sdpa", "sdpa, native grouped heads", "sdpa, packed qkv by unbind", "matmul, divide", "matmul, in-place scale",
    "matmul, row maximum subtracted", "matmul, masked_fill -1e9", "matmul, learned temperature", "matmul, two masks",
    "matmul, grouped heads expanded", "baddbmm, alpha", "einsum, tokens first", "MultiheadAttention",
    "TransformerEncoderLayer, train",
}]  # fmt: skip


def check(call, *inputs, grad: bool = False, tolerance: float = 5e-6, rewrites: int = 1, **options) -> Rewriting:
    """Result and gradients of the rewritten graph equal the user's own."""
    backend, mine, theirs = Rewriting(), copies(inputs, grad=grad), copies(inputs, grad=grad)
    with torch.set_grad_enabled(grad):
        plain, result = call(*theirs), compiled(call, backend, *mine, **options)
    assert backend.count("blade.sparse_sdpa") == rewrites, [(s.code, s.reason) for s in backend.sites]
    assert result.dtype == plain.dtype
    torch.testing.assert_close(result, plain, atol=tolerance, rtol=tolerance)
    if grad:
        direction = torch.linspace(-1, 1, plain.numel()).view(plain.shape).to(plain.dtype)
        (plain * direction).sum().backward()
        (result * direction).sum().backward()
        for a, b in zip(mine, theirs):
            if isinstance(b, Tensor) and b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, atol=8 * tolerance, rtol=8 * tolerance)
    return backend


@pytest.mark.parametrize("spelling", TRAINED, ids=lambda s: s.name)
def test_training(spelling: Spelling):
    inputs = spelling.inputs()
    if "two masks" in spelling.name:
        inputs = tuple(x.detach() for x in inputs)
    check(spelling.call, *inputs, grad=True, fullgraph=True)


@pytest.mark.parametrize("name", ["sdpa", "matmul, divide", "MultiheadAttention"])
def test_inside_a_checkpoint(name: str):
    spelling = next(s for s in REWRITTEN if s.name == name)

    def call(*inputs: Tensor) -> Tensor:
        return checkpoint(spelling.call, *inputs, use_reentrant=False) * 2

    check(call, *spelling.inputs(), grad=True, fullgraph=True)


def test_inside_both_branches_of_cond():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (k @ q.mT).softmax(-1) @ v

        return torch.cond(q.sum() > 0, F.scaled_dot_product_attention, swapped, (q, k, v))

    check(call, *qkv(), rewrites=2)


@pytest.mark.parametrize("inside", [True, False], ids=["region in the graph", "region around the call"])
@pytest.mark.parametrize("name", ["sdpa", "matmul, divide", "bmm, merged heads", "MultiheadAttention"])
def test_autocast(name: str, inside: bool):
    spelling = next(s for s in REWRITTEN if s.name == name)

    def region(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return spelling.call(*inputs)

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        backend = check(
            region if inside else spelling.call, *spelling.inputs(), grad=True, tolerance=3e-2, fullgraph=True
        )
    assert backend.sites[0].dtype == torch.bfloat16


def test_autocast_with_queries_and_values_of_different_dtypes():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v.bfloat16())

    check(call, *qkv(), tolerance=3e-2)


def test_wider_queries_are_not_narrowed():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1).to(v.dtype)) @ v

    q, k, v = qkv()
    backend = check(call, q, k, v.bfloat16(), tolerance=2e-2)
    assert backend.sites[0].dtype == torch.float32


def test_upcast_attention_runs_in_the_dtype_of_its_inputs():
    spelling = next(s for s in REWRITTEN if s.name == "matmul, all in fp32 and back")
    assert check(spelling.call, *spelling.inputs(), tolerance=2e-2).sites[0].dtype == torch.bfloat16


def test_a_wide_output_that_somebody_reads_stays_wide():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q.float() @ k.float().mT, -1) @ v.float()

    assert check(call, *qkv(torch.bfloat16)).sites[0].dtype == torch.float32


def test_a_row_with_no_key_left_averages_as_with_masked_fill():
    def call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~keep[:, None, None], -1e4).softmax(-1) @ v

    *inputs, keep = with_keys()()
    keep[0] = False
    check(call, *inputs, keep)


def test_views_of_the_output_still_work():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) @ v).mul(2).view(B * H, S * D)

    check(call, *qkv())


def test_output_reaches_its_projection_without_a_copy():
    def call(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in x.chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, H * D)
        return F.linear(out, weight)

    backend = check(call, rand(B, S, 3 * H * D), rand(8, H * D))
    assert backend.count("aten.contiguous") == 0


def test_two_sites_where_one_feeds_the_other():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = (q @ k.mT * 0.2).softmax(-1) @ v
        return F.scaled_dot_product_attention(first, first * 0.5, first)

    check(call, *qkv(), rewrites=2, grad=True)


def test_shared_inputs_survive():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scaled = q * 0.2
        return (scaled @ k.mT).softmax(-1) @ v + scaled

    check(call, *qkv())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_with_padding(batch_first: bool, training: bool):
    module = nn.MultiheadAttention(H * D, H, batch_first=batch_first).train(training)
    pad = torch.zeros(B, S, dtype=torch.bool)
    pad[1, S - 9 :] = True

    def call(x: Tensor, pad: Tensor) -> Tensor:
        return module(x, x, x, key_padding_mask=pad)[0]

    backend = check(call, rand(B, S, H * D) if batch_first else rand(S, B, H * D), pad, grad=training)
    assert backend.sites[0].mask_kind == "key"
    assert backend.sites[0].shape == (B, H, S, S, D)


def test_module_weights_get_their_gradients():
    module, x = mha(), rand(B, S, H * D)
    grads = []
    for run in (module, torch.compile(module, backend=Rewriting())):
        module.zero_grad()
        run(x, x, x)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    for ours, theirs in zip(grads[1], grads[0]):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer_fast_path_with_padding(norm_first: bool, activation: str):
    layer = nn.TransformerEncoderLayer(
        H * D, H, 96, activation=activation, batch_first=True, norm_first=norm_first, dropout=0.0
    ).eval()
    pad = torch.zeros(B, S, dtype=torch.bool)
    pad[0, :6] = True
    backend = check(lambda x, pad: layer(x, src_key_padding_mask=pad), rand(B, S, H * D), pad)
    assert [site.kind for site in backend.sites] == ["encoder_layer"]


def test_dynamic_batch_heads_and_length():
    def call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        b, s, h, d = q.shape
        q, k, v = (x.transpose(1, 2).reshape(b * h, s, d) for x in (q, k, v))
        bias = torch.where(keep, 0.0, -1e9)[:, None].repeat_interleave(h, 0)
        out = torch.bmm((torch.bmm(q, k.mT) * 0.25 + bias).softmax(-1), v)
        return out.reshape(b, h, s, d).transpose(1, 2).reshape(b, s, h * d)

    backend = Rewriting()
    run = torch.compile(call, backend=backend, dynamic=True)
    for b, s in ((2, 40), (3, 33), (4, 70)):
        inputs = (*(rand(b, s, H, D) for _ in "qkv"), torch.rand(b, s) > 0.2)
        torch.testing.assert_close(run(*inputs), call(*inputs), atol=3e-6, rtol=3e-6)
    assert backend.codes == ["rewritten"]
    assert backend.sites[0].mask_kind == "key"


def test_protected_ranges_may_be_symbolic():
    """Text before the image: what the sources say arrives in the operator as sizes of this very call."""

    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = (nn.Linear(H * D, 3 * H * D) for _ in range(2))

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            x = torch.cat([self.text(encoder_hidden_states), self.image(hidden_states)], dim=1)
            q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in x.chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v)

    seen = []

    class Protecting(Rewriting):
        def rewrite(self, gm) -> None:
            for site in find_sites(gm):
                flat = [number for part in site.protect_k for number in part]
                rewrite_site(gm.graph, site, {**DENSE, "protect_q": flat, "protect_k": flat})
                seen.append((len(site.protect_k), site.sources.kind))
            gm.graph.lint()
            gm.recompile()

    model = Joint()
    run = torch.compile(model, backend=Protecting(), dynamic=True)
    for text, image in ((9, 40), (12, 50)):
        inputs = rand(B, image, H * D), rand(B, text, H * D)
        torch.testing.assert_close(run(*inputs), model(*inputs), atol=3e-6, rtol=3e-6)
    assert seen == [(1, "self")]


# ---- other libraries -------------------------------------------------------------------------------------------------
def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2).contiguous()


def _stand_in(namespace: str, schema: str, results: int) -> Library:
    """A library operator of the real name and schema; q, k, v come first and ``softmax_scale`` by name."""
    library = Library(namespace, "FRAGMENT")
    library.define(schema)
    name = schema.partition("(")[0]
    names = [a.name for a in getattr(getattr(torch.ops, namespace), name).default._schema.arguments]

    def run(*args, **kwargs):
        given = dict(zip(names, args)) | kwargs
        out = _dense(*args[:3], given.get("softmax_scale"))
        return out, *(out.new_zeros(2) for _ in range(results - 1))

    for key in ("CPU", "Meta"):
        library.impl(name, run, key)
    return library


LIBRARIES = [
    _stand_in(
        "flash_attn",
        "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
        "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        4,
    ),
    _stand_in(
        "flash_attn_3",
        "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? q_v=None, Tensor? out=None, "
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
        "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None, "
        "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
        "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
        "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
        "int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, "
        "int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)",
        4,
    ),
    _stand_in(
        "xformers_flash",
        "flash_fwd(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "Tensor? seqused_k, int max_seqlen_q, int max_seqlen_k, float p, float softmax_scale, bool is_causal, "
        "int window_left, "
        "int window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)",
        3,
    ),
    _stand_in("other_library", "sage_attn(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)", 2),
]


def flash(q, k, v, *, causal=False, window=-1, softcap=0.0, p=0.0):
    return torch.ops.flash_attn._flash_attn_forward(q, k, v, p, 0.3, causal, window, -1, softcap, None, False)


def flash_3(q, k, v, **options):
    return torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=0.3, **options)


def xformers(q, k, v, lengths=None):
    return torch.ops.xformers_flash.flash_fwd(
        q, k, v, lengths, lengths, None, S, S, 0.0, 0.3, False, -1, -1, False, None
    )


def tokens_first(kv_heads: int = H) -> list[Tensor]:
    return [rand(B, S, H, D), rand(B, S, kv_heads, D), rand(B, S, kv_heads, D)]


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize(("attend", "kind"), [(flash, "flash_attn"), (flash_3, "flash_attn_3"), (xformers, "xformers")])
def test_library_operators(attend, kind: str, kv_heads: int):
    backend = check(lambda q, k, v: attend(q, k, v)[0].flatten(-2), *tokens_first(kv_heads))
    assert (backend.sites[0].kind, backend.sites[0].shape) == (kind, (B, H, S, S, D))


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda q, k, v: flash(q, k, v, causal=True)[0], "causal"),
        (lambda q, k, v: flash(q, k, v, window=8)[0], "window"),
        (lambda q, k, v: flash(q, k, v, softcap=20.0)[0], "softcap"),
        (lambda q, k, v: flash(q, k, v, p=0.1)[0], "dropout"),
        (lambda q, k, v: flash(q, k, v)[1], "weights-used"),
        (lambda q, k, v: flash_3(q, k, v, q_descale=q[0, 0])[0], "foreign-op"),
        (lambda q, k, v: xformers(q, k, v, torch.zeros(2))[0], "varlen"),
        (lambda q, k, v: torch.ops.other_library.sage_attn(q, k, v)[0], "foreign-op"),
    ],
)
def test_library_operators_left_alone(call, code: str):
    backend = Rewriting()
    compiled(call, backend, *tokens_first())
    assert backend.codes == [code]
    assert backend.count("blade.sparse_sdpa") == 0


# ---- what a rewrite leaves behind ------------------------------------------------------------------------------------
def test_new_nodes_carry_their_origin():
    backend = check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).flatten(-2), *qkv())
    node = next(n for n in backend.graphs[0].graph.nodes if "sparse_sdpa" in str(n.target))
    assert node.meta["example_value"].shape == (B, H, S, D)
    assert "scaled_dot_product_attention" in node.meta["stack_trace"]


def test_dead_in_place_calls_go_with_the_scores():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.baddbmm(torch.empty(B * H, S, S), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0)
        scores *= 0.2
        scores.add_(1)
        return torch.bmm(scores.softmax(-1), v.flatten(0, 1))

    backend = check(call, *qkv())
    for op in ("baddbmm", "imul", ".mul_", ".add_", "empty", "bmm"):
        assert backend.count(op) == 0, op


def test_a_failed_rewrite_leaves_the_graph_as_it_was():
    def backend(gm, _inputs):
        before = gm.print_readable(print_output=False)
        (site,) = find_sites(gm)
        with pytest.raises(RewriteError):
            rewrite_site(gm.graph, site, {**DENSE, "no_such_argument": 1})
        gm.recompile()
        assert gm.print_readable(print_output=False) == before
        return gm

    spelling = next(s for s in REWRITTEN if s.name == "baddbmm, key mask, upcast")
    torch.compile(spelling.call, backend=backend)(*spelling.inputs())


def test_export():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.qkv = mha(), nn.Linear(H * D, 3 * H * D)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                t.unflatten(-1, (H, D)).transpose(1, 2) for t in self.qkv(self.attention(x, x, x)[0]).chunk(3, -1)
            )
            return F.scaled_dot_product_attention(q, k, v)

    model, x = Model().eval(), rand(B, S, H * D)
    with torch.no_grad():
        plain, module = model(x), torch.export.export(model, (x,)).module()
        backend = Rewriting()
        backend.rewrite(module)
        assert backend.codes == ["rewritten", "rewritten"]
        torch.testing.assert_close(module(x), plain, atol=2e-6, rtol=2e-6)
    node = next(n for n in module.graph.nodes if "sparse_sdpa" in str(n.target))
    assert node.meta["val"].shape == (B, H, S, D)
