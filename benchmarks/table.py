"""The results of `make bench` as Markdown: `python -m benchmarks.table [JSON] [--save NAME]`.

Reads the JSON of pytest-benchmark, or a saved record. `--save NAME` writes the data of the tables
to benchmarks/results/cpu/NAME.json.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cpu"

OURS, COPY, COMPILED, EAGER = "churn_kernels", "copy", "torch.compile", "eager"
CROSS_ENTROPY, ROUNDED_SUM, CONTROL = "F.cross_entropy", "torch.sum", "gradients alone"

SPEEDUP_OVER_EAGER = 50.0
SPEEDUP_OVER_COMPILED = 20.0
TIME_OF_COPY = 2.5
TIME_OF_CROSS_ENTROPY = 2.5
BYTES_A_ROW = 128.0
SHARE_OF_LOSS = 3.0
TRAINER_OVER_BARE = 5.0
LARGEST_HASH, SHARE_OF_COPY = "200,000,000", 50.0
SHARE_OF_STEP = 2.0


def cases(record: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """The cases of a group: the extra info of each, with its median in milliseconds."""
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


def table_lines(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A table in which all columns but the first hold numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def markdown(title: str, header: list[str], rows: Iterable[list[str]]) -> str:
    """A section with a table."""
    return "\n".join([f"## {title}", "", *table_lines(header, rows), ""])


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def verdict(what: str, value: float, bound: float, unit: str, at_least: bool = False) -> list[str]:
    met = value >= bound if at_least else value <= bound
    sign = "≥" if at_least else "≤"
    return [
        what,
        f"{sign} {bound:g}{unit}",
        f"{number(value)}{unit}",
        "met" if met else "**missed**",
    ]


def pair_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """The loss of a pair at each shape, and its targets: geometric means over the shapes."""
    table = medians(cases(record, "pair"), "shape")
    ratios = {
        "eager / ours": [t[EAGER] / t[OURS] for t in table.values()],
        "compile / ours": [t[COMPILED] / t[OURS] for t in table.values()],
        "ours / copy": [t[OURS] / t[COPY] for t in table.values()],
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
    text = markdown(title, ["N x C", *peers, *ratios], rows) + (
        f"\nThe copy itself: {eager * copy:.3g}x faster than eager, "
        f"{compiled * copy:.3g}x faster than torch.compile.\n"
    )
    return text, [
        verdict("speed over eager", eager, SPEEDUP_OVER_EAGER, "x", at_least=True),
        verdict("speed over torch.compile", compiled, SPEEDUP_OVER_COMPILED, "x", at_least=True),
        verdict("time over a copy of the same bytes", copy, TIME_OF_COPY, "x"),
    ]


def variants_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    found = cases(record, "variants")
    rows = [
        [name, f"{t[OURS]:.3g}", f"{t[COPY]:.3g}", f"{t[OURS] / t[COPY]:.3g}"]
        for name, t in medians(found, "variant").items()
    ]
    title = f"Variants at {found[0]['shape']}, forward + backward, ms"
    return markdown(title, ["variant", OURS, "copy of its bytes", "ours / copy"], rows), []


def overhead_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A batch so small that the time is the overhead of a call."""
    rows, targets = [], []
    for shape, t in medians(cases(record, "overhead"), "shape").items():
        ratio = t[OURS] / t[CROSS_ENTROPY]
        rows.append([shape, *(f"{1e3 * t[p]:.3g}" for p in (OURS, CROSS_ENTROPY)), f"{ratio:.3g}"])
        what = "host overhead over one F.cross_entropy"
        targets.append(verdict(what, ratio, TIME_OF_CROSS_ENTROPY, "x"))
    header = ["N x C", f"{OURS}, a pair", f"{CROSS_ENTROPY}, one", "ratio"]
    return markdown("Host overhead, forward + backward, us", header, rows), targets


def exact_sum_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """An exact sum against a copy of its numbers and an ordinary floating-point sum."""
    table = medians(cases(record, "exact sum"), "shape")
    peers = [OURS, ROUNDED_SUM, COPY]
    rows = [
        [shape, *(f"{1e3 * t[peer]:.3g}" for peer in peers), f"{t[OURS] / t[ROUNDED_SUM]:.2g}"]
        for shape, t in table.items()
    ]
    header = ["float32 numbers", *peers, f"ours / {ROUNDED_SUM}"]
    return markdown("Exact sum, microseconds", header, rows), []


