"""Networks of one's own: what they may do, and what is said of the others before a step is made."""

import importlib
import subprocess
import sys

import pytest
import torch
from churn_trainer import cli, loop
from churn_trainer.config import Data, Model, Optimisation, Seeds
from churn_trainer.data import digits
from churn_trainer.data.batches import fewest_rows
from churn_trainer.loop import fit
from churn_trainer.members import Separate, Stacked, build_members
from churn_trainer.train import Options, train
from small_study import small_run
from test_train import environment
from typer.testing import CliRunner

DIGITS = digits()

NETS = '''
import os
import random
import sys

import numpy as np
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self, shape, classes, norm=False):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(64) if norm else nn.Identity()
        self.last = nn.Linear(64, classes)
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, inputs):
        hidden = self.first(inputs.flatten(1)).relu()
        return self.last(self.norm(self.second(hidden)).relu()) * self.scratch

class Frozen(Tied):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.first.weight.requires_grad_(False)

class Drawn(nn.Linear):
    def __init__(self, shape, classes, source="numpy"):
        super().__init__(64, classes)
        draw = {
            "numpy": lambda: np.random.randn(*self.weight.shape),
            "python": lambda: [[random.random() for _ in row] for row in self.weight],
            "system": lambda: np.random.default_rng().normal(size=self.weight.shape),
        }[source]
        with torch.no_grad():
            self.weight.copy_(torch.as_tensor(draw()))

    def forward(self, inputs):
        return super().forward(inputs.flatten(1))

class Jumping(nn.Linear):
    """Draws in each pass, in training and in evaluation."""
    def __init__(self, shape, classes, source="python"):
        super().__init__(64, classes)
        self.draw = {
            "numpy": lambda: np.random.rand(),
            "python": random.random,
            "torch": lambda: float(torch.rand(())),
        }[source]

    def forward(self, inputs):
        return super().forward(inputs.flatten(1)) * (0.5 + self.draw())

class Lazy(nn.Sequential):
    def __init__(self, shape, classes):
        super().__init__(nn.Flatten(), nn.LazyLinear(12), nn.ReLU(), nn.LazyLinear(classes))

class Pair(nn.Linear):
    def __init__(self, shape, classes, when="always"):
        super().__init__(64, classes)
        self.when = when

    def forward(self, inputs):
        logits = super().forward(inputs.flatten(1))
        return (logits, inputs) if self.when == "always" or self.training else logits

class Named(Pair):
    def forward(self, inputs):
        return {"logits": super().forward(inputs)}

def fixed(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).requires_grad_(False)

def no_network(shape, classes):
    return lambda inputs: inputs

def failing(shape, classes):
    return {}["x"]

def normed(shape, classes, kind="batch"):
    norm = {"batch": nn.BatchNorm1d(64), "none": nn.Identity()}[kind]
    return nn.Sequential(nn.Flatten(), norm, nn.Linear(64, classes))
'''
TRUST = ("own_nets",)


