"""One table: each option of the launchers, from the environment to what the data, the model or the optimizer does.

The launcher's own command line (DRY_RUN=1) is read as a run reads it, and the loaders are built from it; what happens
in the model or the optimizer comes from runs of one or two iterations.  OBSERVED says for every option where its effect
is seen, so that a new option needs a test.
"""

import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from megatron_patch.conversion.torch_dist import CheckpointReader
from megatron_patch.data.loading import build_train_loader, build_valid_loader
from megatron_patch.errors import UserError
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.tokenizer_files import load_tokenizer
from megatron_patch.training.config import RunConfig, read_config
from tests.data.factories import convert_records
from tests.programs import WITHOUT_COMPILER
from tests.training.launching import ROOT, Workspace, command, run
from tests.training.test_freezing import weights

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
MEAN_COLOUR = (122, 116, 104)  # of OpenAI's CLIP, as LLaVA's expand2square rounds it
SIDE_PX, RECORDS, STEP_RECORDS = 28, 60, 8
IMAGE_TOKENS = 16
QUESTION = "Which came first?"

# Where the effect of each option is seen; FP8, offloading and Nsight need a GPU, and only their arguments are compared.
LORA = "tests/training/test_lora.py"
HERE, ARGUMENTS = "tests/training/test_option_effects.py", "tests/launchers/test_megatron_arguments.py"
OBSERVED = {
    "PRESET": "tests/launchers/test_arguments.py",
    **dict.fromkeys(
        ("FREEZE_LANGUAGE_MODEL", "FREEZE_VISION_TOWER", "FREEZE_PROJECTOR"), "tests/training/test_freezing.py"
    ),
    **dict.fromkeys(("CONVERSATION_TEMPLATE", "IMAGE_CONV_FRONT", "IMAGE_START_END", "IMAGE_ASPECT_RATIO"), HERE),
    **dict.fromkeys(("IMAGE_TILES", "EXIF_ORIENTATION", "DATA_ORDER", "MEGA_BATCH_MULT"), HERE),
    **dict.fromkeys(("BALANCE_COST", "PACKING", "PADDING_FREE"), HERE),
    **dict.fromkeys(("MAX_SKIPPED", "TOKENIZER_PATH", "NUM_WORKERS", "SEED"), HERE),
    **dict.fromkeys(("RECOMPUTE_METHOD", "RECOMPUTE_LAYERS", "TOWER_AC", "DETERMINISTIC"), HERE),
    **dict.fromkeys(("WEIGHT_DECAY", "ADAM_BETA2", "CLIP_GRAD"), HERE),
    **{f"{module}_{what}": HERE for module in ("VISION_TOWER", "PROJECTOR") for what in ("LR", "WEIGHT_DECAY")},
    "FSDP": "tests/training/test_parallelism.py",
    **dict.fromkeys(("FIRST_STAGE_LAYERS", "VIRTUAL_STAGES"), "tests/training/test_parallelism.py"),
    **dict.fromkeys(("FP8_FORMAT", "FP8_RECIPE", "FP8_MARGIN", "FP8_AMAX_HISTORY", "PROFILER"), ARGUMENTS),
    "FP8_AMAX_ALGORITHM": HERE,
    **dict.fromkeys(("ON_BAD_LOSS", "SPIKE_FACTOR", "MAX_ROLLBACKS"), "tests/training/test_loss_spikes.py"),
    "FEATURE_CACHE": "tests/training/test_feature_cache.py",
    **{f"LORA_{name}": LORA for name in ("RANK", "ALPHA", "DROPOUT", "TARGETS", "PARTS", "RSLORA", "ADAPTER")},
    "TIME_LIMIT": ARGUMENTS,
    **dict.fromkeys(("KEEP_LAST", "KEEP_BEST"), "tests/training/test_checkpoint_retention.py"),
    "ASYNC_SAVE": "tests/training/test_resume.py",
    **dict.fromkeys(("ACCELERATOR", "MASTER_PORT"), "tests/launchers/test_commands.py"),
    **dict.fromkeys(("NPROC_PER_NODE", "LOG_INTERVAL", "EVAL_INTERVAL", "PROFILE"), "tests/training/test_callbacks.py"),
    **dict.fromkeys(("EVAL_ITERS", "SAMPLE_ANSWERS"), "tests/training/test_sample_generation.py"),
    **dict.fromkeys(
        ("EVAL_BENCHMARK", "EVAL_BENCHMARK_DATA", "EVAL_BENCHMARK_IMAGES", "EVAL_BENCHMARK_QUESTIONS", "BEST_BY"),
        "tests/training/test_benchmark_scores.py",
    ),
    "PROFILE_RANKS": HERE,
    "WANDB_NAME": ARGUMENTS,
    "WANDB_PROJECT": "tests/training/test_callbacks.py",
    "CHECK": "tests/training/test_data_options.py",
    "EMA_DECAY": "tests/training/test_ema.py",
    **dict.fromkeys(("SAVE_OPTIM", "LOAD_OPTIM"), "tests/training/test_fresh_optimizer.py"),
    "MAX_RESTARTS": "tests/training/test_graceful_stop.py",
    **dict.fromkeys(("GPUS", "DEBUG"), "tests/launchers/test_commands.py"),
    **dict.fromkeys(("PYTHON", "DRY_RUN"), "tests/launchers/test_commands.py"),
}


