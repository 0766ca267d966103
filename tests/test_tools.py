"""The tools beside the tests: curves.py draws runs, and bench.py computes ratios."""
import json

import numpy as np
from bench import ratios
from curves import GAP, HEIGHT, TOP, draw_curves, read_log
from PIL import ImageColor


def write_log(folder, lines):
    folder.mkdir()
    folder.joinpath("log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_draw_a_run_in_each_panel_and_the_later_of_two_lines_counts(tmp_path):
    log = [{"event": "start", "step": 0}]
    for step, loss, miou in ((10, 3.0, 0.1), (20, 9.0, 0.9), (20, 2.0, 0.2), (30, 1.5, 0.3)):
        log.append({"event": "train", "step": step, "loss": loss, "lr": loss / 100})
        log.append({"event": "validation", "step": step, "miou": miou})
    write_log(tmp_path / "one", log)
    write_log(tmp_path / "two", log[:3])  # a run that has only begun
    loss, rate, miou = read_log(tmp_path / "one")
    assert loss == {10: 3, 20: 2, 30: 1.5} and rate == {10: 0.03, 20: 0.02, 30: 0.015}
    assert miou == {10: 10, 20: 20, 30: 30}

    pixels = np.array(draw_curves([tmp_path / "one", tmp_path / "two"]))
    for color in ("#1f6fb4", "#d95f02"):
        ink = (pixels == ImageColor.getrgb(color)).all(axis=2)
        for panel in range(3):
            top = TOP + panel * (HEIGHT + GAP)
            assert ink[top:top + HEIGHT + 1].sum() > 20, (color, panel)
        assert ink[top + HEIGHT + GAP // 2:].any(), "the legend"


def test_ratios_are_medians_of_ratios_within_a_round():
    times = {"slow": [10, 200, 30], "fast": [5, 150, 6]}  # ratios 0.5, 0.75, 0.2
    assert ratios(times, "slow") == {"slow": 1, "fast": 0.5}
