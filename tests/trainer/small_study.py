"""A study that trains in a second."""

from churn_trainer.config import Study, Training
from churn_trainer.methods import METHODS


def small_study(**changes):
    settings = {"runs": 2, "splits": 2, "train_rows": 60, "hidden": (16,)}
    settings |= {"training": Training(epochs=3), "methods": tuple(METHODS)}
    return Study(dataset="digits", **(settings | changes))
