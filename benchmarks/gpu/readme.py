"""The GPU figures of README.md, from the newest record: `python -m benchmarks.gpu.readme`."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.host import ROOT
from benchmarks.gpu.table import (
    LIGER,
    REPORT,
    RESULTS,
    cell,
    load,
    machine_line,
    measured,
    pair_table,
    percent,
    ratio,
    share_of_copy,
    speed,
    times,
)
from benchmarks.table import COMPILED, EAGER, OURS, table_lines

README = ROOT / "README.md"
BEGIN, END = "<!-- gpu-figures -->", "<!-- /gpu-figures -->"
NOT_MEASURED = "GPU: not yet measured; `make gpu-report` measures it on a host that has one."


def newest(results: Path = RESULTS) -> Path | None:
    """The folder of the latest record, by its date."""
    dates = {
        json.loads(path.read_text())["host"]["date"]: path.parent
        for path in results.glob(f"*/{REPORT}")
    }
    return dates[max(dates)] if dates else None


def figures(record: dict[str, Any] | None, where: str = "") -> str:
    """The text for README.md: the loss of a pair at every measured shape."""
    table = pair_table(record["benchmarks"]["entries"]) if record else {}
    table = {key: row for key, row in table.items() if measured(row.get(OURS))}
    if not table:
        return NOT_MEASURED
    peers = [
        peer
        for peer in (COMPILED, EAGER, LIGER)
        if any(measured(row.get(peer)) for row in table.values())
    ]
    lines = [
        [dtype, shape, cell(row[OURS]), cell(row[OURS], speed), percent(share_of_copy(row))]
        + [times(ratio(row.get(peer), row[OURS])) for peer in peers]
        for (dtype, shape), row in table.items()
    ]
    header = ["logits", "N x C", "ms", "GB/s", "% of copy", *(f"{peer} / ours" for peer in peers)]
    text = f"{machine_line(record['host'])} (record: [`{where}`]({where})):\n\n"
    return text + "\n".join(table_lines(header, lines))


def rewritten(text: str, block: str) -> str:
    """`text` with the block between its markers replaced.

    Raises: ValueError unless each marker is there once, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"README.md must hold {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def block(results: Path = RESULTS) -> str:
    """The block that README.md should hold."""
    folder = newest(results)
    if folder is None:
        return figures(None)
    where = folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder.name
    return figures(load(folder), where)


def main() -> None:
    README.write_text(rewritten(README.read_text(), block()))


if __name__ == "__main__":
    main()
