"""What a MODEL_SIZE stands for: a range of LLM parameters.  Data and two functions, no imports but our error."""

from megatron_patch.errors import UserError

# name: (smallest, largest + 1) number of LLM parameters, tower and projector not counted.  The ranges touch, so every
# LLM has exactly one name.  In brackets: models that fall into the range.
MODEL_SIZES: dict[str, tuple[int, int]] = {
    "tiny": (0, 100_000_000),
    "0.1B": (100_000_000, 300_000_000),  # SmolLM2-135M
    "0.5B": (300_000_000, 800_000_000),  # SmolLM2-360M, Qwen2-0.5B
    "1B": (800_000_000, 1_400_000_000),  # TinyLlama-1.1B, Llama-3.2-1B
    "1.5B": (1_400_000_000, 2_200_000_000),  # Qwen2-1.5B, SmolLM2-1.7B
    "3B": (2_200_000_000, 5_000_000_000),  # Qwen2.5-3B, Llama-3.2-3B
    "7B": (5_000_000_000, 7_800_000_000),  # Llama-2-7B, Vicuna-7B, Mistral-7B, Qwen2-7B
    "8B": (7_800_000_000, 10_000_000_000),  # Llama-3-8B
    "13B": (10_000_000_000, 13_900_000_000),  # Llama-2-13B, Vicuna-13B
    "14B": (13_900_000_000, 20_000_000_000),  # Qwen2.5-14B
    "32B": (20_000_000_000, 45_000_000_000),  # Qwen2.5-32B
    "72B": (45_000_000_000, 100_000_000_000),  # Qwen2.5-72B, Llama-2-70B
}
# Models whose name says another size than their weights have: rubraAI's Mistral-7B-Instruct-v0.3 has grown to 8.1
# billion, and stays 7B in its name and in guides.
ALSO = {"7B": (8_050_000_000, 8_200_000_000)}


def size_name(parameters: int) -> str | None:
    """The MODEL_SIZE whose range holds this number of LLM parameters; None above all of them."""
    for name, (low, high) in MODEL_SIZES.items():
        if low <= parameters < high:
            return name
    return None


def check_model_size(name: str, parameters: int) -> None:
    """Refuse a MODEL_SIZE that does not fit an LLM of so many parameters.

    Raises:
        UserError: unknown name, or another range than the one the LLM falls into; the message says which fits.
    """
    if name not in MODEL_SIZES:
        raise UserError(f"MODEL_SIZE {name!r} is unknown; wanted one of {', '.join(MODEL_SIZES)}")
    fitting = size_name(parameters)
    also_low, also_high = ALSO.get(name, (0, 0))
    if fitting != name and not also_low <= parameters < also_high:
        low, high = MODEL_SIZES[name]
        remedy = f"pass {fitting}" if fitting else "it is larger than every known size"
        raise UserError(
            f"MODEL_SIZE {name} stands for {low / 1e9:g} to {high / 1e9:g} billion LLM parameters, but this LLM has "
            f"{parameters / 1e9:.4g} billion; {remedy}"
        )
