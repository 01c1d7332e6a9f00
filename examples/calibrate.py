"""Let the sparsity be found: say which error is allowed, and use the budgets that keep to it.

Run it: ``python examples/calibrate.py [--tiny]``
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers import WanPipeline

import blade_compile

PROMPTS = ["A cat walks on the grass", "Waves break on a rocky shore at dusk", "A crowded street, seen from above"]


def load(name: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers") -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The pipeline, blade's options, and what it is called with."""
    if "--tiny" in sys.argv:
        import tiny

        sizes = {"num_frames": 9, "height": 128, "width": 128, "num_inference_steps": 3}
        return tiny.wan(), {"block_size": 16}, sizes
    pipe = WanPipeline.from_pretrained(name, torch_dtype=torch.bfloat16).to("cuda")
    return pipe, {}, {"num_frames": 81, "height": 480, "width": 832, "num_inference_steps": 50}


def calls(pipe: Any, call: dict[str, Any], wanted: int = 4) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Some of the transformer's calls in a generation, from its whole length: (args, kwargs) each."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, dict(kwargs))), with_kwargs=True
    )
    pipe(**call, output_type="latent")
    hook.remove()
    return seen[:: max(1, len(seen) // wanted)]


def main() -> None:
    """Collect calls, find the budgets, show what they lose, compile with them."""
    pipe, options, call = load()
    batches = [batch for prompt in PROMPTS[:2] for batch in calls(pipe, {"prompt": prompt, **call})]
    path = blade_compile.calibrate(pipe.transformer, batches, target=0.05, options=options)
    print(f"wrote {path}")
    unseen = calls(pipe, {"prompt": PROMPTS[2], **call}, wanted=1)[0]
    print(blade_compile.measure(pipe.transformer, *unseen[0], options={"calibration": str(path)}, **unseen[1]))
    pipe.transformer.compile(backend="blade", options={"calibration": str(path), "when": "always"})
    pipe(PROMPTS[2], **call, output_type="latent")


if __name__ == "__main__":
    main()
