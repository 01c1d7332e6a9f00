"""The README.md of an export: what the student is, and the code that loads it with and without blade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blade_compile.distill.pipelines import PipelineFamily


def _front_matter(record: Mapping[str, Any], family: PipelineFamily | None) -> str:
    lines = []
    if family is not None:
        lines.append("library_name: diffusers")
        if family.name != "dit":
            lines.append(f"pipeline_tag: text-to-{'video' if family.video else 'image'}")
    if record.get("base_model"):
        lines.append(f"base_model: {record['base_model']}")
    lines += ["tags:", "- distillation", "- sparse-attention", *(["- lora"] if record["weights"] == "lora" else [])]
    return "\n".join(["---", *lines, "---"])


def loading_code(record: Mapping[str, Any], family: PipelineFamily, folder: str = "PATH/TO/export") -> str:
    """Python that loads the student into the stock pipeline, as ``pipe``; blade is not needed for it.

    Args:
        record: the content of ``blade.json``.
        family: of the model.
        folder: where the export is.
    """
    base, dtype = record.get("base_model") or "PATH/TO/BASE", f"torch.{record.get('dtype') or 'bfloat16'}"
    revision = f"revision={record['base_revision']!r}, " if record.get("base_revision") else ""
    lines = ["import diffusers", "import torch", "", f"export, base = {folder!r}, {base!r}"]
    if record["weights"] == "lora":
        lines += [
            f"pipe = diffusers.{family.pipeline}.from_pretrained(base, {revision}torch_dtype={dtype})",
            "pipe.load_lora_weights(export)",
        ]
    else:
        model, given = f"diffusers.{family.transformer}", f"{revision}transformer=transformer, torch_dtype={dtype}"
        lines += [
            f'transformer = {model}.from_pretrained(export, subfolder="transformer", torch_dtype={dtype})',
            f"pipe = diffusers.{family.pipeline}.from_pretrained(base, {given})",
        ]
    scheduler = f'diffusers.{record["scheduler"]}.from_pretrained(export, subfolder="scheduler")'
    return "\n".join([*lines, f"pipe.scheduler = {scheduler}"])


def _call(record: Mapping[str, Any], family: PipelineFamily) -> str:
    guidance = 1.0
    if family.embedded_guidance is not None:
        guidance = record.get("embedded_guidance") or family.embedded_guidance
    arguments = ["class_labels=[0]" if family.name == "dit" else '"a prompt"']
    size = record.get("latent") or {}
    if size and family.name != "dit":
        keys = ("height", "width", "num_frames") if family.video else ("height", "width")
        arguments += [f"{key}={size[key]}" for key in keys if key in size]
    arguments += [f"num_inference_steps={record['steps']}", f"guidance_scale={guidance:g}"]
    if record.get("max_sequence_length") is not None and family.name != "dit":
        arguments.append(f"max_sequence_length={record['max_sequence_length']}")
    if family.name == "pixart":
        arguments.append("use_resolution_binning=False")
    out = "frames" if family.video else "images"
    return f"{out} = pipe({', '.join(arguments)}).{out}"


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def model_card(record: Mapping[str, Any], family: PipelineFamily | None) -> str:
    """The text of the card.

    Args:
        record: the content of ``blade.json``.
        family: of the model; None for one of the user's own.
    """
    steps, shift, embedded = record["steps"], record["shift"], record["embedded_guidance"]
    made = "Made with `blade-distill`: data-free Trajectory Distribution Matching of a student with sparse attention."
    exact = (
        "A few-step student knows only the steps that it was trained on. The scheduler in `scheduler/` takes them;"
        " another one, another number of steps or guidance gives worse results."
    )
    facts = [
        f"- steps: {steps}, at times {_numbers(record['timesteps'])}",
        f"- noise levels: {_numbers(record['sigmas'])}",
        f"- shift: {'none (variance preserving)' if shift is None else shift}",
        f"- guidance: 1 (none); the teacher's {record['teacher_cfg_scale']} is trained in",
        f"- embedded guidance: {'none' if embedded is None else embedded}",
    ]
    if record["eta"] == 0:
        drawn = (
            "; the scheduler draws it from torch's global generator where the pipeline hands it none, so"
            " `torch.manual_seed` before the call repeats a sample"
        )
        facts.append(f"- noise: fresh at every step (eta 0){'' if family is None else drawn}")
    elif record["eta"] < 1:
        facts.append(f"- noise: fresh noise was mixed in while training (eta {record['eta']:g}), not by the scheduler")
    title = f"# {steps}-step student of {record.get('base_model') or record.get('factory') or 'a model'}"
    parts = [_front_matter(record, family), title, made]
    if family is not None:
        sparse = f'pipe.transformer.compile(\n    backend="blade",\n    options={record["options"]!r},\n)'
        parts += [
            "## Without blade (dense attention)",
            f"```python\n{loading_code(record, family)}\n{_call(record, family)}\n```",
            "## With block-sparse attention, as it was trained",
            f"After the lines above, before the call:\n\n```python\n{sparse}\n```",
        ]
    return "\n\n".join([*parts, "## What it must be run with", exact, "\n".join(facts)]) + "\n"
