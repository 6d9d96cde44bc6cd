"""Tokenizers of folders that hold a sentencepiece model and nothing else, against sentencepiece itself."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from megatron_patch.errors import UserError
from megatron_patch.tokenizer_files import load_tokenizer

GOLDEN = Path(__file__).parent / "data" / "golden" / "tokenizers"
KINDS = ("sentencepiece_bpe", "sentencepiece_unigram")


def make_model(folder: Path, kind: str) -> Path:
    """A folder with tokenizer.model alone.  As in Llama's, two spaces are a piece early in ids and last in score."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((GOLDEN / kind / "tokenizer.model").read_bytes())
    if kind == "sentencepiece_bpe":
        model.pieces.insert(259, sentencepiece_model_pb2.ModelProto.SentencePiece(piece="▁▁", score=-1e9))
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: make_model(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pairs(folders) -> dict:
    """{kind: (our tokenizer, sentencepiece)}"""
    return {
        kind: (load_tokenizer(folder), SentencePieceProcessor(model_file=str(folder / "tokenizer.model")))
        for kind, folder in folders.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_special_tokens_are_sentencepieces(pairs, kind) -> None:
    tokenizer, judge = pairs[kind]
    for text in ("which digit is it?", "USER: 赤い色  USER\n9", "\na seven", "a   b    c", "x"):
        assert tokenizer(text, add_special_tokens=False).input_ids == judge.encode(text), text
        assert tokenizer.decode(judge.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (judge.bos_id(), judge.eos_id())
    assert len(tokenizer) == len(judge)


words = st.lists(st.sampled_from(["which", "digit", "USER:", "赤い", "七", " ", "  ", "\n", "7", "é", "☃", "ink."]))


@hypothesis_settings(max_examples=300, deadline=None)
@given(first=st.sampled_from(["A", "ink", "赤", "\n"]), rest=words, kind=st.sampled_from(KINDS))
def test_any_text_becomes_sentencepieces_ids(pairs, first, rest, kind) -> None:
    tokenizer, judge = pairs[kind]
    text = " ".join([first, *rest])
    assert tokenizer(text, add_special_tokens=False).input_ids == judge.encode(text)


def test_a_folder_that_names_its_class_is_mended_too(tmp_path) -> None:
    """As lmsys/vicuna-7b-v1.5 and liuhaotian/llava-v1.5-7b: tokenizer.model and a tokenizer_config.json."""
    folder = make_model(tmp_path / "vicuna", "sentencepiece_bpe")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    tokenizer = load_tokenizer(folder)
    judge = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "which  digit, is  it"
    assert tokenizer(text, add_special_tokens=False).input_ids == judge.encode(text)
    tokenizer.save_pretrained(tmp_path / "saved")  # what a checkpoint's llava/ folder gets
    assert load_tokenizer(tmp_path / "saved")(text, add_special_tokens=False).input_ids == judge.encode(text)


CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer", None)
CONFIGS = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "mistral": {"model_type": "mistral", "tokenizer_class": "LlamaTokenizer"},
    "llava": {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}},
}


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("name", CLASSES)
def test_the_class_of_the_configuration_is_not_missed(tmp_path: Path, name: str | None, model: str) -> None:
    """The tokenizer that transformers loads when it imports the model's configuration, which ours does not."""
    from transformers import AutoTokenizer

    for kind in ("llama_3", "qwen", *KINDS):
        folder = tmp_path / kind
        shutil.copytree(GOLDEN / kind, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
        settings = {key: value for key, value in settings.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "config.json").write_text(json.dumps(CONFIGS[model]))
        ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
        assert type(ours) is type(theirs) and ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
        assert ours.special_tokens_map == theirs.special_tokens_map and ours("a  b é 7") == theirs("a  b é 7")


def test_the_mistakes_are_still_there(folders) -> None:
    """transformers alone: when this fails, _read_as_sentencepiece can go."""
    from transformers import AutoTokenizer

    for kind in KINDS:
        tokenizer = AutoTokenizer.from_pretrained(folders[kind])
        judge = SentencePieceProcessor(model_file=str(folders[kind] / "tokenizer.model"))
        text = "which  digit"
        assert tokenizer(text, add_special_tokens=False).input_ids != judge.encode(text)


def test_a_model_that_transformers_reads_differently_is_refused(tmp_path) -> None:
    folder = make_model(tmp_path / "spaces", "sentencepiece_unigram")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    model.normalizer_spec.remove_extra_whitespaces = True  # sentencepiece makes one space of two
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"reads it differently from sentencepiece .* put the model's tokenizer.json"):
        load_tokenizer(folder)


def test_folders_without_a_tokenizer_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder; wanted the one with the tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
