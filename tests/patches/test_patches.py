"""Every patch meets its target, other versions are refused, and nothing is patched on a GPU that need not be."""

import math
from pathlib import Path

import pytest
import torch

from megatron_patch import patches
from megatron_patch.errors import UserError
from megatron_patch.patches.adam_of_another_kind import turn_into_fused, turn_into_torchs
from tests.programs import WITH_AND_WITHOUT_COMPILER, in_warm_process


def test_all_patches_apply() -> None:
    program = """
from megatron_patch import device
device.install()
from megatron_patch import patches
print(*patches.apply_all("cpu"))
assert patches.apply_all("cpu")  # twice is once
"""
    names = in_warm_process(program).split()
    assert names == patches.listed("cpu") and len(names) == 29


def test_only_what_a_gpu_needs_is_applied_there() -> None:
    wanted = {"distributed_optimizer_state", "fused_adamw", "interleaved_loader_state", "skip_compile_helpers"} | {
        "adam_of_another_kind",
        "ended_writer",
        "missing_extra_states",
        "own_optimizer_state",
        "parameter_group_keys",
        "shifted_optimizer_state",
        "torch_fsdp2",
        "rotary_in_one_pass",
        "scale_in_place",
        "synchronous_save_queue",
        "unfused_weight_gradients",
        "whole_tracker",
    }
    assert set(patches.listed("cuda")) == wanted


@pytest.mark.parametrize(("extension", "fused"), [("", False), ("fused_weight_gradient_mlp_cuda", True)])
def test_only_megatrons_own_linear_layers_lose_the_fusion(extension: str, fused: bool) -> None:
    """The output layer is Megatron's in any case; the config that Transformer Engine's layers read stays as it is."""
    program = """
import sys, types
from megatron_patch import device
device.install()
sys.modules["fused_weight_gradient_mlp_cuda"] = None  # not the CPU's own
if sys.argv[1]:
    sys.modules[sys.argv[1]] = types.ModuleType(sys.argv[1])  # what Apex would bring
from megatron_patch import patches
patches.apply_all("cpu")
from megatron_patch.patches import unfused_weight_gradients
unfused_weight_gradients.apply()
import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.model.layer_specs import decoder_block
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
config = TransformerConfig(
    num_layers=1,
    hidden_size=16,
    num_attention_heads=2,
    transformer_impl="local",
    use_cpu_initialization=True,
    gradient_accumulation_fusion=True,
)
model = GPTModel(config, decoder_block(config), vocab_size=32, max_sequence_length=8)
row = model.decoder.layers[0].self_attention.linear_proj  # reads the config as Transformer Engine's layers do
print(*(part.gradient_accumulation_fusion for part in (model.output_layer, row, config)))
if not sys.argv[1]:
    hidden = torch.ones(4, 1, 16)
    model.output_layer(hidden)[0].sum().backward()  # fused, this is where the extension would be called
    assert torch.equal(model.output_layer.weight.grad, torch.full((32, 16), 4.0))
"""
    assert in_warm_process(program, extension).splitlines()[-1] == f"{fused} True True"


def test_a_synchronous_save_starts_no_process(tmp_path: Path) -> None:
    program = """
import multiprocessing, sys, types
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import global_vars
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
args = types.SimpleNamespace(async_save=False)
global_vars.set_args(args)
dist_checkpointing.save({"weight": ShardedTensor.from_rank_offsets("weight", torch.arange(4.0))}, sys.argv[1])
print(len(multiprocessing.active_children()))
wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(4))}
print(dist_checkpointing.load(wanted, sys.argv[1])["weight"].tolist())
args.async_save = True  # written by another process: the queue is a manager's
assert filesystem_async.get_write_results_queue(mp_mode="fork") is filesystem_async.get_write_results_queue()
print(len(multiprocessing.active_children()))
"""
    (tmp_path / "saved").mkdir()
    assert in_warm_process(program, str(tmp_path / "saved")).splitlines()[-3:] == ["0", "[0.0, 1.0, 2.0, 3.0]", "1"]


@pytest.mark.parametrize("version", ["0.19.0", "0.20.0", "none"])
def test_another_megatron_core_is_refused_with_a_sentence(version: str) -> None:
    with pytest.raises(UserError, match=rf"megatron-core {version} .* 0\.19\.2.*pip install"):
        patches.check_version(version)


def test_the_installed_version_is_accepted() -> None:
    patches.check_version()


