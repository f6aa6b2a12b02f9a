"""A GPU report as a Markdown page: `python -m benchmarks.gpu.table FOLDER [--keep]`.

Reads the JSON files that `make gpu-report` wrote to FOLDER. `--keep` copies them, with the page, to
benchmarks/results/<gpu>/.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.gpu.host import slug
from benchmarks.table import (
    BYTES_A_ROW,
    COMPILED,
    COPY,
    CROSS_ENTROPY,
    EAGER,
    OURS,
    TIME_OF_CROSS_ENTROPY,
    markdown,
    number,
    verdict,
)

RESULTS = Path(__file__).parents[1] / "results"
REPORT, PARITY, CHURN = "report.json", "parity.json", "churn.json"
BENCHMARKS, PAGE = "benchmarks.json", "report.md"
PARTS = {"parity": PARITY, "churn": CHURN, "benchmarks": BENCHMARKS}
RECORDS = (REPORT, *PARTS.values())

AUTOTUNED = "torch.compile max-autotune"
LIGER, QUACK, LIGER_JSD = "Liger", "QuACK", "Liger JSD"
MODES = ("run_to_run", "invariant", "exact")

# Minimum share of the copy's bandwidth, in percent, up to this many classes and beyond.
SHARE, SHARE_BEYOND, SHARE_CLASSES = 85.0, 60.0, 128256
SHARE_OF_HASH = 50.0
SPEEDUP_OVER_COMPILED = 4.0
SPEEDUP_OVER_LIGER = 5.0
TIME_OF_FAST = 1.05
TIME_OF_FAST_EXACT = {"float32": 1.4, "bfloat16": 2.5}

Entry = dict[str, Any]
Table = dict[tuple[str, ...], dict[str, Entry]]

BY_EVENTS = "*"
EVENTS_NOTE = (
    f"\n{BY_EVENTS} timed between events, since it cannot be captured in a CUDA graph; all others "
    f"are replays of one.\n"
)


def load(folder: Path) -> dict[str, Any]:
    """The contents of a folder; a part that was not reached is empty."""
    empty = {"entries": [], "left_out": []}
    record = json.loads((folder / REPORT).read_text())
    for name, file in PARTS.items():
        path = folder / file
        record[name] = json.loads(path.read_text()) if path.exists() else empty
    return record


def grouped(entries: Iterable[Entry], group: str, *row: str) -> Table:
    """Entries of a group by the fields that name a row of its table, then by peer."""
    table: Table = {}
    for entry in entries:
        if entry.get("group") == group:
            table.setdefault(tuple(str(entry[field]) for field in row), {})[entry["peer"]] = entry
    return table


def measured(entry: Entry | None) -> bool:
    return entry is not None and "ms" in entry


def cell(entry: Entry | None, value: Callable[[Entry], float] = lambda entry: entry["ms"]) -> str:
    """A number of an entry, or the reason why there is none."""
    if entry is None:
        return "not run"
    if "absent" in entry:
        return "not importable"
    if "failed" in entry:
        return "out of memory" if entry["failed"] == "out of memory" else "failed"
    mark = "" if entry.get("graph", True) else BY_EVENTS
    return f"{number(value(entry))}{mark}"


def ratio(slow: Entry | None, fast: Entry | None) -> float | None:
    """Ratio of two times, if both were measured."""
    return slow["ms"] / fast["ms"] if measured(slow) and measured(fast) else None


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def speed(entry: Entry) -> float:
    """GB/s: the bytes that have to move over the time."""
    return entry["bytes"] / entry["ms"] / 1e6


def share_of_copy(row: dict[str, Entry]) -> float | None:
    found = ratio(row.get(COPY), row.get(OURS))
    return None if found is None else 100 * found


def extra_bytes_a_row(entry: Entry) -> float:
    return entry["extra_bytes"] / int(entry["shape"].split("x")[0])


def memory_cell(entry: Entry | None) -> str:
    if measured(entry) and "extra_bytes" not in entry:
        return "not run"  # only measured on a GPU
    return cell(entry, extra_bytes_a_row).removesuffix(BY_EVENTS)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def pair_table(entries: list[Entry]) -> Table:
    return grouped(entries, "pair", "dtype", "shape")


def pair_section(entries: list[Entry]) -> tuple[str, list[list[str]]]:
    """The loss of a pair, against a copy of its bytes and against every peer."""
    table = pair_table(entries)
    peers = (COMPILED, AUTOTUNED, EAGER, LIGER)
    header = ["logits", "N x C", OURS, "GB/s", "% of copy", COPY, *peers]
    header += [f"{peer} / ours" for peer in peers]
    lines, targets = [], []
    for (dtype, shape), row in table.items():
        ours = row.get(OURS)
        lines.append(
            [dtype, shape, cell(ours), cell(ours, speed), percent(share_of_copy(row))]
            + [cell(row.get(peer)) for peer in (COPY, *peers)]
            + [times(ratio(row.get(peer), ours)) for peer in peers]
        )
        share, classes = share_of_copy(row), int(shape.split("x")[1])
        if share is not None:
            bound = SHARE if classes <= SHARE_CLASSES else SHARE_BEYOND
            what = f"bandwidth of the copy's, {dtype}, {classes} classes"
            targets.append(verdict(what, share, bound, " %", at_least=True))
    bounds = {
        COMPILED: SPEEDUP_OVER_COMPILED,
        AUTOTUNED: SPEEDUP_OVER_COMPILED,
        LIGER: SPEEDUP_OVER_LIGER,
    }
    for peer, bound in bounds.items():
        found = [ratio(row.get(peer), row.get(OURS)) for row in table.values()]
        ratios = [value for value in found if value is not None]
        if ratios:
            what = f"speed over {peer}, geometric mean of {len(ratios)} of {len(table)} shapes"
            targets.append(verdict(what, geometric_mean(ratios), bound, "x", at_least=True))
    title = "CE + entropy + SKL of a pair, forward + gradients of both, ms"
    return markdown(title, header, lines) + EVENTS_NOTE, targets


def modes_section(entries: list[Entry]) -> tuple[str, list[list[str]]]:
    """Cost of the stronger reduction modes, on the same input sets as the default."""
    table = pair_table(entries)
    found = {
        mode: [ratio(row.get(f"{OURS} {mode}"), row.get(OURS)) for row in table.values()]
        for mode in MODES
    }
    lines = [
        [dtype, shape, cell(row.get(OURS))]
        + [cell(row.get(f"{OURS} {mode}")) for mode in MODES]
        + [times(ratios[i]) for ratios in found.values()]
        for i, ((dtype, shape), row) in enumerate(table.items())
    ]
    targets = []
    for mode in MODES:
        limits = TIME_OF_FAST_EXACT if mode == "exact" else {"": TIME_OF_FAST}
        for only, limit in limits.items():
            known = [
                value
                for (dtype, _), value in zip(table, found[mode], strict=True)
                if value is not None and only in ("", dtype)
            ]
            if known:
                what = f"time of {mode} over fast, {only}{', ' if only else ''}largest"
                targets.append(verdict(what, max(known), limit, "x", at_least=False))
    header = ["logits", "N x C", "fast", *MODES, *(f"{mode} / fast" for mode in MODES)]
    return markdown("Reduction modes, ms", header, lines), targets


def memory_section(entries: list[Entry]) -> tuple[str, list[list[str]]]:
    """Peak memory of a step beyond its inputs and gradients."""
    table, peers = pair_table(entries), (OURS, COMPILED, EAGER, LIGER)
    lines = [
        [dtype, shape] + [memory_cell(row.get(peer)) for peer in peers]
        for (dtype, shape), row in table.items()
    ]
    ours = [row[OURS] for row in table.values() if "extra_bytes" in row.get(OURS, {})]
    targets = []
    if ours:
        what, worst = (
            "memory beyond inputs and gradients, largest",
            max(map(extra_bytes_a_row, ours)),
        )
        targets.append(verdict(what, worst, BYTES_A_ROW, " bytes a row", at_least=False))
    title = "Peak memory beyond inputs and gradients, bytes a row"
    return markdown(title, ["logits", "N x C", *peers], lines), targets


def part_section(group: str, title: str, peers: tuple[str, ...]) -> Callable[..., Any]:
    """A section on a part of the loss that other libraries compute."""

    def section(entries: list[Entry]) -> tuple[str, list[list[str]]]:
        lines = [
            [dtype, shape, cell(row.get(OURS)), cell(row.get(OURS), speed)]
            + [percent(share_of_copy(row))]
            + [cell(row.get(peer)) for peer in peers]
            + [times(ratio(row.get(peer), row.get(OURS))) for peer in peers]
            for (dtype, shape), row in grouped(entries, group, "dtype", "shape").items()
        ]
        header = ["logits", "N x C", OURS, "GB/s", "% of copy", *peers]
        header += [f"{peer} / ours" for peer in peers]
        return markdown(f"{title}, ms", header, lines), []

    return section


def variants_section(entries: list[Entry]) -> tuple[str, list[list[str]]]:
    lines = []
    for names, row in grouped(entries, "variants", "variant", "dtype", "shape").items():
        ours, copy = row.get(OURS), row.get(COPY)
        lines.append([*names, cell(ours), cell(copy), percent(share_of_copy(row))])
    header = ["variant", "logits", "N x C", OURS, "copy of its bytes", "% of copy"]
    return markdown("Variants, forward + gradients, ms", header, lines), []


def calls_section(entries: list[Entry]) -> tuple[str, list[list[str]]]:
    """Wall times: the cost of a small call, and the churn report on either device."""
    lines, targets = [], []
    for (shape,), row in grouped(entries, "overhead", "shape").items():
        found = ratio(row.get(OURS), row.get(CROSS_ENTROPY))
        lines.append([f"a pair {shape}, {OURS}", cell(row.get(OURS))])
        lines.append([f"one model {shape}, {CROSS_ENTROPY}", cell(row.get(CROSS_ENTROPY))])
        if found is not None:
            what = "host overhead over one F.cross_entropy"
            targets.append(verdict(what, found, TIME_OF_CROSS_ENTROPY, "x", at_least=False))
    for (runs, shape), row in grouped(entries, "churn_report", "runs", "shape").items():
        lines += [
            [f"churn_report of {runs} runs {shape}, {device}", cell(row.get(device))]
            for device in ("GPU", "CPU")
        ]
    return markdown("Wall time a call, ms", ["call", "ms"], lines), targets


def hash_section(entries: list[Entry]) -> tuple[str, list[list[str]]]:
    """Hashes of one large tensor and of many, against a copy that moves as many bytes."""
    lines, targets = [], []
    for (dtype, shape), row in grouped(entries, "hash", "dtype", "shape").items():
        ours, share = row.get(OURS), share_of_copy(row)
        lines.append([dtype, shape, cell(ours), cell(ours, speed), percent(share)])
        if share is not None:
            what = f"bandwidth of the copy's, hash, {dtype}, {shape}"
            targets.append(verdict(what, share, SHARE_OF_HASH, " %", at_least=True))
    header = ["dtype", "tensors x elements", OURS, "GB/s", "% of copy"]
    return markdown("Hashes, ms", header, lines), targets


SECTIONS = {
    "pair": (pair_section, modes_section, memory_section),
    "variants": (variants_section,),
    "one model": (
        part_section("one model", "Cross entropy of one model", (QUACK, LIGER, COMPILED, EAGER)),
    ),
    "divergence": (
        part_section("divergence", "Divergence alone: ours is SKL to both sides", (LIGER_JSD,)),
    ),
    "overhead": (calls_section,),
    "hash": (hash_section,),
}


def notes(entries: list[Entry]) -> str:
    """The peers' notes, and why a case has no number."""
    said = {f"{e['peer']}: {e['note']}" for e in entries if "note" in e}
    absent = {f"{e.get('peer', e['group'])}: {e['absent']}" for e in entries if "absent" in e}
    failed = [
        f"{' '.join(str(value) for key, value in e.items() if key != 'failed')}: {e['failed']}"
        for e in entries
        if "failed" in e
    ]
    lines = [*sorted(said), *sorted(absent), *failed]
    return "\n".join(["## Notes", "", *(f"- {line}" for line in lines), ""]) if lines else ""


