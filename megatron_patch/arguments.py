"""The arguments this toolkit adds to Megatron's parser, and their checks."""

import argparse
from pathlib import Path

from megatron_patch.launch.rows import add_to_parser
from megatron_patch.launch.training import ARGUMENTS, options
from megatron_patch.llava_folder import TOKENIZER, LlavaFolder


def auto_template(folder: LlavaFolder, for_next_stage: bool = False) -> str:
    """The template that `auto` stands for: the one the folder's weights were trained with, else their model's.

    Args:
        folder: of a checkpoint, or an exported one.
        for_next_stage: of a run that starts from the folder: `plain`, stage 1's captions, is not taken over.
    Raises:
        UserError: the folder's files cannot be read, or the language model is not known.
    """
    settings = folder.training_settings
    trained = settings.conversation_template if settings else None
    if trained is not None and not (for_next_stage and trained == "plain"):
        return trained
    return folder.geometry().language.family.template_for(folder.path / TOKENIZER)


def _iterations(text: str) -> range:
    """`100-110` -> the iterations 100 to 110; `7` -> 7 alone."""
    first, _, last = text.partition("-")
    found = range(int(first), int(last or first) + 1)
    if found.start < 1 or not found:
        raise ValueError(text)
    return found


# Of the launchers' rows those that a start by hand must give, too.
REQUIRED = ("--init-from", "--train-dataset-path", "--valid-dataset-path")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group `llava`; returns the parser, as Megatron's extra_args_provider wants.

    Most are rows of the launchers (launch/training.py) with their defaults; those below no user types.
    """
    group = parser.add_argument_group(title="llava")
    add_to_parser(group, (*ARGUMENTS, *options(stage=2)))
    for action in group._group_actions:
        action.required = action.option_strings[0] in REQUIRED
    parser.set_defaults(optimizer_offload_policy="false")
    group.add_argument("--allow-fresh-projector", action="store_true", help="an untrained projector is meant: stage 1")
    group.add_argument("--bad-batches-file", type=Path, metavar="JSONL", help="bad micro-batches are noted there")
    group.add_argument(
        "--skip-train-iteration-range",
        type=_iterations,
        nargs="+",
        default=[],
        metavar="FIRST-LAST",
        help="iterations whose records are drawn and not trained on",
    )
    group.add_argument("--stop-at", type=float, metavar="SECONDS", help="since 1970: end before, with a checkpoint")
    group.add_argument("--trace-iterations", type=int, nargs=2, metavar=("FIRST", "LAST"), help="by torch's profiler")
    group.add_argument("--trace-ranks", type=int, nargs="+", default=[0], metavar="RANK")
    return parser