def hash_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Hashes against copies of as many bytes, which also write them."""
    rows, targets = [], []
    for shape, t in medians(cases(record, "hash"), "shape").items():
        share = 100 * t[COPY] / t[OURS]
        rows.append([shape, *(f"{1e3 * t[peer]:.3g}" for peer in (OURS, COPY)), f"{share:.3g}"])
        if shape.startswith(LARGEST_HASH):
            what = f"speed of a hash, {shape}"
            targets.append(verdict(what, share, SHARE_OF_COPY, " % of a copy", at_least=True))
    header = ["bytes, dtype", OURS, COPY, "% of the copy's speed"]
    return markdown("Hash, microseconds", header, rows), targets


def recording_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """The cost of recording relative to a training step."""
    rows, targets = [], []
    for size, t in medians(cases(record, "recording"), "shape").items():
        share = 100 * t["recording"] / t["step"]
        rows.append([size, *(f"{t[peer]:.3g}" for peer in ("step", "recording")), f"{share:.2g}"])
        what = f"recording, share of a training step of {size} images"
        targets.append(verdict(what, share, SHARE_OF_STEP, " %", at_least=False))
    header = ["images", "step", "recording", "%"]
    return markdown("Recording a step of ResNet-56, ms", header, rows), targets


def memory_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Peak bytes per row beyond inputs and gradients, and those kept after these are freed."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases(record, "memory"):
        rows = int(case["shape"].split("x")[0])
        a_row = {what: size / rows for what, size in case["bytes"].items()}
        table.setdefault(case["shape"], {})[case["peer"]] = a_row
    peers = [OURS, COMPILED, EAGER, CONTROL]
    lines = [
        [shape, *(f"{t[peer]['peak']:,.0f}" for peer in peers), f"{t[OURS]['kept']:,.0f}"]
        for shape, t in table.items()
    ]
    title = "Peak memory beyond inputs and gradients, bytes per row"
    header = ["N x C", *peers, f"{OURS} keeps between steps"]
    return markdown(title, header, lines), [
        verdict(
            f"memory beyond inputs and gradients, {shape}",
            t[OURS]["peak"],
            BYTES_A_ROW,
            " bytes per row",
        )
        for shape, t in table.items()
    ]


def trainer_section(record: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A step of the trainer, and its loss and metrics, against a step of the bare loop."""
    rows, targets = [], []
    for case in record["benchmarks"]:
        if case["group"] != "trainer":
            continue
        info, ours = case["extra_info"], 1e3 * case["stats"]["median"]
        models, (bare, loss) = info["models"], (info["ms"][name] for name in ("bare", "loss"))
        share, over = 100 * loss / bare, 100 * (ours / bare - 1)
        rows.append([f"{models} x {info['rows']}", *map(number, (ours, bare, loss, over, share))])
        name = f"{models} model{'s' * (models > 1)}"
        targets += [
            verdict(f"trainer step over a bare step, {name}", over, TRAINER_OVER_BARE, " %"),
            verdict(f"loss and metrics, share of a bare step, {name}", share, SHARE_OF_LOSS, " %"),
        ]
    header = ["models x rows", "trainer", "bare loop", "loss and metrics", "over bare, %"]
    title = "A training step of ResNet-56, CPU time of one thread, ms"
    return markdown(title, [*header, "loss of bare, %"], rows), targets


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
    "exact sum": exact_sum_section,
    "hash": hash_section,
    "recording": recording_section,
    "memory": memory_section,
    "trainer": trainer_section,
}


def report(record: dict[str, Any]) -> str:
    """Every table whose group was run, and the resulting targets."""
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
    """The record to save, without raw timings and the list of CPU features."""
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
    parser.add_argument("--save", metavar="NAME", help="keep a record of this name, or path")
    arguments = parser.parse_args()
    record = json.loads(arguments.json.read_text())
    print(report(record))
    if arguments.save:
        path = (RESULTS / arguments.save).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(essentials(record), indent=1) + "\n")


if __name__ == "__main__":
    main()
