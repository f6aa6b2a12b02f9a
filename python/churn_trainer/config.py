"""What a run and a study are: every setting with its default, and every random seed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any

from churn_kernels.modes import MODES
from churn_trainer.methods import METHODS, Method, find_method
from churn_trainer.settings import (
    LARGEST_NUMBER,
    Settings,
    at_least,
    at_most,
    derive_seed,
    fingerprint,
    from_mapping,
    not_negative,
    one_of,
    positive,
    setting,
    share,
    shown,
)

MOST_RUNS = 100_000
"""Runs of one command."""

MOST_SIDE = 1 << 14
"""Pixels of an image's side."""

OPTIMIZERS = {
    "sgd": ("momentum", "nesterov"),
    "adamw": ("beta1", "beta2", "epsilon", "amsgrad"),
}
"""Optimizer -> the settings that are its own."""

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
SCHEDULES = ("constant", "step", "cosine")


class Draw(IntEnum):
    """What a seed is drawn for; a source of randomness is fixed by fixing its seed."""

    SPLIT = 0
    INITIALISATION = 1
    ORDER = 2
    AUGMENTATION = 3
    DROPOUT = 4


@dataclass(frozen=True)
class Synthetic:
    """Size and difficulty of the data sets that are drawn, not read."""

    seed: int = setting(0, "What the data set itself is drawn from.")
    classes: int = setting(10, "Number of classes.")
    dimension: int = setting(64, "Numbers per input; per patch in the multi-view set.")
    train_rows: int = setting(1000, "Training rows.")
    test_rows: int = setting(1000, "Test rows.")
    noise: float = setting(0.5, "Standard deviation of the noise on every number.")
    patches: int = setting(8, "Multi-view: patches of an input, at least 4.")
    single_view_share: float = setting(0.3, "Multi-view: share of the rows that show one view.")
    off_class: float = setting(0.4, "Multi-view: largest strength of another class's feature.")

    def __post_init__(self) -> None:
        at_least("synthetic.seed", self.seed, 0, "any whole number from 0 will do")
        at_least("synthetic.classes", self.classes, 2, "there is nothing to tell apart otherwise")
        at_least("synthetic.dimension", self.dimension, 1, "64 is the default")
        at_least("synthetic.train_rows", self.train_rows, 1, "1000 is the default")
        at_least("synthetic.test_rows", self.test_rows, 1, "1000 is the default")
        at_least("synthetic.patches", self.patches, 4, "two views take two patches each")
        not_negative("synthetic.noise", self.noise, "0.5 is the default")
        not_negative("synthetic.off_class", self.off_class, "0.4 is the default")
        share("synthetic.single_view_share", self.single_view_share, "0 shows both views always")


@dataclass(frozen=True)
class Data:
    """The data set, its rows, and what is done to an image before the model sees it."""

    name: str = setting("digits", "Name of the data set; `churn-train data` lists them.")
    path: str = setting("", "Local folder, or name on the Hugging Face Hub, in place of the usual.")
    train_part: str | None = setting(None, "Name of the training part, where it is another.")
    test_part: str | None = setting(None, "Name of the test part, where it is another.")
    image: str | None = setting(None, "Column of the images, where it is another.")
    label: str | None = setting(None, "Column of the labels, where it is another.")
    skip_broken: bool | None = setting(None, "Leave out images and labels that cannot be used.")
    content: str | None = setting(
        None, "Digest of images and labels, which training fills in; other data are refused."
    )
    train_rows: int = setting(
        0, "Training rows, drawn at random by class; 0: all (300 of the digits)."
    )
    image_size: int = setting(0, "Side of the images as read, in pixels; 0: the data set's own.")
    crop_padding: int = setting(0, "Zero pixels around a training image before its random crop.")
    crop_size: int = setting(0, "Side of the crop, in the middle for test images; 0: image_size.")
    flip: bool = setting(False, "Mirror every second training image, at random.")
    validation_rows: int = setting(
        0, "Training rows kept aside, by class, to choose the best epoch with; 0: none.", later=True
    )
    synthetic: Synthetic = field(default_factory=Synthetic)

    def __post_init__(self) -> None:
        for name in ("train_rows", "validation_rows"):
            at_least(f"data.{name}", getattr(self, name), 0, "0 is the default")
        for name in ("image_size", "crop_padding", "crop_size"):
            at_least(f"data.{name}", getattr(self, name), 0, "0 is the default", MOST_SIDE)
        for name in ("train_part", "test_part", "image", "label", "skip_broken", "content"):
            # "" and false say what leaving it out does, and are to give the same id.
            object.__setattr__(self, name, getattr(self, name) or None)


