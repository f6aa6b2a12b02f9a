"""A study, end to end on a small one: what it trains, and what its report compares."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from churn_trainer.config import Data, Study, Variant
from churn_trainer.found import NothingFinished
from churn_trainer.methods import METHODS as METHOD_TABLE
from churn_trainer.report import make_report, verdicts
from churn_trainer.run_folder import RunFolder
from churn_trainer.study import STUDY, report_study
from small_study import SEVEN, local_study, small_study, table

from churn_kernels.intervals import run_mean


def method_of(report, name):
    return next(one for one in report.outcomes if one.method.name == name)


def predictions_of(report, name="baseline"):
    return torch.cat([one.predictions for one in method_of(report, name).splits.values()])


def test_every_method_is_measured_and_compared_with_the_first(result):
    assert {one.method.name for one in result.outcomes} == set(SEVEN)
    assert {one.outcome.method.name for one in result.comparisons} == set(SEVEN) - {"baseline"}
    assert not result.left_out
    for one in result.outcomes:
        assert [split.predictions.shape for split in one.splits.values()] == [(2, 1797 - 60)] * 2
    baseline, entropy = (
        method_of(result, name).estimate("churn", 0.95) for name in ("baseline", "entropy")
    )
    first = next(one for one in result.comparisons if one.outcome.method.name == "entropy")
    assert first.change["churn"].mean == pytest.approx(entropy.mean - baseline.mean)
    assert all(0 < one.p_value <= one.p_holm <= 1 for one in result.comparisons)
    assert len(table(result, "methods").rows) == len(SEVEN)


def test_numbers_do_not_depend_on_workers_or_on_the_other_methods(result, tmp_path):
    again = local_study(small_study(methods=("baseline", "skl")), tmp_path, workers=1)
    for name in ("baseline", "skl"):
        assert torch.equal(predictions_of(again, name), predictions_of(result, name))
        first = method_of(result, name).estimate("churn", 0.95)
        assert method_of(again, name).estimate("churn", 0.95) == first
        curves = [
            next(one for one in report.curves if one.outcome.method.name == name)
            for report in (again, result)
        ]
        for column in ("epoch", "cross_entropy", "accuracy", "confidence", "churn"):
            assert torch.equal(getattr(curves[0], column), getattr(curves[1], column))


def test_the_study_lies_beside_its_runs_and_is_reported_from_them(tmp_path):
    study = small_study(methods=("baseline",), title="What for?")
    trained = local_study(study, tmp_path)
    assert Study.load(tmp_path / STUDY) == study
    read = report_study(Study.load(tmp_path / STUDY), tmp_path)
    assert read.title == "What for?"
    assert torch.equal(predictions_of(read), predictions_of(trained))
    splits = method_of(read, "baseline").splits
    for part in study.runs_of(study.methods[0]):
        split = splits[next(key for key in splits if key[0] == part[0].seeds.split)]
        for run in part:
            logits, _ = RunFolder(tmp_path / run.id).logits()
            assert torch.equal(logits.argmax(dim=-1), split.predictions[split.runs.index(run)])


def test_the_names_of_an_earlier_study_in_the_folder_stay(tmp_path):
    own = [Variant(METHOD_TABLE[name], name=f"my {name}") for name in ("skl", "l1")]
    study = small_study(methods=("baseline", *own), splits=1)
    part = replace(study, methods=study.methods[:2])
    longer = replace(part, optimisation=replace(part.optimisation, epochs=4))
    for one in (study, part, longer, part):
        local_study(one, tmp_path)
    assert Study.load(tmp_path / STUDY) == part
    labels = {one.label for one in make_report(tmp_path).outcomes}
    assert labels == {"baseline", "my skl", "my l1"}
    assert len(list(tmp_path.glob("study-*.json"))) == 3


def test_one_run_s_folder_is_reported_by_the_study_s_name(tmp_path, monkeypatch):
    own = Variant(METHOD_TABLE["skl"], name="mine")
    study = small_study(methods=("baseline", own), splits=1)
    local_study(study, tmp_path)
    folder = tmp_path / study.run(own, 0, 0).id
    monkeypatch.chdir(folder)
    for source in (folder, [folder], [RunFolder(folder)], Path()):
        assert [one.label for one in make_report(source).outcomes] == ["mine"]


def test_curves_are_those_of_the_runs_at_each_epoch(result, tmp_path):
    for one in result.curves:
        assert one.epoch.tolist() == [1, 2, 3]
        for metric in ("accuracy", "churn", "confidence"):
            last = one.outcome.estimate(metric, 0.95).mean
            assert float(getattr(one, metric)[-1]) == pytest.approx(last)
    study = small_study(methods=("baseline",), runs=3, splits=1, curve_points=2)
    (whole,) = local_study(study, tmp_path / "whole").curves
    shorter = replace(study, optimisation=replace(study.optimisation, epochs=2))
    (short,) = local_study(shorter, tmp_path / "short").outcomes
    assert whole.epoch.tolist() == [2, 3]
    churn = run_mean(next(iter(short.splits.values())).report.churn)
    assert float(whole.churn[0]) == pytest.approx(churn)


def test_another_seed_gives_other_numbers(result, tmp_path):
    other = local_study(small_study(seed=1, methods=("baseline",)), tmp_path)
    assert not torch.equal(predictions_of(other), predictions_of(result))


def test_an_unknown_data_set_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"data.name must be one of digits, .* got 'imagenette'"):
        local_study(small_study(data=Data(name="imagenette")), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STUDY]


def test_a_distilled_method_learns_from_its_own_teachers(result, tmp_path):
    report = local_study(small_study(methods=("baseline", "self-distillation")), tmp_path)
    assert torch.equal(predictions_of(report), predictions_of(result))
    assert not torch.equal(predictions_of(report, "self-distillation"), predictions_of(result))


def test_the_teachers_of_two_are_the_ensemble_of_two():
    study = small_study(methods=("baseline", "2-ensemble", "2-distillation"))
    _, ensemble, students = (study.runs_of(variant)[0] for variant in study.methods)
    assert [run.teacher() for run in students] == ensemble


def test_variants_of_other_settings_are_compared_with_the_first_too(tmp_path):
    decayed = {"optimisation": {"weight_decay": 0.01}}
    study = small_study(
        methods=("baseline", Variant(METHOD_TABLE["baseline"], name="decayed", changes=decayed))
    )
    report = local_study(study, tmp_path)
    (comparison,) = report.comparisons
    assert comparison.outcome.setting.optimisation.weight_decay == 0.01
    assert verdicts(report)[0].startswith("digits, mlp, weight_decay 0.01: decayed ")
    assert len(table(report, "weight-decay").rows) == 2


WILD = {"optimisation": {"learning_rate": 1e30, "clip_norm": 0.0}}


def test_a_method_that_diverges_is_named_beside_the_others(tmp_path):
    wild = Variant(METHOD_TABLE["l1"], name="wild", changes=WILD)
    report = local_study(small_study(methods=("baseline", wild, "entropy")), tmp_path)
    assert [one.method.name for one in report.outcomes] == ["baseline", "entropy"]
    assert len(report.left_out) == 3
    message = "diverged: its loss or gradient is not finite, epoch 1; it is in no table"
    assert all(message in sentence for sentence in report.left_out)
    assert report.left_out[-1].endswith("; and 1 more like it")


def test_without_a_finished_first_method_nothing_is_compared(tmp_path):
    wild = Variant(METHOD_TABLE["baseline"], changes=WILD)
    report = local_study(small_study(methods=(wild, "entropy")), tmp_path)
    assert report.comparisons == []
    assert "cpu: nothing is compared, there is no baseline" in report.missing[0]


def test_a_study_that_was_not_trained_has_nothing_to_report(tmp_path):
    with pytest.raises(NothingFinished, match=r"got .*, \.\.\. with 28 not ended, 0 diverged"):
        report_study(small_study(), tmp_path)


def test_runs_that_measured_no_epoch_in_common_have_no_curves(tmp_path):
    study = small_study(methods=("baseline",))
    local_study(study, tmp_path)
    path = tmp_path / study.all_runs()[0].id / "curves.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, "7" + rows[-1][1:]]))
    report = report_study(study, tmp_path)
    assert report.curves == []
    assert any("have no measured epoch in common; train them" in one for one in report.missing)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch,x\n1,?\n", r"curves.csv must hold what the run .* got: 'test_accuracy'; delete"),
        ("epoch,train_cross_entropy,test_accuracy,test_confidence\n", "no finite numbers"),
        (
            "epoch,train_cross_entropy,test_accuracy,test_confidence\n0,1,1,1\n",
            "got: epochs from 0 to 0",
        ),
        (
            "epoch,train_cross_entropy,test_accuracy,test_confidence\n3,nan,1,1\n",
            "no finite numbers",
        ),
    ],
)
def test_broken_curves_are_named_and_the_rest_is_reported(content, message, tmp_path):
    study = small_study(methods=("baseline",))
    local_study(study, tmp_path)
    (tmp_path / study.all_runs()[0].id / "curves.csv").write_text(content)
    report = report_study(study, tmp_path)
    assert report.curves == []
    assert not report.left_out
    assert re.search(message, report.missing[0])
    assert table(report, "methods").rows
