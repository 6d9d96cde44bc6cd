"""Cached features of the frozen tower: the run without them, number for number, or one sentence of refusal."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_patch.checkpoint_files import newest_iteration
from megatron_patch.data.loading import build_train_loader
from megatron_patch.data.loading.dataset import EnergonFolder
from megatron_patch.data.loading.feature_cache import FeatureCache, ShardWriter, remove_unfinished
from megatron_patch.errors import UserError
from megatron_patch.training.config import read_config
from megatron_patch.training.feature_cache import hash_of, read_tower
from tests.training.conftest import spoil_images
from tests.training.launching import ROOT, Workspace, command, losses, run
from tests.training.test_config import argv
from tests.warm import interpreter
from toolkits.multimodal_data_preprocessing.cache_tower_features import check_space, predicted_images
from toolkits.multimodal_data_preprocessing.tower_features import fill

ITERATIONS = 12  # more than an epoch
STAGE_1 = {"FREEZE_LANGUAGE_MODEL": "true", "FREEZE_VISION_TOWER": "true", "CONVERSATION_TEMPLATE": "plain"}
STEPS = {**STAGE_1, "TRAIN_ITERS": ITERATIONS, "MAX_SKIPPED": 0.05}
PACKED = {"PACKING": "true", "BATCH_SIZE": 1, "GLOBAL_BATCH_SIZE": 4}
RECORDS = re.compile(r"records: kept .*")
TOOL = ROOT / "toolkits/multimodal_data_preprocessing/cache_tower_features.py"
# what a run is, and how the run with the cache is spread out beside
CASES = {
    "one process": ({}, {}),
    "tiles": ({"IMAGE_TILES": "2x1", "IMAGE_ASPECT_RATIO": "pad"}, {}),
    "packed, CP2 x TP2": (PACKED, {"CP": 2, "TP": 2}),
    "PP2, workers": ({}, {"PP": 2, "NUM_WORKERS": 1}),
    "packed, PP2": (PACKED, {"PP": 2}),
    "DP2 + distributed optimizer": ({}, {"NPROC_PER_NODE": 2, "DO": "true"}),
    "bf16": ({"PR": "bf16"}, {}),
    "bf16, TP2": ({"PR": "bf16"}, {"TP": 2}),
    "stage 2": ({"FREEZE_LANGUAGE_MODEL": "false"}, {"TP": 2}),
}
DEFAULT = ()  # that batches are the same but for the images is seen below


def cache(workspace: Workspace, output: Path, *words: str, expected_exit: int = 0) -> str:
    """Run the command; returns what it printed."""
    line = [interpreter.python(), str(TOOL), str(workspace.dataset), "--checkpoint", str(workspace.checkpoint)]
    done = subprocess.run(
        [*line, "--output", str(output), "--batch-size", "5", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expected_exit, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def caches(damaged: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A cache of the damaged dataset for the options of a run, each made once."""
    known: dict[tuple, Path] = {}

    def find(PR: str = "fp32", IMAGE_TILES: str = "1x1", IMAGE_ASPECT_RATIO: str = "crop", **_: object) -> Path:
        words = ("--precision", PR, "--image-tiles", IMAGE_TILES, "--image-aspect-ratio", IMAGE_ASPECT_RATIO)
        if words not in known:
            output = tmp_path_factory.mktemp("cache") / "features"
            printed = cache(damaged, output, *words)
            assert f"FEATURE_CACHE={output}" in printed or "does not pay" in printed
            known[words] = output
        return known[words]

    return find


