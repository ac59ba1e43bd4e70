"""The README's links, pictures and numbers are those of the repository, and so are the notebooks' kept runs."""

import itertools
import re
import subprocess
import sys
import tomllib

import nbformat
import pandas as pd
import pytest

from qnb.__main__ import NAMES, ROOT
from qnb.precision import PRECISIONS
from qnb.report.paper import performance
from qnb.speed import autotune as tune
from qnb.speed import roofline as roof
from qnb.speed.benchmark import PROBES

TEXT = (ROOT / "README.md").read_text()
KEPT = ROOT / "outputs" / "reference"
SHAPE = "h100-llama-3.2-1b-shape"
LARGER = "h200-llama-3.2-1b-shape"  # the larger card's
KEPT_TEXT = " ".join((KEPT / "README.md").read_text().split())
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


def swept(card=SHAPE):
    """Return requests with `cuda_graph` in percent of FP16's, by batch size and precision."""
    sweep = kept(f"{card}/sweep.csv").query("engine == 'cuda_graph'")
    rates = sweep.pivot(index="batch_size", columns="precision", values="throughput_rps")
    return 100 * rates.div(rates.fp16, axis=0)


def test_the_numbers_are_those_of_the_kept_runs():
    both = kept(f"{SHAPE}/table3_bs1.csv").pivot(index="precision", columns="engine")
    small, token = both.xs("eager", axis=1, level="engine"), 1e3 * both.tpot_s
    large = kept(f"{SHAPE}/table4_maxbatch.csv").set_index(["precision", "engine"])
    rows = table("| Llama-3.2-1B's shape, H100 |")
    assert [row[0] for row in rows] == ["bf16", "fp16", "int8", "int4", "nf4"]
    for precision, memory_mib, cuda_graph_ms, *together in rows:
        assert float(memory_mib) == round(small.memory_mib[precision])
        recorded = token.cuda_graph[precision]
        assert cuda_graph_ms == ("-" if pd.isna(recorded) else f"{recorded:.2f}")
        for engine, told in zip(("eager", "cuda_graph"), together, strict=True):
            if (precision, engine) in large.index:
                row = large.loc[precision, engine]
                assert told == f"{row.throughput_rps:.1f} at {row.batch_size:.0f}"
            else:
                assert told == "-"
    rates, text = large.throughput_rps.unstack(), " ".join(TEXT.split())
    share = 100 * rates.loc[["nf4", "fp4", "int4", "fp16"]] / rates.loc["bf16"]
    assert (
        f"With `generate` NF4 served {share.eager.nf4:.0f} % of BF16's requests, FP4 {share.eager.fp4:.0f} %" in text
    )
    assert f"and FP16, whose kernels are BF16's, {share.eager.fp16:.0f} %" in text
    assert f"largest batch, {share.cuda_graph.nf4:.0f} % of BF16's requests" in text
    assert f"in 32 bit, served {share.cuda_graph.int4:.0f} % (" in text
    whole = kept(f"{SHAPE}/largest_batch.csv").query("memory_gib == 'whole' and engine == 'cuda_graph'")
    whole = whole.set_index("precision").throughput_rps
    assert f"{100 * whole.nf4 / whole.bf16:.0f} % with all of the H100's memory" in text
    here, there = (swept(card).nf4.loc[4:256] for card in (SHAPE, LARGER))
    assert f"{here.min():.0f} to {here.max():.0f} % of FP16's at batch sizes 4 to 256" in text
    assert f"at batch sizes 4 to 256 ({there.min():.0f} to {there.max():.0f} % on an H200, with a later" in text
    int4 = swept(LARGER).int4
    assert (
        f"(on the H200 {int4[1]:.0f} % of FP16's at batch size 1, {int4[8]:.0f} at 8 and {int4[1024]:.0f} at" in text
    )
    assert f"served {rates.eager.fp4:.1f} requests/s in another job" in text
    kernels = large.kernels_per_token.unstack().eager
    assert kernels.fp4 == kernels.nf4 and kernels.bf16 == kernels.fp16
    other = kept(f"{LARGER}/table4_maxbatch.csv").set_index(["precision", "engine"]).throughput_rps.unstack()
    assert f"({100 * other.cuda_graph.nf4 / other.cuda_graph.bf16:.0f} % on an H200, " in text
    gain = (rates.cuda_graph / rates.eager).dropna()
    assert f"serves {gain.min():.1f} to {gain.max():.1f} times as many requests" in text
    assert f"BF16 and FP16 served {rates.eager.bf16:.0f} and {rates.eager.fp16:.0f} requests/s" in text
    assert f"a token took {token.eager.min():.0f} to {token.eager.max():.0f}" in text
    recorded, work = token.cuda_graph, 1e3 * small.kernel_s_per_token
    assert f"the GPU worked {work.min():.0f} to {work.max():.0f}" in text
    wide, narrow = recorded[["bf16", "fp16"]], recorded[["fp4", "nf4", "nf4-dq"]]
    assert f"it took {wide.min():.2f} to {wide.max():.2f} ms in 16 bit" in text
    assert f"and {narrow.min():.2f} to {narrow.max():.2f} in 4 bit, computed in 16" in text
    other = kept(f"{SHAPE}/decode.csv").query("batch_size == 1 and engine == 'cuda_graph'").set_index("precision").tpot_ms
    each = "An NF4 token took {nf4:.2f} ms, where BF16 took {bf16:.2f} and FP16 {fp16:.2f}, and".format(**recorded)
    assert each in text
    assert recorded.nf4 > wide.max()
    assert (
        (other / recorded).drop("int8") - 1
    ).abs().max() < 0.02 and "two runs with `cuda_graph` differ by up to 2 %" in text
    assert f"`int4` took {100 * (recorded.int4 / recorded.bf16 - 1):.0f} % longer than BF16" in text
    assert f"without it (`int8-no-outliers`) a recorded token took {recorded['int8-no-outliers']:.2f} ms" in text
    part = 100 * small.memory_mib[["nf4", "int4"]] / small.memory_mib.bf16
    assert f"NF4 and `int4` take {part.nf4:.0f} to {part.int4:.0f} % of BF16's" in text
    part = 100 * both.memory_mib.cuda_graph / both.memory_mib.cuda_graph.bf16
    assert f"({part.nf4:.0f} to {part.int4:.0f} % with `cuda_graph`)" in text
    assert f"**LLM.int8** takes {100 * small.memory_mib.int8 / small.memory_mib.bf16:.0f} % of BF16's memory" in text
    busy = small.utilization_pct
    assert f"Utilization of {busy.min():.0f} to {busy.max():.0f} % with `eager`" in text


