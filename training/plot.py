"""loss.png: the losses of a run, drawn from its log.jsonl."""
import numpy as np

from inputs.files import naming, read_jsonl


def loss_curves(rows):
    """Rows of log.jsonl -> {stage: {"loss" or name of a validation loss: {step: value}}}."""
    curves = {}
    for row in rows:
        for name, value in row.items():
            # A logarithmic axis has no place for 0.
            if (name == "loss" or name.startswith("val_loss")) and value:
                stage = curves.setdefault(row["stage"], {"loss": {}})
                stage.setdefault(name, {})[row["step"]] = value
    return {stage: lines for stage, lines in curves.items() if lines["loss"]}


def plot_loss(log_path, png_path):
    """Draw the loss of each stage of a log.jsonl: raw thin, its mean over 1/40 of the stage thick.

    Validation losses are dots. The axis is logarithmic: on a linear one, the end of a run is flat.
    A step that a resumed run has repeated counts with its last line. Without matplotlib a line
    says so.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{png_path} not drawn: pip install matplotlib")
        return
    curves = loss_curves(read_jsonl(log_path))
    ax = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    start = 0  # steps are counted from 1 in each stage; the stages are drawn one behind the other
    named = set()
    for stage, lines in curves.items():
        points = lines.pop("loss")
        steps = sorted(points)
        losses = [points[step] for step in steps]
        window = np.ones(max(1, len(steps) // 40))
        in_window = np.convolve(np.ones(len(steps)), window, "same")  # fewer at the two ends
        mean = np.convolve(losses, window, "same") / in_window
        x = start + np.array(steps)
        line, = ax.plot(x, mean, lw=1.8, label=stage)
        ax.plot(x, losses, lw=0.6, alpha=0.3, color=line.get_color())
        for name, held in lines.items():
            color = "black" if name == "val_loss" else f"C{4 + sorted(lines).index(name) % 6}"
            label = None if name in named else name.replace("val_loss", "validation")
            ax.plot(start + np.array(sorted(held)), [held[step] for step in sorted(held)],
                    "o--", ms=3, lw=1, color=color, label=label)
            named.add(name)
        start = x[-1]
    ax.set(xlabel="step", ylabel="loss (nats per supervised token)", yscale="log")
    if curves:
        ax.legend(frameon=False)
    with naming(png_path):
        ax.figure.savefig(png_path, dpi=120)
