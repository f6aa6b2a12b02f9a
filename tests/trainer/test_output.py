"""Files and folders that are whole or not there; text in a table is text."""

import csv
import os

import pytest
from churn_trainer import output
from churn_trainer.output import (
    MARKER,
    check_folder,
    check_replaceable,
    csv_text,
    replaced,
    write_csv,
)


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_earlier_report_is_replaced_whole(tmp_path):
    target = tmp_path / "report"
    for content in ("first", "second"):
        with replaced(target) as folder:
            (folder / MARKER).write_text(content)
            (folder / content).touch()
    assert {path.name for path in target.iterdir()} == {MARKER, "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_failed_swap_brings_the_earlier_report_back(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_exchange", lambda *_: False)  # as where there is no such call
    target = tmp_path / "report"
    with replaced(target) as folder:
        (folder / MARKER).write_text("first")
    rename = type(target).rename

    def fail_for_the_new(self, to):
        if to == target and (self / MARKER).read_text() == "second":
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no"), replaced(target) as folder:
        (folder / MARKER).write_text("second")
    assert files_in(tmp_path) == {f"report/{MARKER}": "first"}


def test_only_new_folders_and_reports_may_be_replaced(tmp_path):
    earlier = tmp_path / "earlier"
    with replaced(earlier) as folder:
        (folder / MARKER).touch()
    check_replaceable(earlier)
    check_replaceable(tmp_path / "a" / "b")
    mine = tmp_path / "mine"
    mine.mkdir()
    check_replaceable(mine)
    (mine / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"new folder or an earlier report, got .*, which holds"):
        check_replaceable(mine)
    with pytest.raises(ValueError, match=r"out must be a folder, got the file .*thesis\.tex; name"):
        check_replaceable(mine / "thesis.tex")
    with pytest.raises(ValueError, match=r"out must be a folder, got the file .*thesis\.tex; name"):
        check_replaceable(mine / "thesis.tex" / "report")


def test_a_folder_must_be_one_to_write_into(tmp_path, monkeypatch):
    check_folder(tmp_path / "new" / "one")
    check_folder(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, how: path != tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "one"):
        with pytest.raises(ValueError, match=r"out must be in a folder that you may write to, got"):
            check_folder(folder)


# Tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t"])
def test_text_in_a_table_is_no_formula(first, tmp_path):
    text = f"{first}HYPERLINK(A1)"
    write_csv(tmp_path / "table.csv", ("name", text), [(text, -1.5), ("a, b", -2)])
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["name", f"'{text}"], [f"'{text}", "-1.5"], ["a, b", "-2"]]


def test_numbers_and_other_text_stay_as_they_are():
    rows = [(-1.5, float("-inf"), "", "3 - 2", None)]
    assert csv_text(("a", "b", "c", "d", "e"), rows) == "a,b,c,d,e\n-1.5,-inf,,3 - 2,\n"


def test_no_text_ends_its_row():
    rows = list(csv.reader(csv_text(("a", "b"), [("x\r=1", "y\n=2")]).splitlines(keepends=True)))
    assert rows == [["a", "b"], ["x =1", "y\n=2"]]
