"""Churn caused by a GPU alone, and its causes: `python -m benchmarks.gpu.churn JSON`.

The last lines of Table 1 of Bhojanapalli et al. 2021, on scikit-learn's digits: one recipe trained
repeatedly with identical seeds, in each reduction mode of the losses, with and without
PyTorch's deterministic algorithms. Then an audit of the simplest of them.
"""

import argparse
import math
import os
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.journal import Case, Journal, work
from benchmarks.gpu.stages import Deadline
from churn_kernels import audit
from churn_kernels.audit.settings import deterministic_algorithms
from churn_kernels.intervals import Estimate
from churn_kernels.metrics import churn_report
from churn_kernels.modes import MODES

REPETITIONS = 8
EPOCHS = 20
CONVOLUTIONS = "cnn"
PAIRS, STEPS, REPLAYS = 4, 10, 20


def finite(estimate: Estimate) -> list[float | None]:
    """Mean, low and high, for JSON."""
    return [number if math.isfinite(number) else None for number in estimate[:3]]


def recipe(mode: str, epochs: int, network: str) -> Any:
    """A pair of co-distilled networks, so that the fused loss takes part in every step."""
    from churn_trainer.config import Data, Model, Optimisation, Run
    from churn_trainer.methods import METHODS

    return Run(
        data=Data(crop_padding=1),
        model=Model(name=network),
        method=METHODS["skl"],
        optimisation=Optimisation(epochs=epochs, reduction_mode=mode),
    )


def repeat(
    mode: str, deterministic: bool, device: str, repetitions: int, epochs: int, network: str
) -> dict[str, Any]:
    """Accuracy and churn of runs that share every seed, and how many pairs have the same logits."""
    from churn_trainer.data import load_dataset
    from churn_trainer.loop import fit, make_fabric

    run = recipe(mode, epochs, network)
    dataset, fabric = load_dataset(run.data), make_fabric(accelerator=device)
    logits = []
    with deterministic_algorithms(deterministic):
        for number in range(repetitions):
            trained = fit([replace(run, repeat=number)], dataset, fabric=fabric)
            logits.append(trained.logits[0])
    summary = churn_report(logits, trained.labels[0]).summary()
    identical = [torch.equal(one, other) for one, other in combinations(logits, 2)]
    return {
        "accuracy": finite(summary["accuracy"]),
        "churn": finite(summary["churn"]),
        "identical": sum(identical),
        "pairs": len(identical),
    }


def why(device: str, pairs: int, steps: int, replays: int, network: str) -> dict[str, Any]:
    """The result of an audit of the recipe in fast mode."""
    from churn_trainer.audited import training_of

    found = audit.examine(
        training_of(recipe("fast", EPOCHS, network)),
        device=device,
        pairs=pairs,
        steps=steps,
        amplify_steps=2 * steps,
        replays=replays,
    )
    return {
        "verdict": found.verdict,
        "operators": found.operators,
        "parted": sum(pair.step is not None for pair in found.pairs),
        "pairs": pairs,
        "shares": [
            {"suspect": share.suspect, "share": finite(share.share)}
            for share in (found.attribution.shares if found.attribution else [])
        ],
    }


def cases(
    device: str = "cuda",
    repetitions: int = REPETITIONS,
    epochs: int = EPOCHS,
    network: str = CONVOLUTIONS,
    pairs: int = PAIRS,
    steps: int = STEPS,
    replays: int = REPLAYS,
) -> list[Case]:
    """The trainings, most important first."""
    audited = Case({"group": "why"}, partial(why, device, pairs, steps, replays, network))
    first, *others = [
        Case(
            {"group": "churn", "mode": mode, "deterministic": deterministic},
            partial(repeat, mode, deterministic, device, repetitions, epochs, network),
        )
        for deterministic, mode in product((False, True), MODES)
    ]
    return [first, audited, *others]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0, help="begin no case after so long")
    arguments = parser.parse_args()
    # PyTorch's deterministic algorithms need it, and cuBLAS reads it once per process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    every = cases()
    return work(every, Journal(arguments.json, every), Deadline(arguments.seconds), "cuda")


if __name__ == "__main__":
    raise SystemExit(main())
