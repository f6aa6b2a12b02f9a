"""Named cases: the option sets of `codistillation_loss` and inputs that the tests share."""

import torch

# name: keyword arguments of codistillation_loss
OPTIONS = {
    "default": {},
    "entropy": {"alpha": 0.3},
    "uniform_skl": {"alpha": 0.01, "regularizer": "uniform_skl"},
    "entropy_top3": {"alpha": 0.3, "top_k": 3},
    "entropy_top3_raw": {"alpha": 0.3, "top_k": 3, "renormalize_top_k": False},
    "uniform_skl_top3": {"alpha": 0.01, "regularizer": "uniform_skl", "top_k": 3},
    "uniform_skl_top3_raw": {
        "alpha": 0.01,
        "regularizer": "uniform_skl",
        "top_k": 3,
        "renormalize_top_k": False,
    },
    "l1": {"divergence": "l1", "beta": 0.7},
    "ce": {"divergence": "ce", "beta": 0.7},
    "skl_temperature": {"beta": 2.0, "temperature": 3.0},
    "l1_temperature": {"divergence": "l1", "temperature": 0.5},
    "ce_temperature": {"divergence": "ce", "temperature": 3.0},
    "no_divergence": {"beta": 0.0, "alpha": 0.2},
    "label_smoothing": {"label_smoothing": 0.1},
    "class_weight": {"class_weight": True},
    "everything": {
        "alpha": 0.2,
        "beta": 1.5,
        "top_k": 4,
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "class_weight": True,
    },
}

IGNORED = -100


def options(name, dtype=torch.float32, classes=7):
    """The keyword arguments of a named case, with class weights for so many classes where asked."""
    chosen = dict(OPTIONS[name])
    if chosen.pop("class_weight", False):
        weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        chosen["class_weight"] = torch.linspace(0.5, 2.0, classes, dtype=weight_dtype)
    return chosen


def batch(rows=5, classes=7, models=2, dtype=torch.float32, seed=0, ignore=True, scale=2.0):
    """Logits of K models, leaves that want a gradient, and a target whose second row is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = [
        (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for _ in range(models)
    ]
    target = torch.randint(0, classes, (rows,), generator=generator)
    if ignore and rows > 1:
        target[1] = IGNORED
    return logits, target
