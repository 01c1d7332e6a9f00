"""The VBench path from prompts to table, against a stand-in interpreter that checks and writes as the real ones do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blade_compile.distill import clips as clip_files
from blade_compile.distill import vbench
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.vbench import SUITES, VBENCH, VBENCH2, Clip, Scores, scores

INFO = [
    {"prompt_en": "a cat", "dimension": ["subject_consistency", "motion_smoothness"]},
    {"prompt_en": "a still lake", "dimension": ["temporal_flickering"]},
]
INFO2 = [
    {"prompt_en": "A man plays.", "dimension": ["Diversity"]},
    {"prompt_en": "x" * 200, "dimension": ["Mechanics"]},
    {"prompt_en": "A man plays.", "dimension": ["Material"]},
]
# What both packages do with their arguments, after the released code: names are looked up, a missing clip is an error
# in VBench-2.0 and a warning in VBench, and the result holds a score and the clips.
PACKAGE = """
import json, os
from pathlib import Path

class {benchmark}:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.full_info_dir, self.output_path = device, full_info_dir, output_path
        os.makedirs(self.output_path, exist_ok=True)

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        if os.path.exists({broken!r}):
            raise RuntimeError("CUDA out of memory")
        (dimension,) = dimension_list
        names = os.listdir(videos_path)
        postfix = Path(names[0]).suffix
        videos = []
        for entry in json.load(open(self.full_info_dir)):
            if dimension in entry["dimension"]:
                for i in range({repeats}):
                    wanted = entry["prompt_en"]{cut} + "-" + str(i) + postfix
                    if wanted not in names:
                        raise FileNotFoundError(wanted)
                    videos.append(os.path.join(videos_path, wanted))
        details = [{{"video_path": v, "video_results": 0.5}} for v in videos]
        with open(os.path.join(self.output_path, name + "_full_info.json"), "w") as file:
            json.dump([], file)
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w") as file:
            json.dump({{dimension: [0.9, details]}}, file, indent=4)
        with open({calls!r}, "a") as file:
            file.write(f"{{dimension}} {{videos_path}} {{self.device}}\\n")
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> tuple[str, Path]:
    """A command that behaves like the Python of an environment with both suites, and the list of its calls."""
    home = tmp_path / "island"
    for suite, cut, info in ((VBENCH, "", INFO), (VBENCH2, "[:180]", INFO2)):
        folder = home / "lib" / suite.package
        folder.mkdir(parents=True)
        text = PACKAGE.format(
            benchmark=suite.benchmark, repeats=3 if suite is VBENCH2 else 5, cut=cut, calls=str(home / "calls"),
            broken=str(home / "broken"),
        )  # fmt: skip
        (folder / "__init__.py").write_text(text)
        (folder / suite.info).write_text(json.dumps(info))
    (home / "lib" / "torch.py").write_text("device = str\n")
    python = home / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{home / "lib"}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python), home / "calls"


def _draw(prompt: str, seed: int) -> Tensor:
    return torch.full((2, 4, 4, 3), seed % 256, dtype=torch.uint8)


def test_layout_of_vbench(tmp_path: Path) -> None:
    wanted = ["subject_consistency", "motion_smoothness", "temporal_flickering"]
    clips = vbench.plan(VBENCH, INFO, dimensions=wanted, suffix=".gif", reworded={"a cat": "a long cat"})
    assert len(clips) == 5 + 25 and len({clip.seed for clip in clips}) == 30
    assert clips[0].prompt == "a long cat"
    assert clips[0].files == ("subject_consistency/a cat-0.gif", "motion_smoothness/a cat-0.gif")
    assert vbench.lay_out(VBENCH, clips, _draw, tmp_path, model="m") == 30
    videos = tmp_path / "videos"
    assert sorted(path.name for path in videos.iterdir()) == sorted(wanted)
    assert sorted(p.name for p in (videos / "motion_smoothness").iterdir()) == [f"a cat-{i}.gif" for i in range(5)]
    assert len(list((videos / "temporal_flickering").iterdir())) == 25
    assert (videos / clips[0].files[0]).samefile(videos / clips[0].files[1])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["clips"][0]["seed"] == clips[0].seed == vbench.clip_seed(0, "a cat", 0)


