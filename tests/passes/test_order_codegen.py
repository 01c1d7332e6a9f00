"""What a token order costs in Inductor's code: q, k and v are permuted by the kernel that rotates q and k.

Code is generated and not compiled; for CUDA without a GPU (``tests/offline_cuda.py``), in a process of its own. Two
launches permute: one writes q, k and v (rotary embedding and norm applied in it), one restores the output. Compared
with no order, v and the output are copied; q and k are written once, as before. A rotary embedding that ends in
``stack`` is written before it is permuted: Inductor does not read through it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

from blade_compile.kernels import ops  # noqa: F401 (registers the operators)
from blade_compile.passes.merge_orders import merge_orders
from tests.offline_cuda import _written_modules, inference_code, pretend_cuda

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH, HEADS = 256, 4
GRID = (4, 12, 21)
TOKENS = 1008

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, S, D] by halves; cos and sin [S, D / 2]."""
    a, b = x.chunk(2, -1)
    return x * torch.cat((cos, cos), -1) + torch.cat((-b, a), -1) * torch.cat((sin, sin), -1)


def pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same by neighbours, in fp32, as diffusers writes it."""
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((-imaginary, real), -1).flatten(3)
    wide = (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1))
    return (x.float() * wide[0] + turned.float() * wide[1]).to(x.dtype)


def written(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same, written into a buffer, as Wan does."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


def stacked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same, and the pairs stacked again at the end."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Layer(nn.Module):
    """Norm, projections, norms of q and k, rotary embedding, attention in the given order, projection."""

    def __init__(self, order: str, rotate: Rotate, sparsity: float = 0.5) -> None:
        super().__init__()
        self.order, self.rotate, self.sparsity = order, rotate, sparsity
        self.norm, self.norm_q, self.norm_k = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm(x)
        parts = (self.norm_q(self.q(y)), self.norm_k(self.k(y)), self.v(y))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        options = {"sparsity": self.sparsity, "block_size": 64, "grid": list(GRID), "order": self.order}
        out = torch.ops.blade.sparse_sdpa(q, k, v, **options)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, order: str, rotate: Rotate, layers: int = 1, sparsity: float = 0.5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(order, rotate, sparsity) for _ in range(layers))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    angle = torch.linspace(0, 9, TOKENS * WIDTH // HEADS // 2).view(TOKENS, -1)
    return [torch.linspace(-1, 1, TOKENS * WIDTH).view(1, TOKENS, WIDTH).sin().to(dtype), angle.cos(), angle.sin()]


def wrapper(code: str) -> str:
    """The code that allocates and launches."""
    return code[code.index("def call(self, args)") :]


def launched(code: str) -> list[str]:
    """The kernels that Inductor wrote, in the order of their launches."""
    found = re.findall(r"(triton_\w+)\.run\(|(cpp_fused_\w+)\(", wrapper(code))
    return [cuda or cpu for cuda, cpu in found]


def gathers(code: str) -> list[str]:
    return [name for name in launched(code) if "index_select" in name]


def calls(code: str, operator: str) -> int:
    return len(re.findall(rf"= torch\.ops\.blade\.{operator}\.default\(", wrapper(code)))


def check(code: str, plain: str) -> None:
    """One kernel gathers q, k and v and rotates as it does, another restores the output; nothing else is copied."""
    assert calls(code, "token_order") == calls(code, "mask_predict") == 1
    assert calls(plain, "token_order") == 0 and gathers(plain) == []
    into, back = gathers(code)
    for word in ("mul", "add", "rsqrt"):
        assert word in into, f"{word} is not in the kernel that permutes: {into}"
    # What follows the normalised, rotated q and k in the plain code is nothing: no kernel runs between it and the
    # prediction. The same holds here, with the permutation inside.
    names = re.findall(r"(triton_\w+)\.run\(|(cpp_fused_\w+)\(|(mask_predict|block_sparse_attention)\.default\(", code)
    order = [next(filter(None, name)) for name in names]
    at = order.index(into)
    assert order[at : at + 4] == [into, "mask_predict", "block_sparse_attention", back]


# --- the CPU ---------------------------------------------------------------------------------------------------------


@functools.cache
def cpu_code(order: str, rotate: Rotate) -> str:
    torch._dynamo.reset()
    model = Model(order, rotate).eval()
    with torch.no_grad(), _written_modules() as codes:
        torch.compile(model)(*inputs())
    return codes[0]


@pytest.mark.parametrize("rotate", [halves, pairs, written], ids=lambda rotate: rotate.__name__)
def test_cpu_kernels_permute_while_they_rotate(rotate: Rotate) -> None:
    check(cpu_code("gilbert", rotate), cpu_code("none", rotate))


def test_cpu_kernel_writes_q_k_and_v_once_each() -> None:
    code = cpu_code("gilbert", written)
    into = gathers(code)[0]
    (body,) = re.findall(rf"{into} = async_compile\.cpp_pybinding\(\[(.*?)\], r?'''", code, re.DOTALL)
    floats = [argument for argument in re.findall(r"'(.*?)'", body) if not argument.startswith("const")]
    assert len(floats) == 3, body


def test_a_stacked_rotation_is_copied_once_more() -> None:
    code = cpu_code("gilbert", stacked)
    assert len(gathers(code)) >= 2
    assert not any("rsqrt" in name for name in gathers(code))


@pytest.mark.slow
def test_gradients_of_a_compiled_model_are_those_of_dense_attention() -> None:
    torch.manual_seed(0)
    dense, ordered = Model("none", pairs, 2, sparsity=0.0), Model("gilbert", pairs, 2, sparsity=0.0)
    ordered.load_state_dict(dense.state_dict())
    torch._dynamo.reset()
    dense(*inputs()).square().mean().backward()
    torch.compile(ordered)(*inputs()).square().mean().backward()
    for (name, one), two in zip(ordered.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=lambda text, name=name: f"{name}: {text}")


class _Merge(CustomGraphPass):
    def __call__(self, graph: torch.fx.Graph) -> None:
        assert merge_orders(graph) == 1

    def uuid(self) -> str:
        return "merge orders"


def test_one_order_serves_all_layers() -> None:
    torch._dynamo.reset()
    model = Model("gilbert", halves, layers=2, sparsity=0.0).eval()
    with torch.no_grad(), inductor_config.patch(joint_custom_pre_pass=_Merge()):
        found, (code,) = run_and_get_code(torch.compile(model), *inputs())
        assert calls(code, "token_order") == 1 and calls(code, "mask_predict") == 2
        torch.testing.assert_close(found, model(*inputs()), rtol=1e-4, atol=1e-4)


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there: the code is generated without one")
    out = tmp_path_factory.mktemp("order") / "codes.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.passes.test_order_codegen", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("rotate", ["halves", "pairs"])
def test_cuda_kernels_permute_while_they_rotate(cuda: dict[str, str], rotate: str) -> None:
    check(cuda[f"{rotate} gilbert"], cuda[f"{rotate} none"])


@pytest.mark.parametrize("rotate", ["halves", "pairs"])
def test_cuda_kernel_writes_q_k_and_v_once_each(cuda: dict[str, str], rotate: str) -> None:
    code = cuda[f"{rotate} gilbert"]
    into = gathers(code)[0]
    (body,) = re.findall(rf"async_compile\.triton\('{into}', '''(.*?)'''", code, re.DOTALL)
    assert body.count("tl.store(") == 3
    assert "*i64" in body  # reads the order


def main(path: str) -> None:
    """Write the generated modules as JSON."""
    from torch._inductor.decomposition import decompositions

    aten = torch.ops.aten

    def index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
        """Inductor's own decomposition, whose indexing in Python asks a CPU build of torch for a CUDA device."""
        chosen: Sequence[Any] = [*[None] * (dim % x.dim()), index]
        return aten.index.Tensor(x, chosen).contiguous()  # type: ignore[no-any-return]

    decompositions[aten.index_select.default] = index_select
    codes: dict[str, str] = {}
    with pretend_cuda():
        for rotate in (halves, pairs):
            for order in ("none", "gilbert"):
                codes[f"{rotate.__name__} {order}"] = inference_code(
                    lambda order=order, rotate=rotate: Model(order, rotate).bfloat16(),  # type: ignore[misc]
                    lambda: [torch.empty(x.shape, dtype=torch.bfloat16) for x in inputs()],
                    "inductor",
                    {},
                )
    Path(path).write_text(json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1])