def test_notebook_03_tells_what_was_kept():
    """Its table row by row, the spread of its passes, and the shares of the limit."""
    mine = kept(f"{SHAPE}/table3_bs1.csv").pivot(index="precision", columns="engine")
    token, work = 1e3 * mine.tpot_s, 1e3 * mine.kernel_s_per_token
    limits = mine.tpot_s * mine.mbu_pct * 10
    limits = limits.cuda_graph.fillna(limits.eager)
    rows, text = table("| | eager |", prose("03")), " ".join(prose("03").split())
    assert {row[0] for row in rows} == set(mine.index)
    for precision, eager, eager_kernels, cuda_graph, cuda_graph_kernels, limit in rows:
        assert (eager, eager_kernels) == (f"{token.eager[precision]:.1f}", f"{work.eager[precision]:.2f}")
        if precision == "int8":
            assert cuda_graph == "cannot be recorded" and mine["note", "cuda_graph"]["int8"]
        else:
            assert (cuda_graph, cuda_graph_kernels) == (f"{token.cuda_graph[precision]:.2f}", f"{work.cuda_graph[precision]:.2f}")
        assert limit == f"{limits[precision]:.2f}"
    spread, launched = mine.throughput_spread_pct, mine.kernels_per_token.eager
    assert set(mine.repeats.stack().dropna()) == {3} and "medians of three passes" in text
    each_us, alike = 1e3 * token.eager / launched, token.eager[launched < 800]
    assert f"took {each_us.min():.0f} to {each_us.max():.0f} µs for every kernel launched" in text
    assert f"Passes of FP32 differed by {spread.eager.max():.0f} %" in text and spread.eager.idxmax() == "fp32"
    assert f"between {alike.min():.1f} and {alike.max():.1f} ms" in text
    assert set(alike.index) == {"fp32", "bf16", "fp16", "fp4", "nf4", "nf4-dq"}
    assert f"BF16 launches {launched.bf16:.0f} and INT8 {launched.int8:.0f}" in text
    assert f"passes differ by {spread.cuda_graph.min():.1f} to {spread.cuda_graph.max():.0f} %" in text
    other = kept(f"{SHAPE}/decode.csv").query("batch_size == 1 and engine == 'cuda_graph'").set_index("precision").tpot_ms
    assert (other / token.cuda_graph - 1).abs().max() <= 0.02 and "by as little the run in `decode.csv`" in text
    longer = [100 * (token.cuda_graph.nf4 / token.cuda_graph[name] - 1) for name in ("fp16", "bf16")]
    assert "took {:.0f} % longer than one in FP16 and {:.0f} % longer than one in BF16".format(*longer) in text
    assert f"not {limits.fp16 / limits.nf4:.1f} times faster" in text
    more = mine.kernels_per_token.cuda_graph
    assert f"launches {more.nf4 - more.fp16:.0f} kernels more" in text
    assert f"cost {token.cuda_graph.int4 - token.cuda_graph.fp4:.1f} ms" in text
    times, rest = mine.engine_speedup.cuda_graph, mine.engine_speedup.cuda_graph.drop(["fp32", "int8"])
    assert f"`eager` took {times.fp32:.1f} times as long in FP32" in text and times.idxmin() == "fp32"
    again = (
        kept(f"{SHAPE}/decode.csv").query("batch_size == 1 and engine == 'cuda_graph'").set_index("precision").vs_eager
    )
    assert f"nearest to that limit ({again.fp32:.1f} in `decode.csv`)" in text
    assert f"and {rest.min():.0f} to {rest.max():.0f} times in the others" in text
    shares = mine.mbu_pct.cuda_graph
    assert f"FP16 reaches {shares.fp16:.0f} % of what the memory allows, NF4 {shares.nf4:.0f} %" in text
    assert mine.mbu_pct.cuda_graph.idxmax() == "fp32"
    tuned = kept(f"{SHAPE}/tune.csv").groupby(["precision", "compile"]).tpot_ms.agg(["count", "min", "max"])
    assert set(tuned["count"]) == {3}
    told = "by its own timing three builds took {:.2f} to {:.2f} ms in FP16 and {:.2f} to {:.2f} in NF4."
    stock = [tuned.loc[(name, "stock"), end] for name in ("fp16", "nf4") for end in ("min", "max")]
    assert told.format(*stock) in text
    ours = tuned.xs("default", level="compile")
    assert f"three builds took {ours['min'].fp16:.2f} to {ours['max'].fp16:.2f} and {ours['max'].nf4:.2f}" in text
    assert f"{ours['min'].nf4:.2f}" == f"{ours['max'].nf4:.2f}"
    larger = kept(f"{LARGER}/table3_bs1.csv").query("engine == 'cuda_graph'").dropna(subset=["tpot_s"])
    before, token, times = token.cuda_graph, 1e3 * larger.set_index("precision").tpot_s, larger.engine_speedup
    assert f"{token.bf16:.2f} ms a token in BF16, {token.fp16:.2f} in FP16 and {token.nf4:.2f} in NF4" in text
    assert "(two or three passes, which differed by less than 2 %)." in text and larger.throughput_spread_pct.max() < 2
    gained = 100 * (1 - token / before)
    assert f"a token took {gained.fp16:.0f} % less than on the H100" in text
    bound = larger.set_index("precision").bound
    assert (bound.fp16, bound.nf4) == ("bandwidth", "kernels")
    assert f"`eager` took {times.min():.0f} to {times.max():.0f} times as long, on" in text
    assert set(larger.repeats) == {2, 3}
    longer = [100 * (token.nf4 / token[name] - 1) for name in ("fp16", "bf16")]
    assert f"and took {gained.nf4:.0f} % less: there an NF4 token took {longer[0]:.0f} % longer than one in" in text
    assert "memory is faster, {1:.0f} to {0:.0f} % longer than those".format(*longer) in " ".join(TEXT.split())
    both = kept(f"{LARGER}/table3_bs1.csv").pivot(index="precision", columns="engine")
    joules, idle = both.energy_j_per_token, both.energy_j_per_token - both.energy_above_idle_j_per_token
    assert f"a token took {joules.eager.fp16:.2f} J in FP16, of which {idle.eager.fp16:.2f} are what" in text
    few = joules.cuda_graph
    assert f"{few.fp16:.2f} in FP16 and {few.fp4:.2f} in FP4, on one card" in text
    assert f"and {few['int8-no-outliers']:.2f} in INT8 without outliers and {few.nf4:.2f} in NF4, on the host's other" in text
    drawn = both.power_w.cuda_graph.round().astype("Int64")
    assert f"they drew {drawn.fp16}, {drawn.fp4}, {drawn['int8-no-outliers']} and {drawn.nf4} W." in text
    assert (
        1.07 * few[["int8-no-outliers", "nf4", "fp4"]].max() < few.fp16 < few.int4 and f"32 bit, took {few.int4:.2f}:" in text
    )
    why = kept(f"{LARGER}/table3_causes.csv").set_index(["left", "right", "quantity"])
    memory = why.loc[("fp32 eager", "bf16 eager", "memory_mib")]
    told = "FP32 takes {:,.0f} MiB and BF16 {:,.0f}, {:.2f} of it; the paper's BF16 and FP16 are {:.2f} apart"
    assert told.format(*memory[["left_value", "right_value", "ratio", "published_ratio"]]) in text
    rates = why.xs("throughput_rps", level="quantity").ratio
    served = [
        rates["int4 cuda_graph", "fp4 cuda_graph"],
        rates["int4 eager", "fp4 eager"],
        rates["int8 eager", "int8-no-outliers eager"],
    ]
    told = "serve {:.1f} times as many requests with `cuda_graph`, and {:.1f} times with `eager`, where INT8 without its"
    assert told.format(*served) in text and f"outlier path serves {served[2]:.1f} times as many" in text
    ran = why.xs("gpu_busy_pct", level="quantity")
    assert f"for {ran.left_value.min():.0f} to {ran.left_value.max():.0f} % of a step, with `cuda_graph` for" in text
    assert f"for {ran.right_value.min():.0f} to {ran.right_value.max():.0f}." in text
    readme, share, fewer = " ".join(TEXT.split()), 100 * idle.eager / joules.eager, joules.eager / few
    assert f"{share.min():.0f} to {share.max():.0f} % are an idle device's" in readme
    assert f"`cuda_graph` took {fewer.min():.0f} to {fewer.max():.0f} times fewer" in readme
    assert f"took fewer there: {few.nf4:.2f} J against {few.fp16:.2f}," in readme
    part = 100 * few / few.fp16
    assert f"They took {part.nf4:.0f} and {part.fp4:.0f} % of FP16's joules a token there" in readme
    full = [kept(f"{name}/table4_maxbatch.csv").set_index(["precision", "engine"]) for name in (SHAPE, LARGER)]
    full = [card.energy_j_per_token.unstack().cuda_graph for card in full]
    assert all(1.1 < card.nf4 / card.fp16 < 1.12 for card in full)
    assert "in full batches in 15 GiB NF4 takes a tenth more, with the whole card as many" in readme
    for name in (SHAPE, LARGER):
        whole = kept(f"{name}/largest_batch.csv").query("memory_gib == 'whole' and engine == 'cuda_graph'")
        whole = whole.set_index("precision").energy_j_per_token
        assert 0.97 < whole.nf4 / whole.fp16 < 1
    builds = kept(f"{LARGER}/tune.csv").set_index("precision")
    ours = builds[builds["compile"] == "default"].tpot_ms.groupby("precision").mean()
    longer = (100 * (builds.tpot_ms / ours - 1)).groupby(builds["compile"]).agg(["min", "max"]).round().astype(int)
    told = (
        "took {min} to {max} % longer",
        "{min} to {max} % where the GPU might",
        "{min} to {max} % where its cache was",
    )
    for name, part in zip(("stock", "unled", "written"), told, strict=True):
        assert part.format(**longer.loc[name]) in text
    builds = pd.concat([kept(f"{card}/tune.csv").assign(card=card) for card in (SHAPE, LARGER)])
    ends = builds.groupby(["compile", "card", "precision"]).tpot_ms.agg(["min", "max"])
    apart = 100 * (ends["max"] / ends["min"] - 1)
    assert f"differed by {apart['stock'].min():.0f} to {apart['stock'].max():.0f} %" in " ".join(tune.__doc__.split())
    assert apart["default"].max() < 1 and "they differed by 1 % at most" in " ".join(tune.__doc__.split())


