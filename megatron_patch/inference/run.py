"""All prompts of a file, answered into a file: resumable, in order, a line for each line.

While it runs the lines stand in OUTPUT.partial, and what they were made with in OUTPUT.partial.settings; OUTPUT is
there once it is whole.  The same call again goes on behind the last whole line.

A part of several answers its share of the lines into OUTPUT.part-2-of-3, what they were made with beside it; merged,
they become OUTPUT.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from megatron_patch.atomic_files import atomic_file, write_text
from megatron_patch.errors import UserError
from megatron_patch.inference.interface import Answer, Engine, Prompt, RequestError, Sampling
from megatron_patch.inference.prompt_file import Line, count_lines, read_lines, texts_of
from megatron_patch.launch.asking import job_problems

TOLD = 10  # lines without an answer that are named at the end

Told = dict[str, str | int]  # a line of the output


@dataclass(frozen=True)
class Job:
    """What is asked, and where the answers go."""

    prompts: Path
    image_root: Path
    output: Path
    sampling: Sampling
    batch_size: int
    model: dict[str, str]  # whatever else the answers depend on, compared when the job goes on
    part: tuple[int, int] = (1, 1)  # the number-th of so many shares of the lines, from 1

    @property
    def target(self) -> Path:
        """The file it writes: the output, or beside it that of a part."""
        number, count = self.part
        return self.output if count == 1 else self.output.with_name(f"{self.output.name}.part-{number}-of-{count}")

    @property
    def partial(self) -> Path:
        """The file while it is not whole."""
        return self.target.with_name(f"{self.target.name}.partial")

    @property
    def settings(self) -> Path:
        """What its lines were made with; kept with a part until it is merged."""
        return self.target.with_name(f"{self.target.name}.partial.settings")

    def lines(self) -> range:
        """Its lines of the prompts, from 0."""
        number, count = self.part
        total = count_lines(self.prompts)
        return range(total * (number - 1) // count, total * number // count)

    def parts(self) -> list["Job"]:
        """Those that have begun, of whatever count."""
        names = re.compile(re.escape(self.output.name) + r"\.part-(\d+)-of-(\d+)(\.partial.*)?")
        found = (names.fullmatch(path.name) for path in self.output.absolute().parent.iterdir())
        parts = {(int(name[1]), int(name[2])) for name in found if name}
        return [replace(self, part=part) for part in sorted(parts)]


@dataclass(frozen=True)
class Summary:
    """What came of a job, the lines of earlier calls too."""

    lines: int
    errors: list[str]  # `line 4 (its id): why`


def check_job(job: Job) -> None:
    """Before the model is loaded.

    Raises:
        UserError: a file or folder is missing, OUTPUT exists, or a partial one was made with something else.
    """
    if job.batch_size < 1:
        raise UserError(f"batch size is {job.batch_size}, wanted at least 1")
    _check_files(job)
    count_lines(job.prompts)
    counts = sorted({part.part[1] for part in job.parts()} - {job.part[1]})
    if counts:
        raise UserError(
            f"{job.output}: was begun in {counts[0]} parts; give --part I/{counts[0]}, --merge when all are answered, "
            f"or remove {job.output.name}.part-*"
        )
    whole = replace(job, part=(1, 1)).partial
    if job.part[1] > 1 and whole.exists():
        raise UserError(f"{whole}: was begun without --part; go on with it so, or remove it")
    if job.partial.exists() or job.target.exists():
        _check_settings(job)


def _check_files(job: Job) -> None:
    for problem in job_problems(job.prompts, job.image_root, job.output):
        raise UserError(problem)


def run(job: Job, engine: Engine) -> Summary:
    """Answer what is not answered yet; job has passed check_job."""

    def answer(texts: Iterable[bytes], first: int) -> Iterator[list[Told]]:
        return answer_lines(engine, texts, first, job.image_root, job.sampling, job.batch_size)

    return run_by(answer, job)


def run_by(answer: Callable[[Iterable[bytes], int], Iterable[list[Told]]], job: Job) -> Summary:
    """As run(); answer: lines as they stand in the file, and the number of the first (from 0) -> for all of them in
    their order, some at a time, what stands in the output.
    """
    lines = job.lines()
    if job.target.exists():  # a part that was done before
        return _read_summary(job.target, lines)
    if not job.partial.exists():
        write_text(job.settings, json.dumps(_settings(job), indent=2) + "\n")
    done, errors = _whole_lines(job.partial, lines.start)
    with (
        open(job.partial, "ab") as output,
        tqdm(total=len(lines), initial=done, desc="prompts", unit="prompt", dynamic_ncols=True) as progress,
    ):
        first = lines.start + done
        for told in answer(texts_of(job.prompts, range(first, lines.stop)), first):
            for record in told:
                done += 1
                if "error" in record:
                    errors.append(f"line {lines.start + done} ({record['id']}): {record['error']}")
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in told)
            output.write(text.encode("utf-8", "backslashreplace"))
            output.flush()
            progress.update(len(told))
            progress.set_postfix(errors=len(errors), refresh=False)
        os.fsync(output.fileno())
    os.replace(job.partial, job.target)
    if job.part[1] == 1:
        job.settings.unlink()
    return Summary(done, errors)


def answer_lines(
    engine: Engine, texts: Iterable[bytes], first: int, image_root: Path, sampling: Sampling, batch_size: int
) -> Iterator[list[Told]]:
    """What stands in the output for lines of which the first is number `first` (from 0), a batch at a time."""
    coming = read_lines(texts, image_root, first)
    for batch in _batches(_prepared(coming, engine, 2 * batch_size), batch_size):
        prompts = [prompt for _, prompt in batch if isinstance(prompt, Prompt)]
        answers = iter(engine.answer(prompts, sampling))
        yield [
            _answered(line, next(answers)) if isinstance(prompt, Prompt) else {"id": line.id, "error": prompt}
            for line, prompt in batch
        ]


def merge(job: Job) -> Summary:
    """The answers of all parts become the output, in the order of the prompts.

    Raises:
        UserError: a part is missing, not whole, or was made with something else.
    """
    _check_files(job)
    there = job.parts()
    counts = sorted({part.part[1] for part in there})
    if len(counts) != 1:
        what = ", ".join(part.target.name for part in there) or "nothing"
        raise UserError(
            f"{job.output}: wanted beside it the parts of one number, got {what}; give --part 1/N to N/N first"
        )
    parts = [replace(job, part=(number, counts[0])) for number in range(1, counts[0] + 1)]
    missing = [f"{part.part[0]}/{part.part[1]}" for part in parts if not part.target.is_file()]
    if missing:
        raise UserError(f"{job.output}: part {', '.join(missing)} is not answered; give its command, then --merge")
    summaries = []
    for part in parts:
        _check_settings(part)
        summary = _read_summary(part.target, part.lines())
        if summary.lines != len(part.lines()):
            raise UserError(
                f"{part.target}: holds {summary.lines} lines, wanted {len(part.lines())}; remove it and answer it again"
            )
        summaries.append(summary)
    with atomic_file(job.output, durable=True, replace=False) as beside, open(beside, "wb") as output:
        for part in parts:
            with open(part.target, "rb") as answers:
                shutil.copyfileobj(answers, output)
    for part in parts:
        part.target.unlink()
        part.settings.unlink()
    errors = [error for summary in summaries for error in summary.errors]
    return Summary(sum(summary.lines for summary in summaries), errors)


def _read_summary(file: Path, lines: range) -> Summary:
    """Of a file that is whole; lines: those of the prompts that it answers."""
    with open(file, "rb") as opened:
        told = [json.loads(line) for line in opened]
    numbered = enumerate(told, lines.start + 1)
    return Summary(len(told), [f"line {n} ({one['id']}): {one['error']}" for n, one in numbered if "error" in one])


def _answered(line: Line, answer: Answer) -> Told:
    return {
        "id": line.id,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }


def _settings(job: Job) -> dict[str, object]:
    """What the answers depend on; the size of a batch is not among it."""
    return {
        "prompts_sha256": hashlib.sha256(job.prompts.read_bytes()).hexdigest(),
        "image_root": str(job.image_root.absolute()),
        **asdict(job.sampling),
        **job.model,
    }


def _check_settings(job: Job) -> None:
    try:
        before = json.loads(job.settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{job.partial} exists without {job.settings.name}; remove it to begin anew") from None
    now = _settings(job)
    different = [
        f"{name} {before.get(name)!r}, now {value!r}" for name, value in now.items() if before.get(name) != value
    ]
    if different:
        raise UserError(
            f"{job.partial} was begun with other settings ({'; '.join(different)}); call it with those, name another "
            "output, or remove it to begin anew"
        )


def _whole_lines(partial: Path, first: int) -> tuple[int, list[str]]:
    """How many lines are answered, from number `first` (from 0) on, and the errors among them; what a kill left of
    another line is cut off.
    """
    count, end, errors = 0, 0, []
    if not partial.exists():
        return 0, []
    with open(partial, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            count, end, told = count + 1, end + len(line), json.loads(line)
            if "error" in told:
                errors.append(f"line {first + count} ({told['id']}): {told['error']}")
        file.truncate(end)
    return count, errors


def _prepared(lines: Iterable[Line], engine: Engine, ahead: int) -> Iterator[tuple[Line, Prompt | str]]:
    """Each line with its prompt, or why it has none; so many are prepared by a thread while the model answers."""

    def prepare(line: Line) -> tuple[Line, Prompt | str]:
        if line.request is None:
            return line, str(line.error)
        try:
            return line, engine.prepare(line.request)
        except RequestError as error:
            return line, str(error).removeprefix(f"{line.id}: ")

    with ThreadPoolExecutor(1) as pool:
        waiting = []
        for line in lines:
            waiting.append(pool.submit(prepare, line))
            if len(waiting) > ahead:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _batches(lines: Iterable[tuple[Line, Prompt | str]], size: int) -> Iterator[list[tuple[Line, Prompt | str]]]:
    """Lines in order, so many prompts together; lines without one go along with the prompts before them."""
    batch, prompts = [], 0
    for line in lines:
        is_prompt = isinstance(line[1], Prompt)
        if prompts == size and is_prompt:
            yield batch
            batch, prompts = [], 0
        batch.append(line)
        prompts += is_prompt
    if batch:
        yield batch