@pytest.fixture(scope="module")
def without(damaged: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What a run of the damaged dataset prints without the cache, by its options, each run once."""
    known: dict[str, str] = {}

    def find(**options: object) -> str:
        name = json.dumps(options)
        if name not in known:
            known[name] = run(damaged, tmp_path_factory.mktemp("without") / "out", **STEPS | options)
        return known[name]

    return find


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in CASES]
)
def test_the_run_is_the_one_without(
    case: str, caches: Callable, without: Callable, damaged: Workspace, tmp_path: Path
) -> None:
    """Two records have a bad image.  Over several processes the tolerance is that of test_parallelism, in bf16 half a
    unit of its last place: the tower on two processes rounds elsewhere.
    """
    options, spread = CASES[case]
    reference = without(**options)
    folder = caches(**options)
    printed = run(damaged, tmp_path / "out", **{**STEPS, **options, **spread, "FEATURE_CACHE": folder})
    alone, found = losses(reference), losses(printed)
    assert sorted(found) == sorted(alone) == list(range(1, ITERATIONS + 1))
    assert min(alone.values()) < 0.99 * alone[1], "a run that does not learn proves little"
    worst = max(abs(found[step] / alone[step] - 1) for step in found)
    print(f"{case}: largest relative difference {worst:.1e}")
    assert worst <= (1e-6 if not spread else 2e-3 if "PR" in options else 7e-6)
    assert RECORDS.findall(printed) == RECORDS.findall(reference)
    assert "skipped 2 (not an image 2)" in printed or "skipped 3 (not an image 3)" in printed


@pytest.mark.slow
def test_images_are_not_decoded(workspace: Workspace, tmp_path: Path) -> None:
    """The images go bad behind the cache's back, which nothing that a run reads shows."""
    cache(workspace, tmp_path / "features", "--precision", "fp32")
    expected = losses(run(workspace, tmp_path / "intact", **STEPS))
    shutil.copytree(workspace.dataset, tmp_path / "wds")
    assert spoil_images(tmp_path / "wds", 8) == 8
    spoilt = Workspace(workspace.checkpoint, tmp_path / "wds")
    printed = run(spoilt, tmp_path / "out", **STEPS, FEATURE_CACHE=tmp_path / "features")
    assert losses(printed) == pytest.approx(expected, rel=1e-6)
    assert "skipped 0" in printed


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["cache, then images", "images, then cache"])
def test_a_resume_may_switch(
    first: bool, caches: Callable, without: Callable, damaged: Workspace, tmp_path: Path
) -> None:
    given = [{"FEATURE_CACHE": caches()}, {}]
    before, after = given if first else reversed(given)
    steps = STEPS | {"SAVE_INTERVAL": 6}
    run(damaged, tmp_path / "out", words=["--exit-interval", "6"], **steps, **before)
    printed = run(damaged, tmp_path / "out", **steps, **after)
    rest, whole = losses(printed), losses(without())
    assert sorted(rest) == list(range(7, ITERATIONS + 1))
    assert max(abs(rest[step] / whole[step] - 1) for step in rest) <= 1e-6
    assert RECORDS.findall(printed) == RECORDS.findall(without())[6:]


def test_batches_are_the_same_but_for_the_images(caches: Callable, damaged: Workspace) -> None:
    common = {"max_skipped_share": "0.05", "freeze_vision_tower": "", "micro_batch_size": "3"}
    loaders = [
        build_train_loader(str(damaged.dataset), read_config(argv(damaged, **common, **more)).data, 0, 1)
        for more in ({}, {"feature_cache": str(caches())})
    ]
    seen = 0
    for _ in range(30):
        one, other = (next(loader) for loader in loaders)
        assert one["record_ids"] == other["record_ids"] and other["pixels"] is None
        assert torch.equal(one["tokens"], other["tokens"]) and torch.equal(one["labels"], other["labels"])
        assert other["features"].shape == (len(one["pixels"]), 16, 48)
        seen += len(one["pixels"])
    assert loaders[0].save_state() == loaders[1].save_state()
    assert loaders[0].work | {"cached": seen} == loaders[1].work


def refusal(workspace: Workspace, folder: Path, **changes: str) -> str:
    """What the run is refused with."""
    with pytest.raises(UserError) as refused:
        read_config(argv(workspace, **{"freeze_vision_tower": "", "feature_cache": str(folder), **changes}))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.slow
def test_parts_one_of_them_killed_and_repeated_give_the_same_bytes(
    caches: Callable, damaged: Workspace, tmp_path: Path
) -> None:
    folder, output = caches(), tmp_path / "features"
    words = ("--precision", "fp32", "--image-tiles", "1x1", "--image-aspect-ratio", "crop")
    line = [interpreter.python(), str(TOOL), str(damaged.dataset), "--checkpoint", str(damaged.checkpoint), *words]
    line += ["--output", str(output), "--batch-size", "1", "--part", "2/3"]
    killed = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "features.partial"
    while not list(partial.glob("**/*.features")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert "was begun in 3 parts, --part 1/2 is of 2" in cache(
        damaged, output, *words, "--part", "1/2", expected_exit=2
    )
    assert "holds parts (2/3); give --join" in cache(damaged, output, *words, expected_exit=2)
    cache(damaged, output, *words, "--part", "1/3")
    told = cache(damaged, output, *words, "--join", expected_exit=2)
    assert "part 3/3 has not begun, part 2/3 has not ended; give the command of each with --part, then" in told
    for part in ("2/3", "3/3"):
        assert f"part {part}: " in cache(damaged, output, *words, "--part", part)
    cache(damaged, output, *words, "--join")
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()} == files