def largest(entries: list[Entry], kind: str, error: str) -> str:
    """The largest error among entries, or a note that one is not finite."""
    values = [e["errors"][kind][error] for e in entries if kind in e.get("errors", {})]
    if None in values:
        return "not finite"
    return f"{max(values):.1e}" if values else ""


def calls_that_differ(entries: list[Entry]) -> str:
    """Number of replays with bytes other than the first call's; fast mode may have some."""
    replays = sum(entry.get("replays", 0) for entry in entries)
    differing = sum(entry["differing"] for entry in entries if "replays" in entry)
    return f"{differing} of {replays}" if replays else ""


def parity_section(parity: dict[str, Any]) -> str:
    """Errors against the CPU by dtype, and the checks of bits."""
    entries, kinds = parity["entries"], ("loss", "terms", "gradient")
    rows: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        row = (entry["check"], entry.get("mode", ""), entry.get("dtype", ""))
        rows.setdefault(row, []).append(entry)
    lines = []
    for (check, mode, dtype), found in sorted(rows.items()):
        passed = sum(entry.get("passed", False) for entry in found)
        lines.append(
            [" ".join(filter(None, (check, mode))), dtype, str(len(found)), str(passed)]
            + [largest(found, kind, "relative") for kind in kinds]
            + [largest(found, "gradient", "absolute"), calls_that_differ(found)]
        )
    header = ["check", "logits", "cases", "passed", *(f"{kind}, relative" for kind in kinds)]
    header += ["gradient, absolute", "calls that differ"]
    text = markdown("Parity with the CPU, and bits", header, lines)
    failed = [
        "- " + ", ".join(f"{key} {value}" for key, value in entry.items() if key != "passed")
        for entry in entries
        if not entry.get("passed", False)
    ]
    return "\n".join([text, *(["Failed:", "", *failed, ""] if failed else [])])


