"""Stage 0: an LLM and a tower become a LLaVA that says what the LLM says; tokens added to tokenizer and embedding."""

import importlib.util
import json
import sys

import pytest
import torch

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.conversion.additions import Additions, read_tokens
from megatron_patch.errors import UserError
from tests.conversion.conftest import SCRIPT, tensors_of
from tests.conversion.original_folders import projector_weights
from tests.conversion.test_round_trip import greedy, load, same_bytes
from tests.conversion.tiny_openai_clip import make_tiny_openai_clip
from tests.tiny_models import FAMILIES, make_tiny_llm, make_tiny_siglip


@pytest.fixture
def stage0(monkeypatch, capsys):
    """The builder's command line, run in this process: words -> (exit code, stdout, stderr)."""
    script = SCRIPT.with_name("build_stage0_llava.py")
    spec = importlib.util.spec_from_file_location("build_stage0_llava", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(text, vision, target, *words: object) -> tuple[int, str, str]:
        base = ["--text-model", text, "--vision-model", vision, "--save-dir", target, "--no-progress"]
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, base), *map(str, words)])
        capsys.readouterr()
        code = module.main()
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("family", "tower"),
    [("llama", "clip"), ("mistral", "clip_full"), ("qwen2", "clip_bare"), ("smollm2", "siglip"), ("qwen3", "siglip")],
)
def test_it_loads_and_says_what_the_llm_says(hub, tmp_path, stage0, family, tower):
    """0 missing, 0 unexpected; text-only logits are the LLM's bit for bit: its head was copied."""
    from transformers import AutoModelForCausalLM

    llm_folder = hub(family) if family in FAMILIES else make_tiny_llm(tmp_path / "llm", family)
    vision = make_tiny_siglip(tmp_path / "siglip", full_model=True) if tower == "siglip" else hub(tower)
    code, out, err = stage0(llm_folder, vision, tmp_path / "llava")
    assert code == 0 and "new projector mlp2x_gelu" in out, err
    model, processor = load(tmp_path / "llava")
    llm = AutoModelForCausalLM.from_pretrained(llm_folder).eval()
    ids = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs, ours = llm(ids).logits, model(input_ids=ids).logits
    assert torch.equal(theirs, ours[..., : theirs.shape[-1]]) and theirs.std() > 0.1
    greedy(model, processor, tokens=4)
    # and the folder is a source of the converter, which keeps its bytes
    convert_to_megatron(tmp_path / "llava", None, tmp_path / "ckpt", model_size="tiny", precision="fp32")
    convert_to_huggingface(tmp_path / "ckpt", tmp_path / "back", model_size="tiny", precision="fp32")
    for made in ("ckpt/llava", "again/llava"):  # a new projector stays known as new, across exports too
        if made == "again/llava":
            convert_to_megatron(tmp_path / "back", None, tmp_path / "again", model_size="tiny", precision="fp32")
        assert json.loads((tmp_path / made / "provenance.json").read_text())["projector"]["origin"] == "new"
    before, after = tensors_of(tmp_path / "llava"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys() and all(same_bytes(before[name], after[name]) for name in before)


def test_padding_tokens_and_projector(hub, tmp_path, stage0):
    """1 + 3 new tokens after 320, rows up to a multiple of 64; the projector of a file; bf16 as the LLM is."""
    llm = make_tiny_llm(tmp_path / "llm", "mistral", dtype=torch.bfloat16)
    projector = {name: tensor.to(torch.bfloat16) for name, tensor in projector_weights().items()}
    torch.save(projector, tmp_path / "p.bin")
    words = ["--vocab-size-padding", 64, "--add-tokens", "<box>", "<p_8>..<p_9>", "--mm-projector", tmp_path / "p.bin"]
    code, out, err = stage0(llm, hub("clip"), tmp_path / "llava", *words)
    assert code == 0 and "grown from 320 to 384 rows" in out and "bf16" in out, err
    weights = tensors_of(tmp_path / "llava")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert weights[f"language_model.{name}"].shape == (384, 64)
        assert same_bytes(weights[f"language_model.{name}"][:320].contiguous(), tensors_of(llm)[name])
    for number, layer in ((0, 1), (2, 2)):
        for kind in ("weight", "bias"):
            mine = weights[f"multi_modal_projector.linear_{layer}.{kind}"]
            assert same_bytes(mine, projector[f"model.mm_projector.{number}.{kind}"])
    model, processor = load(tmp_path / "llava")
    assert processor.tokenizer.convert_tokens_to_ids(["<box>", "<p_8>", "<p_9>", "<image>"]) == [320, 321, 322, 323]
    assert (model.config.image_token_id, model.config.text_config.vocab_size) == (323, 384)
    notes = json.loads((tmp_path / "llava/provenance.json").read_text())
    assert notes["projector"]["origin"] == "file" and notes["arguments"]["add_tokens"] == ["<box>", "<p_8>", "<p_9>"]


def test_openais_file_as_tower(hub, tmp_path, stage0):
    """ViT-L-14-336px.pt and its like are towers too."""
    tower = tmp_path / "ViT-tiny.pt"
    make_tiny_openai_clip(tower)
    assert stage0(hub("mistral"), tower, tmp_path / "llava")[0] == 0
    model, processor = load(tmp_path / "llava")
    greedy(model, processor, tokens=4)
    assert model.config.vision_config.hidden_size == 128


def test_same_seed_same_bytes(hub, tmp_path, stage0):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert stage0(hub("llama"), hub("clip"), tmp_path / name, "--seed", seed)[0] == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def make_32000(folder):
    """A Llama of 32000 rows, as Llama-2 has, with a tokenizer of 32000 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make_tiny_llm(folder, "llama", vocab_size=32000)
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(31997))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    assert len(fast) == 32000
    fast.save_pretrained(str(folder))
    return folder


def test_extra_ids_after_32000(hub, tmp_path, stage0, command):
    """<extra_id_0>..<extra_id_7> are 32000..32007, by the converter and by the builder; <image> follows."""
    from transformers import AutoTokenizer

    llm = make_32000(tmp_path / "llm")
    names = [f"<extra_id_{number}>" for number in range(8)]
    words = ["--source-llm", llm, "--source-clip", hub("clip"), "--target", tmp_path / "c", "--model-size", "tiny"]
    code, out, err = command(*words, "--precision", "fp32", "--add-tokens", "<extra_id_0>..<extra_id_7>")
    assert code == 0 and "<extra_id_0> is 32000, <extra_id_7> is 32007" in out, err
    assert "embedding and head grown from 32000 to 32009 rows" in out
    convert_to_huggingface(tmp_path / "c", tmp_path / "hf", model_size="tiny", precision="fp32")
    assert stage0(llm, hub("clip"), tmp_path / "llava", "--add-tokens", *names)[0] == 0
    source = tensors_of(llm)
    for folder in (tmp_path / "hf", tmp_path / "llava"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.convert_tokens_to_ids(names) == list(range(32000, 32008))
        assert tokenizer.convert_tokens_to_ids("<image>") == 32008 and len(tokenizer) == 32009
        assert tokenizer.encode("w5 <extra_id_3>w6", add_special_tokens=False) == [8, 32003, 9]
        weights = tensors_of(folder)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            mine = weights[f"language_model.{name}"]
            assert mine.shape == (32009, 64) and same_bytes(mine[:32000].contiguous(), source[name])
            mean = source[name].mean(dim=0).expand(9, -1)
            torch.testing.assert_close(mine[32000:], mean, rtol=0, atol=1e-6)


def test_tokens_of_a_whole_llava(hub, tmp_path, command):
    """Its spare rows (336 for 321 tokens) are used first; beyond them embedding and head grow."""
    for count, rows in ((15, 336), (20, 341)):
        target = tmp_path / str(count)
        words = ["--source-llm", hub("llava_llama"), "--target", target, "--model-size", "tiny", "--precision", "fp32"]
        code, _, err = command(*words, "--add-tokens", f"<t_1>..<t_{count}>")
        assert code == 0, err
        config = json.loads((target / "llava/config.json").read_text())
        assert (config["text_config"]["vocab_size"], config["image_token_index"]) == (rows, 320)
    convert_to_huggingface(tmp_path / "20", tmp_path / "hf", model_size="tiny", precision="fp32")
    _, processor = load(tmp_path / "hf")
    assert processor.tokenizer.convert_tokens_to_ids(["<t_1>", "<t_20>"]) == [321, 340]


def test_words_for_tokens():
    assert read_tokens(["<a>", "x_8..x_11"]) == ("<a>", "x_8", "x_9", "x_10", "x_11")
    assert read_tokens(["<extra_id_0>..<extra_id_0>"]) == ("<extra_id_0>",)
    assert read_tokens([]) == ()
    for words, text in (
        (["<a_3>..<a_1>"], "wanted 1 to"),
        (["<a_0>..<a_99999999>"], "wanted 1 to"),
        (["<a_0>..<b_3>"], "no range"),
        (["<a>..<b>"], "no range"),
        (["<a_0>..<a_3>", "<a_2>"], "twice: <a_2>"),
        (["a b"], "without white space"),
        ([""], "without white space"),
    ):
        with pytest.raises(UserError, match=text):
            read_tokens(words)
    with pytest.raises(UserError, match="multiple of 0"):
        Additions(vocabulary_multiple=0)


def test_refusals(hub, tmp_path, stage0):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    torch.save(projector_weights(linear=True), tmp_path / "linear.bin")
    cases = [
        ((hub("llava_llama"), hub("clip"), tmp_path / "t"), "LLM model_type is 'llava'"),
        ((hub("llama"), hub("llama"), tmp_path / "t"), "vision tower model_type is 'llama'"),
        ((tmp_path / "absent", hub("clip"), tmp_path / "t"), "is not a folder"),
        ((hub("llama"), hub("clip"), tmp_path / "full"), "is not empty"),
        ((hub("llama"), hub("clip"), tmp_path / "t", "--vocab-size-padding", "0"), "multiple of 0"),
        ((hub("llama"), hub("clip"), tmp_path / "t", "--add-tokens", "<a>", "<a>"), "twice"),
        ((hub("llama"), hub("clip"), tmp_path / "t", "--mm-projector", tmp_path / "linear.bin"), "linear, not mlp2x"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for words, text in cases:
        code, _, err = stage0(*words)
        assert code == 2 and text in err, err
    assert sorted(tmp_path.rglob("*")) == before
