"""A report says what the run folder holds, finished or not."""

import importlib.util
import math
import random
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from launch.run_dir import record_event, settle_run_dir
from megamoe.__main__ import main
from megamoe.errors import MegamoeError
from megamoe.plan.plan import Plan
from megamoe.plan.schedule import learning_rate_at, position_at_step, sequences_at
from megamoe.report.page import Page, Section, Table, Text, to_html, to_markdown
from megamoe.report.read import read_run
from megamoe.report.summary import ledger_table, size_text, status
from megamoe.report.write import write_report
from megamoe.step import EvalResult, StepResult
from megamoe.train.metrics import MetricsFile
from tests.unit import saved
from tests.unit.test_plan_build import with_data

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def step_result(segment, step, noise):
    """A step as a healthy run would measure it."""
    before = position_at_step(segment.batch_ramp, segment.seq_len, step - 1)
    sequences = sequences_at(segment.batch_ramp, before)
    tokens = before + sequences * segment.seq_len
    seen = segment.tokens_start + tokens
    return StepResult(
        stage=segment.stage,
        segment=segment.index,
        step=segment.steps_start + step,
        tokens_seen=seen,
        step_tokens=tokens - before,
        loss_tokens=tokens - before,
        loss=2.5 + 3.7 * math.exp(-seen / 30_000) + noise.gauss(0, 0.06),
        mtp_loss=None,
        aux_losses=(("aux", 0.001),),
        grad_norm=1.0,
        lr=learning_rate_at(segment.lr, segment.tokens, tokens),
        sequences=sequences,
        seconds=0.25,
        expert_load=(1.2 + 2 * math.exp(-seen / 20_000), 1.1),
        memory_bytes=3 * 2**30,
        cp_bytes=(),
    )


def simulate(path, plan, stop_after=None):
    """A run folder as a run leaves it, cut off after so many steps of the run."""
    noise = random.Random(0)
    run_dir = settle_run_dir(path, plan, {"tokens_asked": [100_000, 7_000]})
    for segment in plan.segments:
        file = MetricsFile(path, plan, segment, segment.steps_start, print)
        for step in range(1, segment.num_steps + 1):
            result = step_result(segment, step, noise)
            if stop_after is not None and result.step > stop_after:
                file.close()
                return run_dir
            file.record_step(result)
            if step % segment.eval_every == 0 or step == segment.num_steps:
                for index, source in enumerate(("code", "korean")):
                    loss = result.loss + 0.1 + 0.35 * index
                    measured = EvalResult(
                        stage=segment.stage,
                        segment=segment.index,
                        step=result.step,
                        tokens_seen=result.tokens_seen,
                        source=source,
                        loss=loss,
                        tokens=4_096,
                    )
                    file.record_evals([measured])
        file.close()
        progress = saved.progress(
            result.tokens_seen,
            segment=segment.index,
            step=result.step,
            segment_done=True,
            ledger=tuple(drawn(plan, segment.index)),
        )
        saved.save(run_dir.checkpoints, progress)
        record_event(path, "segment_done", {"segment": segment.index})
    return run_dir


def drawn(plan: Plan, last: int) -> list[tuple[str, str, int]]:
    """Return a ledger in which source number i of a segment gave 1,000 * (i + 1) tokens."""
    return [
        (segment.stage, source.name, 1_000 * (index + 1))
        for segment in plan.segments[: last + 1]
        for index, source in enumerate(segment.sources)
    ]


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "data").mkdir()
    return with_data(tmp_path / "data")


