"""The published tables and their audit, against hand counts."""

import pytest

from qnb.report import paper


def test_requests_follow_from_throughput_and_time():
    assert [round(row.requests) for row in paper.TABLE3] == [200, 200, 200, 200]
    assert all(abs(row.requests - 2000) < 1 for row in paper.TABLE4)


def test_baseline_weights_are_32_bit_wide():
    bf16, fp16 = paper.TABLE3[:2]
    # 1,235,814,400 x 4 B = 4714.3 MiB, x 2 B = 2357.1 MiB: the same overhead above either
    assert bf16.vram_mib - 4714.3 == pytest.approx(fp16.vram_mib - 2357.1, abs=2)


def test_audit_finds_what_a_hand_count_finds():
    verdicts = {(finding.source, finding.claim): finding.holds for finding in paper.audit()}
    assert verdicts["Table 3 and its text", "2,000 requests were run"] is False
    assert verdicts["Table 4 and its text", "5,000 requests were run"] is False
    assert verdicts["Table 4", "average latency is total time / requests, over 2,000 requests"] is True
    assert verdicts["Table 3", "speed-up is throughput over BF16's"] is True
    assert verdicts["Table 3, VRAM", "the BF16 baseline held its weights in 16 bit"] is False
    assert verdicts["text below Table 2", "INT4 loses 14.49 % on MMLU Social Sciences"] is False


def test_table2_is_recomputed_from_table1():
    frame = paper.change().set_index(["task", "precision"]).change_pct
    base, int4 = paper.TABLE1["hellaswag"][0], paper.TABLE1["hellaswag"][3]
    assert frame["hellaswag", "int4"] == pytest.approx((int4 / base - 1) * 100, abs=0.02)


def test_frames_have_a_row_a_fact():
    assert len(paper.accuracy()) == 36 and len(paper.change()) == 27
    assert list(paper.performance(3).precision) == list(paper.PRECISIONS)
    assert paper.performance(4).loc[1, "throughput_rps"] == 8.5661