def churn_section(entries: list[Entry]) -> list[str]:
    """Churn of runs with identical seeds, by mode, and the result of an audit."""

    def shown(estimate: list[float | None]) -> str:
        mean, low, high = (math.nan if x is None else 100 * x for x in estimate)
        half = (high - low) / 2
        return f"{mean:.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else "")

    lines = [
        [
            entry["mode"],
            "on" if entry["deterministic"] else "off",
            shown(entry["accuracy"]),
            shown(entry["churn"]),
            f"{entry['identical']} of {entry['pairs']}",
        ]
        for entry in entries
        if "churn" in entry
    ]
    header = ["losses", "deterministic algorithms", "accuracy", "churn", "identical pairs"]
    sections = [markdown("Churn with every seed the same, %", header, lines)] if lines else []
    for entry in entries:
        if "verdict" in entry:
            rows = [[one["suspect"], shown(one["share"])] for one in entry["shares"]]
            said = (
                f"An audit of the fast mode: {entry['verdict']}; {entry['parted']} of "
                f"{entry['pairs']} pairs differ; operators that race: "
                f"{', '.join(entry['operators']) or 'none'}.\n"
            )
            table = markdown("Why", ["twin of", "removes, %"], rows) if rows else "## Why\n"
            sections += [table, said]
    return sections


