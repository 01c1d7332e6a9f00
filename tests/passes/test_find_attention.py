"""Every spelling is found and read; look-alikes and what can't be honoured keep their code; nothing else is touched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from blade_compile.passes.codes import SENTENCES
from blade_compile.passes.find_attention import find_sites, may_hold_attention
from tests.passes.harness import Rewriting, compiled, tensors
from tests.passes.spellings import LEFT_ALONE, REWRITTEN, B, D, H, S, Spelling, qkv, rand


def read(call, *inputs, **options) -> Rewriting:
    backend = Rewriting()
    compiled(call, backend, *inputs, fullgraph=True, **options)
    return backend


@pytest.mark.parametrize("spelling", REWRITTEN, ids=lambda s: s.name)
def test_spelling_is_rewritten_and_equal(spelling: Spelling):
    inputs, backend = spelling.inputs(), Rewriting()
    with torch.no_grad():
        plain = spelling.call(*(x.clone() for x in inputs))
        result = compiled(spelling.call, backend, *inputs, fullgraph=True)
    (site,) = backend.sites
    assert (site.code, site.kind, site.mask_kind) == ("rewritten", spelling.kind, spelling.mask)
    assert backend.count("blade.sparse_sdpa") == 1
    assert backend.count("softmax") + backend.count(".softmax") + backend.count("scaled_dot_product_attention") == 0
    tolerance = 2e-2 if plain.dtype == torch.bfloat16 else 3e-6
    torch.testing.assert_close(result, plain, atol=tolerance, rtol=tolerance)
    assert result.stride() == plain.stride()


@pytest.mark.parametrize("spelling", LEFT_ALONE, ids=lambda s: s.name)
def test_spelling_is_left_alone(spelling: Spelling):
    inputs, backend = spelling.inputs(), Rewriting()
    with torch.no_grad():
        torch.manual_seed(1)
        plain = spelling.call(*(x.clone() for x in inputs))
        torch.manual_seed(1)
        result = compiled(spelling.call, backend, *inputs, fullgraph=True)
    assert backend.codes == ([spelling.code] if spelling.code else [])
    assert backend.count("blade.sparse_sdpa") == 0
    if spelling.code:
        assert backend.sites[0].mask_kind == spelling.mask
        assert len(backend.sites[0].reason) > 10
    for ours, theirs in zip(tensors(result), tensors(plain)):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_codes_are_a_closed_list():
    used = {s.code for s in LEFT_ALONE if s.code}
    assert used <= set(SENTENCES)
    assert len(used) >= 12


def test_sizes_dtype_and_names():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(H * D, 3 * H * D)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, H * D)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.pool = Block()

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.pool(self.pool(x))

    backend = read(Model(), rand(B, S, H * D))
    assert [site.name for site in backend.sites] == ["blocks.0", "blocks.1", "pool#1", "pool#2"]
    site = backend.sites[0]
    assert site.shape == (B, H, S, S, D)
    assert (site.dtype, site.device, site.mask_kind) == (torch.float32, torch.device("cpu"), "none")
    assert site.sources.kind == "self"


def test_cross_attention_of_the_same_length():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(H * D, H * D), nn.Linear(H * D, 2 * H * D)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (self.q(x), *self.kv(context).chunk(2, -1)))
            return F.scaled_dot_product_attention(q, k, v)

    assert read(Cross(), rand(B, S, H * D), rand(B, S, H * D)).codes == ["cross"]


@pytest.mark.parametrize(
    ("name", "pick", "code"),
    [
        ("halves", lambda q, k, v: (q[:2], k[2:], v[2:]), "cross"),
        ("first", lambda q, k, v: (q, k[:1].expand(4, -1, -1, -1), v[:1].expand(4, -1, -1, -1)), "cross"),
        ("flip", lambda q, k, v: (q, k.flip(0), v.flip(0)), "cross"),
        ("roll", lambda q, k, v: (q, k.roll(1, 0), v.roll(1, 0)), "cross"),
        ("values only", lambda q, k, v: (q, k, v.flip(0)), "cross"),
        ("index", lambda q, k, v: (q, k[[1, 0, 3, 2]], v[[1, 0, 3, 2]]), "cross"),
        ("same half", lambda q, k, v: tuple(x.chunk(2)[1] for x in (q, k, v)), "rewritten"),
        ("all flipped", lambda q, k, v: (q.flip(0), k.flip(0), v.flip(0)), "rewritten"),
        ("heads flipped", lambda q, k, v: (q, k.flip(1), v.flip(1)), "rewritten"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_attention_between_batch_entries(name: str, pick, code: str):
    layers = nn.ModuleList([nn.Linear(H * D, H * D) for _ in range(3)])

    def call(x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (H, D)).transpose(1, 2) for layer in layers)
        return F.scaled_dot_product_attention(*pick(q, k, v))

    assert read(call, rand(4, S, H * D)).codes == [code]


def test_mask_that_needs_a_gradient():
    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias * 2).softmax(-1) @ v

    bias = rand(S).requires_grad_()
    backend = read(call, *qkv(), bias)
    assert backend.codes == ["mask-grad"]
    assert backend.sites[0].mask_needs_grad
    assert read(call, *qkv(), bias.detach()).codes == ["rewritten"]


def test_mask_without_gradient_from_inputs_with_one():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill((k.sum(-1) > 0)[:, :, None, :], float("-inf")).softmax(-1) @ v

    assert read(call, *(x.requires_grad_() for x in qkv())).codes == ["rewritten"]


def test_flex_attention_is_left_alone_beside_an_ordinary_call():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v)

    assert read(call, *qkv()).codes == ["flex", "rewritten"]


def test_integer_and_double_inputs():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    assert read(call, *qkv(torch.float64)).codes == ["rewritten"]


def test_data_dependent_sizes_elsewhere_in_the_graph():
    def call(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v) + x[torch.nonzero(x > 0)[:, 0]].sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert read(call, *qkv(), rand(7)).codes == ["rewritten"]


def test_custom_autograd_functions_keep_their_forward():
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
            ctx.save_for_backward(q, k, v)
            return (q @ k.mT).softmax(-1) @ v

        @staticmethod
        def backward(ctx, grad: Tensor):  # type: ignore[override]
            q, k, v = ctx.saved_tensors
            return grad * q, grad * k, grad * v

    backend = read(Attention.apply, *(x.requires_grad_() for x in qkv()))
    assert backend.codes == ["autograd-function"]


def test_an_unreadable_graph_still_shows_its_sdpa_calls(monkeypatch):
    import blade_compile.passes.find_attention as module

    def fail(*_args):
        raise RuntimeError("cannot be traced")

    monkeypatch.setattr(module, "trace_shadow", fail)
    backend = read(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5), *qkv())
    assert backend.codes == ["rewritten"]


def test_an_unreadable_graph_with_attention_by_hand_warns_once(monkeypatch, caplog):
    import blade_compile.passes.find_attention as module

    def fail(*_args):
        raise RuntimeError("cannot be traced, by hand")

    monkeypatch.setattr(module, "trace_shadow", fail)
    for _ in range(2):
        torch._dynamo.reset()
        assert read(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *qkv()).codes == []
    assert [record.levelname for record in caplog.records if "by hand" in record.message] == ["WARNING"]


def test_a_reader_that_raises_refuses_one_site_only(monkeypatch):
    import blade_compile.passes.find_attention as module

    def fail(*_args, **_kwargs):
        raise KeyError("odd")

    monkeypatch.setattr(module, "classify_sources", fail)
    backend = read(F.scaled_dot_product_attention, *qkv())
    assert backend.codes == ["unreadable"]
    assert "odd" in backend.sites[0].reason


def test_a_graph_without_attention_is_not_traced():
    graphs = []

    def backend(gm, _inputs):
        graphs.append(gm)
        return gm

    torch.compile(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Conv1d(2, 2, 1)), backend=backend)(rand(2, 2, 4))
    assert not may_hold_attention(graphs[0].graph)
    assert find_sites(graphs[0]) == []


@pytest.mark.parametrize("scale", [None, 0.3])
def test_no_guards_beyond_dynamos(scale):
    """As many compilations as with a backend that does nothing, whatever the lengths."""

    def call(x: Tensor, linear: nn.Module) -> Tensor:
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in linear(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(-2)

    linear, lengths = nn.Linear(H * D, 3 * H * D), (40, 33, 64, 65, 100, 7, 129, 50, 48, 31)
    counts = []
    for backend in (Rewriting(), Idle()):
        torch._dynamo.reset()
        run = torch.compile(call, backend=backend, dynamic=True)
        for length in lengths:
            x = rand(B, length, H * D)
            torch.testing.assert_close(run(x, linear), call(x, linear), atol=2e-6, rtol=2e-6)
        counts.append(len(backend.graphs))
    assert counts[0] == counts[1] <= 2


def test_symbolic_scale_is_not_specialised():
    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    counts = []
    for backend in (Rewriting(), Idle()):
        torch._dynamo.reset()
        run = torch.compile(call, backend=backend, dynamic=True)
        for scale in (0.3, 0.4, 0.5, 0.6):
            inputs = qkv()
            torch.testing.assert_close(run(*inputs, scale), call(*inputs, scale), atol=2e-6, rtol=2e-6)
        counts.append(len(backend.graphs))
    assert counts[0] == counts[1]


class Idle(Rewriting):
    def rewrite(self, gm) -> None:
        pass
