"""CPU: stand-ins for the parts of torch.cuda that Megatron's trainer calls without asking.

Megatron-core runs on gloo and CPU tensors, but its trainer takes "cuda" for granted: it asks for the current device,
times with CUDA streams and compares tensor types by name.  Each stand-in below names the place that needs it
(megatron-core 0.19.2).  `torch.cuda.is_available()` stays False, so everybody who asks still gets the truth.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

from megatron_patch.errors import UserError

TYPE_CHECKING = False  # typing's own, without an import that the launchers would wait for
if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

NAME = "cpu"

# ---------------------------------------------------------------- for the launchers

DEVICES, COUNTED_BY = "processes", "TP x PP x CP"
REFUSED = {
    "PR=fp8": "needs a GPU, and this run is on CPU",
    "AC=offload": "needs a GPU: on CPU the activations are in host memory already",
    "OPTIMIZER_OFFLOAD=static": "needs a GPU: on CPU the optimizer state is in host memory already",
    "OPTIMIZER_OFFLOAD=auto": "needs a GPU: on CPU the optimizer state is in host memory already",
    "PROFILER=nsys": "needs a GPU: Nsight ranges are marked through CUDA; use torch",
}
ATTENTION_BACKENDS = None
CPUINFO = "/proc/cpuinfo"
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # as Linux names them on x86, the last on Arm


def bf16_instructions() -> list[str]:
    """Those of BF16_INSTRUCTIONS that this CPU has; torch uses them for PR=bf16 by itself.  Without /proc: none."""
    try:
        with open(CPUINFO, encoding="ascii", errors="replace") as file:
            known = set(file.read().split())
    except OSError:
        return []
    return [name for name in BF16_INSTRUCTIONS if name in known]


def notes() -> dict[str, str]:
    """What runs slower here than a user may expect."""
    if bf16_instructions():
        return {}
    return {"PR=bf16": "this CPU has no instructions for it, so a step takes longer than with PR=fp32"}


def memory_here(processes: int) -> int | None:
    """Bytes that each of so many processes has of this machine's memory."""
    return memory() // processes


def count(chosen: str = "") -> None:
    """As many processes as a model needs."""
    del chosen


def choice_problem(chosen: str) -> tuple[str, str] | None:
    """There is nothing to choose from."""
    return ("GPUS", "needs GPUs, and this run is on CPU; leave it out, or use ACCELERATOR=cuda") if chosen else None


def choice(chosen: str) -> dict[str, str]:
    """Nothing."""
    del chosen
    return {}


# glibc hands every large tensor back to the system when it is freed, and the next one is cleared page by page: a sixth
# of a step that trains all of SmolLM2-135M.  With these (bytes, mallopt(3)) the process keeps what it once held.  In
# large pages, where the system gives them to those who ask, such a step takes 1 to 4% less.
MEMORY_KEPT = {
    **{"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"},
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def environment(nodes: int) -> dict[str, str]:
    """No GPU is seen, nothing is compiled (see install()), memory is kept, a single node meets on its loopback."""
    variables = {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    variables |= {name: os.environ.get(name) or value for name, value in MEMORY_KEPT.items()}
    if nodes == 1 and os.path.exists("/sys/class/net/lo"):
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME") or "lo"
    return variables


# ---------------------------------------------------------------- for the run

TRANSFORMER_ENGINE = False
READS_IN_PARTS = False  # a machine's ranks read the same pages: 1.4 s for 135M parameters, and 1.7 s in parts by gloo
DISTRIBUTED_BACKEND = "gloo"

# Factories that Megatron calls with device="cuda" or pin_memory=True (training.py, schedules.py, clip_grads.py, ...).
FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "randperm", "empty_like", "zeros_like", "ones_like", "full_like"),
    *("rand_like", "randn_like", "empty_strided"),
)

# Transformer Engine and Apex with their extensions, whose kernels are CUDA's.
CUDA_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_layer_norm_cuda")
WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"  # Apex's too; see _hide_cuda_packages()