def stages_section(stages: list[dict[str, Any]]) -> str:
    lines = [[stage["name"], stage["status"], f"{stage['seconds']:.0f}"] for stage in stages]
    text = markdown("Stages", ["stage", "status", "seconds"], lines)
    outputs = [
        f"{stage['name']}:\n\n```\n{stage['output'].strip()}\n```\n"
        for stage in stages
        if stage["required"] and stage["status"] != "passed"
    ]
    return "\n".join([text, *outputs])


def left_out_section(record: dict[str, Any]) -> str:
    lines = [
        f"- {part}: {len(record[part]['left_out'])} cases, the first {record[part]['left_out'][0]}"
        for part in PARTS
        if record[part]["left_out"]
    ]
    return "\n".join(["## Left out at the deadline", "", *lines, ""]) if lines else ""


def machine_line(host: dict[str, Any]) -> str:
    commit = (host["commit"] or "unknown").removesuffix("-dirty")[:12]
    changed = " with changes" if (host["commit"] or "").endswith("-dirty") else ""
    return (
        f"{host['gpu']}, driver {host['driver']}, CUDA {host['cuda']}; torch {host['torch']}, "
        f"Triton {host['triton']}, Python {host['python']}; commit {commit}{changed}; "
        f"{host['date'][:10]}"
    )


def page(record: dict[str, Any]) -> str:
    """The whole report, without parts that were not reached; their stages say why."""
    entries = record["benchmarks"]["entries"]
    groups = {entry["group"] for entry in entries}
    sections, targets = [], []
    for group, functions in SECTIONS.items():
        for section in functions if group in groups else ():
            text, verdicts = section(entries)
            sections.append(text)
            targets += verdicts
    if targets:
        sections.insert(0, markdown("Targets", ["target", "wanted", "measured", ""], targets))
    parity = [parity_section(record["parity"])] if record["parity"]["entries"] else []
    churn = churn_section(record["churn"]["entries"]) if record["churn"]["entries"] else []
    parts = [stages_section(record["stages"]), *sections, *parity, *churn]
    everything = [*entries, *record["churn"]["entries"]]
    parts += filter(None, [notes(everything), left_out_section(record)])
    return "\n".join(["# GPU report", "", machine_line(record["host"]), "", *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="copy it to benchmarks/results/<gpu>/")
    arguments = parser.parse_args()
    record = load(arguments.folder)
    text = page(record)
    print(text)
    if arguments.keep:
        folder = RESULTS / slug(record["host"]["gpu"])
        folder.mkdir(parents=True, exist_ok=True)
        for name in RECORDS:
            if (arguments.folder / name).exists():
                shutil.copyfile(arguments.folder / name, folder / name)
        (folder / PAGE).write_text(text)


if __name__ == "__main__":
    main()
