"""What docs/trainer.md shows works."""

import re
import tomllib
from pathlib import Path

import pytest
from churn_trainer.config import Run, Seeds, Study
from churn_trainer.data import DATASETS
from churn_trainer.methods import METHODS
from churn_trainer.models import NETWORKS
from churn_trainer.named_studies import OWN

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "trainer.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    assert len(blocks("python")) == 2
    for block in blocks("python"):
        exec(compile(block, "docs/trainer.md", "exec"), namespace)
    assert capsys.readouterr().out.count("digits-mlp-skl-") == 2
    assert len(namespace["finished"]) == 2
    assert float(namespace["report"].churn[0, 1]) > 0


def test_the_settings_files_are_what_they_say():
    text, study = blocks("toml")
    run = Run.from_mapping(tomllib.loads(text))
    assert run.method.label == "SKL co-distillation, beta 1.0"
    assert run.optimisation.milestones == (200, 300, 400)
    assert run.seeds == Seeds(initialisation=3)
    variants = Study.from_mapping(tomllib.loads(study)).methods
    assert [variant.name for variant in variants][2:] == ["strong, decayed", "same order"]


def test_every_picture_is_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", PAGE)
    assert len(pictures) == 2
    for picture in pictures:
        assert (DOCS / picture).read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize("table", [METHODS, DATASETS, NETWORKS, OWN])
def test_every_name_is_on_the_page(table):
    for name in table:
        assert re.search(rf"\b{re.escape(name.removesuffix('-top5'))}\b", PAGE), name
