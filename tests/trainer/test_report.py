"""`churn-train report`: what is read, measured, compared, and shown, on small real runs."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from churn_trainer import cli, report
from churn_trainer.config import Data, Model, Variant
from churn_trainer.found import STUDY
from churn_trainer.paper import printed, printed_numbers
from churn_trainer.run_folder import RunFolder
from churn_trainer.tables import heading
from small_study import (
    Page,
    copied,
    first_split,
    independent,
    rows_of,
    small_run,
    small_study,
    table,
)
from typer.testing import CliRunner

from churn_kernels._printable import excerpt
from churn_kernels.intervals import Estimate, jackknife_interval, leave_one_run_out, run_mean
from churn_kernels.metrics import churn_report

# What is measured ---------------------------------------------------------------------------------


def test_all_tables_and_figures_are_made(made):
    tables = ["methods", "weight-decay", "ensembles", "sources", "calibration"]
    assert [one.kind for one in made.tables] == tables
    figures = {"changes", "confidence", "weights", "pairs", "curves", "examples"}
    assert {one.kind for one in made.figures} == figures
    assert figures <= {one.name for one in made.figures}
    assert made.missing == []
    assert not made.left_out


def test_numbers_are_those_of_the_logits(trained, made):
    def logits(number, split):
        one = RunFolder(trained / independent("skl", number, split).id)
        return one.logits()

    outcome = next(
        one
        for one in made.outcomes
        if one.method == small_run("skl").method and one.setting.optimisation.weight_decay == 0
    )
    means = []
    for split in (0, 1):
        pairs = [logits(number, split) for number in range(3)]
        expected = churn_report([one[0] for one in pairs], pairs[0][1])
        means.append(run_mean(expected.churn))
    assert outcome.estimate("churn", 0.95).mean == pytest.approx(sum(means) / 2)
    assert outcome.runs == 6
    row = next(row for row in table(made, "methods").rows if row.heads[1] == "SKL co-distillation")
    assert row.cells[1].estimate == outcome.estimate("churn", 0.95)
    assert row.heads[2] == "2x"


def test_one_split_has_the_jackknife_over_its_runs(trained, tmp_path):
    root = copied(
        trained, tmp_path, lambda run: first_split(run) and run.method.name == "2-ensemble"
    )
    (outcome,) = report.make_report(root).outcomes
    churn = next(iter(outcome.splits.values())).report.churn
    expected = jackknife_interval(run_mean(churn), leave_one_run_out(churn))
    assert outcome.estimate("churn", 0.95) == expected
    assert expected.low < expected.mean < expected.high


def test_pairs_are_sorted_by_the_seeds_they_share(made):
    rows = {row.heads[3]: row.cells for row in table(made, "sources").rows}
    assert list(rows) == ["nothing", "initialisation", "everything"]
    assert rows["everything"][1].estimate[:3] == (0, 0, 0)
    assert rows["nothing"][1].estimate.mean > rows["initialisation"][1].estimate.mean > 0


def test_a_seed_that_draws_nothing_tells_no_runs_apart():
    assert small_run().sources == ("initialisation", "order")
    assert small_run(data=Data(flip=True), model=Model(dropout=0.5)).sources == (
        *("initialisation", "order", "augmentation", "dropout"),
    )


def test_every_run_s_seed_counts_once(made):
    outcome = next(one for one in made.outcomes if one.method.name == "baseline")
    split = next(split for split in outcome.splits.values() if len(split.runs) > 3)
    assert len(split.runs) == 7
    (chosen,) = split.clusters()
    orders = [split.runs[place].seeds.order for place in chosen]
    assert len(orders) == len(set(orders)) == 3
    shared = split.clusters(("initialisation",))
    assert sorted(map(len, shared)) == [1, 1, 3]


def test_methods_are_compared_over_the_seeds_both_have(trained, tmp_path):
    def keep(run):
        if run.method.name == "baseline":
            return first_split(run) and run.seeds.order in (0, 1, 2)
        return run.method.name == "2-ensemble" and first_split(run) and run.seeds.order in (1, 2)

    made = report.make_report(copied(trained, tmp_path, keep))
    (comparison,) = made.comparisons
    assert comparison.pairs == 2
    assert comparison.p_value in (0.5, 1.0)  # 2^2 ways to swap, two-sided
    ensemble, baseline = (
        RunFolder(trained / independent(method, 1).id).logits()[0]
        for method in ("2-ensemble", "baseline")
    )
    other, plain = (
        RunFolder(trained / independent(method, 2).id).logits()[0]
        for method in ("2-ensemble", "baseline")
    )
    change = (ensemble.argmax(1) != other.argmax(1)).double().mean()
    change -= (baseline.argmax(1) != plain.argmax(1)).double().mean()
    assert comparison.change["churn"].mean == pytest.approx(float(change))
    assert math.isnan(comparison.change["churn"].low)
    (verdict,) = report.verdicts(made)
    assert verdict.endswith("2 pairs of runs are too few for an interval.")


@pytest.mark.parametrize(
    ("low", "high", "p", "says"),
    [
        (-0.02, -0.01, 0.01, "x lowers churn by 1.50 ± 0.50 points (p 0.010)."),
        (0.01, 0.02, 0.01, "x raises churn by 1.50 ± 0.50 points (p 0.010)."),
        (-0.01, 0.02, 0.4, "x shows no change of churn (+0.50 ± 1.50 points, p 0.400)."),
        (-0.02, -0.01, 0.2, "(p 0.200, which the corrected test does not confirm)."),
    ],
)
def test_a_verdict_says_what_interval_and_test_allow(made, low, high, p, says):
    first = made.comparisons[0]
    change = {"churn": first.change["churn"]._replace(mean=(low + high) / 2, low=low, high=high)}
    changed = replace(made, comparisons=[replace(first, change=change, p_holm=p)])
    verdict, same_seeds = report.verdicts(changed)
    assert "baseline with every seed the same, on cpu: churn 0.00 %, 3 of 3 pairs" in same_seeds
    assert verdict.replace(first.outcome.label, "x").endswith(says)


def changed(made, *changes, p=0.01):
    """The report with these changes of churn and accuracy in place of what its runs came to."""
    spread = {"churn": 0.002, "accuracy": 0.001}
    comparisons = [
        replace(
            one,
            change={
                metric: Estimate(mean, mean - spread[metric], mean + spread[metric], 0.0)
                for metric, mean in zip(("churn", "accuracy"), change, strict=True)
            },
            p_holm=p,
        )
        for one, change in zip(made.comparisons, changes, strict=True)
    ]
    return replace(made, comparisons=comparisons)


def test_the_first_line_says_what_helped_and_what_it_costs(made):
    names = [one.outcome.label for one in made.comparisons]
    assert names == ["SKL co-distillation, beta 1.0", "SKL co-distillation", "ensemble of 2"]

    def churn(one):
        return f"{100 * one.estimate('churn', made.level).mean:.2f} %"

    base, ensemble = made.comparisons[0].baseline, made.comparisons[2].outcome
    helped, cost, *others = report.headlines(
        changed(made, (-0.004, 0.01), (0.01, 0.0), (-0.009, -0.002))
    )
    assert helped == (
        f"digits, mlp, weight_decay 0.0: Churn falls from {churn(base)} to {churn(ensemble)} with "
        "ensemble of 2 (\N{MINUS SIGN}0.90 ± 0.20 points), at twice the training and 2 times the "
        "prediction."
    )
    assert cost.endswith("Accuracy changes by \N{MINUS SIGN}0.20 ± 0.10 points with it.")
    assert others == []
    first = made.comparisons[0].outcome
    single = replace(first, method=replace(first.method, name="entropy", members=1, beta=0.0))
    cheap = changed(made, (-0.004, 0.01), (0.01, 0.0), (-0.009, -0.002))
    comparisons = [replace(cheap.comparisons[0], outcome=single), *cheap.comparisons[1:]]
    said = report.headlines(replace(cheap, comparisons=comparisons))[1]
    label = single.label
    assert said.endswith(
        f"At no more training, {label} changes churn by \N{MINUS SIGN}0.40 ± 0.20 points."
    )


@pytest.mark.parametrize(
    ("changes", "p", "says"),
    [
        ([(0.001, 0.0), (0.01, 0.0), (-0.001, 0.0)], 0.01, "none of 3 methods is shown to help."),
        (
            [(-0.01, 0.0)] * 3,
            0.2,
            "none of 3 methods is shown to help.",
        ),  # no corrected test confirms it
        ([(math.nan, 0.0)] * 3, 0.2, "there are too few runs to tell whether a method helps."),
    ],
)
def test_the_first_line_says_that_nothing_helped(made, changes, p, says):
    (headline,) = report.headlines(changed(made, *changes, p=p))
    assert re.search(r"Churn is \d+\.\d\d ± \d+\.\d\d % with the baseline; ", headline)
    assert headline.endswith(says)


def test_figures_have_their_axes_named(made):
    """In both sizes; the matrices' split, too."""
    for drawing in made.figures:
        for page in (drawing.page, drawing.narrow):
            texts = re.findall(r"<text[^>]*>([^<]*)</text>", page)
            for words in {
                "pairs": ["run", "churn between two runs, %"],
                "confidence": ["confidence: largest minus second probability"],
                "curves": ["epoch"],
                "changes": ["change of churn, percentage points"],
            }.get(drawing.kind, []):
                assert words in texts, (drawing.name, words)
    pairs = next(one for one in made.figures if one.name == "pairs")
    assert "the runs of split seed 0, in the order of runs.csv" in pairs.caption
    confidence = next(one for one in made.figures if one.name == "confidence")
    assert "change of churn, points" in confidence.page  # paired, around the baseline at (0, 0)


