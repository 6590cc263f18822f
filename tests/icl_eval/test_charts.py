"""Charts: what is drawn stands where the axes say that it does."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from icl_eval.charts import Interval, Series, interval_chart, line_chart, log_ticks, tick_names, ticks

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def axis(svg: str, of: str) -> dict[str, float]:
    """Names of ticks → where they are: "y" of the y axis, "x" of the x axis."""
    anchor, place = {"y": ("end", "y"), "x": ("middle", "x")}[of]
    texts = [each for each in ElementTree.fromstring(svg).iter("text") if each.get("text-anchor") == anchor]
    found = {str(each.text): float(each.get(place)) for each in texts if each.get("class") == "tick"}
    return {name: at - 4 if of == "y" else at for name, at in found.items()}  # letters stand 4 below


def dots(svg: str) -> list[tuple[float, float]]:
    return [(float(each.get("cx")), float(each.get("cy"))) for each in ElementTree.fromstring(svg).iter("circle")]


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 1), (0, 0.002), (0, 3e-4), (100, 101), (0, 2500), (0.12, 0.19)])
def test_ticks_say_where_they_are(low, high):
    """0.0015 called 0.002, beside another 0.002."""
    places = ticks(low, high)
    assert 3 <= len(places) <= 11 and low - 1e-9 <= places[0] and places[-1] <= high + 1e-9
    assert [float(name.replace(",", "")) for name in tick_names(places)] == pytest.approx(places, rel=1e-9, abs=1e-12)


def test_ticks_of_a_logarithmic_axis_enclose_what_is_drawn():
    """A point above the last tick, and so outside of the chart."""
    assert log_ticks(0.11, 6.2) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert log_ticks(0.1, 10) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert log_ticks(1, 1) == [1, 2]


@pytest.mark.parametrize("log", [False, True])
def test_points_stand_at_their_ticks(log):
    """An axis that is turned round, or a logarithmic one with names of a linear one."""
    line = Series("<a & b>", [0, 1, 2], [0.1, 1.0, 10.0], 3, [0.1, 0.5, 5.0], [0.2, 2.0, 10.0], dots=True)
    names = ["none", "one", "two"]
    svg = line_chart([line], title="t", x_label="shots", y_label="seconds", log=log, x_names=names)
    x, y = axis(svg, "x"), axis(svg, "y")
    assert [at for at, _ in dots(svg)] == pytest.approx([x[name] for name in names])
    assert dots(svg)[2][1] == pytest.approx(y["10"], abs=0.1)
    below, middle, above = (at for _, at in dots(svg))
    if log:
        assert middle == pytest.approx(y["1"], abs=0.1) and below == pytest.approx(y["0.1"], abs=0.1)
        assert below - middle == pytest.approx(middle - above, abs=0.2)
    else:
        assert below - middle == pytest.approx((middle - above) / 10, abs=0.2)
    band = re.search(r'class="band f3" points="([^"]*)"', svg)[1].split()
    assert len(band) == 6 and band[0].startswith(f"{x['none']:.1f},") and band[-1].startswith(f"{x['none']:.1f},")
    assert "<a" not in svg and "&lt;a &amp; b&gt;: 10.000" in svg
    assert ">seconds</text>" in svg and ">shots</text>" in svg


def test_a_single_point_is_seen():
    """A line of one point, of which browsers draw nothing."""
    assert len(dots(line_chart([Series("a", [5], [2.0], 0)], title="t", x_label="step"))) == 1
    assert not dots(line_chart([Series("a", [5, 6], [2.0, 3.0], 0)], title="t", x_label="step"))


@pytest.mark.parametrize("most", [1.0, None])
def test_intervals_reach_from_end_to_end(most):
    """Whiskers of another row, or on another scale than the ticks'."""
    rows = [Interval("as it is", 0.8, 0.6, 1.0, strong=True), Interval("shut", 0.2, 0.0, 0.4)]
    svg = interval_chart(rows, title="t", x_label="accuracy", chance=0.2, margin=0.05, colour=1, most=most)
    x = axis(svg, "x")
    whiskers = re.findall(r'class="whisker (s\w)" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)"', svg)
    assert [kind for kind, *_ in whiskers] == ["s1", "sn"]
    ends = [(float(first), float(last)) for _, first, _, last in whiskers]
    assert ends == [pytest.approx((x["0.6"], x["1"])), pytest.approx((x["0"], x["0.4"]))]
    assert dots(svg) == [
        (pytest.approx(x[at]), pytest.approx(float(whisker[2])))
        for at, whisker in zip(("0.8", "0.2"), whiskers, strict=True)
    ]
    assert ">accuracy</text>" in svg


def test_the_plot_of_costs_is_that_of_the_results(tmp_path, monkeypatch):
    """A plot kept beside newer figures; a line of the wrong side, or one that needs something from elsewhere."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    evaluation: Any = importlib.import_module("evaluation")
    kept = BENCHMARKS / "results" / "evaluation.json"
    file = Path(shutil.copy(kept, tmp_path))
    assert evaluation.plot(file).read_text() == kept.with_suffix(".svg").read_text()
    figures = json.loads(file.read_text())["figures"]
    costs = evaluation.seconds_by_shots(figures)
    assert [name for name in costs if name.startswith("ours")] == [
        "ours, own demonstrations",
        "ours, shared demonstrations",
    ]
    assert list(costs["ours, shared demonstrations"].values()) == [
        figures[f"{each} demonstrations: seconds a query ours"] for each in ("0 own", "8 shared", "32 shared")
    ]
    svg = file.with_suffix(".svg").read_text()
    ElementTree.fromstring(svg)
    assert not re.search(r"""(src|href)=|url\(|@import|<script""", svg)
    file.write_text("{}")
    with pytest.raises(SystemExit, match="no seconds a query"):
        evaluation.plot(file)
