"""The networks there are, by name; all map (B, *shape) inputs to (B, C) logits."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from churn_trainer.config import Model
from churn_trainer.models.networks import MLP, LeNet5, SmallCNN
from churn_trainer.models.resnet import resnet32, resnet56, resnet_v2_50
from churn_trainer.settings import nearest

Shape = tuple[int, ...]

NETWORKS: dict[str, tuple[str, Callable[[Model, Shape, int], nn.Module]]] = {
    "mlp": (
        "multilayer perceptron, hidden layers of model.hidden, ReLU",
        lambda model, shape, classes: MLP(shape, model.hidden, classes, model.dropout),
    ),
    "lenet5": (
        "LeNet-5 with ReLU, for images of 28 pixels and more (LeCun et al. 1998)",
        lambda model, shape, classes: LeNet5(shape, classes, model.dropout),
    ),
    "cnn": (
        "three 3 x 3 convolutions, global average; images of any size",
        lambda model, shape, classes: SmallCNN(shape, classes, model.dropout),
    ),
    "resnet32": (
        "[(5, 16, 1), (5, 32, 2), (5, 64, 2)], for CIFAR (He et al. 2015)",
        lambda model, shape, classes: resnet32(shape, classes),
    ),
    "resnet56": (
        "[(9, 16, 1), (9, 32, 2), (9, 64, 2)], for CIFAR (He et al. 2015)",
        lambda model, shape, classes: resnet56(shape, classes),
    ),
    "resnet-v2-50": (
        "[(3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)], for ImageNet (He et al. 2016)",
        lambda model, shape, classes: resnet_v2_50(shape, classes),
    ),
}
"""Name -> (what it is, how it is made)."""

TIMM = "timm:"
_TIMM_OPTIONS = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
    | {"num_classes", "in_chans"}
)
"""What a settings file may not say: where weights come from, and what follows from the data."""


def build_model(model: Model, shape: Shape, classes: int, trust: Sequence[str] = ()) -> nn.Module:
    """The network of that name, with weights from torch's global generator.

    Args:
        model: its settings.
        shape: of one input.
        classes: C.
        trust: packages whose code may be imported for `package.module:Name`. A settings file can
            name any; nothing is imported that the caller did not name here.
    Raises: ValueError for a name that is unknown or not trusted.
    """
    if model.name in NETWORKS:
        _refuse_options(model)
        network = NETWORKS[model.name][1](model, shape, classes)
    elif model.name.startswith(TIMM):
        network = _from_timm(model, shape, classes)
    elif ":" in model.name:
        network = _imported(model.name, trust)(shape, classes, **model.options)
    else:
        hint = nearest(model.name, NETWORKS) or "or timm:NAME, or package.module:Name"
        raise ValueError(
            f"model.name must be one of {', '.join(NETWORKS)}, got {model.name!r}; {hint}"
        )
    return network


def check_logits(name: str, network: nn.Module, shape: Shape, classes: int) -> None:
    """One pass over zeros, in evaluation, which changes neither weights nor statistics.

    Raises: ValueError unless the network maps (B, *shape) inputs to (B, classes) logits.
    """
    training = network.training
    try:
        with torch.no_grad():
            got = tuple(network.eval()(torch.zeros(2, *shape)).shape)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"model {name} must take inputs of shape {shape}, got: {error}; choose another model, "
            "or other images with data.image_size"
        ) from None
    finally:
        network.train(training)
    if got != (2, classes):
        raise ValueError(
            f"model {name} must map 2 inputs to logits (2, {classes}), got {got}; "
            f"give it {classes} outputs, one a class"
        )


def _refuse_options(model: Model) -> None:
    if model.options:
        raise ValueError(
            f"model.options must be empty for {model.name}, got {model.options}; "
            "they are for timm networks and your own"
        )


def _imported(name: str, trust: Sequence[str]) -> Callable[..., nn.Module]:
    module, _, attribute = name.partition(":")
    if not any(module == package or module.startswith(f"{package}.") for package in trust):
        package = module.partition(".")[0]
        raise ValueError(
            f"model.name {name!r} must be of a package that is trusted, got {list(trust)}; to run "
            f"its code, pass --trust {package} (trust=[{package!r}] in Python)"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model.name must be package.module:Name, got {name!r}: {error}; is it on the path?"
        ) from None


def _from_timm(model: Model, shape: Shape, classes: int) -> nn.Module:
    if taken := sorted(_TIMM_OPTIONS & set(model.options)):
        raise ValueError(
            f"model.options must leave weights, classes and channels to the trainer, got {taken}; "
            "drop them: a run starts from weights of its own seed"
        )
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise ValueError(
            f"model.name {model.name!r} needs timm, which is not installed; pip install timm"
        ) from None
    name = model.name.removeprefix(TIMM)
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models()) or "timm.list_models() has them all"
        raise ValueError(f"model.name must be a network of timm's, got {name!r}; {hint}")
    options: dict[str, Any] = {"drop_rate": model.dropout, **model.options}
    return timm.create_model(
        name, pretrained=False, num_classes=classes, in_chans=shape[0], **options
    )
