"""Draws the loss curves of both stages from their TensorBoard files.

python -m examples.llava_mcore.quickstart.plot_loss OUT.png NAME=TENSORBOARD_DIR ...
"""

import argparse
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_patch.errors import UserError

TAG = "lm loss"


def read_losses(folder: Path) -> tuple[list[int], list[float]]:
    """(iterations, losses) of `lm loss`, over all event files below the folder; a later run's value replaces an earlier
    one of the same iteration."""
    losses = {}
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if TAG in events.Tags()["scalars"]:
            losses.update((event.step, event.value) for event in events.Scalars(TAG))
    if not losses:
        raise UserError(f"{folder}: no '{TAG}' in any TensorBoard file below it; has the training run?")
    iterations = sorted(losses)
    return iterations, [losses[iteration] for iteration in iterations]


def plot(out: Path, runs: list[tuple[str, Path]]) -> None:
    """One panel per (name, TensorBoard folder), loss over iterations."""
    curves = [(name, *read_losses(folder)) for name, folder in runs]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(6 * len(curves), 4), squeeze=False)
    for axis, (name, iterations, losses) in zip(axes.flat, curves, strict=True):
        axis.plot(iterations, losses, linewidth=1)
        axis.set(title=name, xlabel="iteration", ylabel=TAG, yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(out, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="image to write")
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR", help="a run's name and its TensorBoard folder")
    arguments = parser.parse_args()
    runs = []
    for run in arguments.runs:
        name, equals, folder = run.partition("=")
        if not equals or not Path(folder).is_dir():
            parser.exit(2, f"error: {run}: wanted NAME=DIR with an existing TensorBoard folder\n")
        runs.append((name, Path(folder)))
    try:
        plot(arguments.out, runs)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
