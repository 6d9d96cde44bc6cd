"""The commands that use a trained model: their options, and what of a call can be refused before a model is loaded.

Their programs in examples/llava_mcore read the same words with the same parser.
"""

import argparse
import ast
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.launch.rows import COMMON_OPTIONS, Program, default_python, python_path, quoted
from megatron_patch.launch.rules import BENCHMARK, REPOSITORY, TEMPLATE, TRACKER, checkpoint_problem, files_of
from megatron_patch.launch.tables import table

ENGINES = ("auto", "transformers", "megatron")
DTYPES = ("auto", "fp32", "bf16", "fp16")
METRICS = (
    *("exact_match", "word_match", "anls", "relaxed_accuracy", "vqa_accuracy", "multiple_choice"),
    *("multiple_choice_or_word", "pope", "mme", "bleu", "cider"),
)
CONFIG = "config.json"
REQUEST_MB = 32

CHAT = """Talk with a trained LLaVA in the terminal: a Megatron checkpoint, or an exported Hugging Face folder.

    bash chat_llava.sh DIR [IMAGE ...] [--temperature 0.7]

/image PATH   the next question is about this image too
/video PATH   and about this video, a file or a folder of frames (LLaVA-OneVision): 32 frames of it at most
/reset        begin a new conversation
/help         these words
/quit         the end; so does Ctrl-D

Ctrl-C stops an answer; what has been said of it stays.
"""
SERVE = """Serves a trained LLaVA: a Megatron checkpoint, or an exported Hugging Face folder.

    bash serve_llava.sh DIR [--port 8000]

http://127.0.0.1:8000/ is a page to drop an image on and ask; /v1/chat/completions and /v1/models answer as OpenAI's do,
with images as data: URLs and with `stream`.  There is no password: only this machine is served unless --host says more.
What a request leaves open, the options under `sampling` say.  Ctrl-C ends it.
"""
INFERENCE = """Answers questions about images with a trained LLaVA: a Megatron checkpoint, or an exported folder.

All prompts of a file:

    bash run_inference_llava.sh --model DIR --prompts P.jsonl --image-root IMAGES --output A.jsonl [--batch-size 8]

One prompt, the answer on standard output:

    bash run_inference_llava.sh --model DIR --image cat.jpg --prompt "What is this?"

Each line of P.jsonl is {"image": ..., "prompt": ...}, {"question_id": ..., "image": ..., "text": ...} or {"id": ...,
"images": [...], "conversations": [{"from": "human", "value": ...}]}; for a LLaVA-OneVision a "video" may stand there, a
file or a folder of frames.  Each line of A.jsonl belongs to the same line of P.jsonl: id, answer, finish_reason (stop
or length), prompt_tokens, completion_tokens; or id and error.  Lines that cannot be answered are counted and named on
stderr at the end.  Until all is answered the lines stand in A.jsonl.partial; the same command goes on there after an
interruption.  --part 1/4 answers the first quarter of the lines; the parts may run side by side on any GPUs or
machines, and --merge makes A.jsonl of them.  With --ray-address the nodes of a Ray cluster answer, each GPU with a
model of its own; any of them may die.

Exit code: 0 when every line is accounted for, those with an error too; 2 when the call is wrong.
"""
EVALUATE = """Asks a trained LLaVA the questions of a published benchmark and scores its answers.

    bash evaluate_llava.sh --model DIR --benchmark textvqa --data TextVQA --output results/textvqa

OUTPUT gets answers.jsonl, scored.jsonl, results.json, results.png (plot) and answers.png (contact sheet). The same
command again goes on where it stopped; when everything is answered it only scores, so --metric may change. --part 1/4
answers the first of four parts, which may run side by side on any GPUs or machines; --merge makes the results of them.
With --ray-address the nodes of a Ray cluster answer, each GPU with a model of its own; any of them may die.
The files are the same to the byte, whether a run was interrupted, shared out or neither.

Exit code: 0 when all is answered; 2 when the call or the data is wrong, and then nothing was created.
"""


# ---------------------------------------------------------------- options


