"""Evaluation room: published benchmarks, asked of a trained LLaVA and scored.

question.py     one question, its prompt and what is right
source.py       the files of a benchmark, read with errors that name file and record
benchmarks/     one file per benchmark: its format -> questions; the name of its metric
metrics/        answers -> numbers, pure functions; the table of metrics
run.py          questions -> answers on disk, to be resumed and shared out -> results
report.py       results for people: table, plot, contact sheet of some questions
"""

SCORED = "scored.jsonl"  # in the folder of a run: each question with its answer and score; here it needs no import