@dataclass(frozen=True)
class Model:
    """The network."""

    name: str = setting(
        "mlp", "Name of the network (`churn-train models`), timm:NAME, or package.module:Name."
    )
    hidden: tuple[int, ...] = setting((64, 64), "Widths of the MLP's hidden layers.")
    dropout: float = setting(0.0, "Share of the units that dropout leaves out, in [0, 1).")
    options: dict[str, Any] = setting({}, "Further arguments of a timm network or of your own.")

    def __post_init__(self) -> None:
        at_least("the number of hidden layers", len(self.hidden), 0, "list fewer", 1000)
        for width in self.hidden:
            at_least("hidden", width, 1, "list the widths of the hidden layers")
        share("dropout", self.dropout, "0 leaves out none")


@dataclass(frozen=True)
class Optimisation:
    """SGD with momentum, v = momentum v + g, w = w - rate(t) v; or torch's AdamW."""

    epochs: int = setting(100, "Passes over the training rows.")
    go_on_from: tuple[int, ...] = setting(
        (),
        "Epochs after which a finished run is taken up, of otherwise the same settings; none: "
        "train from the start.",
        later=True,
    )
    batch_rows: int = setting(
        32, "Rows per minibatch, over all devices; an epoch's last is smaller."
    )
    drop_last: bool = setting(
        False, "Leave out an epoch's last minibatch where it is smaller.", later=True
    )
    accumulate: int = setting(
        1, "Parts of a minibatch, one after the other, whose gradients add up.", later=True
    )
    optimizer: str = setting("sgd", "Optimizer: sgd or adamw.", later=True)
    learning_rate: float = setting(0.02, "Step size, at its peak; for AdamW 0.001 is customary.")
    momentum: float = setting(0.9, "SGD: decay of the velocity, in [0, 1).")
    nesterov: bool = setting(False, "SGD: Nesterov's form of the momentum.")
    beta1: float = setting(
        0.9, "AdamW: decay of the gradients' running mean, in [0, 1).", later=True
    )
    beta2: float = setting(0.999, "AdamW: the same of their squares' mean, in [0, 1).", later=True)
    epsilon: float = setting(1e-8, "AdamW: what joins the root of the squares.", later=True)
    amsgrad: bool = setting(False, "AdamW: divide by the largest root so far.", later=True)
    weight_decay: float = setting(
        0.0,
        "This times the weights joins SGD's gradient (an L2 penalty); times the step size, too, "
        "AdamW takes it from the weights.",
    )
    clip_norm: float = setting(1.0, "Largest Euclidean norm of one model's gradient; 0: any.")
    schedule: str = setting("constant", "Step size over time: constant, step or cosine.")
    warmup_epochs: int = setting(0, "Epochs in which the step size rises linearly to its peak.")
    milestones: tuple[int, ...] = setting(
        (), "Schedule `step`: epochs at which the step size drops."
    )
    decay: float = setting(0.1, "Schedule `step`: what it is multiplied with at each of them.")
    reduction_mode: str = setting(
        "default", "Of the losses: fast, run_to_run, invariant, exact; default: the library's."
    )
    precision: str = setting(
        "32-true", "Lightning's word: 32-true, 64-true, bf16-mixed, bf16-true."
    )
    best: str = setting(
        "cross_entropy",
        "With validation rows, the epoch that is kept: lowest cross_entropy there, highest "
        "accuracy, or the last.",
        later=True,
    )

    def __post_init__(self) -> None:
        at_least("epochs", self.epochs, 1, "one epoch is one pass over the training rows", 10**6)
        for first, second in pairwise((0, *self.go_on_from, self.epochs)):
            if first >= second:
                raise ValueError(
                    f"go_on_from must rise from 1 and stay below epochs = {self.epochs}, got "
                    f"{list(self.go_on_from)}; raise epochs to how many there are to be in all"
                )
        at_least("batch_rows", self.batch_rows, 1, "32 is the default")
        at_least("accumulate", self.accumulate, 1, "1 takes a minibatch whole")
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        share("beta1", self.beta1, "0.9 is the default")
        share("beta2", self.beta2, "0.999 is the default")
        positive("epsilon", self.epsilon, "1e-8 is the default")
        one_of("best", self.best, ("cross_entropy", "accuracy", "last"))
        positive("learning_rate", self.learning_rate, "0.02 is the default")
        share("momentum", self.momentum, "0 is plain gradient descent")
        not_negative("weight_decay", self.weight_decay, "0 is none")
        not_negative("clip_norm", self.clip_norm, "0 leaves gradients as they are")
        one_of("schedule", self.schedule, SCHEDULES)
        at_least("warmup_epochs", self.warmup_epochs, 0, "0 is none")
        positive("decay", self.decay, "0.1 is the default")
        one_of("precision", self.precision, PRECISIONS)
        one_of("reduction_mode", self.reduction_mode, ("default", *MODES))
        self._check_largest_step()
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov must go with a momentum above 0, got 0; set momentum")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for optimizer, names in OPTIMIZERS.items():
            for name in names:
                if optimizer != self.optimizer and getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name} must be left at {defaults[name]} with {self.optimizer}, got "
                        f"{getattr(self, name)}; it is a setting of {optimizer}"
                    )

    def _check_largest_step(self) -> None:
        """Raises ValueError if what the optimizer computes from the step size is out of range."""
        drops = len(self.milestones) if self.schedule == "step" else 0
        largest = self.learning_rate * math.prod([max(1.0, self.decay)] * drops)
        settings = "learning_rate or decay"
        if self.optimizer == "adamw":  # whose first step is corrected for its mean's start at 0
            largest *= max(1.0, self.weight_decay, 1 / (1 - self.beta1))
            settings = "learning_rate, decay, weight_decay or beta1"
        at_most("the optimizer's largest step size", largest, LARGEST_NUMBER, f"lower {settings}")


