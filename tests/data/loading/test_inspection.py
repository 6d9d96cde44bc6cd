"""inspect_dataset.py shows what training makes of records: golden ids and labels, images, figures, refusals."""

import argparse
import io
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_patch.data.loading.inspection import Figures, to_terminal, unshifted_labels, visible
from megatron_patch.data.loading.loader import build_valid_loader
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from megatron_patch.tokenizer_files import load_tokenizer
from tests.data.factories import changed, image_bytes
from tests.data.golden.derive import FOLDER as GOLDEN
from tests.data.test_conversation import human
from toolkits.multimodal_data_preprocessing import inspect_dataset

SCRIPT = Path(inspect_dataset.__file__)
QWEN = str(GOLDEN / "tokenizers" / "qwen")


def run(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["inspect_dataset.py", *map(str, words)])
    code = inspect_dataset.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write_record(path: Path, turns: list[dict], **others: object) -> Path:
    path.write_text(json.dumps({"id": "a", "conversations": turns, **others}))
    return path


def numbers(words: str) -> list[int]:
    return [-100 if word == "." else int(word) for word in words.split(" ")]


# ------------------------------------------------------------------------------------------------ one record


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "sentencepiece_unigram", "qwen", "llama_3"])
@pytest.mark.parametrize("conversation", ["no image, one turn", "two images, three turns"])
def test_a_record_is_printed_as_golden_json(tmp_path, monkeypatch, capsys, kind, conversation) -> None:
    golden = json.loads((GOLDEN / "v1.json").read_text())["conversations"][conversation]
    turns = [text for turn in golden["turns"] for text in turn]
    names = [f"{number}.jpg" for number in range(golden["text"].count("<image>"))]
    record = write_record(tmp_path / "R.json", human(*turns), **({"image": names} if names else {}))
    words = ("--record", record, "--template", "v1", "--tokenizer", GOLDEN / "tokenizers" / kind)
    code, out, _ = run(monkeypatch, capsys, *words, "--image-tokens", 2, "--json")
    found = json.loads(out)
    assert code == 0 and list(found) == ["token_ids", "labels", "image_spans"]
    cell = golden["tokenizers"][kind]
    assert found["token_ids"] == numbers(cell["ids"])
    assert found["labels"] == numbers(cell["labels"])
    assert len(found["image_spans"]) == len(names)
    image = load_tokenizer(GOLDEN / "tokenizers" / kind).convert_tokens_to_ids("<image>")
    assert all(found["token_ids"][start:end] == [image, image] for start, end in found["image_spans"])


def test_a_bare_sentencepiece_model_gets_the_next_id_for_images(tmp_path, monkeypatch, capsys) -> None:
    """The same ids as with the full tokenizer, but for the placeholder, which is len(tokenizer) or what is said."""
    model = GOLDEN / "tokenizers" / "sentencepiece_unigram" / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    golden = json.loads((GOLDEN / "v1.json").read_text())["conversations"]["one image, one turn"]
    record = tmp_path / "R.json"
    record.write_text(json.dumps([{"conversations": human(*golden["turns"][0]), "image": "not/there.jpg"}]))
    words = ("--record", record, "--template", "v1", "--tokenizer", tmp_path, "--image-tokens", 576, "--json")
    for extra, placeholder in (((), len(load_tokenizer(tmp_path))), (("--image-token-id", 32000), 32000)):
        code, out, err = run(monkeypatch, capsys, *words, *extra)
        assert code == 0, err
        found = json.loads(out)
        ((start, end),) = found["image_spans"]
        assert end - start == 576 and found["token_ids"][start:end] == [placeholder] * 576
        assert found["labels"][start:end] == [-100] * 576
        ids = numbers(golden["tokenizers"]["sentencepiece_unigram"]["ids"])
        assert found["token_ids"][:start] == ids[:start] and found["token_ids"][end:] == ids[start + 2 :]


