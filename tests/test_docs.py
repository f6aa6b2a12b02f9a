"""Every Python block of the README and the guides runs, in order, in one namespace a page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


# torch.compile looks at the .grad of every tensor it is given, leaf or not.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/distributed.md"])
def test_snippets(page, monkeypatch):
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    text = (ROOT / page).read_text()
    namespace = {"__name__": "page"}
    blocks = list(BLOCK.finditer(text))
    assert blocks
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1  # so that a traceback points into the page
        exec(compile("\n" * line + block.group(1), page, "exec"), namespace)
