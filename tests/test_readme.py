"""The README's links, pictures and numbers are those of the repository, and so are the notebooks' kept runs."""

import itertools
import re
import tomllib

import nbformat
import pandas as pd
import pytest

from qnb.__main__ import NAMES, ROOT
from qnb.precision import PRECISIONS

TEXT = (ROOT / "README.md").read_text()
KEPT = ROOT / "outputs" / "reference"
SHAPE = "h100-llama-3.2-1b-shape"
PAGES = [ROOT / "README.md", ROOT / "outputs" / "reference" / "README.md"]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["repository"]


def table(head, text=TEXT):
    """Return the rows of the table whose first line begins with `head`, as lists of cells."""
    rows = itertools.takewhile(lambda line: line.startswith("|"), text[text.index(f"\n{head}") + 1 :].splitlines())
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][2:]


def prose(number):
    """Return what a notebook tells of its kept run."""
    name = next(name for name in NAMES if name.startswith(number))
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    return next(cell.source for cell in cells if "What a kept run shows" in cell.source)


def kept(name):
    return pd.read_csv(KEPT / name)


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
    small = kept(f"{SHAPE}/table3_bs1.csv").query("engine == 'eager'").set_index("precision")
    large = kept(f"{SHAPE}/table4_maxbatch.csv").set_index(["precision", "engine"])
    steps = kept(f"{SHAPE}/decode.csv").query("batch_size == 1").pivot(index="precision", columns="engine")
    rows = table("| Llama-3.2-1B's shape, H100 |")
    assert [row[0] for row in rows] == ["bf16", "fp16", "int8", "int4", "nf4"]
    for precision, memory_mib, graphed_ms, *together in rows:
        assert float(memory_mib) == round(small.memory_mib[precision])
        recorded = steps.tpot_ms.graphed[precision]
        assert graphed_ms == ("-" if pd.isna(recorded) else f"{recorded:.2f}")
        for engine, told in zip(("eager", "graphed"), together, strict=True):
            if (precision, engine) in large.index:
                row = large.loc[precision, engine]
                assert told == f"{row.throughput_rps:.1f} at {row.batch_size:.0f}"
            else:
                assert told == "-"
    rates, text = large.throughput_rps.unstack(), " ".join(TEXT.split())
    share = 100 * rates.loc[["nf4", "int4"]] / rates.loc["fp16"]
    assert f"NF4 served {share.eager.nf4:.0f} % of FP16's requests and `int4`" in text
    assert f"in 32 bit, {share.eager.int4:.0f} %. " in text and f"near, {share.graphed.nf4:.0f} %" in text
    gain = (rates.graphed / rates.eager).dropna().drop("nf4-dq")
    assert f"serves {gain.min():.1f} to {gain.max():.1f} times as many requests" in text
    token, longer = steps.tpot_ms, 100 * (steps.tpot_ms.graphed.int4 / steps.tpot_ms.graphed.bf16 - 1)
    assert f"a token took {token.eager.min():.0f} to {token.eager.max():.0f}" in text
    assert f"it took {token.graphed.bf16:.2f} ms in BF16 and {token.graphed.nf4:.2f} in NF4" in text
    assert f"{longer:.0f} % longer than BF16's" in text
    part = 100 * small.memory_mib[["nf4", "int4"]] / small.memory_mib.bf16
    assert f"NF4 and `int4` take {part.nf4:.0f} to {part.int4:.0f} % of it" in text
    busy = small.utilization_pct
    assert f"Utilization of {busy.min():.0f} to {busy.max():.0f} % with `eager`" in text


