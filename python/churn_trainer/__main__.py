"""The `churn-train` command, which `python -m churn_trainer` is too."""

import sys


def main() -> None:
    """Runs the command; a package of the trainer's that is not installed is named in one line."""
    try:
        from churn_trainer.cli import app  # what it imports may be missing

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("churn_trainer", "churn_kernels"):
            raise
        print(
            f"churn-train: the trainer's packages must be installed, got no {package}; "
            "pip install 'churn-kernels[trainer]'",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