class Tags(HTMLParser):
    """Fails on a tag that is closed out of order; keeps what a page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    return tags


@needs_matplotlib
def test_a_finished_run_is_reported_in_full(tmp_path, plan):
    run = tmp_path / "run"
    simulate(run, plan)
    files = dict(write_report(run))
    assert files == {
        "report": run / "report.html",
        "as text": run / "report.md",
        "loss plot": run / "loss.png",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = (run / "report.md").read_text()
    for part in (
        "# small\n",
        "a test. Run run: finished.",
        "**107,520** tokens seen of 107,520",
        "| general | 100,000 | 100,352 | 147 | 64 | 8 to 16 | dp2 ep2 | Bf16 | 0.001 |",
        "| evaluation | tokens seen | code | korean |",
        "| general, step 147 | 100,352 |",
        "| general: korean | 75.00% | 1,000 | 4,000 | 0.25 |",
        "000000000107520 (latest)",
        "- general.tokens",
        "![Training loss",
    ):
        assert part in text


@needs_matplotlib
def test_the_page_needs_no_other_file(tmp_path, plan):
    run = tmp_path / "run"
    simulate(run, plan)
    write_report(run)
    html = (run / "report.html").read_text()
    loaded = parsed(html).loaded
    assert len(loaded) == 1
    assert loaded[0].startswith("data:image/png;base64,")
    assert "http" not in html.replace("https://", "http")[: html.index("<body>")]


def test_without_matplotlib_the_report_says_what_is_missing(tmp_path, plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    simulate(tmp_path / "run", plan)
    assert "loss plot" not in dict(write_report(tmp_path / "run"))
    text = (tmp_path / "run" / "report.md").read_text()
    assert "No plot: matplotlib is not installed. `pip install matplotlib`, then" in text


@needs_matplotlib
def test_an_interrupted_run_says_how_far_it_came(tmp_path, plan):
    simulate(tmp_path / "run", plan, stop_after=60)
    record_event(tmp_path / "run", "interrupted", {"segment": 0})
    write_report(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.tokens_seen == 60 * 8 * 64
    assert status(run) == "28.6% of its tokens seen, interrupted"
    assert "60 of 147" in (tmp_path / "run" / "report.md").read_text()


def test_a_run_without_a_step_has_a_report(tmp_path, plan):
    settle_run_dir(tmp_path / "run", plan, {})
    write_report(tmp_path / "run")
    assert "No step has been recorded yet." in (tmp_path / "run" / "report.md").read_text()
    parsed((tmp_path / "run" / "report.html").read_text())


@needs_matplotlib
def test_a_loss_that_is_not_a_number_is_shown_as_such(tmp_path, plan):
    simulate(tmp_path / "run", plan, stop_after=30)
    file = MetricsFile(tmp_path / "run", plan, plan.segments[0], 30, print)
    result = step_result(plan.segments[0], 31, random.Random(1))
    file.record_step(replace(result, loss=math.nan, grad_norm=math.inf))
    file.close()
    write_report(tmp_path / "run")
    assert "**nan** training loss at the end" in (tmp_path / "run" / "report.md").read_text()


def test_names_cannot_inject_markup():
    table = Table(header=("<b>", "x"), rows=(("a|b", "<script>alert(1)</script>"),))
    page = Page(
        title="<i>t",
        subtitle="s & s",
        figures=(("<1>", "f"),),
        sections=(Section(title="<u>", blocks=(table, Text(text="<p>"))),),
    )
    html = to_html(page)
    assert "<script>" not in html
    assert "<script>alert(1)</script>" in parsed(html).text
    assert "| a\\|b |" in to_markdown(page)


def test_a_report_that_cannot_be_written_is_told_in_one_line(tmp_path, plan, capsys):
    run = tmp_path / "run"
    simulate(run, plan, stop_after=3)
    (run / "report.html").mkdir()
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"megamoe: error: {run}/report.html: Is a directory; mend that and give the command again\n"
    )


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path, plan):
    simulate(tmp_path / "run", plan, stop_after=5)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    assert len(read_run(tmp_path / "run").steps) == 5


def test_a_damaged_line_is_named(tmp_path, plan):
    simulate(tmp_path / "run", plan, stop_after=5)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("what\n" + path.read_text())
    with pytest.raises(MegamoeError, match=r"metrics\.jsonl:1: not JSON"):
        read_run(tmp_path / "run")


def test_what_is_no_run_folder_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run folder (it has no plan.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**30, "5.0 GiB")]
)
def test_sizes_are_binary(size, text):
    assert size_text(size) == text


def test_reporting_needs_no_torch(tmp_path, plan):
    simulate(tmp_path / "run", plan, stop_after=5)
    code = (
        "import sys; from pathlib import Path; from megamoe.report.write import write_report; "
        f"write_report(Path({str(tmp_path / 'run')!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_ledger_counts_what_was_drawn_up_to_the_latest_checkpoint(tmp_path, plan):
    run = read_run(simulate(tmp_path / "run", plan).path)
    table = ledger_table(run)
    tokens = [row[2] for row in table.rows]
    per_segment = [len(segment.sources) for segment in plan.segments]
    assert tokens == [f"{1_000 * (i + 1):,}" for count in per_segment for i in range(count)]