def test_every_option_is_observed_somewhere() -> None:
    stage = str(ROOT / "examples/llava_mcore/run_mcore_llava.sh")
    printed = subprocess.run(["bash", stage, "--help"], capture_output=True, text=True, check=True).stdout
    options = printed.split("\nOptions, from the environment")[1].split("\nPresets")[0]
    assert set(re.findall(r"^  ([A-Z][A-Z0-9_]+) ", options, re.MULTILINE)) == set(OBSERVED)
    for option, file in OBSERVED.items():
        text = (ROOT / file).read_text().split("def test_every_option_is_observed_somewhere")[-1]
        assert re.search(rf"\b{option}\b", text), f"{file} says nothing of {option}"


# --- From the environment to a batch


def image_file() -> bytes:
    """Three squares side by side: red, green, blue; by its EXIF tag the camera was upside down."""
    image = Image.new("RGB", (3 * SIDE_PX, SIDE_PX))
    for place, colour in enumerate((RED, GREEN, BLUE)):
        image.paste(colour, (place * SIDE_PX, 0, (place + 1) * SIDE_PX, SIDE_PX))
    tags = Image.Exif()
    tags[0x0112] = 3  # orientation: turned by 180 degrees
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=tags)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def colours(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two exchanges per record, the image belongs to the second; every third record is text alone.

    The tokenizer of the checkpoint knows <im_start> and <im_end>.
    """
    folder = tmp_path_factory.mktemp("colours")
    shutil.copytree(workspace.checkpoint, folder / "checkpoint", symlinks=True)
    tokenizer = load_tokenizer(str(folder / "checkpoint/llava"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<im_start>", "<im_end>"]})
    tokenizer.save_pretrained(folder / "checkpoint/llava")
    (folder / "images").mkdir()
    (folder / "images/three.png").write_bytes(image_file())
    records = []
    for number in range(RECORDS):
        with_image = number % 3 > 0
        answer = " ".join(["very"] * (number * 7 % 11) + ["nice"])
        turns = [QUESTION, f"Number {number}.", ("<image>\n" if with_image else "") + "How is it?", answer]
        record = {
            "id": f"r{number:02d}",
            "conversations": [
                {"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(turns)
            ],
        }
        records.append(record | ({"image": "three.png"} if with_image else {}))
    (folder / "data.json").write_text(json.dumps(records))
    convert_records(folder, samples_per_shard=10)
    return Workspace(folder / "checkpoint", folder / "wds")


def arguments(workspace: Workspace, **options: object) -> list[str]:
    """What the launcher gives pretrain_llava.py."""
    words, environment = command(workspace, workspace.dataset.parent / "out", DRY_RUN=1, **options)
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return lines[next(number for number, line in enumerate(lines) if line.endswith("pretrain_llava.py")) + 1 :]


class Seen:
    """What the options of a run make of its data."""

    def __init__(self, workspace: Workspace, **options: object) -> None:
        self.workspace = workspace
        options = {"PADDING_FREE": "false", **options}  # rows are easier to look at
        self.settings: RunConfig = read_config(arguments(workspace, **options))
        self.loader = build_train_loader(self.settings.train_dataset_path, self.settings.data, 0, 1)
        self.tokenizer = load_tokenizer(str(workspace.checkpoint / "llava"))

    @functools.cached_property
    def batches(self) -> list[dict]:
        """The micro-batches of six steps."""
        rows = self.settings.data.micro_batch_size
        return [next(self.loader) for _ in range(6 * STEP_RECORDS // rows)]

    @functools.cached_property
    def with_image(self) -> tuple[list[int], int]:
        """The first row with an image: its tokens, and the place of its first placeholder."""
        placeholder = self.settings.data.image_token_id
        for batch in self.batches:
            for tokens in batch["tokens"].tolist():
                if placeholder in tokens:
                    return tokens, tokens.index(placeholder)
        raise AssertionError("no image in six steps")

    def have_images(self, batch: dict) -> list[bool]:
        """Of the rows of a micro-batch."""
        return (batch["tokens"] == self.settings.data.image_token_id).any(dim=1).tolist()

    def pixel(self, row: int, column: int) -> tuple[int, ...]:
        """Of the first image."""
        return tuple(self.with_pixels()[0, :, row, column].tolist())

    def with_pixels(self) -> torch.Tensor:
        """Of the first micro-batch that has any."""
        return next(batch["pixels"] for batch in self.batches if len(batch["pixels"]))

    def steps(self) -> list[list[tuple[bool, int]]]:
        """(has an image, tokens) of every record, step by step."""
        found = []
        for batch in self.batches:
            with_images = self.have_images(batch)
            # the text ends with the last label, the ending of the answer
            padding = (batch["labels"] != IGNORE_LABEL).int().flip(1).argmax(dim=1).tolist()
            length = batch["labels"].shape[1]
            found += [(with_images[row], length - padding[row]) for row in range(len(padding))]
        return [found[start : start + STEP_RECORDS] for start in range(0, len(found), STEP_RECORDS)]


def left_edge(seen: Seen) -> tuple[int, ...]:
    return seen.pixel(SIDE_PX // 2, 0)


def top_edge(seen: Seen) -> tuple[int, ...]:
    return seen.pixel(0, SIDE_PX // 2)


def images_and_placeholders(seen: Seen) -> tuple[int, int]:
    tokens, _ = seen.with_image
    batch = next(batch for batch in seen.batches if len(batch["pixels"]))
    rows = sum(seen.have_images(batch))
    return len(batch["pixels"]) // rows, tokens.count(seen.settings.data.image_token_id)


def text_before_the_image(seen: Seen) -> bool:
    tokens, start = seen.with_image
    return QUESTION in seen.tokenizer.decode(tokens[:start])


def beside_the_image(seen: Seen) -> bool:
    tokens, start = seen.with_image
    both = seen.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    return [tokens[start - 1], tokens[start + IMAGE_TOKENS]] == both


def speaks_like_vicuna(seen: Seen) -> bool:
    return "USER:" in seen.tokenizer.decode(seen.with_image[0])


def as_stored(seen: Seen) -> bool:
    names = [name for batch in seen.batches for name in batch["record_ids"]]
    return names == sorted(names)


def one_modality_a_step(seen: Seen) -> bool:
    # the last step holds what filled no other
    return all(len({kind for kind, _ in step}) == 1 for step in seen.steps()[:-1])


def like_lengths_together(seen: Seen) -> bool:
    """Do the lengths of two steps with images never overlap?"""
    ranges = sorted(
        (min(length for _, length in step), max(length for _, length in step))
        for step in seen.steps()[:-1]
        if all(kind for kind, _ in step)
    )
    assert len(ranges) > 2
    return all(one[1] <= other[0] for one, other in itertools.pairwise(ranges))


def like_lengths_in_a_micro_batch(seen: Seen) -> bool:
    """Do the lengths of two micro-batches of a step never overlap?"""
    rows = seen.settings.data.micro_batch_size
    for step in seen.steps():
        lengths = [sorted(length for _, length in step[start : start + rows]) for start in range(0, len(step), rows)]
        if any(one[-1] > other[0] for one, other in itertools.pairwise(sorted(lengths))):
            return False
    return True


def records_of_a_row(seen: Seen) -> int:
    return max(len(batch["cu_seqlens"]) - 1 if "cu_seqlens" in batch else 1 for batch in seen.batches)


def ids(seen: Seen) -> list[str]:
    return [name for batch in seen.batches for name in batch["record_ids"]]


def as_with_seed_1234(seen: Seen) -> bool:
    return ids(seen) == ids(Seen(seen.workspace))


def workers(seen: Seen) -> int:
    before = set(multiprocessing.active_children())
    next(seen.loader)
    return len(set(multiprocessing.active_children()) - before)


def rows(seen: Seen) -> int:
    return len(seen.batches[0]["tokens"])


def longest(seen: Seen) -> int:
    return max(batch["tokens"].shape[1] for batch in seen.batches)


def cut_into_four(seen: Seen) -> bool:
    return all(batch["tokens"].shape[1] % 4 == 0 for batch in seen.batches)


def cut_into_two(seen: Seen) -> bool:
    return all(batch["tokens"].shape[1] % 2 == 0 for batch in seen.batches)


def records_cut_into_four(seen: Seen) -> bool:
    assert any(len(batch["cu_seqlens"]) > 2 for batch in seen.batches), "no row holds several records"
    return all(bound % 4 == 0 for batch in seen.batches for bound in batch["cu_seqlens"].tolist())


def validates(seen: Seen) -> bool:
    return seen.settings.valid_dataset_path is not None


MODALITY = {"DATA_ORDER": "modality"}
# option, what is seen, before, value, after, other options of both
EFFECTS = [
    ("IMAGE_ASPECT_RATIO", left_edge, GREEN, "stretch", BLUE, {}),
    ("IMAGE_ASPECT_RATIO", top_edge, GREEN, "pad", MEAN_COLOUR, {}),
    ("EXIF_ORIENTATION", left_edge, BLUE, "false", RED, {"IMAGE_ASPECT_RATIO": "stretch"}),
    ("IMAGE_TILES", images_and_placeholders, (1, IMAGE_TOKENS), "2x1", (3, 3 * IMAGE_TOKENS), {}),
    ("IMAGE_CONV_FRONT", text_before_the_image, True, "true", False, {}),
    ("IMAGE_START_END", beside_the_image, False, "true", True, {}),
    ("CONVERSATION_TEMPLATE", speaks_like_vicuna, False, "v1", True, {"DECODER_SEQ_LEN": 512}),
    ("DATA_ORDER", as_stored, False, "single", True, {}),
    ("DATA_ORDER", one_modality_a_step, False, "modality", True, {}),
    ("DATA_ORDER", one_modality_a_step, False, "modality_window", True, {}),
    ("GLOBAL_BATCH_SIZE", one_modality_a_step, True, "4", False, MODALITY),
    ("MEGA_BATCH_MULT", like_lengths_together, True, "1", False, MODALITY),
    ("BALANCE_COST", like_lengths_in_a_micro_batch, False, "true", True, {}),
    ("PACKING", records_of_a_row, 1, "true", 3, {"BATCH_SIZE": 1, "DECODER_SEQ_LEN": 256}),
    ("PADDING_FREE", records_of_a_row, 1, "true", 2, {}),
    ("PADDING_FREE", records_of_a_row, 1, "auto", 2, {}),
    ("SEED", as_with_seed_1234, True, "77", False, {}),
    ("NUM_WORKERS", workers, 0, "1", 1, {}),
    ("BATCH_SIZE", rows, 2, "4", 4, {}),
    ("DECODER_SEQ_LEN", lambda seen: longest(seen) > 70, True, "70", False, {"MAX_SKIPPED": 1}),
    ("CP", cut_into_four, False, "2", True, {}),
    ("CP", records_cut_into_four, False, "2", True, {"PACKING": "true", "BATCH_SIZE": 1, "DECODER_SEQ_LEN": 256}),
    ("TP", cut_into_two, False, "2", True, {"DECODER_SEQ_LEN": 126}),
    ("EVAL_ITERS", validates, True, "0", False, {}),
]


@pytest.mark.parametrize(
    ("option", "see", "before", "value", "after", "others"),
    EFFECTS,
    ids=[f"{row[0]}={row[3]}{'' if not row[5] else ' with ' + ' '.join(row[5])}" for row in EFFECTS],
)
def test_an_option_changes_the_data(
    option: str, see: Callable, before: object, value: str, after: object, others: dict, colours: Workspace
) -> None:
    assert see(Seen(colours, **others)) == before
    assert see(Seen(colours, **{**others, option: value})) == after


def test_max_skipped_is_the_share_of_records_that_may_be_bad(colours: Workspace, tmp_path: Path) -> None:
    """Two thirds of the records have an image, and none of these can be read."""
    shutil.copytree(colours.dataset, tmp_path / "wds")
    for shard in (tmp_path / "wds").glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"\x89PNG\r\n\x1a\n", b"no image"))
    broken = Workspace(colours.checkpoint, tmp_path / "wds")
    assert len(Seen(broken, MAX_SKIPPED=0.8).batches) == 6 * STEP_RECORDS // 2
    for share in (0.5, 0.01):
        with pytest.raises(UserError, match=rf"not an image.*tolerated are {share:.0%}"):
            assert Seen(broken, MAX_SKIPPED=share).batches


def test_another_seed_is_another_order_and_the_same_is_the_same(colours: Workspace) -> None:
    one, again, other = (ids(Seen(colours, SEED=seed)) for seed in (5, 5, 6))
    assert one == again != other and len(set(one)) == len(set(other)) == len(one)


def test_the_tokenizer_of_a_run_from_nothing(colours: Workspace) -> None:
    mine = colours.checkpoint / "llava"
    seen = Seen(colours, PRETRAIN_CHECKPOINT_PATH="none", TOKENIZER_PATH=mine)
    assert seen.settings.data.tokenizer_path == str(mine) and seen.batches


def test_siglip_squeezes_where_clip_crops(colours: Workspace, tmp_path: Path) -> None:
    """SigLIP's processor has no crop; its filter is the file's (tests/data/test_image.py compares what filters do)."""
    shutil.copytree(colours.checkpoint, tmp_path / "checkpoint", symlinks=True)
    where = tmp_path / "checkpoint/llava/preprocessor_config.json"
    processor = json.loads(where.read_text())
    for name in ("do_center_crop", "crop_size"):
        del processor[name]
    for resample in (3, 2):
        where.write_text(json.dumps(processor | {"size": {"height": 28, "width": 28}, "resample": resample}))
        squeezed = Workspace(tmp_path / "checkpoint", colours.dataset)
        seen = Seen(squeezed)
        assert left_edge(seen) == BLUE and seen.pixel(SIDE_PX // 2, SIDE_PX // 2) == GREEN
        assert torch.equal(seen.with_pixels(), Seen(squeezed, IMAGE_ASPECT_RATIO="stretch").with_pixels())
        assert seen.settings.data.resample == resample


def test_validation_reads_its_own_folder(colours: Workspace, workspace: Workspace) -> None:
    settings = Seen(colours, VALID_DATASET_PATH=workspace.dataset).settings
    batch = next(iter(build_valid_loader(settings.valid_dataset_path, settings.data, 0, 1)))
    assert all(re.fullmatch(r"r\d+", name) for name in batch["record_ids"])
    assert settings.valid_dataset_path == str(workspace.dataset) != settings.train_dataset_path == str(colours.dataset)


def test_which_of_the_amax_history_counts(colours: Workspace) -> None:
    given = {"PR": "fp8", "FP8_RECIPE": "delayed", "ACCELERATOR": "cuda", "NPROC_PER_NODE": 1}
    for chosen in ("max", "most_recent"):
        words = arguments(colours, **given, FP8_AMAX_ALGORITHM=chosen)
        assert words[words.index("--fp8-amax-compute-algo") + 1] == chosen


def test_the_work_of_batches_is_counted(colours: Workspace) -> None:
    """Records of two steps: tokens without padding, trained ones, images, pairs of tokens."""
    alone = Seen(colours, BATCH_SIZE=1).batches[: 2 * STEP_RECORDS]  # rows of one record hold no padding
    loader = Seen(colours, BATCH_SIZE=STEP_RECORDS).loader
    for _ in range(2):
        next(loader)
    lengths = [batch["tokens"].shape[1] for batch in alone]
    assert len(set(lengths)) > 3
    assert loader.work == {
        "records": 2 * STEP_RECORDS,
        "tokens": sum(lengths),
        "labels": sum(int((batch["labels"] != IGNORE_LABEL).sum()) for batch in alone),
        "images": sum(len(batch["pixels"]) for batch in alone),
        "pairs": sum(length * (length + 1) // 2 for length in lengths),
        "cached": 0,
    }


# --- The optimizer's first step


LR, BETA_1 = 1e-3, 0.9
# learning rate and weight decay of each part
OWN = {"language_model": (LR, 5), "vision_model": (2e-4, 3), "vision_projection": (5e-3, 20)}
FIRST_STEP = {
    **{"LR": LR, "MIN_LR": LR, "WEIGHT_DECAY": OWN["language_model"][1], "ADAM_BETA2": 0.999, "CLIP_GRAD": 0.01},
    **{"VISION_TOWER_LR": OWN["vision_model"][0], "VISION_TOWER_WEIGHT_DECAY": OWN["vision_model"][1]},
    **{"PROJECTOR_LR": OWN["vision_projection"][0], "PROJECTOR_WEIGHT_DECAY": OWN["vision_projection"][1]},
}


def read(reader: CheckpointReader, name: str) -> torch.Tensor:
    size = reader.tensors[name].size
    return reader.read(name, (0,) * len(size), tuple(size))


def test_the_first_step_of_the_optimizer(workspace: Workspace, tmp_path: Path) -> None:
    """Adam's first step is the learning rate, whatever the gradient (Kingma and Ba 2015, section 2.1); decay beside it.

    Moments after it: (1 - beta1) g and (1 - beta2) g^2, of the clipped gradient g.
    """
    once = {"TRAIN_ITERS": 1, "SAVE_INTERVAL": 1, "LR_WARMUP_ITERS": 0, "EVAL_ITERS": 0}
    run(workspace, tmp_path / "out", **once, **FIRST_STEP)
    before = weights(workspace.checkpoint / "release")
    after = weights(tmp_path / "out/checkpoint/iter_0000001")
    for name, weight in before.items():
        rate, decay = OWN[name.split(".")[0]]
        if weight.dim() == (3 if ".layers." in name else 2):  # vectors do not decay: Megatron's rule
            steps = (after[name][: len(weight)] - weight * (1 - rate * decay)).abs() / rate
            steps = steps[(steps > 0.5).any(dim=-1)]  # rows of the embedding that no token used decay only
            # the median: where a gradient is about Adam's epsilon, as of tokens that no record holds, a step is shorter
            assert (steps - 1).abs().median() < 0.02, name
    with CheckpointReader(tmp_path / "out/checkpoint/iter_0000001") as reader:
        squares = 0.0
        for name in (name for name in reader.tensors if "exp_avg." in name):
            mean, square = read(reader, name), read(reader, name.replace("exp_avg.", "exp_avg_sq."))
            squares += float((mean / (1 - BETA_1)).double().square().sum())
            large = mean.abs() > 1e-6
            if large.any():
                ratio = (square[large] / mean[large] ** 2).median().item()
                assert ratio == pytest.approx((1 - 0.999) / (1 - BETA_1) ** 2, rel=1e-2), name
    assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-3), "the norm of the clipped gradient"


def test_a_modules_lowest_rate_keeps_the_ratio() -> None:
    from megatron_patch.training.parameter_groups import ModuleOverrides, with_modules

    chosen = {
        "vision_model": ModuleOverrides(learning_rate=4e-4, weight_decay=0.25),
        "language_model": ModuleOverrides(),
    }
    groups = with_modules(lambda config: {}, lambda: chosen)(config=SimpleNamespace(lr=1e-3, min_lr=1e-4))
    found = {group["module"]: group for group in groups.values()}
    assert found["vision_model"] == {
        **{"module": "vision_model", "max_lr": 4e-4, "min_lr": pytest.approx(4e-5), "start_wd": 0.25, "end_wd": 0.25}
    }
    assert found["language_model"] == {"module": "language_model"}


# --- What is recomputed, and who is traced


def observed(workspace: Workspace, folder: Path, **options: object) -> dict:
    """What tests/training/observer.py saw on rank 0 of a run of one micro-batch."""
    steps = {"TRAIN_ITERS": 1, "LR_WARMUP_ITERS": 0, "EVAL_ITERS": 0, "BATCH_SIZE": 8, "GLOBAL_BATCH_SIZE": 8}
    words, environment = command(workspace, folder / "out", **{**steps, **options})
    dry = subprocess.run(words, env=environment | {"DRY_RUN": "1"}, capture_output=True, text=True, check=True)
    line = dry.stdout.splitlines()
    script = next(number for number, word in enumerate(line) if word.endswith("pretrain_llava.py"))
    line[script : script + 1] = [str(ROOT / "tests/training/observer.py"), str(folder / "seen.json"), line[script]]
    # The compiled kernel attends without calling the module that is counted.
    done = subprocess.run(line, env=os.environ | WITHOUT_COMPILER, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "seen.json").read_text())


TWO_RANKS = {"NPROC_PER_NODE": 2, "GLOBAL_BATCH_SIZE": 16}
DECODER, TOWER = 64, 48  # hidden widths of the tiny models
RECOMPUTED = {
    "the first three layers of the decoder, attention of the tower": (
        {"AC": "full", "RECOMPUTE_METHOD": "block", "RECOMPUTE_LAYERS": 3, "TOWER_AC": "sel", "DETERMINISTIC": "true"},
        {DECODER: [2, 2, 2, 1], TOWER: [1, 1, 1]},
        {DECODER: 3 * 2 + 1, TOWER: 3 * 2},
        (True, []),
    ),
    "attention of the decoder, layers of the tower": (
        {"AC": "sel", "TOWER_AC": "full"} | TWO_RANKS | {"PROFILE": "1-1", "PROFILE_RANKS": "1"},
        {DECODER: [1, 1, 1, 1], TOWER: [2, 2, 2]},
        {DECODER: 4 * 2, TOWER: 3 * 2},
        (False, ["rank_001_iterations_1-1.json.gz"]),
    ),
}


@pytest.mark.parametrize("case", RECOMPUTED)
def test_what_is_recomputed(case: str, workspace: Workspace, tmp_path: Path) -> None:
    options, layers, attentions, (deterministic, traces) = RECOMPUTED[case]
    seen = observed(workspace, tmp_path, **options)
    for width, expected in layers.items():
        calls = [seen["calls"][f"TransformerLayer {width} {number}"] for number in range(1, len(expected) + 1)]
        assert calls == expected, (width, seen)
        assert seen["calls"][f"ScaledDotProductAttention {width}"] == attentions[width], (width, seen)
    assert seen["deterministic"] == deterministic
    assert [path.name for path in tmp_path.glob("out/profile/*")] == traces
