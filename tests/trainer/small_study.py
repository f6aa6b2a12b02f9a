"""A study and a run that train in a second, and a run's minibatches."""

import torch
from churn_trainer.config import Data, Model, Optimisation, Run, Study, Variant
from churn_trainer.data import load_dataset
from churn_trainer.data.batches import Batches
from churn_trainer.methods import METHODS
from churn_trainer.study import run_study
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
    return run_study(study, root, LocalWorkers(workers), **options)


def small_run(method="baseline", **changes):
    return Run(**(SMALL | {"method": METHODS[method]} | changes))


def batches(run, *others, dataset=None, **options):
    source = dataset or load_dataset(run.data)
    return Batches([run, *others], source, torch.device("cpu"), **options)
