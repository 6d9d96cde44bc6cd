"""Megatron's own dist_checkpointing in one gloo process, for the tests; run as a program with a JSON list of jobs:

    {"do": "read", "source": ITERATION, "target": FILE, "tensor_parallel": 2}
    {"do": "save", "source": FILE, "target": ITERATION, "tensor_parallel": 2, "padding": 48, "per_layer": false}

`read` asks for every tensor in the pieces that ranks of that parallelism ask for and writes the pieces put together.
`save` writes what such a trainer writes: pieces per rank and layer, padded vocabulary, optimizer state, RNG,
extra states, arguments in the common state.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# Which axis of a single layer's tensor Megatron's tensor parallelism cuts, by the end of the key.  Written down here
# a second time on purpose: the table of weights must agree with it.
CUT = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
}


def cut_axis(key: str) -> int | None:
    return next((axis for end, axis in CUT.items() if key.endswith(end)), None)


def is_gated(key: str) -> bool:
    return key.startswith("language_model.") and key.endswith("linear_fc1.weight")


def pieces(key: str, whole: torch.Tensor, tensor_parallel: int, padded_rows: int = 0):
    """(name, ShardedTensor) of every rank and layer; data are contiguous copies of parts of `whole`."""
    from megatron.core.dist_checkpointing import ShardedTensor

    stacked = ".layers." in key
    axis = cut_axis(key)
    vocabulary = key.endswith(("word_embeddings.weight", "output_layer.weight"))
    for layer in range(len(whole)) if stacked else [None]:
        tensor = whole if layer is None else whole[layer]
        offsets = [] if layer is None else [(0, layer, len(whole))]
        shift = len(offsets)
        cuts = 1 if axis is None else tensor_parallel * (2 if is_gated(key) else 1)
        for rank, piece in enumerate(tensor.chunk(cuts, dim=axis or 0)):
            place = [*offsets, (axis + shift, rank, cuts)] if axis is not None else offsets
            sharded = ShardedTensor.from_rank_offsets(
                key,
                piece.contiguous().clone(),
                *place,
                prepend_axis_num=shift,
                allow_shape_mismatch=vocabulary,
            )
            yield f"{key}@{layer}@{rank}", sharded


def together(key: str, layers: int | None, cuts: int, loaded: dict) -> torch.Tensor:
    axis = cut_axis(key) or 0

    def one(layer):
        return torch.cat([loaded[f"{key}@{layer}@{rank}"] for rank in range(cuts)], dim=axis)

    return one(None) if layers is None else torch.stack([one(layer) for layer in range(layers)])


def read(iteration: Path, out: Path, tensor_parallel: int) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(iteration).read_metadata().state_dict_metadata
    wanted, counts, extra = {}, {}, 0
    for key, entry in metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            whole = torch.zeros(entry.size, dtype=entry.properties.dtype)
            parts = dict(pieces(key, whole, tensor_parallel))
            layers = len(whole) if ".layers." in key else None
            counts[key] = (layers, len(parts) // (layers or 1))
            wanted |= parts
        elif "_extra_state/" in key:
            name, shard = key.split("/shard_")
            place, shards = (int(number) for number in shard.split("_"))
            wanted[key] = ShardedObject(name, None, (shards,), (place,))
            extra += 1
    loaded = dist_checkpointing.load(wanted, str(iteration))  # the default strictness
    assert extra and all(loaded[key] is None for key in wanted if "_extra_state/" in key)
    common = dist_checkpointing.load_common_state_dict(iteration)
    save_file(
        {key: together(key, layers, cuts, loaded) for key, (layers, cuts) in counts.items()},
        str(out),
        metadata={"common": json.dumps(common), "extra_states": str(extra)},
    )


def save(weights: Path, iteration: Path, tensor_parallel: int, padding: int = 0, per_layer: bool = False) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    iteration.mkdir(parents=True)
    state = {
        "args": argparse.Namespace(tensor_model_parallel_size=tensor_parallel),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "rng": ShardedObject("rng_state", [{"torch_rng_state": torch.get_rng_state()}], (1, 1), (0, 0)),
        "rerun": ShardedObject("rerun_state_machine_state", {"mode": "x"}, (1,), (0,)),
    }
    for key, whole in load_file(str(weights)).items():
        if key.endswith(("word_embeddings.weight", "output_layer.weight")):
            whole = torch.cat([whole, torch.full((padding, whole.shape[1]), 7.0, dtype=whole.dtype)])
        if per_layer and ".layers." in key:
            for layer, tensor in enumerate(whole):
                name = key.replace(".layers.", f".layers.{layer}.")
                state[name] = ShardedTensor.from_rank_offsets(name, tensor.clone())
            continue
        for name, sharded in pieces(key, whole, tensor_parallel):
            state[name] = sharded
        for name, sharded in pieces(key, torch.ones_like(whole, dtype=torch.float32), tensor_parallel):
            sharded.key = f"optimizer.state.exp_avg.{key}"
            state[f"optimizer.{name}"] = sharded
        if key.endswith("linear_fc2.weight"):
            name = key.replace("weight", "_extra_state")
            layers = len(whole) if ".layers." in key else 1
            for layer in range(layers):
                state[f"{name}@{layer}"] = ShardedObject(name, None, (layers,), (layer,))
    dist_checkpointing.save(state, str(iteration))


def main() -> None:
    if not torch.cuda.is_available():
        # Megatron's writer waits for a GPU, and puts a counter there, though the tensors are on the CPU.
        torch.cuda.synchronize = lambda *device: None
        torch.cuda.current_device = lambda: torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        for job in json.loads(sys.argv[1]):
            action = {"read": read, "save": save}[job.pop("do")]
            action(Path(job.pop("source")), Path(job.pop("target")), **job)
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
