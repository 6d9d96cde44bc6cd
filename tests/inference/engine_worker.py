"""One process of a Megatron engine; started by torchrun, one process per TP x PP rank.

PLAN.json: {"tensor": TP, "pipeline": PP, "result": FILE.json, "uncached": bool,
            "cases": [{"model": CKPT, "sampling": {...}, "batches": [[{"id", "turns": [[q, a]], "images": [FILE]}]]}]}
The result: for each case its batches' answers as dicts, the pieces in which the first request is streamed, what an
early end of that stream left behind (the next answer), and, where asked for, the greedy ids without a cache.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch.data.conversation import Exchange
from megatron_patch.inference import Request, Sampling, open_engine


def request_of(value: dict) -> Request:
    """As the plan spells it."""
    turns = tuple(Exchange(*turn) for turn in value["turns"])
    return Request(value["id"], turns, tuple(Path(image) for image in value["images"]))


def without_cache(engine, request: Request, count: int) -> list[int]:
    """The most likely tokens, every one from a forward pass over all before it, by training's own forward."""
    import torch

    prompt = engine.prepare(request)
    ids = prompt.tokens.tolist()
    with torch.no_grad():
        for _ in range(count):
            logits = engine._part._model(tokens=torch.tensor([ids]), pixels=torch.from_numpy(prompt.pixels))
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt.tokens) :]


def outcome(engine, case: dict, uncached: bool) -> dict:
    sampling = Sampling(**case["sampling"])
    batches = [[request_of(value) for value in batch] for batch in case["batches"]]
    answers = [engine.answer(batch, sampling) for batch in batches]
    pieces = list(engine.stream(batches[0][0], sampling))
    begun = engine.stream(batches[0][0], sampling)
    next(begun)
    begun.close()
    return {
        "answers": [[dataclasses.asdict(answer) for answer in batch] for batch in answers],
        "pieces": pieces,
        "after": dataclasses.asdict(engine.answer(batches[0][:1], sampling)[0]),
        "uncached": [without_cache(engine, request, 20) for request in batches[0]] if uncached else None,
    }


def main() -> None:
    """Run the plan."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    outcomes = []
    for case in plan["cases"]:
        try:
            template = case.get("template", "mistral")
            with open_engine(Path(case["model"]), "auto", "auto", template, plan["tensor"], plan["pipeline"]) as engine:
                outcomes.append(outcome(engine, case, plan["uncached"]))
        except SystemExit:  # not rank 0, and the engine is closed there
            continue
    if outcomes:
        Path(plan["result"]).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
