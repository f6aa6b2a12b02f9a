"""`python -m churn_trainer` is the `churn-train` command."""

from churn_trainer.cli import app

app()
