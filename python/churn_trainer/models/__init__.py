"""The networks there are, by name; all map (B, *shape) inputs to (B, C) logits."""

from __future__ import annotations

import functools
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

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
    Raises: ValueError for a name that is unknown or not trusted, and for what makes no network.
    """
    if model.name in NETWORKS:
        _refuse_options(model)
        return NETWORKS[model.name][1](model, shape, classes)
    if model.name.startswith(TIMM):
        return _from_timm(model, shape, classes)
    if ":" in model.name:
        make = _imported(model.name, trust)
        return _made(model.name, lambda: make(shape, classes, **model.options), shape)
    hint = nearest(model.name, NETWORKS) or "or timm:NAME, or package.module:Name"
    raise ValueError(f"model.name must be one of {', '.join(NETWORKS)}, got {model.name!r}; {hint}")


def count_weights(model: Model, shape: Shape, classes: int) -> float:
    """Numbers in a network of `NETWORKS`, without making them; 0 for what only making it tells."""
    if model.name not in NETWORKS:
        return 0
    try:
        with torch.device("meta"):
            network = build_model(model, shape, classes)
    except RuntimeError:  # more than can be counted
        return math.inf
    return sum(weight.numel() for weight in network.parameters())


def check_logits(
    name: str, network: nn.Module, shape: Shape, classes: int, fewest: int = 2
) -> None:
    """Passes over zeros, in evaluation and in training; they change no weight and no statistic.

    Args:
        name, network: of the model.
        shape, classes: of the data.
        fewest: rows of the training's smallest pass.
    Raises: ValueError unless the network maps (B, *shape) inputs to (B, classes) logits, has a
        weight to train, and takes as few rows in training.
    """
    if not any(weight.requires_grad for weight in network.parameters()):
        raise ValueError(
            f"model {name} must have weights that can be trained, got none; register them as "
            "parameters that require gradients"
        )
    try:
        results = [_pass(network, shape, training=training) for training in (False, True)]
    except Exception as error:  # of anybody's code
        raise ValueError(
            f"model {name} must take inputs of shape {shape}, got: {_reason(error)}; choose "
            "another model, or other images with data.image_size"
        ) from None
    for result in results:
        if not isinstance(result, Tensor):
            raise ValueError(
                f"model {name} must return one tensor, its logits (B, {classes}), in training and "
                f"in evaluation, got a {type(result).__name__}; return the logits alone"
            )
        if tuple(result.shape) != (2, classes):
            raise ValueError(
                f"model {name} must map 2 inputs to logits (2, {classes}), got "
                f"{tuple(result.shape)}; give it {classes} outputs, one a class"
            )
    if fewest < 2:
        try:
            _pass(network, shape, training=True, rows=1)
        except Exception as error:  # batch norm has no variance of one row
            raise ValueError(
                f"model {name} must train on a single row, which the last minibatch of an epoch or "
                f"a part of it comes to, got: {_reason(error)}; drop it with drop_last = true "
                "(--drop-last), change batch_rows, or lower accumulate"
            ) from None


def _pass(network: nn.Module, shape: Shape, training: bool, rows: int = 2) -> Any:
    """What the network makes of zeros, on copies of its statistics."""
    before = network.training
    copies = {name: values.clone() for name, values in network.named_buffers()}
    try:
        with torch.no_grad():
            return functional_call(network.train(training), copies, (torch.zeros(rows, *shape),))
    finally:
        network.train(before)


def _made(name: str, make: Callable[[], Any], shape: Shape) -> nn.Module:
    """The network that somebody's code makes. Raises: ValueError if it makes none."""
    try:
        doing = "make a network when called with shape and classes"
        network = make()
        if isinstance(network, nn.Module) and any(map(is_lazy, network.parameters())):
            doing = f"take inputs of shape {(2, *shape)}"
            with torch.no_grad():  # the first pass makes the weights
                network.eval()(torch.zeros(2, *shape))
            network.train()
    except (Exception, SystemExit) as error:  # of anybody's code
        raise ValueError(
            f"model {name} must {doing}, got: {_reason(error)}; correct it there, or model.options"
        ) from None
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"model {name} must make a torch.nn.Module, got a {type(network).__name__}; name a "
            "class, or a function that returns one"
        )
    return network


def _reason(error: BaseException) -> str:
    """What was raised, in one line, and where in somebody's own code."""
    frames = [
        f"{Path(frame.filename).name}, line {frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "site-packages" not in frame.filename
    ]
    said = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"{said} ({frames[-1]})" if frames else said


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
            f"model.name {name!r} must be of a package that is trusted, got "
            f"{', '.join(trust) or 'no --trust'}; to run its code, pass --trust {package} "
            f"(trust=[{package!r}] in Python)"
        )
    folder = os.getcwd()  # as for `python -m`, and for `churn-audit run`
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        made = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(
            f"model.name must be package.module:Name, got {name!r}: {error}; is it on the path, or "
            f"in {folder}?"
        ) from None
    except AttributeError as error:
        raise ValueError(
            f"model.name must be package.module:Name, got {name!r}: {error}; correct the name, or "
            f"define it there"
        ) from None
    except (Exception, SystemExit) as error:  # of anybody's code
        raise ValueError(
            f"model.name must be package.module:Name, got {name!r}: {_reason(error)}; correct the "
            "module"
        ) from None
    if not callable(made):
        raise ValueError(
            f"model.name must name a class or a function, got {name!r}, a {type(made).__name__}; "
            "name what makes the network"
        )
    return made


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
    make = functools.partial(timm.create_model, name, pretrained=False, num_classes=classes)
    return _made(model.name, lambda: make(in_chans=shape[0], **options), shape)
