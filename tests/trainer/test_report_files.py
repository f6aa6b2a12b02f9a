"""A report's files: page, tables and figures, the command, kills and full disks, a browser."""

import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from churn_trainer import cli, report
from churn_trainer.output import MARKER
from churn_trainer.report_command import terminal_tables
from matplotlib.image import imread
from rich.console import Console
from small_study import Page, copied, first_split, independent, rows_of, table
from typer.testing import CliRunner

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


CSV_FILES = ("runs.csv", "pairs.csv", "curves.csv", "comparisons.csv")

# Files and page -----------------------------------------------------------------------------------


def test_the_folder_holds_page_tables_and_figures(report_folder, made):
    names = {path.name for path in report_folder.iterdir()}
    figures = {f"{one.name}.{kind}" for one in made.figures for kind in ("png", "svg")}
    tables = {f"table-{one.kind}.csv" for one in made.tables}
    assert names == {"report.html", MARKER, *CSV_FILES} | figures | tables
    for path in report_folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    churn = [
        one for one in rows_of(report_folder / "table-methods.csv") if one["column"] == "churn"
    ]
    first = table(made, "methods").rows[0].cells[1].estimate
    assert float(churn[0]["mean"]) == 100 * first.mean
    assert len(rows_of(report_folder / "runs.csv")) == len(made.found.finished)
    split = next(iter(made.outcomes[0].splits.values()))
    pairs = rows_of(report_folder / "pairs.csv")
    assert (pairs[0]["run"], pairs[0]["other_run"]) == (split.runs[0].id, split.runs[1].id)
    assert float(pairs[0]["churn"]) == float(split.report.churn[0, 1])
    curves = rows_of(report_folder / "curves.csv")
    assert len(curves) == 2 * len(made.curves)
    assert float(curves[0]["churn"]) == float(made.curves[0].churn[0])
    rows = rows_of(report_folder / "comparisons.csv")
    assert float(rows[1]["p_holm"]) == made.comparisons[0].p_holm
    assert rows[0]["p_holm"] == ""


def test_the_page_is_whole_self_contained_and_says_verdicts_first(report_folder, made):
    text = (report_folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 2 * len(made.figures)  # for wide screens and narrow ones
    assert page.tags.count("table") == len(made.tables)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert "@media print" in text
    first = text.index("<h1>")
    order = ("What helped", "Accuracy and churn of", "Confidence, and", "Sources", "Examples of")
    places = [text.index(f"<h2>{title}") for title in order]
    assert [first, *places] == sorted([first, *places])
    assert not re.search(r"<h2>(Table|Figure) \d", text)  # the page's order is its own
    assert text.count("means Bhojanapalli et al. 2021") == 1
    assert "<small>Table 2 of the paper</small>" in text
    # A phone shows each cell with its column's name.
    assert text.count('data-label="change of churn, points"') == 2 * len(made.comparisons) - 1
    assert "url(http" not in text
    # No colour of a figure escapes the page's themes.
    assert "prefers-color-scheme: dark" in text
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--series-0)" in figures
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))
    assert not re.findall(r"#(?!000000|ffffff)[0-9a-f]{6}\b", figures)
    for drawing in made.figures:
        assert drawing.caption


@pytest.mark.parametrize("narrow", [False, True])
def test_terminal_tables_show_every_row(made, narrow):
    console = Console(file=io.StringIO(), width=200)
    for shown in terminal_tables(made, narrow=narrow):
        console.print(shown)
    text = console.file.getvalue()
    for one in made.outcomes:
        assert f"{100 * one.estimate('accuracy', 0.95).mean:.2f}" in text


def test_the_same_runs_make_the_same_page(trained, report_folder, tmp_path):
    again = report.write_report(trained, tmp_path / "report", command="churn-train report x")
    assert again.read_bytes() == (report_folder / "report.html").read_bytes()


# The command --------------------------------------------------------------------------------------


def test_the_command_writes_beside_the_runs(trained, tmp_path):
    root = copied(trained, tmp_path, first_split)
    done = CliRunner().invoke(cli.app, ["report", str(root)])
    assert done.exit_code == 0, done.output
    assert "Accuracy and churn of every method" in done.output
    assert "churn, %" in done.output
    assert f"Report: {root / 'report' / 'report.html'}" in done.output
    assert "Weight decay needs runs of one method" in done.output
    assert re.search(r"^(Churn|digits).*(falls from|to help|too few runs)", done.output, re.M)
    again = CliRunner().invoke(cli.app, ["report", str(root)])  # a report is replaced
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["nowhere"],
            2,
            "nowhere is not a run folder; pass the --out folder of churn-train train",
        ),
        (["runs", "--level", "2"], 2, "level must be in (0, 1), got 2.0; 0.95 is customary"),
        (["runs", "--out", "mine"], 2, "which holds other files; name a new folder"),
    ],
)
def test_wrong_arguments_are_explained(trained, tmp_path, monkeypatch, arguments, status, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "runs").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["report", *arguments])
    assert done.exit_code == status, done.output
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
    assert not (trained / "report").exists()


