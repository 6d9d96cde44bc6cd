"""Questions -> answers on disk -> results.

The output folder holds

    run.json         what the answers were made with; another run in the same folder is refused
    answers.jsonl    one line per question, in the order of the questions; parts/2-of-4.jsonl for a part of them
    scored.jsonl     the same with references and scores
    results.json     the table

Questions are asked in batches that are a function of the questions and the batch size alone, and a batch's answers are
kept together or not at all.  So a run that was killed and started again, or shared out in parts, gives the same files.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from megatron_patch.atomic_files import write_text
from megatron_patch.errors import UserError
from megatron_patch.evaluation import SCORED
from megatron_patch.evaluation.metrics import Metric, Scores, Table
from megatron_patch.evaluation.question import Question
from megatron_patch.inference import Engine, Prompt, RequestError, Sampling
from megatron_patch.inference.ray_engines import BATCHES, checked
from megatron_patch.ray_cluster import RayActors

RUN, ANSWERS, RESULTS, PARTS = "run.json", "answers.jsonl", "results.json", "parts"
FAILED = "error"  # the finish_reason of a question that could not be asked; its answer is empty


@dataclass(frozen=True)
class Part:
    """The number-th of `count` shares of the batches, from 1."""

    number: int = 1
    count: int = 1

    @property
    def file(self) -> str:
        """Its answers, below the output folder."""
        return ANSWERS if self.count == 1 else f"{PARTS}/{self.number}-of-{self.count}.jsonl"

    def of(self, batches: Sequence[Sequence[Question]]) -> list[Sequence[Question]]:
        """Its batches: parts take turns."""
        return list(batches[self.number - 1 :: self.count])


def batches_of(questions: Sequence[Question], size: int) -> list[Sequence[Question]]:
    """The questions in their order, `size` at a time."""
    return [questions[start : start + size] for start in range(0, len(questions), size)]


def weights_of(model: Path) -> str:
    """Changes when a weight file of the folder is written anew: a digest of names, sizes and times."""
    files = sorted(path for pattern in ("*.safetensors", "*/*.distcp", "*.txt") for path in model.glob(pattern))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def check_folder(output: Path, settings: dict[str, Any]) -> None:
    """Raises UserError unless the folder is new, or holds a run with these settings."""
    file = output / RUN
    if not file.is_file():
        # another part may be writing run.json just now
        if output.exists() and not (output.is_dir() and all(path.name.startswith(RUN) for path in output.iterdir())):
            raise UserError(f"{output}: exists and is not the folder of an evaluation; name another one")
        return
    before, now = json.loads(file.read_text()), json.loads(json.dumps(settings))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changed = "; ".join(f"{name} was {before.get(name)!r}, is now {now.get(name)!r}" for name in names)
        raise UserError(f"{output}: began differently ({changed}); name another folder, or remove this one")


def begin(output: Path, settings: dict[str, Any]) -> None:
    """Note what the run is made with."""
    if not (output / RUN).is_file():
        write_text(output / RUN, json.dumps(settings, indent=2) + "\n")


Batches = Sequence[Sequence[Question]]
Told = list[dict[str, Any]]  # one line per question of a batch


def ask(engine: Engine, batches: Batches, file: Path, sampling: Sampling) -> None:
    """Answer what the file does not hold yet, batch by batch.

    Raises:
        UserError: it holds other answers, or another process writes it.
    """
    ask_by(lambda missing: answer_batches(engine, missing, sampling), batches, file)


def ask_by(answer: Callable[[Batches], Iterable[Told]], batches: Batches, file: Path) -> None:
    """As ask(); answer: batches -> the lines of each, in their order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as opened:
        _lock(opened, file)
        done = _keep_whole_batches(opened, batches, file)
        asked, total = sum(map(len, batches[:done])), sum(map(len, batches))
        with tqdm(total=total, initial=asked, unit=" questions", desc="asking", dynamic_ncols=True) as bar:
            for lines in answer(batches[done:]):
                opened.write(_json_lines(lines).encode("utf-8", "backslashreplace"))
                opened.flush()
                bar.update(len(lines))


def answer_batches(engine: Engine, batches: Batches, sampling: Sampling) -> Iterator[Told]:
    """The lines of each batch."""
    with ThreadPoolExecutor(1) as pool:
        coming: Future | None = None
        for number, batch in enumerate(batches):
            coming = coming or pool.submit(_prepare, engine, batch)
            prepared, coming = coming.result(), None
            if number + 1 < len(batches):  # its images are decoded while the model answers
                coming = pool.submit(_prepare, engine, batches[number + 1])
            yield _answer(engine, batch, prepared, sampling)


def answer_by(actors: RayActors, sampling: Sampling) -> Callable[[Batches], Iterator[Told]]:
    """As ask_by() takes it; the images of the questions are absolute."""

    def answer(batches: Batches) -> Iterator[Told]:
        pieces = (partial(_answer_piece, batches=piece, sampling=sampling) for piece in batched(batches, BATCHES))
        return itertools.chain.from_iterable(actors.in_order(pieces))

    return answer


def _answer_piece(engine: Engine, batches: Batches, sampling: Sampling) -> list[Told]:
    """On a node."""
    return [checked(lines) for lines in answer_batches(engine, batches, sampling)]


def _prepare(engine: Engine, batch: Sequence[Question]) -> list[Prompt | RequestError]:
    """Each question as the model sees it, or why it cannot be asked."""
    prepared: list[Prompt | RequestError] = []
    for question in batch:
        try:
            prepared.append(engine.prepare(question.request))
        except RequestError as error:
            prepared.append(error)
    return prepared


