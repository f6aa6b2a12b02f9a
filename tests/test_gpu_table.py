"""The page of a GPU report and the README's figures say what their record holds."""

import sys
from pathlib import Path

import pytest
from gpu_record import EMPTY, HOST, saved, synthetic

from benchmarks.gpu import readme, table

ROOT = Path(__file__).parents[1]


def section(text, title):
    return text.partition(f"## {title}")[2].partition("\n## ")[0]


class TestPage:
    def targets(self, record):
        lines = section(table.page(record), "Targets").strip().splitlines()[2:]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {what: (measured, verdict) for what, _, measured, verdict in cells}

    def test_the_machine_and_the_stages(self):
        text = table.page(synthetic())
        assert text.splitlines()[2] == (
            "NVIDIA H200, driver 580.1, CUDA 13.0; torch 2.11.0, Triton 3.6.0, Python 3.12.3; "
            "commit 0123456789ab with changes; 2026-01-02"
        )
        assert "| build | passed | 30 |" in text
        assert "tests:\n\n```\n1 failed, 9 passed\n```" in text

    def test_times_bandwidths_and_ratios(self):
        text = section(table.page(synthetic()), "CE + entropy + SKL")
        assert (
            "| bfloat16 | 1000x1000 | 0.5 | 2,000 | 90.0 | 0.45 | 2.5 | not run | 9 | 5* "
            "| 5 |  | 18 | 10 |"
        ) in text
        assert (
            "| bfloat16 | 1000x1000000 | 0.5 | 2,000 | 90.0 | 0.45 | 2.5 | not run | out of memory "
            "| not importable | 5 |  |  |  |"
        ) in text

    def test_modes_memory_and_calls(self):
        text = table.page(synthetic())
        modes = section(text, "Reduction modes")
        assert "| bfloat16 | 1000x1000 | 0.5 | 0.5 | 0.51 | 0.7 | 1 | 1.02 | 1.4 |" in modes
        assert "| bfloat16 | 1000x1000 | 64 | 64 | 64 | -1 |" in section(text, "Peak memory")
        assert "| a pair 8x10, churn_kernels | 0.1 |" in section(text, "Wall time")
        assert "| uint8 | 200x1000 | 0.5* | 2,000* | 80.0 |" in section(text, "Hashes")

    def test_targets_that_are_met(self):
        assert self.targets(synthetic()) == {
            "bandwidth of the copy's, bfloat16, 1000 classes": ("90 %", "met"),
            "bandwidth of the copy's, bfloat16, 1000000 classes": ("90 %", "met"),
            "speed over torch.compile, geometric mean of 2 of 2 shapes": ("5x", "met"),
            "speed over Liger, geometric mean of 1 of 2 shapes": ("10x", "met"),
            "time of run_to_run over fast, largest": ("1x", "met"),
            "time of invariant over fast, largest": ("1.02x", "met"),
            "time of exact over fast, bfloat16, largest": ("1.4x", "met"),
            "memory beyond inputs and gradients, largest": ("64 bytes a row", "met"),
            "host overhead over one F.cross_entropy": ("2x", "met"),
            "bandwidth of the copy's, hash, uint8, 200x1000": ("80 %", "met"),
        }

    def test_targets_that_are_missed(self):
        record = synthetic(ours=0.75)  # 60 % of the copy
        for entry in record["benchmarks"]["entries"]:
            if entry["peer"] == "churn_kernels invariant":
                entry["ms"] = 1.5
            if "extra_bytes" in entry:
                entry["extra_bytes"] = 129_000
        found = self.targets(record)
        assert found["bandwidth of the copy's, bfloat16, 1000 classes"] == ("60 %", "**missed**")
        assert found["bandwidth of the copy's, bfloat16, 1000000 classes"] == ("60 %", "met")
        assert found["speed over torch.compile, geometric mean of 2 of 2 shapes"] == (
            "3.33x",
            "**missed**",
        )
        assert found["time of invariant over fast, largest"] == ("2x", "**missed**")
        assert found["memory beyond inputs and gradients, largest"] == (
            "129 bytes a row",
            "**missed**",
        )

    def test_parity_and_what_was_left_out(self):
        text = table.page(synthetic())
        parities = section(text, "Parity")
        assert "| cpu | float32 | 1 | 1 | 3.0e-08 | 3.0e-08 | 3.0e-08 | 2.0e-09 |  |" in parities
        assert "| replay invariant | float32 | 1 | 0 |  |  |  |  | 3 of 100 |" in parities
        assert "- check replay, mode invariant, dtype float32" in parities
        assert "- benchmarks: 2 cases, the first variants l1" in section(text, "Left out")

    def test_churn_and_why(self):
        text = table.page(synthetic())
        assert "| fast | off | 90.00 ± 2.00 | 3.70 ± 0.70 | 1 of 28 |" in section(text, "Churn")
        why = section(text, "Why")
        assert "| exact mode | 25.00 |" in why
        assert "operator; 3 of 4 pairs differ; operators that race: aten.mm.default." in why

    def test_why_a_case_has_no_number(self):
        notes = section(table.page(synthetic()), "Notes")
        assert "- Liger: waits for the GPU" in notes
        assert "- Liger: No module named 'liger_kernel'" in notes
        assert "- pair 1000000 bfloat16 1000x1000000 eager: out of memory" in notes

    def test_a_run_that_got_nowhere_has_a_page(self):
        nothing = dict.fromkeys(table.PARTS, EMPTY)
        text = table.page({"host": HOST, "stages": [], **nothing})
        assert text.startswith("# GPU report\n\nNVIDIA H200")
        assert "## Targets" not in text

    def test_a_kept_record_makes_the_same_page(self, tmp_path, monkeypatch, capsys):
        record = synthetic()
        folder = saved(record, tmp_path / "out")
        monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(sys, "argv", ["table", str(folder), "--keep"])
        table.main()
        kept = tmp_path / "results" / "nvidia-h200"
        assert sorted(path.name for path in kept.iterdir()) == [
            "benchmarks.json",
            "churn.json",
            "parity.json",
            "report.json",
            "report.md",
        ]
        page = table.page(record)
        assert table.page(table.load(kept)) == page == (kept / "report.md").read_text()
        assert capsys.readouterr().out.strip() == page.strip()