def test_a_record_is_shown_with_its_trained_text_marked(tmp_path, monkeypatch, capsys) -> None:
    record = write_record(tmp_path / "R.json", human("<image>\nwhich?", "a \x1b[31mseven"), image="1.jpg", system="HEY")
    words = ("--record", record, "--template", "chatml", "--tokenizer", QWEN, "--image-tokens", 3)
    code, out, _ = run(monkeypatch, capsys, *words, "--image-conv-front")
    shown = out.splitlines()
    assert code == 0 and re.fullmatch(r"a: \d+ tokens, \d+ trained, images at (\d+)\.\.(\d+)", shown[0])
    assert shown[1:4] == ["<|im_start|>system", "HEY<|im_end|>", "<|im_start|>user"]
    assert shown[4].endswith("<|im_end|>") and shown[4].startswith("[<image> ")
    assert "⟦a ␛[31mseven<|im_end|>⟧" in shown  # a record's text cannot steer the terminal
    assert shown[-1].startswith("next: ")


MODEL = ("--template", "v1", "--image-tokens", "2", "--tokenizer", QWEN)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "wanted a folder, or --record with a JSON file, one of them"),
        (["FOLDER", "--record", "R.json"], "wanted a folder, or --record with a JSON file, one of them"),
        (["--record", "R.json"], "--tokenizer, --template, --image-tokens missing"),
        (["--record", "none.json", *MODEL], "none.json: no such file"),
        (["--record", "two.json", *MODEL], "two.json: holds several records, wanted one"),
        (["--record", "empty.json", *MODEL], "empty.json: holds no record, wanted one"),
        (["--record", "bad.json", *MODEL], "bad.json: roles: turn 2 is of human, wanted gpt"),
        (["--record", "text.json", *MODEL], "wanted a JSON list of records"),
        (["--record", "R.json", *MODEL, "--template", "v9"], "template is 'v9'; wanted one of chatml, chatml_direct"),
        (["--record", "R.json", *MODEL, "--tokenizer", "nowhere"], "nowhere: no such folder"),
        (["--record", "R.json", *MODEL, "--tokenizer", "."], "no tokenizer that transformers can load"),
        (["--record", "R.json", *MODEL, "--image-root", "."], "image missing: 1.jpg"),
        (["--record", "R.json", *MODEL, "--max-length", "2"], "leaves no room for text"),
        (["--record", "R.json", *MODEL, "--max-length", "9"], "too long: an image ends beyond token 9"),
        (["--record", "R.json", *MODEL, "--template", "nvgpt", "--image-start-end"], "'<im_start>', which image_start"),
        (["--record", "R.json", "--checkpoint", "."], "no llava/ folder in it"),
        (["nowhere", *MODEL], "wanted an energon folder"),
        (["nowhere", "--json", *MODEL], "--json, --image-root and --image-token-id go with --record"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    good = human("<image>\nwhich?", "a seven")
    write_record(tmp_path / "R.json", good, image="1.jpg")
    write_record(tmp_path / "bad.json", good[:1] * 2, image="1.jpg")
    (tmp_path / "two.json").write_text(json.dumps([{"conversations": human("a", "b")}] * 2))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "text.json").write_text("hello")
    before = sorted(tmp_path.iterdir())
    code, out, err = run(monkeypatch, capsys, *words)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 1) and message in errors[0]
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_itself_prints_json_alone(tmp_path) -> None:
    record = write_record(tmp_path / "R.json", human("which?", "a seven"))
    words = ["--record", record, "--template", "v1", "--tokenizer", QWEN, "--image-tokens", "576", "--json"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert json.loads(done.stdout)["image_spans"] == [] and done.stdout.count("\n") == 1


# ------------------------------------------------------------------------------------------------ a folder


def test_a_folder_is_shown_as_the_loader_gives_it(folder, settings, tmp_path, monkeypatch, capsys) -> None:
    words = ("--template", "v1", "--tokenizer", settings.tokenizer_path, "--image-tokens", 4, "--side-px", 14)
    code, out, err = run(monkeypatch, capsys, folder, *words, "--split", "val", "--count", 10, "--output", tmp_path)
    assert code == 0, err
    loader = build_valid_loader(folder, changed(settings, micro_batch_size=1), 0, 1)
    rows = list(itertools.islice(loader, 10))  # the whole split, in its order
    wanted = [int((row["labels"] != -100).sum()) for row in rows]
    told = [tuple(map(int, found)) for found in re.findall(r": (\d+) tokens, (\d+) trained, images at", out)]
    assert len(told) == 10 and [trained for _, trained in told] == wanted
    total, trained = sum(length for length, _ in told), sum(trained for _, trained in told)
    assert f"{total} in all, {trained / total:.1%} of them trained" in out
    assert "10 records: 10 encoded + 0 rejected" in out and "without labels: 0 (0.0%)" in out
    for name in ("records.png", "lengths.png"):
        assert Image.open(tmp_path / name).format == "PNG"
    page = (tmp_path / "report.html").read_text()
    images = sum(row["pixels"].shape[0] for row in rows)
    assert page.count('alt="image ') == images and page.count("<article>") == 10
    assert page.count("<span class=trained> ") == len(re.findall("⟦", out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lengths.png", "records.png", "report.html"]
    assert re.search(r"^next: train with DECODER_SEQ_LEN=1024 ", out, re.M)


def test_the_page_holds_the_images_after_preprocessing(folder, settings, tmp_path, monkeypatch, capsys) -> None:
    import base64

    words = ("--template", "v1", "--tokenizer", settings.tokenizer_path, "--image-tokens", 4, "--side-px", 14)
    code, _, err = run(monkeypatch, capsys, folder, *words, "--records", "1", "--output", tmp_path)
    assert code == 0, err
    from megatron_patch.data.image import image_to_pixels, open_image

    (found,) = re.findall(r'alt="image 0" src="data:image/png;base64,([^"]+)"', (tmp_path / "report.html").read_text())
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found)))).transpose(2, 0, 1)
    wanted = image_to_pixels(open_image(image_bytes(1)), 14, "crop", settings.image_mean)
    np.testing.assert_array_equal(pixels, wanted)