SEARCHES = {"ours": "this one", "accelerate": "accelerate's", "lightning power": "Lightning's"}


def test_notebook_04_tells_what_was_kept():
    """Its tables row by row, and in its sentences ratios, power, energy and what is left open."""
    found, text, readme = kept(f"{SHAPE}/batch.csv"), " ".join(prose("04").split()), " ".join(TEXT.split())
    assert table("| | GiB |", prose("04")) == [
        [row.precision, f"{row.memory_gib:g}", SEARCHES[row.search], str(row.largest_batch or "-"),
         str(row.true_at_most), str(row.probes), f"{row.seconds:.1f}"] for row in found.itertuples()
    ]  # fmt: skip
    cards = [kept(f"{name}/table4_maxbatch.csv").set_index(["precision", "engine"]) for name in (SHAPE, LARGER)]
    here, there = (card.dropna(subset=["throughput_rps"]) for card in cards)
    rows = table("| | engine |", prose("04"))
    assert [tuple(row[:2]) for row in rows] == list(here.index) == list(there.index)

    def told(value, digits=0):
        return "-" if pd.isna(value) else f"{value:.{digits}f}"

    for row in rows:
        mine, its = here.loc[tuple(row[:2])], there.loc[tuple(row[:2])]
        assert row[2:] == [
            told(mine.batch_size), told(mine.throughput_rps), told(1000 * mine.tpot_s, 1),
            told(1000 * mine.kernel_s_per_token, 1), told(mine.kernels_per_token),
            told(its.batch_size), told(its.throughput_rps), told(1000 * its.tpot_s, 1),
        ]  # fmt: skip
    spread = here.xs("cuda_graph", level="engine").throughput_spread_pct
    assert f"two passes of each precision in turn, which differed by {spread.max():.1f} % at most" in text
    assert set(here.repeats.unstack().cuda_graph.dropna()) == {2}
    rates, others = here.throughput_rps.unstack(), there.throughput_rps.unstack()
    gain, theirs = ((one.cuda_graph / one.eager).dropna() for one in (rates, others))
    most, past = gain.drop(["fp32", "int4"]), theirs.drop(["fp32", "int4"])
    assert (most.idxmin(), most.idxmax()) == ("bf16", "int8-no-outliers")
    assert f"serves {most.min():.1f} (BF16) to {most.max():.1f} times (INT8 without outliers) as many" in text
    assert f"on the H200 {past.min():.1f} to {past.max():.1f}; FP32 {gain.fp32:.1f} times ({theirs.fp32:.1f}" in text
    assert f"So FP16's ratio is {gain.fp16:.1f} on the H100, of two hosts, and {theirs.fp16:.1f} in one job" in text
    assert f"in 32 bit, {gain.int4:.1f}." in text
    kernels_ms = 1000 * here.kernel_s_per_token.unstack().eager
    assert f"{kernels_ms.bf16:.1f} and {kernels_ms.fp16:.1f} ms of them a token" in text
    assert f"served {rates.eager.bf16:.0f} and {rates.eager.fp16:.0f} requests/s" in text
    waited, elsewhere = (100 - card.gpu_busy_pct.unstack().eager for card in (here, there))
    assert f"BF16 waited {waited.bf16:.0f} % of each step for its launches and FP16, in another job," in text
    assert f"job, {waited.fp16:.0f} %." in text and f"`eager` waited {elsewhere.fp16:.0f} % of a step" in text
    eager, cuda_graph = there.loc["fp16", "eager"], there.loc["fp16", "cuda_graph"]
    assert eager.repeats == cuda_graph.repeats == 3
    unhindered_s = eager.ttft_s + (eager.new_tokens - 1) * eager.kernel_s_per_token
    by_work = cuda_graph.throughput_rps / (eager.batch_size / unhindered_s)
    assert f"by its kernels' traced time the ratio would be about {by_work:.1f}, which" in text
    joules = 100 * there.energy_j_per_token.unstack().cuda_graph
    assert f"NF4's took {joules.nf4:.2f} J a hundred tokens and FP16's {joules.fp16:.2f}, and on the H100" in text
    assert f"FP4 and NF4 launch as many kernels and served {rates.eager.fp4:.0f} and {rates.eager.nf4:.0f}." in text
    ran = found[found.largest_batch > 0].pivot(index=["precision", "memory_gib"], columns="search")
    ratio, more = (ran[name].ours / ran[name].accelerate for name in ("seconds", "largest_batch"))
    assert f"It takes {ratio.min():.1f} to {ratio.max():.1f} times as long" in text
    assert f"finds up to {100 * more.max() - 100:.0f} % more rows than accelerate's" in text
    fewer = (ran.largest_batch.accelerate - ran.largest_batch.ours).astype("Int64")
    assert dict(fewer[fewer > 0]) == {("int4", 15): 2} and "in INT4 held to 15 GiB 2 fewer" in text
    slower = ran.seconds["lightning power"] / ran.seconds.ours
    assert f"in {slower.min():.1f} to {slower.max():.1f} times this one's time" in text
    doubled, share = ran.share_pct["lightning power"], ran.share_pct.ours
    assert f"ends at {doubled.min():.0f} to {doubled.max():.0f} % of what fits" in text
    assert "ended at 99 % and more of what fits in all eight cases, with six probes at most" in text
    assert len(share) == 8 and share.min() >= 99 and ran.probes.ours.max() == 6
    whole = ran.loc["int8", 79.2].largest_batch.ours
    eighth = ran.loc["int8", 15].largest_batch
    assert f"15 GiB 338 rows did not run in accelerate's search, and {eighth.ours:.0f} did in this" in text
    assert eighth.accelerate == int(0.9 * 338)  # what it tries next where 338 did not run
    assert f"With all of the card it ended at {whole:.0f} rows, and at 1,032 its process died" in text
    assert (whole + 1) * 256 * 8192 == 2**31 and ran.loc["int8", 79.2].true_at_most.ours == 1031
    assert set(found[found.note.notna()].search) == {"accelerate"}
    drawn_w = [round(card.loc["fp16", "cuda_graph"].power_w) for card in (here, there)]
    assert (
        f"FP16 drew {drawn_w[0]} W on the H100 and {drawn_w[1]} on the H200, in passes of "
        f"{here.loc['fp16', 'cuda_graph'].total_s:.1f} s" in text
    )
    assert round(here.loc["fp16", "cuda_graph"].total_s, 1) == round(there.loc["fp16", "cuda_graph"].total_s, 1)
    assert all("power cap" in card.loc["fp16", "cuda_graph"]["flags"] for card in (here, there))
    assert f"serves {100 * (others.cuda_graph.fp16 / rates.cuda_graph.fp16 - 1):.0f} % more" in text
    eager, cuda_graph = here.loc["bf16", "eager"], here.loc["bf16", "cuda_graph"]
    assert (
        f"took {eager.energy_j_per_request:.2f} J a request with `eager` and "
        f"{cuda_graph.energy_j_per_request:.2f} with `cuda_graph`." in text
    )
    mine, its = (kept(f"{name}/largest_batch.csv").set_index(["memory_gib", "precision", "engine"]).sort_index()
                 for name in (SHAPE, LARGER))  # fmt: skip
    fits, theirs = (card.found.xs(("15", "eager"), level=("memory_gib", "engine")).astype(int) for card in (mine, its))
    assert list(fits[fits != theirs].index) == ["nf4-dq"]
    assert f"but for NF4-DQ ({fits['nf4-dq']} and {theirs['nf4-dq']})" in text
    assert f"{fits.nf4} against {fits.fp16}; INT8 fits {fits.int8} and INT4 {fits.int4}" in text
    assert f"ran {fits.fp16} of them in FP16 with `generate`, {fits.nf4} in NF4, {fits.int4} in `int4`" in readme
    assert f"and {fits.int8} in INT8" in readme
    whole, larger = mine.loc["whole"], its.loc["whole"]
    ends, timed = whole.found.unstack().astype("Int64"), whole.throughput_rps.unstack()
    shown, rows = whole.batch_size.fillna(whole.found).unstack(), table("| | eager: batch |", prose("04"))
    assert [row[0] for row in rows] == list(PRECISIONS)
    for precision, *row in rows:
        both = shown.loc[precision], timed.loc[precision]
        assert row == [told(one[engine]) for engine in ("eager", "cuda_graph") for one in both], precision
    assert list(timed.index[timed.cuda_graph.isna()]) == ["int8"]
    alike = ["bf16", "fp16", "fp4", "nf4", "nf4-dq"]
    apart = [one.cuda_graph[alike].max() / one.cuda_graph[alike].min() for one in (ends, timed)]
    assert apart[0] < 1.03 and apart[1] < 1.04
    assert "fit within 3 % as many rows and serve within 4 % as many requests" in text
    assert ends.eager.int8 == ends.eager["int8-no-outliers"] == larger.found["int8-no-outliers", "eager"] == 2047
    assert f"ends with `eager` at {ends.eager.int8} rows of 128 tokens, with outliers and without" in text
    held = whole.peak_reserved_mib.unstack().eager
    room = kept(f"{SHAPE}/searches.csv").query("memory_gib == 'whole' and engine == 'eager'").groupby("precision")
    unused = [round(100 * (1 - held[name] / room.room_mib.max()[name])) for name in ("int8", "int8-no-outliers")]
    assert f"leaves {unused[0]} and {unused[1]} % of the memory unreserved" in text
    assert f"FP16 fitted {larger.found['fp16', 'eager']} with `eager`, and 12,000" in text
    recorded = larger.xs("cuda_graph", level="engine")
    assert recorded.capped.all() and set(recorded.found) == {12000}
    for precision in ("fp16", "nf4"):
        pair = [f"{larger.throughput_rps[precision, engine]:.0f}" for engine in ("eager", "cuda_graph")]
        assert " and ".join(pair) in text, precision
    recorded = kept(f"{SHAPE}/searches.csv").query("engine == 'cuda_graph' and fits").groupby(["memory_gib", "precision"])
    ends, sixth = (recorded.apply(lambda ran, most=most: ran[ran.probe <= most].batch_size.max()) for most in (8, 6))
    more = (mine.probes.unstack().cuda_graph.dropna() > 6).sum()
    assert f"more than six in {more} of {len(ends)} searches" in text and (sixth / ends).min() > 0.99
    left = mine.search_gap_pct.unstack("engine")
    wide = left.eager[left.eager > 1].round().astype(int)
    assert list(wide.index) == [("15", "int4"), ("whole", "int4")] and left.cuda_graph.max() <= 1
    assert "but for `eager`'s INT4 ({} % in 15 GiB, and {} on the whole card, where".format(*wide) in text
    assert "1 % more rows might fit than were found" in text
    assert mine.probes["whole", "int4", "eager"] == PROBES["eager"] == 6 and "where six probes met no end" in text
    later = its.loc["15"].loc[["bf16", "fp16", "nf4"]]
    assert later.search_gap_pct.max() <= 1 and "The H200's later rows are as near" in text
    older = its.drop([key for key in its.index if key[0] == "15" and key[1] in ("bf16", "fp16", "nf4")])
    assert older.probes.max() == 6 and PROBES["cuda_graph"] == 8 and "had six probes and not eight" in text
    further = its.loc["15"].search_gap_pct.unstack().cuda_graph.dropna().drop(["bf16", "fp16", "nf4"])
    more = further.drop("fp32")
    assert f"`cuda_graph` leaves {more.min():.0f} to {more.max():.0f} % open, in FP32 {further.fp32:.0f}." in text
    short = mine.query("batch_size < found")
    assert set(short.loc["15"].index) == {("nf4", "eager"), ("int8", "eager")}
    assert set(short.loc["whole"].index) == {(name, "eager") for name in alike}
    assert "with `eager` on the whole card, where kernels loaded since take a little of the memory, but for" in text
    assert set(whole.index.unique("precision")) - set(alike) == {"fp32", "int4", "int8", "int8-no-outliers"}
    assert "but for FP32, INT4 and INT8; and in 15 GiB with NF4, whose" in text
    assert set(its.query("batch_size < found").index) == {("15", "bf16", "cuda_graph"), ("15", "nf4", "eager")}
    older = short.loc[
        [(*key, "eager") for key in (("15", "int8"), ("15", "nf4"), ("whole", "fp16"), ("whole", "nf4"))]
    ]
    assert set(older.batch_size - older.found + older.found // 50) == {0}
    less = 100 * (1 - short.batch_size / short.found)
    assert f"on the H100 {less.min():.0f} to {less.max():.0f} % less" in text
    assert f"({mine.batch_size['15', 'nf4', 'eager']:.0f} of NF4's and " in readme
    assert f"and {mine.batch_size['15', 'int8', 'eager']:.0f} of INT8's were timed" in readme


def test_what_is_said_of_the_kept_sweeps_is_in_them():
    text, about = (" ".join(one.split()) for one in (prose("04"), (KEPT / "README.md").read_text()))
    share = swept(LARGER)
    rows = table("| | 1 | 4 |", prose("04"))
    assert [row[0] for row in rows] == ["fp32", "bf16", "int8-no-outliers", "int4", "fp4", "nf4", "nf4-dq"]
    for precision, *told in rows:
        assert told == [f"{share[precision][size]:.0f}" for size in (1, 4, 16, 64, 256, 1024)]
    for ratio, words in (
        (share.nf4, "NF4 served {:.0f} % at batch size 1, {:.0f} to {:.0f} % at 4 to 256, and {:.0f} % at 1024."),
        (swept().nf4, "On the H100 it was {:.0f}, {:.0f} to {:.0f} and {:.0f} %;"),
    ):
        between = ratio.loc[4:256]
        assert words.format(ratio[1], between.min(), between.max(), ratio[1024]) in text
    timed = kept(f"{LARGER}/sweep.csv").pivot(index=["precision", "batch_size"], columns="engine")
    apart = timed.throughput_spread_pct
    assert (
        f"differed by {apart.cuda_graph.max():.0f} % at most with `cuda_graph` and by {apart.eager.median():.0f} % in"
        in text
    )
    assert f"with `eager`, up to {apart.eager.max():.0f}, which is" in text
    slow = timed.throughput_rps.cuda_graph.unstack()
    slow = 100 * (slow[1024] / slow[64] - 1)
    assert f"from 64 rows to 1024 they gain {slow.fp32:.0f} and {slow.int4:.0f} %." in text
    gain = timed.throughput_rps.cuda_graph / timed.throughput_rps.eager
    first, last = (gain.xs(size, level="batch_size") for size in (1, 1024))
    assert f"served {first.min():.0f} to {first.max():.0f} times as many requests at batch size 1, " in text
    assert f"size 1, {last.min():.1f} to {last.max():.1f} times at 1024" in text
    assert (
        f"{apart.cuda_graph.max():.0f} % at most with `cuda_graph`, with `eager` {apart.eager.median():.0f} in the" in about
    )
    assert f"and up to {apart.eager.max():.0f}. From 64 rows on" in about
    full = kept(f"{LARGER}/sweep.csv").query("batch_size >= 64").dropna(subset=["throughput_rps"])
    capped = full["flags"].str.contains("power cap").eq(True)
    few = kept(f"{LARGER}/sweep.csv").query("batch_size < 64")
    assert not few["flags"].str.contains("power cap").eq(True).any()
    lines = kept(f"{LARGER}/sweep.csv").query("engine == 'eager'").groupby("precision").knee.any()
    assert (len(lines), (~lines).sum()) == (9, 5) and "five of nine lines did not come to a knee" in about
    assert f"the power cap was met, in {capped.sum()} of {len(full)} rows" in about
    fp32 = timed.loc["fp32"].throughput_rps.cuda_graph / timed.loc["fp32"].batch_latency_s.cuda_graph
    assert f"is at one row by a little: {fp32[1]:.0f} requests/s a second of" in about and fp32.idxmax() == 1
    assert f"latency there, {fp32[32]:.0f} at 32 rows" in about


def test_what_is_said_of_the_kept_plans_and_the_t4_is_in_them():
    text = " ".join(prose("04").split())
    plans = kept(f"{SHAPE}/examples.csv").query("precision == 'fp16'").set_index(["engine", "examples", "order"])
    few, all_of = plans.index.unique("examples")
    longest = plans.longest_tokens.eager.unstack().sorted
    assert f"the longest of {few:,} prompts has {longest[few]:,} tokens, that of the {all_of:,} which" in text
    assert f"hold {longest[all_of]:,}:" in text
    most = plans.largest_batch.unstack("examples").groupby("engine").agg(["min", "max"])
    assert (most.xs("min", axis=1, level=1) == most.xs("max", axis=1, level=1)).all(axis=None)  # whatever the order
    most = most.xs("min", axis=1, level=1)
    assert (
        f"falls from {most[few].eager} rows to {most[all_of].eager} with `eager`, from {most[few].cuda_graph} to " in text
    )
    assert f"to {most[all_of].cuda_graph} with `cuda_graph`, whatever the order" in text
    eager = plans.loc["eager", few]
    told = (eager.batches.unsorted, eager.padding_pct.unsorted, eager.batches.sorted, eager.padding_pct.sorted,
            eager.batches.bucketed, eager.padding_pct.bucketed)  # fmt: skip
    words = (
        "are {:.0f} batches unsorted, {:.0f} % of them padding, {:.0f} sorted by length with {:.0f} %, and {:.0f} with"
    )
    assert words.format(*told[:5]) + f" {told[5]:.0f} % where" in text
    estimate = kept(f"{LARGER}/t4_estimate.csv")
    large = estimate[estimate.batch_size > 1].groupby("precision").estimate_throughput_rps.agg(["min", "max"])
    assert (large["min"] == large["max"]).all()  # whatever the batch: bound by arithmetic
    said = f"no more than {large['max'].fp16:.0f} requests/s in FP16 and {large['max'].bf16:.0f} in BF16, for which"
    published = performance(4).set_index("precision").throughput_rps
    assert said in " ".join(prose("03").split())
    assert f"the paper reports {published.fp16:.1f} and {published.bf16:.1f}." in " ".join(prose("03").split())
    t4 = estimate[estimate.batch_size == 1].set_index("precision").estimate_step_ms.round(1)
    assert t4.bf16 == t4.fp16 and t4.int4 == t4.fp4 == t4.nf4 and t4.int8 == t4["int8-no-outliers"]
    said = "no less than {} ms a token in FP32, {} in BF16 and FP16, {} in INT8 and {} in 4 bit ({} in NF4-DQ)"
    assert said.format(t4.fp32, t4.bf16, t4.int8, t4.nf4, t4["nf4-dq"]) in " ".join(prose("03").split())


def test_the_kept_searches_are_those_of_the_largest_batches():
    """What they found, in how many probes, and what the page says of those that did not run again."""
    probes = kept(f"{SHAPE}/searches.csv")
    found = kept(f"{SHAPE}/largest_batch.csv").set_index(["memory_gib", "precision", "engine"])
    late = probes.ended == "out of memory when timed"
    searched = probes[~late].groupby(["memory_gib", "precision", "engine"])
    assert len(searched) == len(found)
    for key, ran in searched:
        assert len(ran) <= PROBES[key[-1]]
        assert (ran[ran.fits].batch_size.max(), len(ran)) == (found.found[key], found.probes[key])
    gone = probes[late].set_index(["memory_gib", "precision"]).batch_size
    alike = {"bf16": 5360, "fp16": 5360, "fp4": 5408, "nf4": 5408, "nf4-dq": 5456}
    assert dict(gone) == {("15", "int8"): 724, ("15", "nf4"): 976, **{("whole", name): alike[name] for name in alike}}
    assert "Seven did not run again when timed (`out of memory when timed`), all with `eager`" in KEPT_TEXT
    assert set(probes[late].engine) == {"eager"}
    ran = probes[probes.fits].set_index(["memory_gib", "precision", "engine", "batch_size"])
    assert ran.reserved_mib["15", "nf4", "eager", 976] == 15360 and "the last of the 15,360 MiB" in KEPT_TEXT
    assert 15360 - ran.reserved_mib["15", "int8", "eager", 724] == 362 and "they left 362" in KEPT_TEXT
    left, lost = [], []
    for precision, size in alike.items():
        one = ran.loc["whole", precision, "eager", size]
        room = probes[(probes.memory_gib == "whole") & (probes.precision == precision)].set_index("engine").room_mib
        left.append(round(one.room_mib - one.reserved_mib))
        if precision not in ("fp16", "nf4"):  # whose `cuda_graph` was searched another day
            lost.append(round(room["eager"].min() - room["cuda_graph"].max()))
    assert f"The five on the whole card had left {min(left)} to {max(left)}, and where" in KEPT_TEXT
    assert f"by the same command {min(lost)} to {max(lost)} were gone before" in KEPT_TEXT


def test_notebook_02_tells_what_was_kept():
    """How many changes are significant and which, the answers that flip, the growth of perplexity, INT8's drift."""
    small, text = "h100-smollm2-135m", " ".join(prose("02").split())
    changes = kept(f"{small}/table2_change.csv")
    tested = changes[changes.p_mcnemar.notna()]
    real = tested[tested.significant.astype(bool)]
    assert f"Of {len(tested)} changes against BF16 {['no', 'one', 'two', 'three'][len(real)]} are significant" in text
    assert set(zip(real.task, real.precision, strict=True)) == {("arc_easy", "nf4"), ("arc_easy", "nf4-dq")}
    easy = tested[tested.task == "arc_easy"].set_index("precision")
    for name in ("nf4", "nf4-dq"):
        change, low, high = (f"{value:.1f}" for value in easy.loc[name, ["change_pp", "low_pp", "high_pp"]])
        assert re.search(rf"{change}( points)? \((95 % )?{low} to {high}\)", text), name
    means = changes[changes.task.str.startswith("mean over tasks")].set_index("precision")
    assert means.significant.isna().all()
    for name, words in (
        ("nf4", "{:.1f} points with NF4 ({:.1f} to {:.1f})"),
        ("int4", "{:.1f} with `int4` ({:.1f} to {:.1f})"),
    ):
        told = words.format(*-means.loc[name, ["change_pp", "high_pp", "low_pp"]].astype(float))
        assert told in " ".join(TEXT.split())
    flips = (easy.gained + easy.lost).astype(int)
    assert f"flip {flips.fp32} and {flips.fp16} of ARC-Easy's {easy['items'].iloc[0]:,} answers" in text
    assert f"flips {flips.int8} there and loses {-easy.change_pp.int8:.2f} points net" in text
    assert f"({easy.low_pp.int8:+.2f} to {easy.high_pp.int8:+.2f})" in text
    assert f"flips {flips.int4}, more than NF4's {flips.nf4}" in text and f": {easy.change_pp.int4:.2f} points" in text
    growth = kept(f"{small}/divergence.csv").set_index("precision").perplexity_change_pct
    assert f"rises by {growth.int4:.0f} %, NF4's by {growth.nf4:.0f}, INT8's by {growth.int8:.1f}" in text
    assert f"without the outlier path by {growth['int8-no-outliers']:.1f}" in text and abs(growth.fp16) < 0.1
    drift = kept(f"{small}/drift.csv").query("scorer == 'qnb'").set_index("precision")
    assert f"moved by {drift.mean_abs_logprob_diff.int8:.2f} nats on average" in text
    assert f"{drift.answers_changed.int8} of {drift['items'].int8} picks with it" in text
    four = drift.loc[["int4", "nf4", "nf4-dq"]]
    assert f"by {four.mean_abs_logprob_diff.min():.2f} to {four.mean_abs_logprob_diff.max():.2f} nats" in text
    assert f"up to {four.answers_changed.max()} picks" in text
    assert not drift.answers_changed.drop(["int8", *four.index]).any() and drift.mean_abs_logprob_diff["int8-no-outliers"] < 1e-6
    right = changes[changes.task == "gsm8k"]
    right = (right.accuracy_pct * right["items"] / 100).round().astype(int)
    assert f"every precision gets {right.min()} to {right.max()} of 400 items right" in text


def test_kept_memory_of_a_device_misses_no_more_than_is_said():
    """What was read lower is left out: a device has in use what its allocator has reserved, and more."""

    def missed(name, file):
        rows = kept(f"{name}/{file}.csv").set_index(["precision", "engine"])
        rows["missed"] = rows.peak_reserved_mib - rows.device_memory_mib
        return rows[rows.missed > 4]

    one, many = (missed(SHAPE, file) for file in ("table3_bs1", "table4_maxbatch"))
    low, most = one.missed.min(), one.missed.max()
    assert set(one.index.get_level_values("engine")) == {"cuda_graph"} and len(one) == 3
    told = f"three rows with `cuda_graph` of the H100's Table 3, by {low:.0f} to {most:.0f} MiB"
    assert f"More than 4 MiB below stand {told}" in KEPT_TEXT
    assert list(many.index) == [("fp32", "cuda_graph")] and set(many.repeats) == {2}
    assert f"of its Table 4 FP32's with `cuda_graph` {many.missed.max():.0f}, the median of two" in KEPT_TEXT
    one, many = (missed(LARGER, file) for file in ("table3_bs1", "table4_maxbatch"))
    assert f"Elsewhere in it up to {many.missed.max():.0f} MiB are missing" in KEPT_TEXT
    assert one.empty


def test_what_a_kept_rows_power_and_host_were_is_said():
    spread = kept(f"{LARGER}/table3_bs1.csv").query("engine == 'eager'").throughput_spread_pct
    assert f"Passes with `eager` differed by {spread.min():.0f} to {spread.max():.0f} %" in KEPT_TEXT
    rows = kept(f"{SHAPE}/table3_bs1.csv").pivot(index="precision", columns="engine")
    told = ["utilization_pct", "power_w", "energy_j_per_token"]
    alone, longer = (kept(f"{name}/table3_bs1.csv").query("engine == 'cuda_graph'").dropna(subset=["total_s"])
                     for name in (SHAPE, LARGER))  # fmt: skip
    assert alone.total_s.max() < 1 and alone[told].isna().all(None)
    assert f"{alone.total_s.min():.2f} to {alone.total_s.max():.2f} s" in KEPT_TEXT
    assert longer.total_s.min() > 1 and longer[told].notna().all(None)
    there = kept(f"{LARGER}/table3_bs1.csv").pivot(index="precision", columns="engine").throughput_rps.eager
    assert f"instead of {there.bf16:.2f} and {there.fp16:.2f}" in KEPT_TEXT
    its = kept(f"{LARGER}/table4_maxbatch.csv").dropna(subset=["throughput_rps"])
    met = its["flags"].str.contains("power cap").eq(True).sum()
    assert f"The power cap was met in {met} of {len(its)} rows of Table 4" in KEPT_TEXT
    slow = its.set_index(["precision", "engine"]).clock_mhz["fp16", "cuda_graph"]
    assert f"stood at {slow:,.0f} MHz of 1,980" in KEPT_TEXT and its.clock_mhz.max() == 1980
    both = kept(f"{SHAPE}/decode.csv").query("batch_size == 1 and engine == 'eager'").set_index("precision").tpot_ms
    told = f"`eager` took {both.bf16:.0f} ms a token in BF16 and {both.fp16:.0f} in FP16, with the same kernels, and"
    slow_ms = 1000 * rows.tpot_s.eager
    assert f"{told} {slow_ms.bf16:.0f} and {slow_ms.fp16:.0f} in Table 3" in KEPT_TEXT
    held = kept(f"{SHAPE}/table4_maxbatch.csv").dropna(subset=["throughput_rps"]).set_index(["precision", "engine"])
    capped = held["flags"].str.contains("software power cap").fillna(False)
    assert f"The power cap was met in {capped.sum()} of {len(held)} rows" in KEPT_TEXT
    slowed = 1 - (held.clock_mhz / held.clock_mhz.max()).unstack()
    assert 1 / 6 < slowed.cuda_graph.max() < 1 / 4 and "a fifth of the clock at most with `cuda_graph`" in KEPT_TEXT
    assert f"and {100 * slowed.eager.max():.0f} % with `eager`" in KEPT_TEXT
    token_ms = 1000 * held.tpot_s.unstack().eager
    told = "{bf16:.1f} ms in BF16 and {fp16:.1f} in FP16, {fp4:.1f} in FP4 and {nf4:.1f} in NF4".format(**token_ms)
    assert f"With `eager` a token took {told}" in KEPT_TEXT
    launched, whole = held.kernels_per_token, kept(f"{SHAPE}/largest_batch.csv").query("memory_gib == 'whole'")
    whole = whole.set_index(["precision", "engine"]).kernels_per_token
    recorded = [one[name, "cuda_graph"] for name in ("bf16", "fp16") for one in (launched, whole)]
    told = "took {:.0f} kernels a token at 1456 rows, {:.0f} at 9728; FP16's at 1473 {:.0f}, at 9664 {:.0f}"
    assert told.format(*recorded) in KEPT_TEXT
    assert set(held.index[held.speedup.isna()]) == {("fp32", "eager"), ("int8", "eager")}
    assert list(held.index[held.engine_speedup.isna()]) == [("fp32", "cuda_graph")]


def test_the_example_in_python_runs_as_it_stands(tmp_path):
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    assert "outputs/mine" in code
    made = subprocess.run(
        [sys.executable, "-c", code.replace("outputs/mine", str(tmp_path))], capture_output=True, text=True, check=True
    )
    assert "sample_easy" in made.stdout and "bf16  eager" in made.stdout
    assert (tmp_path / "figures" / "fig3_bs1_metrics.html").exists()


def test_every_precision_is_explained_with_its_bits():
    rows = {row[0].strip("`"): row for row in table("| | weights |")}
    assert list(rows) == list(PRECISIONS)
    assert {name: float(row[-1]) for name, row in rows.items()} == {name: one.bits for name, one in PRECISIONS.items()}


def test_the_gallery_is_drawn_from_the_kept_tables():
    """Every picture has its study's tables beside it: none is of something that was not measured here."""
    from qnb.report.page import GALLERY
    from qnb.report.results import reference

    known = reference(ROOT / "outputs" / "reference")
    pictures = sorted((ROOT / "outputs" / "reference" / "gallery").glob("*/*.png"))
    assert pictures
    for picture in pictures:
        assert picture.parent.name in known and picture.stem in GALLERY
        assert str(picture.relative_to(ROOT)) in TEXT


@pytest.mark.parametrize("card", [SHAPE, LARGER])
@pytest.mark.parametrize("name", ["table3_bs1", "table4_maxbatch"])
def test_what_bounds_a_kept_row_follows_from_its_shares(name, card):
    rows = kept(f"{card}/{name}.csv").dropna(subset=["gpu_busy_pct"])
    shares = (rows[["gpu_busy_pct", "mbu_pct", "mfu_pct"]] / 100).to_numpy()
    assert len(rows) and rows.bound.tolist() == [roof.bound(*row) for row in shares]
