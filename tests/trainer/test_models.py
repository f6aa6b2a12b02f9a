"""Networks, by name and by import path, and many of them as one module."""

import importlib
import math

import pytest
import torch
from churn_trainer import models
from churn_trainer.config import Model, Seeds
from churn_trainer.members import Separate, Stacked, build_members, seeded, stackable
from churn_trainer.models import NETWORKS, build_model, check_logits
from small_study import small_run
from torch import nn

SHAPES = {"resnet-v2-50": (3, 64, 64), "mlp": (5, 7)}
PARAMETERS = {
    # 5*7*64+64 + 64*64+64 + 64*11+11
    "mlp": 2304 + 4160 + 715,
    # He et al. 2015, Table 6: 0.46M and 0.85M with ten classes.
    "resnet32": 464154 + 65,
    "resnet56": 853018 + 65,
    # torchvision's resnet50 without its classifier has 23.5M; version 2 differs in its norms alone.
    "resnet-v2-50": 23500352 + 2048 * 11 + 11,
}


def network(name, classes=11, shape=None, **settings):
    with seeded(0):
        shape = shape or SHAPES.get(name, (3, 32, 32))
        return build_model(Model(name=name, **settings), shape, classes)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_maps_its_inputs_to_logits(name):
    model = network(name)
    inputs = torch.randn(2, *SHAPES.get(name, (3, 32, 32)))
    logits = model.train()(inputs)
    assert logits.shape == (2, 11)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if name in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(
            PARAMETERS[name], rel=0.002
        )


def test_resnets_have_their_layers():
    for name, layers in (("resnet32", 32), ("resnet56", 56), ("resnet-v2-50", 50)):
        kinds = (nn.Conv2d, nn.Linear)
        weighted = [m for n, m in network(name).named_modules() if isinstance(m, kinds)]
        shortcuts = [n for n, _ in network(name).named_modules() if n.endswith("shortcut")]
        assert len(weighted) - len(shortcuts) == layers
    sizes = []
    model = network("resnet-v2-50")
    for block in list(model.layers)[2:18]:
        block.register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:])))
    model.eval()(torch.zeros(1, 3, 64, 64))
    assert sizes[2::13] == [(256, 16, 16), (2048, 2, 2)]
    assert sizes[6] == (512, 8, 8)


def test_lenet_takes_28_and_32_pixels():
    for side in (28, 32):
        model = network("lenet5", 10, (1, side, side))
        assert sum(p.numel() for p in model.parameters()) == 61706  # LeCun et al. 1998, dense


def test_initial_weights_have_he_s_variance():
    with seeded(0):
        weight = build_model(Model(hidden=(256,)), (512,), 10).layers[1].weight.detach()
    assert float(weight.var()) == pytest.approx(2 / 512, rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize("name", ["mlp", "lenet5", "cnn"])
def test_dropout_leaves_out_units_in_training_alone(name):
    model = network(name, dropout=0.5)
    inputs = torch.randn(2, *SHAPES.get(name, (3, 32, 32)))
    assert not torch.equal(model.train()(inputs), model(inputs))
    assert torch.equal(model.eval()(inputs), model(inputs))


def test_building_leaves_the_generator_where_it_was():
    before = torch.random.get_rng_state()
    network("cnn")
    assert torch.equal(torch.random.get_rng_state(), before)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"name": "resnet23"}, (3, 32, 32), "model.name must be one of mlp, .* did you mean 'resn"),
        ({"name": "zzzz"}, (3, 32, 32), "or timm:NAME, or package.module:Name"),
        ({"name": "lenet5"}, (1, 8, 8), r"lenet5 must have images of at least 28 x 28 .* \(1, 8, "),
        ({"name": "cnn"}, (64,), r"cnn must have images .* of shape \(64,\); choose model mlp"),
        ({"options": {"a": 1}}, (4,), "model.options must be empty for mlp, got {'a': 1}; they"),
        (
            {"name": "os:system"},
            (4,),
            r"'os:system' must be of a package .* got mine; to run",
        ),
        ({"name": "mine2:x"}, (4,), "pass --trust mine2"),
        ({"name": "mine.no:x"}, (4,), "must be package.module:Name, got 'mine.no:x': No module"),
        ({"name": "mine:Nothing"}, (4,), "got 'mine:Nothing': .*no attribute 'Nothing'"),
        ({"name": "mine:Wrong"}, (4,), r"must map 2 inputs to logits \(2, 3\), got \(2, 5\); give"),
        ({"name": "mine:Deep"}, (4,), r"must take inputs of shape \(4,\), got: .*; choose another"),
    ],
)
def test_models_that_cannot_be_are_explained(settings, shape, message, mine):
    with pytest.raises(ValueError, match=message):
        checked(Model(**settings), shape, 3, trust=["mine"])