def positive(text: str) -> int:
    """`2` -> 2; for argparse."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def part(text: str) -> tuple[int, int]:
    """`2/4` -> the second of four parts; for argparse."""
    number, _, count = text.partition("/")
    if not 1 <= int(number) <= int(count):
        raise ValueError(text)
    return int(number), int(count)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Which engine answers, and how it computes."""
    group = parser.add_argument_group("the engine")
    group.add_argument(
        "--engine", choices=ENGINES, default="auto", help="default: transformers for an exported folder, else megatron"
    )
    group.add_argument("--tensor-parallel", type=positive, default=1, metavar="N", help="of a Megatron checkpoint")
    group.add_argument("--pipeline-parallel", type=positive, default=1, metavar="N", help="of a Megatron checkpoint")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="default: fp32 on a CPU, else as the weights are stored"
    )
    group.add_argument(
        "--template", metavar="NAME", help="a conversation template or its file; default: as the model was trained"
    )


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    """Models on the nodes of a Ray cluster."""
    group = parser.add_argument_group("a Ray cluster that runs already")
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of its head: models are loaded on its nodes and share the work; auto: the cluster this machine is in",
    )
    group.add_argument(
        "--ray-workers",
        type=positive,
        metavar="N",
        help="models at a time; default: one for each GPU, in a cluster without any one for each node",
    )


def ray_problems(address: str | None, workers: int | None, is_shared: bool, shared: str) -> Iterator[str]:
    """Of the options above; is_shared: is the work shared out otherwise too, by the options `shared`?"""
    if address is None and workers is not None:
        yield f"--ray-workers {workers} has no meaning without --ray-address"
    if address is not None and is_shared:
        yield f"--ray-address {address} excludes {shared}, which need no cluster; give one or the other"


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer; default: 128")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the most likely token")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="share of the probability; default: 1")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")


def _model(parser: argparse.ArgumentParser, name: str = "model") -> None:
    required = {"required": True} if name.startswith("-") else {}
    parser.add_argument(name, type=Path, metavar="DIR", help="checkpoint or exported folder", **required)


def _chat(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="of the first question")


def _serve(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free; default: 8000")
    parser.add_argument("--name", help="of the model in requests; default: DIR's own")
    parser.add_argument(
        "--max-request-mb",
        type=positive,
        default=REQUEST_MB,
        metavar="MB",
        help=f"larger requests are refused; default: {REQUEST_MB}",
    )


def _inference(parser: argparse.ArgumentParser) -> None:
    _model(parser, "--model")
    many = parser.add_argument_group("a file of prompts")
    many.add_argument("--prompts", type=Path, metavar="JSONL", help="the prompts, one a line")
    many.add_argument("--image-root", type=Path, metavar="DIR", help="image names start here; default: beside JSONL")
    many.add_argument("--output", type=Path, metavar="JSONL", help="the answers, one a line; must not exist")
    many.add_argument("--batch-size", type=positive, default=8, metavar="N", help="prompts at once; default: 8")
    sharing = many.add_mutually_exclusive_group()
    sharing.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="answer part I of N")
    sharing.add_argument("--merge", action="store_true", help="JSONL of all parts, which have been answered")
    add_ray_options(parser)
    one = parser.add_argument_group("one prompt")
    one.add_argument("--prompt", metavar="TEXT", help="may hold <image> where an image stands")
    one.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be given again")
    one.add_argument(
        "--video",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a file, or a folder of frames; likewise",
    )


def _evaluate(parser: argparse.ArgumentParser) -> None:
    names = files_of("evaluation/benchmarks", ".py")
    parser.epilog = "Benchmarks, their metrics, and what their data is:\n\n" + "\n\n".join(map(_described, names))
    add = parser.add_argument
    _model(parser, "--model")
    add("--benchmark", required=True, metavar="NAME", help=f"one of {', '.join(names)}")
    add("--data", type=Path, required=True, metavar="PATH", help="its files as they were published; see below")
    add("--images", type=Path, metavar="DIR", help="its images, where they do not lie beside the data")
    add("--output", type=Path, required=True, metavar="DIR", help="where answers and results go")
    sharing = parser.add_mutually_exclusive_group()
    sharing.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="answer part I of N")
    sharing.add_argument("--merge", action="store_true", help="results of all parts, which have been answered")
    add("--batch-size", type=positive, default=8, metavar="N", help="questions at once; default: 8")
    add("--limit", type=positive, metavar="N", help="only the first N questions")
    add("--circular", action="store_true", help="ask with the choices in every rotation: MMBench's CircularEval")
    add("--swap-images", action="store_true", help="ask each about another one's image: right answers are chance then")
    add("--metric", metavar="NAME", help=f"in place of the benchmark's own: {', '.join(METRICS)}")
    add_ray_options(parser)


