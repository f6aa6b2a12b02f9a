"""A study and a run that train in a second."""

from churn_trainer.config import Data, Model, Optimisation, Run, Study
from churn_trainer.methods import DIGITS_METHODS, METHODS

SMALL = {
    "data": Data(train_rows=60),
    "model": Model(hidden=(16,)),
    "optimisation": Optimisation(epochs=3),
}


def small_study(methods=DIGITS_METHODS, **changes):
    chosen = tuple(METHODS[name] for name in methods)
    return Study(chosen, **({"runs": 2, "splits": 2} | SMALL | changes))


def small_run(method="baseline", **changes):
    return Run(**(SMALL | {"method": METHODS[method]} | changes))
