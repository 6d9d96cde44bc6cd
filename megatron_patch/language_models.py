"""The families of language models, one row each.  A new Llama-like family is one row here and nothing elsewhere.

Every other file asks the row.  A family whose layers compute something that no field below can say needs, beside its
row, the field, and the code that computes it: model/layer_specs.py, and its weights in conversion/table.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LanguageModel:
    """How a Llama-like LLM (pre-norm, rotary, gated MLP with silu, one norm at the end) differs from Llama.

    `template` names a file of data/conversation_templates/.
    """

    template: str  # the conversation format it was tuned with: what CONVERSATION_TEMPLATE=auto stands for
    template_of_token: Mapping[str, str] = field(default_factory=dict)  # another, where the tokenizer has this token
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMSNorm over each query and key head before the rotation
    window_flag: str | None = None  # the config's flag without which its sliding_window does not count
    # Llama's name of a tensor below `model.layers.N.` (without .weight) -> this family's, where it differs.
    tensor_names: Mapping[str, str] = field(default_factory=dict)
    # model_type and class of liuhaotian's original LLaVA code; None: that code has none.
    original: tuple[str, str] | None = None
    original_also: tuple[str, ...] = ()  # other model_types of the same class

    def tensor_name(self, name: str) -> str:
        """This family's name of a layer's tensor that Llama calls `name`, as `self_attn.q_proj.weight`."""
        module, _, kind = name.rpartition(".")
        return f"{self.tensor_names.get(module, module)}.{kind}"

    def template_for(self, tokenizer: Path) -> str:
        """Name of the template that `auto` stands for with this tokenizer.json (which may be missing)."""
        text = tokenizer.read_bytes() if self.template_of_token and tokenizer.is_file() else b""
        return next((name for token, name in self.template_of_token.items() if token.encode() in text), self.template)


# By HF model_type.
LANGUAGE_MODELS = {
    "llama": LanguageModel(  # Llama 1-3, Vicuna, TinyLlama, SmolLM2
        template="v1",
        template_of_token={"<|start_header_id|>": "llama_3"},
        original=("llava_llama", "LlavaLlamaForCausalLM"),
        original_also=("llava",),  # v1.5's own folders
    ),
    "mistral": LanguageModel(template="mistral", original=("llava_mistral", "LlavaMistralForCausalLM")),
    "qwen2": LanguageModel(  # Qwen2, Qwen2.5
        template="qwen",
        qkv_bias=True,
        window_flag="use_sliding_window",
        original=("llava_qwen", "LlavaQwenForCausalLM"),
    ),
    "qwen3": LanguageModel(template="chatml", qk_norm=True, window_flag="use_sliding_window"),
}


def original_classes() -> dict[str, str]:
    """Class and model_type of the original LLaVA code -> model_type of the LLM inside."""
    return {
        name: model_type
        for model_type, row in LANGUAGE_MODELS.items()
        for name in (*(row.original or ()), *row.original_also)
    }