def test_text_of_figures_is_legible_on_a_phone(made):
    """A narrow figure is at least as wide as a phone shows it: 338 of its 390 pixels."""
    for drawing in made.figures:
        (width,) = (
            float(size)
            for size in re.findall(r'<svg [^>]*viewBox="0 0 ([\d.]+) [\d.]+"', drawing.narrow)
        )
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", drawing.narrow)]
        assert min(sizes) * 338 / width >= 10, drawing.name


def test_matrices_of_methods_without_a_common_split_name_each(trained, tmp_path):
    def keep(run):
        wanted = 1 if run.method.name == "2-ensemble" else 0
        return run.method.name in ("baseline", "2-ensemble") and run.seeds.split == wanted

    made = report.make_report(copied(trained, tmp_path, keep))
    pairs = next(one for one in made.figures if one.kind == "pairs")
    assert "split seed 0" in pairs.page
    assert "split seed 1" in pairs.page
    assert "the runs of the split that its title names" in pairs.caption


def test_a_large_schurn_is_no_percentage(made):
    for shown in (table(made, "methods"), table(made, "sources"), table(made, "ensembles")):
        assert "SChurn is no share of rows and can exceed 100." in shown.caption
        assert "SChurn \N{MULTIPLICATION SIGN} 100" in map(heading, shown.columns)
        assert {"accuracy, %", "churn, %"} < set(map(heading, shown.columns))


