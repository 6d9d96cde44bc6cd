"""The quickstart's own parts: data that is honest, models that any transformers user can load, a count that counts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM

from examples.llava_mcore.quickstart import (
    answer,
    compare_scores,
    make_digit_rows,
    make_digits,
    make_models,
    train_tower,
)
from megatron_patch.errors import UserError
from megatron_patch.llava_kinds import LLAVA_KINDS
from megatron_patch.tile_plan import AnyResolution

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "digits"
    make_digits.make_digits(folder, copies=1)
    return folder


@pytest.fixture(scope="module")
def records(digits):
    return {name: json.loads((digits / name / "digits.json").read_text()) for name in ("stage1", "stage2", "heldout")}


@pytest.fixture(scope="module")
def models(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "models"
    make_models.make_models(folder, [digits / "stage1/digits.json", digits / "stage2/digits.json"])
    return folder


def originals(records: list[dict]) -> set[str]:
    return {record["id"].split("-")[0] for record in records}


def test_training_and_held_out_images_share_no_original_digit(records):
    held_out = originals(records["heldout"])
    assert len(held_out) == len(records["heldout"]) == 359
    for stage in ("stage1", "stage2"):
        assert len(originals(records[stage])) == 1438
        assert not originals(records[stage]) & held_out


def test_records_are_in_llavas_format_and_every_image_is_there(digits, records):
    for name, turns in (("stage1", 2), ("stage2", 8), ("heldout", 10)):
        for record in records[name]:
            roles = [turn["from"] for turn in record["conversations"]]
            assert roles == ["human", "gpt"] * (turns // 2)
            marks = [turn["value"].count("<image>") for turn in record["conversations"]]
            assert marks == [1] + [0] * (turns - 1)
        with Image.open(digits / name / "images" / records[name][0]["image"]) as image:
            assert (image.size, image.mode) == ((28, 28), "RGB")
        assert len(list((digits / name / "images").iterdir())) == len({record["image"] for record in records[name]})


def test_answers_are_true(digits, records):
    """The digit against scikit-learn's label, the colours against the image's own pixels."""
    labels = make_digits.load_digits().target
    for record in records["heldout"][:100]:
        turns = record["conversations"]
        told = {q["value"].replace("<image>\n", ""): a["value"] for q, a in zip(turns[::2], turns[1::2], strict=True)}
        digit = int(labels[int(record["id"].removeprefix("digit").split("-")[0])])
        assert told["Which digit is this?"] == str(digit)
        assert told["Is it even or odd?"] == ("odd" if digit in (1, 3, 5, 7, 9) else "even")
        assert told["Is it greater than four?"] == ("yes" if digit in (5, 6, 7, 8, 9) else "no")
        pixels = np.asarray(Image.open(digits / "heldout/images" / record["image"])).reshape(-1, 3).astype(float)
        corner = pixels[0]
        nearest = min(make_digits.GROUNDS, key=lambda name: np.abs(corner - make_digits.GROUNDS[name]).max())
        assert told["What colour is the background?"] == nearest
        farthest = pixels[np.linalg.norm(pixels - corner, axis=1).argmax()]
        nearest = min(make_digits.INKS, key=lambda name: np.linalg.norm(farthest - make_digits.INKS[name]))
        assert told["What colour is the ink?"] == nearest


def test_colours_stay_apart_under_jitter():
    inks, grounds = (np.array(list(palette.values())) for palette in (make_digits.INKS, make_digits.GROUNDS))
    for first, second in ((inks, inks), (grounds, grounds), (inks, grounds)):
        distances = np.abs(first[:, None] - second[None]).max(-1)
        assert distances[distances > 0].min() > 4 * make_digits.COLOUR_JITTER


def test_digits_are_not_overwritten(digits):
    with pytest.raises(UserError, match="exists already"):
        make_digits.make_digits(digits)


def test_models_are_ordinary_hugging_face_folders(models):
    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    llm, loading = LlamaForCausalLM.from_pretrained(models / "llm", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert llm.config.vocab_size == len(tokenizer)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert "<image>" not in tokenizer.get_vocab()

    tower, loading = CLIPVisionModel.from_pretrained(models / "clip", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    pixels = CLIPImageProcessor.from_pretrained(models / "clip")(Image.new("RGB", (28, 28)), return_tensors="pt")
    features = tower(pixels.pixel_values, output_hidden_states=True).hidden_states[-2]
    assert features.shape == (1, 1 + 16, make_models.HIDDEN)


def test_tokenizer_is_lossless_and_words_are_single_tokens(models):
    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    for text in ("a red 7 on black\n", "\nIs it even or odd? ASSISTANT: odd</s>", "Grüße, 數字 \t 3"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for word in (*make_digits.INKS, *make_digits.GROUNDS, *"0123456789", "even", "odd", "yes", "no"):
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1
    assert len(tokenizer(make_models.V1_WORDS, add_special_tokens=False).input_ids) < 36
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def test_initial_weights_pass_signals_on(models):
    """Output of an untrained layer stack must depend on its input: std 1/sqrt(fan_in), not 0.02."""
    llm = LlamaForCausalLM.from_pretrained(models / "llm")
    weight = llm.model.layers[0].mlp.down_proj.weight
    assert abs(weight.std().item() * weight.shape[1] ** 0.5 - 1) < 0.05
    patch = CLIPVisionModel.from_pretrained(models / "clip").state_dict()
    (name,) = [name for name in patch if name.endswith("patch_embedding.weight")]
    assert abs(patch[name].std().item() * (3 * 7 * 7) ** 0.5 - 1) < 0.05


@pytest.mark.slow  # the quickstart itself says so, too
def test_the_tower_learns_to_see(digits, models, tmp_path):
    """From the layer that LLaVA takes, in every patch; the folder is the tower's, with other weights."""
    few = tmp_path / "few"
    few.mkdir()
    (few / "images").symlink_to(digits / "stage1/images")
    (few / "digits.json").write_text(json.dumps(json.loads((digits / "stage1/digits.json").read_text())[:64]))
    right = train_tower.train_tower(models / "clip", few, tmp_path / "tower", epochs=30)
    assert right[0] < 0.3 and right[-1] > 0.9, "it does not learn one batch by heart"
    before, after = (load_file(folder / "model.safetensors") for folder in (models / "clip", tmp_path / "tower"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("layers.3." in name for name in moved) and not any("layers.4." in name for name in moved)
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "tower" / name).read_text()) == json.loads((models / "clip" / name).read_text())
    with pytest.raises(UserError, match="exists already"):
        train_tower.train_tower(models / "clip", few, tmp_path / "tower")
    absent = run_python("-m", "examples.llava_mcore.quickstart.train_tower", "none", str(few), str(tmp_path / "new"))
    assert absent.returncode == 2 and "make models and digits first" in absent.stderr