def test_notebook_03_tells_what_was_kept():
    """Its table row by row, and the shares of the limit that its last sentence names."""
    steps = kept(f"{SHAPE}/decode.csv").query("batch_size == 1").pivot(index="precision", columns="engine")
    rows = table("| | eager |", prose("03"))
    assert {row[0] for row in rows} == set(steps.index)
    for precision, eager, eager_kernels, graphed, graphed_kernels, limit in rows:
        mine = steps.loc[precision]
        assert [float(eager), float(eager_kernels)] == [
            round(mine["tpot_ms", "eager"], 1),
            round(mine["kernel_ms", "eager"], 2),
        ]
        if precision == "int8":
            assert graphed == "cannot be recorded" and mine["note", "graphed"]
        else:
            assert graphed == f"{mine['tpot_ms', 'graphed']:.2f}"
            assert graphed_kernels == f"{mine['kernel_ms', 'graphed']:.2f}"
        assert limit == f"{mine['limit_ms', 'eager']:.2f}"
    shares = steps["limit_pct", "graphed"].round().astype("Int64")
    assert f"FP16 reaches {shares.fp16} % of what the memory allows, NF4 {shares.nf4} %" in prose("03")


SEARCHES = {"ours": "this one", "accelerate": "accelerate's", "lightning power": "Lightning's"}


def test_notebook_04_tells_what_was_kept():
    found, text = kept(f"{SHAPE}/batch.csv"), " ".join(prose("04").split())
    rows = table("| | search |", prose("04"))
    made = [[row.precision, SEARCHES[row.search], str(row.largest_batch),
             str(row.true_at_most), str(row.probes), f"{row.seconds:.1f}"] for row in found.itertuples()]  # fmt: skip
    assert rows == made
    largest = kept(f"{SHAPE}/largest_batch.csv").dropna(subset=["throughput_rps"]).astype({"batch_size": int})
    held, whole = (largest[largest.memory_gib == memory] for memory in ("15", "whole"))
    assert table("| | engine |", prose("04")) == [
        [row.precision, row.engine, str(row.batch_size), f"{row.throughput_rps:.0f}",
         f"{1000 * row.tpot_s:.1f}", f"{row.kernels_per_token:.0f}"] for row in held.itertuples()
    ]  # fmt: skip
    rates = held.pivot(index="precision", columns="engine", values="throughput_rps")
    gain = (rates.graphed / rates.eager).dropna()
    most = gain.drop(["int4", "nf4-dq"])
    assert (most.idxmin(), most.idxmax()) == ("fp16", "int8-t0")
    assert f"serves {most.min():.1f} (FP16) to {most.max():.1f} times (INT8 without outliers) as many" in text
    shares = kept(f"{SHAPE}/table4_maxbatch.csv").set_index(["precision", "engine"])
    busy = shares.utilization_pct.unstack().eager
    waiting = busy[busy < 80]
    assert len(waiting) == 5 and len(busy) == 9 and "Five of the nine waited" in text
    waiting = waiting.drop("nf4-dq")
    assert f"the GPU was busy {waiting.min():.0f} (INT8) to {waiting.max():.0f} % (FP4)" in text
    assert waiting.idxmin() == "int8" and waiting.idxmax() == "fp4"
    assert f"In FP16 it was busy {busy.fp16:.0f} %" in text
    fp16 = shares.loc["fp16", "graphed"]
    assert f"take {fp16.compute_share_pct:.0f} % of its time" in text
    assert f"at a copy's, {fp16.bandwidth_share_pct:.0f} %: one after the other they leave a fifth" in text
    assert fp16.compute_share_pct + fp16.bandwidth_share_pct == pytest.approx(80, abs=2)
    assert f"INT4, which computes in 32 bit, {gain.int4:.1f} times" in text
    sizes, rates = (whole.set_index("engine")[name] for name in ("batch_size", "throughput_rps"))
    assert f"{sizes.eager} requests with `eager` and {sizes.graphed} with `graphed`" in text
    assert f"served {rates.eager:.0f} and {rates.graphed:.0f} a second" in text
    searched = kept(f"{SHAPE}/largest_batch.csv").query("memory_gib == '15'").set_index(["precision", "engine"])
    left = searched.open_pct.unstack().graphed.drop("fp32")
    now = left.drop("nf4-dq").dropna()
    assert f"{now.min():.0f} to {now.max():.0f} % more rows might fit" in text
    assert f"in NF4-DQ's earlier run {left['nf4-dq']:.0f}" in text
    short = searched.astype({"found": int}).query("batch_size < found").batch_size.astype(int).droplevel("engine")
    assert set(short.index) == {"bf16", "fp16", "int8-t0"} and short.bf16 == short.fp16
    assert f"FP16 and BF16 found {searched.found['fp16', 'eager']:.0f} rows and were timed at {short.fp16}" in text
    assert f"INT8 without outliers {searched.found['int8-t0', 'eager']:.0f} and {short['int8-t0']}" in text
    int4 = found[(found.precision == "int4") & (found.search == "ours")].iloc[0]
    assert f"ended {100 - int4.share_pct:.1f} % below" in text
    many = (
        kept(f"{SHAPE}/decode.csv").query("batch_size == 400").set_index("engine").throughput_rps.round().astype(int)
    )
    assert f"served {many.eager} requests/s with `eager` and {many.graphed} with `graphed`" in text
    swept = kept(f"{SHAPE}/sweep.csv").query("precision == 'fp16'").pivot(index="batch_size", columns="engine")
    ratio = swept.throughput_rps.graphed / swept.throughput_rps.eager
    assert f"{ratio[256]:.1f} times as many at batch 256 and {ratio[1024]:.1f} at 1,024" in text