def test_two_processes_that_write_a_shard(tmp_path: Path) -> None:
    """One of them given up for dead, as a node of a cluster may be: the other's features stay as they are."""
    rows = torch.arange(12, dtype=torch.float32).reshape(2, 2, 3)
    given_up = ShardWriter(tmp_path, "train.part-000.tar")
    given_up.add_features(rows[:1])
    with ShardWriter(tmp_path, "train.part-000.tar") as writer:
        writer.add_record(2, None)
        writer.add_features(rows)
    given_up.add_features(rows[:1])
    given_up._file.flush()
    (tmp_path / "train.part-000.tar.json.tmp-12").touch()  # of one killed while it wrote the index
    remove_unfinished(tmp_path, ["train.part-000.tar"])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["train.part-000.tar.features", "train.part-000.tar.json"]
    assert (tmp_path / names[0]).read_bytes() == rows.numpy().tobytes()


def test_a_shard_that_a_node_did_not_see_is_not_kept(tmp_path: Path) -> None:
    class Unseen:
        """A dataset whose records cannot be read, which training leaves out."""

        shards = [("000000.tar", 3)]

        def __getitem__(self, index: int) -> None:
            raise OSError("no such file")

    def check() -> None:
        raise UserError("node 7 does not see the dataset")

    settings = SimpleNamespace(num_workers=0, side_px=4, sizes_matter=False)
    with pytest.raises(UserError, match="node 7"):
        fill(tmp_path, Unseen(), settings, None, {"000000.tar"}, 2, check)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_it_belongs_to_is_accepted(caches: Callable, damaged: Workspace) -> None:
    found = read_config(argv(damaged, freeze_vision_tower="", feature_cache=str(caches())))
    assert found.data.feature_cache == str(caches())


def test_a_tower_that_is_trained_is_refused(caches: Callable, damaged: Workspace) -> None:
    with pytest.raises(UserError, match="FEATURE_CACHE needs FREEZE_VISION_TOWER=true"):
        read_config(argv(damaged, feature_cache=str(caches())))


def test_random_weights_and_several_folders_are_refused(caches: Callable, damaged: Workspace, tmp_path: Path) -> None:
    random = {"init_from": "none", "tokenizer_path": str(damaged.checkpoint / "llava")}
    assert "the tower is drawn at random" in refusal(damaged, caches(), **random)
    blend = tmp_path / "blend.yaml"
    blend.write_text(
        f"splits:\n  train:\n    blend: [{{path: {damaged.dataset}}}]\n  val: {{path: {damaged.dataset}}}\n"
    )
    assert "holds the features of one folder" in refusal(damaged, caches(), train_dataset_path=str(blend))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio: crop, now pad)"),
        ({"image_tiles": "2x1"}, "image_tiles: 1x1, now 2x1)"),
        ({"no_exif_orientation": ""}, "apply_exif_orientation: True, now False)"),
        ({"bf16": ""}, "dtype: float32, now bfloat16)"),
    ],
)
def test_other_images_or_another_dtype_are_refused(
    changes: dict[str, str], told: str, caches: Callable, damaged: Workspace
) -> None:
    assert f"was made of something else ({told}" in refusal(damaged, caches(), **changes)


def test_another_dataset_is_refused(caches: Callable, damaged: Workspace, tmp_path: Path) -> None:
    shutil.copytree(damaged.dataset, tmp_path / "wds")
    assert read_config(argv(Workspace(damaged.checkpoint, tmp_path / "wds"), freeze_vision_tower=""))
    shard = next((tmp_path / "wds").glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes() + bytes(512))
    told = refusal(Workspace(damaged.checkpoint, tmp_path / "wds"), caches())
    assert re.search(r"something else \(dataset: \w{12}, now \w{12}\)", told)


@pytest.mark.slow
def test_other_weights_are_refused_and_those_of_a_run_are_the_same(
    caches: Callable, damaged: Workspace, tmp_path: Path
) -> None:
    trained = {"FREEZE_VISION_TOWER": "false", "TRAIN_ITERS": 1, "LR_WARMUP_ITERS": 0, "EVAL_ITERS": 0}
    run(damaged, tmp_path / "moved", **trained)
    moved = Workspace(tmp_path / "moved/checkpoint", damaged.dataset)
    assert re.search(r"something else \(weights of the tower: \w{12}, now \w{12}\)", refusal(moved, caches()))
    # which of them a resumed run begins with is told by the checkpoint that it loads
    assert "weights of the tower" in refusal(damaged, caches(), load=str(moved.checkpoint))
    kept = trained | {"FREEZE_VISION_TOWER": "true", "PR": "bf16", "TP": 2}
    run(damaged, tmp_path / "kept", **kept)
    begun, saved = (newest_iteration(path) for path in (damaged.checkpoint, tmp_path / "kept/checkpoint"))
    assert hash_of(read_tower(begun), torch.bfloat16) == hash_of(read_tower(saved), torch.bfloat16)
    assert hash_of(read_tower(begun), torch.float32) != hash_of(read_tower(saved), torch.float32)