def test_rng_tracker_restores_the_state() -> None:
    """fork() must leave the generator where it was, and go on from its own state the next time."""
    program = """
import torch
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
tracker = CudaRNGStatesTracker()
tracker.add("model-parallel-rng", 7)
torch.manual_seed(1)
before = torch.get_rng_state()
with tracker.fork():
    one = torch.rand(4)
assert torch.equal(torch.get_rng_state(), before)
with tracker.fork():
    two = torch.rand(4)
torch.manual_seed(7)
assert torch.equal(torch.cat([one, two]), torch.cat([torch.rand(4), torch.rand(4)]))
print("same")
"""
    assert in_warm_process(program).strip() == "same"


def test_checkpoints_are_written_in_pieces() -> None:
    program = """
import io, torch
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from megatron_patch.patches.written_in_pieces import PIECE

class File(io.BytesIO):
    def write(self, data):
        sizes.append(len(data))
        return super().write(data)

sizes, file, tensor = [], File(), torch.randn(300_001)
(item,) = _create_write_items("weight", tensor)
for _ in range(2):  # the second behind the first
    begin = file.tell()
    options = {"serialization_format": SerializationFormat.TORCH_SAVE}
    done = filesystem_async._write_item(_StorageWriterTransforms(), file, tensor, item, "key", **options)
    assert (done.storage_data.offset, done.storage_data.length) == (begin, file.tell() - begin)
    assert torch.equal(torch.load(io.BytesIO(file.getvalue()[begin:])), tensor)
print(max(sizes) == PIECE, sizes.count(PIECE) == 2 * (tensor.nbytes // PIECE))
"""
    assert in_warm_process(program).split()[-2:] == ["True", "True"]


def test_an_embeddings_gradient_is_that_of_its_rows() -> None:
    """In the buffer stands what torch's gradient adds to it, and no tensor of the weight's size is made."""
    program = """
import types, torch
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
from megatron.core import mpu, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
tokens = torch.tensor([[3, 5, 3], [0, 7, 5]])
for dtype in (torch.float32, torch.bfloat16):  # both are added in 32 bits
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, params_dtype=dtype)
    embedding = VocabParallelEmbedding(9, 4, init_method=torch.nn.init.normal_, config=config)
    of_training = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, of_training, embedding)
    weights = torch.randn(2, 3, 4).to(dtype)
    seen = []
    embedding.weight.register_hook(lambda gradient: seen.append(None if gradient is None else gradient.shape))
    for accumulated in (1, 2):
        found = model(tokens)
        assert torch.equal(found, embedding.weight[tokens])
        found.backward(weights)
        expected = torch.zeros(9, 4).index_add_(0, tokens.flatten(), weights.flatten(0, 1).float()) * accumulated
        torch.testing.assert_close(embedding.weight.main_grad, expected, rtol=1e-6, atol=1e-6)
    assert embedding.weight.grad is None and not any(seen), seen

def whole(overlapping=False, **changes):
    embedding = VocabParallelEmbedding(9, 4, init_method=torch.nn.init.normal_, config=config)
    of_training = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlapping)
    model = DistributedDataParallel(config, of_training, embedding)
    vars(embedding).update(changes)
    return type(model(tokens).grad_fn).__name__

alone = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
nodes = [whole(), whole(overlapping=True), whole(reduce_scatter_embeddings=True, tp_group=alone)]
without_buffer = VocabParallelEmbedding(9, 4, init_method=torch.nn.init.normal_, config=config)
frozen = VocabParallelEmbedding(9, 4, init_method=torch.nn.init.normal_, config=config).requires_grad_(False)
print(*nodes, type(without_buffer(tokens).grad_fn).__name__, frozen(tokens).requires_grad)
"""
    rows, overlapping, of_parts, without_buffer, frozen = in_warm_process(program).split()[-5:]
    assert (rows, of_parts) == ("LookupBackward", "_ReduceScatterToSequenceParallelRegionBackward")
    assert overlapping == without_buffer == "EmbeddingBackward0" and frozen == "False"