def test_drawing_resumes_and_is_shared_by_ranks(tmp_path: Path) -> None:
    clips = vbench.plan(VBENCH, INFO, dimensions=["subject_consistency", "motion_smoothness"], suffix=".gif")
    asked: list[int] = []

    def draw(prompt: str, seed: int) -> Tensor:
        asked.append(seed)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return _draw(prompt, seed)

    with pytest.raises(KeyboardInterrupt):
        vbench.lay_out(VBENCH, clips, draw, tmp_path, model="m")
    assert vbench.lay_out(VBENCH, clips, draw, tmp_path, model="m", rank=1, world_size=2) == 2
    assert vbench.lay_out(VBENCH, clips, draw, tmp_path, model="m", rank=0, world_size=2) == 2
    assert vbench.lay_out(VBENCH, clips, draw, tmp_path, model="m") == 0
    assert sorted(set(asked)) == sorted(clip.seed for clip in clips)
    (tmp_path / "videos" / clips[3].files[1]).unlink()
    assert vbench.lay_out(VBENCH, clips, draw, tmp_path, model="m") == 0  # linked again, not drawn
    assert (tmp_path / "videos" / clips[3].files[1]).is_file()
    with pytest.raises(DataError, match="another model, seed or set"):
        vbench.lay_out(VBENCH, clips, draw, tmp_path, model="other")


def test_layout_of_vbench2() -> None:
    clips = vbench.plan(VBENCH2, INFO2, dimensions=["Diversity", "Mechanics", "Material"])
    assert len(clips) == 20 + 3
    by_files = [clip.files for clip in clips]
    assert ("Diversity/A man plays.-2.mp4", "Material/A man plays.-2.mp4") in by_files
    assert ("Diversity/A man plays.-3.mp4",) in by_files
    assert ("Mechanics/" + "x" * 180 + "-1.mp4",) in by_files


def _fill(clips: list[Clip], folder: Path) -> None:
    for clip in clips:
        for file in clip.files:
            (folder / "videos" / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / "videos" / file).write_bytes(b"clip")


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda s: s.name)
def test_scoring_in_the_other_interpreter(suite: Any, interpreter: tuple[str, Path], tmp_path: Path) -> None:
    python, calls = interpreter
    info, folder = vbench.find_info(suite, python), tmp_path / "student"
    assert info.name == suite.info
    dimensions = ["subject_consistency", "motion_smoothness"] if suite is VBENCH else ["Mechanics", "Material"]
    clips = vbench.plan(suite, vbench.read_info(info), dimensions=dimensions)
    with pytest.raises(DataError, match="not drawn yet"):
        vbench.run(suite, clips, folder, python)
    _fill(clips, folder)

    broken = calls.with_name("broken")
    broken.touch()
    assert vbench.run(suite, clips, folder, python) == dimensions  # what fails is named, and logged
    assert "CUDA out of memory" in (folder / "logs" / f"{dimensions[0]}.log").read_text()
    broken.unlink()

    assert vbench.run(suite, clips, folder, python, device="cuda:1") == []
    lines = calls.read_text().splitlines()
    assert lines == [f"{d} {(folder / 'videos' / d).resolve()} cuda:1" for d in dimensions]
    assert vbench.run(suite, clips, folder, python) == [] and calls.read_text().splitlines() == lines  # nothing again
    assert vbench.read_results(suite, folder) == dict.fromkeys(dimensions, 0.9)


def test_static_clips_are_filtered_first(interpreter: tuple[str, Path], tmp_path: Path) -> None:
    python, calls = interpreter
    tool = Path(python).with_name("vbench")
    tool.write_text('#!/bin/sh\n[ "$1" = static_filter ] || exit 1\nmkdir -p "$5"\ncp -r "$3" "$5/filtered_videos"\n')
    tool.chmod(0o755)
    clips = vbench.plan(VBENCH, INFO, dimensions=["temporal_flickering"])
    _fill(clips, tmp_path)
    assert vbench.run(VBENCH, clips, tmp_path, python) == []
    assert calls.read_text().split()[1] == str((tmp_path / "filtered" / "filtered_videos").resolve())


def test_scores_of_vbench_by_hand() -> None:
    raw = dict.fromkeys(VBENCH.dimensions, 0.5)
    got = scores(VBENCH, raw)
    assert got.normalised["motion_smoothness"] == pytest.approx((0.5 - 0.706) / (0.9975 - 0.706))
    assert got.normalised["color"] == 0.5
    quality = [
        (0.5 - 0.1462) / 0.8538, (0.5 - 0.2615) / 0.7385, (0.5 - 0.6293) / 0.3707, (0.5 - 0.706) / 0.2915, 0.5, 0.5,
        0.5 * 0.5,
    ]  # fmt: skip
    semantic = [0.5] * 5 + [0.5 / 0.8222, (0.5 - 0.0009) / 0.2846, 0.5 / 0.364, 0.5 / 0.364]
    want_quality, want_semantic = sum(quality) / 6.5, sum(semantic) / 9
    assert got.groups == {"quality": pytest.approx(want_quality), "semantic": pytest.approx(want_semantic)}
    assert got.total == pytest.approx((4 * want_quality + want_semantic) / 5)
    assert len(VBENCH.dimensions) == 16 and len(VBENCH2.dimensions) == len(set(VBENCH2.dimensions)) == 18


