"""The table from op names to token-axis rules, and the default for ops it does not name.

The rules are keyed by the bare op name, so that one table reads pre-dispatch ATen (``aten.view.default``), torch
functions (``torch.cat``), ``operator`` functions and tensor methods alike. An op that is not named here is token-wise
by default: it follows the operands that have its full size. What mixes tokens must therefore be named.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from blade_compile.passes.mixing_flow import (
    along_dim,
    convolution,
    einsum,
    indexing,
    linear,
    lookup,
    product,
    reduction,
)
from blade_compile.passes.shape_flow import (
    attribute,
    complex_view,
    concatenation,
    getitem,
    padding,
    permutation,
    pieces,
    repetition,
    selection,
    slicing,
    stacking,
    view,
)
from blade_compile.passes.token_flow import (
    LEAF,
    Flow,
    Step,
    first_only,
    same_axes,
    second_only,
    tensor_args,
    token_wise,
    where,
)

if TYPE_CHECKING:
    from torch import fx

    from blade_compile.passes.axes import Components


def unknown_op(step: Step) -> Flow:
    """Default: an attention by its name, else token-wise, else a projection in disguise (quantised linears)."""
    if step.name == "opaque":
        return opaque_call(step)
    if re.search(r"attention|attn|flash_fwd|sdpa|_transformer_encoder_layer_fwd", step.name):
        return same_axes(step, mixes=True)
    if re.search(r"conv\d?d?$|convolution", step.name):
        return convolution(step)
    if re.search(r"pool|fft|upsample|interpolate|pixel_|unfold|im2col", step.name):
        return LEAF
    found = token_wise(step)
    return found if found.kind != "leaf" or not tensor_args(step.node) else same_axes(step, projects=True)


def opaque_call(step: Step) -> Flow:
    """A call that was not re-traced: a checkpointed block keeps the parts of the operand of the output's shape."""
    name = re.sub(r"_\d+$", "", str(step.arg(0)))
    return LEAF if RULES.get(name, first_only) is not first_only else token_wise(step, mixes=True)


# What they make of their input is a position code (rotary tables): never the origin of a sequence.
POSITIONAL = frozenset({"cos", "sin", "polar"})


def leaf(step: Step) -> Flow:
    """The walk ends: the output is a new sequence."""
    return LEAF


def _table() -> dict[str, Callable[[Step], Flow]]:
    groups: dict[Callable[[Step], Flow], str] = {
        complex_view: "view_as_complex view_as_real",
        view: "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as ravel _reshape_alias",
        permutation: "permute transpose swapaxes swapdims movedim moveaxis t T mT mH adjoint permute_copy",
        repetition: "expand expand_as repeat tile repeat_interleave broadcast_to expand_copy",
        slicing: "slice narrow",
        selection: "select",
        pieces: "chunk split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split unsafe_split_with_sizes",
        getitem: "getitem",
        attribute: "getattr",
        concatenation: "cat concat concatenate",
        stacking: "stack pad_sequence",
        padding: "constant_pad_nd pad",
        linear: "linear",
        product: "matmul mm bmm addmm baddbmm mv __matmul__ __rmatmul__",
        einsum: "einsum",
        along_dim: "softmax log_softmax _softmax _safe_softmax softmin cumsum cumprod logcumsumexp cummax flip roll "
        "sort argsort gather index_select take_along_dim diff",
        reduction: "mean sum amax amin max min prod var std norm logsumexp linalg_vector_norm var_mean std_mean "
        "argmax argmin any all",
        lookup: "embedding",
        indexing: "index",
        first_only: "to type_as masked_fill masked_scatter index_put scatter scatter_add scatter_reduce slice_scatter "
        "select_scatter index_copy index_add index_fill layer_norm native_layer_norm rms_norm _fused_rms_norm "
        "group_norm native_group_norm batch_norm instance_norm normalize dropout native_dropout prelu clone "
        "contiguous detach alias",
        second_only: "copy",
        where: "where",
        leaf: "cos sin polar topk kthvalue masked_select nonzero unique tril triu cdist outer kron cross arange rand "
        "randn rand_like randn_like rnn lstm gru",
    }
    return {name: rule for rule, names in groups.items() for name in names.split()}


RULES = _table()


def flow(node: fx.Node, index: int | None, parts: Components, is_data: Callable[[fx.Node], bool]) -> Flow:
    """What the tokens of output ``index`` of a call node (its token axis at ``parts``) are made of."""
    step = Step(node, index, parts, is_data)
    return RULES.get(step.name, unknown_op)(step)
