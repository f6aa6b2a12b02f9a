"""The study, its report and its files, end to end on a small one."""

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from churn_trainer import output
from churn_trainer import study_report as report
from churn_trainer.config import Data, Study, Variant
from churn_trainer.methods import METHODS as METHOD_TABLE
from churn_trainer.output import MARKER, check_replaceable, replaced
from churn_trainer.run_folder import RunFolder
from churn_trainer.study import METRICS, STUDY, NothingToCompare, read_study
from rich.console import Console
from small_study import SEVEN, local_study, small_study

from churn_kernels.intervals import Estimate, run_mean

FILES = {
    *("report.html", "settings.csv", "summary.csv", "splits.csv"),
    *("runs.csv", "pairs.csv", "curves.csv"),
}


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def folder(result, tmp_path_factory):
    target = tmp_path_factory.mktemp("report") / "nested" / "digits"
    assert report.write_report(result, target, "churn-train study digits") == target / "report.html"
    return target


# The study ----------------------------------------------------------------------------------------


def test_every_method_is_measured_and_compared_with_the_first(result):
    assert [entry.method.name for entry in result.results] == list(SEVEN)
    assert [entry.method.name for entry in result.comparisons] == list(SEVEN)[1:]
    assert result.test_rows == 1797 - 60
    assert not result.diverged
    for entry in result.results:
        assert entry.predictions.shape == (2, 2, result.test_rows)
        assert len(entry.reports) == 2
        assert entry.reports[0].churn.shape == (2, 2)
        assert float(entry.histogram.sum()) == pytest.approx(1)
        assert entry.curves.epoch == [1, 2, 3]
        for name in ("accuracy", "churn", "confidence"):
            assert getattr(entry.curves, name)[-1] == pytest.approx(entry.summary[name].mean)
        assert entry.seconds > 0
    baseline, entropy = result.results[:2]
    change = result.comparisons[0].change["churn"].mean
    assert change == pytest.approx(entropy.summary["churn"].mean - baseline.summary["churn"].mean)
    assert all(0 < entry.p_value <= entry.p_holm <= 1 for entry in result.comparisons)


def test_numbers_do_not_depend_on_workers_or_on_the_other_methods(result, tmp_path):
    again = local_study(small_study(methods=("baseline", "skl")), tmp_path, workers=1)
    for entry in again.results:
        first = next(other for other in result.results if other.method == entry.method)
        assert torch.equal(entry.predictions, first.predictions)
        assert entry.summary == first.summary
        assert entry.curves == first.curves
    assert torch.equal(again.results[0].histogram, result.results[0].histogram)


def test_the_study_lies_beside_its_runs_and_is_read_from_them(tmp_path):
    study = small_study(methods=("baseline",))
    trained = local_study(study, tmp_path)
    assert Study.load(tmp_path / STUDY) == study
    read = read_study(Study.load(tmp_path / STUDY), tmp_path)
    assert torch.equal(read.results[0].predictions, trained.results[0].predictions)
    assert read.results[0].summary == trained.results[0].summary
    predictions = trained.results[0].predictions
    for split, runs in enumerate(study.runs_of(study.methods[0])):
        for place, run in enumerate(runs):
            logits, _ = RunFolder(tmp_path / run.id).logits()
            assert torch.equal(logits.argmax(dim=-1), predictions[split, place])


def test_curves_of_churn_are_those_of_the_runs_at_each_epoch(tmp_path):
    study = small_study(methods=("baseline",), runs=3, splits=1, curve_points=2)
    (whole,) = local_study(study, tmp_path / "whole").results
    shorter = replace(study, optimisation=replace(study.optimisation, epochs=2))
    (short,) = local_study(shorter, tmp_path / "short").results
    assert whole.curves.epoch == [2, 3]
    assert whole.curves.churn[0] == pytest.approx(short.summary["churn"].mean)


def test_another_seed_gives_other_numbers(result, tmp_path):
    other = local_study(small_study(seed=1, methods=("baseline",)), tmp_path)
    assert not torch.equal(other.results[0].predictions, result.results[0].predictions)


def test_an_unknown_data_set_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"data.name must be one of digits, .* got 'mnist'"):
        local_study(small_study(data=Data(name="mnist")), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STUDY]


