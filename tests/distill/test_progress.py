"""What a run shows while it works, and the time that it says is left."""

import itertools
import sys
from types import SimpleNamespace

import pytest
from recipes import branches_of_text, tiny_recipe

from flashdiff.distill import progress
from flashdiff.distill.costs import RemainingTime, target_cost
from flashdiff.distill.progress import Stage
from flashdiff.distill.step import span_at


def test_a_log_gets_a_line_when_a_stage_begins_and_one_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = itertools.count(step=10)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(ticks)))  # ten seconds a look
    with caplog.at_level("INFO"), Stage("targets", "samples", 8) as stage:
        for _ in range(7):
            stage.advance(note="loss 1")
    lines = [record.message for record in caplog.records]
    assert lines == ["targets: 8 samples", "targets: 3 of 8 samples, loss 1", "targets: 6 of 8 samples, loss 1"]


def test_a_terminal_gets_a_named_bar_and_no_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with caplog.at_level("INFO"), Stage("preview", "steps", 2) as stage:
        stage.advance(2, "loss 1")
    assert not caplog.records
    assert "preview: 100%" in (shown := capsys.readouterr().err)
    assert "loss 1" in shown


def test_the_time_left_counts_checkpoints_and_is_corrected_by_what_a_phase_takes(tiny_base: object) -> None:
    modes = {"mode_weights": (0, 0, 0, 1)}
    recipe = tiny_recipe(
        tiny_base,  # type: ignore[arg-type]
        phases=[{"updates": 20, **modes}, {"updates": 20, **modes, "distribution_matching": 0.5}],
        checkpoint_every=10,
        preview_prompts=["a dog"],
        keep_best=4,
    )
    text = branches_of_text({})
    left = RemainingTime(recipe, text)
    left.solved(span_at(recipe, 0), 16.0)  # a second an update
    left.updated(recipe.phases[0], 1.0)
    # 19 updates of 3 passes and 20 of 6, 24 more targets, and four checkpoints, at the rate of the targets': 107 evaluations
    # for a preview and 4 for the held-out samples.
    checkpoint_s = 111 / (recipe.batch_size * target_cost(recipe, recipe.phases[0], text))
    assert left.left_s(1) == pytest.approx(19 * 1 + 20 * 2 + 24 * 1 + 4 * checkpoint_s)
    left.previewed(5.0)
    assert left.left_s(10) == pytest.approx(10 * 1 + 20 * 2 + 24 * 1 + 3 * 5)
    left.updated(recipe.phases[1], 3.0)  # not the two seconds that were expected
    assert left.left_s(20) == pytest.approx(20 * 3 + 20 * 1 + 2 * 5)
