"""Result files: recognising what each holds, and refusing those that must not be compared."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measurements import Measurement
from flashdiff.errors import ConfigError

_MUST_AGREE = ("cpu", "threads", "system", "libraries", "bundles")
"""Parts of the environment; results that differ in one must not be compared."""


@dataclass
class Results:
    """The content of the files, by the benchmark that wrote it."""

    environment: dict[str, Any]
    latency: list[Measurement] = field(default_factory=list)
    load: list[Measurement] = field(default_factory=list)
    quality: dict[str, Any] = field(default_factory=dict)
    peers: list[Measurement] = field(default_factory=list)
    scaling: list[Measurement] = field(default_factory=list)


def read_results(files: Sequence[Path]) -> Results:
    """ConfigError names the file that holds no results for the report, or whose environment differs from the earlier files'."""
    results: Results | None = None
    for file in files:
        try:
            found = json.loads(file.read_text("utf-8"))
            environment = found["environment"]
            measurements = found.get("rows") or [{}]
            common_names = set.intersection(*map(set, measurements))
        except (AttributeError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{file}: not a result of these benchmarks") from None
        results = results or Results(dict(environment))
        _merge_environment(file, results.environment, environment)
        section = _section_of(file, found, measurements, common_names)
        if getattr(results, section):
            raise ConfigError(f"{file}: an earlier file already has the report's {section} section; give one")
        setattr(results, section, found if section == "quality" else measurements)
    if results is None:
        raise ConfigError("name at least one result file")
    return results


def _merge_environment(file: Path, merged: dict[str, Any], environment: Mapping[str, Any]) -> None:
    """Add the file's libraries and bundles to those of the files before; ConfigError where the environments disagree."""
    for name in _MUST_AGREE:
        ours, theirs = merged.get(name), environment.get(name)
        if name in ("libraries", "bundles"):
            # A benchmark lists only those it used: those that an earlier file lists too must be equal.
            known = merged[name] = {**(theirs or {}), **(ours or {})}
            ours, theirs = known, {**known, **(theirs or {})}
        if ours != theirs:
            raise ConfigError(
                f"{file}: its {name} differs from that of the files before; measure all on one machine, in one environment"
            )


def _section_of(file: Path, found: Mapping[str, Any], measurements: Sequence[Measurement], common_names: set[str]) -> str:
    """The field of `Results` that the file's content belongs to; `common_names` are those that all its measurements have."""
    if "points" in found:
        if not all(point.get(name) for point in (*found["points"], found.get("real", {})) for name in ("kid", "text")):
            raise ConfigError(f"{file}: points without KID or text score; measure them with both")
        return "quality"
    if common_names >= {"parameters", "median_ms"}:
        return "scaling"
    if common_names >= {"server", "phase"}:
        return "peers"
    if "phase" in common_names:
        needed = {"saturated": "cores", "quiet": "idle_cores"}
        if any(needed.get(one["phase"], "phase") not in one for one in measurements):
            raise ConfigError(f"{file}: measurements of an older load.py, which did not record the cores; measure them again")
        return "load"
    if common_names >= {"model", "steps", "stage", "median_ms"}:
        if all(one["model"] != "teacher" for one in measurements):
            raise ConfigError(f"{file}: no measurement of a teacher, and the report compares with one")
        return "latency"
    raise ConfigError(f"{file}: the report has no section for its measurements")