def test_a_distilled_method_learns_from_its_own_teachers(result, tmp_path):
    outcome = local_study(small_study(methods=("baseline", "self-distillation")), tmp_path)
    assert [entry.method.name for entry in outcome.results] == ["baseline", "self-distillation"]
    baseline = result.results[0]
    assert torch.equal(outcome.results[0].predictions, baseline.predictions)
    assert not torch.equal(outcome.results[1].predictions, baseline.predictions)


WILD = {"optimisation": {"learning_rate": 1e30, "clip_norm": 0.0}}


def test_a_method_that_diverges_is_reported_beside_the_others(tmp_path):
    wild = Variant(METHOD_TABLE["l1"], name="wild", changes=WILD)
    outcome = local_study(small_study(methods=("baseline", wild, "entropy")), tmp_path)
    assert [entry.method.name for entry in outcome.results] == ["baseline", "entropy"]
    said = report.verdicts(outcome)[-1]
    assert said.startswith(
        "L1 co-distillation, learning_rate 1e+30, clip_norm 0.0: 4 of 4 runs did"
    )
    assert "diverged: its loss or gradient is not finite, epoch 1; it is not in the table." in said


def test_a_baseline_that_diverges_ends_the_study(tmp_path):
    wild = Variant(METHOD_TABLE["baseline"], changes=WILD)
    with pytest.raises(
        NothingToCompare, match=r"4 of 4 runs did not .* is nothing to compare with"
    ):
        local_study(small_study(methods=(wild, "entropy")), tmp_path)


def test_a_study_that_was_not_trained_has_nothing_to_compare(tmp_path):
    with pytest.raises(NothingToCompare, match=r"the first digits-mlp-.* it was not trained"):
        read_study(small_study(), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("curves.csv", r"curves.csv must hold a run's curves, got: .* and train again"),
        ("logits.npz", r"logits.npz must hold the arrays logits and labels, got: .* train again"),
    ],
)
def test_a_broken_run_s_folder_is_named(name, message, tmp_path):
    study = small_study(methods=("baseline",))
    local_study(study, tmp_path)
    (tmp_path / study.all_runs()[0].id / name).write_text("epoch,x\n?,?\n")
    with pytest.raises(ValueError, match=message):
        read_study(study, tmp_path)


# Files --------------------------------------------------------------------------------------------


