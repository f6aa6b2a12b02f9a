"""Converts the losses' scalar arguments to options, checked once for each distinct set."""

from functools import lru_cache
from typing import Any

import torch

from churn_kernels import _checks
from churn_kernels._options import (
    DISTILLATION,
    DIVERGENCES,
    REDUCTIONS,
    REGULARIZERS,
    LossOptions,
)

# Number of argument sets whose checked options are cached: a ramp adds one per step.
_CACHED_OPTIONS = 256


def options(build: Any, *arguments: Any) -> LossOptions:
    """`build(*arguments)`, from its cache if possible."""
    if not torch.compiler.is_compiling():  # the compiler traces through a cache, with a warning
        try:
            return build(*arguments)
        except TypeError:
            pass  # an unhashable argument is invalid: its check raises below
    return build.__wrapped__(*arguments)


@lru_cache(_CACHED_OPTIONS, typed=True)
def codistillation(
    alpha: float,
    beta: float,
    regularizer: str,
    top_k: int | None,
    renormalize_top_k: bool,
    divergence: str,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    reduction: str,
) -> LossOptions:
    alpha = _checks.option("alpha", alpha)
    return LossOptions(
        ce_weight=1.0 - alpha,
        regularizer_weight=alpha,
        divergence_weight=_checks.option("beta", beta),
        regularizer=REGULARIZERS[_checks.option("regularizer", regularizer)],
        top_k=_checks.option("top_k", top_k) or 0,
        renormalize_top_k=_checks.option("renormalize_top_k", renormalize_top_k),
        divergence=DIVERGENCES[_checks.option("divergence", divergence)],
        label_smoothing=_checks.option("label_smoothing", label_smoothing),
        ignore_index=_checks.option("ignore_index", ignore_index),
        temperature=_checks.option("temperature", temperature),
        reduction=REDUCTIONS[_checks.option("reduction", reduction)],
    )


@lru_cache(_CACHED_OPTIONS, typed=True)
def symmetric_kl(reduction: str) -> LossOptions:
    return LossOptions(
        ce_weight=0.0,
        divergence_weight=1.0,
        divergence=DIVERGENCES["skl"],
        reduction=REDUCTIONS[_checks.option("reduction", reduction)],
    )


@lru_cache(_CACHED_OPTIONS, typed=True)
def regularizer(
    regularizer: str, sign: float, top_k: int | None, renormalize_top_k: bool, reduction: str
) -> LossOptions:
    return LossOptions(
        ce_weight=0.0,
        regularizer_weight=sign,
        regularizer=REGULARIZERS[regularizer],
        top_k=_checks.option("top_k", top_k) or 0,
        renormalize_top_k=_checks.option("renormalize_top_k", renormalize_top_k),
        reduction=REDUCTIONS[_checks.option("reduction", reduction)],
    )


@lru_cache(_CACHED_OPTIONS, typed=True)
def distillation(
    alpha: float,
    teachers: int,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    reduction: str,
) -> LossOptions:
    alpha = _checks.share("alpha", alpha)  # 1 is allowed: the teachers alone are a training signal
    temperature = _checks.squared_temperature("temperature", temperature)
    return LossOptions(
        ce_weight=1.0 - alpha,
        divergence_weight=alpha * (temperature * temperature),
        divergence=DISTILLATION,
        teachers=teachers,
        label_smoothing=_checks.option("label_smoothing", label_smoothing),
        ignore_index=_checks.option("ignore_index", ignore_index),
        temperature=temperature,
        reduction=REDUCTIONS[_checks.option("reduction", reduction)],
    )
