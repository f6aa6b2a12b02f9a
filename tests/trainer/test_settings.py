"""Settings: what they refuse, what they are read from and written to, and what names them."""

import dataclasses
import datetime
import json
import math
import os
import tomllib

import pytest
from churn_trainer.config import (
    Data,
    Draw,
    Model,
    Optimisation,
    Run,
    Seeds,
    Study,
    Synthetic,
    Variant,
    measured_epochs,
)
from churn_trainer.methods import METHODS, Method
from churn_trainer.settings import derive_seed, from_mapping, read_settings, to_toml
from churn_trainer.train import Options
from small_study import small_run, small_study

# Seeds --------------------------------------------------------------------------------------------


def test_seeds_differ_by_what_and_where_and_follow_from_the_study_s():
    study = small_study()
    places = [(draw, *where) for draw in Draw for where in [(0,), (1,), (0, 1), (1, 0), (0, 0, 1)]]
    seeds = [study.seed_for(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [small_study(runs=5).seed_for(*place) for place in places]
    assert small_study(seed=1).seed_for(*places[0]) != seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_study_s_runs_share_the_split_and_differ_in_the_rest():
    study = small_study()
    one, other = (study.run(Variant(METHODS["skl"]), 1, run).seeds for run in (0, 1))
    assert one.split == other.split
    for name in ("initialisation", "order", "augmentation", "dropout"):
        assert getattr(one, name) != getattr(other, name)
    assert one == study.run(Variant(METHODS["baseline"]), 1, 0).seeds


def test_derived_seeds_are_the_same_in_every_version():
    assert derive_seed(0) == 7896617691693857887
    assert derive_seed(3, 1, 2) == 6428070614465573400


@pytest.mark.parametrize(
    ("epochs", "points", "wanted"),
    [(10, 5, (2, 4, 6, 8, 10)), (3, 20, (1, 2, 3)), (7, 1, (7,)), (5, 2, (2, 5))],
)
def test_measured_epochs_end_with_the_last(epochs, points, wanted):
    assert measured_epochs(epochs, points) == wanted


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small_study(runs=1), "runs must be at least 2, got 1; churn compares runs"),
        (lambda: small_study(splits=0), "splits must be at least 1, got 0; with one split"),
        (lambda: small_study(seed=-1), "seed must be at least 0, got -1; any whole number"),
        (lambda: small_study(curve_points=0), "curve_points must be at least 1, got 0; the last"),
        (lambda: small_study(level=1), r"level must be in \(0, 1\), got 1; 0.95 is customary"),
        (lambda: small_study(methods=()), r"methods must name each .* got \[\]; drop what is"),
        (lambda: small_study(methods=("skl", "skl")), r"got \['skl', 'skl'\]; drop what is there"),
        (lambda: Data(train_rows=-1), "data.train_rows must be at least 0, got -1; 0 is the"),
        (lambda: Model(hidden=(8, 0)), "hidden must be at least 1, got 0; list the widths"),
        (lambda: Model(dropout=1), r"dropout must be in \[0, 1\), got 1; 0 leaves out none"),
        (lambda: Optimisation(epochs=0), "epochs must be at least 1, got 0; one epoch is one pass"),
        (lambda: Optimisation(batch_rows=0), "batch_rows must be at least 1, got 0; 32 is the"),
        (lambda: Optimisation(learning_rate=0), "learning_rate must be a finite .* above 0, got 0"),
        (lambda: Optimisation(clip_norm=math.inf), "clip_norm must be a finite .* got inf; 0 lea"),
        (lambda: Optimisation(momentum=1), r"momentum must be in \[0, 1\), got 1; 0 is plain"),
        (lambda: Optimisation(weight_decay=-1), "weight_decay must be a finite .* got -1; 0 is no"),
        (lambda: Optimisation(schedule="steps"), "constant, step, cosine, got 'steps'; did you me"),
        (lambda: Optimisation(precision="16"), "precision must be one of 32-true, .* got '16'"),
        (lambda: Optimisation(reduction_mode="x"), "mode must be one of default, fast, .* got 'x'"),
        (lambda: Options(accelerator="gpu"), "accelerator must be one of cpu, cuda, auto, got 'gp"),
        (lambda: Options(devices=0), "devices must be at least 1, got 0; 1 trains in this process"),
        (lambda: Options(curve_points=0), "curve_points must be at least 1, got 0; the last point"),
        (lambda: Options(checkpoint_seconds=-1), "seconds must be a finite .* got -1; 0 saves aft"),
        (lambda: Optimisation(epochs=10**7), "epochs must be at most 1000000, got 10000000; one"),
        (lambda: Optimisation(accumulate=0), "accumulate must be at least 1, got 0; 1 takes a min"),
        (lambda: Optimisation(optimizer="adam"), "optimizer must be one of sgd, adamw, got 'adam'"),
        (lambda: Optimisation(beta1=1), r"beta1 must be in \[0, 1\), got 1; 0.9 is the default"),
        (
            lambda: Optimisation(beta2=-1),
            r"beta2 must be in \[0, 1\), got -1; 0.999 is the default",
        ),
        (
            lambda: Optimisation(epsilon=0),
            "epsilon must be a finite number above 0, got 0; 1e-8 is",
        ),
        (
            lambda: Optimisation(optimizer="adamw", momentum=0.5),
            "momentum must be left at 0.9 with adamw, got 0.5; it is a setting of sgd",
        ),
        (
            lambda: Optimisation(optimizer="adamw", nesterov=True),
            "nesterov must be left at False with adamw, got True; it is a setting of sgd",
        ),
        (
            lambda: Optimisation(amsgrad=True),
            "amsgrad must be left at False with sgd, got True; it is a setting of adamw",
        ),
        (
            lambda: Optimisation(best="loss"),
            "best must be one of cross_entropy, accuracy, last, go",
        ),
        (
            lambda: Optimisation(epochs=5, go_on_from=(3, 5)),
            r"go_on_from must rise from 1 and stay below epochs = 5, got \[3, 5\]; raise epochs to",
        ),
        (lambda: Optimisation(go_on_from=(0,)), r"must rise from 1 and stay .* got \[0\]; raise"),
        (lambda: Data(validation_rows=-1), "validation_rows must be at least 0, got -1; 0 is the"),
        (lambda: Data(image_size=10**9), "image_size must be at most 16384, got 1000000000; 0 is"),
        (lambda: Model(hidden=(8,) * 3000), "of hidden layers must be at most 1000, got 3000; li"),
        (lambda: Method(members=10**9), "members must be at most 1000, got 1000000000; 1 trains"),
        (lambda: Method(teachers=10**9), "teachers must be at most 1000, got 1000000000; 0 learns"),
        (
            lambda: small_study(runs=10**8),
            "at most 100000 runs, got 1400000000: 7 methods x 2 splits x 100000000 runs; lower one",
        ),
        (lambda: Options(devices=10**6), r"devices must be at most \d+, got 1000000; 1 trains"),
        (lambda: Optimisation(decay=0), "decay must be a finite number above 0, got 0; 0.1 is"),
        *[
            (
                lambda made=made, name=name: made(**{name: 1e300}),
                rf"{name} must be at most 1e\+38, g",
            )
            for made, names in (
                (Optimisation, ("learning_rate", "weight_decay", "clip_norm", "decay", "epsilon")),
                (Method, ("beta", "temperature")),
                (Synthetic, ("noise", "off_class")),
                (Options, ("checkpoint_seconds",)),
            )
            for name in names
        ],
        (
            lambda: Optimisation(schedule="step", milestones=(1, 2) * 5, decay=1e38),
            r"the optimizer's largest step size must be at most 1e\+38, got inf; lower learn",
        ),
        (
            lambda: Optimisation(optimizer="adamw", learning_rate=1e38),
            r"largest step size must be .* got 1\S*e\+39; lower learning_rate, decay, weight_dec",
        ),
        (
            lambda: Optimisation(optimizer="adamw", learning_rate=1e30, weight_decay=1e30),
            r"the optimizer's largest step size must be at most 1e\+38, got 1\S*e\+60; lower",
        ),
        (lambda: Optimisation(warmup_epochs=-1), "warmup_epochs must be at least 0, got -1; 0 is"),
        (lambda: Optimisation(nesterov=True, momentum=0), "nesterov must go with a momentum above"),
        (lambda: Seeds(order=-1), "seeds.order must be at least 0, got -1; any from 0 will do"),
        (lambda: Synthetic(classes=1), "synthetic.classes must be at least 2, got 1; there is not"),
        (lambda: Synthetic(patches=3), "synthetic.patches must be at least 4, got 3; two views"),
        (lambda: Synthetic(noise=-1), "synthetic.noise must be a finite .* got -1; 0.5 is the def"),
        (lambda: Synthetic(single_view_share=1), r"single_view_share must be in \[0, 1\), got 1"),
        (lambda: Run(method=Method("mine")), "method.name must be one of baseline, .* got 'mine'"),
        (lambda: Run(repeat=-1), "repeat must be at least 0, got -1; 0 is the first"),
        (lambda: Method(members=0), "method.members must be at least 1, got 0; 1 trains a model"),
        (lambda: Method(alpha=1), r"method.alpha must be in \[0, 1\), got 1; 1 would leave no"),
        (lambda: Method(ramp_share=0), r"ramp_share must be in \(0, 1\], got 0; 1 lets ramps"),
        (lambda: Method(distillation=2), r"distillation must be in \[0, 1\], got 2; 0.5 will do"),
        (lambda: Method(temperature=0), "temperature must be a finite number above 0, got 0; 1"),
        (lambda: Method(divergence="kl"), "divergence must be one of skl, l1, ce, got 'kl'; did"),
        (lambda: Method(ramp="line"), "ramp must be one of none, .* did you mean 'linear'"),
        (lambda: Method(measured="mean"), "measured must be one of member, ensemble, average, got"),
        (lambda: Method(beta=1), "beta must be 0 where there is no pair .* got 1; set method.memb"),
        (
            lambda: Method(members=2, beta=1, stale_steps=5),
            "stale_steps must be 0 but for ce .* got 5; set divergence = 'ce'",
        ),
        (lambda: Method(members=2, teachers=2), "teachers must be 0 with more .* got 2; set memb"),
    ],
)
def test_wrong_settings_say_what_is_wanted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimisation": {"epoch": 3}}, "no setting 'optimisation.epoch'; did you mean 'epochs'"),
        ({"modle": {}}, "there is no setting 'modle'; did you mean 'model'"),
        ({"zzz": 1}, "there is no setting 'zzz'; there are data, model, method, optimisation"),
        ({"optimisation": {"epochs": "3"}}, "optimisation.epochs must be a whole number, got '3'"),
        ({"optimisation": {"epochs": True}}, "epochs must be a whole number, got True; correct"),
        ({"optimisation": {"momentum": "x"}}, "optimisation.momentum must be a number, got 'x'"),
        ({"data": {"flip": 1}}, "data.flip must be true or false, got 1; correct its type"),
        ({"data": {"name": 3}}, "data.name must be a text, got 3; correct its type"),
        ({"model": {"hidden": 64}}, "model.hidden must be a list, got 64; write it in brackets"),
        ({"model": {"options": 1}}, "model.options must be a table, got 1; write name = value"),
        ({"model": 3}, "model must be a table of settings, got 3; see the docs"),
        ({"data": {"synthetic": {"clases": 3}}}, "'data.synthetic.clases'; did you mean 'classes'"),
        ({"method": {"name": "skll"}}, "method must be one of baseline, .* did you mean 'skl"),
        ({"method": {"name": 3}}, "method.name must be a text, got 3; correct its type"),
        (
            {"seeds": {"order": 10**400}},
            "order must be within 2.63, got a number of 401 digits; co",
        ),
        ({"optimisation": {"decay": 10**400}}, "decay must be within 2.63, got a number of 401 d"),
        ({"optimisation": {"milestones": [-(10**5000)]}}, "within 2.63, got a number of 5001 digi"),
        (
            {"data": {"name": ["x"] * 99}},
            r"data.name must be a text, got \['x', .*\N{HORIZONTAL ELLIPSIS}; correct its",
        ),
        ({"model": {"options": {"a": float("nan")}}}, "model.options must hold texts, finite numb"),
        ({"model": {"options": {"a": datetime.date(2020, 1, 1)}}}, "got: Object of type date is n"),
    ],
)
def test_a_wrong_file_names_the_setting_and_the_nearest(values, message):
    with pytest.raises(ValueError, match=message):
        Run.from_mapping(values)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.yaml", b"", r"must end in .toml or .json, got .*run.yaml; rename it"),
        ("run.toml", b"epochs = ", r"run.toml must hold TOML, got: .*; correct it there"),
        ("run.json", b"{", r"run.json must hold JSON, got: .*; correct it there"),
        ("run.json", b"\xff\xfe", r"run.json must hold JSON, got: .*; correct it there"),
        ("run.json", b"[1]", "run.json must hold tables of settings, got a list"),
        ("run.json", b"[" * 100_000, "run.json must hold JSON, got: .*; correct it there"),
        ("run.toml", b"a = " + b"[" * 100_000, "run.toml must hold TOML, got: .*; correct it th"),
        ("run.json", b"[" + b"1" * 5000 + b"]", "run.json must hold JSON, got: .*digits.*; corre"),
        ("run.toml", b"a = " + b"1" * 5000, "run.toml must hold TOML, got: .*digits.*; correct"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / name)


