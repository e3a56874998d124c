"""Writes report.html, report.md and loss.png into a run folder."""

from pathlib import Path

from megamoe.plan.json import digest, write_text_atomically
from megamoe.report.page import Block, Items, Page, Picture, Section, Text, to_html, to_markdown
from megamoe.report.plot import plot_losses
from megamoe.report.read import RunRecords, read_run
from megamoe.report.summary import (
    LAST_STEPS,
    checkpoint_table,
    event_table,
    figures,
    heldout_table,
    ledger_table,
    loss_table,
    save_table,
    segment_table,
    speed_table,
    status,
)


def write_report(path: Path) -> tuple[tuple[str, Path], ...]:
    """Write the report of a run and return its files: (what it is, path).

    Raises:
        MegamoeError: the folder is no run folder, or its records are damaged.
    """
    run = read_run(path)
    picture = path / "loss.png"
    files = [("report", path / "report.html"), ("as text", path / "report.md")]
    losses: Block = Text(text="No step has been recorded yet.")
    if run.steps:
        try:
            plot_losses(run, picture)
        except ImportError:
            losses = Text(
                text="No plot: matplotlib is not installed. `pip install matplotlib`, then "
                f"`megamoe report {path}`."
            )
        else:
            files.append(("loss plot", picture))
            losses = Picture(path=picture, caption=_caption(run))
    page = _page(run, losses)
    write_text_atomically(path / "report.html", to_html(page))
    write_text_atomically(path / "report.md", to_markdown(page))
    return tuple(files)


def _page(run: RunRecords, losses: Block) -> Page:
    plan = run.plan
    scale = f" (scale {plan.scale})" if plan.scale else ""
    sections = [
        Section(title="Loss", blocks=(losses,)),
        Section(title="Stages as planned", blocks=(segment_table(run),)),
    ]
    if run.steps:
        note = (
            f"Last losses and busiest expert (of the worst layer): mean of the last {LAST_STEPS} steps. "
            "Times leave out saving and evaluating."
        )
        tables = (loss_table(run), speed_table(run), Text(text=note))
        sections.append(Section(title="Stages as run", blocks=tables))
    if run.evals:
        note = "Nats per token of text that is never trained on."
        sections.append(
            Section(title="Held-out loss", blocks=(heldout_table(run), Text(text=note)))
        )
    if plan.data is not None:
        sections.append(Section(title="Token ledger", blocks=(ledger_table(run),)))
    if run.checkpoints:
        saves = (save_table(run),) if run.saves else ()
        sections.append(Section(title="Checkpoints", blocks=(checkpoint_table(run), *saves)))
    sections.append(Section(title="What happened", blocks=(event_table(run),)))
    sections.append(Section(title="Where it ran", blocks=(Items(items=_where(run)),)))
    sections.append(Section(title="Values that no source states", blocks=(_assumed(run),)))
    return Page(
        title=f"{plan.recipe}{scale}",
        subtitle=f"{plan.source}. Run {run.path.resolve().name}: {status(run)}.",
        figures=figures(run),
        sections=tuple(sections),
    )


def _caption(run: RunRecords) -> str:
    heldout = " Points: held-out loss of each source." if run.evals else ""
    return (
        "Training loss (thin: each step; bold: mean over steps) against tokens seen; dashed lines "
        f"part the stages.{heldout} Below: tokens of the busiest expert over the mean."
    )


def _where(run: RunRecords) -> tuple[str, ...]:
    plan, environment = run.plan, run.environment
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
    cluster = plan.cluster
    return (
        f"cluster {cluster.name}: {cluster.num_nodes} x {cluster.devices_per_node} "
        f"{cluster.device_name}",
        f"host {environment.get('host')}, {environment.get('platform')}, "
        f"{environment.get('num_cpus')} CPUs",
        f"megamoe {plan.megamoe}, commit {environment.get('commit')}",
        f"Python {environment.get('python')}; {versions}",
        f"command: {' '.join(environment.get('command', []))}",
        f"seed {plan.seed}, {'deterministic' if plan.deterministic else 'not deterministic'}, "
        f"plan {digest(plan)[:12]}",
    )


def _assumed(run: RunRecords) -> Block:
    if not run.plan.assumed:
        return Text(text="None: every value of the recipe is published.")
    return Items(items=run.plan.assumed)