def _answer(
    engine: Engine, batch: Sequence[Question], prepared: Sequence[Prompt | RequestError], sampling: Sampling
) -> list[dict[str, Any]]:
    """One line per question.  One that cannot be asked is a line that says why, and the others are asked."""
    prompts = [prompt for prompt in prepared if isinstance(prompt, Prompt)]
    answers = iter(engine.answer(prompts, sampling))
    lines = []
    for question, prompt in zip(batch, prepared, strict=True):
        if isinstance(prompt, Prompt):
            answer = next(answers)
            told = {"answer": answer.text, "finish_reason": answer.finish_reason}
        else:
            told = {"answer": "", "finish_reason": FAILED, "error": str(prompt)}
        lines.append({"id": question.id, "prompt": question.prompt} | told)
    return lines


def is_complete(file: Path, batches: Sequence[Sequence[Question]]) -> bool:
    """Does the file hold as many answers as there are questions?"""
    return file.is_file() and len(list(_whole_lines(file.read_bytes()))) == sum(map(len, batches))


def read_answers(file: Path, batches: Sequence[Sequence[Question]]) -> list[dict[str, Any]]:
    """All answers of these batches.  Raises UserError: some are missing, or they answer other questions."""
    wanted = sum(map(len, batches))
    if not file.is_file():
        raise UserError(f"{file}: no such file; ask its questions first")
    lines = [line for line, _ in _whole_lines(file.read_bytes())]
    if len(lines) != wanted:
        raise UserError(f"{file}: holds {len(lines)} of {wanted} answers; give the command that wrote it again")
    _compare(lines, [question for batch in batches for question in batch], file)
    return lines


def merge(output: Path, questions: Sequence[Question], batch_size: int) -> list[dict[str, Any]]:
    """The answers of all parts in the order of the questions, written as one file.

    Raises:
        UserError: some are missing, or they answer other questions.
    """
    found = sorted((output / PARTS).glob("*-of-*.jsonl"))
    counts = {path.stem.rpartition("-")[2] for path in found}
    if len(counts) != 1:
        what = ", ".join(path.name for path in found) or "nothing"
        raise UserError(f"{output / PARTS}: holds {what}; wanted the answers of all parts of one number")
    count, batches = int(counts.pop()), batches_of(questions, batch_size)
    merged: list[list[dict[str, Any]]] = [[] for _ in batches]
    for number in range(1, count + 1):
        part = Part(number, count)
        mine = part.of(batches)
        answers = iter(read_answers(output / part.file, mine))
        for place, batch in zip(range(number - 1, len(batches), count), mine, strict=True):
            merged[place] = [next(answers) for _ in batch]
    lines = [line for batch in merged for line in batch]
    write_text(output / ANSWERS, _json_lines(lines))
    return lines


def score(
    output: Path,
    settings: dict[str, Any],
    questions: Sequence[Question],
    answers: Sequence[dict[str, Any]],
    metric: tuple[str, Metric],
    left_out: dict[str, int],
) -> tuple[Table, Scores]:
    """Judge the answers, write scored.jsonl and results.json."""
    name, judge = metric
    scores, table = judge(questions, [line["answer"] for line in answers])
    rows = [
        line
        | {"task": question.task, "references": list(question.references)}
        | ({} if scores is None else {"score": scores[number]})
        for number, (question, line) in enumerate(zip(questions, answers, strict=True))
    ]
    write_text(output / SCORED, _json_lines(rows))
    results = settings | {
        "metric": name,
        "questions": len(questions),
        "left_out": left_out,
        "failed": sum(line["finish_reason"] == FAILED for line in answers),
        "cut_off": sum(line["finish_reason"] == "length" for line in answers),
        "scores": table,
    }
    write_text(output / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return table, scores


def settings_of(sampling: Sampling, **named: Any) -> dict[str, Any]:
    """What run.json holds."""
    return named | {"sampling": dataclasses.asdict(sampling)}


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _lock(opened: BinaryIO, file: Path) -> None:
    """Until this process ends, no other one writes the file."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    raise UserError(f"{file}: another process is writing it; wait for it, or name another part")


def _keep_whole_batches(opened: BinaryIO, batches: Sequence[Sequence[Question]], file: Path) -> int:
    """Cut off what a kill left of a batch; the number of batches that are whole."""
    opened.seek(0)
    lines = list(_whole_lines(opened.read()))
    _compare([line for line, _ in lines], [question for batch in batches for question in batch], file)
    done = kept = 0
    for batch in batches:
        if kept + len(batch) > len(lines):
            break
        kept += len(batch)
        done += 1
    opened.truncate(lines[kept - 1][1] if kept else 0)  # and what is written goes to the end
    return done


def _whole_lines(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Lines that are whole, each with the place where it ends; from the first other one on nothing counts."""
    place = 0
    for text in content.split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            return
        place += len(text) + 1
        yield line, place


def _compare(lines: Sequence[dict[str, Any]], questions: Sequence[Question], file: Path) -> None:
    """Raises UserError unless the lines answer the first of these questions."""
    if len(lines) > len(questions):
        raise UserError(f"{file}: holds {len(lines)} answers to {len(questions)} questions; name another folder")
    for number, (line, question) in enumerate(zip(lines, questions, strict=False), 1):
        if (line.get("id"), line.get("prompt")) != (question.id, question.prompt):
            raise UserError(
                f"{file}, line {number}: answers {line.get('id')!r}, wanted {question.id!r} with its prompt; the data "
                "has changed since: name another folder"
            )