def test_records_that_training_leaves_out_are_counted_with_their_reason(
    folder, settings, tmp_path, monkeypatch, capsys
) -> None:
    words = ("--template", "plain", "--tokenizer", settings.tokenizer_path, "--image-tokens", 4, "--side-px", 14)
    code, out, err = run(monkeypatch, capsys, folder, *words, "--output", tmp_path, "--records", "0")
    assert code == 0, err
    rejected = int(re.search(r"rejected: turns: (\d+) \(the template cannot hold", out)[1])
    assert 25 < rejected < 40  # every third record has two questions
    assert f"93 records: {93 - rejected} encoded + {rejected} rejected" in out
    assert "left out: turns: the template takes one question and one answer, got 2 questions" in out
    assert f"next: training would refuse this: {rejected} of 93 records are unusable, most of them for: turns" in out
    code, out, err = run(
        monkeypatch, capsys, folder, *words[2:], "--template", "v1", "--max-length", 40, "--output", tmp_path, "--all"
    )
    assert code == 0, err
    longer = run(monkeypatch, capsys, folder, *words[2:], "--template", "v1", "--max-length", 300, "--output", tmp_path)
    assert "next: give " in longer[1] and "CONVERSATION_TEMPLATE=v1 and DECODER_SEQ_LEN=300" in longer[1]
    without = int(re.search(r"without labels: (\d+) ", out)[1])
    assert without > 0 and f"next: training would refuse this: {without} of 93 records carry no label" in out