def test_a_study_s_names_are_the_report_s(trained, tmp_path):
    """Also where the runs are reported by their folder alone."""
    root = copied(
        trained, tmp_path, lambda run: first_split(run) and run.method.name in ("skl", "baseline")
    )
    study = small_study(
        methods=(
            "baseline",
            Variant(small_run("skl").method, name="pulled\x1b[2J"),
            Variant(small_run("skl").method, name="pulled, same order", fixed=("order",)),
        )
    )
    (root / STUDY).write_text(json.dumps(study.to_mapping()))
    made = report.make_report(root)
    labels = {row.heads[1] for row in table(made, "methods").rows}
    named = "pulled\N{REPLACEMENT CHARACTER}[2J"
    assert labels == {"baseline", named, "SKL co-distillation, beta 1.0"}
    assert any(named in sentence for sentence in report.verdicts(made))
    page = report.write_report(root, tmp_path / "out").read_text(encoding="utf-8")
    assert f"<dt>{named}</dt>\n    <dd>SKL co-distillation; Bhojanapalli et al." in page
    (root / STUDY).write_text("{")  # its runs are reported all the same
    (other, *_) = report.make_report(root).outcomes
    assert other.name == ""


# What the runs do not allow -----------------------------------------------------------------------


def test_one_run_makes_a_report_that_says_what_is_missing(trained, tmp_path):
    root = copied(trained, tmp_path, lambda run: run == independent("baseline", 1, 1))
    made = report.make_report(root / independent("baseline", 1, 1).id)
    assert [one.kind for one in made.tables] == ["calibration"]
    assert [one.name for one in made.figures] == ["curves"]
    assert [sentence.split(" need")[0] for sentence in made.missing] == [
        *("Accuracy and churn of every method", "Weight decay", "Ensembles and their cost"),
        *("Sources of churn", "Confidence and error, churn between every two runs, and examples"),
        "Weights of regulariser and co-distillation",
    ]
    assert report.verdicts(made) == []
    (headline,) = report.headlines(made)
    assert headline.startswith("Churn needs two trainings: there is no second one")
    page = report.write_report(root, tmp_path / "out").read_text(encoding="utf-8")
    assert "No method can be compared with a baseline." in page
    assert Page(page).open == []


