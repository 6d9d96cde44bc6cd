"""The arguments this toolkit adds to Megatron's parser, and their checks."""

import argparse
from pathlib import Path

from megatron_patch.llava_folder import IMAGE_ASPECT_RATIOS, TOKENIZER, LlavaFolder


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


def _grid(text: str) -> tuple[int, int] | None:
    """`2x3` -> (2, 3): columns and rows; `auto` -> None."""
    if text == "auto":
        return None
    columns, rows = text.split("x")
    if int(columns) < 1 or int(rows) < 1:
        raise ValueError(text)
    return int(columns), int(rows)


def _iterations(text: str) -> range:
    """`100-110` -> the iterations 100 to 110; `7` -> 7 alone."""
    first, _, last = text.partition("-")
    found = range(int(first), int(last or first) + 1)
    if found.start < 1 or not found:
        raise ValueError(text)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group `llava`; returns the parser, as Megatron's extra_args_provider wants."""
    group = parser.add_argument_group(title="llava")
    group.add_argument("--init-from", metavar="CHECKPOINT", required=True, help="converted checkpoint, or `none`")
    group.add_argument("--tokenizer-path", metavar="DIR", help="with --init-from none: LLaVA config and tokenizer")
    group.add_argument("--model-size", help="nominal size of the language model, e.g. 7B; checked against its config")
    group.add_argument("--train-dataset-path", metavar="PATH", required=True, help="energon folder or YAML")
    group.add_argument("--valid-dataset-path", metavar="PATH", required=True, help="energon folder or YAML")
    group.add_argument("--conversation-template", default="auto", help="auto, the name of a template, or a file")
    group.add_argument("--image-tokens", type=int, help="tokens of one image; checked against the vision tower")
    # where not given: as the checkpoint was trained, which the llava/ folder knows
    group.add_argument("--image-aspect-ratio", choices=("auto", *IMAGE_ASPECT_RATIOS), default="auto")
    group.add_argument(
        "--image-tiles",
        type=_grid,
        metavar="COLUMNSxROWS",
        help="tiles of every image, with a thumbnail behind them; 1x1: none; auto",
    )
    for name, meaning in (
        ("ignore-exif-orientation", "as LLaVA's original code"),
        ("image-conv-front", "images stand before the conversation"),
        ("image-start-end", "images stand between <im_start>, <im_end>"),
    ):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=meaning)
    group.add_argument("--data-order", choices=("cyclic", "single", "modality"), default="cyclic")
    group.add_argument(
        "--mega-batch-mult", type=int, default=50, help="with modality: optimizer steps that are sorted by length"
    )
    group.add_argument("--balance-cost", action="store_true", help="ranks get equal work: tokens, their pairs, images")
    group.add_argument("--packing", action="store_true", help="several records fill a row of --seq-length tokens")
    group.add_argument(
        "--padding-free",
        action=argparse.BooleanOptionalAction,
        help="records of a micro-batch stand in one row where they would be padded; default: with the local layers",
    )
    group.add_argument("--max-skipped-share", type=float, default=0.01, help="of the records, before the run stops")
    group.add_argument("--ema-decay", type=float, default=0.0, help="moving average of the trained weights; 0: none")
    for module in ("vision-tower", "projector"):
        group.add_argument(f"--{module}-lr", type=float, help="highest learning rate; default: --lr")
        group.add_argument(f"--{module}-weight-decay", type=float, help="default: --weight-decay")
    group.add_argument("--freeze-language-model", action="store_true")
    group.add_argument("--freeze-vision-tower", action="store_true")
    group.add_argument("--freeze-projector", action="store_true")
    group.add_argument("--feature-cache", type=Path, metavar="DIR", help="features of the frozen tower, read instead")
    group.add_argument("--allow-fresh-projector", action="store_true", help="an untrained projector is meant: stage 1")
    group.add_argument(
        "--vision-tower-recompute", choices=("false", "sel", "full"), help="default: as the language model's"
    )
    group.add_argument("--optimizer-offload-policy", choices=("false", "static", "auto"), default="false")
    group.add_argument("--on-bad-loss", choices=("stop", "skip", "rollback"), default="stop")
    group.add_argument("--spike-factor", type=float, default=0.0, help="times the median of 50 losses; 0: off")
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
    group.add_argument("--keep-last", type=int, default=0, metavar="N", help="checkpoints that are retained; 0: all")
    group.add_argument("--keep-best", action="store_true", help="under checkpoint/best")
    group.add_argument("--best-by", choices=("loss", "score"), default="loss", help="of validations; the benchmark's")
    group.add_argument("--output-path", type=Path, metavar="DIR", help="the run's own: summary, answers, profile")
    group.add_argument("--sample-answers", type=int, default=0, metavar="N", help="questions answered at validations")
    group.add_argument("--eval-benchmark", metavar="NAME", help="benchmark that is asked and scored at validations")
    group.add_argument("--eval-benchmark-data", type=Path, metavar="PATH", help="its files as they were published")
    group.add_argument("--eval-benchmark-images", type=Path, metavar="DIR", help="where they do not lie beside it")
    group.add_argument("--eval-benchmark-questions", type=int, default=64, metavar="N", help="of it, evenly chosen")
    group.add_argument("--trace-iterations", type=int, nargs=2, metavar=("FIRST", "LAST"), help="by torch's profiler")
    group.add_argument("--trace-ranks", type=int, nargs="+", default=[0], metavar="RANK")
    return parser
