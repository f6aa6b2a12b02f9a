"""`python -m churn_trainer` is the `churn-trainer` command."""

from churn_trainer.cli import app

app()
