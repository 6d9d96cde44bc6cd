"""The trained model in use: questions about images in, answers out.

interface.py            Request, Sampling, Answer and what an Engine does
prompt.py               requests -> the tokens and pixels that training would have made of them
generation.py           tokens chosen one after the other, in batches and streams: what the engines share
transformers_engine.py  an exported Hugging Face folder, by transformers
megatron_engine.py      a Megatron checkpoint, in one process or many
prompt_file.py          lines of a file -> requests
run.py                  all prompts of a file, answered into a file, resumable
engine.py               open_engine: the engine that fits a folder

    with open_engine(Path("llava-7b-hf")) as engine:
        request = Request("1", (Exchange("<image>\\nWhat is this?", None),), (Path("cat.jpg"),))
        (answer,) = engine.answer([request], Sampling(max_new_tokens=64))
"""

from megatron_patch.inference.engine import open_engine
from megatron_patch.inference.interface import Answer, Engine, Prompt, Request, RequestError, Sampling

__all__ = ["Answer", "Engine", "Prompt", "Request", "RequestError", "Sampling", "open_engine"]