@pytest.fixture(autouse=True)
def own_nets(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("code")
    (folder / "own_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("own_nets", None)


def own(name, method="baseline", *, epochs=2, data=None, seeds=None, settings=None, **options):
    return small_run(
        method,
        model=Model(name=f"own_nets:{name}", options=options),
        data=data or Data(train_rows=60),
        optimisation=Optimisation(epochs=epochs, **(settings or {})),
        seeds=seeds or Seeds(),
    )


def members_of(*runs):
    return build_members(runs, (1, 8, 8), 10, trust=TRUST)


# Weights under several names, and weights that stay ----------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_tied_weights_train_as_one(norm, tmp_path):
    run = own("Tied", "skl", norm=norm)
    members = members_of(run)
    assert isinstance(members, Separate if norm else Stacked)
    (folder,) = train([run], tmp_path, Options(trust=TRUST))
    from own_nets import Tied

    for weights in folder.weights():
        assert torch.equal(weights["first.weight"], weights["second.weight"])
        assert "scratch" not in weights  # no more than the network's own state
        network = Tied((1, 8, 8), 10, norm)
        network.load_state_dict(weights)
        assert network.second.weight is network.first.weight
    assert not torch.equal(weights["first.weight"], members.weights(1, 0)["first.weight"])


def test_a_stack_of_tied_networks_is_its_networks_one_by_one():
    runs = [own("Tied", seeds=Seeds(initialisation=seed)) for seed in (0, 1)]
    stack = members_of(*runs)
    networks = []
    for run in range(2):
        networks.append(importlib.import_module("own_nets").Tied((1, 8, 8), 10))
        networks[-1].load_state_dict(stack.weights(0, run))
    alone = Separate(networks, 1, 2)
    inputs = torch.randn(2, 5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for members in (stack, alone):
        members.zero_grad()
        members(inputs).square().sum().backward()
    torch.testing.assert_close(stack(inputs), alone(inputs))
    torch.testing.assert_close(stack.clip_gradients(0), alone.clip_gradients(0))


def test_weights_that_are_not_to_be_trained_stay():
    run = own("Frozen")
    before = members_of(run).weights(0, 0)
    after = fit([run], DIGITS, trust=TRUST).members.weights(0, 0)
    assert torch.equal(before["first.weight"], after["first.weight"])
    assert not torch.equal(before["last.weight"], after["last.weight"])


# What is drawn follows from the seeds -------------------------------------------------------------


@pytest.mark.parametrize("source", ["numpy", "python"])
def test_first_weights_of_any_generator_follow_from_the_seed(source):
    one, same, other = (
        members_of(own("Drawn", source=source, seeds=Seeds(initialisation=seed))).weights(0, 0)
        for seed in (3, 3, 4)
    )
    assert torch.equal(one["weight"], same["weight"])
    assert not torch.equal(one["weight"], other["weight"])


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_what_a_pass_draws_follows_from_the_seed_too(source, tmp_path):
    run = own("Jumping", source=source)
    assert isinstance(members_of(run), Separate)  # a stack would draw once for all
    one, same = (fit([run], DIGITS, trust=TRUST).logits for _ in range(2))
    assert torch.equal(one, same)
    other = fit([own("Jumping", source=source, seeds=Seeds(dropout=1))], DIGITS, trust=TRUST)
    assert not torch.equal(one, other.logits)


def test_the_caller_s_generators_go_on_as_they_were():
    import random

    import numpy as np

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    members_of(own("Drawn"), own("Drawn", source="python"))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_weights_that_a_first_pass_makes_are_made_from_the_seed():
    one, same = (members_of(own("Lazy")).weights(0, 0) for _ in range(2))
    assert one["1.weight"].shape == (12, 64)
    assert all(torch.equal(one[name], same[name]) for name in one)


# What is refused before a step --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "Pair",
            {},
            "must return one tensor, its logits (B, 10), in training and in evaluation, got a "
            "tuple; return the logits alone",
        ),
        ("Pair", {"when": "training"}, "got a tuple; return the logits alone"),
        ("Named", {}, "got a dict; return the logits alone"),
        (
            "Drawn",
            {"source": "system"},
            "must have the same first weights whenever it is made from the same seed, got others "
            "in weight; draw them from torch's, NumPy's or Python's",
        ),
        ("fixed", {}, "must have weights that can be trained, got none; register them as"),
        ("no_network", {}, "must make a torch.nn.Module, got a function; name a class, or a"),
        (
            "failing",
            {},
            "must make a network when called with shape and classes, got: KeyError: 'x' "
            "(own_nets.py, line ",
        ),
        (
            "Tied",
            {"colour": 3},
            "got: TypeError: Tied.__init__() got an unexpected keyword argument 'colour'; correct "
            "it there, or model.options",
        ),
        ("np", {}, "must name a class or a function, got 'own_nets:np', a module; name what"),
    ],
)
def test_what_cannot_be_trained_is_named(name, options, message, tmp_path):
    told = []
    with pytest.raises(ValueError, match="own_nets") as caught:
        train([own(name, **options)], tmp_path, Options(trust=TRUST), told.append)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert told == []
    assert not list(tmp_path.iterdir())  # nothing had begun


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "1 / 0",
            r"ZeroDivisionError: division by zero \(own_nets.py, line 1\); correct the modul",
        ),
        ("raise SystemExit(3)", r"SystemExit: 3 \(own_nets.py, line 1\); correct the module"),
        ("import nowhere", "No module named 'nowhere'; is it on the path, or in "),
        ("Nett = 1", "module 'own_nets' has no attribute 'Net'; correct the name, or define it"),
        ("def", "SyntaxError: invalid syntax"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(code, said, own_nets):
    (own_nets / "own_nets.py").write_text(code)
    with pytest.raises(ValueError, match=rf"got 'own_nets:Net': {said}"):
        members_of(own("Net"))


# A last minibatch of one row ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "fewest"),
    [
        ({"batch_rows": 32}, 29),
        ({"batch_rows": 12}, 1),
        ({"batch_rows": 12, "drop_last": True}, 12),
        ({"batch_rows": 100}, 61),
        ({"batch_rows": 32, "accumulate": 20}, 1),
        ({"batch_rows": 32, "accumulate": 4}, 7),
        ({"batch_rows": 1}, 1),
    ],
)
def test_the_smallest_pass_has_its_rows(settings, fewest):
    optimisation = Optimisation(**settings)
    assert fewest_rows(61, optimisation) == fewest
    batches = loop.Batches(
        [small_run(data=Data(train_rows=61), optimisation=optimisation)],
        DIGITS,
        torch.device("cpu"),
    )
    passes = [
        len(part)
        for step in range(batches.steps)
        for part in batches.train(step).labels[0].tensor_split(batches.parts(step))
    ]
    assert min(passes) == fewest
    assert sum(passes) == batches.epoch_rows == len(loop_rows(batches))