def checked(model, shape, classes, trust):
    check_logits(model.name, build_model(model, shape, classes, trust), shape, classes)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def Linear(shape, classes, scale=1): return nn.Linear(shape[0], scale * classes)\n"
        "def Wrong(shape, classes): return nn.Linear(shape[0], 5)\n"
        "def Deep(shape, classes): return nn.Conv2d(3, 4, 5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


def test_a_network_of_one_s_own(mine):
    model = build_model(Model(name="mine:Linear"), (4,), 3, trust=["mine"])
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (3, 4)
    with pytest.raises(ValueError, match=r"to logits \(2, 3\), got \(2, 6\)"):
        checked(Model(name="mine:Linear", options={"scale": 2}), (4,), 3, trust=["mine"])


def test_code_that_is_not_trusted_is_not_imported(tmp_path, monkeypatch):
    witness = tmp_path / "witness"
    (tmp_path / "stranger.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    for trust in ((), ("strange",)):
        with pytest.raises(ValueError, match="pass --trust stranger"):
            build_model(Model(name="stranger:Net"), (4,), 3, trust=trust)
    assert not witness.exists()
    with pytest.raises(ValueError, match="no attribute 'Net'"):
        build_model(Model(name="stranger:Net"), (4,), 3, trust=["stranger"])
    assert witness.exists()  # it would have shown


def test_timm_s_absence_names_the_command(monkeypatch):
    def refuse(name, package=None):
        raise ImportError(name)

    monkeypatch.setattr(models.importlib, "import_module", refuse)
    with pytest.raises(ValueError, match="needs timm, which is not installed; pip install timm"):
        network("timm:resnet18")


def test_options_of_timm_s_that_load_files_are_refused():
    with pytest.raises(ValueError, match=r"to the trainer, got \['checkpoint_path'\]; drop them"):
        network("timm:resnet18", options={"checkpoint_path": "x"})


def test_a_network_of_timm_s():
    pytest.importorskip("timm")
    assert network("timm:resnet18", shape=(1, 32, 32)).conv1.weight.shape[1] == 1
    with pytest.raises(ValueError, match="network of timm's, got 'resnet19'; did you mean"):
        network("timm:resnet19")


# Many as one --------------------------------------------------------------------------------------


def members_of(method="skl", model=None, seeds=(0, 1, 2), shape=(1, 8, 8)):
    changes = {} if model is None else {"model": model}
    runs = [small_run(method, seeds=Seeds(initialisation=s, dropout=s), **changes) for s in seeds]
    return build_members(runs, shape, 10)


@pytest.mark.parametrize("model", [Model(hidden=(6,)), Model(name="cnn")])
def test_a_stack_is_its_networks_one_by_one(model):
    stack = members_of(model=model)
    assert isinstance(stack, Stacked)
    alone = Separate(networks_of(stack, model), 2, 3)
    inputs = torch.randn(3, 5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    logits, wanted = stack(inputs), alone(inputs)
    assert logits.shape == (2, 3, 5, 10)
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(stack(inputs, 1), wanted[:1])
    torch.testing.assert_close(alone(inputs, 1), wanted[:1])
    slopes = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)) * 10
    for members in (stack, alone):
        members.zero_grad()
        (members(inputs) * slopes).sum().backward()
    torch.testing.assert_close(stack.clip_gradients(0), alone.clip_gradients(0))
    norms = stack.clip_gradients(1.0)
    torch.testing.assert_close(norms, alone.clip_gradients(1.0), rtol=1e-4, atol=1e-5)
    assert (norms > 1).all()
    torch.testing.assert_close(stack.clip_gradients(0), torch.ones(2, 3), rtol=1e-4, atol=0)


def networks_of(stack, model):
    networks = []
    for member in range(2):
        for run in range(3):
            one = build_model(model, (1, 8, 8), 10)
            one.load_state_dict(stack.weights(member, run))
            networks.append(one)
    return networks


def test_a_small_gradient_is_not_enlarged():
    stack = members_of()
    stack.zero_grad()
    (stack(torch.ones(3, 2, 1, 8, 8)) * 1e-6).sum().backward()
    before = [parameter.grad.clone() for parameter in stack.stacked]
    stack.clip_gradients(1.0)
    assert all(torch.equal(p.grad, old) for p, old in zip(stack.stacked, before, strict=True))