def test_runs_of_different_splits_are_no_pair(trained, tmp_path):
    wanted = [independent("baseline", 0, 0), independent("baseline", 1, 1)]
    made = report.make_report(copied(trained, tmp_path, wanted.__contains__))
    (outcome,) = made.outcomes
    assert len(outcome.splits) == 2
    assert not outcome.has_pair()
    assert any(sentence.startswith("Accuracy and churn") for sentence in made.missing)


def test_without_a_baseline_nothing_is_compared(trained, tmp_path):
    root = copied(trained, tmp_path, lambda run: first_split(run) and run.method.name == "skl")
    made = report.make_report(root)
    assert made.comparisons == []
    assert made.missing[0] == (
        "digits, mlp: nothing is compared, there is no baseline; "
        "train --method baseline with the same seeds."
    )
    assert "changes" not in {one.name for one in made.figures}
    (headline,) = report.headlines(made)
    assert headline.startswith("Two trainings of the SKL co-distillation, beta 1.0 disagree on ")


def test_a_method_without_the_baseline_s_seeds_is_named(trained, tmp_path):
    def keep(run):
        wanted = 1 if run.method.name == "2-ensemble" else 0
        return run.method.name in ("baseline", "2-ensemble") and run.seeds.split == wanted

    made = report.make_report(copied(trained, tmp_path, keep))
    assert any("ensemble of 2 is not compared, no two of its runs" in one for one in made.missing)


# Damaged and hostile folders ----------------------------------------------------------------------


def damage_logits(path, logits, labels):
    np.savez(path / "logits.npz", logits=logits, labels=labels)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").write_text("{"), "must hold JSON, got: "),
        (lambda path: (path / "config.json").unlink(), "the settings file must exist, got "),
        (
            lambda path: (path / "config.json").write_text('{"method": {"name": "sk"}}'),
            "method must be one of baseline",
        ),
        (lambda path: (path / "metrics.json").write_text("[]"), "must hold the metrics of a run"),
        (lambda path: (path / "logits.npz").unlink(), "must hold the arrays logits and labels"),
        (lambda path: (path / "logits.npz").write_bytes(b"PK"), "must hold the arrays logits"),
        (
            lambda path: damage_logits(path, np.zeros((3, 2, 2)), np.zeros(3, np.int64)),
            "must be finite (N, C) floats and the labels (N,) int64 in [0, C), got (3, 2, 2)",
        ),
        (
            lambda path: damage_logits(path, np.full((3, 2), np.nan), np.zeros(3, np.int64)),
            "got a row whose largest is not finite; delete the folder and train again",
        ),
        (
            lambda path: damage_logits(path, np.zeros((3, 2)), np.full(3, 7)),
            "got labels from 7 to 7 of 2 classes",
        ),
        (
            lambda path: (path / "metrics.json").write_text(
                '{"status": "diverged", "message": "its loss is not finite"}'
            ),
            "diverged: its loss is not finite; it is in no table",
        ),
        (lambda path: (path / "metrics.json").unlink(), "has not ended; train it to its end"),
    ],
)
def test_a_damaged_folder_is_named_and_the_others_are_reported(trained, tmp_path, damage, message):
    root = copied(
        trained, tmp_path, lambda run: first_split(run) and run.method.name == "2-ensemble"
    )
    damage(root / independent("2-ensemble", 2).id)
    made = report.make_report(root)
    assert [one.runs for one in made.outcomes] == [2]
    (sentence,) = made.left_out
    assert message in sentence


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a run folder; pass the --out folder"):
        report.make_report(tmp_path / "nowhere")
    with pytest.raises(
        ValueError,
        match=r"a run that finished, got .* with 0 not ended, 0 diverged, 0 damaged; train",
    ):
        report.make_report(tmp_path)


