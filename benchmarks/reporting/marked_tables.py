"""Tables of speed inside Markdown files, each between two comments that mark its place."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import describe_machine
from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement
from benchmarks.quality import read_evaluation
from benchmarks.reporting.result_files import Results, read_results
from benchmarks.timing.speedup import against_teachers, ideal_gaps, of_main_backend, speedup_table
from flashdiff.errors import ConfigError

SUMMARY = (("student", 4), ("student", 2), ("student, served", 4), ("diffusers, compiled", 4), ("teacher", 50))
"""Model and steps of each row of the short table."""
_TITLES = {"sd15": "SD1.5", "sdxl": "SDXL", "pixart": "PixArt", "sd3": "SD3"}
_REGION = re.compile(r"(<!-- (speed|summary): .*? -->\n).*?(<!-- /\2 -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The result files that the tables are made of, and their content."""

    files: Mapping[str, Path]
    """By kind: `latency`, and where they were given `quality` and the names of the models of real size."""
    results: Results
    """Of latency.py."""
    evaluation: Mapping[str, Any] | None
    """What `flashdiff evaluate STUDENT --teacher TEACHER --json FILE` wrote, for bundles called student and teacher."""
    real_size: Mapping[str, Mapping[str, Any]]
    """Result files of real_latency.py by model."""


def read_sources(latency: Path, quality: Path | None, real_size: Sequence[Path]) -> Sources:
    """Read the result files; ConfigError for one of another kind."""
    models = {}
    for file in real_size:
        try:
            content = json.loads(file.read_text("utf-8"))
            models[str(content["model"]).partition(",")[0]] = (file, content)
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{file}: not a result of real_latency.py") from None
    return Sources(
        files={
            "latency": latency,
            **({"quality": quality} if quality else {}),
            **{name: file for name, (file, _) in models.items()},
        },
        results=read_results([latency]),
        evaluation=read_evaluation(quality) if quality else None,
        real_size={name: content for name, (_, content) in models.items()},
    )


def replace_tables(file: Path, sources: Sources) -> str:
    """The file's text with its tables made again, which link to the result files; ConfigError for a file without any."""
    text = file.read_text("utf-8")
    links = {
        name: Path(os.path.relpath(path.resolve(), file.resolve().parent)).as_posix() for name, path in sources.files.items()
    }
    content: dict[str, Callable[[], str]] = {
        "speed": lambda: full_table(sources.results, links),
        "summary": lambda: f"{short_table(sources)}\n\n{_short_caption(sources, links)}",
    }
    if not _REGION.search(text):
        raise ConfigError(
            f"{file} has no lines `<!-- speed: ... -->` and `<!-- /speed -->` (or summary) to write a table between"
        )
    return _REGION.sub(lambda found: f"{found[1]}\n{content[found[2]]()}\n{found[3]}", text)


def full_table(results: Results, links: Mapping[str, str]) -> str:
    """Every configuration of the main backend at batch 1, by stage; its caption says what keeps the student from the ideal."""
    measurements = _at_batch_1(results)
    gaps = {(gap.total["model"], gap.total["steps"]): gap for gap in ideal_gaps(measurements)}
    rest = "\n".join(
        f"With {steps} steps the student reaches {gap.share_of_ideal:.2f} of the ideal: of its {gap.total['median_ms']:.1f} ms, "
        f"{gap.fixed:.1f} are text, decoding and PNG,\n"
        f"and {gap.evaluations:.1f} come from evaluations that run one by one, where the teacher's run in guided pairs."
        for steps in (4, 2)
        if (gap := gaps.get(("student", steps)))
    )
    caption = (
        f"*Medians of {measurements[0]['n']} interleaved runs on {_machine(results, measurements)}; prompt to PNG bytes, in\n"
        f"milliseconds ([rows]({links['latency']})).\nIdeal is the ratio of network evaluations.\n{rest}*"
    )
    return f"{speedup_table(measurements)}\n\n{caption}"


def short_table(sources: Sources) -> str:
    """The rows of SUMMARY that were measured: milliseconds, speed-up over the teacher, and quality where it was evaluated."""
    compared = {
        (total["model"], total["steps"]): (total, teacher) for total, _, teacher in against_teachers(_at_batch_1(sources.results))
    }
    subjects = {row["name"]: row for row in sources.evaluation["rows"]} if sources.evaluation else {}
    lines = []
    for model, steps in SUMMARY:
        if (model, steps) in compared:
            total, teacher = compared[model, steps]
            speedup = teacher.stage_ms["total"] / total["median_ms"]
            quality = _quality_cells(subjects.get(f"{model.removesuffix(', served')}, {steps} steps"))
            lines.append([model, steps, f"{total['median_ms']:.1f}", f"{speedup:.1f}x", *quality])
    return markdown_table(("model", "steps", "ms", "speed-up", "KID x1000 (lower is better)", "text score"), lines)


def _short_caption(sources: Sources, links: Mapping[str, str]) -> str:
    measurements = _at_batch_1(sources.results)
    runs = f"{measurements[0]['n']} runs on {_machine(sources.results, measurements)}"
    sentences = [f"Medians of {runs}, prompt to PNG ([rows]({links['latency']}))."]
    if sources.evaluation:
        images = sources.evaluation["rows"][0]["images"]
        sentences.append(f"Quality: {images:,} images per row, with 95 % intervals ([rows]({links['quality']})).")
    sentences += _real_size_sentences(sources.real_size, links)
    return f"*{chr(10).join(sentences)}*"


def _at_batch_1(results: Results) -> list[Measurement]:
    measurements = [one for one in results.latency if one["batch"] == 1]
    if not measurements:
        raise ConfigError("the tables need measurements of latency.py at batch 1")
    return of_main_backend(measurements)


def _machine(results: Results, measurements: Sequence[Measurement]) -> str:
    return f"{describe_machine(results.environment)}, {measurements[0]['precision']}"


def _quality_cells(subject: Mapping[str, Any] | None) -> list[str]:
    estimates = [subject["kid"], subject["text"]] if subject else []
    return [f"{one['value']:.1f} ± {(one['high'] - one['low']) / 2:.1f}" for one in estimates] or ["", ""]


def _real_size_sentences(models: Mapping[str, Mapping[str, Any]], links: Mapping[str, str]) -> Iterator[str]:
    for name, found in models.items():
        measurements = [one for one in found["rows"] if one["batch"] == 1]
        for total, _, teacher in against_teachers(measurements):
            if (total["model"], total["steps"]) == ("student", 4):
                where = found["environment"].get("gpu") or describe_machine(found["environment"])
                yield (
                    f"{_TITLES.get(name, name)} of real size with random weights on an {where}, {total['precision']}: 4 steps in "
                    f"{total['median_ms']:.0f} ms, {teacher.stage_ms['total'] / total['median_ms']:.1f}x its teacher "
                    f"([rows]({links[name]}))."
                )