def names_and_bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_ctrl_c_leaves_the_earlier_report(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    report.write_report(trained, out)
    before = names_and_bytes(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "render_page", interrupt)
    done = CliRunner().invoke(cli.app, ["report", str(trained), "--out", str(out)])
    assert done.exit_code == 130, done.output
    assert "interrupted; no report was written to" in " ".join(done.stderr.split())
    assert names_and_bytes(tmp_path) == before


def test_a_disk_that_takes_no_more_leaves_the_earlier_report(trained, tmp_path):
    root = copied(trained, tmp_path, lambda run: run == independent("baseline", 0))
    out = tmp_path / "out"
    report.write_report(root, out)
    before = names_and_bytes(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "churn_trainer", "report", str(root), "--out", str(out)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
    )
    assert done.returncode == 1, done.stderr
    said = " ".join(done.stderr.split())
    assert f"no report was written to {out}, an earlier one is as it was" in said
    assert "make room or name another folder with --out" in said
    assert "Traceback" not in done.stderr
    assert names_and_bytes(tmp_path) == before


# Nothing half-written, killed or not --------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from churn_trainer import output, report

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

where = sys.argv[3]
if where == "page":
    report.render_page = kill
elif where == "before":
    output._take_place = kill
elif where == "between":  # where the system cannot exchange: after the first of two renames
    output._exchange = lambda *_: False
    rename = Path.rename
    Path.rename = lambda path, to: (rename(path, to), str(to).endswith("-earlier") and kill())
else:
    output.shutil.rmtree = kill
report.write_report(Path(sys.argv[1]), Path(sys.argv[2]), command="the later one")
"""


@pytest.mark.parametrize("where", ["page", "before", "between", "after"])
def test_kill_9_leaves_the_old_report_or_the_new_one(trained, tmp_path, where):
    root = copied(
        trained, tmp_path, lambda run: first_split(run) and run.method.name == "2-ensemble"
    )
    out = tmp_path / "out" / "report"
    report.write_report(root, out, command="the earlier one")
    earlier, finished = names_and_bytes(out), names_and_bytes(root)
    line = [sys.executable, "-c", KILLED, str(root), str(out), where]
    assert subprocess.run(line, env=ENVIRONMENT, check=False).returncode == -signal.SIGKILL
    assert names_and_bytes(root) == finished
    if where == "after":
        assert "the later one" in (out / MARKER).read_text()
        assert names_and_bytes(out).keys() == earlier.keys()
    elif where == "between":  # the next report puts it back before anything else
        assert any(earlier == names_and_bytes(one) for one in out.parent.iterdir())
        assert not out.exists()
    else:
        assert names_and_bytes(out) == earlier
    assert len(list(out.parent.iterdir())) == 2  # the killed one's folder
    report.write_report(root, out, command="the last one")
    assert [path.name for path in out.parent.iterdir()] == ["report"]
    assert "the last one" in (out / MARKER).read_text()


# In a browser -------------------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def browse(page, profile, *arguments):
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-background-networking", f"--user-data-dir={profile}"),
            *(*arguments, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
def test_a_browser_shows_the_page_and_prints_it(report_folder, made, tmp_path):
    page = report_folder / "report.html"
    seen = browse(page, tmp_path / "profile", "--dump-dom")
    assert seen.count("<svg") == 2 * len(made.figures)
    assert seen.count("<table") == len(made.tables)
    assert "Accuracy and churn of every method" in seen
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "profile", "--window-size=1280,6000", f"--screenshot={picture}")
    pixels = imread(picture)[..., :3]
    assert pixels.shape == (6000, 1280, 3)
    rows_with_ink = (pixels.min(axis=(1, 2)) < 0.4).mean()
    assert rows_with_ink > 0.3  # text and figures from top to bottom, not a blank page
    paper = tmp_path / "page.pdf"
    browse(page, tmp_path / "profile", f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
    assert paper.read_bytes().count(b"/Type /Page\n") >= 3