@pytest.mark.parametrize("damage", ["no manifest", "no JSON", "another version", "shorter", "no index"])
def test_an_incomplete_cache_is_refused(damage: str, caches: Callable, damaged: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    shutil.copytree(caches(), folder)
    manifest, data = folder / "features.json", next(folder.glob("*.features"))
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "no JSON":
        manifest.write_text("{")
    elif damage == "another version":
        manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    elif damage == "shorter":
        os.truncate(data, data.stat().st_size - 1)
    else:
        data.with_suffix(".json").unlink()
    told = refusal(damaged, folder)
    wanted = {
        "no manifest": "no features.json in it, so no complete cache",
        "no JSON": "is damaged",
        "another version": "its version is 2, wanted 1",
        "shorter": "has not the",
        "no index": "is missing",
    }
    assert wanted[damage] in told and "cache_tower_features.py" in told


def test_the_launcher_refuses_before_anything_is_written(caches: Callable, damaged: Workspace, tmp_path: Path) -> None:
    options = STEPS | {"FEATURE_CACHE": caches(), "IMAGE_ASPECT_RATIO": "pad", "CHECK": "true"}
    printed = run(damaged, tmp_path / "out", expected_exit=2, **options)
    assert printed.startswith("error: FEATURE_CACHE") and printed.count("\n") == 1
    words, environment = command(damaged, tmp_path / "out", FEATURE_CACHE=damaged.dataset)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "FEATURE_CACHE" in done.stderr and "it has no features.json" in done.stderr
    assert not (tmp_path / "out").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_an_interrupted_cache_goes_on(caches: Callable, damaged: Workspace, tmp_path: Path) -> None:
    whole, partial, output = caches(), tmp_path / "features.partial", tmp_path / "features"
    shutil.copytree(whole, partial)
    key = json.loads((partial / "features.json").read_text())
    key = {name: key[name] for name in ("dataset", "images", "architecture", "weights", "dtype")}
    (partial / "key.json").write_text(json.dumps(key))
    (partial / "features.json").unlink()
    finished, begun = sorted(partial.glob("*.features"))[:2]
    begun.with_suffix(".json").unlink()  # the kill came while this shard was written
    os.truncate(begun, 100)
    before = finished.stat().st_mtime_ns
    printed = cache(damaged, output, "--precision", "fp32", "--image-aspect-ratio", "pad", expected_exit=2)
    assert "holds features of something else (image_aspect_ratio: crop, now pad)" in printed
    cache(damaged, output, "--precision", "fp32")
    assert (output / finished.name).stat().st_mtime_ns == before
    assert contents(output) == contents(whole) and not partial.exists()
    assert "next: put FEATURE_CACHE=" in cache(damaged, output, "--precision", "fp32")  # again: nothing is left to do
    printed = cache(damaged, output, "--precision", "bf16", expected_exit=2)
    assert printed.startswith("error: ") and "dtype: float32, now bfloat16" in printed


def test_a_disk_that_is_too_small_is_refused(damaged: Workspace, tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match=r"GiB are free, the features need about 1048576\.0; make room"):
        check_space(tmp_path / "not/there", 2**50)
    check_space(tmp_path, 1)
    assert "features will take about 0.00 GiB" in capsys.readouterr().out
    dataset = EnergonFolder(str(damaged.dataset), "train")
    images = sum("jpg" in dataset[index] for index in range(len(dataset)))
    assert predicted_images(dataset, tiles=3) == 3 * images


def test_records_of_every_place_are_found(caches: Callable, damaged: Workspace) -> None:
    """Behind each other they are the files; the records that cannot be decoded say why, as decoding does."""
    found, dataset = FeatureCache(caches()), EnergonFolder(str(damaged.dataset), "train")
    assert len(found) == len(dataset)
    reasons, read = [], []
    for index in range(len(found)):
        try:
            read.append(found.read(index))
            assert len(read[-1]) == ("jpg" in dataset[index])
            assert len(found.read(index, wanted=False)) == 0
        except ValueError as error:
            reasons.append(str(error))
    files = b"".join((caches() / f"{name}.features").read_bytes() for name, _ in dataset.shards)
    assert torch.cat(read).numpy().tobytes() == files
    assert len(reasons) == 2 and all(reason.startswith("not an image: UnidentifiedImageError") for reason in reasons)
