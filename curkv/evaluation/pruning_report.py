"""Markdown and plot of a pruning report."""

from __future__ import annotations

from pathlib import Path

from curkv.evaluation.pruning import PREFILL_TOKENS, PruningReport, Quality
from curkv.tables import table


def write_report(report: PruningReport, directory: Path) -> Path:
    """Writes report.md, and pruning.png if matplotlib is installed.

    Returns:
        The Markdown file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        plot = write_plot(report, directory / "pruning.png")
    except ModuleNotFoundError:
        plot = None
    path = directory / "report.md"
    path.write_text(markdown(report, plot), encoding="utf-8")
    return path


def markdown(report: PruningReport, plot: Path | None = None) -> str:
    """Writes the report.

    Args:
        report: What was measured.
        plot: An image in the same directory.
    """
    parts = [
        f"# Pruning: {report.provenance.get('method', 'unknown method')}, "
        f"{report.mlp_share_removed:.1%} of the MLP weights",
        _size(report),
        _text(report),
        _tasks(report),
        _speed(report),
        _spectra(report),
    ]
    if plot:
        parts.append(f"![Perplexity and spectra]({plot.name})")
    return "\n\n".join(parts) + "\n"


def _size(report: PruningReport) -> str:
    before, after = report.base_size, report.size
    header = ["", "base", "pruned", "removed"]
    rows = [
        _counted("parameters", before.parameters, after.parameters, 1e6, "M"),
        _counted("of them in MLPs", before.mlp, after.mlp, 1e6, "M"),
        _counted("weight files", before.bytes, after.bytes, 1e6, "MB"),
    ]
    return "## Size\n\n" + table(header, rows)


def _counted(name: str, before: int, after: int, unit: float, suffix: str) -> list[str]:
    return [
        name,
        f"{before / unit:.1f} {suffix}",
        f"{after / unit:.1f} {suffix}",
        f"{1 - after / before:.1%}",
    ]


def _text(report: PruningReport) -> str:
    options = report.options
    header = ["text", "rows", "perplexity", "of the base", "ratio", "KL(base ‖ pruned)", "same top token"]
    rows = []
    for corpus in options.corpora:
        for name, quality in report.qualities.items():
            found = quality.text[corpus]
            cells = [f"{found.perplexity:.2f}", f"{found.reference_perplexity:.2f}", f"{found.ratio:.2f}"]
            rows.append([corpus, name, *cells, f"{found.kl:.3f}", f"{found.top1:.1%}"])
    note = (
        f"{options.windows} windows of {options.window_tokens} tokens of each text, seen by no method; "
        "random rows are as many, drawn with one seed."
    )
    return f"## Held-out text\n\n{note}\n\n{table(header, rows)}"


def _tasks(report: PruningReport) -> str:
    options = report.options
    scores = {"base": report.base_scores} | {name: q.scores for name, q in report.qualities.items()}
    rows = [[f"`{task}`", *(f"{found[task]:.0%}" for found in scores.values())] for task in options.tasks]
    note = f"Right answers in {options.samples} samples of {options.task_tokens} tokens each, full cache."
    return f"## Tasks\n\n{note}\n\n{table(['task', *scores], rows)}"


def _speed(report: PruningReport) -> str:
    before, after = report.base_speed, report.speed
    rows = [
        ["decode", f"{before.decode:.1f}", f"{after.decode:.1f}", f"{after.decode / before.decode:.2f}"],
        ["prefill", f"{before.prefill:.0f}", f"{after.prefill:.0f}", f"{after.prefill / before.prefill:.2f}"],
    ]
    note = (
        f"Tokens per second, one sequence, prompt of {PREFILL_TOKENS} tokens, medians of alternating rounds. "
        f"r = {report.mlp_share_removed:.3f} of the MLP weights are removed and "
        f"f = {report.mlp_share_read:.3f} of the weights read per token were in MLPs, so that "
        f"1 / (1 - r f) = {report.speed_bound:.2f} is the most that a decode bound by reading them can gain."
    )
    return f"## Speed\n\n{note}\n\n{table(['', 'base', 'pruned', 'gain'], rows)}"


def _spectra(report: PruningReport) -> str:
    """The KS distance that PruneNet minimises, layer by layer."""
    layers = range(len(report.qualities["pruned"].ks))
    rows = [
        [str(layer), *(f"{quality.ks[layer]:.3f}" for quality in report.qualities.values())]
        for layer in layers
    ]
    means = [f"{sum(quality.ks) / len(quality.ks):.3f}" for quality in report.qualities.values()]
    note = "Kolmogorov-Smirnov distance between the singular values of gate_proj before and after."
    return f"## Spectra\n\n{note}\n\n{table(['layer', *report.qualities], [['mean', *means], *rows])}"


def write_plot(report: PruningReport, path: Path) -> Path:
    """Draws perplexity ratios and the spectra's distances.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    ratios, spectra = figure.subplots(1, 2)
    for offset, (name, quality) in enumerate(report.qualities.items()):
        places = [place + 0.4 * offset for place in range(len(report.options.corpora))]
        bars = ratios.bar(places, _ratios(quality, report), 0.4, label=name)
        ratios.bar_label(bars, fmt="%.2f")
        spectra.plot(quality.ks, marker="o", markersize=3, label=name)
    ratios.axhline(1, color="black", linestyle="--", linewidth=1)
    ratios.set(ylabel="perplexity over that of the base", yscale="log")
    ratios.set_xticks([place + 0.2 for place in range(len(report.options.corpora))], report.options.corpora)
    spectra.set(xlabel="layer", ylabel="KS distance of gate_proj's spectrum", ylim=(0, None))
    spectra.legend(loc="lower left")
    figure.savefig(path, dpi=150)
    return path


def _ratios(quality: Quality, report: PruningReport) -> list[float]:
    return [quality.text[corpus].ratio for corpus in report.options.corpora]
