"""A record of a GPU report with round numbers, which nobody measured."""

import json

HOST = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "python": "3.12.3",
}
EMPTY = {"entries": [], "left_out": []}


def pair(peer, ms, dtype="bfloat16", classes=1000, **result):
    """An entry of 1 GB in 1 ms, 1000 rows."""
    facts = {"group": "pair", "classes": classes, "dtype": dtype, "shape": f"1000x{classes}"}
    result = {"bytes": 10**9, "graph": True, "extra_bytes": 64_000, **result}
    return {**facts, "peer": peer, "ms": ms, **result}


def absent(entry, **why):
    return {key: entry[key] for key in ("group", "classes", "dtype", "shape", "peer")} | why


def synthetic(ours=0.5):
    """Ours takes `ours` ms, a copy 0.45, torch.compile 2.5, the invariant mode 0.51, exact 0.7."""
    entries = []
    for classes in (1000, 1_000_000):
        entries += [
            pair("copy", 0.45, classes=classes),
            pair("churn_kernels", ours, classes=classes),
            pair("churn_kernels run_to_run", ours, classes=classes),
            pair("churn_kernels invariant", 0.51, classes=classes),
            pair("churn_kernels exact", 0.7, classes=classes),
            pair("torch.compile", 2.5, classes=classes),
        ]
    slow = pair("Liger", 5.0, graph=False, extra_bytes=-1000, note="waits for the GPU")
    full = pair("eager", 0.0, classes=1_000_000)
    entries += [pair("eager", 9.0), slow, absent(full, failed="out of memory")]
    entries.append(
        absent(pair("Liger", 0.0, classes=1_000_000), absent="No module named 'liger_kernel'")
    )
    small = {"group": "overhead", "shape": "8x10"}
    entries += [
        {**small, "peer": "churn_kernels", "ms": 0.1},
        {**small, "peer": "F.cross_entropy", "ms": 0.05},
    ]
    facts = {"group": "hash", "dtype": "uint8", "shape": "200x1000"}
    entries += [
        {**facts, "peer": "churn_kernels", "ms": 0.5, "bytes": 10**9, "graph": False},
        {**facts, "peer": "copy", "ms": 0.4, "bytes": 10**9, "graph": True},
    ]
    return {
        "host": HOST,
        "stages": [
            {"name": "build", "status": "passed", "seconds": 30.4, "required": True, "output": ""},
            {
                "name": "tests",
                "status": "failed",
                "seconds": 60.0,
                "required": True,
                "output": "1 failed, 9 passed",
            },
        ],
        "parity": {
            "entries": [
                {
                    "check": "cpu",
                    "options": "pair",
                    "dtype": "float32",
                    "shape": "5x10",
                    "errors": {
                        kind: {"absolute": 2e-9, "relative": 3e-8}
                        for kind in ("loss", "terms", "gradient")
                    },
                    "passed": True,
                },
                {
                    "check": "replay",
                    "mode": "invariant",
                    "dtype": "float32",
                    "replays": 100,
                    "differing": 3,
                    "passed": False,
                },
            ],
            "left_out": [],
        },
        "churn": {
            "entries": [
                {
                    "group": "churn",
                    "mode": "fast",
                    "deterministic": False,
                    "accuracy": [0.9, 0.88, 0.92],
                    "churn": [0.037, 0.03, 0.044],
                    "identical": 1,
                    "pairs": 28,
                },
                {
                    "group": "why",
                    "verdict": "operator",
                    "operators": ["aten.mm.default"],
                    "parted": 3,
                    "pairs": 4,
                    "shares": [{"suspect": "exact mode", "share": [0.25, None, None]}],
                },
            ],
            "left_out": [],
        },
        "benchmarks": {"entries": entries, "left_out": ["variants l1", "variants ce"]},
    }


def saved(record, folder):
    folder.mkdir(parents=True)
    parts = {"report": {key: record[key] for key in ("host", "stages")}}
    parts |= {key: record[key] for key in ("parity", "churn", "benchmarks")}
    for name, content in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
