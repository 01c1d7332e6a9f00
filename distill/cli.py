"""The ``blade-distill`` command: init, prepare, train, export, generate, eval, digits.

Exit codes: 0 done, or checkpointed on SIGTERM or SIGUSR1; 1 diverged, or a fault of blade's own; 2 configuration;
3 data; 130 SIGINT. What a command does lies in the modules that it imports when it runs, so ``--help`` is quick.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blade_compile.distill.errors import ConfigError, DistillError

if TYPE_CHECKING:
    from blade_compile.distill.config import RunConfig

app = typer.Typer(
    name="blade-distill",
    help="Distil a diffusion transformer into a few-step student with block-sparse attention, from prompts alone.",
    epilog="A run: init, then prepare, train, export. Several GPUs: torchrun --nproc-per-node=8 -m "
    "blade_compile.distill.cli train --config run.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="FILE|PRESET", help="YAML of the run, or the name of a preset"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="fields to change, such as method.steps=8 or lora=null"),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        "-n",
        help="check the settings and show parameters, attention calls, token grid, steps, memory and time per rank; "
        "start nothing",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="PATH", help="where to write")]


@app.command()
def init(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="see --list")] = "",
    overrides: Overrides = None,
    out: Out = None,
    show: Annotated[bool, typer.Option("--list", help="list the presets")] = False,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="print the schema for editors")] = False,
    bare: Annotated[bool, typer.Option("--bare", help="without comments")] = False,
) -> None:
    """Write a configuration: every field, what it means, and where a preset's value comes from."""
    from blade_compile.distill import config as run_config

    if show:
        print("\n".join(run_config.PRESETS))
        return
    if json_schema:
        print(json.dumps(run_config.json_schema(), indent=1))
        return
    if preset not in run_config.PRESETS:
        raise ConfigError(f"preset is {preset!r}; valid are {', '.join(run_config.PRESETS)}")
    needs_prompts = "model.path" in run_config.PRESETS[preset]
    default = ["data.prompts=prompts.txt"] if needs_prompts else []
    text = run_config.dump(run_config.load(preset, [*default, *(overrides or [])]), commented=not bare)
    if out is None:
        print(text, end="")
    else:
        _write_new(out, text)
        print(f"wrote {out}; next: blade-distill train --config {out} --dry-run")


