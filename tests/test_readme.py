"""The README's links, pictures and numbers are those of the repository."""

import re
import tomllib

import pandas as pd
import pytest

from qnb.__main__ import NAMES, ROOT
from qnb.precision import PRECISIONS

TEXT = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "outputs" / "reference" / "README.md"]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["repository"]


def table(head):
    """Return the rows of the table whose first line begins with `head`, as lists of cells."""
    lines = TEXT[TEXT.index(f"\n{head}") + 1 :].splitlines()[2:]
    rows = lines[: next(at for at, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_leads_somewhere(page):
    text = page.read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in re.findall(r"(?m)^#+ (.*)$", text)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (page.parent / target).exists(), target
    for picture in re.findall(r"!\[([^\]]*)\]\(([^)\s]+\.png)\)", text):
        assert picture[0], f"{picture[1]} has no words for who cannot see it"
        assert (page.parent / picture[1]).read_bytes().startswith(b"\x89PNG"), picture


def test_badges_are_built_from_the_projects_address():
    owner_name = REPOSITORY.removeprefix("https://github.com/")
    badges = re.findall(r"https://colab\.research\.google\.com/github/([^)\s]+)", TEXT)
    assert set(badges) == {f"{owner_name}/blob/main/notebooks/{name}.ipynb" for name in NAMES}


def test_the_numbers_are_those_of_the_kept_runs():
    kept = ROOT / "outputs" / "reference" / "h100-llama-3.2-1b-shape"
    small = pd.read_csv(kept / "table3_bs1.csv").set_index("precision")
    large = pd.read_csv(kept / "table4_maxbatch.csv").set_index("precision")
    steps = pd.read_csv(kept / "decode.csv").query("batch_size == 1").pivot(index="precision", columns="engine")
    rows = table("| Llama-3.2-1B's shape, H100 |")
    assert [row[0] for row in rows] == list(small.index)
    for precision, memory_mib, graphed_ms, together_rps in rows:
        assert float(memory_mib) == round(small.memory_mib[precision])
        recorded = steps.tpot_ms.graphed[precision]
        assert graphed_ms == ("-" if pd.isna(recorded) else f"{recorded:.2f}")
        assert float(together_rps) == round(large.throughput_rps[precision], 1)


def test_every_precision_is_explained_with_its_bits():
    rows = {row[0].strip("`"): row for row in table("| | weights |")}
    assert list(rows) == list(PRECISIONS)
    assert {name: float(row[-1]) for name, row in rows.items()} == {name: one.bits for name, one in PRECISIONS.items()}


def test_the_gallery_is_drawn_from_the_kept_tables():
    """Every picture has its study's tables beside it: none is of something that was not measured here."""
    from qnb.report import GALLERY
    from qnb.results import reference

    known = reference(ROOT / "outputs" / "reference")
    pictures = sorted((ROOT / "outputs" / "reference" / "gallery").glob("*/*.png"))
    assert pictures
    for picture in pictures:
        assert picture.parent.name in known and picture.stem in GALLERY
        assert str(picture.relative_to(ROOT)) in TEXT