def test_what_is_no_file_or_cannot_be_read_is_named(tmp_path):
    (tmp_path / "x.toml").mkdir()
    with pytest.raises(ValueError, match=r"x.toml must be a file of settings, got a folder; name"):
        read_settings(tmp_path / "x.toml")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(
        ValueError, match=r"pipe.json must hold JSON, got: .*is no regular file; corr"
    ):
        read_settings(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(
        ValueError, match=r"settings file must exist, got .*loop.json; check the path"
    ):
        read_settings(tmp_path / "loop.json")
    with pytest.raises(
        ValueError, match=r"settings file must exist, got .*xxx.toml; check the path"
    ):
        read_settings(tmp_path / ("x" * 300 + ".toml"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"settings file must exist, got .*run.toml; check the"):
        Run.load(tmp_path / "run.toml")


# Reading, writing, naming -------------------------------------------------------------------------

EVERYTHING = Run(
    data=Data(name="multi-view", synthetic=Synthetic(classes=3)),
    model=Model(name="timm:resnet18", hidden=(), options={"a": 1, "b": "x"}),
    method=METHODS["ce-stale"],
    optimisation=Optimisation(milestones=(3, 5), learning_rate=1e-5, nesterov=True),
    seeds=Seeds(1, 2, 3, 4, 2**63 - 1),
    repeat=2,
)


def test_a_run_comes_back_from_toml_and_json(tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(EVERYTHING))
    (tmp_path / "run.json").write_text(json.dumps(EVERYTHING.to_mapping()))
    for name in ("run.toml", "run.json"):
        again = Run.load(tmp_path / name)
        assert again == EVERYTHING
        assert again.id == EVERYTHING.id
    assert tomllib.loads(to_toml(EVERYTHING)) == EVERYTHING.to_mapping()


def test_what_a_file_leaves_out_has_its_default_or_its_method_s():
    run = Run.from_mapping({"method": {"name": "skl", "beta": 1}, "optimisation": {"epochs": 7}})
    assert run.method == dataclasses.replace(METHODS["skl"], beta=1.0)
    assert run.optimisation == Optimisation(epochs=7)
    assert run.data == Data()
    assert from_mapping(Run, {}) == Run()


def test_an_id_is_the_same_everywhere_and_changes_with_any_setting():
    assert Run().id == "digits-mlp-baseline-f657383365d2"
    others = [
        dataclasses.replace(Run(), data=Data(flip=True)),
        dataclasses.replace(Run(), repeat=1),
        dataclasses.replace(Run(), model=Model(hidden=(64,))),
        dataclasses.replace(Run(), method=Method(label_smoothing=0.1)),
        dataclasses.replace(Run(), optimisation=Optimisation(momentum=0.8)),
        *(
            dataclasses.replace(Run(), seeds=Seeds(**{f.name: 1}))
            for f in dataclasses.fields(Seeds)
        ),
    ]
    assert len({run.id for run in [Run(), *others]}) == len(others) + 1
    assert EVERYTHING.id.startswith("multi-view-timm-resnet18-ce-stale-")


def test_runs_go_together_when_only_their_seeds_differ():
    assert small_run().together == small_run(seeds=Seeds(1, 2, 3, 4, 5)).together
    assert small_run().together != small_run("skl").together
    assert small_run().together != small_run(repeat=1).together


# Studies ------------------------------------------------------------------------------------------

STUDY = """
title = "a study"
runs = 3
splits = 2
[data]
train_rows = 60
[optimisation]
epochs = 4
[[methods]]
method = { name = "baseline" }
[[methods]]
name = "strong"
method = { name = "skl", beta = 9.0 }
changes = { optimisation = { epochs = 5 }, data = { crop_padding = 1 } }
[[methods]]
name = "same order"
fixed = ["order"]
[[methods]]
name = "same everything"
fixed = ["initialisation", "order", "augmentation", "dropout"]
"""


def test_a_study_s_file_expands_to_its_runs(tmp_path):
    (tmp_path / "study.toml").write_text(STUDY)
    study = Study.load(tmp_path / "study.toml")
    baseline, strong, same_order, same = study.methods
    assert [variant.name for variant in study.methods] == [
        "baseline",
        "strong",
        "same order",
        "same everything",
    ]
    assert list(study.own_names().values()) == ["strong"]  # the others are the baseline
    runs = study.all_runs()
    assert len(runs) == len({run.id for run in runs}) == 4 * 3 * 2
    assert {run.data.train_rows for run in runs} == {60}
    one, other = (study.run(variant, 1, 2) for variant in (baseline, strong))
    assert one.seeds == other.seeds
    assert (one.optimisation.epochs, other.optimisation.epochs) == (4, 5)
    assert (one.data.crop_padding, other.data.crop_padding) == (0, 1)
    assert other.method.beta == 9
    first, *rest = (run.seeds for run in study.runs_of(same_order)[0])
    assert {seeds.order for seeds in rest} == {first.order}
    assert len({seeds.initialisation for seeds in (first, *rest)}) == 3
    assert study.runs_of(same_order)[1][0].seeds.order != first.order
    assert [run.repeat for run in study.runs_of(same)[0]] == [1, 2, 3]
    assert len({run.seeds for run in study.runs_of(same)[0]}) == 1
    assert study.run(same, 0, 1).recipe == study.run(baseline, 1, 0).recipe


def test_a_study_can_be_written_and_read(tmp_path):
    study = Study.from_mapping(tomllib.loads(STUDY))
    (tmp_path / "study.json").write_text(json.dumps(study.to_mapping()))
    assert Study.load(tmp_path / "study.json") == study


def test_a_method_s_name_stands_for_its_table():
    short = Study.from_mapping({"methods": ["baseline", "skl"]})
    assert short == Study.from_mapping(
        {"methods": [{"method": {"name": name}} for name in ("baseline", "skl")]}
    )


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"method": {}}, "there is no setting 'method'; did you mean 'methods'?"),
        ({"split": 3}, "there is no setting 'split'; did you mean 'splits'?"),
        ({}, r"methods must name each method once and at least one, got \[\]"),
        ({"methods": "skl"}, "methods must be a list, got 'skl'; write it in brackets"),
        ({"methods": [3]}, r"methods\[0\] must be a table of settings, got 3"),
        ({"methods": ["skll"]}, "method must be one of .* did you mean 'skl'?"),
        ({"methods": [{"fix": []}]}, r"no setting 'methods\[0\]\.fix'; did you mean 'fixed'?"),
        (
            {"methods": [{"method": {"name": "skl"}, "changes": {"seeds": {}}}]},
            "changes of skl must be one of data, model, optimisation, got 'seeds'",
        ),
        (
            {"methods": [{"changes": {"optimisation": {"epoch": 1}}}]},
            "no setting 'changes of baseline.optimisation.epoch'; did you mean 'epochs'?",
        ),
        (
            {"methods": [{"changes": {"model": 3}}]},
            "changes of baseline.model must be a table of settings, got 3",
        ),
        (
            {"methods": [{"fixed": ["ordr"]}]},
            "fixed of baseline must be one of initialisation, .* got 'ordr'; did you mean 'order'?",
        ),
        (
            {"methods": ["skl", {"changes": {"data": {"train_rows": 90}}}]},
            "changes of baseline must leave the data set .* got {'train_rows': 90}; methods are",
        ),
    ],
)
def test_a_wrong_study_is_refused(tables, message):
    with pytest.raises(ValueError, match=message):
        Study.from_mapping(tables)
