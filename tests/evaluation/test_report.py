import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from stand_ins import make_row

from lcr.evaluation import plots
from lcr.evaluation.page import write_page
from lcr.evaluation.report import unique_names, write_report
from lcr.evaluation.results import ResultsError, append_row
from lcr.evaluation.series import select_series
from lcr.evaluation.statistics import wilson_interval
from lcr.evaluation.tables import (
    compare,
    print_table,
    summarise,
    write_bytes,
    write_length,
    write_percent,
    write_rate,
)

LENGTHS, DEPTHS = (512, 1024, 65536), (0.0, 0.5, 1.0)


def make_rows(architecture="mamba", right=(20, 20, 3), **changes):
    return [
        make_row(architecture, length, depth, right=count, **changes)
        for length, count in zip(LENGTHS, right, strict=True)
        for depth in DEPTHS
    ]


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not pair up."""

    VOID = {"meta", "img", "source"}

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    rows = make_rows() + make_rows("a<script>alert(1)</script>&\"'", (19, 4, 0))[:-1]
    for row in rows:
        append_row(workdir / "results.jsonl", row)
    for name in ("mamba", "other"):
        (workdir / name).mkdir()
        (workdir / name / "config.json").write_text(json.dumps({"name": f"<b>{name}</b>", "model": {"d_model": 64}}))
    return workdir, write_report(workdir)


def test_the_page_has_every_part(sweep):
    workdir, report = sweep
    page = report.page.read_text(encoding="utf-8")
    reader = Reader(page)
    text = "".join(reader.text)
    assert reader.tags.count("img") == 4 and reader.tags.count("source") == 4, "two heat-maps and two charts"
    assert reader.tags.count("h1") == 1 and reader.tags.count("table") == 1
    assert reader.tags.count("tr") == 1 + 9 + 8
    assert reader.tags.count("details") == 2 and '"d_model": 64' in text
    assert "Passkey, 512 to 64K tokens" in text
    assert "Of 2 architectures mamba reaches furthest: at least 95% exact match at every depth up to 1K tokens." in text
    assert dict(reader.attributes)["lang"] == "en" and "width=device-width" in page
    assert not list(workdir.glob("report/*.part"))


def test_the_page_asks_nobody_for_anything(sweep):
    page = sweep[1].page.read_text(encoding="utf-8")
    reader = Reader(page)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    links = [value for name, value in reader.attributes if name in ("src", "srcset", "href")]
    assert len(links) == 8 and all(link.startswith("data:image/png;base64,") for link in links)
    without_pictures = re.sub(r'"data:image/png;base64,[^"]*"', "", page)
    assert "//" not in without_pictures and "url(" not in without_pictures and "@import" not in without_pictures


def test_names_from_outside_are_escaped(sweep):
    page = sweep[1].page.read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page
    assert "a&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;" in page
    assert "&lt;b&gt;mamba&lt;/b&gt;" in page.replace("&quot;", '"')


def test_the_pictures_are_written(sweep):
    workdir, report = sweep
    pictures = [*report.heatmaps, report.accuracy, report.state]
    assert sorted(path.name for path in pictures) == sorted(path.name for path in (workdir / "report").glob("*.png"))
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert report.page == workdir / "report" / "index.html"


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_heatmap_shows_numbers_training_length_and_what_was_not_run():
    (series,), _ = select_series(make_rows()[:-1])
    figure = plots.draw_heatmap(series, list(LENGTHS), list(DEPTHS))
    axes = figure.axes[0]
    # one octave wide each, centred at their lengths; the last, of 64K at depth 1, was not run
    assert [patch.get_xy() for patch in axes.patches[:3]] == [(8.5, -0.5), (9.5, -0.5), (15.5, -0.5)]
    colours = plots.matplotlib.colormaps[plots.MAP]
    assert [patch.get_facecolor() for patch in axes.patches[:3]] == [colours(1.0), colours(1.0), colours(0.15)]
    assert [bool(patch.get_hatch()) for patch in axes.patches] == [False] * 8 + [True]
    assert axes.patches[8].get_xy() == (15.5, 1.5)
    assert [text for text in texts(figure) if text.isdigit()] == ["100"] * 2 + ["15"] + ["100"] * 2 + ["15"] + [
        "100"
    ] * 2
    assert "trained on up to 640 tokens" in texts(figure)
    assert axes.lines[0].get_xdata()[0] == 9.5, "640 lies between the cells of 512 and of 1K"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["512", "1K", "64K"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "0.5", "1"]
    assert axes.yaxis_inverted(), "depth 0 is at the top"
    assert "hatched: not run" in [text.get_text() for text in figure.texts] + [figure.get_supxlabel()]


def test_numbers_stand_out_from_every_colour_of_the_map():
    for share in np.linspace(0, 1, 21):
        colour = plots.matplotlib.colormaps[plots.MAP](float(share))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        other = {"white": 1.0, "black": 0.0}[plots.ink(colour)]
        contrast = (max(other, luminance) + 0.05) / (min(other, luminance) + 0.05)
        assert contrast >= 4.5, "what WCAG 2 asks of text"


def test_accuracy_is_drawn_with_bands_chance_and_training_length():
    series, _ = select_series(make_rows() + make_rows("retnet", (18, 9, 0)))
    figure = plots.draw_accuracy(series, plots.DARK)
    for axes, chance in zip(figure.axes, ("chance 0.001%", "chance 10%"), strict=True):
        assert {chance, "trained on up to 640"} <= {text.get_text() for text in axes.texts}
        assert axes.get_xscale() == "log" and len(axes.collections) == 2
        drawn = {line.get_label(): line.get_ydata() for line in axes.lines if not line.get_label().startswith("_")}
        assert list(drawn) == ["mamba", "retnet"] and list(drawn["retnet"]) == pytest.approx([0.9, 0.45, 0.0])
    low, high = wilson_interval(27, 60)
    corners = figure.axes[0].collections[1].get_paths()[0].vertices
    assert {round(y, 6) for x, y in corners if x == 1024} == {round(low, 6), round(high, 6)}


def test_many_series_have_styles_of_their_own_and_no_bands():
    rows = [row for i in range(18) for row in make_rows(f"kind{i}", (18, 9, 0))]
    longer = [dataclasses.replace(row, length=1 << 20) for row in make_rows("kind0") if row.length == 1024]
    series, _ = select_series(rows + longer)
    figure = plots.draw_accuracy(series)
    assert not figure.axes[0].collections
    looks = [plots.style(i) for i in range(64)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 64, "points have no dashes"
    titles = [axes.get_title(loc="left") for axes in plots.draw_state(series).axes]
    assert titles == ["at 512 tokens", "at 1K tokens", "at 64K tokens"], "at a million tokens there is one of eighteen"


def test_state_is_drawn_at_the_bytes_of_each_length():
    growing = [dataclasses.replace(row, state_bytes=64 * row.length) for row in make_rows("mha", (20, 10, 0))[:-3]]
    series, _ = select_series(make_rows() + growing)
    figure = plots.draw_state(series)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["at 512 tokens", "at 1K tokens", "at 64K tokens"]
    points = [[tuple(c.lines[0].get_xydata()[0]) for c in axes.containers] for axes in figure.axes]
    assert points == [[(17408, 1.0), (32768, 1.0)], [(17408, 1.0), (65536, 0.5)], [(17408, 0.15)]]
    assert all(axes.get_xscale() == "log" for axes in figure.axes)


def test_of_each_architecture_the_newest_checkpoint_is_shown_and_the_rest_is_told():
    old = make_rows(right=(20, 20, 20), checkpoint_step=100)
    new = make_rows(right=(19, 19, 1))
    more = [make_row(length=512, depth=0.0, right=20, samples=10)]
    (series, other), notes = select_series([*old, *new, *more, *make_rows("retnet")])
    assert {row.checkpoint_step for row in series.cells.values()} == {400} and len(series.cells) == 9
    assert series.cells[512, 0.0].samples == 20
    assert notes == [
        "mamba: 9 of 19 rows are shown, those of the newest configuration, checkpoint step 400 and seed 0 with the most "
        "samples."
    ]
    assert (series.label, other.label) == ("mamba", "retnet")


def test_labels_tell_apart_what_was_asked():
    series, _ = select_series([make_row(), make_row(haystack="words"), make_row("gqa", question="first")])
    assert [one.label for one in series] == [
        "mamba, repeat haystack, question last",
        "mamba, words haystack, question last",
        "gqa, repeat haystack, question first",
    ]
    assert unique_names(["a b", "a/b", "A b", "../x", "<>"]) == ["a_b", "a_b_2", "A_b_3", "x", "series"]


def test_pooling_adds_up_samples_and_their_interval():
    (series,), _ = select_series([make_row(depth=0.0, right=20), make_row(depth=1.0, right=10)])
    pooled = series.pooled(1024)
    assert (pooled.samples, pooled.exact_match, pooled.digit_accuracy) == (40, 0.75, 0.75)
    assert (pooled.exact_match_low, pooled.exact_match_high) == wilson_interval(30, 40)
    assert (pooled.digit_accuracy_low, pooled.digit_accuracy_high) == wilson_interval(150, 200)


@pytest.mark.parametrize("right, reach", [((20, 20, 20), 65536), ((20, 19, 18), 1024), ((18, 20, 20), 0)])
def test_the_reach_ends_where_any_depth_falls_short(right, reach):
    (series,), _ = select_series(make_rows(right=right))
    assert series.reach() == reach
    assert ("does not give 95%" in summarise(series)) == (reach == 0)


def test_the_summary_says_how_far_and_what_is_beyond():
    one, _ = select_series(make_rows())
    summary = (
        "mamba, trained on up to 640 tokens, gives at least 95% exact match at every depth up to 1K tokens "
        "(1.6 times its training length). At 64K it gives 15% (95% interval 8 to 26%, 60 samples)."
    )
    assert summarise(one[0]) == compare(one) == summary
    both, _ = select_series(make_rows() + make_rows("retnet"))
    assert compare(both).startswith("Of 2 architectures mamba and retnet reach furthest: ")
    neither, _ = select_series(make_rows(right=(0, 0, 0)) + make_rows("retnet", right=(0, 0, 0)))
    assert compare(neither).startswith("No architecture gives 95%")


def test_the_printed_table_lines_up():
    series, _ = select_series(make_rows()[:-1])
    lines = print_table(series).splitlines()
    assert lines[0].startswith("mamba: passkey, trained on up to 640 tokens, checkpoint of step 400")
    assert [line.split() for line in lines[1:5]] == [
        ["exact", "match,", "%", "512", "1K", "64K"],
        ["depth", "0", "100", "100", "15"],
        ["depth", "0.5", "100", "100", "15"],
        ["depth", "1", "100", "100", "-"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[6].split()[-1] == "7-29", "6 of 40"


@pytest.mark.parametrize(
    "length, written",
    [
        (1, "1"),
        (640, "640"),
        (1000, "1,000"),
        (1024, "1K"),
        (1536, "1.5K"),
        (10240, "10K"),
        (1 << 20, "1M"),
        (3 << 19, "1.5M"),
    ],
)
def test_lengths_are_written_short_where_that_is_exact(length, written):
    assert write_length(length) == written


def test_numbers_are_written_short():
    assert [write_bytes(n) for n in (24, 999, 1000, 17408, 1.5e6, 2e9, 3e12)] == [
        "24 B", "999 B", "1 kB", "17.4 kB", "1.5 MB", "2 GB", "3 TB",
    ]  # fmt: skip
    assert [write_rate(n) for n in (12.34, 999.7, 123456, 2.5e6, 3e9)] == ["12.3", "1k", "123k", "2.5M", "3G"]
    assert [write_percent(n) for n in (0, 0.001, 0.154, 0.999, 1)] == ["0", "<1", "15", ">99", "100"]


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ResultsError, match=r"has no rows.*experiments\.evaluate"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_half_written_row_is_told_on_the_page(tmp_path):
    append_row(tmp_path / "results.jsonl", make_row())
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"arch')
    report = write_report(tmp_path)
    assert any("half-written" in note for note in report.notes)
    page = report.page.read_text(encoding="utf-8")
    assert "half-written" in page and "No config.json was found." in page


def test_a_page_can_be_made_of_any_series():
    series, notes = select_series([make_row(task="recall", haystack="", question="")])
    page = write_page("Title <1>", series, ["<img>"], "<img>", "<img>", {}, notes)
    assert "Task: recall." in page and "<title>Title &lt;1&gt;</title>" in page
