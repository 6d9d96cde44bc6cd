"""Asynchronous saves on a CPU: Megatron's own request, queue and process, with torch's own reader as the judge."""

from pathlib import Path

from tests.programs import ONLY_RANK, in_warm_process

WRITER = f"""
import multiprocessing, os, signal, sys, time, types
from pathlib import Path
{ONLY_RANK}
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, PersistentAsyncCaller
from megatron.training import global_vars
global_vars.set_args(types.SimpleNamespace(async_save=True))
Writer = filesystem_async.FileSystemWriterAsync
folder = Path(sys.argv[1])
signal.alarm(90)  # instead of a hang

def wait_for(truth, seconds=30):
    deadline = time.monotonic() + seconds
    while not truth() and time.monotonic() < deadline:
        time.sleep(0.02)
    return truth()
"""


def test_the_writer_of_an_asynchronous_save_gets_copies(tmp_path: Path) -> None:
    """What is saved are the values at the request, while training changes them before the writer begins.

    They are copied while the save is planned, by more than one thread; what is not of one piece, afterwards.
    """
    program = """
import pickle, threading
from multiprocessing.reduction import ForkingPickler
from megatron_patch.patches import async_save_copies

def copy(tensors, original=async_save_copies._copied):
    copied.append((list(tensors), threading.get_ident()))
    return original(tensors)

def prepare(self, *words, original=filesystem_async.FileSystemWriterAsync.prepare_write_data):
    planned.append(len(copied))
    return original(self, *words)

def write(transforms, use_msc, rank, buckets, queue, original=Writer.write_preloaded_data_multithread):
    assert wait_for((folder / "changed").exists)
    received = [tensor for *_, (_, pairs) in buckets for _, tensor in pairs]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in received)  # torch.save() writes it all
    assert all(tensor.data_ptr() % 64 == 0 for tensor in received)
    original(transforms, use_msc, rank, buckets, queue)

def save(name, **words):
    (folder / name).mkdir()
    state = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
    return dist_checkpointing.save(state, folder / name, **words)

copied, planned = [], []
async_save_copies._copied = copy
Writer.prepare_write_data = prepare
Writer.write_preloaded_data_multithread = staticmethod(write)
torch.set_num_threads(2)
part = torch.randn(100, 8)
tensors = {f"weight {number}": torch.randn(3, 1 + number % 40) for number in range(8000)}
odd = {"part": part[10:20], "columns": part[:, 2:4], "in the same memory": part[:20, :4], "transposed": part[:8].t()}
square = torch.randn(50, 50)
odd |= {"square": square, "on its side": square.t()}
tensors |= odd | {"scalar": torch.tensor(3.0), "bf16": torch.randn(7, 5).bfloat16()}
tensors["parameter"] = torch.nn.Parameter(torch.randn(3))
expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
filesystem_async.get_write_results_queue(mp_mode="fork")
queue = AsyncCallsQueue(persistent=True)
AsyncCallsQueue.warmup_persistent_caller(0, mp_mode="fork")
request = save("saved", async_sharded_save=True, async_strategy="mcore")
ahead = planned.pop()
queue.schedule_async_request(request)
for tensor in [part, square, *(tensor.data for name, tensor in tensors.items() if name not in odd)]:
    tensor += 1
(folder / "changed").touch()
queue.maybe_finalize_async_calls(blocking=True)
queue.close()
names = {id(tensor): name for name, tensor in tensors.items()}
print(sorted(list(tensor.shape) for found, _ in copied[8:] for tensor in found))
assert ahead and all(len(found) > 500 for found, _ in copied[:8])
assert all(tensor.is_contiguous() for found, _ in copied[:8] for tensor in found)
print(len({thread for _, thread in copied[:8]}))
fresh = {name: ShardedTensor.from_rank_offsets(name, torch.zeros_like(value)) for name, value in expected.items()}
loaded = dist_checkpointing.load(fresh, folder / "saved")
print([name for name, value in expected.items() if not torch.equal(loaded[name], value)])
buckets = [("file", "key", ([], [(0, torch.zeros(0, 4))]))]
sent = ForkingPickler.dumps(async_save_copies._Buckets(buckets, async_save_copies._Copies([])))  # as a queue does it
assert pickle.loads(sent)[0][2][1][0][1].shape == (0, 4)
copied.clear()
save("synchronous")  # by a process without a writer
print(copied)
"""
    late, threads, wrong, synchronous = in_warm_process(WRITER + program, tmp_path).splitlines()[-4:]
    assert late == "[[8, 8], [20, 4], [50, 50], [100, 2]]"
    assert (threads, wrong, synchronous) == ("2", "[]", "[]")


def test_the_writer_is_forked_and_ends_with_its_trainer(tmp_path: Path) -> None:
    """It imports nothing anew; a fork inherits neither the threads that OpenMP waits for nor how a trainer's end kills.

    The manager of its results ends as well.
    """
    program = """
def report(path):
    path.with_suffix(".part").write_text(f"{os.getpid()} {os.getppid()} {torch.get_num_threads()}")
    path.with_suffix(".part").rename(path)

def alive(process):
    try:
        return "State:\\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False

torch.set_num_threads(2)
trainer = os.fork()
if not trainer:
    queue = AsyncCallsQueue(persistent=True)
    AsyncCallsQueue.warmup_persistent_caller(0, mp_mode="forkserver")
    filesystem_async.get_write_results_queue(mp_mode="fork")
    queue.schedule_async_request(AsyncRequest(report, (folder / "report",), []))
    (folder / "helpers").write_text(" ".join(str(process.pid) for process in multiprocessing.active_children()))
    time.sleep(40)
assert wait_for((folder / "report").exists)
writer, parent, threads = map(int, (folder / "report").read_text().split())
helpers = set(map(int, (folder / "helpers").read_text().split()))
assert len(helpers) == 2 and writer in helpers and all(map(alive, helpers))
assert (parent, threads) == (trainer, 1)
os.kill(trainer, signal.SIGKILL)
os.waitpid(trainer, 0)
print(wait_for(lambda: not any(map(alive, helpers)), 10))
for helper in filter(alive, helpers):
    os.kill(helper, signal.SIGKILL)
"""
    assert in_warm_process(WRITER + program, tmp_path).splitlines()[-1] == "True"


def test_a_killed_writer_ends_the_run(tmp_path: Path) -> None:
    """Also its exit, for which multiprocessing would wait until somebody has read what was sent to the writer."""
    program = """
from megatron_patch.patches.ended_writer import WriterEndedError

def write(content, path):
    path.touch()
    time.sleep(60)

queue = AsyncCallsQueue(persistent=True)
AsyncCallsQueue.warmup_persistent_caller(0, mp_mode="fork")
(process,) = multiprocessing.active_children()
queue.schedule_async_request(AsyncRequest(time.sleep, (0.3,), []))
assert not queue.maybe_finalize_async_calls() and len(queue.maybe_finalize_async_calls(blocking=True)) == 1
queue.schedule_async_request(AsyncRequest(write, ("", folder / "began"), []))
queue.schedule_async_request(AsyncRequest(write, ("much" * 10**6, folder / "never"), []))
assert wait_for((folder / "began").exists)
assert not queue.maybe_finalize_async_calls()
os.kill(process.pid, signal.SIGKILL)
process.join()
for blocking in (False, True):
    try:
        queue.maybe_finalize_async_calls(blocking=blocking)
    except WriterEndedError as error:
        print(error)
        break
"""
    printed = in_warm_process(WRITER + program, tmp_path).splitlines()[-1]
    assert "asynchronous saves ended with signal 9" in printed and "ASYNC_SAVE=false" in printed