@dataclass(frozen=True)
class Seeds:
    """One seed for each source of randomness: two runs that share one share what it draws."""

    split: int = setting(0, "Which rows train and which test.")
    initialisation: int = setting(0, "The models' first weights.")
    order: int = setting(0, "The order of the minibatches.")
    augmentation: int = setting(0, "Crops and flips.")
    dropout: int = setting(0, "Which units dropout leaves out.")

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            at_least(f"seeds.{entry.name}", getattr(self, entry.name), 0, "any from 0 will do")


SOURCES = tuple(entry.name for entry in dataclasses.fields(Seeds))[1:]
"""The sources of randomness beside the split."""


@dataclass(frozen=True)
class Run(Settings):
    """One training: the unit that is named, stored and never done twice."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    optimisation: Optimisation = field(default_factory=Optimisation)
    seeds: Seeds = field(default_factory=Seeds)
    repeat: int = setting(0, "Number of a repetition, to see what seeds do not fix.")

    def __post_init__(self) -> None:
        at_least("repeat", self.repeat, 0, "0 is the first")
        one_of("method.name", self.method.name, METHODS, "take the one it is made from")

    @property
    def id(self) -> str:
        """Data, model, method and the fingerprint of every setting: the name of its folder."""
        model = self.model.name.replace(":", "-").replace("/", "-")
        return f"{self.data.name}-{model}-{self.method.name}-{fingerprint(self)}"

    @property
    def mode(self) -> str | None:
        """The losses' `mode` argument; None: the library's default."""
        mode = self.optimisation.reduction_mode
        return None if mode == "default" else mode

    @property
    def together(self) -> str:
        """What two runs must share to be trained as one stack: every setting but the seeds."""
        return fingerprint(dataclasses.replace(self, seeds=Seeds()))

    @property
    def recipe(self) -> str:
        """What repetitions and runs of other seeds share: every other setting."""
        return dataclasses.replace(self, repeat=0).together

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of randomness that this run draws from: a seed that nothing reads is none."""
        draws = {
            "initialisation": True,
            "order": True,
            "augmentation": bool(self.data.crop_padding or self.data.crop_size or self.data.flip),
            "dropout": self.model.dropout > 0,
        }
        return tuple(source for source in SOURCES if draws[source])

    def earlier(self) -> Run | None:
        """The shorter run from whose end this one goes on, or None."""
        if not self.optimisation.go_on_from:
            return None
        *before, epochs = self.optimisation.go_on_from
        shorter = dataclasses.replace(self.optimisation, epochs=epochs, go_on_from=tuple(before))
        return dataclasses.replace(self, optimisation=shorter)

    def teacher(self) -> Run | None:
        """The run whose models teach this one, or None. Same data, model, recipe and seeds."""
        ensemble = self.method.teacher()
        return None if ensemble is None else dataclasses.replace(self, method=ensemble)

    def needs(self) -> list[Run]:
        """The runs that have to end before this one begins, each after those that it needs."""
        direct = [run for run in (self.earlier(), self.teacher()) if run is not None]
        return [needed for run in direct for needed in (*run.needs(), run)]


@dataclass(frozen=True)
class Variant:
    """One row of a study's table: a method, and what else is different for it."""

    method: Method = field(default_factory=Method)
    name: str = setting(
        "", "What `study --method`, tables and figures call it; the method's if left out."
    )
    changes: dict[str, Any] = setting(
        {}, "Tables of data, model or optimisation: what differs from the study's."
    )
    fixed: tuple[str, ...] = setting(
        (), "Sources of randomness that the runs of a split share: initialisation, order, ..."
    )

    @classmethod
    def named(cls, name: str) -> Variant:
        """The method of that name as it is. Raises: ValueError naming the nearest."""
        return cls(find_method(name))

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.method.name)
        for source in self.fixed:
            one_of(f"fixed of {self.name}", source, SOURCES)
        for table in self.changes:
            one_of(f"changes of {self.name}", table, ("data", "model", "optimisation"))