def test_parts_of_tensors_are_saved_without_copies(tmp_path: Path) -> None:
    """The writer gets the very memory, and writes no more of it than the part."""
    program = """
import os, sys, torch
from pathlib import Path
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
prepare, written = FileSystemWriterAsync.prepare_write_data, []

def watched(self, *plan):
    prepare(self, *plan)
    written.extend(tensor for *_, (_, tensors) in self.write_buckets for _, tensor in tensors)

FileSystemWriterAsync.prepare_write_data = watched
whole = torch.randn(4000, 64, requires_grad=True)
half = torch.randn(2000, 64).bfloat16()
tensors = {
    "part": whole.data[1000:1500], "weight": whole[2000:2001], "narrow": half[7:9], "whole": torch.randn(3),
    "columns": whole.data[:2000:2, ::2],
}
state = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
folder = Path(sys.argv[1])
dist_checkpointing.save(state, folder)
places = [tensor.data_ptr() for tensor in written]
print(*sorted(name for name, tensor in tensors.items() if tensor.data_ptr() in places))
print(sum(file.stat().st_size for file in folder.glob("*.distcp")) < 300_000)  # a part, columns, and 1 KB a tensor
fresh = {
    name: ShardedTensor.from_rank_offsets(name, torch.empty_like(tensor).contiguous())
    for name, tensor in tensors.items()
}
loaded = dist_checkpointing.load(fresh, folder)
print(all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items()))
"""
    in_place, small, equal = in_warm_process(program, tmp_path).splitlines()[-3:]
    assert in_place.split() == ["narrow", "part", "weight", "whole"]
    assert (small, equal) == ("True", "True")


def test_extra_states_that_nobody_wrote_are_not_asked_for(tmp_path: Path) -> None:
    """Written by a layer without extra states, read by one that has them; a weight that is not there is refused."""
    program = """
import os, sys, torch
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
from megatron.core import dist_checkpointing
from megatron.core.transformer.utils import sharded_state_dict_default
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

class Norm(torch.nn.LayerNorm):
    def get_extra_state(self):
        return torch.zeros(0)

def wanted(module):
    group = torch.distributed.group.WORLD
    return {"model": [sharded_state_dict_default(module, "norm.", metadata={"dp_cp_group": group}, tp_group=group)]}

written = torch.nn.LayerNorm(4)
torch.nn.init.constant_(written.weight, 3.0)
dist_checkpointing.save(wanted(written), sys.argv[1])
(loaded,) = dist_checkpointing.load(wanted(Norm(4)), sys.argv[1])["model"]
assert sorted(loaded) == ["norm.bias", "norm.weight"] and loaded["norm.weight"].tolist() == [3.0] * 4
missing = wanted(Norm(4))
missing["model"][0]["other.weight"] = missing["model"][0].pop("norm.weight")
missing["model"][0]["other.weight"].key = "other.weight"
try:
    dist_checkpointing.load(missing, sys.argv[1])
except BaseException as error:  # torch's CheckpointException is no Exception
    print(error)
"""
    (tmp_path / "checkpoint").mkdir()
    assert "other.weight" in in_warm_process(program, tmp_path / "checkpoint")


def test_torchs_adamw_steps_fused_also_after_a_load() -> None:
    """Groups of a checkpoint come with `fused` of the run that wrote them."""
    program = """
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import training
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
model = DistributedDataParallel(config, DistributedDataParallelConfig(), torch.nn.Linear(4, 4))
optimizer = training.get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.1), [model])
(part,) = optimizer.chained_optimizers
state = part.optimizer.state_dict()
for group in state["param_groups"]:
    assert group["fused"]
    group["fused"] = None
part.optimizer.load_state_dict(state)
assert all(group["fused"] for group in part.optimizer.param_groups)
print("fused")
"""
    assert in_warm_process(program).split()[-1] == "fused"


def test_adams_take_what_the_other_kind_has_saved() -> None:
    """FusedAdam has the step in its groups, as an int, and settings that torch's Adam lacks; moments stay."""
    states = {0: {"step": torch.tensor(7.0), "exp_avg": 1}, 1: {"step": torch.tensor(7.0), "exp_avg": 2}}
    groups = [{"params": [0, 1], "lr": 0.5}, {"params": [], "step": 7.0}]
    turn_into_fused({"bias_correction": True, "lr": 9.0}, groups, states)
    assert groups[0] == {"params": [0, 1], "lr": 0.5, "bias_correction": True, "step": 7}
    assert groups[1]["step"] == 7 and type(groups[1]["step"]) is type(groups[0]["step"]) is int
    assert states == {0: {"exp_avg": 1}, 1: {"exp_avg": 2}}
    turn_into_torchs(groups, states)
    assert all(torch.equal(state["step"], torch.tensor(7.0)) for state in states.values())
    assert states[0]["step"] is not states[1]["step"] and not any("step" in group for group in groups)