@app.command()
def prepare(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Embed the prompts once, and the negative prompt. Continues where it was stopped; ranks share the work."""
    from blade_compile.distill import ranks
    from blade_compile.distill.encoder import prepare_run, prepared_folder

    given = _load(config, overrides)
    with ranks.ranks() as here:
        made = prepare_run(given, here.rank, here.world, _progress("embedding prompts", here.rank))
        total = round(here.mean([float(made)])[0] * here.world)  # waits for the others
    if here.first:
        print(f"{total} prompts embedded now; all are in {prepared_folder(given)}")


@app.command()
def train(
    config: ConfigOption = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Annotated[
        str, typer.Option("--resume", metavar="auto|never|PATH", help="continue from the last, no, or this checkpoint")
    ] = "auto",
) -> None:
    """Distil. The same command continues an interrupted run with the same random numbers."""
    given = _load(config, overrides)
    if resume not in {"auto", "never"} and not Path(resume).is_dir():
        raise ConfigError(f"--resume is {resume!r}; valid are auto, never, or the folder of a checkpoint")
    if dry_run:
        _show_dry_run(given)
    else:
        from blade_compile.distill.trainer import train as train_run

        _finish(train_run(given, resume=resume))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of the run: <output_dir>/<name>")],
    out: Out = None,
    step: Annotated[int | None, typer.Option(min=0, metavar="N", help="checkpoint; the last one if not given")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="add LoRA to the weights instead of exporting it")] = False,
) -> None:
    """Write what stock diffusers loads: weights, the scheduler trained on, blade.json, a model card."""
    _check_run(run)
    from blade_compile.distill.trainer import export_run

    made = export_run(run, out=out or run / "export", step=step, merge=merge)
    print(f"wrote {made}")


@app.command()
def generate(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="folder that `export` wrote")],
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="a prompt; may be given again")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="a file of prompts")] = None,
    out: Out = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="base model; the export's own if not given")] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="of the first clip where its file names none; the next count up")
    ] = 0,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="clips per prompt")] = 1,
    sparse: Annotated[bool, typer.Option("--sparse/--dense", help="block-sparse as trained, or dense")] = True,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cuda, cpu; the best there is if not given")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="run the module:callable that made the export, where one did")
    ] = False,
) -> None:
    """Make clips or images with a student, on exactly the steps that it was trained on."""
    if (prompts is None) == (prompt_file is None):
        raise ConfigError("give prompts either by --prompt or by --prompts")
    if not export.is_dir():
        raise ConfigError(f"{export} is no folder; give what `blade-distill export` wrote")
    wanted = prompts if prompt_file is None else _read_prompts(prompt_file)
    from blade_compile.distill.generate import generate_from_export

    made = generate_from_export(
        export,
        wanted or (),
        out or export.parent / "generated",
        base=base,
        seeds=range(seed, seed + count),
        sparse=sparse,
        device=device,
        trust_code=trust_code,
    )
    for path in made:
        print(path)


@app.command("eval")
def evaluate(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="folder that `export` wrote")],
    prompt_file: Annotated[Path, typer.Option("--prompts", metavar="FILE", help="a file of prompts")],
    out: Out = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="the teacher; the export's own if not given")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="clips per prompt")] = 1,
    teacher_steps: Annotated[int, typer.Option(min=1, metavar="N", help="steps of the teacher")] = 50,
    vbench: Annotated[
        str | None,
        typer.Option(metavar="1|2", help="also score by VBench (1) or VBench-2.0 (2); needs --vbench-python"),
    ] = None,
    vbench_python: Annotated[
        Path | None, typer.Option(metavar="PYTHON", help="interpreter of an environment that has VBench installed")
    ] = None,
    dimensions: Annotated[
        list[str] | None, typer.Option("--dimension", metavar="NAME", help="VBench dimension; may be given again")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cuda, cpu; the best there is if not given")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="run the module:callable that made the export, where one did")
    ] = False,
) -> None:
    """Compare dense with sparse and teacher with student at equal seeds: PSNR, SSIM, MMD, time, memory; VBench."""
    if vbench not in {None, "1", "2"}:
        raise ConfigError(f"--vbench is {vbench!r}; valid are 1 and 2")
    if vbench is not None and vbench_python is None:
        raise ConfigError("--vbench needs --vbench-python: the interpreter of an environment that has VBench installed")
    if not export.is_dir():
        raise ConfigError(f"{export} is no folder; give what `blade-distill export` wrote")
    prompts = _read_prompts(prompt_file)
    if any((one.seed, one.height, one.width, one.num_frames) != (None,) * 4 for one in prompts):
        told = f"{prompt_file} names seeds or sizes, which eval leaves alone: all is drawn at the training's size"
        print(f"{told}, with the seeds 0 to {seeds - 1}", file=sys.stderr)
    from blade_compile.distill.evaluate import evaluate_export

    evaluate_export(
        export,
        [prompt.text for prompt in prompts],
        out or export.parent / "eval",
        base=base,
        seeds=seeds,
        teacher_steps=teacher_steps,
        vbench=vbench,
        vbench_python=vbench_python,
        dimensions=tuple(dimensions or ()),
        device=device,
        trust_code=trust_code,
    )


@app.command()
def digits(
    out: Out = None,
    quick: Annotated[bool, typer.Option("--quick", help="a small run of some minutes, for a look")] = False,
    full: Annotated[bool, typer.Option("--full", help="repeat the whole committed table; hours; resumable")] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="of the run")] = 0,
) -> None:
    """Distil handwritten digits that move: needs no download and no GPU, ends in a table and clips."""
    if quick and full:
        raise ConfigError("--quick and --full exclude each other; give one")
    from blade_compile.distill.digits_run import run

    _finish(run(out=out or Path("runs/digits"), quick=quick, full=full, seed=seed))


def _load(config: str | None, overrides: list[str] | None) -> RunConfig:
    from blade_compile.distill import config as run_config

    if config is not None and "=" in config and not Path(config).exists():
        raise ConfigError(f"--config is {config!r}, which is no file; overrides stand without an option")
    if config is None and not any((item or "").startswith("preset=") for item in overrides or []):
        raise ConfigError("--config is missing; give a YAML (see `blade-distill init`) or a preset")
    return run_config.load(config, overrides or [])


def _read_prompts(path: Path) -> list[Any]:
    from blade_compile.distill.prompts import read_prompts

    return list(read_prompts(path))


def _finish(code: int) -> None:
    """End with a command's own exit code."""
    if code:
        raise typer.Exit(code)


def _check_run(run: Path) -> None:
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} has no config.yaml; give the folder of a run: <output_dir>/<name>")


def _write_new(path: Path, text: str) -> None:
    """A file that must not exist yet."""
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists and is not overwritten; delete it or choose another --out") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}") from None


def _progress(what: str, rank: int) -> Any:
    """Lines on standard error, from the first rank."""

    def show(done: int, total: int) -> None:
        if rank == 0 and total:
            print(f"{what}: {done} of {total}", file=sys.stderr)

    return show


def _show_dry_run(config: RunConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from blade_compile.distill.dry_run import dry_run

    report = dry_run(config, world=int(os.environ.get("WORLD_SIZE", "1")))
    table = Table(title=f"{config.name}: dry run, nothing was started", show_header=False)
    for row in report.rows():
        table.add_row(*row)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def main() -> int:
    """Run the command line. Returns the exit code."""
    try:
        app(prog_name="blade-distill")
    except DistillError as error:
        for line in str(error).splitlines():
            print(f"blade-distill: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