def test_unreadable_logits_alone_are_an_error(trained, tmp_path):
    wanted = independent("baseline", 0)
    root = copied(trained, tmp_path, lambda run: run == wanted)
    (root / wanted.id / "logits.npz").unlink()
    with pytest.raises(ValueError, match=r"folder must hold a run whose logits can be read, got"):
        report.make_report(root)


def test_the_level_is_checked(trained):
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95; 0.95 is customary"):
        report.make_report(trained, level=95)


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y>$\\frac{$\x1b[31m\n[red]x[/]"


def test_hostile_names_are_text_everywhere(trained, tmp_path):
    root = copied(
        trained, tmp_path, lambda run: first_split(run) and run.method.name == "2-ensemble"
    )
    for path in root.glob("*/config.json"):
        settings = json.loads(path.read_text())
        settings["data"]["name"] = HOSTILE
        settings["model"]["name"] = HOSTILE
        settings["model"]["options"] = {HOSTILE: HOSTILE}
        path.write_text(json.dumps(settings))
    done = CliRunner().invoke(cli.app, ["report", str(root), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    for path in tmp_path.glob("out/*.html"):
        text = path.read_text(encoding="utf-8")
        tags = Page(text).tags
        assert not {"script", "img", "iframe", "red"} & set(tags)
        assert "&lt;script&gt;" in text
        assert "\x1b" not in text
    for path in tmp_path.glob("out/*.svg"):
        assert "<script" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("rows", [1, 70])
def test_pictures_are_left_out_where_settings_and_labels_disagree(trained, tmp_path, rows):
    root = copied(trained, tmp_path, lambda run: first_split(run) and run.method.name == "skl")
    for path in root.glob("*/config.json"):
        settings = json.loads(path.read_text())
        settings["data"]["train_rows"] = rows
        path.write_text(json.dumps(settings))
    made = report.make_report(root)
    assert "examples" in {one.name for one in made.figures}


def test_an_excerpt_is_one_short_line():
    assert excerpt("a\x1b\n\u202eb") == "a" + 3 * "\N{REPLACEMENT CHARACTER}" + "b"
    assert excerpt("abcdef", 4) == "abc\N{HORIZONTAL ELLIPSIS}"


# The paper's numbers ------------------------------------------------------------------------------


def test_the_paper_s_churn_is_that_of_its_slices():
    """acc CC + err CI = churn, within rounding; a misread digit would not fit."""
    keys = {key[:4] for key in printed_numbers() if key[0] in ("2", "6")}
    assert len(keys) == 5 * 7 + 3 * 6
    for table_number, *where in keys:
        accuracy, churn, correct, incorrect = (
            printed(int(table_number), *where, metric).mean
            for metric in ("accuracy", "churn", "churn_correct", "churn_incorrect")
        )
        assert (accuracy * correct + (100 - accuracy) * incorrect) / 100 == pytest.approx(
            churn, abs=0.12
        )


def test_tables_of_the_paper_agree_with_each_other():
    for (number, *where), value in printed_numbers().items():
        if number in ("3", "6") and where[-1] in ("", "1e-4"):
            elsewhere = printed(2, *where[:4])
            assert elsewhere in (None, value)
    assert printed(1, "cifar10", "resnet32", "baseline", "churn", "cuda: everything").mean == 3.7
    assert printed(4, "imagenet", "resnet-v2-50", "ce", "ece").mean == 11.97
    assert printed(2, "digits", "mlp", "baseline", "churn") is None


def test_the_paper_s_numbers_stand_beside_runs_of_its_data_and_network(trained, tmp_path):
    root = copied(trained, tmp_path, lambda run: first_split(run) and run.method.name == "baseline")
    for path in root.glob("*/config.json"):
        settings = json.loads(path.read_text())
        settings["data"]["name"], settings["model"]["name"] = "cifar10", "resnet56"
        path.write_text(json.dumps(settings))
    made = report.make_report(root)
    (row,) = table(made, "methods").rows
    assert row.cells[1].printed == (5.72, 0.18)
    assert table(made, "methods").has_printed
    page = report.save_report(made, tmp_path / "out").read_text(encoding="utf-8")
    assert "paper 5.72 ± 0.18" in page
    assert "in italics\nare its numbers, as printed, for the same data set and network" in page
    cells = [
        one for one in rows_of(tmp_path / "out" / "table-methods.csv") if one["column"] == "churn"
    ]
    assert cells[0]["paper_mean"] == "5.72"