def test_rotary_positions_are_megatrons() -> None:
    """Rows of a batch and packed rows, values and gradients; by torch in 64 bits, by the compiled kernel in 32."""
    program = """
from types import SimpleNamespace
from megatron_patch import device
device.install()
import torch
from megatron.core.transformer import attention
theirs = attention.apply_rotary_pos_emb
from megatron_patch import patches
patches.apply_all("cpu")
ours = attention.apply_rotary_pos_emb
assert ours is not theirs
config = SimpleNamespace(
    apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False, mrope_section=None
)
class Group(SimpleNamespace):
    rank, size = (lambda self: self.number), (lambda self: self.ranks)
cu_seqlens = torch.tensor([0, 12, 16, 24], dtype=torch.int32)
rows = ((24, 3, 5, 8), None, 1), ((24, 5, 8), cu_seqlens, 1), ((12, 5, 8), cu_seqlens, 2)
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
    half = torch.rand(24, 1, 1, 4, dtype=dtype) * 6
    angles = torch.cat([half, half], -1)
    for shape, packed, ranks in rows:
        states = torch.randn(shape, dtype=dtype, requires_grad=True)
        longest = angles if packed is None else angles[:12]
        weights = torch.randn(shape, dtype=dtype)
        for number in range(ranks):
            group = Group(number=number, ranks=ranks)
            found, expected = (turn(states, longest, config, packed, cp_group=group) for turn in (ours, theirs))
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
            gradients = (torch.autograd.grad(turned, states, weights)[0] for turned in (found, expected))
            torch.testing.assert_close(*gradients, rtol=0, atol=tolerance)
print("equal")
"""
    assert in_warm_process(program).split() == ["equal"]


def test_gradients_are_clipped_where_they_lie() -> None:
    program = """
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
for parameter in parameters:
    parameter.grad = torch.full_like(parameter, 4.0)
places = [parameter.grad.data_ptr() for parameter in parameters]
copied, copy = [], torch.Tensor.copy_
torch.Tensor.copy_ = lambda *given: copied.append(given) or copy(*given)
clip_grad_by_total_norm_fp32(parameters, 1.0, 8.0)
assert not copied and places == [parameter.grad.data_ptr() for parameter in parameters]
print(*{round(value, 5) for parameter in parameters for value in parameter.grad.flatten().tolist()})
"""
    assert in_warm_process(program).split() == ["0.5"]


@WITH_AND_WITHOUT_COMPILER
def test_the_norm_of_large_gradients_is_exact(environment: dict[str, str]) -> None:
    """Against the sum in 64 bits; torch.norm loses a thousandth of these 28 million."""
    program = """
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
import torch
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
large = torch.randn(49152, 576) * 1e-3
exact = (large.double().square().sum() + 9 + 16 + 4).item() ** 0.5
# of one column, of none, and in 16 bits
others = [torch.tensor([[3.0, 7.0], [4.0, 7.0]])[:, 0], torch.zeros(0, 5), torch.full((4,), 1.0, dtype=torch.bfloat16)]
print(get_grad_norm_fp32([large, *others]) / exact - 1, get_grad_norm_fp32([]))
large[0, 0] = float("nan")
print(get_grad_norm_fp32([large]))
"""
    error, of_none, of_nan = map(float, in_warm_process(program, **environment).split())
    assert abs(error) < 1e-6
    assert of_none == 0
    assert math.isnan(of_nan)


@WITH_AND_WITHOUT_COMPILER
def test_a_gradient_in_16_bits_is_added_in_parts(environment: dict[str, str]) -> None:
    """To the buffer of 32 bits, over two micro-batches; what a fused product has added already is not added again."""
    program = """
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
import torch
from megatron.core import mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch import kernels
from megatron_patch.kernels import gradient_buffer
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
gradient_buffer.PART = 4
parts, add = [], torch.Tensor.add_
torch.Tensor.add_ = lambda one, other, **rest: parts.append(other.numel()) or add(one, other, **rest)
config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
model = DistributedDataParallel(config, settings, torch.nn.Embedding(5, 2, dtype=torch.bfloat16))
weight = model.module.weight
assert weight.main_grad.dtype == torch.float32
weight.zero_out_wgrad = True  # as a head that is the embedding too
weight.grad_added_to_main_grad = True
for _ in range(2):
    model(torch.tensor([1, 1, 3])).float().sum().backward()
    assert weight.grad is None and weight.grad_added_to_main_grad and weight.zero_out_wgrad
assert max(parts, default=4) == 4, parts
assert bool(parts) == (kernels.library() is None)
print(*weight.main_grad[:, 0].tolist())
weight.zero_out_wgrad = False
model(torch.tensor([1, 1, 3])).float().sum().backward()
print(*weight.main_grad[:, 1].tolist())
"""
    assert in_warm_process(program, **environment).splitlines()[-2:] == ["0.0 4.0 0.0 2.0 0.0"] * 2
