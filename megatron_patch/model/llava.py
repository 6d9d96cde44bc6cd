"""LLaVA: tower -> projector -> scatter into the embedded text -> decoder -> loss at labelled positions.

Letters of shapes are explained in the package's docstring.  Stage 0 of a pipeline owns tower and projector.
"""

import contextlib
import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_patch import device
from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry, TowerGeometry
from megatron_patch.lora import ADAPTERS, PARTS, LoraConfig
from megatron_patch.model.adapters import Adapters
from megatron_patch.model.attention import packed_zigzag_positions, zigzag_positions
from megatron_patch.model.fully_sharded import local_part, of_this_rank
from megatron_patch.model.key_value_cache import KeyValueCache
from megatron_patch.model.last_layer import LastLayer, can_narrow, chosen, labelled_positions
from megatron_patch.model.layer_specs import (
    decoder_block,
    norm_builder,
    projector_layers,
    tower_block,
)
from megatron_patch.model.linear import multiply_alone
from megatron_patch.model.loss import head_losses, sum_and_number
from megatron_patch.step_flop import Frozen
from megatron_patch.tile_plan import TILES_AT_ONCE
from megatron_patch.weight_names import NORM_KEYS_AS_TRANSFORMER_ENGINE, check_nothing_differs, differences


def quick_gelu(states: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the activation of OpenAI's CLIP."""
    return states * torch.sigmoid(1.702 * states)


def gelu_tanh(states: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(states, approximate="tanh")


TOWER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
}

TOWER_RECOMPUTE: dict[str, dict[str, object]] = {
    "false": {},
    "sel": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}

# What the tower and the projector take over from the decoder's config.  Everything else (widths, heads, norms, biases,
# pipeline split) is their own: a tower that inherits the decoder's width or pipeline split is silently wrong.
# So is the lack of fp8: its kernels want multiples of 16 rows, and CLIP has 577 for each image.
SHARED_WITH_DECODER = (
    *("tensor_model_parallel_size", "params_dtype", "fp16", "bf16", "transformer_impl", "attention_backend"),
    *("attention_softmax_in_fp32", "perform_initialization", "use_cpu_initialization", "deterministic_mode"),
    *("gradient_accumulation_fusion", "persist_layer_norm", "masked_softmax_fusion", "timers"),
)


def _side_config(decoder: TransformerConfig, **own: object) -> TransformerConfig:
    shared = {name: getattr(decoder, name) for name in SHARED_WITH_DECODER}
    return TransformerConfig(
        **shared,
        **own,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gated_linear_unit=False,
        add_bias_linear=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        calculate_per_token_loss=decoder.calculate_per_token_loss,
    )


def tower_config(decoder: TransformerConfig, tower: TowerGeometry, recompute: str | None = None) -> TransformerConfig:
    """Config of the vision tower: its own numbers, the decoder's parameter type and tensor parallelism.

    Args:
        recompute: `false`, `sel` (attention) or `full` (each layer); None: as the decoder.

    Raises:
        UserError: an activation that is not known.
    """
    if tower.activation not in TOWER_ACTIVATIONS:
        raise UserError(
            f"vision_config.hidden_act is {tower.activation!r}, this toolkit knows {', '.join(TOWER_ACTIVATIONS)}; "
            "choose a tower of that kind"
        )
    return _side_config(
        decoder,
        num_layers=tower.running_layers,
        hidden_size=tower.hidden,
        ffn_hidden_size=tower.ffn_hidden,
        num_attention_heads=tower.heads,
        normalization="LayerNorm",
        layernorm_epsilon=tower.norm_epsilon,
        activation_func=TOWER_ACTIVATIONS[tower.activation],
        **(
            {
                "recompute_granularity": decoder.recompute_granularity,
                "recompute_modules": decoder.recompute_modules,
                "recompute_method": decoder.recompute_method,
                "recompute_num_layers": min(decoder.recompute_num_layers or 0, tower.running_layers) or None,
            }
            if recompute is None
            else TOWER_RECOMPUTE[recompute]
        ),
    )


def projector_config(decoder: TransformerConfig) -> TransformerConfig:
    """Config of the projector: every width is the decoder's hidden size, exact GELU, biases."""
    return _side_config(
        decoder,
        num_layers=1,
        hidden_size=decoder.hidden_size,
        ffn_hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        activation_func=F.gelu,
    )


def build_tower(config: TransformerConfig, tower: TowerGeometry, pg_collection: ProcessGroupCollection) -> CLIPViTModel:
    """The vision tower; `config` is that of tower_config()."""
    whole_patches_px = tower.side_px // tower.patch_px * tower.patch_px  # pixels beyond never reach a patch
    return CLIPViTModel(
        config,
        tower_block(config),
        ln_pre_impl=norm_builder(config),
        ln_post_impl=IdentityOp,  # the features are taken before the final norm
        add_class_token=tower.kind.class_token,
        class_token_len=int(tower.kind.class_token),
        patch_dim=tower.patch_px,
        img_h=whole_patches_px,
        img_w=whole_patches_px,
        model_subtype=tower.kind.megatron_subtype,
        pg_collection=pg_collection,
    )


def of_pixels(statistic: tuple[float, float, float]) -> Tensor:
    """Mean or deviation [3] of pixels in 0..1 -> [1, 3, 1, 1], of uint8 pixels.

    No buffer of the model: Megatron casts those to half precision too, and the mean would be half a grey level off.
    """
    return torch.tensor(statistic, device=device.current_device()).view(1, 3, 1, 1) * 255


def tower_features(
    vision_model: CLIPViTModel, tower: TowerGeometry, pixels: Tensor, pixel_mean: Tensor, pixel_std: Tensor
) -> Tensor:
    """pixels uint8 [N, 3, side, side] -> what the projector is given [N, P, tower.hidden]; of_pixels() of both."""
    normalised = (pixels.float() - pixel_mean) / pixel_std
    features = vision_model(normalised.to(vision_model.conv1.weight.dtype))
    return features[:, 1:] if tower.first_token_dropped else features


def own_name(name: str, own: Container[str]) -> str:
    """The name that `own` uses for a weight which layers of the other kind call `name`; `name` when there is none."""
    for local, engine in NORM_KEYS_AS_TRANSFORMER_ENGINE.items():
        for old, new in ((local, engine), (engine, local)):
            if name not in own and name.replace(old, new) in own:
                return name.replace(old, new)
    return name


def weight_shapes(state: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a state's weights; extra states are none, even where they are tensors."""
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if isinstance(value, Tensor) and not name.endswith("_extra_state")
    }


class ImageNewline(MegatronModule):
    """The learnt token that ends a row of an image's features, the same on every rank: one weight [H]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        here = "cpu" if config.use_cpu_initialization else device.current_device()
        drawn = torch.empty(config.hidden_size, dtype=config.params_dtype, device=here)
        if config.perform_initialization:
            drawn.normal_(std=config.hidden_size**-0.5)
        self.weight = torch.nn.Parameter(drawn)


def arrange(images: Tensor, plans: Sequence[Sequence[int]], newline: Tensor, patches: int) -> Tensor:
    """Features of tiles -> features in the order of their placeholders, as transformers' pack_image_features, and
    for videos apply_pooling.

    Args:
        images: [N, P * P, H], the tiles of all images, each image's base tile before those of its grid, and the frames
            of all videos.
        plans: tile_plan.TilePlan.numbers of each image and video.
        newline: [H].
        patches: P.

    Returns:
        [T, H].
    """
    width = images.shape[-1]
    newline = newline.to(images.dtype)
    found, first = [], 0
    for tiles, newlines, rows, columns, top, left, *shown in plans:
        own, first = images[first : first + tiles], first + tiles
        if not rows and any(shown):  # a video
            own = own.view(tiles, patches, patches, width).permute(0, 3, 1, 2)
            own = F.interpolate(own, shown, mode="bilinear").permute(0, 2, 3, 1)
        if not rows:
            found += [own.reshape(-1, width), newline.expand(newlines, width)]
            continue
        grid = own[1:].view(rows, columns, patches, patches, width).transpose(1, 2)
        grid = grid.reshape(rows * patches, columns * patches, width)
        grid = grid[top : rows * patches - top, left : columns * patches - left]
        if list(grid.shape[:2]) != shown:
            grid = F.interpolate(grid.permute(2, 0, 1)[None], shown, mode="bilinear")[0].permute(1, 2, 0)
        grid = torch.cat([grid, newline.expand(shown[0], 1, width)], dim=1)
        found += [own[0], grid.reshape(-1, width)]
    assert first == images.shape[0], f"{images.shape[0]} tiles, plans of {first}"
    return torch.cat(found)


class LlavaModel(MegatronModule):
    """The part of a LLaVA that lives on one pipeline stage.

    Args:
        config: the decoder's config; arguments of the parser, numbers of the Hugging Face config.
        geometry: all numbers of the model.
        padded_vocabulary: rows of the embedding, at least the geometry's; the rows beyond get no probability.
        pixel_mean, pixel_std: [3], of pixels in 0..1.
        frozen: the parts without gradients, and the low-rank adapters beside their weights.
        pre_process, post_process: this is the pipeline's first, last stage.
        pg_collection: process groups; None takes Megatron's global ones.
        vp_stage: virtual pipeline stage, of an interleaved schedule.
        tower_recompute: as in tower_config().
        seed: of the adapters' first weights.
        tower_for_text: a frozen tower runs for text alone, too: where its weights are shared out, every rank must ask
            for them in every pass.
    """

    def __init__(
        self,
        config: TransformerConfig,
        geometry: LlavaGeometry,
        padded_vocabulary: int,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
        frozen: Frozen | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        tower_recompute: str | None = None,
        seed: int = 0,
        tower_for_text: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.tower_for_text = tower_for_text
        self.geometry, self.frozen = geometry, frozen or Frozen()
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        language = geometry.language

        self.language_model = GPTModel(
            config=config,
            transformer_layer_spec=decoder_block(config, vp_stage),
            vocab_size=padded_vocabulary,
            max_sequence_length=language.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=language.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=language.rope_base,
            rope_scaling=language.rope_factor is not None,
            rope_scaling_factor=language.rope_factor or 1.0,
            scatter_embedding_sequence_parallel=False,  # images are scattered in first
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        self.share_embeddings_and_output_weights = language.tied_embeddings
        self._last_layer: LastLayer | None = None
        if post_process and can_narrow(config):
            self._last_layer = LastLayer(self.language_model.decoder.layers[-1])
        if post_process:
            # the hidden states are gathered before positions are chosen, so the head never sees a cut sequence
            self.language_model.output_layer.sequence_parallel = False

        self.vision_model = self.vision_projection = self.image_newline = None
        if pre_process:
            self._build_tower_and_projector(config, tower_recompute)
            self.pixel_mean, self.pixel_std = of_pixels(pixel_mean), of_pixels(pixel_std)
        self._freeze()
        self.adapters: Adapters | None = None
        if self.frozen.lora is not None:
            self._attach_adapters(self.frozen.lora, seed)

    def _build_tower_and_projector(self, config: TransformerConfig, tower_recompute: str | None) -> None:
        tower = self.geometry.tower
        vision_config = tower_config(config, tower, tower_recompute)
        self.vision_model = build_tower(vision_config, tower, self.pg_collection)
        side_config = projector_config(config)
        self.vision_projection = MultimodalProjector(
            side_config,
            projector_layers(side_config, self.geometry.projector_type),
            "mlp" if self.geometry.projector_type == "mlp2x_gelu" else "affine",
            input_size=tower.hidden,
            pg_collection=self.pg_collection,
        )
        if self.geometry.any_resolution is not None:
            self.image_newline = ImageNewline(config)

    def _freeze(self) -> None:
        for module, freeze in (
            (self.language_model, self.frozen.language_model),
            (self.image_newline, self.frozen.language_model),  # as the original code does
            (self.vision_model, self.frozen.vision_tower),
            (self.vision_projection, self.frozen.projector),
        ):
            if module is not None and freeze:
                module.requires_grad_(False)
                multiply_alone(module, trained=False)

    def _attach_adapters(self, lora: LoraConfig, seed: int) -> None:
        adapters = Adapters(lora, self.geometry, self.pg_collection.tp)
        for part in lora.parts:
            module = getattr(self, PARTS[part])
            if module is None:  # of the first stage
                continue
            if part == "projector":
                adapters.attach(part, 0, module.encoder, module.encoder.config)
                continue
            for layer in module.decoder.layers:
                adapters.attach(part, layer.layer_number - 1, layer, module.config)
        if self.config.perform_initialization:
            adapters.reset(seed)
        self.adapters = adapters

    @property
    def _tower_learns(self) -> bool:
        """Do pixels need a gradient's way through the tower?"""
        adapted = self.adapters is not None and PARTS["vision_tower"] in self.adapters
        return adapted or not self.frozen.vision_tower

    def adapter_names(self) -> set[str]:
        """Names of the adapters' weights."""
        return {name for name, _ in self.named_parameters() if name.startswith(f"{ADAPTERS}.")}

    def _trained_names(self) -> set[str]:
        return {name for name, weight in self.named_parameters() if weight.requires_grad}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """What a checkpoint of this model holds: everything, or with adapters only what is trained."""
        state = of_this_rank(super().sharded_state_dict(prefix, sharded_offsets, metadata))
        if self.adapters is None:
            return state
        trained = {f"{prefix}{name}" for name in self._trained_names()}
        return {name: value for name, value in state.items() if name in trained}

    def base_sharded_state_dict(self, metadata: dict[str, Any] | None = None) -> ShardedStateDict:
        """All but the adapters, trained or not: what the checkpoint that training begins with holds."""
        state = of_this_rank(super().sharded_state_dict(metadata=metadata))
        return {name: value for name, value in state.items() if not name.startswith(f"{ADAPTERS}.")}

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states [S, B, H] from the previous pipeline stage."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied embedding, for Megatron's reduction of its gradient between first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def load_state_dict(self, state_dict: Mapping[str, object], strict: bool = True, assign: bool = False):
        """Load weights by the names of either kind of layer, every one of them, and let extra states be.

        Files of Megatron's format `torch` name a norm after the layers that wrote them, with or without Transformer
        Engine.  `_extra_state` alone may be missing or left over.  Weights may not, whatever `strict` says: Megatron
        answers a failed strict load with a silent one that is not.  With adapters either the base's weights are given,
        or, and then adapters are among them, those that are trained.

        Raises:
            UserError: weights are missing, unknown or of another shape.
        """
        own = {name: local_part(value) for name, value in self.state_dict().items()}
        given = {own_name(name, own): value for name, value in state_dict.items()}
        wanted = weight_shapes(own)
        if self.adapters is not None:
            names = own.keys() - self.adapter_names()
            if not names.issuperset(given):
                names = self._trained_names()
            wanted = {name: shape for name, shape in wanted.items() if name in names}
        lists = differences(weight_shapes(given), wanted, "the model has")
        check_nothing_differs("the checkpoint's weights are not this model's", lists)
        if any(isinstance(weight, DTensor) for weight in self.parameters()):
            with torch.no_grad():
                for name in wanted:
                    own[name].copy_(given[name])
            return None
        given = {name: given.get(name, value) for name, value in own.items()}
        return super().load_state_dict(given, strict=strict, assign=assign)

    def forward(
        self,
        tokens: Tensor | None,
        labels: Tensor | None = None,
        pixels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        features: Tensor | None = None,
        logits_at: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        plans: Tensor | None = None,
    ) -> Tensor:
        """One micro-batch.

        Args:
            tokens: int64 [B, S], placeholders of images and videos already expanded to one per feature; first stage
                only.
            labels: int64 [B, S], the token to predict at each position or IGNORE_LABEL; last stage only.
            pixels: uint8 [N, 3, side, side] in the order of their placeholders, a video's frames one behind the other;
                N may be 0; first stage only.
            cu_seqlens: int32 [records + 1], when the batch is a single row of packed records: where each begins, then
                the row's end.  No record attends to another, positions start anew in each.  On every stage.
            features: [N, P, tower.hidden], what the tower makes of the pixels, in place of them.
            logits_at: int64 [B], without labels: of each row the one position of this context-parallel rank's part of
                which logits are wanted.
            plans: int64 [M, PLAN_FIELDS], on the CPU: tile_plan.TilePlan.numbers of the M images and videos whose tiles
                and frames the N are, of a model that sees images at any resolution; first stage only.
            prompt_lengths: int64 [B]: where an answer of the model's own begins, in which an image token is no image.

        Returns:
            Before the last stage: hidden states [S, B, H].  On the last stage with labels: [2], the sum of the losses
            in nats over the labelled positions of this context-parallel rank, and their number.  Without labels:
            logits [B, S, V], with logits_at [B, V].
        """
        decoder_input = None
        if self.pre_process:
            decoder_input = self._embed(tokens, pixels, features, cu_seqlens, prompt_lengths, plans)
        if labels is not None:
            labels = self._on_this_context_rank(labels, cu_seqlens)
        return self._decode(decoder_input, labels, cu_seqlens, logits_at)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels uint8 [N, 3, side, side] -> [N, P, tower.hidden], for forward(); first stage only."""
        # An image may be 37 tiles for few tokens: without gradients the tower's memory does not follow from that.
        whole = self.geometry.any_resolution is None or torch.is_grad_enabled() or len(pixels) <= TILES_AT_ONCE
        statistics = (self.pixel_mean, self.pixel_std)
        if whole:
            return tower_features(self.vision_model, self.geometry.tower, pixels, *statistics)
        parts = pixels.split(TILES_AT_ONCE)
        return torch.cat([tower_features(self.vision_model, self.geometry.tower, part, *statistics) for part in parts])

    def next_logits(
        self, tokens: Tensor, pixels: Tensor | None, cache: KeyValueCache, plans: Tensor | None = None
    ) -> Tensor:
        """More tokens of a batch whose earlier ones are in the cache; the local layers only, without gradients.

        Args:
            tokens: int64 [B, S]: the prompts at first, then one token of each row; read by the first stage only.
            pixels: uint8 [N, 3, side, side] of the prompts; first stage only.
            plans: of the prompts, as in forward().

        Returns:
            Before the last stage: hidden states [S, B, H].  On the last stage: logits [B, V] behind the last token.
        """
        decoder, count = self.language_model.decoder, tokens.shape[1]
        angles = self.language_model.rotary_pos_emb(cache.most_tokens)[:, 0]  # [L, 1, d]
        for layer in decoder.layers:
            layer.self_attention.core_attention.cache = cache
        try:
            hidden_states = decoder(
                hidden_states=self._embed(tokens, pixels, None, None, plans=plans) if self.pre_process else None,
                attention_mask=None,
                rotary_pos_emb=angles[cache.begin(count)],  # [S, B, 1, d]
            )
        finally:
            for layer in decoder.layers:
                layer.self_attention.core_attention.cache = None
        cache.end(count)
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self._logits(hidden_states[-1:], self.language_model.output_layer, weight)[:, 0]

    def _decode(
        self, decoder_input: Tensor | None, labels: Tensor | None, cu_seqlens: Tensor | None, logits_at: Tensor | None
    ) -> Tensor:
        """This stage's layers and, on the last one, what forward() returns; labels of this context-parallel rank."""
        behind, narrowed = functools.partial(self._logits, logits_at=logits_at), contextlib.nullcontext()
        if labels is not None:
            places, targets, count = labelled_positions(labels)
            if self._last_layer is not None:
                narrowed = self._last_layer.at(places)
            behind = functools.partial(self._loss, places=places, targets=targets, count=count)
        with narrowed:
            return self.language_model(
                input_ids=None,
                position_ids=None,
                attention_mask=None,  # causal; padding stands at the end, where no real token looks
                decoder_input=decoder_input,
                packed_seq_params=None if cu_seqlens is None else self._packed_seq_params(cu_seqlens),
                output_processor=behind,
            )

    def _packed_seq_params(self, cu_seqlens: Tensor) -> PackedSeqParams:
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            cp_group=self.pg_collection.cp,
        )

    def _embed(
        self,
        tokens: Tensor,
        pixels: Tensor | None,
        features: Tensor | None,
        cu_seqlens: Tensor | None,
        prompt_lengths: Tensor | None = None,
        plans: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, S] and pixels or features -> decoder input [S, B, H], this rank's part of the sequence."""
        text = self.language_model.embedding(input_ids=tokens, position_ids=None).transpose(0, 1)  # [B, S, H]
        given = pixels if features is None else features
        text_alone = given is None or given.shape[0] == 0
        embedded = text
        if not text_alone or torch.is_grad_enabled() or self.tower_for_text:
            # [N, P, H]; of text alone [1, P, H]
            images = self.vision_projection(self._features(pixels) if features is None or text_alone else features)
            if self.image_newline is not None:
                images = self._arranged(images, plans, text_alone)
            if text_alone:
                # The projector still takes part, with weight 0, so that every rank reduces its gradient.
                embedded = text + 0.0 * images.sum().to(text.dtype)
            else:
                is_image = tokens == self.geometry.image_token_id
                if self.geometry.video_token_id is not None:
                    is_image |= tokens == self.geometry.video_token_id
                if prompt_lengths is not None:
                    is_image &= torch.arange(tokens.shape[1], device=tokens.device) < prompt_lengths[:, None]
                embedded = text.masked_scatter(is_image.unsqueeze(-1), images.to(text.dtype))
        embedded = self._on_this_context_rank(embedded, cu_seqlens).transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            embedded = scatter_to_sequence_parallel_region(embedded, group=self.pg_collection.tp)
        if self.adapters is not None and torch.is_grad_enabled() and not embedded.requires_grad:
            # recomputed layers hand gradients to their weights only when their input asks for one
            embedded.requires_grad_()
        return embedded

    def _arranged(self, images: Tensor, plans: Tensor | None, text_alone: bool) -> Tensor:
        """Projected features [N, P * P, H] of tiles -> [T, H] in the order of their placeholders, newlines among them.

        plans: as in forward(); not looked at for text alone.
        """
        newline = self.image_newline.weight
        if not text_alone:
            assert plans is not None, "tiles without plans: which of their features stand where?"
            images = arrange(images, plans.tolist(), newline, self.geometry.any_resolution.patches)
        # It takes part in every micro-batch, so that every rank reduces its gradient.
        return images + 0.0 * newline.sum().to(images.dtype)

    def _features(self, pixels: Tensor | None) -> Tensor:
        """pixels uint8 [N, 3, side, side] -> features [N, P, tower.hidden]; without images those of a blank one."""
        tower, weight = self.geometry.tower, self.vision_model.conv1.weight
        if pixels is None or pixels.shape[0] == 0:
            if not self._tower_learns and not self.tower_for_text:
                return weight.new_zeros(1, tower.image_tokens, tower.hidden)
            pixels = torch.zeros(1, 3, tower.side_px, tower.side_px, dtype=torch.uint8, device=weight.device)
        with contextlib.nullcontext() if self._tower_learns else torch.no_grad():
            return self.image_features(pixels)

    def _on_this_context_rank(self, states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """States [B, S, ...] -> [B, S / CP, ...], this rank's positions."""
        size = self.config.context_parallel_size
        if size == 1:
            return states
        rank = self.pg_collection.cp.rank()
        if cu_seqlens is None:
            mine = zigzag_positions(states.shape[1] // size, rank, size, states.device)
        else:
            mine = packed_zigzag_positions(cu_seqlens, rank, size)
        return states.index_select(1, mine)

    def _whole(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [S / TP or S, B, H] -> [S, B, H]."""
        if not self.config.sequence_parallel:
            return hidden_states
        return gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
        )

    def _logits(
        self,
        hidden_states: Tensor,
        output_layer: torch.nn.Module,
        output_weight: Tensor | None,
        logits_at: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """hidden_states [S, B, H] -> logits [B, S, V]; with logits_at [B] those [B, V] of one position of each row."""
        hidden_states = self._whole(hidden_states).transpose(0, 1)  # [B, S, H]
        if logits_at is not None:
            hidden_states = hidden_states[torch.arange(len(logits_at), device=logits_at.device), logits_at]
        logits, _ = output_layer(hidden_states, weight=output_weight)
        logits = gather_from_tensor_model_parallel_region(logits, group=self.pg_collection.tp)
        return logits[..., : self.geometry.language.vocabulary]

    def _loss(
        self,
        hidden_states: Tensor,
        output_layer: torch.nn.Module,
        output_weight: Tensor | None,
        places: Tensor,
        targets: Tensor,
        count: int,
        **_: object,
    ) -> Tensor:
        """hidden_states [S, B, H], or where the last layer is narrowed [L, 1, H] -> [2], the sum of losses and `count`.

        Only labelled positions meet the head: with 576 image tokens and 40 of text it would otherwise work 15 times
        as much, and hold [B, S, V] logits.

        Args:
            places, targets, count: as labelled_positions() returns them.
        """
        if self._last_layer is None:
            hidden_states = chosen(self._whole(hidden_states), places)
        weight = output_layer.weight if output_weight is None else output_weight
        losses = head_losses(
            hidden_states[:, 0], weight, targets, self.geometry.language.vocabulary, self.pg_collection.tp
        )
        return sum_and_number(losses, count)