def test_score_counts_exact_answers_and_knows_chance():
    def lines(scores: list[float]) -> list[dict]:
        texts = ["Which digit is this?"] * 4 + ["Is it even or odd?"]
        truths = [*"7738", "odd"]
        return [
            {"prompt": text, "references": [truth], "score": hit}
            for text, truth, hit in zip(texts, truths, scores, strict=True)
        ]

    rows = answer.score(lines([1.0, 1.0, 0.0, 1.0, 1.0]), lines([1.0, 0.0, 1.0, 0.0, 0.0]))
    assert [(row.text, row.count, row.exact, row.swapped, row.chance) for row in rows] == [
        ("Which digit is this?", 4, 0.75, 0.5, 0.5),
        ("Is it even or odd?", 1, 1.0, 0.0, 1.0),
    ]
    assert answer.total(rows).exact == pytest.approx(4 / 5)
    assert answer.total(rows).count == 5
    assert "75.0%" in answer.table(rows)


@pytest.fixture(scope="module")
def untrained_llava(models, tmp_path_factory):
    """The two models joined by transformers itself, without our converter."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    folder = tmp_path_factory.mktemp("quickstart") / "llava"
    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    llm = LlamaForCausalLM.from_pretrained(models / "llm")
    llm.resize_token_embeddings(image_id + 1)
    tower = CLIPVisionModel.from_pretrained(models / "clip")
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_index=image_id,
        vision_feature_layer=-2,
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor.from_pretrained(models / "clip")
    images.save_pretrained(folder)  # a file of its own, as an export has it
    LlavaProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_untrained_model_scores_at_most_chance(untrained_llava, digits, tmp_path):
    """The whole way of the answers with a real model: files, figures, exit code; the public command says the same."""
    few = tmp_path / "few"
    few.mkdir()
    (few / "images").symlink_to(digits / "heldout/images")
    (few / "digits.json").write_text(json.dumps(json.loads((digits / "heldout/digits.json").read_text())[:40]))
    out = tmp_path / "answers"
    command = ["-m", "examples.llava_mcore.quickstart.answer", str(untrained_llava), str(few)]
    result = run_python(*command, "--out", str(out), "--at-least", "0.9")
    assert result.returncode == 1, result.stderr
    assert "wanted at least 90%" in result.stderr
    lines = [json.loads(line) for line in (out / "scored.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * 40
    exact = sum([line["answer"]] == line["references"] for line in lines) / len(lines)
    assert exact < 0.4
    assert json.loads((out / "results.json").read_text())["scores"]["all"]["accuracy"] == pytest.approx(100 * exact)
    swapped = [json.loads(line) for line in (out / "other_images/scored.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in swapped] == [line["prompt"] for line in lines]
    assert f"{exact:.1%}" in result.stdout.splitlines()[-1]
    with Image.open(out / "answers.png") as sheet:
        assert sheet.width > 1000


def test_missing_questions_are_refused(untrained_llava, tmp_path):
    command = ["-m", "examples.llava_mcore.quickstart.answer", str(untrained_llava), str(tmp_path / "none")]
    result = run_python(*command, "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert result.stderr.strip().endswith("make it with examples/llava_mcore/quickstart/make_digits.py")
    assert not (tmp_path / "out").exists()


def test_loss_curves_are_read_from_event_files(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    from examples.llava_mcore.quickstart import plot_loss

    # A killed and a resumed run: the second writes iterations 3 and 4, the third was there before.
    for number, losses in enumerate(({1: 3.0, 2: 2.0, 3: 9.0}, {3: 1.5, 4: 1.0})):
        with SummaryWriter(tmp_path / "tensorboard", filename_suffix=str(number)) as writer:
            for iteration, loss in losses.items():
                writer.add_scalar("lm loss", loss, iteration)
        for file in (tmp_path / "tensorboard").iterdir():
            os.utime(file, (number, number)) if file.name.endswith(str(number)) else None
    assert plot_loss.read_losses(tmp_path / "tensorboard") == ([1, 2, 3, 4], [3.0, 2.0, 1.5, 1.0])
    plot_loss.plot(tmp_path / "loss.png", [("stage 1", tmp_path / "tensorboard")])
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (600, 400)
    with pytest.raises(UserError, match="no 'lm loss'"):
        plot_loss.read_losses(tmp_path / "nothing")


def test_quickstart_leaves_a_foreign_folder_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    result = run_quickstart("--fresh", str(tmp_path))
    assert result.returncode == 2
    assert "is not a quickstart's folder" in result.stderr
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "rows"
    make_digit_rows.make_digit_rows(folder, pictures=300)
    return folder


def test_rows_of_digits_are_wide_and_tall_and_share_no_original(rows):
    """Every picture is two or three squares long, of three sizes; a grid of tiles shows each square by itself."""
    rule = AnyResolution(tuple(map(tuple, LLAVA_KINDS["llava_next"].pinpoints(28))), side_px=28, patches=4)
    originals, shapes = {}, set()
    for name, count in (("train", 300), ("heldout", make_digit_rows.HELD_OUT)):
        records = json.loads((rows / name / "digits.json").read_text())
        assert len(records) == count
        originals[name] = {one for record in records for one in record["id"].split("-")[1:-1]}
        for record in records:
            digits = len(record["id"].split("-")[1:-1])
            question, told = (turn["value"] for turn in record["conversations"])
            assert question == "<image>\nWhich inks are these?" and len(told.split()) == digits
            with Image.open(rows / name / "images" / record["image"]) as image:
                shapes.add((image.height, image.width))
                short, long = sorted(image.size)
                assert long == digits * short
                plan = rule.plan((image.height, image.width))
            assert plan.tiles == 1 + digits and sorted(plan.shown) == [4, 4 * digits]
    assert not originals["train"] & originals["heldout"]
    assert shapes == {
        shape for side in (28, 35, 42) for count in (2, 3) for shape in ((side, count * side), (count * side, side))
    }


def test_answers_about_rows_are_true_in_order(rows):
    """The ink against the brightest pixel of the square where its digit stands."""
    inks = np.array(list(make_digits.INKS.values()), dtype=float)
    for record in json.loads((rows / "heldout/digits.json").read_text())[:60]:
        told = record["conversations"][1]["value"].split()
        pixels = np.asarray(Image.open(rows / "heldout/images" / record["image"])).astype(float)
        for square, ink in zip(
            np.split(pixels, len(told), axis=int(pixels.shape[1] > pixels.shape[0])), told, strict=True
        ):
            brightest = square.reshape(-1, 3)[square.sum(-1).argmax()]
            assert list(make_digits.INKS)[np.linalg.norm(inks - brightest, axis=1).argmin()] == ink


def test_scores_are_put_beside_each_other(tmp_path):
    for name, scores in (("first", [1, 1, 1, 0]), ("second", [1, 0, 1, 0])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"score": score}) for score in scores]
        (tmp_path / name / "scored.jsonl").write_text("\n".join(lines) + "\n")
    assert compare_scores.exact_share(tmp_path / "first") == 0.75
    words = ["-m", "examples.llava_mcore.quickstart.compare_scores", str(tmp_path / "scores.json")]
    runs = [f"any={tmp_path / 'first'}", f"one tile={tmp_path / 'second'}"]
    done = run_python(*words, *runs, "--better-by", "0.2")
    assert (done.returncode, done.stdout) == (0, "all exactly right: any 75.0%, one tile 50.0%\n")
    assert json.loads((tmp_path / "scores.json").read_text()) == {"any": 0.75, "one tile": 0.5}
    worse = run_python(*words, *runs, "--better-by", "0.3")
    assert (worse.returncode, worse.stderr) == (1, "error: 75.0% is not better by 30%\n")
    absent = run_python(*words, f"any={tmp_path / 'third'}")
    assert absent.returncode == 2 and "wanted a folder that answer.py has written" in absent.stderr


def test_one_quickstart_does_not_go_on_in_the_others_folder(tmp_path):
    for step, words in (("make_digits", ["--any-resolution"]), ("make_digit_rows", [])):
        folder = tmp_path / step
        (folder / ".steps").mkdir(parents=True)
        (folder / ".steps" / step).write_text("finished")
        for more in ([], ["--fresh"]):
            refused = run_quickstart(*words, *more, str(folder))
            assert refused.returncode == 2
            assert refused.stderr == f"error: {folder} holds the other quickstart ({step}); name a new one\n"
        assert (folder / ".steps" / step).read_text() == "finished"


def test_the_default_quickstart_has_its_steps():
    """Each with what it makes."""
    text = (ROOT / "examples/llava_mcore/quickstart.sh").read_text()
    default = text.rpartition("\nfi\n")[2]
    assert re.findall(r'^step ".*" (\S+) (\S+)$', default, re.M) == [
        ("data", "make_digits"),
        ("models", "make_models"),
        ("tower", "teach_tower"),
        ("data/stage1/wds", "convert_stage1_data"),
        ("data/stage2/wds", "convert_stage2_data"),
        ("checkpoint", "convert_models"),
        ("stage1", "train_stage1"),
        ("stage2", "train_stage2"),
        ("exported", "export_model"),
        ("answers", "answer_questions"),
        ("loss.png", "plot_losses"),
    ]


def test_quickstart_help_and_wrong_words():
    told = run_quickstart("--help").stdout
    assert "--fresh" in told and "--any-resolution [--fresh] [FOLDER]" in told
    assert run_quickstart("--quick").returncode == 2
    assert run_quickstart("a", "b").returncode == 2


def run_quickstart(*words: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "examples/llava_mcore/quickstart.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def run_python(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
