"""Every template with every kind of tokenizer: ids and labels as derived without the product's code."""

import json

import pytest

from megatron_patch.data.conversation import ConversationEncoder, Exchange
from megatron_patch.tokenizer_files import load_tokenizer
from tests.data.golden import derive
from tests.data.golden.derive import FOLDER

TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.json"))
TOKENIZERS = sorted(path.name for path in (FOLDER / "tokenizers").iterdir())


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    return {kind: load_tokenizer(FOLDER / "tokenizers" / kind) for kind in TOKENIZERS}


def test_every_template_and_four_tokenizers_have_golden_conversations() -> None:
    cells = 0
    for template in TEMPLATES:
        conversations = json.loads((FOLDER / f"{template}.json").read_text())["conversations"]
        assert len(conversations) == (3 if template == "plain" else 6)
        assert all(sorted(cell["tokenizers"]) == TOKENIZERS for cell in conversations.values())
        cells += sum(len(cell["tokenizers"]) for cell in conversations.values())
    assert cells == 4 * (10 * 6 + 3)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_files_are_what_the_derivation_says(template) -> None:
    assert json.loads(json.dumps(derive.golden(template))) == json.loads((FOLDER / f"{template}.json").read_text())


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_text_ids_and_labels_are_golden(tokenizers, template, kind) -> None:
    golden = json.loads((FOLDER / f"{template}.json").read_text())
    tokenizer = tokenizers[kind]
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    encoder = ConversationEncoder(tokenizer, template, image_id, golden["image_tokens"])
    for name, cell in golden["conversations"].items():
        exchanges = [Exchange(question, answer) for question, answer in cell["turns"]]
        text = cell["text"].replace("⟦", "").replace("⟧", "")
        text = text.replace("{bos}", tokenizer.bos_token or "").replace("{eos}", tokenizer.eos_token)
        assert encoder.prompt(exchanges) == text, name
        encoded = encoder.encode(exchanges)
        assert encoded.ids == numbers(cell["tokenizers"][kind]["ids"]), name
        labels = [token if trained else -100 for token, trained in zip(encoded.ids, encoded.trained, strict=True)]
        assert labels == numbers(cell["tokenizers"][kind]["labels"]), name
        assert len(encoded.image_starts) == cell["text"].count("<image>")


def numbers(words: str) -> list[int]:
    """A row of a golden file."""
    return [-100 if word == "." else int(word) for word in words.split(" ")]


def test_the_original_agrees_wherever_it_keeps_its_count() -> None:
    """The table of README.md, in numbers."""
    found: dict[str, dict[str, int]] = {}
    for template in TEMPLATES:
        for cell in json.loads((FOLDER / f"{template}.json").read_text())["conversations"].values():
            for said in cell["tokenizers"].values():
                kind = "differs" if said["original"].endswith("differ") else said["original"]
                counts = found.setdefault(template, {})
                counts[kind] = counts.get(kind, 0) + 1
    twice = sum(counts.get("equal", 0) for counts in found.values())
    told = f"{twice} cells are confirmed twice"
    assert twice == 145 and told in (FOLDER / "README.md").read_text()
    masked = "masks the whole sample"
    assert found == {
        "plain": {"equal": 4, "none": 8},
        "v0": {"differs": 24},
        "v1": {"equal": 18, masked: 6},
        "llama_2": {"equal": 21, masked: 3},
        "llama_3": {"equal": 24},
        "mistral": {"equal": 21, masked: 3},
        "chatml": {"none": 24},
        "chatml_direct": {"equal": 18, masked: 6},
        "qwen": {"none": 24},
        "nvgpt": {"equal": 24},
        "japanese_v1": {"equal": 15, "differs": 9},
    }
