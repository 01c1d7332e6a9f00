"""AdaSpa over 50 steps: blocks are searched exactly at two steps of a generation and reused at the others.

Run it: ``python examples/adaspa_generation.py [--tiny]``
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers import WanPipeline

import blade_compile

PROMPT = "A paper boat on a river, seen from a bridge"
STEPS = 50


def load(name: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers") -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The pipeline, blade's options, and what it is called with."""
    if "--tiny" in sys.argv:
        import tiny

        sizes = {"num_frames": 5, "height": 64, "width": 64}
        return tiny.wan(), {**tiny.OPTIONS, "policy": "adaspa"}, sizes
    pipe = WanPipeline.from_pretrained(name, torch_dtype=torch.bfloat16).to("cuda")
    options = {"policy": "adaspa", "sparsity": 0.8, "when": "always"}
    return pipe, options, {"num_frames": 81, "height": 480, "width": 832}


def main() -> None:
    """Generate twice. Steps 1 to 9 are dense, masks are searched at 10 and 30 (`search_steps` changes that)."""
    pipe, options, call = load()
    pipe.transformer.compile(backend="blade", options=options)
    for seed in (0, 1):
        # A scope for each generation: masks belong to one noise and one prompt. Wan's pipeline names the two branches
        # of guidance; for one that doesn't and calls its transformer twice a step, give branches=2.
        with blade_compile.generation(num_steps=STEPS):
            start = torch.Generator().manual_seed(seed)
            frames = pipe(PROMPT, **call, num_inference_steps=STEPS, generator=start, output_type="pil").frames[0]
        name = f"adaspa-{seed}.gif"
        frames[0].save(name, save_all=True, append_images=frames[1:], duration=62)
        print(f"wrote {name}, {len(frames)} frames")


if __name__ == "__main__":
    main()