def test_report_folder_holds_exactly_its_files(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_csv_files_hold_the_numbers(folder, result):
    summary = rows_of(folder / "summary.csv")
    assert len(summary) == len(SEVEN) * len(METRICS)
    skl = next(row for row in summary if (row["method"], row["metric"]) == ("skl", "churn"))
    entry = next(entry for entry in result.results if entry.method.name == "skl")
    comparison = next(entry for entry in result.comparisons if entry.method.name == "skl")
    assert float(skl["mean"]) == entry.summary["churn"].mean
    assert float(skl["change_low"]) == comparison.change["churn"].low
    assert float(skl["p_holm"]) == comparison.p_holm
    assert summary[0]["change"] == ""

    splits = rows_of(folder / "splits.csv")
    assert len(splits) == len(SEVEN) * 2
    assert float(splits[0]["churn"]) == run_mean(result.results[0].reports[0].churn)
    runs = rows_of(folder / "runs.csv")
    assert len(runs) == len(SEVEN) * 2 * 2
    assert float(runs[1]["accuracy"]) == float(result.results[0].reports[0].accuracy[1])
    pairs = rows_of(folder / "pairs.csv")
    assert len(pairs) == len(SEVEN) * 2 * 2
    assert (pairs[0]["run"], pairs[0]["other_run"]) == ("0", "1")
    assert float(pairs[0]["churn"]) == float(result.results[0].reports[0].churn[0, 1])
    curves = rows_of(folder / "curves.csv")
    assert [row["epoch"] for row in curves[:3]] == ["1", "2", "3"]


def test_settings_record_what_the_numbers_depend_on(folder):
    settings = {row["name"]: row["value"] for row in rows_of(folder / MARKER)}
    assert settings["command"] == "churn-train study digits"
    assert settings["seed"] == "0"
    assert settings["epochs"] == "3"
    assert settings["torch"] == torch.__version__
    assert {"churn-kernels", "backend", "reduction_mode", "learning_rate"} <= set(settings)


class Page(HTMLParser):
    VOID = frozenset({"meta", "link", "img", "br", "input", "hr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.references = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [v for name, v in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_self_contained_and_themed(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 4
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in text
    assert "url(http" not in text
    assert "prefers-color-scheme: dark" in text
    # No colour of a figure escapes the page's themes.
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--series-0)" in figures
    assert not re.findall(r"#(?!000000|ffffff)[0-9a-f]{6}\b", figures)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", text))


def test_page_and_table_show_every_method(folder, result):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for narrow in (False, True):
        console = Console(file=io.StringIO(), width=150 if not narrow else 100)
        console.print(report.terminal_table(result, narrow=narrow))
        table = console.file.getvalue()
        for entry in result.results:
            assert all(word in table for word in entry.method.label.split())
            assert entry.method.label in text
            assert f"{100 * entry.summary['churn'].mean:.2f}" in table
            assert f"{100 * entry.summary['churn'].mean:.2f}" in text


def test_one_split_and_one_method_make_a_report_too(tmp_path):
    outcome = local_study(small_study(methods=("baseline",), splits=1, runs=3), tmp_path / "runs")
    page = report.write_report(outcome, tmp_path / "report", "x").read_text(encoding="utf-8")
    assert Page(page).tags.count("svg") == 3
    assert "jackknife" in page
    assert report.verdicts(outcome) == []


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (-0.02, -0.01, "entropy 0.3 lowers churn by 1.50 ± 0.50 points."),
        (0.01, 0.02, "entropy 0.3 raises churn by 1.50 ± 0.50 points."),
        (-0.01, 0.02, "entropy 0.3 shows no change of churn (+0.50 ± 1.50)."),
        (-0.02, 0.01, "entropy 0.3 shows no change of churn (\N{MINUS SIGN}0.50 ± 1.50)."),
    ],
)
def test_a_verdict_says_what_the_interval_allows(result, low, high, says):
    change = {"churn": Estimate((low + high) / 2, low, high, 0.0)}
    comparison = replace(result.comparisons[0], change=change)
    assert report.verdicts(replace(result, comparisons=[comparison])) == [says]


# Nothing half-written -----------------------------------------------------------------------------


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_report_leaves_everything_as_it_was(
    result, tmp_path, monkeypatch, error, earlier
):
    target = tmp_path / "report"
    if earlier:
        report.write_report(result, target, "the earlier one")
    before = files_in(tmp_path)

    def interrupted(*_):
        assert len(list(tmp_path.rglob("pairs.csv"))) == 1 + earlier  # under way, out of sight
        raise error

    monkeypatch.setattr(report, "render_page", interrupted)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        report.write_report(result, target, "the later one")
    assert files_in(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"] * earlier


def test_an_earlier_report_is_replaced_whole(tmp_path):
    target = tmp_path / "report"
    for content in ("first", "second"):
        with replaced(target) as folder:
            (folder / MARKER).write_text(content)
            (folder / content).touch()
    assert {path.name for path in target.iterdir()} == {MARKER, "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_failed_swap_brings_the_earlier_report_back(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_exchange", lambda *_: False)  # as where there is no such call
    target = tmp_path / "report"
    with replaced(target) as folder:
        (folder / MARKER).write_text("first")
    rename = type(target).rename

    def fail_for_the_new(self, to):
        if to == target and (self / MARKER).read_text() == "second":
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no"), replaced(target) as folder:
        (folder / MARKER).write_text("second")
    assert files_in(tmp_path) == {f"report/{MARKER}": "first"}


def test_only_new_folders_and_reports_may_be_replaced(tmp_path, folder):
    check_replaceable(tmp_path / "a" / "b")
    check_replaceable(tmp_path)
    check_replaceable(folder)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"new folder or an earlier report, got .*, which holds"):
        check_replaceable(tmp_path)
    with pytest.raises(ValueError, match=r"out must be a folder, got the file .*thesis\.tex; name"):
        check_replaceable(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match=r"out must be where a folder can be made, got "):
        check_replaceable(tmp_path / "thesis.tex" / "report")