_installed = False


def current_device() -> torch.device:
    """The one CPU device."""
    import torch

    return torch.device("cpu")


def is_available() -> bool:
    """Always."""
    return True


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """Bytes of resident memory, at their peak."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def megatron_arguments(use_transformer_engine: bool) -> list[str]:
    """Local layers on gloo; the fusions left out are CUDA kernels."""
    del use_transformer_engine
    return [
        *("--transformer-impl", "local", "--distributed-backend", DISTRIBUTED_BACKEND),
        *("--no-rope-fusion", "--no-persist-layer-norm"),
        *("--no-masked-softmax-fusion", "--no-bias-gelu-fusion", "--no-bias-swiglu-fusion"),
        "--no-bias-dropout-fusion",
    ]


def optimizer_offload(fraction: float) -> list[str]:
    """There is none: the state is in host memory."""
    del fraction
    return []


def install() -> None:
    """Put the stand-ins in place.  Later calls do nothing.

    Raises:
        UserError: this torch lacks a symbol that is replaced here; the message names it.
    """
    global _installed
    if _installed:
        return
    # Compiling Megatron's small fused functions costs 18 s at the first iteration and gains nothing on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _hide_cuda_packages()
    _leave_out_compiler()
    _replace_cuda_module()
    _replace_factories()
    _replace_tensor_methods()
    _installed = True


def _hide_cuda_packages() -> None:
    """Let imports of these fail: Megatron takes their norms and optimizers where they import, CPU tensors or not.

    All but one, which is a single product: weight gradients are added to the gradient buffer without a temporary.
    """
    for package in CUDA_PACKAGES:
        sys.modules[package] = None  # clip_grads.py, optimizer/__init__.py: torch's own behind `except ImportError`
    extension = ModuleType(WEIGHT_GRADIENTS)
    extension.wgrad_gemm_accum_fp32 = extension.wgrad_gemm_accum_fp16 = _add_weight_gradient
    sys.modules[WEIGHT_GRADIENTS] = extension  # tensor_parallel/layers.py


def _add_weight_gradient(states: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [O, I] += gradient [T, O]^T states [T, I], as Apex's extension does it."""
    from megatron_patch.kernels import gradient_buffer

    gradient_buffer.add_product(main_grad, gradient.t(), states, gradient_buffer.begin(main_grad))


def _leave_out_compiler() -> None:
    """Have torch do without torch._dynamo, whose import takes more than a second, as nothing is compiled here.

    torch.compile gives back its function, and the functions that torch keeps out of compilation (torch/_compile.py:
    _disable_dynamo; it imports torch._dynamo at their first call) are called as they are.  Should one be missing here,
    or torch change, the import happens and nothing else.  To be removed when torch's optimizers import it no more.
    """
    import torch

    def compile_nothing(model: Callable | None = None, **options: object) -> Callable:
        return model if model is not None else lambda function: function

    _replace(torch, "compile", compile_nothing)  # core/jit.py decorates with it
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        function = getattr(torch.optim.Optimizer, name)
        inner = getattr(function, "__wrapped__", function)
        inner.__dynamo_disable = inner
    for kind in (torch.optim.Adam, torch.optim.SGD):  # AdamW is an Adam; step() begins and ends with a graph break
        kind.step = torch.no_grad()(getattr(kind.step, "__wrapped__", kind.step))


def _replace(owner: object, name: str, substitute: Callable) -> None:
    if not hasattr(owner, name):
        import torch

        raise UserError(
            f"torch {torch.__version__} has no {getattr(owner, '__name__', owner)}.{name}, which the CPU stand-ins "
            "replace; install a torch version named in requirements.txt"
        )
    setattr(owner, name, substitute)


