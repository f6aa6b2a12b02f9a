"""The golden vectors of exact mode: inputs, loss, terms and gradients, as hex in tests/golden/.

`python tests/golden_vectors.py` writes the file of the current EXACT_SPEC, once: bits that move
take a new number (kExactSpec in csrc/rows/constants.h), and the old file stays as the record of
what was. The inputs are in the file; the seed only says where they came from.
"""

import json
import random
import struct
import sys
from pathlib import Path

import torch

import churn_kernels as ck
from churn_kernels import _autograd, _backend
from churn_kernels._options import LossOptions

FOLDER = Path(__file__).parent / "golden"
EXACT = LossOptions(0.9, 0.1, 1.5, regularizer=1, divergence=1, mode=3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = {
    "pair": (EXACT, 2, 37, "float32"),
    "pair_of_odd_width": (EXACT, 2, 1001, "float32"),
    "bfloat16": (EXACT, 2, 64, "bfloat16"),
    "float16": (EXACT._replace(reduction=2), 2, 33, "float16"),
    "three_models": (EXACT._replace(divergence=2, regularizer=2), 3, 19, "float32"),
    "top_k": (EXACT._replace(top_k=5), 2, 41, "float32"),
    "top_k_unnormalised": (
        EXACT._replace(top_k=5, renormalize_top_k=False, regularizer=2), 1, 41, "float32",
    ),
    "l1_with_temperature": (EXACT._replace(divergence=3, temperature=2.5), 2, 23, "bfloat16"),
    "label_smoothing": (EXACT._replace(label_smoothing=0.1, regularizer=2), 2, 29, "float32"),
    "distillation": (
        LossOptions(0.5, 0.0, 4.5, divergence=4, teachers=2, temperature=3.0, mode=3), 3, 31,
        "float32",
    ),
    "rows": (EXACT._replace(reduction=0), 2, 10, "float32"),
    "far_apart": (EXACT._replace(regularizer=2), 2, 47, "float32"),
    "equally_sure": (EXACT._replace(temperature=1.5), 2, 26, "float32"),
}  # fmt: skip
ROWS = 4


def path(spec: int) -> Path:
    return FOLDER / f"spec_{spec}.json"


def inputs(name: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """Logits, target and class weights, from a generator that no release of a library changes."""
    options, models, classes, dtype = CASES[name]
    draw = random.Random(name)
    scale = 400.0 if name == "far_apart" else 4.0
    logits = [
        torch.tensor(
            [[draw.gauss(0.0, scale) for _ in range(classes)] for _ in range(ROWS)]
        ).to(DTYPES[dtype])
        for _ in range(models)
    ]  # fmt: skip
    if name == "far_apart":
        for z in logits:
            z[1, 3] = -float("inf")
            z[2, 5] = torch.finfo(z.dtype).min
    if name == "equally_sure":
        for z in logits:
            z[:, 7] = z.max() + 25.0
    target = torch.tensor([draw.randrange(classes) for _ in range(ROWS)])
    target[2] = options.ignore_index
    weighted = options.label_smoothing > 0
    weight = torch.tensor([draw.random() for _ in range(classes)]) if weighted else None
    return logits, target, weight


def to_hex(tensor: torch.Tensor) -> str:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


def from_hex(text: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype).reshape(shape)


def results(
    logits: list[torch.Tensor],
    target: torch.Tensor,
    weight: torch.Tensor | None,
    options: LossOptions,
    backend: str,
) -> dict[str, str]:
    """Loss, terms, gradients, as hex."""
    leaves = [z.detach().requires_grad_() for z in logits]
    ops = _backend._OPS[backend]
    loss, terms = _autograd.evaluate(ops, leaves, target, weight, options, True)
    students = leaves[: len(leaves) - options.teachers]
    upstream = torch.full_like(loss, 0.75)
    gradients = torch.autograd.grad(loss, students, upstream)
    found = {"loss": to_hex(loss), "terms": to_hex(terms)}
    return found | {f"gradient_{k}": to_hex(g) for k, g in enumerate(gradients)}


def record(name: str) -> dict[str, object]:
    options, _, classes, dtype = CASES[name]
    logits, target, weight = inputs(name)
    return {
        "seed": name,
        "options": options._asdict(),
        "dtype": dtype,
        "rows": ROWS,
        "classes": classes,
        "logits": [to_hex(z) for z in logits],
        "target": target.tolist(),
        "class_weight": None if weight is None else to_hex(weight),
        "results": results(logits, target, weight, options, "cpu"),
    }


def sums() -> list[dict[str, object]]:
    """Numbers and their exact sums."""
    draw = random.Random("sums")
    found: list[dict[str, object]] = []
    for size in (0, 1, 7, 300):
        x = torch.tensor(
            [draw.gauss(0.0, 1.0) * 2.0 ** draw.randint(-140, 100) for _ in range(size)]
        )
        total = ck.ExactSum().add(x)
        found.append(
            {
                "numbers": to_hex(x),
                "float32": to_hex(ck.exact_sum(x).reshape(1)),
                "float64": struct.pack("<d", total.value()).hex(),
                "bytes": total.to_bytes().hex(),
            }
        )
    return found


def main() -> int:
    file = path(ck.EXACT_SPEC)
    if file.exists():
        print(
            f"{file.name} is there already: bits that move take a new kExactSpec", file=sys.stderr
        )
        return 1
    content = {
        "spec": ck.EXACT_SPEC,
        "losses": {name: record(name) for name in CASES},
        "sums": sums(),
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(file.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
