"""Uses exported folders as anybody would, with whatever transformers is installed (4.57 or 5).

    python -m tests.conversion.use_export RESULT.json FOLDER...

A folder named hub* goes through AutoProcessor, AutoModelForImageTextToText and pipeline; one named original* through a
reader that does what the original LLaVA code does, told again in own words.  Nothing of the toolkit is imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

QUESTION, MORE = "What digit is this?", "What colour is the ink?"
NEW_TOKENS = 8
IMAGE_INDEX = -200  # the original's number for an image


def use_hub(folder: Path, image: Image.Image) -> dict[str, Any]:
    """Ids of a chat, its pixels, greedy tokens, and what the pipeline answers."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    first = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}
    chats = [[first]]
    chats.append([first, answer("A seven."), {"role": "user", "content": [{"type": "text", "text": MORE}]}])
    result: dict[str, Any] = {"type": type(processor.tokenizer).__name__, "ids": [], "tokens": []}
    for chat in chats:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert sorted(inputs) == ["attention_mask", "input_ids", "pixel_values"], sorted(inputs)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        result["ids"].append(inputs["input_ids"][0].tolist())
        result["tokens"].append(output[0, inputs["input_ids"].shape[1] :].tolist())
    result["pixels"] = inputs["pixel_values"].double().flatten().tolist()
    pipeline = transformers.pipeline("image-text-to-text", model=str(folder), device="cpu")
    said = pipeline(text=chats[0], max_new_tokens=NEW_TOKENS)[0]["generated_text"][-1]["content"]
    result["pipeline"] = said == processor.decode(result["tokens"][0], skip_special_tokens=True)
    result["greedy"] = model.generation_config.do_sample is False
    return result


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def use_original(folder: Path, image: Image.Image) -> dict[str, Any]:
    """The original's way: a tokenizer that is not fast, the text cut at images, an embedding put together by hand."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=False)
    weights = load_file(folder / "model.safetensors")
    rows = config["vocab_size"]
    if config["mm_use_im_start_end"]:
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    # The embedding is cut or grown to the tokenizer's length.
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][: min(rows, len(tokenizer))]
    weights["lm_head.weight"] = weights["lm_head.weight"][: min(rows, len(tokenizer))]
    assert len(tokenizer) <= rows, "rows of the embedding would be random"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": f"<image>\n{QUESTION}"}], tokenize=False)
    ids = cut_at_images(tokenizer, prompt)
    language = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{name: value for name, value in config.items() if name not in ("model_type", "architectures")}
            | {"vocab_size": len(tokenizer)}
        )
    ).eval()
    inside = ("model.mm_projector.", "model.vision_tower.")
    language.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith(inside)})
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    features = see(weights, config, squared(image, processor, config), processor)
    embed = language.get_input_embeddings()
    where = ids.index(IMAGE_INDEX)
    parts = [embed(torch.tensor(ids[:where])), features, embed(torch.tensor(ids[where + 1 :]))]
    with torch.inference_mode():
        output = language.generate(inputs_embeds=torch.cat(parts)[None], max_new_tokens=NEW_TOKENS, do_sample=False)
    return {"type": type(tokenizer).__name__, "prompt": prompt, "ids": ids, "tokens": output[0].tolist()}


def cut_at_images(tokenizer: Any, prompt: str) -> list[int]:
    """Each piece between images is tokenized by itself, with a BOS of which only the very first is kept."""
    pieces = [tokenizer(piece).input_ids for piece in prompt.split("<image>")]
    bos = pieces[0][:1] == [tokenizer.bos_token_id]
    ids = pieces[0][:1] if bos else []
    for number, piece in enumerate(pieces):
        ids += ([IMAGE_INDEX] if number else []) + piece[int(bos) :]
    return ids


def squared(image: Image.Image, processor: Any, config: dict[str, Any]) -> Image.Image:
    """image_aspect_ratio pad: in the middle of a square of the mean colour."""
    if config["image_aspect_ratio"] != "pad":
        return image
    side = max(image.size)
    colour = tuple(int(mean * 255) for mean in processor.image_mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def see(weights: dict, config: dict[str, Any], image: Image.Image, processor: Any) -> torch.Tensor:
    """Features of the tower's layer, without its class token, through the projector."""
    prefix = "model.vision_tower.vision_tower."
    tower_config = transformers.CLIPVisionConfig.from_pretrained(Path(config["mm_vision_tower"]))
    tower = transformers.CLIPVisionModel(tower_config).eval()
    tower.load_state_dict({name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)})
    pixels = processor.preprocess(image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[config["mm_vision_select_layer"]][0, 1:]
        linear = torch.nn.functional.linear
        first, second = (
            [weights[f"model.mm_projector.{layer}.{kind}"] for kind in ("weight", "bias")] for layer in (0, 2)
        )
        return linear(torch.nn.functional.gelu(linear(hidden, *first)), *second)


def use(folders: list[Path], image: Image.Image) -> dict[str, Any]:
    """Results by name of the folder, and the version."""
    transformers.logging.set_verbosity_error()
    results = {
        folder.name: (use_original if folder.name.startswith("original") else use_hub)(folder, image)
        for folder in folders
    }
    return {"version": transformers.__version__} | results


def make_image() -> Image.Image:
    """Wider than high, of random colours."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (25, 40, 3), dtype=np.uint8))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(use([Path(name) for name in sys.argv[2:]], make_image())))
