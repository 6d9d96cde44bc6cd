"""What is refused before Megatron starts, and the words that follow from a checkpoint."""

import dataclasses
import importlib.util
import json
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from megatron_patch import device
from megatron_patch.errors import UserError
from megatron_patch.geometry import LanguageGeometry, read_geometry_of
from megatron_patch.training.config import OFFLOAD_PACKAGES, decoder_arguments, read_config
from megatron_patch.training.offload import offload_arguments, offload_fraction
from tests.training.launching import Workspace, run


def argv(workspace: Workspace, **changes: str) -> list[str]:
    """Words of a run as the launcher passes them, in short."""
    words = {
        "--init-from": str(workspace.checkpoint),
        "--train-dataset-path": str(workspace.dataset),
        "--valid-dataset-path": str(workspace.dataset),
        "--seq-length": "128",
        "--image-tokens": "16",
        "--model-size": "tiny",
    } | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [word for pair in words.items() for word in pair if word]


def language(workspace: Workspace) -> LanguageGeometry:
    return read_geometry_of(workspace.checkpoint / "llava").language


def test_settings_follow_from_the_checkpoint(workspace: Workspace) -> None:
    settings = read_config(argv(workspace))
    assert settings.data.template == "mistral"
    assert settings.data.image_mean == (0.48145466, 0.4578275, 0.40821073)
    words = list(settings.megatron_arguments)
    for name, value in (("--num-layers", "4"), ("--num-query-groups", "2"), ("--rotary-base", "1000000")):
        assert words[words.index(name) + 1] == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_tokens": "576"}, "SEQ_LEN=576 must be 16: so many tokens"),
        ({"seq_length": "4096"}, "DECODER_SEQ_LEN=4096 must be at most 512: so many positions"),
        ({"model_size": "7B"}, "MODEL_SIZE=7B.*pass tiny"),
        ({"tensor_model_parallel_size": "3"}, "TP=3 cannot cut"),
        ({"pipeline_model_parallel_size": "3"}, "PP=3 does not divide"),
        ({"use_torch_fsdp2": ""}, "--use-torch-fsdp2 is not taken by itself: set FSDP"),
        ({"fsdp": "full", "pipeline_model_parallel_size": "2"}, "PP=2 must be 1 with FSDP=full"),
        ({"use_megatron_fsdp": ""}, "--use-megatron-fsdp is not offered"),
        ({"fp8_format": "hybrid"}, "PR=fp8 needs Transformer Engine"),
        ({"optimizer_offload_policy": "static"}, "OPTIMIZER_OFFLOAD is static.*needs a GPU"),
        ({"train_dataset_path": "/nonexistent"}, "DATASET_PATH.*no .nv-meta"),
        ({"init_from": "/nonexistent"}, "PRETRAIN_CHECKPOINT_PATH.*no finished checkpoint"),
        ({"init_from": "none"}, "needs TOKENIZER_PATH"),
        ({"save": "msc://store/run"}, "checkpoints are not kept in object storage"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, str], message: str, workspace: Workspace) -> None:
    with pytest.raises(UserError, match=message):
        read_config(argv(workspace, **changes))


def test_ways_of_fsdp_are_torchs_own(workspace: Workspace) -> None:
    """grad keeps the gathered weights from forward to backward."""
    kept = "--torch-fsdp2-no-reshard-after-forward"
    for way, wanted in {"false": set(), "full": {"--use-torch-fsdp2"}, "grad": {"--use-torch-fsdp2", kept}}.items():
        words = read_config(argv(workspace, fsdp=way)).megatron_arguments
        assert {"--use-torch-fsdp2", kept} & set(words) == wanted


@pytest.mark.parametrize("schedule", [["--rampup-batch-size", "4", "4", "64"], ["--step-batch-size-schedule", "0:8"]])
def test_equal_work_needs_steps_of_one_size(schedule: list[str], workspace: Workspace) -> None:
    words = [*argv(workspace), *schedule]
    assert read_config(words).data.balance_cost is None
    with pytest.raises(UserError, match=f"BALANCE_COST=true needs steps of one size, and {schedule[0]}"):
        read_config([*words, "--balance-cost"])


def test_what_a_record_costs_follows_from_what_is_trained(workspace: Workspace) -> None:
    """A token of a frozen language model has no gradient of weights: 4 FLOP per weight and not 6."""
    words = [*argv(workspace), "--balance-cost", "--global-batch-size", "8"]
    trained, frozen = (read_config([*words, *more]).data.balance_cost for more in ((), ("--freeze-language-model",)))
    shape = language(workspace)
    query, key = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    weights = shape.layers * shape.hidden * (2 * query + 2 * key + 3 * shape.ffn_hidden)
    assert (trained.token, frozen.token) == (6 * weights, 4 * weights)
    assert trained.pair == frozen.pair == 12 * shape.layers * query
    assert trained.image > trained.token


