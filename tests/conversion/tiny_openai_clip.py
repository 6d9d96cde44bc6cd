"""A tiny CLIP with the structure and the names of OpenAI's, traced into a TorchScript archive as they publish it.

Source of the structure: github.com/openai/CLIP, clip/model.py.
"""

import copy
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.tiny_models import randomize

WIDTH, HEADS, LAYERS, SIDE_PX, PATCH_PX = 128, 2, 3, 28, 7  # heads are WIDTH / 64, as in all of OpenAI's


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, width * 4)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(width * 4, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks one after the other."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """Pixels [B, 3, side, side] -> [B, 32]."""

    def __init__(self) -> None:
        super().__init__()
        positions = (SIDE_PX // PATCH_PX) ** 2 + 1
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH_PX, PATCH_PX, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(positions, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = Transformer(WIDTH, LAYERS, HEADS)
        self.ln_post = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.zeros(WIDTH, 32))

    def hidden(self, pixels: Tensor, layers: int) -> Tensor:
        """[B, positions, WIDTH] behind so many layers."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x).transpose(0, 1)
        for block in list(self.transformer.resblocks)[:layers]:
            x = block(x)
        return x.transpose(0, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.ln_post(self.hidden(pixels, LAYERS)[:, 0]) @ self.proj


class Clip(nn.Module):
    """Image and text tower."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = VisionTransformer()
        self.transformer = Transformer(64, 1, 1)
        self.token_embedding = nn.Embedding(50, 64)
        self.positional_embedding = nn.Parameter(torch.zeros(8, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.zeros(64, 32))
        self.logit_scale = nn.Parameter(torch.ones([]))
        for name, value in {"input_resolution": SIDE_PX, "context_length": 8, "vocab_size": 50}.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding
        x = self.ln_final(self.transformer(x.transpose(0, 1)).transpose(0, 1))
        x = x[torch.arange(len(x)), text.argmax(dim=-1)] @ self.text_projection
        return self.logit_scale.exp() * self.visual(pixels) @ x.t()


def make_tiny_openai_clip(path: Path, seed: int = 3) -> Clip:
    """Write the archive in fp16 but for the norms, whose weights OpenAI keeps in fp32; returns the model in fp32."""
    model = Clip().eval()
    randomize(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())  # numbers that fp16 holds
    example = (torch.rand(1, 3, SIDE_PX, SIDE_PX), torch.randint(0, 50, (1, 8)))
    with warnings.catch_warnings():  # that shapes become constants, and that TorchScript is no longer developed
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(copy.deepcopy(model), example)
    for name, parameter in traced.named_parameters():
        if "ln_" not in name:
            parameter.data = parameter.data.half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced.save(str(path))
    return model
