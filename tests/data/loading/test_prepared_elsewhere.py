"""Folders that webdataset wrote and `energon prepare` prepared train as they are; energon's own loader is the judge."""

import shutil
import subprocess
from pathlib import Path

import pytest
import webdataset
from megatron.energon import DefaultTaskEncoder, SampleDecoder, WorkerConfig, get_loader, get_train_dataset
from megatron.energon.flavors import VQASample

from megatron_patch.data.loading import DataConfig, build_train_loader
from megatron_patch.data.loading.dataset import EnergonFolder
from megatron_patch.data.record import cook
from megatron_patch.errors import UserError
from tests.data.factories import changed, image_bytes
from tests.warm import interpreter

RECORDS = 24
TURNS = "json[0][value]", "json[1][value]"


def turns(number: int) -> list[dict]:
    """One question and its answer in LLaVA's form."""
    return [
        {"from": "human", "value": f"<image>\nwhat is in {number}?"},
        {"from": "gpt", "value": f"the digit of {number}"},
    ]


LAYOUTS = {
    # name: (parts of sample n, fields of context and answers in the dataset.yaml that `energon prepare` asks for)
    "the list of turns": (lambda n: {"jpg": image_bytes(n, kind="JPEG"), "json": turns(n)}, TURNS),
    "question and answer": (
        lambda n: {"jpg": image_bytes(n, kind="JPEG"), "json": {"question": f"what is in {n}?"}, "txt": f"it is {n}"},
        ("json[question]", "txt"),
    ),
    "fields of other names": (
        lambda n: {"png": image_bytes(n), "json": {"q": f"what is in {n}?", "a": [f"it is {n}", "or not"]}},
        ("json[q]", "json[a]"),
    ),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per layout."""
    root = tmp_path_factory.mktemp("elsewhere")
    return {layout: prepare(root / str(number), layout) for number, layout in enumerate(LAYOUTS)}


def prepare(folder: Path, layout: str) -> Path:
    """Shards by webdataset, metadata by energon's command line, and the dataset.yaml of its interactive dialogue."""
    folder.mkdir()
    parts, (context, answers) = LAYOUTS[layout]
    with webdataset.ShardWriter(str(folder / "pretrain-%d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(RECORDS):
            writer.write({"__key__": f"sample{number}", **parts(number)})
    energon = [interpreter.python(), "-m", "megatron.energon.cli.main", "prepare", str(folder)]
    words = ["--non-interactive", "--split-ratio", "9,1,0", "--sample-type", "CrudeWebdataset", "--no-progress"]
    done = subprocess.run([*energon, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image = "png" if "png" in parts(0) else "jpg"
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: VQAWebdataset\n"
        f"field_map:\n  image: {image}\n  context: {context}\n  answers: {answers}\n"
    )
    return folder


def as_energon_reads(folder: Path) -> dict[str, tuple[str, str]]:
    """{key: (question, answer)} by energon's own VQAWebdataset."""

    class Encoder(DefaultTaskEncoder):
        """Hands samples over as they are."""

        decoder = SampleDecoder(image_decode="pilrgb")

        def encode_sample(self, sample: VQASample) -> VQASample:
            """Unchanged."""
            return sample

        def batch(self, samples: list) -> list:
            """Unchanged."""
            return samples

    def text(value: object) -> str:
        value = value[0] if isinstance(value, list) else value
        return value.decode() if isinstance(value, bytes) else str(value)

    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(
        str(folder),
        worker_config=config,
        batch_size=1,
        task_encoder=Encoder(),
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
    )
    return {sample.__key__: (text(sample.context), text(sample.answers)) for (sample,) in get_loader(dataset)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_prepared_elsewhere_trains_as_it_is(
    layout: str, settings: DataConfig, prepared: dict[str, Path]
) -> None:
    folder = prepared[layout]
    ours = {}
    source = EnergonFolder(str(folder), "train")
    for index in range(len(source)):
        record = cook(source[index])
        assert len(record.images) == 1
        (exchange,), key = record.exchanges, record.record_id.split("/")[-1]
        ours[key] = (exchange.question.removeprefix("<image>\n"), exchange.answer)
    judge = as_energon_reads(folder)
    judge = {key: (question.removeprefix("<image>\n"), answer) for key, (question, answer) in judge.items()}
    assert ours == judge and len(ours) >= RECORDS * 0.8
    loader = build_train_loader(str(folder), changed(settings, micro_batch_size=1), 0, 1)
    seen = [next(loader)["record_ids"][0] for _ in range(len(source))]
    assert sorted(name.split("/")[-1] for name in seen) == sorted(ours)
    assert loader.counts == {"kept": len(source), "truncated": 0, "skipped": 0}


def test_a_field_that_is_not_there_is_named(settings: DataConfig, prepared: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(prepared["fields of other names"], tmp_path / "wds")
    where = folder / ".nv-meta" / "dataset.yaml"
    where.write_text(where.read_text().replace("json[a]", "json[b]"))
    with pytest.raises(
        UserError, match=r"20 of 20 records looked at cannot be used \(malformed 20; .*no answers at json\[b\]"
    ):
        build_train_loader(str(folder), changed(settings, micro_batch_size=1, max_skipped_share=1.0), 0, 1)