def loop_rows(batches):
    rows = torch.arange(batches.epoch_rows)
    return torch.cat([rows[batches.places(step)] for step in range(batches.steps)])


def test_two_processes_share_the_smallest_minibatch():
    assert fewest_rows(61, Optimisation(batch_rows=58), 2) == 1
    assert fewest_rows(61, Optimisation(batch_rows=32, accumulate=8), 2) == 1


@pytest.mark.parametrize("settings", [{"batch_rows": 12}, {"batch_rows": 61, "accumulate": 40}])
def test_a_single_row_under_batch_norm_is_refused_before_a_step(settings, tmp_path):
    run, told = own("normed", data=Data(train_rows=61), settings=settings), []
    message = (
        r"own_nets:normed must train on a single row, which the last minibatch of an epoch or a "
        r"part of it comes to, got: ValueError: Expected more than 1 value per channel .*; drop it "
        r"with drop_last = true \(--drop-last\), change batch_rows, or lower accumulate"
    )
    with pytest.raises(ValueError, match=message):
        train([run], tmp_path, Options(trust=TRUST), told.append)
    assert told == []
    with pytest.raises(ValueError, match=message):
        fit([run], DIGITS, trust=TRUST)


def test_the_last_minibatch_is_dropped_where_it_is_smaller():
    settings = {"batch_rows": 12, "drop_last": True}
    run, told = own("normed", data=Data(train_rows=61), settings=settings), []
    trained = fit([run], DIGITS, trust=TRUST, on_epoch=told.append)
    assert trained.logits.isfinite().all()
    assert trained.members.networks[0][1].num_batches_tracked == 2 * 5
    # One row's network needs no dropping, and has none.
    plain = own("normed", data=Data(train_rows=61), settings={"batch_rows": 12}, kind="none")
    assert fit([plain], DIGITS, trust=TRUST).logits.isfinite().all()
    # The epoch's cross entropy is the mean over the rows that trained.
    assert all(0 < float(epoch.cross_entropy) < 5 for epoch in told)


def test_too_few_rows_to_drop_any_are_refused():
    run = small_run(optimisation=Optimisation(batch_rows=61, drop_last=True))
    with pytest.raises(
        ValueError,
        match="batch_rows must be at most the 60 training rows with drop_last, got 61; n",
    ):
        fit([run], DIGITS)


def test_the_check_changes_no_statistic():
    members = members_of(own("normed"))
    assert int(members.networks[0][1].num_batches_tracked) == 0
    assert torch.equal(members.networks[0][1].running_var, torch.ones(64))


# From the working folder --------------------------------------------------------------------------


def test_a_package_in_the_working_folder_is_found(tmp_path):
    package = tmp_path / "mypkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("from torch import nn\nHead = nn.Linear\n")
    (package / "net.py").write_text(
        "from torch import nn\nfrom mypkg.parts import Head\n"
        "def Net(shape, classes): return nn.Sequential(nn.Flatten(), Head(64, classes))\n"
    )
    # As the installed command does it: its folder, not the working one, is on the path.
    command = "import sys; sys.path.remove(''); from churn_trainer.__main__ import main; main()"
    line = [sys.executable, "-c", command, "train", "--model", "mypkg.net:Net", "--trust", "mypkg"]
    line += ["--data-train-rows", "60", "--epochs", "1", "--accelerator", "cpu", "--out", "runs"]
    done = subprocess.run(
        line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_command_says_what_is_wrong_with_a_network_in_one_line(tmp_path):
    line = ["train", "--model", "json:dumps", "--trust", "json", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, line)
    assert done.exit_code == 2, done.output
    said = " ".join(done.stderr.split())
    assert "model json:dumps must make a network when called with shape and classes" in said
    assert "Traceback" not in done.output