def test_records_outside_the_folder_are_refused(folder, settings, tmp_path, monkeypatch, capsys) -> None:
    words = ("--template", "v1", "--tokenizer", settings.tokenizer_path, "--image-tokens", 4)
    code, _, err = run(monkeypatch, capsys, folder, *words, "--records", "0,93", "--output", tmp_path / "new")
    assert code == 2 and "--records 93: split train of" in err and "has the records 0 to 92" in err
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_says_everything_by_itself(folder, tmp_path, monkeypatch, capsys) -> None:
    from tests.tiny_models import make_tiny_llava

    make_tiny_llava(tmp_path / "checkpoint" / "llava")
    words = ("--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "report", "--records", "1")
    code, out, err = run(monkeypatch, capsys, folder, *words, "--skip-pictures")
    assert code == 0, err
    assert "template v1, 93 records" in out
    start, end = map(int, re.search(r"images at (\d+)\.\.(\d+)", out).groups())
    assert end - start == 16  # the tiny tower's (28 / 7) ** 2


def test_template_and_images_are_the_checkpoints(folder, tmp_path, monkeypatch, capsys) -> None:
    """As training's `auto`: Llama 3 by its tokens; once trained, as it was trained; what is typed wins."""
    from tests.tiny_models import make_tiny_llava

    llava = LlavaFolder.of(tmp_path / "checkpoint")
    make_tiny_llava(llava.path)
    tokenizer = (llava.path / "tokenizer.json").read_bytes()
    (llava.path / "tokenizer.json").write_bytes((GOLDEN / "tokenizers/llama_3/tokenizer.json").read_bytes())

    def read(*words: str):
        monkeypatch.setattr(sys, "argv", ["inspect_dataset.py", "--checkpoint", str(tmp_path / "checkpoint"), *words])
        return inspect_dataset.read_model(inspect_dataset.parse_arguments())[0]

    found = read()
    assert (found.template, found.image_aspect_ratio, found.tiles) == ("llama_3", "crop", 1)
    assert (found.apply_exif_orientation, found.image_conv_front, found.image_start_end) == (True, False, False)
    llava.write_training_settings(TrainingSettings("v0", "pad", (2, 1), False, True, True))
    found = read()
    assert (found.template, found.image_aspect_ratio, found.tiles) == ("v0", "pad", 3)
    assert (found.apply_exif_orientation, found.image_conv_front, found.image_start_end) == (False, True, True)
    switches = ("--no-ignore-exif-orientation", "--no-image-conv-front", "--no-image-start-end")
    found = read("--template", "v1", "--image-aspect-ratio", "crop", "--image-tiles", "1x1", *switches)
    assert (found.template, found.image_aspect_ratio, found.tiles) == ("v1", "crop", 1)
    assert (found.apply_exif_orientation, found.image_conv_front, found.image_start_end) == (True, False, False)

    (llava.path / "tokenizer.json").write_bytes(tokenizer)
    llava.write_training_settings(TrainingSettings("v0", "pad"))
    words = ("--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "report", "--records", "1")
    code, out, err = run(monkeypatch, capsys, folder, *words)
    assert code == 0 and "template v0, 93 records" in out, err


# ------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize(
    ("figures", "max_length", "advice"),
    [
        (Figures(lengths=[700] * 100), None, "train with DECODER_SEQ_LEN=1024 (10th argument), which holds 99%"),
        (Figures(lengths=[700] * 98 + [1500, 9000]), None, "train with DECODER_SEQ_LEN=2048 (10th argument)"),
        (Figures(lengths=[700] * 100), 1024, "give F to run_mcore_llava.sh as DATASET_PATH"),
        (Figures(lengths=[700] * 100, truncated=2), 700, "raise DECODER_SEQ_LEN (--max-length here): 2 of 100 records"),
        (Figures(lengths=[700] * 80, rejected=Counter({"too long": 20})), 700, "training would refuse this: 20 of 100"),
        (
            Figures(lengths=[700] * 80, rejected=Counter({"roles": 20})),
            700,
            "training would refuse this: 20 of 100 records",
        ),
        (
            Figures(lengths=[700] * 98, rejected=Counter({"roles": 2})),
            1024,
            "give F to run_mcore_llava.sh as DATASET_PATH",
        ),
        (Figures(lengths=[700] * 98, rejected=Counter({"excluded": 2})), 700, "give F to run_mcore_llava.sh"),
        (Figures(rejected=Counter({"excluded": 2})), None, "the folder's split.yaml leaves out every record"),
    ],
)
def test_the_last_sentence_says_what_to_do(settings, figures, max_length, advice) -> None:
    arguments = argparse.Namespace(folder="F", max_length=max_length)
    assert inspect_dataset.advice(figures, settings, arguments).startswith(advice)


def test_terminal_text_and_labels() -> None:
    from megatron_patch.data.loading.inspection import TokenSpan
    from megatron_patch.data.loading.task_encoder import EncodedText

    encoded = EncodedText("a", np.arange(5), np.array([-100, 2, 3, -100, -100]), [], False, ())
    assert unshifted_labels(encoded).tolist() == [-100, -100, 2, 3, -100]
    runs = [TokenSpan("other", 0, 1, "q"), TokenSpan("image", 1, 3, "<image> 1..3"), TokenSpan("trained", 3, 4, "a")]
    assert to_terminal(runs, colours=False) == "q[<image> 1..3]⟦a⟧"
    assert to_terminal(runs, colours=True) == "\x1b[0mq\x1b[36m[<image> 1..3]\x1b[1;32ma\x1b[0m"
    assert visible("\x1b[2J\ttab\n\x7f") == "␛[2J␉tab\n␡"
