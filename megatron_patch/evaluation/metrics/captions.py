"""Captions, by the libraries that publish them.  They are no requirement: imported when asked for."""

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest

from megatron_patch.errors import UserError

PACKAGES = {"bleu": "sacrebleu", "cider": "pycocoevalcap"}


def check_installed(metric: str) -> None:
    """Raises UserError where this metric's library, or its Java, is not there."""
    if metric in PACKAGES and importlib.util.find_spec(PACKAGES[metric]) is None:
        raise UserError(
            f"metric {metric} needs the package {PACKAGES[metric]}, which is not installed; run "
            f"{sys.executable} -m pip install {PACKAGES[metric]}"
        )
    if metric == "cider" and shutil.which("java") is None:
        raise UserError("metric cider: the tokenizer of pycocoevalcap is a Java program, and there is no java on PATH")


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """0..100: sacrebleu's BLEU-4 of all answers together, with its own tokenizer."""
    import sacrebleu

    # One list per number of the reference; an answer with fewer has None there.
    columns = [list(column) for column in zip_longest(*references)]
    return sacrebleu.corpus_bleu(list(answers), columns).score


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """COCO's CIDEr x 100, after its PTB tokenizer."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({n: [{"caption": text} for text in texts] for n, texts in enumerate(references)})
    given = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(answers)})
    return 100 * float(Cider().compute_score(truth, given)[0])