def _described(benchmark: str) -> str:
    """Metric and format, as the benchmark's file says them; nothing of it is run."""
    file = Path(REPOSITORY, "megatron_patch/evaluation/benchmarks", f"{benchmark}.py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    about = (ast.get_docstring(tree, clean=False) or "").strip()
    return f"{benchmark} ({values['METRIC']})\n  " + about.replace("\n", "\n  ")


# ---------------------------------------------------------------- rules


def sampling_problems(max_new_tokens: int, temperature: float, top_p: float) -> list[str]:
    """Values that mean nothing."""
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens is {max_new_tokens}, wanted at least 1")
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature is {temperature}, wanted 0 (most likely token) or a number above it")
    if not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p}, wanted a number above 0, at most 1")
    return problems


def kind_of(folder: Path) -> str | None:
    """`transformers` for an exported Hugging Face folder, `megatron` for a checkpoint; None: neither."""
    if (folder / TRACKER).is_file():
        return "megatron"
    return "transformers" if (folder / CONFIG).is_file() else None


def no_model(folder: Path) -> str:
    """What is said of a folder that is neither."""
    inside = folder / "checkpoint"
    hint = f"; did you mean {inside}?" if (inside / TRACKER).is_file() else ""
    return (
        f"{folder} is no model: wanted an exported Hugging Face folder (with {CONFIG}) or a Megatron checkpoint (with "
        f"{TRACKER}){hint}"
    )


def _engine_problems(arguments: argparse.Namespace) -> Iterator[str]:
    folder, processes = arguments.model, arguments.tensor_parallel * arguments.pipeline_parallel
    kind = kind_of(folder)
    if kind is None:
        yield no_model(folder)
    elif arguments.engine not in ("auto", kind):
        yield f"--engine {arguments.engine} does not read {folder}, which is for {kind}; leave it out"
    elif kind == "transformers" and processes > 1:
        yield alone(folder, arguments.tensor_parallel, arguments.pipeline_parallel)
    elif kind == "megatron" and (problem := checkpoint_problem(str(folder))):
        yield f"{folder} is no converted checkpoint: {problem}"
    if arguments.template is not None and (problem := TEMPLATE.problem(arguments.template)) is not None:
        yield f"--template {quoted(arguments.template)} must be {TEMPLATE.text}" + (f" ({problem})" if problem else "")


def alone(folder: Path, tensor: int, pipeline: int) -> str:
    """What is said of an exported folder in several processes."""
    return (
        f"{folder} is answered by transformers in one process, got tensor parallel {tensor} x pipeline parallel "
        f"{pipeline}; leave them out, or use a Megatron checkpoint"
    )


def _images(arguments: argparse.Namespace) -> Iterator[str]:
    for image in (*getattr(arguments, "images", ()), *getattr(arguments, "image", ())):
        if not image.is_file():
            yield f"{image}: no such image"
    for video in getattr(arguments, "video", ()):
        if not video.exists():
            yield f"{video}: no such video; wanted a file, or a folder of frames"


def _server_problems(arguments: argparse.Namespace) -> Iterator[str]:
    if not 0 <= arguments.port <= 65535:
        yield f"--port is {arguments.port}, wanted a whole number from 0 (any that is free) to 65535"


def _inference_problems(arguments: argparse.Namespace) -> Iterator[str]:
    if (arguments.prompts is None) == (arguments.prompt is None):
        yield "wanted --prompts with a file, or --prompt with a text, one of them; see --help"
    elif arguments.prompts is None:
        if arguments.output is not None or arguments.image_root is not None:
            yield "--output and --image-root belong to --prompts; one prompt's answer is printed"
        if arguments.merge or arguments.part != (1, 1):
            yield "--part and --merge belong to --prompts; a single prompt has no parts"
        if arguments.ray_address is not None:
            yield "--ray-address belongs to --prompts; a single prompt is answered here"
        yield from _images(arguments)
    elif arguments.output is None or arguments.image or arguments.video:
        yield "--prompts wants --output, and no --image or --video: they are named in the file; see --help"
    else:
        yield from job_problems(arguments.prompts, image_root(arguments), arguments.output)
    yield from _ray_problems(arguments)


