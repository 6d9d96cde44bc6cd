"""transformers' class of the LLaVA (LlavaForConditionalGeneration for 1.5) answers, given training's tokens and pixels.

Not through the folder's processor: it knows no tiles, and centre-crops for models that were trained on padded images.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_patch import device
from megatron_patch.errors import UserError
from megatron_patch.inference.generation import BatchEngine, all_pixels, all_plans, left_padded
from megatron_patch.inference.interface import Prompt
from megatron_patch.inference.prompt import PromptEncoder
from megatron_patch.llava_folder import ANY_RESOLUTION, LlavaFolder


class TransformersEngine(BatchEngine):
    """An exported Hugging Face folder.

    Args:
        dtype: of the weights; None: as they are stored.
        template: in place of the one that the model was trained with.
    Raises:
        UserError: the folder is none, or lacks weights.
    """

    name = "transformers"

    def __init__(self, path: Path, dtype: torch.dtype | None = None, template: str | None = None) -> None:
        # Imported here: it takes seconds, also for those who use the other engine.
        import transformers
        from transformers.utils import logging

        folder = LlavaFolder(path)
        super().__init__(PromptEncoder(folder, template))
        geometry = folder.geometry()
        if geometry.any_resolution is not None and folder.settings.image_aspect_ratio != ANY_RESOLUTION:
            raise UserError(
                f"{path} is a {geometry.model_type} trained with IMAGE_ASPECT_RATIO="
                f"{folder.settings.image_aspect_ratio}, and transformers shows it every image in tiles; ask its "
                "Megatron checkpoint"
            )
        self._rule = geometry.any_resolution
        statistics = folder.image_processing(geometry.tower.side_px)
        logging.disable_progress_bar()
        try:
            self._model, report = getattr(transformers, geometry.kind.architecture).from_pretrained(
                path, dtype=dtype or "auto", output_loading_info=True, local_files_only=True
            )
        except Exception as error:  # whatever transformers makes of strange files
            raise UserError(f"{path} cannot be loaded by transformers: {error}") from error
        if report["missing_keys"]:
            raise UserError(f"{path} lacks weights of a LLaVA: {', '.join(sorted(report['missing_keys'])[:4])}")
        here = device.current_device()
        self._model = self._model.to(here).eval()
        self._mean, self._std = (
            255 * torch.tensor(statistics[name], device=here).view(1, 3, 1, 1) for name in ("image_mean", "image_std")
        )

    def _start(self, prompts: Sequence[Prompt], most_new: int) -> "_Session":
        del most_new  # its cache grows
        here = self._model.device
        tokens, real = left_padded(prompts, self._encoder.pad_token_id)
        pixels = all_pixels(prompts).to(here)
        images: dict[str, Any] = {}
        if len(pixels):
            images["pixel_values"] = ((pixels.float() - self._mean) / self._std).to(self._model.dtype)
        if images and self._rule is not None:
            images = self._of_any_resolution(images["pixel_values"], prompts)
        return _Session(self._model, tokens.to(here), real.to(here), images)

    def _of_any_resolution(self, tiles: Tensor, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """tiles [N, 3, side, side] of images and frames of videos -> what transformers wants.

        Of M images pixel_values [M, most tiles, 3, side, side] padded with zeros, image_sizes [M, 2], and where it asks
        for them the images of each prompt; where there are videos, the features of both.
        """
        plans = all_plans(prompts)
        parts = tiles.split(plans[:, 0].tolist())
        is_video = ((plans[:, 2] == 0) & (plans[:, 6] > 0)).tolist()
        images = {}
        if found := [part for part, video in zip(parts, is_video, strict=True) if not video]:
            sizes = [size for prompt in prompts for size in prompt.image_sizes]
            images["pixel_values"] = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
            images["image_sizes"] = torch.tensor(sizes).to(tiles.device)
            if self._rule.several_plain:
                counts = [len(prompt.image_sizes) for prompt in prompts if prompt.image_sizes]
                images["batch_num_images"] = torch.tensor(counts, device=tiles.device)
        videos = [part for part, video in zip(parts, is_video, strict=True) if video]
        return self._with_videos(images, videos) if videos else images

    @torch.inference_mode()
    def _with_videos(self, images: dict[str, Tensor], videos: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments for images, and frames [F, 3, side, side] of each video -> the features of both.

        Its forward takes videos of one length alone, and features beside no pixels.
        """
        made = [self._model.get_video_features(frames[None]).pooler_output[0] for frames in videos]
        features = {"video": SimpleNamespace(pooler_output=torch.cat(made)[None])}
        if images:
            features["image"] = self._model.get_image_features(**images)
        return {"mm_encoder_outputs": features}


class _Session:
    """One batch; tokens int64 [B, S], real bool [B, S]."""

    def __init__(self, model: Any, tokens: Tensor, real: Tensor, images: dict[str, Any]) -> None:
        self._model, self._real, self._cache = model, real, None
        positions = (real.cumsum(1) - 1).clamp(min=0)
        self._position = positions[:, -1:]  # of the last token
        self.logits = self._forward(tokens, positions, images)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """As Session says."""
        self._position = self._position + 1
        self._real = torch.cat([self._real, torch.ones_like(self._real[:, :1])], 1)
        return self._forward(torch.tensor(tokens, device=self._real.device)[:, None], self._position, {})

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, positions: Tensor, images: dict[str, Any]) -> Tensor:
        output = self._model(
            input_ids=tokens,
            attention_mask=self._real.long(),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **images,
        )
        self._cache = output.past_key_values
        return output.logits[:, -1].float()

    def close(self) -> None:
        """As Session says."""
        self._cache = None