class _Stream:
    """A stream that is always done: CPU work is synchronous."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, _: _Stream) -> None: ...

    def wait_event(self, _: _Event) -> None: ...

    def record_event(self, _: object = None) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...


class _Event(_Stream):
    def record(self, *_: object) -> None: ...

    def wait(self, *_: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: _Event) -> float:
        return 0.0


def _do_nothing() -> Callable:
    """A new one for each name: torch._dynamo, where something imports it, has a table by identity and no duplicates."""
    return lambda *_, **__: None


def _replace_cuda_module() -> None:
    import contextlib

    import torch

    cuda, cpu = torch.cuda, current_device()

    _replace(cuda, "current_device", lambda: cpu)  # core/timers.py and every device=torch.cuda.current_device()
    # initialize.py skips the model-parallel groups and the RNG tracker when the count is 0
    _replace(cuda, "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_stream"):
        _replace(cuda, name, _do_nothing())
    _replace(cuda, "Stream", _Stream)  # training.py: get_model builds DDP on a side stream
    _replace(cuda, "Event", _Event)
    _replace(cuda, "current_stream", lambda *_: _Stream())
    _replace(cuda, "stream", lambda *_: contextlib.nullcontext())
    # validate_args asks for the chip's generation when TP or CP > 1; 10 keeps CUDA_DEVICE_MAX_CONNECTIONS out of it
    _replace(cuda, "get_device_properties", lambda *_: SimpleNamespace(major=10, minor=0, total_memory=0, name="cpu"))
    _replace(cuda, "get_device_capability", lambda *_: (10, 0))
    _replace(cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state())  # tensor_parallel/random.py
    _replace(cuda.random, "get_rng_state", lambda *_, **__: torch.get_rng_state())
    _replace(cuda, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state))  # checkpointing.py
    # not torch.manual_seed, which calls torch.cuda.manual_seed again
    _replace(cuda, "manual_seed", lambda seed: torch.default_generator.manual_seed(int(seed)))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        _replace(cuda, name, lambda *_, **__: 0)
    _replace(cuda, "memory_stats", lambda *_, **__: {})
    _replace(cuda.nvtx, "range_push", _do_nothing())
    _replace(cuda.nvtx, "range_pop", _do_nothing())


def _is_cuda(device: object) -> bool:
    import torch

    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _replace_factories() -> None:
    import functools

    import torch
    import torch.utils._device

    cpu = current_device()
    # `with torch.device("meta")` recognises factories by identity, in a set that is built at its first use.  Built
    # after the wrapping it would hold the wrappers, the context would do nothing, and transformers would load models
    # with uninitialised rotary frequencies: wrong text, no error.  So it is built now.
    torch.utils._device._device_constructors()

    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def build(*args: object, **kwargs: object) -> torch.Tensor:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = cpu
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return build

    for name in FACTORIES:
        _replace(torch, name, on_cpu(getattr(torch, name)))


def _replace_tensor_methods() -> None:
    import torch

    cpu = current_device()
    original_type, original_to = torch.Tensor.type, torch.Tensor.to
    original_barrier = torch.distributed.barrier

    def type_name(self: torch.Tensor, dtype: object = None, *args: object, **kwargs: object) -> object:
        # the optimizers accept parameters by name: "torch.cuda.FloatTensor" (distrib_optimizer.py, clip_grads.py)
        if dtype is not None or args or kwargs:
            return original_type(self, dtype, *args, **kwargs)
        name = original_type(self)
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)

    def to(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (cpu, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = cpu
        return original_to(self, *args, **kwargs)

    def barrier(*args: object, **kwargs: object) -> object:
        kwargs.pop("device_ids", None)
        return original_barrier(*args, **kwargs)

    _replace(torch.Tensor, "type", type_name)
    _replace(torch.Tensor, "to", to)
    _replace(torch.Tensor, "cuda", lambda self, *_, **__: self)  # clip_vit_model.py, tensor_parallel/data.py
    _replace(torch.nn.Module, "cuda", lambda self, *_, **__: self)  # training.py: get_model
    _replace(torch.distributed, "barrier", barrier)