def _ray_problems(arguments: argparse.Namespace) -> Iterator[str]:
    is_shared = arguments.merge or arguments.part != (1, 1)
    yield from ray_problems(arguments.ray_address, arguments.ray_workers, is_shared, "--part and --merge")
    processes = arguments.tensor_parallel * arguments.pipeline_parallel
    if arguments.ray_address is not None and processes > 1:
        yield (
            f"--ray-address {arguments.ray_address}: a model is in one process there, got tensor parallel "
            f"{arguments.tensor_parallel} x pipeline parallel {arguments.pipeline_parallel}; leave them out, or share "
            "the work with --part"
        )


def image_root(arguments: argparse.Namespace) -> Path:
    """Where the image names of a file of prompts start."""
    return arguments.image_root or arguments.prompts.absolute().parent


def job_problems(prompts: Path, images: Path, output: Path) -> Iterator[str]:
    """Files and folders of a file of prompts that are not as they must be."""
    if not prompts.is_file():
        yield f"{prompts}: no such file; wanted the prompts, one JSON object a line"
    if not images.is_dir():
        yield f"{images}: no such folder; wanted the one that the prompts' image names start from"
    if output.exists():
        yield f"{output} exists; name another file, or remove it"
    elif not output.absolute().parent.is_dir():
        yield f"{output.absolute().parent}: no such folder; make it, or name another file"


def _evaluation_problems(arguments: argparse.Namespace) -> Iterator[str]:
    if (problem := BENCHMARK.problem(arguments.benchmark)) is not None:
        known = problem.removeprefix("known: ").replace(" ", ", ")
        yield f"benchmark is {arguments.benchmark!r}; wanted one of {known}"
    if arguments.metric is not None and arguments.metric not in METRICS:
        yield f"metric is {arguments.metric!r}; wanted one of {', '.join(METRICS)}"
    if not arguments.data.exists():
        yield f"{arguments.data}: no such file or folder; wanted the benchmark's data"
    if arguments.images is not None and not arguments.images.is_dir():
        yield f"{arguments.images}: no such folder; wanted the benchmark's images"
    if arguments.output.exists() and not arguments.output.is_dir():
        yield f"{arguments.output}: exists and is not the folder of an evaluation; name another one"
    yield from _ray_problems(arguments)


# ---------------------------------------------------------------- the commands


@dataclass(frozen=True)
class AskingCommand:
    """A command with options of its own in place of positions."""

    name: str  # of its script and its program
    about: str
    add_options: Callable[[argparse.ArgumentParser], None]
    own_problems: Callable[[argparse.Namespace], Iterator[str]]

    def parser(self) -> argparse.ArgumentParser:
        """The parser of its words."""
        parser = argparse.ArgumentParser(
            prog=f"{self.name}.sh", description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_options(parser)
        add_sampling_options(parser)
        add_engine_options(parser)
        environment = table("From the environment: name, default, value", COMMON_OPTIONS)
        parser.epilog = "\n\n".join(filter(None, (parser.epilog, environment.strip("\n"))))
        return parser

    def environment_problems(self, environment: Mapping[str, str]) -> list[str]:
        """What is wrong with the options that come from the environment."""
        given = ((row, environment.get(row.name)) for row in COMMON_OPTIONS)
        return [
            f"environment {row.name}={quoted(value)} must be {row.rule.text}"
            for row, value in given
            if value and row.rule.problem(value) is not None
        ]

    def problems(self, arguments: argparse.Namespace) -> list[str]:
        """All that is wrong with a call, as far as its words and the names of files tell."""
        sampling = sampling_problems(arguments.max_new_tokens, arguments.temperature, arguments.top_p)
        return [*_engine_problems(arguments), *self.own_problems(arguments), *sampling]

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> Program:
        """The program of words that are right; refuses others, and prints its help, as argparse does."""
        problems = [*self.environment_problems(environment), *self.problems(self.parser().parse_args(words))]
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if problems:
            sys.exit(2)
        entry = f"{REPOSITORY}/examples/llava_mcore/{self.name}.py"
        python = environment.get("PYTHON") or default_python()
        return Program([python, "-u", entry, *words], {"PYTHONPATH": python_path(environment)})


COMMANDS = {
    "chat": AskingCommand("chat_llava", CHAT, _chat, _images),
    "serve": AskingCommand("serve_llava", SERVE, _serve, _server_problems),
    "inference": AskingCommand("run_inference_llava", INFERENCE, _inference, _inference_problems),
    "evaluate": AskingCommand("evaluate_llava", EVALUATE, _evaluate, _evaluation_problems),
}