class TestReadme:
    def test_the_figures_are_those_of_the_newest_record(self):
        text = (ROOT / "README.md").read_text()
        assert readme.rewritten(text, readme.block()) == text, (
            "run: python -m benchmarks.gpu.readme"
        )

    def test_without_a_record_nothing_is_claimed(self, tmp_path):
        assert readme.block(tmp_path) == readme.NOT_MEASURED
        assert "not yet measured" in readme.NOT_MEASURED

    def test_the_newest_record_is_shown(self, tmp_path):
        old = synthetic(ours=1.0)
        saved(old | {"host": HOST | {"date": "2025-01-02T03:04:05+00:00"}}, tmp_path / "zz-old")
        saved(synthetic(), tmp_path / "aa-new")
        lines = readme.block(tmp_path).splitlines()
        assert lines[0].startswith("NVIDIA H200, driver 580.1")
        assert lines[0].endswith("2026-01-02 (record: [`aa-new`](aa-new)):")
        assert lines[4] == "| bfloat16 | 1000x1000 | 0.5 | 2,000 | 90.0 | 5 | 18 | 10 |"

    def test_only_the_block_is_rewritten(self):
        text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
        want = f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter\n"
        assert readme.rewritten(text, "new") == want
        assert readme.rewritten(want, "new") == want

    @pytest.mark.parametrize(
        "text",
        ["", readme.BEGIN, readme.END + readme.BEGIN, 2 * (readme.BEGIN + readme.END)],
        ids=["none", "no end", "swapped", "twice"],
    )
    def test_markers_that_are_not_there_once_each(self, text):
        with pytest.raises(ValueError, match=r"README\.md must hold"):
            readme.rewritten(text, "new")
