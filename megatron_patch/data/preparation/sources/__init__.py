"""Where records come from.  Each file turns one kind of data into records of LLaVA's form; the core does the rest."""

from megatron_patch.data.sources.chat import ChatSource
from megatron_patch.data.sources.hf_dataset import Columns, HfDatasetSource
from megatron_patch.data.sources.llava import JsonSource, LlavaSource
from megatron_patch.data.sources.question_answer import QuestionAnswerSource
from megatron_patch.data.sources.source import Source, SourceRecord

__all__ = [
    "ChatSource",
    "Columns",
    "HfDatasetSource",
    "JsonSource",
    "LlavaSource",
    "QuestionAnswerSource",
    "Source",
    "SourceRecord",
]
