"""Text to video with CogVideoX: text and video in one sequence, the text never dropped; offloaded.

Run it: ``python examples/cogvideox_text_to_video.py [--tiny]``
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers import CogVideoXPipeline

PROMPT = "A panda plays a guitar in a bamboo forest"


def load(name: str = "THUDM/CogVideoX-5b") -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The pipeline, blade's options, and what it is called with."""
    if "--tiny" in sys.argv:
        import tiny

        sizes = {"num_frames": 9, "height": 128, "width": 128, "max_sequence_length": tiny.TEXT}
        return tiny.cogvideox(), tiny.OPTIONS, {**sizes, "num_inference_steps": 2}
    pipe = CogVideoXPipeline.from_pretrained(name, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()  # the transformer comes to the GPU when it is called, compiled or not
    pipe.vae.enable_tiling()
    return pipe, {"preset": "cogvideox-5b", "when": "always"}, {"num_frames": 49, "num_inference_steps": 50}


def main() -> None:
    """Compile the transformer and generate."""
    pipe, options, call = load()
    pipe.transformer.compile(backend="blade", options=options)
    frames = pipe(PROMPT, **call, generator=torch.Generator().manual_seed(0), output_type="pil").frames[0]
    frames[0].save("cogvideox.gif", save_all=True, append_images=frames[1:], duration=125)  # 8 frames a second
    print(f"wrote cogvideox.gif, {len(frames)} frames")


if __name__ == "__main__":
    main()
