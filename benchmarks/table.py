"""What `make bench` measured, as Markdown: `python -m benchmarks.table [JSON] [--save NAME]`.

Reads the JSON of pytest-benchmark, or a record saved before. `--save NAME` writes what the tables
are made of to benchmarks/results/cpu/NAME.json.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cpu"

OURS, COPY, COMPILED, EAGER = "churn_kernels", "copy", "torch.compile", "eager"
CROSS_ENTROPY, CONTROL = "F.cross_entropy", "gradients alone"

SPEEDUP_OVER_EAGER = 50.0
SPEEDUP_OVER_COMPILED = 20.0
TIME_OF_COPY = 2.5
TIME_OF_CROSS_ENTROPY = 2.5
BYTES_A_ROW = 128.0


def cases(record: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """The cases of a group: what each recorded about itself, with its median in milliseconds."""
    return [
        {**case["extra_info"], "ms": 1e3 * case["stats"]["median"]}
        for case in record["benchmarks"]
        if case["group"] == group
    ]


def medians(found: Iterable[dict[str, Any]], row: str) -> dict[str, dict[str, float]]:
    """Milliseconds by the field `row`, then by peer."""
    table: dict[str, dict[str, float]] = {}
    for case in found:
        table.setdefault(case[row], {})[case["peer"]] = case["ms"]
    return table


def markdown(title: str, header: list[str], rows: Iterable[list[str]]) -> str:
    """A table whose columns, but for the first, hold numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join([f"## {title}", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def verdict(what: str, value: float, bound: float, unit: str, at_least: bool) -> list[str]:
    met = value >= bound if at_least else value <= bound
    sign = "≥" if at_least else "≤"
    return [what, f"{sign} {bound:g}{unit}", f"{value:.3g}{unit}", "met" if met else "**missed**"]


def pair_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """The loss of a pair at each shape, and its targets: geometric means over the shapes."""
    table = medians(cases(record, "pair"), "shape")
    ratios = {
        "x faster than eager": [t[EAGER] / t[OURS] for t in table.values()],
        "x faster than torch.compile": [t[COMPILED] / t[OURS] for t in table.values()],
        "time / copy": [t[OURS] / t[COPY] for t in table.values()],
    }
    peers = [OURS, COPY, COMPILED, EAGER]
    rows = [
        [shape, *(f"{t[peer]:.3g}" for peer in peers), *(f"{r[i]:.3g}" for r in ratios.values())]
        for i, (shape, t) in enumerate(table.items())
    ]
    eager, compiled, copy = map(geometric_mean, ratios.values())
    rows.append(
        ["geometric mean", *[""] * len(peers), *(f"{g:.3g}" for g in (eager, compiled, copy))]
    )
    title = "CE + entropy + SKL of a pair, float32, forward + backward, ms"
    return markdown(title, ["N x C", *peers, *ratios], rows), [
        verdict("speed over eager", eager, SPEEDUP_OVER_EAGER, "x", True),
        verdict("speed over torch.compile", compiled, SPEEDUP_OVER_COMPILED, "x", True),
        verdict("time over a copy of the same bytes", copy, TIME_OF_COPY, "x", False),
    ]


def variants_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    found = cases(record, "variants")
    rows = [
        [name, f"{t[OURS]:.3g}", f"{t[COPY]:.3g}", f"{t[OURS] / t[COPY]:.3g}"]
        for name, t in medians(found, "variant").items()
    ]
    title = f"Variants at {found[0]['shape']}, forward + backward, ms"
    return markdown(title, ["variant", OURS, "copy of its bytes", "time / copy"], rows), []


def overhead_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A batch so small that the time is what a call costs."""
    rows, targets = [], []
    for shape, t in medians(cases(record, "overhead"), "shape").items():
        ratio = t[OURS] / t[CROSS_ENTROPY]
        rows.append([shape, *(f"{1e3 * t[p]:.3g}" for p in (OURS, CROSS_ENTROPY)), f"{ratio:.3g}"])
        what = "host overhead over one F.cross_entropy"
        targets.append(verdict(what, ratio, TIME_OF_CROSS_ENTROPY, "x", False))
    header = ["N x C", f"{OURS}, a pair", f"{CROSS_ENTROPY}, one", "ratio"]
    return markdown("Host overhead, forward + backward, us", header, rows), targets


def memory_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Bytes a row beyond what the control, gradients and nothing else, was measured to take."""
    extra = {case["peer"]: case["extra_bytes"] for case in cases(record, "memory")}
    control = extra.pop(CONTROL)
    rows, ours = [], []
    for shape, error in control.items():
        a_row = {p: (by[shape] - error) / int(shape.split("x")[0]) for p, by in extra.items()}
        rows.append([shape, *(f"{bytes_:.4g}" for bytes_ in a_row.values())])
        ours.append(a_row[OURS])
    title = "Peak memory beyond inputs and gradients, bytes a row"
    return markdown(title, ["N x C", *extra], rows), [
        verdict("memory, worst shape", max(ours), BYTES_A_ROW, " bytes a row", False)
    ]


def machine_line(record: dict[str, Any]) -> str:
    machine, commit = record["machine_info"], record["commit_info"]
    cpu = machine["cpu"]
    changed = " with changes" if commit.get("dirty") else ""
    return (
        f"{cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} cores, "
        f"{machine['threads']} threads, {machine['cpu_isa']}; torch {machine['torch']}, "
        f"Python {machine['python_version']}, {machine['system']}; "
        f"commit {commit['id'][:12]}{changed}; {record['datetime'][:10]}"
    )


SECTIONS = {
    "pair": pair_section,
    "variants": variants_section,
    "overhead": overhead_section,
    "memory": memory_section,
}


def report(record: dict[str, Any]) -> str:
    """Every table whose group was run, and the targets that follow from them."""
    groups = {case["group"] for case in record["benchmarks"]}
    sections, targets = [], []
    for group, section in SECTIONS.items():
        if group in groups:
            text, verdicts = section(record)
            sections.append(text)
            targets += verdicts
    header = ["target", "wanted", "measured", ""]
    return "\n".join([machine_line(record), "", *sections, markdown("Targets", header, targets)])


def essentials(record: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps: no raw timings, no list of the CPU's features."""
    machine = dict(record["machine_info"])
    machine["cpu"] = {key: machine["cpu"].get(key) for key in ("brand_raw", "arch", "count")}
    statistics = ("median", "iqr", "min", "max", "rounds", "iterations")
    return {
        "datetime": record["datetime"],
        "machine_info": machine,
        "commit_info": {key: record["commit_info"].get(key) for key in ("id", "time", "dirty")},
        "benchmarks": [
            {
                "group": case["group"],
                "extra_info": case["extra_info"],
                "stats": {key: case["stats"][key] for key in statistics},
            }
            for case in record["benchmarks"]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", nargs="?", type=Path, default=Path("out/benchmarks.json"))
    parser.add_argument("--save", metavar="NAME", help=f"keep the record in {RESULTS.name}/")
    arguments = parser.parse_args()
    record = json.loads(arguments.json.read_text())
    print(report(record))
    if arguments.save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{arguments.save}.json"
        path.write_text(json.dumps(essentials(record), indent=1) + "\n")


if __name__ == "__main__":
    main()
