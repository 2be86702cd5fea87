"""The loads of the experts of several runs, as a table and as charts."""

import numpy as np

TITLES = {"none": "no balancing", "loss": "auxiliary loss", "bias": "bias"}
LAST = 5  # rows of metrics that the final figures are means of


def table(rows: dict[str, list[dict]]) -> str:
    """Final loss (nats), share of the busiest expert and number of experts in use, means of the last rows."""
    lines = [f"{'balancing':<16}{'loss':>8}{'busiest expert':>16}{'experts in use':>16}{'entropy':>9}"]
    for variant, all_rows in rows.items():
        last = all_rows[-LAST:]
        load = np.mean([row["expert_load"] for row in last], axis=0)  # [layers, E]
        in_use = np.exp(-(load * np.log(load + 1e-20)).sum(axis=1)).mean()
        loss, entropy = (np.mean([row[key] for row in last]) for key in ("loss", "routing_entropy"))
        lines.append(f"{TITLES[variant]:<16}{loss:>8.3f}{load.max(axis=1).mean():>16.1%}{in_use:>16.2f}{entropy:>9.2f}")
    return "\n".join(lines)


def draw(rows: dict[str, list[dict]]):
    """A row of charts for each layer (load of each expert over training), and the loss of the three runs below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from lcr.evaluation.plots import COLOURS

    layers = len(next(iter(rows.values()))[0]["expert_load"])
    figure = Figure(figsize=(9, 2.3 * (layers + 1)), layout="constrained")
    grid = figure.add_gridspec(layers + 1, len(rows))
    for column, (variant, of_run) in enumerate(rows.items()):
        steps = [row["step"] for row in of_run]
        load = np.array([row["expert_load"] for row in of_run])  # [rows, layers, E]
        for layer in range(layers):
            axes = figure.add_subplot(grid[layer, column])
            axes.stackplot(steps, load[:, layer].T, colors=COLOURS, edgecolor="white", linewidth=0.3)
            axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 1), xlabel="step")
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            if layer == 0:
                axes.set_title(TITLES[variant])
            if column == 0:
                axes.set_ylabel(f"layer {layer + 1}\nshare of tokens")
    axes = figure.add_subplot(grid[layers, :])
    for index, (variant, of_run) in enumerate(rows.items()):
        steps, losses = zip(*((row["step"], row["loss"]) for row in of_run), strict=True)
        axes.plot(steps, losses, color=COLOURS[index], label=TITLES[variant])
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.legend(frameon=False)
    figure.suptitle("Load of eight experts, one colour each; the loss below")
    return figure
