"""Conversion room: Hugging Face folders <-> Megatron torch_dist checkpoints, tensor by tensor.

The listing is the architecture:
  transforms.py    how one Megatron tensor is made of hub tensors: a join, its exact inverse, the tensor-parallel axis
  table.py        the one table of weights: a row is (Megatron key, transform, hub names)
  hub_weights.py  hub files: dialects of names, reading by pread, writing shards
  torch_dist.py   distributed checkpoints: writing and reading without a model or a process group
  torch_ranks.py  Megatron's older format: one file per tensor-parallel and pipeline-parallel rank
  hub_files.py    config, tokenizer and processor (with usage_files.py what needs transformers, imported when called)
  output.py       free disk, staged folder, progress
  additions.py    what a user may add to the sources: tokens, a trained projector, rows of padding
  plan.py         the sources, read and checked: LLM and tower, hub LLaVA, original LLaVA
  convert.py      the two directions
  layouts.py      the layouts of an export, one row each
  usage_files.py  tokenizer, chat template and generation config of an export
  model_card.py   README.md of an export
  original_layout.py  folders of the original LLaVA code
  mm_projector.py     the projector alone, in a file
  stage0.py           LLM and tower to an untrained hub LLaVA, without Megatron

Nothing here imports Megatron; importing the package imports torch, safetensors and yaml only.
"""

from megatron_patch.conversion.convert import Report, convert_to_huggingface, convert_to_megatron

__all__ = ["Report", "convert_to_huggingface", "convert_to_megatron"]
