"""The fp64 gate of the attention benchmark passes what is right and stops what is wrong."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention_gate import Problem, backward_gate, exact_rows, forward_gate
from blade_compile.kernels import ops, reference  # noqa: F401 (ops registers the operators)


@pytest.fixture
def problem() -> Problem:
    q, k, v = (torch.randn(1, 2, 256, 32) for _ in range(3))
    num, idx = torch.ops.blade.mask_predict(q, k, sparsity=0.5, block_size=32, probe_tokens=8)
    return Problem(q, k, v, num, idx, 32)


def test_exact_rows_are_the_references(problem: Problem) -> None:
    p = problem
    out, lse = reference.block_sparse_attention(
        p.q.double(), p.k.double(), p.v.double(), p.num, p.idx, None, p.block, p.scale
    )
    for head, row in p.sampled_rows():
        exact, exact_lse = exact_rows(p, head, row)
        torch.testing.assert_close(exact, out[0, head, p.tokens(row)])
        torch.testing.assert_close(exact_lse, lse[0, head, p.tokens(row)])


def test_forward_gate(problem: Problem) -> None:
    p = problem
    check = forward_gate(p)
    out = torch.ops.blade.block_sparse_attention(p.q, p.k, p.v, p.num, p.idx, block_size=p.block)[0]
    assert check(out) < 1e-5
    dense = torch.nn.functional.scaled_dot_product_attention(p.q, p.k, p.v)
    with pytest.raises(AssertionError, match="query block"):
        check(dense)
    with pytest.raises(AssertionError, match="query block"):
        check(out * float("nan"))


def test_backward_gate(problem: Problem) -> None:
    p = problem
    grad_out = torch.randn_like(p.q)
    leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    out = torch.ops.blade.block_sparse_attention(*leaves, p.num, p.idx, block_size=p.block)[0]
    grads = torch.autograd.grad(out, leaves, grad_out)
    check = backward_gate(p, grad_out)
    assert check(grads) < 1e-5
    for wrong in range(3):
        broken = [grad * (1.01 if i == wrong else 1) for i, grad in enumerate(grads)]
        with pytest.raises(AssertionError, match="gradients"):
            check(tuple(broken))
