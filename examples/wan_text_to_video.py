"""Text to video with Wan 2.1, its self-attention block-sparse.

- ``python examples/wan_text_to_video.py``: one GPU; fetches the model from the hub
- ``python examples/wan_text_to_video.py --tiny``: random weights, a CPU, half a minute
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers import WanPipeline

import blade_compile

PROMPT = "A cat walks on the grass, realistic style"


def load(name: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers") -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The pipeline, blade's options, and what it is called with."""
    if "--tiny" in sys.argv:
        import tiny

        return tiny.wan(), tiny.OPTIONS, {"num_frames": 9, "height": 128, "width": 128, "num_inference_steps": 2}
    pipe = WanPipeline.from_pretrained(name, torch_dtype=torch.bfloat16).to("cuda")
    sizes = {"num_frames": 81, "height": 480, "width": 832}
    # Always: "auto" stays dense on a GPU until its cost constants were measured there (benchmarks.calibrate_cost).
    return pipe, {"sparsity": 0.8, "when": "always"}, {**sizes, "num_inference_steps": 50}


def first_call(pipe: Any, **call: Any) -> dict[str, Any]:
    """What the pipeline gives its transformer at the first step. Taken before the transformer is compiled."""
    seen: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    pipe(**call | {"num_inference_steps": 1, "output_type": "latent"})
    hook.remove()
    return seen


def main() -> None:
    """Explain, compile, generate."""
    pipe, options, call = load()
    call = {"prompt": PROMPT, "negative_prompt": "", **call}
    inputs = first_call(pipe, **call)
    with torch.no_grad():
        print(blade_compile.explain(pipe.transformer, **inputs, blade_options=options))
    pipe.transformer.compile(backend="blade", options=options)  # the one line
    frames = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="pil").frames[0]
    frames[0].save("wan.gif", save_all=True, append_images=frames[1:], duration=62)  # 16 frames a second
    print(f"wrote wan.gif, {len(frames)} frames")


if __name__ == "__main__":
    main()