def test_scores_of_vbench2_are_means_of_means() -> None:
    # BLADE's published row for Wan: five groups whose plain mean is the total.
    groups = {
        "creativity": 0.472, "commonsense": 0.532, "controllability": 0.312, "human_fidelity": 0.918, "physics": 0.617,
    }  # fmt: skip
    raw = {d: groups[name] for name, members in VBENCH2.groups.items() for d in members}
    got = scores(VBENCH2, raw)
    assert got.groups == pytest.approx(groups) and got.total == pytest.approx(0.570, abs=5e-4)


def test_what_is_missing_has_no_total() -> None:
    raw = dict.fromkeys(VBENCH.groups["quality"], 0.9)
    got = scores(VBENCH, raw)
    assert got.groups["quality"] is not None and got.groups["semantic"] is None and got.total is None


def test_table() -> None:
    raw = dict.fromkeys(VBENCH2.dimensions, 0.5)
    models: dict[str, Scores] = {
        "teacher": scores(VBENCH2, raw),
        "student": scores(VBENCH2, {**raw, "Diversity": 0.7}),
        "partial": scores(VBENCH2, {"Mechanics": 0.25}),
    }
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in vbench.table(VBENCH2, models).splitlines()
    ]
    assert lines[0] == ["vbench2", "teacher", "student", "partial", "student - teacher", "partial - teacher"]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert rows["Diversity"] == ["0.5000", "0.7000", "-", "+0.2000", "-"]
    assert rows["Mechanics"] == ["0.5000", "0.5000", "0.2500", "+0.0000", "-0.2500"]
    assert rows["**creativity** (normalised)"] == ["0.5000", "0.6000", "-", "+0.1000", "-"]
    assert rows["**total** (normalised)"] == ["0.5000", "0.5200", "-", "+0.0200", "-"]
    assert len(rows) == 18 + 5 + 1


def test_result_files(tmp_path: Path) -> None:
    results = tmp_path / "results"
    (results / "other").mkdir(parents=True)
    (results / "other" / "results_2025-01-01-00:00:00_eval_results.json").write_text(
        json.dumps({"imaging_quality": [67.0, []], "color": [0.8, []], "unknown": [1, []]})
    )
    (results / "scene_eval_results.json").write_text('{"scene": [NaN, []]}')
    assert vbench.read_results(VBENCH, tmp_path) == pytest.approx({"imaging_quality": 0.67, "color": 0.8})
    (results / "scene_eval_results.json").write_text('{"scene": "failed"}')
    with pytest.raises(DataError, match="no result of vbench"):
        vbench.read_results(VBENCH, tmp_path)


def test_refusals(tmp_path: Path, interpreter: tuple[str, Path]) -> None:
    with pytest.raises(ConfigError, match="no dimension 'colour'"):
        vbench.plan(VBENCH, INFO, dimensions=["colour"])
    with pytest.raises(DataError, match="no prompt for scene"):
        vbench.plan(VBENCH, INFO, dimensions=["scene"])
    with pytest.raises(ConfigError, match=r"doesn't read \.gif; pip install imageio"):
        vbench.plan(VBENCH2, INFO2, dimensions=["Diversity"], suffix=".gif")
    with pytest.raises(DataError, match="can't be the name of a file"):
        vbench.plan(VBENCH, [{"prompt_en": "either/or", "dimension": ["color"]}], dimensions=["color"])
    with pytest.raises(DataError, match="is not there"):
        vbench.read_info(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('[{"prompt": "a cat"}]')
    with pytest.raises(DataError, match="no full_info"):
        vbench.read_info(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="can't import vbench"):
        vbench.find_info(VBENCH, str(tmp_path / "python"))
    (Path(interpreter[0]).parent / "lib" / "vbench" / "__init__.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigError, match="nothing_of_this_name"):
        vbench.find_info(VBENCH, interpreter[0])
    assert clip_files.INSTALL_VIDEO.startswith("pip install")
