"""Why an attention call was left dense: the closed list of codes, each with one sentence.

Codes are stable words that programs may test for; the sentences are for people. ``{...}`` fields are filled by the
pass that refuses. The first group is decided from the graph alone, the second from the options.
"""

from __future__ import annotations

SENTENCES: dict[str, str] = {
    "rewritten": "runs block-sparse",
    # What the graph says.
    "causal": "the attention is causal ({detail}), which block selection here does not honour",
    "window": "the attention is restricted to a window ({detail})",
    "pair-mask": "the mask {detail} depends on query and key together; only masks on keys can be honoured exactly",
    "mask-grad": "the mask needs a gradient, and the block-sparse operator returns none for it",
    "cross": "keys and values come from another source than the queries ({detail})",
    "channels": "the attention runs over channels, not over tokens",
    "weights-used": "the attention {detail} are used elsewhere in the graph, so they must be computed anyway",
    "dropout": "dropout on the attention weights is active ({detail})",
    "flex": "FlexAttention already says which blocks are computed",
    "subclass": "{detail} is a tensor subclass, which the operators cannot read",
    "dtype": "dtype {detail} is not supported",
    "device": "device {detail} is not supported",
    "head-dim": "head dimension {detail} is not supported (1 to 256, the same for keys and values)",
    "softcap": "the scores are capped by tanh before the softmax",
    "sink": "extra columns (a learned sink) take part in the softmax",
    "scores-modified": "the scores pass through {detail} before the softmax",
    "weights-modified": "the weights pass through {detail} before they meet the values",
    "softmax-dim": "the softmax does not run over the keys",
    "mutation": "{detail} is changed in place between its use and the output",
    "varlen": "sequences of different lengths are packed into one call ({detail})",
    "foreign-op": "{detail} is an attention kernel with arguments that cannot be translated",
    "autograd-function": "the call sits in a custom autograd function that keeps {detail} for its backward",
    "unreadable": "the pass could not read this attention: {detail}",
    # What the options say.
    "never": "the options say when='never'",
    "policy": "{detail}",
    "excluded": "the options leave this module path out",
    "too-short": "{detail}",
    "no-gain": "{detail}",
    "no-grid": "{detail}; this policy needs the token grid",
}


class Refusal(Exception):  # noqa: N818 (control flow of the matchers, not an error)
    """An attention call that stays dense, with a code of the list."""

    def __init__(self, code: str, detail: object = "") -> None:
        self.code = code
        self.reason = sentence(code, detail)
        super().__init__(self.reason)


def sentence(code: str, detail: object = "") -> str:
    """The sentence of a code with its field filled in."""
    return SENTENCES[code].format(detail=detail)
