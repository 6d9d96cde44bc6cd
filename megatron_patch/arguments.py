"""The words this toolkit adds to Megatron's parser, and their checks."""

import argparse

TEMPLATES = ("auto", "plain", "v1", "mistral", "qwen")
# the conversation format each language model was tuned with: what `auto` stands for
TEMPLATE_OF_MODEL = {"llama": "v1", "mistral": "mistral", "qwen2": "qwen", "qwen3": "qwen"}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group `llava`; returns the parser, as Megatron's extra_args_provider wants."""
    group = parser.add_argument_group(title="llava")
    group.add_argument("--init-from", metavar="CHECKPOINT", required=True, help="converted checkpoint, or `none`")
    group.add_argument("--tokenizer-path", metavar="DIR", help="with --init-from none: LLaVA config and tokenizer")
    group.add_argument("--model-size", help="nominal size of the language model, e.g. 7B; checked against its config")
    group.add_argument("--train-dataset-path", metavar="DIR", required=True, help="energon folder")
    group.add_argument("--valid-dataset-path", metavar="DIR", required=True, help="energon folder")
    group.add_argument("--conversation-template", choices=TEMPLATES, default="auto")
    group.add_argument("--image-tokens", type=int, help="tokens of one picture; checked against the vision tower")
    group.add_argument("--image-aspect-ratio", choices=("crop", "pad"), default="crop")
    group.add_argument("--freeze-language-model", action="store_true")
    group.add_argument("--freeze-vision-tower", action="store_true")
    group.add_argument("--freeze-projector", action="store_true")
    group.add_argument("--allow-fresh-projector", action="store_true", help="an untrained projector is meant: stage 1")
    group.add_argument("--optimizer-offload-policy", choices=("false", "static", "auto"), default="false")
    return parser