@pytest.mark.parametrize("options", [{}, {"packing": ""}, {"sequence_parallel": ""}])
@pytest.mark.parametrize("context", [1, 2])
def test_with_fp8_every_rank_has_a_multiple_of_16_rows(
    context: int, options: dict[str, str], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "have_transformer_engine", lambda: True)
    sizes = {"context_parallel_size": str(context), "tensor_model_parallel_size": "2"}
    data = read_config(argv(workspace, fp8_format="hybrid", **sizes, **options)).data
    tensor = 2 if "sequence_parallel" in options else 1
    assert data.length_multiple == 16 * context * tensor and data.longest_record == 128
    assert read_config(argv(workspace, **sizes, **options)).data.length_multiple < 16


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    """Transformer Engine and what its activation offload imports are there, but for these modules."""
    find_spec = importlib.util.find_spec
    there = dict.fromkeys(OFFLOAD_PACKAGES, ModuleSpec("there", None)) | dict.fromkeys(absent)
    monkeypatch.setattr(device, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there[name] if name in there else find_spec(name))


def test_offload_names_the_packages_it_lacks(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, package in OFFLOAD_PACKAGES.items():
        as_on_a_gpu(monkeypatch, module)
        with pytest.raises(UserError, match=f"AC=offload needs the package {package}.*pip install"):
            read_config(argv(workspace, bf16="", fine_grained_activation_offloading=""))


def test_offloaded_activations_come_in_few_lengths(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    data = read_config(argv(workspace, seq_length="500", bf16="", fine_grained_activation_offloading="")).data
    assert {data.padded_length(tokens) for tokens in range(1, 501)} == {256, 500}
    data = read_config(argv(workspace, seq_length="500")).data
    assert data.padded_length(123) == 123


@pytest.mark.parametrize(
    ("precision", "layers"), [({}, "local"), ({"bf16": ""}, "transformer_engine"), ({"fp16": ""}, "transformer_engine")]
)
def test_fp32_runs_on_megatrons_own_layers(
    precision: dict[str, str], layers: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine's compute it in TF32, and have no attention for it with PACKING or CP."""
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(device, "backend", lambda: device.kind("cuda"))
    words = list(read_config(argv(workspace, **precision)).megatron_arguments)
    assert words[words.index("--transformer-impl") + 1] == layers
    if not precision:
        with pytest.raises(UserError, match="AC=offload needs Transformer Engine's layers, and PR=fp32"):
            read_config(argv(workspace, fine_grained_activation_offloading=""))


def test_ranks_of_gpus_read_a_checkpoint_in_parts(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a CPU are told nothing, nor are those that hold no shared optimizer."""
    as_on_a_gpu(monkeypatch)

    def in_parts(kind: str, **changes: str) -> bool:
        monkeypatch.setattr(device, "backend", lambda: device.kind(kind))
        return "--ckpt-fully-parallel-load" in read_config(argv(workspace, **changes)).megatron_arguments

    assert in_parts("cuda", bf16="", use_distributed_optimizer="")
    assert not in_parts("cpu", bf16="", use_distributed_optimizer="")
    assert not in_parts("cuda", bf16="")


def test_fp32_convolutions_are_in_fp32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    device.kind("cuda").install()
    assert not torch.backends.cudnn.allow_tf32


def test_sliding_window_is_refused_beyond_and_accepted_within(workspace: Workspace) -> None:
    windowed = dataclasses.replace(language(workspace), sliding_window=64)
    assert decoder_arguments(windowed, 64)
    with pytest.raises(UserError, match=r"at most 64: .* sliding window"):
        decoder_arguments(windowed, 65)


def test_a_refusal_of_the_entry_is_one_sentence(workspace: Workspace, tmp_path: Path) -> None:
    """Through the launcher: a checkpoint whose images have another size, which only the entry reads."""
    shutil.copytree(workspace.checkpoint, tmp_path / "checkpoint")
    where = tmp_path / "checkpoint/llava/preprocessor_config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"crop_size": 99}))
    other = Workspace(tmp_path / "checkpoint", workspace.dataset)
    printed = run(other, tmp_path / "out", expected_exit=2, CHECK="true", TRAIN_ITERS=3)
    assert printed.startswith("error: ") and "crop_size 99" in printed and printed.count("\n") == 1
    assert not (tmp_path / "out/checkpoint").exists()


def test_offload_fraction_grows_as_memory_shrinks() -> None:
    billion, gib = 10**9, 2**30
    assert offload_fraction(7 * billion, 8, 80 * gib) == 0.0
    # state 84 GB, room 0.65 * 80 GiB - 42 GB = 13.8 GB: 84% is missing, rounded up to a twentieth
    assert offload_fraction(7 * billion, 1, 80 * gib) == pytest.approx(0.85)
    assert offload_fraction(13 * billion, 1, 80 * gib) == 1.0


def test_no_offload_needs_no_words(workspace: Workspace) -> None:
    assert offload_arguments("false", language(workspace), 1, 1, 1, 1) == []


def test_an_offload_that_cannot_be_resumed_is_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "backend", lambda: device.kind("cuda"))
    monkeypatch.setattr(device, "have_transformer_engine", lambda: False)
    with pytest.raises(UserError, match="OPTIMIZER_OFFLOAD is static, and without Transformer Engine no run resumes"):
        offload_arguments("static", language(workspace), 1, 1, 1, 1)
    monkeypatch.setattr(device, "have_transformer_engine", lambda: True)
    assert "--optimizer-cpu-offload" in offload_arguments("static", language(workspace), 1, 1, 1, 1)
