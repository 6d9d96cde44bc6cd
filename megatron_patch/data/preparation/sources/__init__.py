"""Where records come from.  Each file turns one kind of data into records of LLaVA's form; the core does the rest."""

from megatron_patch.data.preparation.sources.base import Source, SourceRecord
from megatron_patch.data.preparation.sources.chat import ChatSource
from megatron_patch.data.preparation.sources.hf_dataset import Columns, HfDatasetSource
from megatron_patch.data.preparation.sources.llava import JsonSource, LlavaSource
from megatron_patch.data.preparation.sources.llava_video import LlavaVideoSource
from megatron_patch.data.preparation.sources.question_answer import QuestionAnswerSource

__all__ = [
    "ChatSource",
    "Columns",
    "HfDatasetSource",
    "JsonSource",
    "LlavaSource",
    "LlavaVideoSource",
    "QuestionAnswerSource",
    "Source",
    "SourceRecord",
]
