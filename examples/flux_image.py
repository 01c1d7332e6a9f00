"""An image with Flux, its joint attention of text and image block-sparse; the text's tokens are never dropped.

Run it: ``python examples/flux_image.py [--tiny]``
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers import FluxPipeline

PROMPT = "A lighthouse in a storm, oil on canvas"


def load(name: str = "black-forest-labs/FLUX.1-dev") -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The pipeline, blade's options, and what it is called with."""
    if "--tiny" in sys.argv:
        import tiny

        sizes = {"height": 256, "width": 256, "max_sequence_length": tiny.TEXT}
        return tiny.flux(), tiny.OPTIONS, {**sizes, "num_inference_steps": 2}
    pipe = FluxPipeline.from_pretrained(name, torch_dtype=torch.bfloat16).to("cuda")
    # An image has 4,096 tokens where a video has 30,000: attention is a smaller part of a step, and less is gained.
    options = {"sparsity": 0.7, "block_size": 64, "when": "always"}
    return pipe, options, {"height": 1024, "width": 1024, "num_inference_steps": 28}


def main() -> None:
    """Compile and generate."""
    pipe, options, call = load()
    pipe.transformer.compile(backend="blade", options=options)
    image = pipe(PROMPT, **call, generator=torch.Generator().manual_seed(0)).images[0]
    image.save("flux.png")
    print(f"wrote flux.png, {image.width} x {image.height}")


if __name__ == "__main__":
    main()