def test_notebook_02_tells_what_was_kept():
    """How many changes are significant and which, the answers that flip, the growth of perplexity, INT8's drift."""
    small, text = "h100-smollm2-135m", " ".join(prose("02").split())
    changes = kept(f"{small}/table2_change.csv")
    tested = changes[changes.mcnemar_p.notna()]
    real = tested[tested.significant.astype(bool)]
    assert f"Of {len(tested)} changes against BF16 {['no', 'one', 'two', 'three'][len(real)]} are significant" in text
    assert set(zip(real.task, real.precision, strict=True)) == {("arc_easy", "nf4"), ("arc_easy", "nf4-dq")}
    easy = tested[tested.task == "arc_easy"].set_index("precision")
    for name in ("nf4", "nf4-dq"):
        change, low, high = (f"{value:.1f}" for value in easy.loc[name, ["change_pp", "low_pp", "high_pp"]])
        assert re.search(rf"{change}( points)? \((95 % )?{low} to {high}\)", text), name
    flips = (easy.gained + easy.lost).astype(int)
    assert f"flip {flips.fp32} and {flips.fp16} of ARC-Easy's {easy['items'].iloc[0]:,} answers" in text
    assert f"flips {flips.int8} there and loses {-easy.change_pp.int8:.2f} points net" in text
    assert f"({easy.low_pp.int8:+.2f} to {easy.high_pp.int8:+.2f})" in text
    assert f"flips {flips.int4}, more than NF4's {flips.nf4}" in text and f": {easy.change_pp.int4:.2f} points" in text
    growth = kept(f"{small}/divergence.csv").set_index("precision").perplexity_change_pct
    assert f"rises by {growth.int4:.0f} %, NF4's by {growth.nf4:.0f}, INT8's by {growth.int8:.1f}" in text
    assert f"without the outlier path by {growth['int8-t0']:.1f}" in text and abs(growth.fp16) < 0.1
    drift = kept(f"{small}/drift.csv").query("scorer == 'qnb'").set_index("precision")
    assert f"moved by {drift.mean_nats.int8:.2f} nats on average" in text
    assert f"{drift.other_picks.int8} of {drift['items'].int8} picks with it" in text
    four = drift.loc[["int4", "nf4", "nf4-dq"]]
    assert f"by {four.mean_nats.min():.2f} to {four.mean_nats.max():.2f} nats" in text
    assert f"up to {four.other_picks.max()} picks" in text
    assert not drift.other_picks.drop(["int8", *four.index]).any() and drift.mean_nats["int8-t0"] < 1e-6
    right = changes[changes.task == "gsm8k"]
    right = (right.accuracy_pct * right["items"] / 100).round().astype(int)
    assert f"(400 items) is answered right by {right.min()} to {right.max()} of them" in text


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
