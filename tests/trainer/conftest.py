"""One small study, and one folder of small runs, made once for all tests that only look at them."""

from dataclasses import replace

import pytest
from churn_trainer import report
from churn_trainer.config import Seeds
from churn_trainer.train import Options, train
from small_study import SMALL, independent, local_study, small_run, small_study


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    return local_study(small_study(), tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Every table and figure but those of CIFAR-100: two splits, three runs of each method."""
    root = tmp_path_factory.mktemp("report") / "runs"
    decayed = replace(SMALL["optimisation"], weight_decay=0.001)
    stronger = replace(small_run("skl").method, beta=1.0)
    wanted = [
        *(
            independent(method, number, split)
            for method in ("baseline", "skl", "2-ensemble")
            for split in (0, 1)
            for number in range(3)
        ),
        *(
            replace(independent("skl", number, split), method=stronger)
            for split in (0, 1)
            for number in range(3)
        ),
        *(independent("baseline", number, optimisation=decayed) for number in range(2)),
        *(small_run(seeds=Seeds(0, 0, order, 0, 0)) for order in (5, 6)),
        *(small_run(seeds=Seeds(0, 0, 0, 0, 0), repeat=repeat) for repeat in (1, 2)),
    ]
    train(wanted, root, Options(curve_points=2))
    return root


@pytest.fixture(scope="session")
def made(trained):
    return report.make_report(trained)


@pytest.fixture(scope="session")
def report_folder(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report"
    assert report.write_report(trained, out, command="churn-train report x") == out / "report.html"
    return out