@dataclass(frozen=True)
class Study(Settings):
    """Methods x splits x runs on one data set; the first method is the one to compare with."""

    methods: tuple[Variant, ...] = ()
    title: str = setting("", "What the study is for, in one sentence.")
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimisation: Optimisation = field(default_factory=Optimisation)
    runs: int = setting(10, "Independent runs per split and method, at least 2.")
    splits: int = setting(8, "Random splits of the data into training and test rows.")
    seed: int = setting(0, "The one number all randomness follows from.")
    level: float = setting(0.95, "Coverage of the intervals, in (0, 1).")
    curve_points: int = setting(20, "How many times a training is measured on the test rows.")

    def __post_init__(self) -> None:
        at_least("runs", self.runs, 2, "churn compares runs")
        count = len(self.methods) * self.runs * self.splits
        if count > MOST_RUNS:
            raise ValueError(
                f"a study must have at most {MOST_RUNS} runs, got {shown(count)}: "
                f"{len(self.methods)} methods x {self.splits} splits x {self.runs} runs; lower one"
            )
        at_least("splits", self.splits, 1, "with one split the intervals are over runs alone")
        at_least("seed", self.seed, 0, "any whole number from 0 will do")
        at_least("curve_points", self.curve_points, 1, "the last point is the trained model")
        if not 0 < self.level < 1:
            raise ValueError(f"level must be in (0, 1), got {self.level}; 0.95 is customary")
        names = [variant.name for variant in self.methods]
        if len(set(names)) != len(names) or not names:
            raise ValueError(
                f"methods must name each method once and at least one, got {names}; "
                "drop what is there twice, or give each a name of its own"
            )
        for variant in self.methods:
            data = self.run(variant, 0, 0).data
            augmented = {
                name: getattr(data, name) for name in ("crop_padding", "crop_size", "flip")
            }
            if dataclasses.replace(self.data, **augmented) != data:
                raise ValueError(
                    f"changes of {variant.name} must leave the data set and its rows as they are, "
                    f"got {variant.changes['data']}; methods are compared on the same rows: make "
                    "it a study of its own"
                )

    def run(self, variant: Variant, split: int, run: int) -> Run:
        """The run of a method at a place; its seeds are the same for every method.

        Runs for which every source of randomness is fixed are repetitions of one another.
        """
        base = Run(self.data, self.model, variant.method, self.optimisation)
        changed = from_mapping(Run, variant.changes, f"changes of {variant.name}", base)
        seeds = {
            source: self.seed_for(Draw[source.upper()], split)
            if source in variant.fixed
            else self.seed_for(Draw[source.upper()], split, run)
            for source in SOURCES
        }
        return dataclasses.replace(
            changed,
            seeds=Seeds(self.seed_for(Draw.SPLIT, split), **seeds),
            # From 1: a repetition is in no stack with the run that it repeats.
            repeat=run + 1 if set(SOURCES) == set(variant.fixed) else 0,
        )

    def runs_of(self, variant: Variant) -> list[list[Run]]:
        """A method's runs, split by split."""
        return [
            [self.run(variant, split, run) for run in range(self.runs)]
            for split in range(self.splits)
        ]

    def own_names(self) -> dict[str, str]:
        """`Run.recipe` -> the name of a method that has one of its own.

        Of methods that differ only in what is fixed it is that with least fixed.
        """
        named: dict[str, Variant] = {}
        for variant in sorted(self.methods, key=lambda one: len(one.fixed)):
            named.setdefault(self.run(variant, 0, 0).recipe, variant)
        return {key: one.name for key, one in named.items() if one.name != one.method.name}

    def all_runs(self) -> list[Run]:
        """Every run of the study."""
        return [run for one in self.methods for runs in self.runs_of(one) for run in runs]

    def seed_for(self, draw: Draw, *where: int) -> int:
        """A 63-bit seed for one draw at a place (split, run), the same for every method."""
        return derive_seed(self.seed, int(draw), *where)


def measured_epochs(epochs: int, points: int) -> tuple[int, ...]:
    """`points` epochs (from 1), evenly spread, after which a training is measured; the last is one.

    Fewer where there are fewer epochs.
    """
    points = min(points, epochs)
    return tuple(round(epochs * point / points) for point in range(1, points + 1))
