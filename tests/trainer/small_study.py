"""A study and runs that train in a second, copies of them, and readers of what they leave."""

import csv
import shutil
from html.parser import HTMLParser

import torch
from churn_trainer.config import Data, Model, Optimisation, Run, Seeds, Study, Variant
from churn_trainer.data import load_dataset
from churn_trainer.data.batches import Batches
from churn_trainer.found import find_runs
from churn_trainer.methods import METHODS
from churn_trainer.study import report_study, run_study
from churn_trainer.workers import LocalWorkers

SEVEN = ("baseline", "entropy", "uniform-skl", "ce", "l1", "skl", "skl-entropy")

SMALL = {
    "data": Data(train_rows=60),
    "model": Model(hidden=(16,)),
    "optimisation": Optimisation(epochs=3),
}


def small_study(methods=SEVEN, **changes):
    chosen = tuple(one if isinstance(one, Variant) else Variant.named(one) for one in methods)
    return Study(chosen, **({"runs": 2, "splits": 2} | SMALL | changes))


def local_study(study, root, workers=2, **options):
    run_study(study, root, LocalWorkers(workers), **options)
    return report_study(study, root)


def small_run(method="baseline", **changes):
    return Run(**(SMALL | {"method": METHODS[method]} | changes))


def batches(run, *others, dataset=None, **options):
    source = dataset or load_dataset(run.data)
    return Batches([run, *others], source, torch.device("cpu"), **options)


def independent(method, number, split=0, **changes):
    return small_run(method, seeds=Seeds(split, *[number] * 4), **changes)


def copied(runs, tmp_path, keep):
    """A copy of some of the runs."""
    root = tmp_path / "runs"
    for one in find_runs(runs).finished:
        if keep(one.run):
            shutil.copytree(one.folder.path, root / one.folder.path.name)
    return root


def first_split(run):
    return run.seeds.split == 0 and run.optimisation.weight_decay == 0 and not run.repeat


def table(made, kind):
    return next(one for one in made.tables if one.kind == kind)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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