def test_a_network_follows_from_its_run_s_seed_and_its_number_alone():
    three, one = members_of(), members_of(seeds=(1,))
    for member in range(2):
        for name, weight in one.weights(member, 0).items():
            assert torch.equal(weight, three.weights(member, 1)[name])
    baseline = members_of("baseline", seeds=(1,))
    own = baseline.weights(0, 0)
    assert all(torch.equal(own[name], weight) for name, weight in one.weights(0, 0).items())
    first, second = one.weights(0, 0), one.weights(1, 0)
    assert not any(torch.equal(first[n], second[n]) for n in first if n.endswith("weight"))
    # A student starts unlike its teachers.
    student = members_of("self-distillation", seeds=(1,)).weights(0, 0)
    assert all(torch.equal(student[name], weight) for name, weight in second.items())


def test_batch_norm_dropout_and_size_keep_networks_apart():
    image = (3, 32, 32)
    assert stackable(network("mlp", shape=image), image)
    assert stackable(network("cnn"), image)
    assert not stackable(network("resnet32"), image)
    assert not stackable(network("mlp", shape=image, dropout=0.1), image)
    assert not stackable(network("mlp", shape=image, hidden=(500,)), image)
    assert isinstance(members_of(model=Model(dropout=0.5)), Separate)


class Branching(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) if inputs.sum() > 1e9 else super().forward(-inputs)


class Noisy(nn.Linear):
    def forward(self, inputs):
        return super().forward(nn.functional.dropout(inputs, 0.5, self.training))


@pytest.mark.parametrize("kind", [Branching, Noisy])
def test_a_network_that_torch_func_cannot_take_is_not_stacked(kind):
    assert stackable(nn.Linear(4, 3), (4,))
    assert not stackable(kind(4, 3), (4,))


def test_dropout_inside_a_network_of_one_s_own_has_its_seed_too(mine, tmp_path):
    (tmp_path / "noisy.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, shape, classes): super().__init__(8, classes)\n"
        "    def forward(self, x):\n"
        "        return super().forward(nn.functional.dropout(x[:, 0, 0], 0.5, self.training))\n"
    )
    runs = [small_run("2-ensemble", model=Model(name="noisy:Net"), seeds=Seeds(dropout=3))]
    first, second = (build_members(runs, (1, 8, 8), 10, trust=["noisy"]) for _ in range(2))
    inputs = torch.ones(1, 4, 1, 8, 8)
    assert torch.equal(first(inputs), second(inputs))
    first.step = 1
    assert not torch.equal(first(inputs), second(inputs))


def test_dropout_follows_from_its_run_s_seed_the_step_and_the_member():
    dropout = Model(hidden=(64,), dropout=0.5)
    together, alone = members_of(model=dropout), members_of(model=dropout, seeds=(1,))
    inputs = torch.ones(3, 2, 1, 8, 8)

    def logits(members, step, inputs):
        members.train().step = step
        return members(inputs)

    first = logits(together, 4, inputs)
    torch.manual_seed(99)
    assert torch.equal(logits(together, 4, inputs), first)
    assert torch.equal(logits(alone, 4, inputs[:1])[:, 0], first[:, 1])
    assert not torch.equal(logits(together, 5, inputs), first)
    one = members_of(model=dropout, seeds=(1,))
    one.seeds = [2]
    assert not torch.equal(logits(one, 4, inputs[:1]), logits(alone, 4, inputs[:1]))


@pytest.mark.parametrize("model", [Model(hidden=(6,)), Model(name="cnn", dropout=0.1)])
def test_weights_go_out_and_come_back_and_others_are_refused(model):
    source, target = members_of(model=model), members_of(model=model, seeds=(7, 8, 9))
    target.load_weights(1, 2, source.weights(0, 1))
    for name, weight in source.weights(0, 1).items():
        assert torch.equal(target.weights(1, 2)[name], weight)
    other = members_of(model=Model(hidden=(7,)))
    with pytest.raises(
        ValueError, match=r"weights must be those of the run's model, got others, f"
    ):
        target.load_weights(0, 0, other.weights(0, 0))


def test_batch_norm_statistics_travel_with_the_weights():
    members = members_of(model=Model(name="resnet32"), seeds=(0,), shape=(3, 16, 16))
    members.train()(torch.randn(1, 4, 3, 16, 16))
    weights = members.weights(0, 0)
    means = [value for name, value in weights.items() if name.endswith("running_mean")]
    assert len(means) == 31
    assert all(math.isfinite(float(mean.sum())) and mean.any() for mean in means)
