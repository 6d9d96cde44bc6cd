"""Faults of one line that the tests must notice, room by room; tests/run_mutants.py puts them in, one at a time.

Each row is (what it breaks, text of the line, text in its place).  The text stands exactly once in the file: when the
code moves, the row moves with it (tests/test_mutants.py).  The tests named are the quickest that notice.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault.  tests: pytest's names of those of which one must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def of(file: str, tests: str | tuple[str, ...], *faults: tuple[str, str, str]) -> list[Mutant]:
    """Faults of one file that the same tests notice."""
    names = (tests,) if isinstance(tests, str) else tests
    return [Mutant(name, file, old, new, names) for name, old, new in faults]


LLAVA = "megatron_patch/model/llava.py"
ATTENTION = "megatron_patch/model/attention.py"
LOSS, OF_LOSS = "megatron_patch/model/loss.py", "tests/model/test_loss.py"
OF_LAST_LAYER = "tests/model/test_last_layer.py"
OF_ZEROS = "tests/patches/test_gradients_without_zeros.py"
OF_CPU_ATTENTION = "tests/model/test_attention.py::test_torchs_attention_is_for_longer_records"
OF_PACKED_ATTENTION = "tests/model/test_attention.py::test_packed_records_are_attended_each_by_itself"
OF_LINEAR = "tests/model/test_linear.py"
OF_KERNELS = "tests/kernels/test_kernels.py"
OF_SELF_ATTENTION = "tests/model/test_self_attention.py"
ELEMENTWISE, OF_ELEMENTWISE = "megatron_patch/model/elementwise.py", "tests/model/test_elementwise.py"
OF_RECOMPUTATION = "tests/model/test_recomputation.py"
OF_SPIKES = "tests/training/test_loss_spikes.py"
CONFIG = "megatron_patch/training/config.py"
SETTINGS = "megatron_patch/llava_folder.py"
LOADER, SAMPLER = "megatron_patch/data/loading/loader.py", "megatron_patch/data/loading/sampler.py"
COUNTERS, OF_WAITING = "megatron_patch/training/record_counters.py", "tests/training/test_waiting.py"
PACKING, ROW_CACHE = "megatron_patch/data/loading/packing.py", "megatron_patch/data/loading/row_cache.py"
LENGTHS, OF_LENGTHS = "megatron_patch/data/loading/lengths.py", "tests/data/loading/test_lengths.py"
OF_PACKING, OF_SAMPLER = "tests/data/loading/test_packing.py", "tests/data/loading/test_sampler.py"
ENCODER, COLLATOR = "megatron_patch/data/loading/task_encoder.py", "megatron_patch/data/loading/collator.py"
CONVERSATION, IMAGE = "megatron_patch/data/conversation.py", "megatron_patch/data/image.py"
CHAT, OF_CHAT = "megatron_patch/data/chat_template.py", "tests/data/test_chat_template.py"
USAGE, OF_EXPORTS = "megatron_patch/conversion/usage_files.py", "tests/conversion/test_exports.py"
PIPELINE = "megatron_patch/data/preparation/pipeline.py"
DEVICE_CPU, OF_CPU = "megatron_patch/device/cpu.py", "tests/device/test_cpu.py"
RETENTION = "megatron_patch/training/checkpoint_retention.py"
CALLBACKS = "megatron_patch/training/callbacks.py"
GENERATION, OF_SCORES = "megatron_patch/training/generation.py", "tests/training/test_benchmark_scores.py"
ROWS, RULES = "megatron_patch/launch/rows.py", "megatron_patch/launch/training_rules.py"
OF_PLAN = "tests/launchers/test_plan.py"
TRAINING, OF_ARGUMENTS = "megatron_patch/launch/training.py", "tests/launchers/test_arguments.py"

PARITY = "tests/model/test_parity.py::test_logits_loss_and_gradients_equal_transformers"
ONE_PROCESS, CP2, TP2_SP = (f"{PARITY}[{run}]" for run in ("one process, mistral", "CP2, llama", "TP2+SP, llama"))
FREEZING = "tests/training/test_freezing.py::test_frozen_weights_keep_their_bytes_and_the_others_move"
EFFECTS = "tests/training/test_option_effects.py"
STILL = "tests/training/test_sample_generation.py"
SAME_RECORDS, GREEDY = (
    f"{STILL}::test_every_validation_sees_the_first_records",
    f"{STILL}::test_answers_are_transformers_greedy_ones",
)
FIRST_STEP = f"{EFFECTS}::test_the_first_step_of_the_optimizer"
RECOMPUTED = f"{EFFECTS}::test_what_is_recomputed"
SIGLIP = f"{EFFECTS}::test_siglip_squeezes_where_clip_crops"
MAX_SKIPPED = f"{EFFECTS}::test_max_skipped_is_the_share_of_records_that_may_be_bad"
OF_LOADER = "tests/data/loading/test_loader.py"
STEP_TIME, OF_STEP_TIME = "megatron_patch/step_time.py", "tests/test_step_time.py"
OF_BALANCE = "tests/data/loading/test_balance.py"
OF_BATCH = f"{OF_LOADER}::test_shapes_and_types_of_a_batch"
EXACT = f"{OF_LOADER}::test_resume_is_exact"
OF_PIPELINE = "tests/data/preparation/test_pipeline.py"
WORKSPACE, RAY_WORKERS = (f"megatron_patch/data/preparation/{name}.py" for name in ("workspace", "ray_workers"))
RAY_CLUSTER, OF_ACTORS = "megatron_patch/ray_cluster.py", "tests/test_ray_actors.py"
OF_PARTS, OF_RAY = "tests/data/preparation/test_parts.py", "tests/data/preparation/test_ray.py"
OF_RETENTION = "tests/training/test_checkpoint_retention.py"
GOLDEN = "tests/data/test_golden.py::test_text_ids_and_labels_are_golden"
OF_COMMANDS = "tests/launchers/test_commands.py"
OF_CONFIG = "tests/training/test_config.py"
INFERENCE, OF_INFERENCE = "megatron_patch/inference", "tests/inference"
OF_RUN, OF_SERVER = f"{OF_INFERENCE}/test_run.py", f"{OF_INFERENCE}/test_server.py"
OF_REQUESTS = f"{OF_INFERENCE}/test_prompt.py"
CACHED_KEYS = f"{OF_INFERENCE}/test_megatron_engine.py::test_one_process"
OF_PATCHES = "tests/patches/test_patches.py"
OF_ASYNC_SAVES = "tests/patches/test_async_saves.py"
OF_LOADS = "tests/patches/test_loaded_in_place.py"
OF_ENGINE = "tests/transformer_engine/test_training.py"
OF_IMAGE = "tests/data/test_image.py"
OF_METRICS, OF_READERS = "tests/evaluation/test_metrics.py", "tests/evaluation/test_benchmarks.py"
OF_EVALUATION = "tests/evaluation/test_run.py"
WORDS = "tests/launchers/test_megatron_arguments.py"
CACHED = "tests/training/test_feature_cache.py"
FEATURES, OF_FEATURES = "megatron_patch/data/loading/feature_cache.py", "megatron_patch/training/feature_cache.py"


def effect(row: str) -> str:
    """The test of a row of the table of options."""
    return f"{EFFECTS}::test_an_option_changes_the_data[{row}]"


MODEL = [
    *of(
        LLAVA,
        "tests/model/test_configs.py::test_tower_and_projector_stay_out_of_fp8",
        (
            "the tower's 577 rows get to fp8 kernels",
            '("tensor_model_parallel_size", "pa',
            '("fp8", "tensor_model_parallel_size", "pa',
        ),
    ),
    *of(
        LLAVA,
        f"{FREEZING}[stage 1]",
        (
            "stage 1 trains the language model",
            "(self.language_model, self.frozen.language_model)",
            "(self.language_model, False)",
        ),
        ("a frozen tower decays", "(self.vision_model, self.frozen.vision_tower)", "(self.vision_model, False)"),
    ),
    *of(
        LLAVA,
        f"{FREEZING}[the tower alone]",
        (
            "a frozen projector learns",
            "(self.vision_projection, self.frozen.projector)",
            "(self.vision_projection, False)",
        ),
        (
            "a trained tower gets no gradient",
            "with contextlib.nullcontext() if self._tower_learns else",
            "with contextlib.nullcontext() if False else",
        ),
    ),
    *of(
        LLAVA,
        ONE_PROCESS,
        ("the class token instead of the last patch", "return features[:, 1:] if", "return features[:, :-1] if"),
        (
            "pixels are not divided by their deviation",
            "- pixel_mean) / pixel_std",
            "- pixel_mean) / 255",
        ),
        (
            "the embedding of text gets no gradient",
            "text.masked_scatter(is_image",
            "text.detach().masked_scatter(is_image",
        ),
        (
            "the tower's features get no gradient",
            "return self.image_features(pixels)",
            "return self.image_features(pixels).detach()",
        ),
        ("the last layer is whole", "if post_process and can_narrow(config):", "if False:"),
        ("the last layer is told of no positions", "narrowed = self._last_layer.at(places)", "pass"),
        ("another GELU in the tower", "states * torch.sigmoid(1.702 * states)", "states * torch.sigmoid(1.6 * states)"),
        ("the tower's own norm epsilon is ignored", "layernorm_epsilon=tower.norm_epsilon", "layernorm_epsilon=1e-2"),
    ),
    *of(
        LOSS,
        OF_LOSS,
        ("padding of the vocabulary takes probability", "found[:, real:] = 0", "pass"),
        (
            "padding takes probability where logits are computed again",
            "weight), ctx.real,",
            "weight), weight.shape[0],",
        ),
        (
            "the label's own logit moves nothing",
            "of_hidden[part] = multiplied.addcmul_(weight[columns[part]], minus.to(weight.dtype))",
            "of_hidden[part] = multiplied",
        ),
        (
            "the label's row of the head moves nothing",
            "of_weight.index_add_(0, columns[part], (hidden[part] * minus).to(of_weight.dtype))",
            "pass",
        ),
        ("a tied head does not add to the gradient buffer", "        return buffer\n", "        pass\n"),
    ),
    *of(
        LOSS,
        ONE_PROCESS,
        ("the loss is a mean of labels", "losses.sum() * (count > 0)", "losses.mean() * (count > 0)"),
    ),
    *of(
        LOSS,
        OF_LAST_LAYER,
        ("a position without a label is trained", "losses.sum() * (count > 0)", "losses.sum()"),
    ),
    *of(
        "megatron_patch/model/last_layer.py",
        OF_LAST_LAYER,
        (
            "positions of a record lie together",
            "return position * labels.shape[0] + record,",
            "return record * labels.shape[1] + position,",
        ),
        ("a target may be no token", "labels[record, position].clamp(min=0)", "labels[record, position]"),
        ("a rank without labels has no backward pass", "    if count == 0:", "    if False:"),
        ("parts of records are narrowed", "whole = not config.sequence_parallel and", "whole ="),
        ("recomputed layers are narrowed", ' and config.recompute_granularity != "full"', ""),
        (
            "kernels of fp8 get any number of rows",
            "not (config.fp8 or config.cpu_offloading)",
            "not config.cpu_offloading",
        ),
        ("offloaded layers are narrowed", "not (config.fp8 or config.cpu_offloading)", "not config.fp8"),
        ("a layer stays narrow", "            self._places = None", "            pass"),
        ("the context stays whole", "return inputs if self._places is None else", "return inputs if True else"),
        ("the residual stays whole", "own = residual if self._places is None else", "own = residual if True else"),
    ),
    *of(
        LOSS,
        TP2_SP,
        ("ranks take their own largest logit", "all_reduce(top, ReduceOp.MAX, group=group)", "pass"),
        ("ranks sum their own part of the vocabulary", "all_reduce(sums, group=group)", "pass"),
        (
            "the gradient of the hidden states is one rank's",
            "hidden = copy_to_tensor_model_parallel_region(hidden, group=group)",
            "pass",
        ),
    ),
    *of(
        ELEMENTWISE,
        f"{OF_ELEMENTWISE}::test_norm_is_torchs",
        ("the norm's gradient has another scale", "along.mul_(scale.pow(3))", "along.mul_(scale.pow(2))"),
        ("the norm's weight learns of unscaled rows", ".t(), scales)", ".t(), torch.ones_like(scales))"),
    ),
    *of(
        ELEMENTWISE,
        f"{OF_ELEMENTWISE}::test_swiglu_is_torchs_and_keeps_its_input_alone",
        (
            "the gate's gradient forgets what it gates",
            "silu_backward.grad_input(gradient * up",
            "silu_backward.grad_input(gradient",
        ),
    ),
    *of(
        ELEMENTWISE,
        f"{OF_RECOMPUTATION}::test_neither_norms_nor_swiglu_are_held_and_no_bit_changes[compiled]",
        ("norms' outputs are held", "return recomputable(self._normed, x)", "return self._normed(x)"),
        (
            "SwiGLU's outputs are held",
            "return recomputable(_SwiGLU.apply, gate_and_up)",
            "return _SwiGLU.apply(gate_and_up)",
        ),
    ),
    *of(
        "megatron_patch/model/layer_specs.py",
        f"{OF_RECOMPUTATION}::test_neither_norms_nor_swiglu_are_held_and_no_bit_changes[compiled]",
        (
            "linear layers hold what can be computed again",
            "*(Column, Row, ScaledDotProductAttention)",
            "*(ColumnParallelLinear, RowParallelLinear, ScaledDotProductAttention)",
        ),
    ),
    *of(
        "megatron_patch/model/linear.py",
        f"{OF_RECOMPUTATION}::test_what_is_to_be_offloaded_or_whose_gradient_is_wanted_is_kept",
        ("what is to be offloaded is computed again", "False) and not self.config.cpu_offloading", "False)"),
        ("nothing is computed again", "with not_keeping(x) if without else", "with nullcontext() if without else"),
        (
            "hooks that want a gradient get none",
            'without = getattr(self.weight, "hook_needs_no_gradient", False) and',
            "without =",
        ),
    ),
    *of(
        "megatron_patch/model/linear.py",
        f"{OF_LINEAR}::test_trained_layers_add_to_the_buffer_and_all_ask_for_the_faster_product",
        ("layers multiply as torch does", "found = kernels.product(x, weight)", "found = None"),
        (
            "trained layers multiply as Megatron's",
            "return _Product.apply(input, weight)",
            "return super()._forward_impl(input, weight, **asked)",
        ),
        (
            "a trained layer's gradient is added nowhere",
            "wgrad_gemm_accum_fp32(*rows, weight.main_grad)",
            "wgrad_gemm_accum_fp32(*rows, weight.main_grad.clone())",
        ),
        ("several ranks are taken for one", 'several = asked["allreduce_dgrad"] or', "several ="),
        ("a bias is left out", ' or asked["bias"] is not None', ""),
        (
            "a gradient goes to a buffer that nobody asked for",
            'in_buffer = asked["gradient_accumulation_fusion"] and',
            "in_buffer =",
        ),
        ("hooks that want a gradient do not get it", 'and getattr(weight, "hook_needs_no_gradient", False)\n', "\n"),
        ("frozen layers multiply as torch does", "else _Product.apply", "else F.linear"),
    ),
    *of(
        "megatron_patch/model/loss.py",
        f"{OF_LINEAR}::test_trained_layers_add_to_the_buffer_and_all_ask_for_the_faster_product",
        (
            "the head multiplies as torch does",
            "logits = product(hidden[part], weight)",
            "logits = hidden[part] @ weight.t()",
        ),
        (
            "the head's gradient is multiplied as torch does",
            "product(exponentials, weight.t())",
            "(exponentials @ weight)",
        ),
    ),
    *of(
        "megatron_patch/kernels/__init__.py",
        f"{OF_KERNELS}::test_product",
        ("every processor is AMD's", '"AuthenticAMD" in cpuinfo()', '"vendor_id" in cpuinfo()'),
        ("small products are oneDNN's too", "or x.numel() * weight.shape[0] < LEAST_PRODUCTS or", "or"),
        ("few rows are oneDNN's too", "if x.numel() < LEAST_ROWS * x.shape[-1] or", "if"),
        ("two dtypes are multiplied", "or weight.dtype is not torch.float32 or", "or"),
    ),
    *of(
        "megatron_patch/model/adapters.py",
        f"{OF_RECOMPUTATION}::test_adapters_hold_no_input_either",
        ("adapters hold their input", "with not_keeping(states):", "if True:"),
    ),
    *of(
        "megatron_patch/model/recomputation.py",
        f"{OF_RECOMPUTATION}::test_the_state_alone_is_replaced",
        ("another tensor is taken for the state", "saved.data_ptr() != place or", "False or"),
        ("a part is taken for the state", "or saved.numel() != count or", "or"),
        ("a transposed state is computed again as it was", "or not saved.is_contiguous():", "or False:"),
        ("states that none will ask for keep their input", "if found.requires_grad:", "if True:"),
    ),
    *of(
        "megatron_patch/model/layer_specs.py",
        f"{OF_ELEMENTWISE}::test_layers_are_built_of_them",
        ("norms are torch's", "kind = RMSNorm if", "kind = torch.nn.RMSNorm if"),
        ("SwiGLU is Megatron's", "config.gated_linear_unit and config.activation_func is F.silu", "False"),
    ),
    *of(
        "megatron_patch/patches/rotary_in_one_pass.py",
        f"{OF_PATCHES}::test_rotary_positions_are_megatrons",
        (
            "positions turn one half the other way",
            "addcmul_(second, sine, value=-direction)",
            "addcmul_(second, sine, value=direction)",
        ),
        ("a packed row's positions go on", "if cu_seqlens is not None:", "if False:"),
    ),
    *of(
        "megatron_patch/patches/gradient_norm.py",
        f"{OF_PATCHES}::test_the_norm_of_large_gradients_is_exact",
        ("large gradients' norm is torch's", "if l2_norm is not local_multi_tensor_l2_norm:", "if True:"),
        ("a norm in parts without the last ones", ".split(PART)", ".split(PART)[:9]"),
    ),
    *of(
        "megatron_patch/patches/gradient_norm.py",
        f"{OF_PATCHES}::test_the_norm_of_large_gradients_is_exact",
        ("squares of the first parts alone", "found = kernels.squares(tensor)", "found = kernels.squares(tensor)[:9]"),
    ),
    *of(
        "megatron_patch/kernels/elementwise.cpp",
        "tests/kernels/test_kernels.py::test_squares_of_parts",
        (
            "the last part is not summed",
            "begin < count; begin += part)",
            "begin + part <= count; begin += part)",
        ),
    ),
    *of(
        "megatron_patch/kernels/elementwise.cpp",
        "tests/kernels/test_kernels.py::test_adamw_is_torchs",
        ("the kernel clips nothing", "scaled = gradient[i] * factor;", "scaled = gradient[i];"),
        ("weights do not decay", "weight[i] = weight[i] * kept -", "weight[i] = weight[i] -"),
        (
            "the second moment is not corrected",
            "(std::sqrt(square[i]) * correction + eps)",
            "(std::sqrt(square[i]) + eps)",
        ),
    ),
    *of(
        "megatron_patch/kernels/__init__.py",
        "tests/kernels/test_kernels.py::test_adamw_is_torchs",
        ("the first moment is not corrected", "rate / (1 - betas[0] ** step), 1", "rate, 1"),
        ("1 - beta in 32 bits", "betas[1], 1 - betas[1]", "betas[1], 0.00099998713"),
        (
            "weights of 16 bits by the kernel for 32",
            'else _kernel("adamw", torch.bfloat16, rounded)',
            "else in_32_bits",
        ),
    ),
    *of(
        "megatron_patch/patches/adamw_in_one_pass.py",
        "tests/patches/test_adamw_in_one_pass.py::test_three_steps_are_megatrons",
        ("steps are torch's", "part.optimizer.step = OnePass(", "part.optimizer.other = OnePass("),
        ("gradients are clipped by themselves", "if not isinstance(factor, float) or not", "if True or not"),
        ("what is clipped once is clipped for good", "= min(1.0, factor)", "= min(parameter.gradient_factor, factor)"),
        ("small gradients grow", "= min(1.0, factor)", "= factor"),
        ("all steps are the first", 'int(state["step"]), *settings', "1, *settings"),
        ("weights are rounded once more", "if isinstance(step, OnePass) and step.has_rounded:", "if False:"),
        ("weights in 16 bits stay", "self._rounded.get(parameter)", "None"),
        ("gradients are a sum", "parameter.gradient_factor * self._share.factor", "parameter.gradient_factor"),
        ("the norm is a sum's", "return get_norm(*args, **kwargs) * share.factor", "return get_norm(*args, **kwargs)"),
        ("gradients are divided by themselves", "_is_so_everywhere(own == parts)", "False"),
        ("shards are taken for rounded", "self.has_rounded = bool(self._rounded)", "self.has_rounded = False"),
    ),
    *of(
        "megatron_patch/patches/adamw_in_one_pass.py",
        "tests/patches/test_adamw_in_one_pass.py::test_an_optimizer_without_the_kernel_gets_divided_gradients",
        ("no optimizer is told of tokens", "_is_so_everywhere(own == parts)", "True"),
        ("nobody divides for another optimizer", "if share.is_applied:", "if True:"),
    ),
    *of(
        "megatron_patch/training/summary.py",
        "tests/training/test_summary.py",
        ("a run that saved nothing ends in an error", "if save is None or not", "if save is None and not"),
        ("a run that saved nothing goes on", "if checkpoint is None else", "if checkpoint is not None else"),
    ),
    *of(
        "megatron_patch/patches/adamw_in_one_pass.py",
        "tests/patches/test_adamw_in_one_pass.py::test_beside_a_rank_without_a_compiler_gradients_are_divided",
        ("each rank divides or not", "_is_so_everywhere(own == parts)", "own == parts"),
    ),
    *of(
        "megatron_patch/patches/adamw_in_one_pass.py",
        "tests/patches/test_adamw_in_one_pass.py::test_without_clipping_each_step_is_of_its_own_tokens",
        ("the tokens of all steps", "share.factor = float(scaling_factor)", "share.factor *= float(scaling_factor)"),
    ),
    *of(
        "megatron_patch/patches/adamw_in_one_pass.py",
        "tests/patches/test_adamw_in_one_pass.py::test_without_a_compiler_they_are_torchs",
        ("no compiler, no step", "is not torch.optim.AdamW or library() is None:", "is not torch.optim.AdamW:"),
    ),
    *of(
        "megatron_patch/patches/scale_in_place.py",
        f"{OF_PATCHES}::test_gradients_are_clipped_where_they_lie",
        ("gradients are clipped through copies", "if multi_tensor_scale is not local_multi_tensor_scale:", "if True:"),
    ),
    *of(
        "megatron_patch/training/loss_spikes.py",
        f"{OF_SPIKES}::test_a_gradient_that_is_not_finite_moves_nothing[clipped]",
        ("a gradient that is not finite is trained on", "not math.isfinite(float(norm)):", "False:"),
    ),
    *of(
        "megatron_patch/training/callbacks.py",
        f"{OF_SPIKES}::test_a_gradient_that_is_not_finite_moves_nothing[clipped]",
        (
            "nobody looks at the gradients' norm",
            'wrap(OPTIMIZER, "get_grad_norm_fp32", "training.loss_spikes", loss_spikes.checked)',
            "pass",
        ),
    ),
    *of(
        "megatron_patch/device/cpu.py",
        "tests/device/test_cpu.py::test_weight_gradients_are_added_to_the_buffer",
        ("the weight gradient replaces what was there", "gradient_buffer.begin(main_grad))", "True)"),
        ("weight gradients go through a temporary", "    sys.modules[WEIGHT_GRADIENTS] = extension", "    pass"),
    ),
    *of(
        "megatron_patch/device/cpu.py",
        f"{OF_COMMANDS}::test_the_guides_training_line",
        ("memory goes back to the system", "variables |= {name: os.environ", "{} | {name: os.environ"),
    ),
    *of(
        "megatron_patch/checkpoint_files.py",
        "tests/test_checkpoint_files.py::test_metadata_of_a_newer_torch_is_read",
        ("this torch wants its own metadata", "read(self, state[:known])", "read(self, state)"),
    ),
    *of(
        ATTENTION,
        ONE_PROCESS,
        ("scores are scaled otherwise on a CPU", "return width**-0.5 if", "return 0.2 if"),
    ),
    *of(
        ATTENTION,
        OF_CPU_ATTENTION,
        ("tokens see what follows them", "value, is_causal=True)", "value, is_causal=False)"),
        ("scores are scaled otherwise", "scale=self.softmax_scale,", "scale=0.2,"),
        ("a scale that was asked for is left out", "is None else self.softmax_scale", "is None else 0.2"),
    ),
    *of(
        "megatron_patch/model/cpu_attention.py",
        OF_CPU_ATTENTION,
        ("short records see what follows", "    if causal:", "    if False:"),
        ("short records' gradients are not scaled", "weights.dtype).mul_(ctx.scale)", "weights.dtype)"),
        ("groups serve other heads", "allowed.repeat(heads, 1)", "allowed.repeat_interleave(heads, 0)"),
        ("a group's rows are those of all records", "view(records * groups, -1, width)", "view(groups, -1, width)"),
        ("short records are multiplied in 16 bits", "width, dtype=torch.float32,", "width, dtype=states.dtype,"),
        ("records of any length are multiplied", "if length <= LONGEST_MULTIPLIED:", "if length:"),
        ("the compiled attention holds any table", "length <= LONGEST_COMPILED and", "length and"),
        ("the compiled attention is never used", "length <= LONGEST_COMPILED and", "False and"),
        (
            "the compiled attention lets all see all",
            "kernels.attention(query, key, value, scale, causal, None",
            "kernels.attention(query, key, value, scale, False, None",
        ),
        ("the compiled gradient lets all see all", "ctx.scale, ctx.causal, None, log", "ctx.scale, False, None, log"),
    ),
    *of(
        "megatron_patch/model/cpu_attention.py",
        OF_SELF_ATTENTION,
        ("queries are not turned", "rotation = None if angles is None else", "rotation = None if True else"),
        (
            "a token sees those behind it",
            "kernels.attention(*_parts(mixed), scale, causal,",
            "kernels.attention(*_parts(mixed), scale, False,",
        ),
        (
            "its gradient too",
            "attention_backward(*_parts(mixed), *ctx.asked,",
            "attention_backward(*_parts(mixed), ctx.asked[0], False, ctx.asked[2],",
        ),
        ("values are keys", "mixed[..., :-2, :], mixed[..., -2, :]", "mixed[..., :-2, :], mixed[..., -1, :]"),
    ),
    *of(
        ATTENTION,
        OF_PACKED_ATTENTION,
        ("packed records are not the kernel's", "if query.is_cpu and self.attends_whole_records():", "if False:"),
    ),
    *of(
        ATTENTION,
        CP2,
        (
            "the kernel attends a rank's part of each record",
            "query.is_cpu and self.attends_whole_records()",
            "query.is_cpu",
        ),
    ),
    *of(
        "megatron_patch/model/cpu_attention.py",
        OF_PACKED_ATTENTION,
        (
            "packed records of any length are the kernel's",
            "if not takes_compiled(packed.longest, query.dtype):",
            "if False:",
        ),
    ),
    *of(
        "megatron_patch/kernels/attention.cpp",
        f"{OF_KERNELS}::test_records_of_a_packed_row_are_as_if_each_were_alone",
        ("every record is the first of its row", "first(shape.bounds ? before : 0)", "first(0)"),
        (
            "sums of two records lie in one place",
            "before(shape.bounds ? shape.bounds[number] :",
            "before(shape.bounds ? 0 :",
        ),
    ),
    *of(
        "megatron_patch/kernels/__init__.py",
        f"{OF_KERNELS}::test_a_packed_row_of_other_bounds_is_no_row",
        ("bounds of another row are read", "assert query.shape[:2] == (packed.tokens, 1)", "assert True"),
    ),
    *of(
        ATTENTION,
        OF_SELF_ATTENTION,
        ("a tower's tokens see the past alone", "return self.attn_mask_type == AttnMaskType.causal", "return True"),
        ("what other ranks hold is left out", "self.context_group is None and self.cache", "self.cache"),
        ("what was answered is left out", "None and self.cache is None and", "None and"),
        ("dropout is left out", "self.cache is None and not (self.training and self.dropout)", "self.cache is None"),
    ),
    *of(
        "megatron_patch/model/self_attention.py",
        OF_SELF_ATTENTION,
        ("a mask is left out", "hidden_states.is_cpu and attention_mask is None and", "hidden_states.is_cpu and"),
        ("what else is asked is left out", "and all(value is None for value in asked.values())", ""),
        ("packed records are one", "if plain and packed_seq_params is not None else None", "if False else None"),
        ("the row is taken for its longest record", "length = packed.longest", "pass"),
        ("packed tokens see what follows", "and (packed is None or self.core_attention.is_causal)", ""),
        ("the compiled kernel attends any length and dtype", "takes_compiled(length, hidden_states.dtype)", "True"),
        ("what the attention itself does is not asked", "and self.core_attention.attends_whole_records()", ""),
        ("angles are not looked at", "and (angles is None or self._turns_halves(angles, length))", ""),
        ("a rank takes all of its group", "and config.num_query_groups >= self.world_size", ""),
        ("heads are not normed", "config.qk_layernorm or config.attention", "config.attention"),
        ("an output gate is left out", "or config.attention_output_gate or", "or"),
        ("layers without positions have some", " or config.no_rope_freq)", ")"),
        ("nothing is offloaded", "config.fine_grained_activation_offloading or self", "self"),
        ("scores are kept all the same", " or self.checkpoint_core_attention)", ")"),
        (
            "angles are of any shape",
            "and angles.shape == (length, 1, 1, self.hidden_size_per_attention_head)",
            "",
        ),
        ("a fused kernel's angles are ours", "config.apply_rope_fusion or config.rot", "config.rot"),
        ("neighbours are turned as halves", " or config.rotary_interleaved)", ")"),
        ("sections are left out", "and config.mrope_section is None", ""),
        ("a stretched model's factor is left out", "and self._yarn_concentration_factor == 1.0", ""),
        ("the kernel is never used", "if not (plain and", "if True or not (plain and"),
    ),
    *of(
        ELEMENTWISE,
        f"{OF_ELEMENTWISE}::test_a_step_takes_every_kernel",
        ("the compiled norm is never used", "kernels.rms_norm(x, weight, eps) or _norm", "_norm"),
        ("the compiled norm's gradient is never used", "kernels.rms_norm_backward(*asked) or _norm", "_norm"),
        ("the compiled SwiGLU is never used", "found = kernels.swiglu(gate_and_up)", "found = None"),
        ("its gradient is never used", "found = kernels.swiglu_backward(gate_and_up, gradient)", "found = None"),
    ),
    *of(
        "megatron_patch/patches/rotary_in_one_pass.py",
        f"{OF_ELEMENTWISE}::test_a_step_takes_every_kernel",
        (
            "the compiled rotation is never used",
            "compiled = kernels.rotate(records, cosine, sine, direction)",
            "compiled = None",
        ),
        ("a packed row's tokens are records", "else states[:, None]", "else states[None]"),
    ),
    *of(
        "megatron_patch/kernels/gradient_buffer.py",
        f"{OF_ELEMENTWISE}::test_a_step_takes_every_kernel",
        ("the compiled addition is never used", "elif not kernels.add(total, addend):", "elif True:"),
    ),
    *of(
        "megatron_patch/kernels/gradient_buffer.py",
        f"{OF_ZEROS}::test_gradients_are_those_added_to_zeros",
        ("the first gradient is added to the last step's", "total.copy_(addend)", "total.add_(addend)"),
        ("the first product is added to the last step's", "beta=0 if first else 1", "beta=1"),
        ("every gradient is the first", "buffer.is_empty = False", "buffer.is_empty = True"),
        ("rows are added to the last step's", "buffer.zero_()", "pass"),
    ),
    *of(
        "megatron_patch/patches/gradients_without_zeros.py",
        f"{OF_ZEROS}::test_gradients_are_those_added_to_zeros",
        ("zeros are written first", "if self.ddp_config.overlap_grad_reduce or self.extra_main_grads:", "if True:"),
        ("what got no gradient has the last step's", "gradient_buffer.fill(parameter.main_grad)", "pass"),
    ),
    *of(
        "megatron_patch/patches/gradients_without_zeros.py",
        f"{OF_ZEROS}::test_where_reductions_overlap_there_are_zeros",
        ("reductions that overlap meet the last step's", "if self.ddp_config.overlap_grad_reduce or", "if"),
    ),
    *of(
        "megatron_patch/patches/gradients_without_zeros.py",
        "tests/transformer_engine/test_training.py::test_losses_equal_those_of_the_local_layers",
        ("Transformer Engine's products add to the last step's", "if fp8_utils.HAVE_TE:", "if False:"),
    ),
    *of(
        "megatron_patch/patches/embedding_gradient.py",
        f"{OF_ZEROS}::test_gradients_are_those_added_to_zeros",
        (
            "an embedding's rows are added to the last step's",
            "gradient_buffer.fill(ctx.weight.main_grad)",
            "ctx.weight.main_grad",
        ),
    ),
    *of(
        "megatron_patch/patches/gradients_in_parts.py",
        f"{OF_ZEROS}::test_gradients_are_those_added_to_zeros",
        ("the hook adds to the last step's", "gradient_buffer.begin(parameter.main_grad))", "False)"),
    ),
    *of(
        DEVICE_CPU,
        f"{OF_ZEROS}::test_gradients_are_those_added_to_zeros",
        ("a product is added to the last step's", "gradient_buffer.begin(main_grad))", "False)"),
    ),
    *of(
        "megatron_patch/kernels/gradient_buffer.py",
        f"{OF_LOSS}::test_losses_and_gradients_are_torchs",
        ("the second product is written over the first", "beta=0 if first else 1", "beta=0"),
    ),
    *of(
        LOSS,
        f"{OF_LOSS}::test_losses_and_gradients_are_torchs",
        ("a head's gradient is added to the last step's", "first = gradient_buffer.begin(total)", "first = False"),
        ("each part of a head's gradient is the first", "first = gradient_buffer.begin(total)", "first = True"),
    ),
    *of(
        LOSS,
        f"{OF_ELEMENTWISE}::test_a_step_takes_every_kernel",
        (
            "the compiled exponentials are never used",
            "sums = kernels.exponentials(logits, real, largest)",
            "sums = None",
        ),
        ("the compiled maximum is never used", "found = kernels.row_largest(logits, real)", "found = None"),
    ),
    *of(
        "megatron_patch/kernels/__init__.py",
        OF_KERNELS,
        ("a tensor in pieces is read as if it were whole", "or not tensor.is_contiguous():", "or False:"),
        ("another dtype is read as if it were this one", "if tensor.dtype is not dtype or", "if False or"),
        ("a gradient in pieces is read as whole heads", "state if state.stride(-1) == 1 else", "state if True else"),
        (
            "all records have the first one's positions",
            "or cosine.numel() * 2 != states.shape[0] * states.shape[3]",
            "",
        ),
        ("a buffer in pieces is added to", "torch.float32 and total.is_contiguous()", "torch.float32"),
        ("tables of an answer cannot be trained with", "with torch.inference_mode(False):", "if True:"),
        ("tables of another dtype are read", '"attention", query.dtype, *(rotation or ())', '"attention", query.dtype'),
    ),
    *of(
        "megatron_patch/cpp_compiler.py",
        "tests/kernels/test_build.py",
        ("CXX=none is taken for a compiler's name", 'return None if chosen == "none" else', "return"),
        ("CXX is not asked", 'os.environ.get("CXX", "").split()', "[]"),
    ),
    *of(
        "megatron_patch/kernels/build.py",
        "tests/kernels/test_build.py",
        ("another source is the same library", "origin = [*sources, ", "origin = ["),
        ("another processor is the same library", "str(state.st_mtime_ns), _processor()]", "str(state.st_mtime_ns)]"),
        ("other flags are the same library", "*FLAGS, *command, str(program)", "*command, str(program)"),
        ("the library is built at every start", "if not target.exists():", "if True:"),
        ("others may write the library", "folder.mkdir(mode=0o700,", "folder.mkdir(mode=0o755,"),
        (
            "a compiler's failure ends the run",
            "except subprocess.CalledProcessError as error:",
            "except KeyError as error:",
        ),
        ("every process says it", 'os.environ.get("LOCAL_RANK", "0") != "0"', "False"),
        ("no home ends the kernels", "except OSError:  # no home", "except KeyError:  # no home"),
        (
            "a library that is half written has its name",
            "with atomic_file(target) as beside:",
            "for beside in [target]:",
        ),
    ),
    *of(
        "megatron_patch/kernels/elementwise.cpp",
        OF_KERNELS,
        ("the norm forgets its epsilon", "std::sqrt(squares / width + eps)", "std::sqrt(squares / width)"),
        ("a norm's gradient misses the scale's own", "along *= -scale * scale * scale / width;", "along = 0;"),
        ("a weight's gradient is one thread's", "thread < most; ++thread", "thread < 1; ++thread"),
        ("SwiGLU's gate has sigmoid's gradient", "(1 + x * (1 - s))", "(1 - s)"),
        ("up's gradient is without the gate", "write(of_up[i], along * x)", "write(of_up[i], along)"),
        ("padding is a token", "std::fill(in + real, in + width, T{});", ";"),
        (
            "the largest is looked for in the padding",
            "i < real; ++i) found = std::max",
            "i < width; ++i) found = std::max",
        ),
        ("every head is the first", "record * strides.record + head * strides.head", "record * strides.record"),
    ),
    *of(
        "megatron_patch/kernels/common.h",
        OF_KERNELS,
        ("rounding to 16 bits cuts off", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
        ("ties go up", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "(bits + 0x8000) >> 16"),
        ("e^x overflows", "x = std::min(std::max(x, -87.0f), 88.0f);", "x = std::min(x, 88.0f);"),
        ("e^x misses a term", "p = p * r + 1.0f / 120;", "p = p * r;"),
        ("gradients are turned on", "read(sine[i]) * direction", "read(sine[i])"),
        ("halves turn the same way", "first * along - second * across", "first * along + second * across"),
    ),
    *of(
        "megatron_patch/kernels/attention.cpp",
        OF_KERNELS,
        ("all see all", "return causal ? end : places;", "return places;"),
        ("the largest score is not taken off", "exponential(of_row[i] - largest)", "exponential(of_row[i])"),
        ("scores' gradients miss the rows' sums", "of_row[i] * (of_score[i] - along)", "of_row[i] * of_score[i]"),
        (
            "queries' gradients are not scaled",
            "store(of_queries.data(), places, width, scale,",
            "store(of_queries.data(), places, width, 1,",
        ),
        ("what is not seen gets a gradient", "std::fill(of_score + seen, of_score + columns, 0.0f);", ";"),
        ("all places are turned as the first", "row, cosine + place * half,", "row, cosine,"),
        ("queries' gradients stay turned", "rotation.turn(of_queries.data(), places, width, -1);", ";"),
        ("keys' gradients stay turned", "rotation.turn(of_keys.data(), places, width, -1);", ";"),
        ("all groups are the first", "group * by_group + ", ""),
        ("a group's heads are its first", " + head * by_head, by_place", ", by_place"),
    ),
    *of(
        "megatron_patch/patches/gradients_in_parts.py",
        f"{OF_PATCHES}::test_a_gradient_in_16_bits_is_added_in_parts",
        ("a gradient in 16 bits is added whole", "gradient is None or", "True or"),
        (
            "a gradient in parts is added twice",
            "parameter.zero_out_wgrad = True, False",
            "parameter.zero_out_wgrad = False, True",
        ),
        ("what was added is added again", "or (added and not twice):", "or False:"),
        (
            "the marks of a gradient are forgotten",
            "parameter.zero_out_wgrad = added, twice",
            "parameter.zero_out_wgrad = False, False",
        ),
    ),
    *of(
        LOSS,
        OF_LOSS,
        (
            "a tied head in 16 bits takes the first tokens alone",
            "for part, columns in zip(total.split(rows)",
            "for part, columns in zip(total.split(rows)[:1]",
        ),
    ),
    *of(
        ELEMENTWISE,
        OF_ELEMENTWISE,
        (
            "the norm is computed in 16 bits",
            "rows = x.reshape(-1, x.shape[-1]).float()",
            "rows = x.reshape(-1, x.shape[-1])",
        ),
    ),
    *of(
        ATTENTION,
        "tests/model/test_attention.py::test_grouped_queries_under_a_mask_are_spread_exactly",
        (
            "groups are paired with other queries",
            "states.repeat_interleave(query.shape[2] // key.shape[2], 2)",
            "states.repeat(1, 1, query.shape[2] // key.shape[2], 1)",
        ),
        ("grouped queries keep a mask", "if allowed is not None and query.shape[2] != key.shape[2]:", "if False:"),
    ),
    *of(
        ATTENTION,
        CP2,
        (
            "another cut of context parallelism",
            "first + (2 * size - 1 - rank) * chunk",
            "first + (size + rank) * chunk",
        ),
        (
            "a token does not see itself over ranks",
            "mine[:, None] >= everyone[None, :]",
            "mine[:, None] > everyone[None, :]",
        ),
        (
            "packed records are cut from the row's start",
            "start + zigzag_positions((end - start)",
            "0 * start + zigzag_positions((end - start)",
        ),
    ),
    *of(
        LLAVA,
        TP2_SP,
        (
            "the gradient of gathered states is summed twice",
            "tensor_parallel_output_grad=False",
            "tensor_parallel_output_grad=True",
        ),
        ("a part of each record is narrowed", "if post_process and can_narrow(config):", "if post_process:"),
    ),
    *of(
        "megatron_patch/geometry.py",
        "tests/conversion/test_room.py::test_running_layers",
        ("one layer of the tower too few", "else layers + 1 + feature_layer", "else layers + feature_layer"),
    ),
]

CONVERSION = [
    *of(
        "megatron_patch/conversion/transforms.py",
        "tests/conversion/test_transforms.py::test_query_key_value",
        (
            "heads are not interleaved by group",
            "torch.cat(per_group, dim=1).reshape(-1, *rest)",
            "torch.cat(per_group, dim=0).reshape(-1, *rest)",
        ),
        ("export takes other rows of a group", ".split(rows, dim=1)", ".flip(0).split(rows, dim=1)"),
    ),
    *of(
        "megatron_patch/conversion/table.py",
        ONE_PROCESS,
        (
            "gate and up change places",
            '("mlp.gate_proj.weight", (f, h)), ("mlp.up_proj.weight", (f, h))',
            '("mlp.up_proj.weight", (f, h)), ("mlp.gate_proj.weight", (f, h))',
        ),
        (
            "every group of queries has one head",
            "qkv = QueryKeyValue(language.heads, language.groups)",
            "qkv = QueryKeyValue(language.heads, language.heads // 4)",
        ),
        (
            "the norms of a layer change places",
            '"self_attention.linear_qkv.layer_norm_weight", Same(), ("input_layernorm.weight"',
            '"self_attention.linear_qkv.layer_norm_weight", Same(), ("post_attention_layernorm.weight"',
        ),
    ),
    *of(
        "megatron_patch/conversion/plan.py",
        "tests/conversion/test_round_trip.py::test_new_projector_is_torch_linear",
        (
            "a new projector starts too wide",
            "bound = 1 / math.sqrt(part.shape[1])",
            "bound = 2 / math.sqrt(part.shape[1])",
        ),
    ),
    *of(
        "megatron_patch/conversion/plan.py",
        "tests/conversion/test_stage0.py::test_extra_ids_after_32000",
        ("new rows of the vocabulary are a sum", "mean = (total / old)", "mean = (total / 1)"),
    ),
    *of(
        "megatron_patch/atomic_files.py",
        "tests/conversion/test_refusals.py::test_full_disk_and_kill",
        (
            "a killed conversion looks finished",
            'beside = target.with_name(f"{target.name}.tmp-{os.getpid()}")',
            "beside = target",
        ),
    ),
    *of(
        "megatron_patch/conversion/output.py",
        "tests/conversion/test_refusals.py::test_too_little_disk",
        ("free space is not compared", "if free < wanted:", "if free < 0:"),
    ),
    *of(
        "megatron_patch/conversion/output.py",
        "tests/conversion/test_refusals.py::test_existing_targets",
        ("a target that holds something is taken", "if target.is_dir() and any(target.iterdir()):", "if False:"),
    ),
]

LABELS_AND_MASKS = [
    *of(
        ENCODER,
        OF_BATCH,
        (
            "labels are not shifted",
            "labels[:-1][trained[1:]] = tokens[1:][trained[1:]]",
            "labels[trained] = tokens[trained]",
        ),
    ),
    *of(
        CONVERSATION,
        "tests/data/test_conversation.py::test_a_text_that_begins_with_bos_keeps_one",
        ("BOS twice", "if bos is not None and piece_ids[:1] != [bos]:", "if bos is not None:"),
    ),
    *of(
        CHAT,
        f"{OF_CHAT}::test_ids_and_mask_are_training_s[-v1-llama_3]",
        ("a chat has no BOS", '{_text(bos)} ~ {text} %}}"', '{text} %}}"'),
        (
            "the mask of a chat is empty",
            'f"{{%- generation %}}{{{{- {answer} }}}}{{%- endgeneration %}}"',
            'f"{{{{- {answer} }}}}{{%- generation %}}{{%- endgeneration %}}"',
        ),
    ),
    *of(
        CHAT,
        f"{OF_CHAT}::test_ids_and_mask_are_training_s[-v1-sentencepiece_unigram]",
        ("a chat has no spaces for sentencepiece", "values()] if space else None", "values()] if False else None"),
    ),
    *of(
        CHAT,
        f"{OF_CHAT}::test_text_before_its_image_and_a_system_message",
        ("a single image of a chat stays behind its question", "chat.images == 1 and '<image>'", "false and '<image>'"),
    ),
    *of(
        CHAT,
        f"{OF_CHAT}::test_signs_of_jinja_in_a_template_of_ones_own[llama_3]",
        ("a chat that begins with BOS gets another", " and not chat.text.startswith({_text(bos)})", ""),
    ),
    *of(
        CHAT,
        f"{OF_CHAT}::test_what_was_not_trained_is_refused",
        (
            "two questions of a chat are joined",
            "!= ('assistant' if loop.index0 % 2 else 'user')",
            "not in ['user', 'assistant']",
        ),
        (
            "an answer of a chat may hold an image",
            '_when("\'<image>\' in text", "{{- raise',
            '_when("false", "{{- raise',
        ),
        ("a chat's system message may hold an image", "_when(\"'<image>' in chat.system\"", '_when("false"'),
        ("a chat may have no question", '_when("not exchanges"', '_when("false"'),
        ("plain takes two questions of a chat", "loop.index0 >= {2 * words", "loop.index0 > {2 * words"),
    ),
    *of(CHAT, f"{OF_CHAT}::test_tools_are_refused", ("tools are left out of a chat", '_when("tools"', '_when("false"')),
    *of(
        CHAT,
        f"{OF_CHAT}::test_a_tokenizer_that_no_space_helps_is_refused",
        ("a tokenizer that cuts chats otherwise is taken", "        if all(", "        if True or all("),
    ),
    *of(
        "megatron_patch/tokenizer_files.py",
        f"{OF_CHAT}::test_ids_and_mask_are_training_s[-v1-llama_3]",
        ("tokens of an export leave out their spaces", 'part["trim_offsets"] = False', 'part["trim_offsets"] = True'),
    ),
    *of(
        USAGE,
        f"{OF_EXPORTS}::test_a_chat_template_is_the_training_s_or_none",
        ("a chat template is not compared with training", "        if not same:", "        if False:"),
        ("a chat template of before the training stays", "(folder / name).unlink(missing_ok=True)", "pass"),
        ("tiles have a chat template", "if settings.image_tiles != (1, 1):", "if False:"),
        ("exports sample", '{"do_sample": False}', '{"do_sample": True}'),
    ),
    *of(
        USAGE,
        f"{OF_EXPORTS}::test_a_tokenizer_that_is_not_the_training_s_is_refused",
        ("an exported tokenizer is not compared", "        if wanted != got:", "        if False:"),
    ),
    *of(
        "megatron_patch/conversion/hub_files.py",
        f"{OF_EXPORTS}::test_chat_pipeline_and_pixels_are_training_s",
        ("transformers 4 gets another rope base", 'text | {"rope_theta": base,', 'text | {"rope_theta": 1e4,'),
    ),
    *of(
        ENCODER,
        "tests/data/loading/test_task_encoder.py::test_every_tile_begins_where_its_placeholders_do",
        ("tiles begin at the same placeholder", "for first in range(start, end, width)]", "for first in [start]]"),
    ),
    *of(
        ENCODER,
        f"{OF_LOADER}::test_long_records_are_cut_counted_and_left_out_when_nothing_is_left",
        (
            "records are cut one token late",
            "tokens[: config.longest_record], trained[: config.longest_record]",
            "tokens[: config.longest_record + 1], trained[: config.longest_record + 1]",
        ),
        ("records without labels are trained on", "if not (labels != IGNORE_LABEL).any():", "if False:"),
    ),
    *of(
        CONVERSATION,
        GOLDEN,
        (
            "answers are not trained",
            'segments.append(Segment(f"{texts.answer[0]}{exchange.answer}{texts.answer[1]}", trained=True))',
            'segments.append(Segment(f"{texts.answer[0]}{exchange.answer}{texts.answer[1]}"))',
        ),
        (
            "what closes an exchange is trained",
            "segments.append(Segment(texts.closing))",
            "segments.append(Segment(texts.closing, trained=True))",
        ),
        (
            "the first token of an answer is not trained",
            "flags[first:last] = [True] * (last - first)",
            "flags[first + 1 : last] = [True] * (last - first - 1)",
        ),
        (
            "images become one token less",
            "ids += [self._mark_ids[mark]] * count",
            "ids += [self._mark_ids[mark]] * (count - 1)",
        ),
    ),
    *of(
        COLLATOR,
        OF_BATCH,
        ("labels of padding", "np.full(shape, IGNORE_LABEL, dtype=np.int64)", "np.full(shape, 0, dtype=np.int64)"),
    ),
    *of(
        COLLATOR,
        f"{OF_LOADER}::test_packed_rows_hold_the_records_of_unpacked_ones",
        (
            "packed records overlap",
            "tokens[0, start : start + len(record.tokens)] = record.tokens",
            "tokens[0, : len(record.tokens)] = record.tokens",
        ),
        (
            "packed rows end anywhere",
            "lengths[-1] += config.padded_length(sum(lengths)) - sum(lengths)",
            "lengths[-1] += 0",
        ),
    ),
    *of(
        "megatron_patch/data/loading/config.py",
        f"{OF_LOADER}::test_steps_of_length_leave_few_lengths_and_lose_no_token",
        ("every batch has a length of its own", "min(round_up(tokens, step), self", "min(tokens, self"),
        (
            "steps of length exceed the longest row",
            "min(round_up(tokens, step), self.longest_record)",
            "round_up(tokens, step)",
        ),
    ),
    *of(
        "megatron_patch/data/loading/label_check.py",
        f"{OF_LOADER}::test_a_run_that_could_never_learn_to_stop_is_refused",
        ("answers without an ending pass", "(text.labels == ending).any() for text in texts", "True for text in texts"),
    ),
]

IMAGES = [
    *of(
        IMAGE,
        f"{OF_IMAGE}::test_squeezing_equals_the_siglip_processor",
        (
            "SigLIP's images are cropped",
            'elif image_aspect_ratio == "crop" and center_crop:',
            'elif image_aspect_ratio == "crop":',
        ),
    ),
    *of(
        IMAGE,
        f"{OF_IMAGE}::test_pad_equals_the_original_expand2square",
        ("padding on one side", "canvas.paste(image, ((canvas_width - image.width) // 2,", "canvas.paste(image, (0,"),
        (
            "padding of another colour",
            "math.floor(channel * 255) for channel in image_mean",
            "math.ceil(channel * 255) for channel in image_mean",
        ),
    ),
    *of(
        IMAGE,
        f"{OF_IMAGE}::test_crop_equals_the_huggingface_processor",
        (
            "the crop is not in the middle",
            "left, top = (new_width - width) // 2, (new_height - height) // 2",
            "left, top = 0, (new_height - height) // 2",
        ),
    ),
    *of(
        IMAGE,
        "tests/data/test_tiles.py::test_tiles_lie_row_by_row",
        (
            "tiles lie column by column",
            "columns, side_px).transpose(1, 3, 0, 2, 4)",
            "columns, side_px).transpose(3, 1, 0, 2, 4)",
        ),
    ),
    *of(
        IMAGE,
        f"{OF_IMAGE}::test_what_is_transparent_is_white",
        ("what is transparent becomes black", 'rows.size, "white")', 'rows.size, "black")'),
    ),
    *of(
        IMAGE,
        f"{OF_IMAGE}::test_broken_and_huge_images_are_refused_with_a_reason",
        ("ribbons are decoded", "or max(width, height) > MAX_SIDE_PX:", "or False:"),
    ),
]

# From the environment to the loader's settings.
DATA_OPTIONS = [
    *of(
        SETTINGS,
        effect("IMAGE_ASPECT_RATIO=pad"),
        (
            "IMAGE_ASPECT_RATIO is ignored",
            '"image_aspect_ratio": self.image_aspect_ratio',
            '"image_aspect_ratio": "crop"',
        ),
    ),
    *of(
        SETTINGS,
        effect("EXIF_ORIENTATION=false with IMAGE_ASPECT_RATIO"),
        (
            "EXIF_ORIENTATION is ignored",
            '"apply_exif_orientation": self.exif_orientation',
            '"apply_exif_orientation": True',
        ),
    ),
    *of(
        IMAGE,
        effect("EXIF_ORIENTATION=false with IMAGE_ASPECT_RATIO"),
        ("images are turned in any case", "if apply_exif_orientation:", "if True:"),
    ),
    *of(
        SETTINGS,
        effect("IMAGE_TILES=2x1"),
        ("IMAGE_TILES is ignored", '"tile_columns": self.image_tiles[0]', '"tile_columns": 1'),
    ),
    *of(
        SETTINGS,
        effect("IMAGE_CONV_FRONT=true"),
        ("IMAGE_CONV_FRONT is ignored", '"image_conv_front": self.image_conv_front', '"image_conv_front": False'),
    ),
    *of(
        SETTINGS,
        effect("IMAGE_START_END=true"),
        ("IMAGE_START_END is ignored", '"image_start_end": self.image_start_end', '"image_start_end": False'),
    ),
    *of(
        CONFIG,
        effect("CONVERSATION_TEMPLATE=v1 with DECODER_SEQ_LEN"),
        ("CONVERSATION_TEMPLATE is ignored", "template=trained_with.conversation_template", 'template="mistral"'),
    ),
    *of(CONFIG, effect("DATA_ORDER=single"), ("DATA_ORDER is ignored", "order=arguments.data_order", 'order="cyclic"')),
    *of(
        CONFIG,
        effect("MEGA_BATCH_MULT=1 with DATA_ORDER"),
        ("MEGA_BATCH_MULT is ignored", "mega_batch_mult=arguments.mega_batch_mult", "mega_batch_mult=50"),
    ),
    *of(
        CONFIG,
        effect("GLOBAL_BATCH_SIZE=4 with DATA_ORDER"),
        ("steps of one modality have another size", "step_records=arguments.global_batch_size", "step_records=8"),
    ),
    *of(
        CONFIG,
        effect("BALANCE_COST=true"),
        (
            "BALANCE_COST is ignored",
            "balance_cost=_record_cost(arguments, geometry) if arguments.balance_cost else None",
            "balance_cost=None",
        ),
    ),
    *of(
        ROWS,
        effect("BALANCE_COST=true"),
        ("switches are not handed on", 'return {"true": [option], "false": off}.get(value, [])', "return []"),
    ),
    *of(
        CONFIG,
        f"{OF_CONFIG}::test_equal_work_needs_steps_of_one_size",
        ("steps that grow are balanced", "if changing:", "if False:"),
    ),
    *of(
        CONFIG,
        effect("PACKING=true with BATCH_SIZE DECODER_SEQ_LEN"),
        ("PACKING is ignored", "packing=arguments.packing", "packing=False"),
    ),
    *of(
        CONFIG,
        effect("PADDING_FREE=true"),
        ("PADDING_FREE is ignored", "padding_free=arguments.padding_free", "padding_free=False"),
    ),
    *of(
        CONFIG,
        effect("PADDING_FREE=auto"),
        ("rows are padded by default", '"local" in of_device and not', '"local" not in of_device and not'),
    ),
    *of(CONFIG, effect("SEED=77"), ("SEED is ignored", "seed=arguments.seed", "seed=1234")),
    *of(
        CONFIG,
        effect("NUM_WORKERS=1"),
        ("NUM_WORKERS is ignored", "num_workers=arguments.num_workers", "num_workers=0"),
    ),
    *of(
        CONFIG,
        effect("BATCH_SIZE=4"),
        ("BATCH_SIZE is ignored", "micro_batch_size=arguments.micro_batch_size", "micro_batch_size=2"),
    ),
    *of(
        CONFIG,
        effect("EVAL_ITERS=0"),
        (
            "no iterations of evaluation, yet a dataset",
            "arguments.valid_dataset_path if arguments.eval_iters else None",
            "arguments.valid_dataset_path",
        ),
    ),
    *of(
        CONFIG,
        effect("CP=2"),
        (
            "lengths are multiples of CP alone",
            "context = 2 * arguments.context_parallel_size if",
            "context = arguments.context_parallel_size // 2 if",
        ),
    ),
    *of(
        CONFIG,
        effect("CP=2 with PACKING BATCH_SIZE DECODER_SEQ_LEN"),
        ("packed records are not cut by CP", "record_multiple=context,", "record_multiple=1,"),
    ),
    *of(
        CONFIG,
        effect("TP=2 with DECODER_SEQ_LEN"),
        ("lengths are not cut by TP", "length_multiple=sequence * positions", "length_multiple=positions"),
    ),
    *of(
        CONFIG,
        f"{OF_CONFIG}::test_offloaded_activations_come_in_few_lengths",
        ("pinned memory grows with every new length", "OFFLOADED_LENGTHS if arg", "1 if arg"),
    ),
    *of(
        CONFIG,
        f"{OF_CONFIG}::test_offload_names_the_packages_it_lacks",
        ("AC=offload fails late without pynvml", "if importlib.util.find_spec(module) is None:", "if False:"),
    ),
    *of(
        "megatron_patch/device/__init__.py",
        f"{OF_CONFIG}::test_fp32_runs_on_megatrons_own_layers",
        ("fp32 is TF32", "sixteen_bits and have_transformer_engine()", "have_transformer_engine()"),
    ),
    *of(
        CONFIG,
        f"{OF_CONFIG}::test_fp32_runs_on_megatrons_own_layers",
        (
            "bf16 goes without Transformer Engine",
            "device.megatron_arguments(arguments.bf16 or",
            "device.megatron_arguments(",
        ),
        ("AC=offload with fp32 fails in Megatron", "if not (arguments.bf16 or arguments.fp16):", "if False:"),
    ),
    *of(
        "megatron_patch/device/cuda.py",
        f"{OF_CONFIG}::test_fp32_convolutions_are_in_fp32_on_a_gpu",
        ("the tower's first layer is TF32", "cudnn.allow_tf32 = False", "cudnn.allow_tf32 = True"),
    ),
    *of(
        CONFIG,
        f"{OF_CONFIG}::test_with_fp8_every_rank_has_a_multiple_of_16_rows",
        ("fp8 gets rows that its kernels refuse", "FP8_ROWS * arguments.context_par", "2 * arguments.context_par"),
    ),
    *of(
        "megatron_patch/llava_folder.py",
        SIGLIP,
        ("every tower crops", 'config.get("do_center_crop", "crop_size" in config)', "True"),
        ("every tower's filter is bicubic", '"resample": config.get("resample", 3)', '"resample": 3'),
    ),
    *of(
        CONFIG,
        MAX_SKIPPED,
        ("MAX_SKIPPED is ignored", "max_skipped_share=arguments.max_skipped_share", "max_skipped_share=0.01"),
    ),
    *of(
        LOADER,
        "tests/data/loading/test_dataset.py::test_more_damage_than_tolerated_stops_the_run",
        ("any number of records may be bad", 'if skipped and own["skipped"] > limit:', "if False:"),
    ),
    *of(
        ROWS,
        MAX_SKIPPED,
        (
            "options are handed on as their defaults",
            "return [option, value]",
            'return [option, getattr(self, "default", value)]',
        ),
    ),
    *of(
        ROWS,
        effect("EXIF_ORIENTATION=false with IMAGE_ASPECT_RATIO"),
        ("what is auto cannot be switched off", 'off = [f"--no-{option[2:]}"] if', "off = [] if"),
    ),
    *of(
        SAMPLER,
        effect("MEGA_BATCH_MULT=1 with DATA_ORDER"),
        (
            "steps of one modality are not sorted",
            'group = group[np.argsort(lengths.tokens[group], kind="stable")]',
            "group = group[::1]",
        ),
    ),
]

RECORDS = [
    *of(
        LOADER,
        EXACT,
        (
            "a resume repeats records",
            "self._position += self._size * self._config.micro_batch_size",
            "self._position += self._config.micro_batch_size",
        ),
        ("counts start anew on resuming", 'if state["topology"] == self._topology():', "if False:"),
    ),
    *of(
        "megatron_patch/data/loading/state.py",
        EXACT,
        ("a resume starts over", 'return int(state["position"])', "return 0"),
    ),
    *of(
        "megatron_patch/data/loading/state.py",
        f"{OF_LOADER}::test_other_data_or_seed_is_refused_by_name",
        ("a resume on other data is not refused", "if differences:", "if False:"),
    ),
    *of(
        LOADER,
        f"{OF_LOADER}::test_ranks_see_in_a_step_what_one_rank_sees_in_as_many_micro_batches",
        (
            "every rank reads the same records",
            "_Positions(position + self._rank * batch_size, self._size * batch_size, batch_size)",
            "_Positions(position, self._size * batch_size, batch_size)",
        ),
        (
            "ranks overlap",
            "_Positions(position + self._rank * batch_size, self._size * batch_size, batch_size)",
            "_Positions(position + self._rank * batch_size, batch_size, batch_size)",
        ),
    ),
    *of(
        "megatron_patch/data/loading/balance.py",
        f"{OF_BALANCE}::test_a_step_has_the_same_records_on_any_number_of_ranks",
        (
            "balanced ranks read the same records",
            "plan[(self._rank + start //",
            "plan[(start //",
        ),
        ("a balanced step is read twice", "            start += step_records", "            start += 0"),
    ),
    *of(
        "megatron_patch/data/loading/balance.py",
        f"{OF_BALANCE}::test_ranks_change_places_from_step_to_step",
        (
            "one rank gets all the cheap records",
            "(self._rank + start // step_records) % ranks",
            "self._rank",
        ),
    ),
    *of(
        "megatron_patch/step_balance.py",
        f"{OF_BALANCE}::test_the_plan_is_close_to_the_best",
        ("nothing is exchanged", "for _ in range(4 * len(dealt)):", "for _ in range(0):"),
    ),
    *of(
        "megatron_patch/step_balance.py",
        f"{OF_BALANCE}::test_the_longest_goes_first_to_the_rank_that_has_least",
        ("micro-batches are dealt shortest first", "key=lambda item: -costs[item]", "key=lambda item: costs[item]"),
        ("ranks are dealt to in turn", "(load + costs[item], rank)", "(load + 1, rank)"),
    ),
    *of(
        "megatron_patch/step_balance.py",
        f"{OF_BALANCE}::test_what_a_rank_has_to_do",
        ("padding costs nothing", "longest = max(tokens", "longest = min(tokens"),
    ),
    *of(
        "megatron_patch/data/loading/balance.py",
        f"{OF_BALANCE}::test_a_step_that_cannot_be_shared_out_is_refused",
        ("a step is cut short", "if rest or not micro_batches:", "if not micro_batches:"),
    ),
    *of(
        LOADER,
        f"{OF_BALANCE}::test_a_state_within_a_step_is_a_mistake",
        (
            "a balanced state is saved anywhere",
            "assert self._lengths is None or (self",
            "assert True or (self",
        ),
    ),
    *of(
        LOADER,
        f"{EFFECTS}::test_the_work_of_batches_is_counted",
        (
            "images count as labels",
            "sum(int((row.labels != IGNORE_LABEL).sum()) for row in rows)",
            "sum(len(row.labels) for row in rows)",
        ),
        (
            "padding counts as tokens",
            "lengths = [len(row.tokens) for row in rows]",
            "lengths = [max(len(row.tokens) for row in rows)] * len(rows)",
        ),
        ("only the last batch counts", "counters[name] += count", "counters[name] = count"),
    ),
    *of(
        LOADER,
        "tests/data/loading/test_dataset.py::test_excluded_samples_are_left_out_and_counted",
        ("what the user excludes counts as a fault", 'if reason == "excluded":', 'if reason == "left out":'),
    ),
    *of(
        LOADER,
        "tests/data/loading/test_dataset.py::test_damaged_shards_are_named_not_silent",
        ("skipped records are not counted by reason", 'self.counts.get(f"skipped: {reason}", 0) + 1', "1"),
    ),
    *of(
        LOADER,
        "tests/data/loading/test_dataset.py::test_more_damage_than_tolerated_stops_the_run",
        (
            "ten bad records end a run of any length",
            "limit = max(ALWAYS_TOLERATED,",
            "limit = 10 * max(ALWAYS_TOLERATED,",
        ),
    ),
    *of(
        SAMPLER,
        f"{OF_LOADER}::test_an_epoch_gives_every_record_once_and_the_next_in_another_order",
        (
            "every epoch has the same order",
            "random = np.random.RandomState([self._seed % 2**32, epoch])",
            "random = np.random.RandomState([self._seed % 2**32, 0])",
        ),
    ),
    *of(
        PACKING,
        f"{OF_PACKING}::test_packing_takes_the_fullest_row_that_fits",
        (
            "packing takes the emptiest row",
            "left = length + (fits & -fits).bit_length() - 1",
            "left = length + fits.bit_length() - 1",
        ),
    ),
    *of(
        PACKING,
        f"{OF_PACKING}::test_rows_are_those_of_the_textbook",
        ("of rows with equal room any is taken", "row = heapq.heappop(free[left])", "row = free[left].pop()"),
        ("a full row stays open", "some ^= bits[left]", "pass"),
    ),
    *of(
        PACKING,
        f"{OF_PACKING}::test_rows_from_a_file_are_those_in_memory",
        ("rows of a later window are those of the first", "place = row - self._first_rows[window]", "place = row"),
    ),
    *of(
        ROW_CACHE,
        f"{OF_PACKING}::test_other_rows_have_a_file_of_their_own",
        ("rows of another seed are taken", "seed if shuffle else None, capacity]", "None, shuffle, capacity]"),
        ("rows of other lengths are taken", "told = [FORMAT, lengths.fingerprint,", "told = [FORMAT, None,"),
    ),
    *of(
        ROW_CACHE,
        f"{OF_PACKING}::test_damaged_rows_are_packed_again",
        ("damaged rows stay", "shutil.rmtree(cache, ignore_errors=True)", "pass"),
    ),
    *of(
        ROW_CACHE,
        f"{OF_PACKING}::test_rows_from_a_file_are_those_in_memory",
        ("rows are packed in every process", "if records < LEAST_RECORDS:", "if True:"),
    ),
    *of(
        LENGTHS,
        f"{OF_LENGTHS}::test_lengths_are_mapped_and_their_fingerprint_is_stored",
        ("all lengths are read at every start", ", known_fingerprint=fingerprint.decode())", ")"),
    ),
    *of(
        LENGTHS,
        f"{OF_LENGTHS}::test_a_damaged_file_is_an_error",
        ("a cut file of lengths is taken", "or len(fingerprint) != FINGERPRINT_BYTES:", "or False:"),
    ),
    *of(
        LENGTHS,
        f"{OF_LENGTHS}::test_the_former_files_are_taken_over",
        ("former lengths are measured again", 'if len(saved["tokens"]) == records:', "if False:"),
        ("former lengths of other records are taken", 'if len(saved["tokens"]) == records:', "if True:"),
    ),
    *of(
        SAMPLER,
        f"{OF_SAMPLER}::test_windows_give_what_an_epoch_drawn_at_once_gives_in_any_order_of_asking",
        ("windows before are not drawn", "while self._next < number:", "while False:"),
        ("the way back starts anywhere", "self._random.set_state(self._states[known])", "pass"),
        ("rows of every epoch come alike", "[self._seed % 2**32, epoch, 2]", "[self._seed % 2**32, 0, 2]"),
    ),
    *of(
        SAMPLER,
        f"{OF_SAMPLER}::test_a_process_holds_a_few_windows_and_draws_none_twice",
        ("all windows are kept", "functools.lru_cache(WINDOWS_KEPT)", "functools.lru_cache(None)"),
    ),
    *of(
        SAMPLER,
        f"{OF_SAMPLER}::test_a_mark_spares_the_way_and_changes_nothing",
        ("a mark is not known again", 'self._states[mark["window"]] =', "_ ="),
        ("a mark stands elsewhere in the stream", 'keys, mark["place"], 0, 0.0)', "keys, 624, 0, 0.0)"),
        ("a mark is of the first window", "known = self._known(number)", "known = 0"),
        ("orders of a blend have no marks", "                order.restore(own)", "                pass"),
    ),
    *of(
        LOADER,
        f"{OF_LOADER}::test_a_resume_takes_the_mark_over_and_does_without",
        ("a mark is not taken over", 'order.restore(state.get("mark", {}))', "order.restore({})"),
        ("an older state is not read", 'order.restore(state.get("mark", {}))', 'order.restore(state["mark"])'),
    ),
    *of(
        "megatron_patch/data/loading/metadata.py",
        "tests/data/loading/test_metadata.py",
        ("braces are names", 'any(letter in pattern for letter in "{}\\\\")', "False"),
        ("what is excluded is read", "if name not in excludes]", "]"),
        ("a split without records is taken", "if not found.any():", "if False:"),
    ),
    *of(
        "megatron_patch/data/loading/dataset.py",
        "tests/data/loading/test_metadata.py",
        ("sizes are not in the fingerprint", "os.path.getsize(tar)", "0"),
        ("an index that ends early is read on", "if len(place) < 16:", "if False:"),
    ),
    *of(
        SAMPLER,
        "tests/data/loading/test_sampler.py::test_a_blend_keeps_its_weights_and_loses_no_record",
        (
            "a blend repeats records",
            "own = block * int(self._counts[part]) + int(self._block[2][offset])",
            "own = int(self._block[2][offset])",
        ),
    ),
    *of(
        PIPELINE,
        f"{OF_PIPELINE}::test_one_percent_is_allowed_and_a_record_more_is_not",
        ("one per cent is too much", "too_many = rejected > share * total", "too_many = rejected >= share * total"),
    ),
    *of(
        PIPELINE,
        "tests/data/preparation/test_torture.py::test_every_odd_record_is_accounted_for",
        (
            "the report counts texts of the last shard",
            "self._ledger.text_only += done.text_only",
            "self._ledger.text_only = done.text_only",
        ),
        (
            "the report loses repeated ids",
            "self._ledger.repeated_ids += done.repeated_ids",
            "self._ledger.repeated_ids += 0",
        ),
        ("a rejection is not written down", "self._rejections.add(rejection)", "pass"),
    ),
    *of(
        "megatron_patch/data/preparation/deduplication.py",
        f"{OF_PIPELINE}::test_duplicate_ids_are_kept_or_rejected",
        ("repeats within a block are not seen", "repeated[1:] = ordered[1:] == ordered[:-1]", "repeated[1:] = False"),
    ),
    *of(
        "megatron_patch/data/preparation/shard_writer.py",
        "tests/data/preparation/test_shard_writer.py::test_index_is_byte_equal_to_energons_own",
        (
            "the index begins a block late",
            "self._offsets.append(self._written + self._buffered)",
            "self._offsets.append(self._written + self._buffered + BLOCK_BYTES)",
        ),
    ),
    *of(
        "megatron_patch/data/preparation/journal.py",
        f"{OF_PIPELINE}::test_a_shard_that_was_damaged_meanwhile_is_written_again",
        (
            "a damaged shard is taken for whole",
            "shard.is_file() and shard.stat().st_size == size and",
            "shard.is_file() and",
        ),
    ),
    *of(
        "megatron_patch/data/preparation/workspace.py",
        f"{OF_PIPELINE}::test_a_killed_command_leaves_nothing_that_looks_finished",
        (
            "a killed preparation looks finished",
            'return output.with_name(f"{output.name}.partial")',
            "return output",
        ),
    ),
    *of(
        PIPELINE,
        f"{OF_PARTS}::test_each_shard_is_made_by_one_part_and_all_together_are_the_local_ones",
        ("every part makes all shards", "if options.part and Part.of_job(", "if False and Part.of_job("),
        (
            "records of other parts are forgotten",
            "self._ledger.of_other_parts += len(job.samples)",
            "self._ledger.of_other_parts += 0",
        ),
    ),
    *of(
        WORKSPACE,
        f"{OF_PARTS}::test_what_does_not_belong_together_is_refused_and_left",
        ("parts of other options are joined", "if different := differences(settings, now):", "if different := []:"),
        ("a part that is there is begun anew unasked", "if path.exists() and not (resume or overwrite):", "if False:"),
        (
            "a whole conversion removes parts unasked",
            "if (parts := parts_in(self.folder)) and not overwrite:",
            "if (parts := []) and not overwrite:",
        ),
    ),
    *of(
        "megatron_patch/data/preparation/journal.py",
        f"{OF_PARTS}::test_what_does_not_belong_together_is_refused_and_left",
        (
            "a join does without a part that has not begun",
            'problems = [f"part {part} has not begun" for part in sorted(missing)]',
            "problems = []",
        ),
        ("a join takes a part that has not ended", "if not journal.ended:", "if False:"),
    ),
    *of(
        "megatron_patch/data/preparation/parts.py",
        f"{OF_PARTS}::test_what_does_not_belong_together_is_refused_and_left",
        ("parts of another number share a folder", "    if counts:", "    if False:"),
    ),
    *of(
        WORKSPACE,
        f"{OF_PARTS}::test_parts_and_a_whole_conversion_do_not_share_a_folder",
        ("a part works in the folder of a whole conversion", "if (self.folder / JOURNAL).is_file():", "if False:"),
    ),
    *of(
        WORKSPACE,
        f"{OF_PARTS}::test_finished_shards_of_a_part_are_not_written_again",
        ("a join leaves out a shard that is damaged", "        if done is None:", "        if False:"),
        ("a part begins anew in place of resuming", "if not resume or not self._journal.began_with:", "if True:"),
    ),
    *of(
        "megatron_patch/sight.py",
        f"{OF_PARTS}::test_a_machine_without_the_pictures_is_refused",
        ("a file that is not here is not missed", "if file is not None and not os.path.isfile(file):", "if False:"),
        (
            "a file that was not there is not missed",
            "elif file is None and (other := _file_in(place)) is not None:",
            "elif False:",
        ),
    ),
    *of(
        "megatron_patch/data/preparation/parts.py",
        f"{OF_PARTS}::test_a_part_is_one_of_n",
        (
            "a part may have any number",
            "if part is None or not 1 <= part.number <= part.count:",
            "if part is None:",
        ),
    ),
    *of(
        PIPELINE,
        f"{OF_PARTS}::test_part_and_join_exclude_each_other",
        ("--join takes --part", "if self.join and self.part is not None:", "if False:"),
    ),
    *of(
        PIPELINE,
        f"{OF_RAY}::test_options_that_do_not_go_together",
        (
            "--engine ray takes --part",
            'if self.engine == "ray" and (self.join or self.part is not None):',
            "if False:",
        ),
        ("--engine ray takes no workers", 'if self.engine == "ray" and self.workers == 0:', "if False:"),
        (
            "--ray-address is taken without --engine ray",
            'if self.ray_address is not None and self.engine != "ray":',
            "if False:",
        ),
    ),
    *of(
        PIPELINE,
        f"{OF_RAY}::test_without_ray_the_command_says_how_to_get_it",
        ("--engine ray has no effect", '    if options.engine == "ray":', "    if False:"),
    ),
    *of(
        RAY_CLUSTER,
        f"{OF_RAY}::test_an_address_that_does_not_answer_is_refused",
        ("a Ray address is not tried first", "    if found is None:", "    if True:"),
    ),
    *of(
        RAY_CLUSTER,
        f"{OF_RAY}::test_what_a_node_answers",
        ("a node takes any folder for the output", "if path.read_text() != token[1]:", "if False:"),
    ),
    *of(
        RAY_CLUSTER,
        f"{OF_ACTORS}::test_actors_die_and_every_piece_has_its_result_in_its_place",
        ("a piece whose node died is not done again", "waiting.append((begun.number, begun.data))", "pass"),
        ("results come as they are done", "while wanted in found:", "while wanted in found or wanted + 1 in found:"),
        ("an actor that died is asked again", "self._open.pop(begun.actor, None)", "pass"),
        ("pieces pile up", "waiting[0][0] < limit and", "waiting[0][0] >= 0 and"),
        ("one actor has all pieces", "self._open[actor] >= QUEUED else", "False else"),
        ("actors go on behind the command", "for actor in self._actors.values():", "for actor in ():"),
    ),
    *of(
        RAY_CLUSTER,
        f"{OF_ACTORS}::test_an_actor_that_does_not_see_all_does_nothing",
        ("a node that joined late opens the model unseen", "        check_sight()", "        pass"),
    ),
    *of(
        RAY_CLUSTER,
        f"{OF_ACTORS}::test_what_opens_or_does_a_piece_may_refuse",
        ("a refusal on a node is a result", "            if refusal is not None:", "            if False:"),
    ),
    *of(
        RAY_CLUSTER,
        f"{OF_ACTORS}::test_a_piece_that_kills_every_process_is_given_up",
        ("a piece may kill for ever", "if self._losses[begun.number] > LOSSES:", "if False:"),
    ),
    *of(
        RAY_CLUSTER,
        f"{OF_ACTORS}::test_a_cluster_without_room_is_told",
        ("nobody tells that no GPU is left", "if not ready and not self._open and not", "if False and not"),
    ),
    *of(
        RAY_CLUSTER,
        f"{OF_ACTORS}::test_a_model_takes_a_gpu_or_the_cores_of_a_node",
        ("more models than GPUs wait for ever", "if workers is not None and workers > there:", "if False:"),
        (
            "a model takes no GPU",
            "return Shape(workers or there, cpus=1, gpus=1)",
            "return Shape(workers or there, cpus=1, gpus=0)",
        ),
    ),
    *of(
        f"{INFERENCE}/ray_engines.py",
        f"{OF_INFERENCE}/test_ray_engines.py",
        ("a node that lost its images answers for them", "        check_sight()", "        pass"),
        ("the lines of a piece are counted anew", "first=first + size * number", "first=size * number"),
    ),
    *of(
        FEATURES,
        f"{CACHED}::test_two_processes_that_write_a_shard",
        (
            "a shard is written under its own name",
            "self._file = self._unfinished.open(",
            "self._file = (self._unfinished if False else self._data).open(",
        ),
        ("what a kill left stays among the features", "            path.unlink()", "            pass"),
    ),
    *of(
        "toolkits/multimodal_data_preprocessing/tower_features.py",
        f"{CACHED}::test_a_shard_that_a_node_did_not_see_is_not_kept",
        ("a node that lost the dataset makes empty shards", "                check()", "                pass"),
    ),
    *of(
        LOADER,
        f"{OF_LOADER}::test_states_of_the_two_orders_by_modality_are_told_apart",
        ("windows of any version are one order", "(version {order.VERSION})", "(version {1 + order.VERSION})"),
    ),
    *of(
        "megatron_patch/launch/training_rules.py",
        OF_ARGUMENTS,
        (
            "rows of one length are grouped by length",
            'if values["DATA_ORDER"] in ("modality", "modality_window"):',
            'if values["DATA_ORDER"] == "modality":',
        ),
    ),
    *of(
        SAMPLER,
        f"{OF_SAMPLER}::test_steps_grouped_by_windows",
        ("steps of a later epoch lie across training's", "-epoch * self.positions % self._step_records", "0"),
        ("a window is no number of whole steps", "-(-least // step_records) * step_records", "least"),
    ),
    *of(
        RAY_WORKERS,
        f"{OF_RAY}::test_what_a_node_answers",
        ("a node that lost its images rejects records", "if lacking and (problems", "if False and (problems"),
        ("a node that joined late is not looked at", "if is_new and (problems", "if False and (problems"),
    ),
    *of(
        "megatron_patch/data/record.py",
        "tests/data/test_conversation.py::test_turns_follow_the_original_rules",
        ("a first turn of the model is kept", 'if turns[0][0] != "human":', "if False:"),
    ),
    *of(
        "megatron_patch/data/record.py",
        "tests/data/test_conversation.py::test_unusable_conversations_are_refused_with_their_reason",
        ("marks and images need not agree", "if marks != count:", "if marks > count + 9:"),
    ),
]

PATCHES = [
    *of(
        "tests/conftest.py",
        "tests/device/test_cpu.py::test_the_tests_see_no_gpu",
        (
            "tests run on GPUs",
            'os.environ["CUDA_VISIBLE_DEVICES"] = ""',
            'os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")',
        ),
    ),
    *of(
        "megatron_patch/device/cpu.py",
        "tests/device/test_cpu.py::test_megatron_computes_with_torch_where_cuda_packages_are_installed",
        ("Transformer Engine's kernels get CPU tensors", '= ("transformer_engine", "tr', '= ("tr'),
        ("Apex's kernels get CPU tensors", '"apex", "amp_C"', '"amp_C"'),
    ),
    *of(
        "megatron_patch/patches/fused_adamw.py",
        f"{OF_PATCHES}::test_torchs_adamw_steps_fused_also_after_a_load",
        ("AdamW is not fused", "group.update(fused=True,", "group.update(fused=False,"),
        ("AdamW is fused until a load", "part.optimizer.register_load_state_dict_post_hook(_set_fused)", "pass"),
    ),
    *of(
        ATTENTION,
        OF_PACKED_ATTENTION,
        (
            "short records see their neighbours",
            "torch.arange(length) * records + record",
            "torch.arange(length) + record * length",
        ),
    ),
    *of(
        COLLATOR,
        f"{OF_LOADER}::test_padding_free_batches_hold_the_records_of_padded_ones",
        ("rows are always padded", "worth_it = config.padded_length", "worth_it = False and config.padded_length"),
        ("rows are never padded", "padded * (1 - LEAST_SAVED)", "padded"),
    ),
    *of(
        "megatron_patch/patches/unfused_weight_gradients.py",
        f"{OF_PATCHES}::test_only_megatrons_own_linear_layers_lose_the_fusion",
        (
            "the output layer wants Apex",
            "config.gradient_accumulation_fusion = False",
            "config.gradient_accumulation_fusion = True",
        ),
        ("Transformer Engine's layers lose the fusion too", "config = copy.copy(config)", "config = config"),
        ("fusion is lost with Apex too", "and not layers._grad_accum_fusion_available:", "and True:"),
    ),
    *of(
        "megatron_patch/patches/adam_of_another_kind.py",
        f"{OF_PATCHES}::test_adams_take_what_the_other_kind_has_saved",
        ("FusedAdam's settings are missing", "group.setdefault(name, value)", "group.get(name, value)"),
        ("FusedAdam's step is a float", 'steps = {int(group["step"])}', 'steps = {group["step"]}'),
        ("FusedAdam begins at step 0", 'group["step"] = max(steps)', 'group["step"] = 0'),
        ("torch's Adam begins at step 0", '["step"] = torch.tensor(float(step))', '["step"] = torch.tensor(0.0)'),
    ),
]

RUNS = [
    *of(
        "megatron_patch/model/layer_specs.py",
        f"{OF_ENGINE}::test_a_frozen_weight_has_no_gradient_computed",
        (
            "Transformer Engine's layers normalise twice",
            "*(IdentityOp, TENorm, SelfAttention, MLP, {}),",
            "*(TENorm, TENorm, SelfAttention, MLP, {}),",
        ),
    ),
    *of(
        "megatron_patch/model/layer_specs.py",
        f"{OF_ENGINE}::test_a_checkpoint_goes_to_these_layers_and_back[TP1]",
        ("norms outside the layers are torch's among Transformer Engine's", "return TENorm", "return LocalNorm"),
    ),
    *of(
        CONFIG,
        f"{FREEZING}[stage 1]",
        (
            "freezing of tower and projector change places",
            "Frozen(arguments.freeze_language_model, arguments.freeze_vision_tower, arguments.freeze_projector)",
            "Frozen(arguments.freeze_language_model, arguments.freeze_projector, arguments.freeze_vision_tower)",
        ),
    ),
    *of(
        TRAINING,
        f"{FREEZING}[stage 1]",
        ("stage 1 freezes no language model", '{1: ("true", "plain")', '{1: ("false", "plain")'),
    ),
    *of(
        TRAINING,
        f"{FREEZING}[stage 2]",
        ("stage 2 freezes the language model", '2: ("false", "auto")}', '2: ("true", "auto")}'),
    ),
    *of(
        "megatron_patch/training/data_provider.py",
        SAME_RECORDS,
        ("validation goes on where it stopped", "if self.taken % self.period == 0:", "if self.taken == 0:"),
        (
            "validation starts over within itself",
            "args.eval_iters * (args.global_batch_size",
            "1 * (args.global_batch_size",
        ),
    ),
    *of(
        "megatron_patch/training/forward_step.py",
        SAME_RECORDS,
        (
            "the reported loss is half",
            "sums = torch.stack([total.detach(), count])",
            "sums = torch.stack([total.detach() / 2, count])",
        ),
    ),
    *of(
        "megatron_patch/training/pretrain.py",
        "tests/training/test_checkpoint_retention.py::test_last_and_best_of_a_run_and_export_of_the_best",
        ("saves compute checksums", "torch.serialization.set_crc32_options(False)", "pass"),
    ),
    *of(
        "megatron_patch/training/pretrain.py",
        SAME_RECORDS,
        ("the deviation of pixels is their mean", "settings.pixel_std,", "settings.data.image_mean,"),
    ),
    *of(
        GENERATION,
        GREEDY,
        (
            "an answer's token is read a position early",
            "[len(row) - 1 for row in rows]",
            "[len(row) - 2 for row in rows]",
        ),
        (
            "an answer's token is read from the padding",
            '"logits_at": found.int().argmax(1)',
            '"logits_at": torch.full_like(lasts, -1)',
        ),
        ("what was answered is not read again", "[*prompt.tokens, *answer] for", "[*prompt.tokens] for"),
        ("an image token of an answer is an image", '"prompt_lengths": prompt_lengths', '"prompt_lengths": None'),
        ("answers are of no image", '"features": features', '"features": None'),
    ),
    *of(
        GENERATION,
        f"{OF_SCORES}::test_answers_are_scored[CP2]",
        ("all context-parallel ranks hold the first positions", "mpu.get_context_parallel_rank(), parts", "0, parts"),
    ),
    *of(
        GENERATION,
        f"{OF_SCORES}::test_answers_are_scored[PP2]",
        ("the last stage alone knows the next token", "torch.distributed.broadcast(chosen", "print(chosen"),
    ),
    *of(
        GENERATION,
        f"{OF_SCORES}::test_answers_are_scored[TP2 + SP, DP2]",
        (
            "answers of data-parallel ranks stand one behind the other",
            "told[number % group.size()][number // group.size()]",
            "sum(told, [])[number]",
        ),
    ),
    *of(
        "megatron_patch/training/benchmark.py",
        f"{OF_SCORES}::test_some_questions_are_chosen_and_the_best_score_is_kept",
        ("the first questions are asked", "every[number * len(every) // count]", "every[number]"),
    ),
    *of(
        CONFIG,
        f"{OF_SCORES}::test_answers_are_scored[one process]",
        ("EVAL_BENCHMARK is ignored", "read_benchmark(arguments, folder, trained_with),", "None,"),
    ),
    *of(
        CALLBACKS,
        f"{OF_SCORES}::test_some_questions_are_chosen_and_the_best_score_is_kept",
        ("BEST_BY is ignored", 'if benchmark and args.best_by == "score"', "if False"),
    ),
    *of(
        RETENTION,
        f"{OF_SCORES}::test_some_questions_are_chosen_and_the_best_score_is_kept",
        ("the lowest score is the best", '"score": -1}', '"score": 1}'),
    ),
    *of(
        RETENTION,
        f"{OF_SCORES}::test_another_measure_begins_anew",
        ("a loss is compared with a score", "found.get(measure, SIGN[measure] * math.inf)", "[*found.values()][1]"),
    ),
    *of(
        DEVICE_CPU,
        f"{OF_CPU}::test_bf16_instructions_are_seen",
        (
            "bf16 instructions are nowhere",
            "for name in BF16_INSTRUCTIONS if name in known",
            "for name in known if False",
        ),
        ("bf16 is slow on every CPU", "    if bf16_instructions():", "    if False:"),
    ),
    *of(
        "megatron_patch/launch/__main__.py",
        f"{OF_COMMANDS}::test_a_note_says_what_this_machine_lacks",
        ("notes of a device are not told", "for note in call.notes:", "for note in ():"),
    ),
    *of(
        RULES,
        "tests/launchers/test_arguments.py::test_rules_between_training_arguments",
        ("a score without a benchmark", 'if values["BEST_BY"] == "score":', "if False:"),
        ("a benchmark without its files", 'if not values["EVAL_BENCHMARK_DATA"]:', "if False:"),
        ("files without a benchmark", '    if values["EVAL_BENCHMARK_DATA"]:', "    if False:"),
        ("a benchmark without validations", '        if values["EVAL_ITERS"] == "0":', "        if False:"),
        ("a model that TP cannot cut", "yield from geometry.uncut(", "yield from () and geometry.uncut("),
        ("records longer than the model's positions", "if text := geometry.language.too_long(", "if text := () and ("),
        (
            "a size that is not the model's",
            '        check_model_size(values["MODEL_SIZE"]',
            '        (values["MODEL_SIZE"]',
        ),
        (
            "another number of image tokens",
            'if int(values["SEQ_LEN"]) != tower.image_tokens:',
            "if False:",
        ),
    ),
    *of(
        RULES,
        f"{OF_ARGUMENTS}::test_folders_must_have_the_splits_that_are_read",
        ("a folder without the split", "if found is not None and split not in found:", "if False:"),
    ),
    *of(
        "megatron_patch/launch/stored_data.py",
        f"{OF_ARGUMENTS}::test_folders_must_have_the_splits_that_are_read",
        ("splits of no shards count", "return [name for name, empty in names if not empty]", "return [*dict(names)]"),
    ),
    *of(
        "megatron_patch/launch/rules.py",
        f"{OF_ARGUMENTS}::test_a_checkpoint_that_was_not_copied_whole_is_refused",
        ("a checkpoint that lacks a file", "return min(named - here, default=None)", "return None"),
    ),
    *of(
        RULES,
        f"{OF_ARGUMENTS}::test_stage_2_wants_a_projector_that_stage_1_has_trained",
        ("stage 2 on a new projector", "if is_stage_2 and not _resumes(call)", "if False and not _resumes(call)"),
        ("stage 1 wants a trained projector", "if is_stage_2 and not _resumes(call)", "if not _resumes(call)"),
    ),
    *of(
        RULES,
        f"{OF_ARGUMENTS}::test_a_login_of_wandb_counts_where_a_name_is_given",
        ("W&B is told unasked", "(named and _has_login(environment))", "_has_login(environment)"),
        ("a login elsewhere is W&B's", 'any(pair == ("machine", service)', 'any(pair[0] == "machine"'),
    ),
    *of(
        RULES,
        "tests/launchers/test_run_file.py::test_another_run_in_the_output_folder_is_not_continued",
        ("another run is continued", "if was is not None and was != value and not moved:", "if False:"),
        ("a checkpoint may not move", "was != value and not moved:", "was != value:"),
    ),
    *of(
        RULES,
        "tests/launchers/test_run_file.py::test_a_full_disk_is_refused_before_the_start",
        ("a full disk", "    if free < wanted:", "    if False:"),
        ("dry runs ask this disk", 'if call["DRY_RUN"] == "0" and call.is_right:', "if call.is_right:"),
        ("a run that goes on needs room for two", "if _resumes(call) else (2", "if False else (2"),
        ("one checkpoint has to fit", "wanted = count * checkpoint_bytes", "wanted = checkpoint_bytes"),
    ),
    *of(
        "megatron_patch/launch/run_file.py",
        "tests/launchers/test_run_file.py",
        ("the file wins over the environment", "isinstance(rows[name], Option) and environment.get(name)", "False"),
        ("a file of the other stage", "if launcher not in (None, os.path.basename(program)):", "if False:"),
        ("names that are none", "            if name not in rows:", "            if False:"),
        ("paths stay relative", "kept[name] = call.absolute(name)", "pass"),
    ),
    *of(
        "megatron_patch/launch/machine.py",
        f"{OF_ARGUMENTS}::test_rules_between_training_arguments",
        ("each node of a job trains alone", "if value.isdecimal() and is_of_several(int(value)):", "if False:"),
        ("an interface that is not there", "if not any(found == one or", "if not any(True or"),
    ),
    *of(
        "megatron_patch/launch/machine.py",
        f"{OF_ARGUMENTS}::test_what_a_cluster_says_must_fit_together",
        ("nodes count from 1", "        if rank >= nodes:", "        if rank > nodes:"),
        ("some processes are on no node", "if rest or not nodes:", "if not nodes:"),
    ),
    *of(
        "megatron_patch/launch/machine.py",
        f"{OF_ARGUMENTS}::test_a_port_in_use_is_refused",
        ("a port in use", "and not is_free(job.port):", "and False:"),
    ),
    *of(
        "megatron_patch/launch/machine.py",
        f"{OF_COMMANDS}::test_slurm_tells_a_node_its_place",
        ("the first node is the list", 'return prefix + re.split("[-,]", numbers)[0] + suffix', "return nodes"),
        ("jobs of SLURM share a port", "return low + job % (high - low)", "return low"),
    ),
    *of(
        "megatron_patch/launch/__main__.py",
        "tests/setup/test_outside.py",
        ("a launcher starts without packages", "and not _has_packages():", "and False:"),
    ),
    *of(
        "toolkits/environment.py",
        "tests/setup/test_outside.py",
        ("the environment is not found", "if os.access(own, os.X_OK) and", "if False and"),
        ("a command goes on without packages", "    if not missing:", "    if True:"),
    ),
    *of(
        RULES,
        "tests/launchers/test_start.py::test_a_run_that_cannot_fit_is_warned_of",
        ("a run that cannot fit is no news", "and least > memory:", "and False:"),
    ),
    *of(
        "megatron_patch/launch/heartbeat.py",
        "tests/launchers/test_heartbeat.py",
        (
            "a silent node is waited for",
            "        except TimeoutError:\n            self._lose(",
            "        except TimeoutError:\n            print(",
        ),
        ("a failure is a farewell", "if FAILURE in heard:", "if False:"),
        ("a farewell is a loss", "        elif not heard:", "        else:"),
        ("a node that vanishes is not missed", "        elif not heard:", "        elif False:"),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_a_node_whose_launcher_is_killed_ends_the_others",
        ("a lost node is waited for", "and not any(codes) and not watch.lost:", "and not any(codes):"),
    ),
    *of(
        "megatron_patch/memory.py",
        OF_PLAN + "::test_an_embedding_is_held_by_the_stages_that_use_it",
        ("a tied embedding is held twice", "and sizes.pipeline == 1) else 1)", "and sizes.pipeline == 1) else 2)"),
        ("a tied embedding is held by all stages", "and sizes.pipeline == 1) else 1)", ") else 1)"),
    ),
    *of(
        "megatron_patch/memory.py",
        OF_PLAN + "::test_activations_are_of_the_layers_and_micro_batches_of_a_stage",
        (
            "one micro-batch is in flight",
            "in_flight = min(sizes.pipeline - stage, sizes.micro_batches)",
            "in_flight = 1",
        ),
        ("attention is kept though computed again", 'if sizes.recompute == "sel":', "if False:"),
        ("context parallelism cuts no tokens", "tokens = sizes.tokens / sizes.context", "tokens = sizes.tokens"),
    ),
    *of(
        "megatron_patch/memory.py",
        OF_PLAN + "::test_frozen_layers_keep_what_gradients_pass_through",
        ("frozen layers keep nothing for a tower below", 'frozen.learns("vision_tower") or frozen', "frozen"),
        ("a later stage hands no gradients on", "or below or not first", "or below"),
    ),
    *of(
        "megatron_patch/memory.py",
        OF_PLAN + "::test_logits_are_the_last_stages",
        ("every stage has logits", "* 4 if last else 0", "* 4"),
    ),
    *of(
        "megatron_patch/memory.py",
        OF_PLAN + "::test_fully_sharded_weights_are_whole_two_layers_at_a_time",
        ("a gathered layer is the only one", "+ 2 * body / language.layers", "+ body / language.layers"),
        (
            "gradients of shards are of 32 bits",
            "(value if sizes.fully_sharded > 1 else GRADIENT_BYTES)",
            "GRADIENT_BYTES",
        ),
    ),
    *of(
        "megatron_patch/memory.py",
        OF_PLAN + "::test_a_cpus_allocator_keeps_what_is_freed",
        ("a GPU's allocator is a CPU's", 'if device == "cpu" else 0,', ","),
        ("nothing is kept", "FREED_BYTES = 4 ", "FREED_BYTES = 0 "),
    ),
    *of(
        "megatron_patch/memory.py",
        OF_PLAN + "::test_recomputed_layers_keep_their_inputs_and_one_of_them_all",
        ("the layer being recomputed holds nothing", "layers * width + of_layer", "layers * width"),
    ),
    *of(
        "megatron_patch/memory.py",
        OF_PLAN + "::test_adapters_of_the_tower_are_the_first_stages",
        ("every stage has the tower's adapters", 'if part != "language_model" and not first:', "if False:"),
    ),
    *of(
        "megatron_patch/memory.py",
        OF_PLAN + "::test_what_shares_memory_out_is_seen",
        ("Adam copies weights of 32 bits as well", '{"fp32": 8, "bf16": 12', '{"fp32": 12, "bf16": 12'),
        ("TP shares nothing out", "own = [part / sizes.tensor for part in parts]", "own = [*parts]"),
        ("the optimizer is never shared", "if sizes.distributed_optimizer else 1", "if False else 1"),
        ("recompute keeps everything", 'if sizes.recompute == "full":', "if False:"),
        ("the tower weighs nothing", "tower.parameters * first, geometry.projector", "0, geometry.projector"),
    ),
    *of(
        "megatron_patch/launch/plan.py",
        OF_PLAN + "::test_one_that_does_not_fit_ends_with_1_and_what_would",
        ("what does not fit is proposed", "            if _fit(ranks, card):", "            if True:"),
        ("the slowest comes first", "key=lambda one: one.step.seconds)", "key=lambda one: -one.step.seconds)"),
        ("a run that does not fit is right", "sys.exit(0 if one.fits else 1)", "sys.exit(0)"),
    ),
    *of(
        "megatron_patch/launch/job_words.py",
        OF_PLAN + "::test_rules_hold_for_jobs_that_are_planned_and_rehearsed",
        (
            "a job of any size has one node's ranks",
            'told = {"WORLD_SIZE": str(world)',
            'told = {"WORLD_SIZE": str(per_node)',
        ),
    ),
    *of(
        "megatron_patch/launch/job_words.py",
        OF_PLAN + "::test_a_run_of_this_machine_hinders_no_plan",
        ("a plan wants the port of a run", "str(free_port())", '"29500"'),
    ),
    *of(
        "megatron_patch/launch/doctor.py",
        OF_PLAN + "::test_the_doctor_shows_real_errors_of_what_does_not_import",
        ("a broken package is not installed", 'elif "No module named" in error and', "elif error and"),
        ("what is broken ends with 0", "sys.exit(0 if works else 1)", "sys.exit(0)"),
        ("what the CPU hides is looked at", "hidden = device.kind", "_ = device.kind"),
    ),
    *of(
        "megatron_patch/launch/doctor.py",
        OF_PLAN + "::test_the_doctor_of_a_machine_without_the_environment",
        ("what compiles is not told", 'Finding("compiler", OK, " ".join(command))', 'Finding("compiler", OK, "")'),
        ("a compiler that is left out is missing", "if reason := why_none():", 'if reason := why_none() or "none":'),
    ),
    *of(
        "megatron_patch/training/rehearsal.py",
        OF_PLAN + "::test_ranks_of_a_job_are_rehearsed",
        ("all ranks read the first slice", "settings.data, rank, size)", "settings.data, 0, size)"),
        ("all stages are the first", "model = build(pre_process=first", "model = build(pre_process=True"),
    ),
    *of(
        "megatron_patch/launch/asking.py",
        "tests/launchers/test_asking.py",
        ("sampling that means nothing", "*self.own_problems(arguments), *sampling]", "*self.own_problems(arguments)]"),
        ("the other engine's folder", 'elif arguments.engine not in ("auto", kind):', "elif False:"),
        ("an output that exists", "    if output.exists():", "    if False:"),
        ("any part goes", "if not 1 <= int(number) <= int(count):", "if False:"),
        ("models of a cluster that is not there", "if address is None and workers is not None:", "if False:"),
        ("a cluster's work is shared out otherwise too", "if address is not None and is_shared:", "if False:"),
        ("a model of several processes in one", "if arguments.ray_address is not None and processes > 1:", "if False:"),
        ("one prompt for a cluster", "        if arguments.ray_address is not None:", "        if False:"),
    ),
    *of(
        "megatron_patch/data/loading/prompts.py",
        GREEDY,
        ("the prompt holds an empty answer", "[Exchange(text, None)]", '[Exchange(text, "")]'),
        (
            "the question's images are left out",
            "encoded.pixels[: sum(plan.tiles for plan in plans)]",
            "encoded.pixels[:0]",
        ),
    ),
    *of(
        f"{INFERENCE}/prompt.py",
        OF_REQUESTS,
        ("a prompt may be longer than the positions", ">= self.max_tokens:", ">= 9 * self.max_tokens:"),
        ("an empty prompt is asked", "if self._takes_questions and not", "if not self._takes_questions and not"),
        (
            "prompts forget the settings of the training",
            "            **settings.for_data(),",
            "            **TrainingSettings(None).for_data(),",
        ),
        (
            "unmarked images are not put in front",
            "if count and not any(mark in turn.question for turn in turns):",
            "if False:",
        ),
    ),
    *of(
        f"{INFERENCE}/generation.py",
        f"{OF_INFERENCE}/test_generation.py",
        ("top_p is not followed", "if sampling.top_p < 1:", "if sampling.top_p < 0:"),
        ("temperature is not followed", "/ sampling.temperature, -1", "/ 1, -1"),
        ("all requests draw the same numbers", '{sampling.seed}/{prompt.id}"', '{sampling.seed}"'),
        ("the seed is not followed", 'Random(f"{sampling.seed}/', 'Random(f"/'),
        (
            "answers go beyond the positions",
            "min(sampling.max_new_tokens, self.max_tokens - len(prompt.tokens))",
            "sampling.max_new_tokens",
        ),
    ),
    *of(
        "megatron_patch/data/answer.py",
        f"{OF_INFERENCE}/test_generation.py",
        ("half a character is streamed", "rstrip(BROKEN).rstrip()", "rstrip()"),
        ("a caption goes on behind its line", 'return self._ends_at_newline and "', 'return False and "'),
    ),
    *of(
        "megatron_patch/model/key_value_cache.py",
        CACHED_KEYS,
        ("padding is looked at", "self._is_padded = not bool(real.all())", "self._is_padded = False"),
        ("padded prompts see what follows", "(self._mask & (then <= now))", "(self._mask & (then <= end))"),
        ("every token takes the place of the last", "self._length += count", "self._length += 0"),
        (
            "tokens stand at the first position",
            "self._positions[:, self._length : end].T",
            "0 * self._positions[:, :count].T",
        ),
    ),
    *of(
        LLAVA,
        CACHED_KEYS,
        ("the first token is continued", "hidden_states[-1:]", "hidden_states[:1]"),
    ),
    *of(
        f"{INFERENCE}/run.py",
        f"{OF_RUN}::test_parts_that_do_not_belong_together_are_refused",
        ("parts of another number lie side by side", "    if counts:", "    if False:"),
        ("a merge does without a part", "    if missing:", "    if False:"),
        ("a merge takes parts of other settings", "        _check_settings(part)", "        pass"),
        ("a merge takes a part that is cut off", "if summary.lines != len(part.lines()):", "if False:"),
        ("a part is begun beside a whole run", "if job.part[1] > 1 and whole.exists():", "if False:"),
    ),
    *of(
        f"{INFERENCE}/run.py",
        f"{OF_RUN}::test_parts_one_of_them_interrupted_give_the_same_file",
        (
            "a part that goes on asks the first part's lines",
            "first = lines.start + done",
            "first = done",
        ),
        ("a part that is done is asked again", "    if job.target.exists():", "    if False:"),
    ),
    *of(
        "megatron_patch/launch/asking.py",
        f"{OF_RUN}::test_the_command",
        ("a single prompt takes --part", "if arguments.merge or arguments.part != (1, 1):", "if False:"),
    ),
    *of(
        f"{INFERENCE}/run.py",
        OF_RUN,
        ("half a line stays", "file.truncate(end)", "file.truncate()"),
        ("a job goes on with other settings", "    if different:", "    if not different and not now:"),
        ("files of a job are not looked at", "for problem in job_problems(", "for problem in () and job_problems("),
        (
            "a job begins anew",
            "first = lines.start + done",
            "first = lines.start",
        ),
    ),
    *of(
        f"{INFERENCE}/prompt_file.py",
        OF_RUN,
        ("a line may hold two prompts", "if len(found) > 1:", "if len(found) > 2:"),
        ("a conversation may end with its answer", "if len(turns) % 2 == 0:", "if not turns:"),
    ),
    *of(
        f"{INFERENCE}/server.py",
        OF_SERVER,
        ("requests of any size are read", "if int(length) > self.server.most_bytes:", "if int(length) < 0:"),
        ("pages of other sites may ask", '!= "application/json":', '== "application/xml":'),
        ("an answer goes on for nobody", "pieces.close()", "list(pieces)"),
        ("another model's requests are answered", "not in (None, self.model):", "in ():"),
        ("what is not known is passed over", "if body.get(name) not in idle:", "if body.get(name) in ():"),
        (
            "images are looked for elsewhere",
            'if not (comma and head.startswith("data:")',
            'if not (comma and head.startswith("")',
        ),
    ),
    *of(
        f"{INFERENCE}/chat.py",
        f"{OF_INFERENCE}/test_chat.py",
        ("a chat forgets its answers", "            if said:", "            if not said:"),
        ("a chat forgets its images", "[*self._images, *self._waiting]", "[*self._waiting]"),
    ),
    *of(
        f"{INFERENCE}/compare.py",
        f"{OF_INFERENCE}/test_compare.py",
        ("probabilities are those of the other's token", "told[place][::-1]", "told[place]"),
    ),
    *of(
        TRAINING,
        FIRST_STEP,
        ("the launcher keeps WEIGHT_DECAY", 'megatron="--weight-decay"', 'megatron=""'),
        ("ADAM_BETA2 goes elsewhere", 'megatron="--adam-beta2"', 'megatron="--adam-eps"'),
        ("the launcher keeps CLIP_GRAD", 'megatron="--clip-grad"', 'megatron=""'),
    ),
    *of(
        "megatron_patch/training/parameter_groups.py",
        FIRST_STEP,
        (
            "tower and projector change their rates",
            "for part, module in PARTS.items()",
            'for part, module in zip(PARTS, ("language_model", "vision_projection", "vision_model"))',
        ),
    ),
    *of(
        "megatron_patch/training/parameter_groups.py",
        f"{EFFECTS}::test_a_modules_lowest_rate_keeps_the_ratio",
        ("a module's rate ends at 0", '"min_lr": chosen.learning_rate * ratio', '"min_lr": 0.0'),
        ("a module's decay ends elsewhere", '"end_wd": chosen.weight_decay}', '"end_wd": 0.0}'),
    ),
    *of(
        "megatron_patch/training/pretrain.py",
        f"{RECOMPUTED}[attention of the decoder, layers of the tower]",
        ("TOWER_AC is ignored", "tower_recompute=args.vision_tower_recompute", "tower_recompute=None"),
    ),
    *of(
        "megatron_patch/training/callbacks.py",
        f"{RECOMPUTED}[attention of the decoder, layers of the tower]",
        ("every rank is traced", "args.trace_iterations and args.rank in args.trace_ranks", "args.trace_iterations"),
    ),
    *of(
        TRAINING,
        f"{RECOMPUTED}[the first three layers of the decoder, attention of the tower]",
        ("the launcher keeps RECOMPUTE_LAYERS", 'call["RECOMPUTE_LAYERS"]', '"1"'),
        ("the launcher keeps DETERMINISTIC", 'megatron="--deterministic-mode"', 'megatron=""'),
    ),
    *of(
        "megatron_patch/training/ema.py",
        "tests/training/test_ema.py::test_the_average_follows_its_formula_over_a_resume[parallelism0]",
        (
            "the average follows too fast",
            "weight.detach().float(), 1.0 - self.decay)",
            "weight.detach().float(), self.decay)",
        ),
    ),
    *of(
        RETENTION,
        f"{OF_RETENTION}::test_the_last_the_best_and_the_unfinished_stay",
        (
            "the best checkpoint is deleted",
            "sorted(set(finished[:-last]) - protected)",
            "sorted(set(finished[:-last]))",
        ),
        (
            "one checkpoint too many is retained",
            "sorted(set(finished[:-last]) - protected)",
            "sorted(set(finished[: -last - 1]) - protected)",
        ),
        ("one checkpoint more is retained", "finished[:-last]", "finished[: -last - 1]"),
    ),
    *of(
        RETENTION,
        f"{OF_RETENTION}::test_leftovers_go_and_whole_ones_never",
        (
            "whole checkpoints are taken for leftovers",
            "if number != newest and not checkpoint_format(path)",
            "if number != newest",
        ),
    ),
    *of(
        RETENTION,
        f"{OF_RETENTION}::test_best_refers_to_one_checkpoint",
        ("best/ keeps the one before", "if number != iteration:", "if False:"),
    ),
    *of(
        "megatron_patch/training/graceful_stop.py",
        "tests/training/test_graceful_stop.py::test_signal_saves_within_an_iteration",
        ("a signal is not looked at", "_anywhere(bool(_received), limit", "_anywhere(False, limit"),
        (
            "a signal to all ends the loader workers",
            "if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():",
            "if True:",
        ),
    ),
    *of(
        "megatron_patch/training/graceful_stop.py",
        "tests/training/test_graceful_stop.py::test_time_limit_by_the_clock",
        ("no iteration to spare before the limit", "SPARE_ITERATIONS = 2", "SPARE_ITERATIONS = 0"),
        (
            "the last save counts instead of the longest iteration",
            "return now + save + SPARE_ITERATIONS",
            "return now + SPARE_ITERATIONS",
        ),
    ),
    *of(
        "megatron_patch/training/loss_spikes.py",
        "tests/training/test_loss_spikes.py::test_a_leap_is_measured_by_the_median",
        ("a spike is measured by the mean", "statistics.median(self.losses)", "statistics.mean(self.losses)"),
        ("a spike needs no history", "FEWEST_LOSSES = 10", "FEWEST_LOSSES = 9"),
    ),
    *of(
        "megatron_patch/training/loss_spikes.py",
        "tests/training/test_loss_spikes.py::test_the_step_is_dropped_and_the_record_named",
        ("a bad step is trained on", "        if any_not_finite:", "        if False:"),
        (
            "bad records are named a step late",
            "number = iteration + 1  # Megatron",
            "number = iteration + 2  # Megatron",
        ),
    ),
    *of(
        "megatron_patch/step_flop.py",
        "tests/training/test_throughput.py::test_anchors_of_llava_7b",
        (
            "frozen layers cost as trained ones",
            "2 * weights * tokens * (1 + self.inputs_gradient + self.weights_gradient)",
            "2 * weights * tokens * 3",
        ),
        ("attention counts half", "return 4 * width * pairs", "return 2 * width * pairs"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_a_single_stage_has_no_bubble_and_many_micro_batches_have_little",
        (
            "a bubble per micro-batch",
            "bubble = (sum(stages) - slowest)",
            "bubble = m * (sum(stages) - slowest)",
        ),
        (
            "virtual stages fill as slowly",
            "(sum(stages) - slowest) / plan.virtual_stages",
            "(sum(stages) - slowest)",
        ),
    ),
    *of(
        "toolkits/benchmark/published_rows.py",
        f"{OF_STEP_TIME}::test_a_programs_share_is_set_by_its_first_row",
        ("every program reaches as much as Megatron", "found * first.published / first.predicted()", "found"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_gradients_cross_a_ring",
        ("a ring moves everything", "return (n - 1) / n * amount", "return amount"),
        ("frozen weights are summed too", "if not frozen.language_model:", "if True:"),
        ("gathered weights wait for a forward pass", "gathered - backward_s / 2)", "gathered + backward_s / 2)"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_trained_and_recomputed_layers_pay_for_more_traffic",
        ("weights' gradients gather nothing", "(4 + 2 * (not plan.frozen.language_model))", "4"),
        ("what is computed again gathers nothing", 'backward + 4 * (plan.recompute == "full")', "backward"),
        ("states in 32 bits move as in 16", '= 4 if plan.precision == "fp32" else 2  # of an', "= 2  # of an"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_what_each_stage_trains_is_updated_there",
        (
            "the tower's MLP is not updated",
            "4 * tower.hidden**2 + 2 * tower.hidden * tower.ffn_hidden",
            "4 * tower.hidden**2",
        ),
        (
            "the first stage has the last one's head",
            "plan.pipeline == 1 and not language.tied_embeddings",
            "not language.tied_embeddings",
        ),
        ("a tied head is held twice", "(2 if with_head else 1)", "2"),
        ("32 bits are written as 16", '32 if plan.precision == "fp32" else 34', "34"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_padding_is_what_the_longest_of_a_micro_batch_costs",
        ("pairs of tokens cost nothing in a mix", "Work(tokens=1), Work(pairs=1)", "Work(tokens=1), Work(pairs=0)"),
    ),
    *of(
        "megatron_patch/launch/plan.py",
        f"{OF_PLAN}::test_a_run_that_fits_is_planned",
        (
            "a plan's checkpoint is without Adam's state",
            "one.plan.frozen, one.plan.precision)",
            "one.plan.frozen, one.plan.precision, optimizer=False)",
        ),
        ("the only stage is called the first", "if len(one.ranks) > 1 else", "if one.ranks else"),
    ),
    *of(
        "megatron_patch/launch/plan.py",
        f"{OF_PLAN}::test_long_runs_and_stages_are_told_as_such",
        ("a long run is told in hours", "if seconds < 48 * 3600 else", "if seconds > 48 * 3600 else"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_keys_and_values_pass_again_for_recomputed_layers_and_hide_behind_attention",
        ("keys and values pass once", '2 * self._decoder_backward + (plan.recompute != "false")', "0"),
        ("attention hides behind nothing", "context = max(0.0, context - traffic.attention_s())", "pass"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_hidden_states_pass_from_stage_to_stage",
        ("all stages are in one node", "self._link(2, inner * 2)", "self._link(2, 2)"),
        ("gradients stay in their stage", "return (1 + self._decoder_backward) * (moved", "return (moved"),
        ("every rank of TP sends all", "plan.context * width / plan.tensor", "plan.context * width"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_a_ring_between_nodes_uses_the_adapters_of_its_devices",
        ("one adapter of a node is used", "max(1, card.devices_per_node * n // reach)", "1"),
        ("hops between nodes are as quick", "card.network_latency_s\n", "card.node_latency_s\n"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_shared_out_weights_are_gathered_for_every_micro_batch",
        ("shared out weights are gathered once", "return plan.micro_batches * max(", "return max("),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_images_are_read_by_the_workers_that_have_a_core",
        ("workers need no cores", "min(plan.workers, card.cores * plan.tensor", "min(plan.workers, 99 * plan.tensor"),
        ("every rank reads all images", "work.images / plan.tiles / plan.data", "work.images / plan.tiles"),
    ),
    *of(
        "megatron_patch/evaluation/benchmarks/mmbench.py",
        "tests/evaluation/test_benchmarks.py::test_a_value_that_cannot_be_is_refused",
        ("what is no base64 is read as such", "validate=True", "validate=False"),
    ),
    *of(
        "megatron_patch/ray_cluster.py",
        "tests/test_ray_actors.py::test_another_folder_of_the_same_name_is_not_the_commands",
        ("any file is the token", "if path.read_text() != token[1]:", "if False:"),
        ("the probe of a folder stays", "probe.unlink()", "pass"),
    ),
    *of(
        "toolkits/multimodal_data_preprocessing/command_line.py",
        "tests/data/preparation/test_pipeline.py::test_who_interrupts_a_conversion_is_told_how_it_goes_on",
        ("nobody hears how a conversion goes on", 'print("interrupted; the same', 'str("interrupted; the same'),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_recompute_is_a_second_forward_pass",
        ("recompute is free", "return flop_of_parts(geometry, ALL_FROZEN, again).decoder", "return 0"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_what_cannot_be_is_refused",
        ("a step is cut short on paper", "if self.global_batch % (self.micro_batch * self.data):", "if False:"),
        ("virtual stages of a single stage", "if self.virtual_stages > 1 and", "if False and"),
        ("no tensor parallelism at all", "if getattr(self, name) < 1:", "if False:"),
        ("any recompute", "if self.recompute not in RECOMPUTES:", "if False:"),
    ),
    *of(
        STEP_TIME,
        f"{OF_STEP_TIME}::test_a_precision_that_a_card_lacks_is_refused",
        ("fp8 on any card", "if plan.precision not in card.peak:", "if False:"),
    ),
    *of(
        LOADER,
        f"{OF_WAITING}::test_time_without_a_batch_is_counted_and_no_other",
        ("no wait is counted", "self.waited_s += time.perf_counter() - began", "self.waited_s += 0"),
    ),
    *of(
        COUNTERS,
        f"{OF_WAITING}::test_the_share_is_that_of_the_rank_that_waited_most",
        (
            "the share is of all waits since the start",
            "(later - earlier for later, earlier in",
            "(later for later, _ in",
        ),
        ("the rank that waits least speaks", "return max(waits, default=0.0) / seconds", "return min(waits) / seconds"),
    ),
    *of(
        COUNTERS,
        f"{OF_WAITING}::test_a_small_share_is_not_told",
        ("any share is told", "if share < WORTH_TELLING:", "if False:"),
    ),
    *of(
        COUNTERS,
        f"{OF_WAITING}::test_a_run_whose_images_are_large_says_so_once_an_interval",
        ("ranks keep their waits to themselves", "waits[rank] = round(", "waits[rank] = 0 * round("),
    ),
    *of(
        "megatron_patch/training/logging.py",
        f"{OF_WAITING}::test_a_run_whose_images_are_large_says_so_once_an_interval",
        ("waits are not told", "print_rank_last(told)", "pass"),
    ),
    *of(
        "toolkits/benchmark/benchmark_loading.py",
        "tests/test_benchmark_data.py::test_half_of_a_pair_is_refused",
        ("a dataset without its checkpoint", "if (given.dataset is None) != (given.checkpoint is None):", "if False:"),
        ("a step without its time", "if (given.step_records is None) != (given.step_seconds is None):", "if False:"),
        (
            "a store of what is in one already",
            "if given.store_latency_ms is not None and given.dataset",
            "if False and ()",
        ),
    ),
    *of(
        "toolkits/benchmark/slow_store.py",
        "tests/test_benchmark_data.py::test_the_loader_is_measured",
        ("the slow store is not slow", "await asyncio.sleep(latency_s)", "await asyncio.sleep(0)"),
    ),
    *of(
        "toolkits/benchmark/benchmark_loading.py",
        "tests/test_benchmark_data.py::test_workers_that_a_step_needs",
        (
            "all workers count as one",
            "rate.records / rate.seconds / max(1, rate.workers)",
            "rate.records / rate.seconds",
        ),
    ),
    *of(
        "megatron_patch/training/timer.py",
        "tests/training/test_callbacks.py::test_stopwatch_takes_side_jobs_out",
        ("a save within an evaluation counts twice", "if not self._inside:", "if True:"),
    ),
    *of(
        "megatron_patch/weight_names.py",
        "tests/training/test_formats.py::test_weights_are_strict_and_extra_states_are_not[missing]",
        ("a missing weight is not missed", "MISSING: [name for name in wanted if name not in found],", "MISSING: [],"),
    ),
    *of(
        "megatron_patch/patches/missing_extra_states.py",
        "tests/patches/test_patches.py::test_extra_states_that_nobody_wrote_are_not_asked_for",
        ("every extra state is asked for", "return is_extra and value.unique_key not in stored", "return False"),
    ),
    *of(
        "megatron_patch/training/preflight.py",
        "tests/training/test_config.py::test_a_refusal_of_the_entry_is_one_sentence",
        ("a refusal has another exit code", "sys.exit(2)", "sys.exit(1)"),
    ),
    *of(
        "megatron_patch/geometry.py",
        "tests/training/test_config.py::test_sliding_window_is_refused_beyond_and_accepted_within",
        (
            "a row beyond the window is accepted",
            "and length > self.sliding_window:",
            "and length > 2 * self.sliding_window:",
        ),
    ),
    *of(
        CONFIG,
        "tests/training/test_config.py::test_what_does_not_fit_is_refused",
        (
            "a run does not look at the launchers' rules",
            "    if found:\n        raise UserError(",
            "    if False:\n        raise UserError(",
        ),
    ),
]

OFFLOAD = [
    *of(
        "megatron_patch/training/offload.py",
        "tests/training/test_config.py::test_an_offload_that_cannot_be_resumed_is_refused",
        ("an offload without resume starts", "and not device.have_transformer_engine():", "and False:"),
    ),
]

LAUNCHERS = [
    *of(
        ROWS,
        "tests/launchers/test_arguments.py::test_rules_between_training_arguments",
        (
            "one wrong argument alone is accepted",
            "        if self._complaints:",
            "        if len(self._complaints) > 1:",
        ),
    ),
    *of(
        TRAINING,
        f"{WORDS}::test_every_layout_and_number_arrives",
        ("losses are means of means", '        "--calculate-per-token-loss",', ""),
        ("the cosine ends too late", '"--lr-decay-iters", call["TRAIN_ITERS"]', '"--lr-decay-iters", "100000"'),
        (
            "tensor parallelism without sequence parallelism",
            '["--sequence-parallel"] if call.int("TP") > 1 else []',
            "[]",
        ),
    ),
    *of(
        TRAINING,
        f"{OF_COMMANDS}::test_fp16_sums_gradients_in_32_bits",
        ("fp16 sums gradients in 16 bits", '"65536", "--accumulate-allreduce-grads-in-fp32"]', '"65536"]'),
    ),
    *of(
        TRAINING,
        f"{OF_COMMANDS}::test_fp8_scales_by_the_present_tensor_unless_told_otherwise",
        ("no run with fp8 can resume", '"--fp8-recipe", call["FP8_RECIPE"]]', '"--fp8-recipe", "delayed"]'),
        (
            "nothing is said of delayed scaling",
            'if call["PR"] == "fp8" and call["FP8_RECIPE"] == "delayed":',
            "if False:",
        ),
    ),
    *of(
        TRAINING,
        f"{WORDS}::test_every_precision_and_memory_saving_together",
        (
            "another layout cannot load the optimizer's state",
            'words += ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]',
            'words += ["--use-distributed-optimizer"]',
        ),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_a_failure_is_the_exit_status",
        (
            "every failure ends with 1",
            "sys.exit(_as_exit_code(cause.exit_code))",
            "sys.exit(1)",
        ),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_nothing_starts_before_the_check_has_passed",
        ("a failed check stops nothing", "or not os.read(answer, 1):", "or not [os.read(answer, 1)]:"),
        ("nobody waits for the check", "        if not os.read(descriptor, 1):", "        if False:"),
        ("what came before the folder is in no log", "for line in early:", "for line in ():"),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_a_signal_during_the_check_ends_everything",
        ("the check goes on after a signal", "    to_end = signal.SIGKILL", "    to_end = signal.SIGURG"),
    ),
    *of(
        "megatron_patch/tokenizer_files.py",
        "tests/test_tokenizer_files.py::test_the_class_of_the_configuration_is_not_missed",
        (
            "no tokenizer is found by its model's class",
            'if not config.get("model_type") or not tokenizer.get("tokenizer_class"):',
            'if not config.get("model_type"):',
        ),
    ),
    *of(
        "megatron_patch/tokenizer_files.py",
        "tests/training/test_cold_start.py::test_a_launcher_starts_cold_and_its_losses_are_those_of_a_warm_start",
        ("the check imports the compiler", "config=config or _bare_config(Path(folder))", "config=config"),
    ),
    *of(
        "megatron_patch/patches/async_save_copies.py",
        f"{OF_ASYNC_SAVES}::test_the_writer_of_an_asynchronous_save_gets_copies",
        ("one thread makes all copies", "threads = ThreadPoolExecutor(count)", "threads = ThreadPoolExecutor(1)"),
        ("all copies are one part", "parts[int(begun / share)]", "parts[0]"),
        ("copies are made after the planning", "[_Copies(own_tensors(state))]", "[_Copies([])]"),
        ("synchronous saves copy", "if PersistentAsyncCaller._persistent_process is not None:", "if True:"),
        (
            "the trainer's tensors are sent as well",
            "(rank, buckets, queue), preload_fn",
            "(rank, request.async_fn_args[1], queue), preload_fn",
        ),
        ("a call takes too many buffers", "buffers[:BUFFERS]", "buffers"),
        ("copies lie over each other", "[:BUFFERS], self._end)", "[:BUFFERS], ALIGNMENT)"),
        ("a copy begins where the former one ends", "-len(as_bytes) % ALIGNMENT", "0"),
        ("what is no run is taken for its memory", "None if tensor.is_contiguous() else tensor.stride()", "None"),
        (
            "what is no run is copied in the order of its memory",
            "tensor.is_cpu and tensor.is_contiguous()",
            "tensor.is_cpu",
        ),
        ("a tensor of nothing is sought in memory", "    if count == 0:", "    if False:"),
    ),
    *of(
        "megatron_patch/patches/forked_writer.py",
        f"{OF_ASYNC_SAVES}::test_the_writer_is_forked_and_ends_with_its_trainer",
        (
            "the writer imports everything again",
            'get_process(rank, "fork", *priorities',
            "get_process(rank, mp_mode, *priorities",
        ),
        ("the writer outlives its trainer", "        end_with_parent()", "        pass"),
        ("the writer waits for threads that it has not", "torch.set_num_threads(1)", "pass"),
    ),
    *of(
        "megatron_patch/patches/synchronous_save_queue.py",
        f"{OF_ASYNC_SAVES}::test_the_writer_is_forked_and_ends_with_its_trainer",
        ("the manager of results outlives its trainer", "manager.start(end_with_parent)", "manager.start()"),
    ),
    *of(
        "megatron_patch/patches/ended_writer.py",
        f"{OF_ASYNC_SAVES}::test_a_killed_writer_ends_the_run",
        ("a killed writer is waited for", "not self.process.is_alive():", "False:"),
        ("a writer that works is called dead", "not self.process.is_alive():", "True:"),
        ("nobody waits for a save", "            if not blocking:", "            if True:"),
        ("the exit waits for a killed writer", "queue.cancel_join_thread()", "pass"),
    ),
    *of(
        "megatron_patch/patches/loaded_in_place.py",
        f"{OF_LOADS}::test_tensors_are_loaded_without_copies",
        ("torch's reader reads all", "return Reader(found.path) if", "return found if"),
        ("every dtype is read as it is", "saved.dtype != target.dtype or", ""),
        ("the target's memory is taken for a run", "or not target.is_contiguous():", "or False:"),
        ("every part is read from the beginning", "saved.position + first * saved.dtype.itemsize", "saved.position"),
        ("bytes are counted as elements", "first * saved.dtype.itemsize", "first"),
        ("halves are joined in memory of their own", "whole = beside_each_other(parts)", "whole = None"),
        ("of two halves in two places the first is loaded", "torch.cat(list(parts))", "parts[0]"),
        ("what was read twice is read once", "replace(plan, items=left)", "replace(plan, items=[])"),
    ),
    *of(
        "megatron_patch/patches/loaded_in_place.py",
        f"{OF_LOADS}::test_a_box_of_elements_that_follow_each_other",
        ("columns are taken for a run", "if inside and length != size:", "if False:"),
        ("a single row of a matrix is no run", "inside |= length > 1", "inside = True"),
    ),
    *of(
        "megatron_patch/patches/loaded_in_place.py",
        f"{OF_LOADS}::test_tensors_beside_each_other_are_joined_without_a_copy",
        (
            "parts of one tensor are joined over a gap",
            "(first.untyped_storage().data_ptr(), end):",
            "(first.untyped_storage().data_ptr(), part.storage_offset()):",
        ),
        (
            "parts of two tensors are joined",
            "begins = part.untyped_storage().data_ptr(), ",
            "begins = first.untyped_storage().data_ptr(), ",
        ),
        ("columns are joined as rows", " and part.is_contiguous()", ""),
        (
            "parts of other widths are joined",
            "(part.dtype, part.shape[1:]) == (first.dtype, first.shape[1:])",
            "part.dtype == first.dtype",
        ),
    ),
    *of(
        "megatron_patch/patches/embedding_gradient.py",
        f"{OF_PATCHES}::test_an_embeddings_gradient_is_that_of_its_rows",
        ("a token's last place takes its row's gradient", "buffer.index_add_(0,", "buffer.index_copy_(0,"),
        ("a sequence-parallel embedding is looked up whole", " or self.reduce_scatter_embeddings", ""),
        (
            "an embedding without a buffer has no gradient",
            '"hook_needs_no_gradient", False)',
            '"hook_needs_no_gradient", True)',
        ),
    ),
    *of(
        "megatron_patch/patches/hooks_without_gradients.py",
        f"{OF_PATCHES}::test_an_embeddings_gradient_is_that_of_its_rows",
        ("an overlapping reduction misses the embedding", "= not model.ddp_config.overlap_grad_reduce", "= True"),
    ),
    *of(
        "megatron_patch/patches/written_in_pieces.py",
        f"{OF_PATCHES}::test_checkpoints_are_written_in_pieces",
        (
            "a tensor is written in one call",
            "write_item(transforms, Pieces(stream), *args",
            "write_item(transforms, stream, *args",
        ),
        ("every piece is the first", "whole[begin : begin + PIECE]", "whole[:PIECE]"),
    ),
    *of(
        "megatron_patch/patches/parts_saved_in_place.py",
        f"{OF_PATCHES}::test_parts_of_tensors_are_saved_without_copies",
        ("parts are copied before they are saved", "or not found.numel():", "or True:"),
        ("what does not lie in one piece is saved as if it did", "or not found.is_contiguous() or", "or"),
    ),
    *of(
        "megatron_patch/patches/synchronous_save_queue.py",
        f"{OF_PATCHES}::test_a_synchronous_save_starts_no_process",
        (
            "every first save starts a process",
            'if not getattr(global_vars._GLOBAL_ARGS, "async_save", False):',
            "if False:",
        ),
        (
            "the writer of asynchronous saves has a queue of its own",
            'if not getattr(global_vars._GLOBAL_ARGS, "async_save", False):',
            "if True:",
        ),
        ("every save starts a process", "        if not managed:", "        if True:"),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_a_signal_reaches_every_process_and_is_no_failure",
        ("only SIGTERM is passed on", "FORWARDED = (signal.SIGTERM, signal.SIGUSR1)", "FORWARDED = (signal.SIGTERM,)"),
    ),
    *of(
        "megatron_patch/launch/machine.py",
        "tests/launchers/test_start.py::test_two_nodes_of_a_cluster_job_meet",
        ("nodes share a folder of logs", "{stamp}-node{job.node_rank}", "{stamp}"),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_another_process_that_dies_during_the_check_is_told_after_it",
        (
            "an end of another process ends the check",
            "while not answered and first.exit_code is None:",
            "while not answered and all(process.exit_code is None for process in processes):",
        ),
        ("a worker of the check holds the end up", "if not answered or not os.read", "if not os.read"),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_a_process_whose_starter_has_died_does_not_begin",
        (
            "they begin when processes.py dies",
            "if not os.read(descriptor, 1):",
            "if os.read(descriptor, 1) is None:",
        ),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_the_cause_is_neither_who_was_ended_nor_who_lost_its_peer",
        ("who was ended is the cause", "return process.ended_by_us and process.exit_code < 0, p", "return False, p"),
        ("who lost its peer is the cause", "process.exit_code > 0 and survivor, process.rank", "process.rank"),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_ctrl_c_ends_everything_at_once",
        ("Ctrl-C waits for an iteration", "        to_end = signal.SIGINT", "        to_end = signal.SIGTERM"),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_neither_a_closed_console_nor_a_hangup_under_nohup_ends_a_run",
        ("nohup is in vain", "if signal.getsignal(number) != signal.SIG_IGN:", "if True:"),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_a_rollback_starts_again_without_a_check",
        ("a rollback overwrites the logs", "glob('attempt_*')", "glob('none')"),
        ("rollbacks have no end", '[f"max_{kind}"] - 1', '[f"max_{kind}"]'),
    ),
    *of(
        "megatron_patch/device/cpu.py",
        "tests/device/test_cpu.py::test_nothing_imports_the_compiler_and_who_does_finds_no_duplicates",
        ("torch.compile imports the compiler", '_replace(torch, "compile", compile_nothing)', "pass"),
        ("an optimizer imports the compiler", "inner.__dynamo_disable = inner", "pass"),
        ("a step imports the compiler", "kind.step = torch.no_grad()(", "torch.no_grad()("),
        ("stand-ins are duplicates", "    return lambda *_, **__: None", "    return print"),
    ),
]

TOOLS = [
    *of(
        "toolkits/benchmark/benchmark_startup.py",
        "tests/test_benchmark_startup.py::test_cpu_seconds_are_those_of_all_processes_and_not_of_waiting",
        ("the CPU's seconds of a run are its shell's", "                found += map", "                _ = map"),
        ("those of ended processes are left out", "sum(map(int, fields[11:15]))", "sum(map(int, fields[11:13]))"),
    ),
    *of(
        "tests/gpu/on_one_gpu.py",
        "tests/gpu/test_on_one_gpu.py::test_the_throughput_runs_pass_the_parser",
        ("one GPU saves the optimizer state of a 7B", '[*words, "--no-save-optim"]', "words"),
        ("steps of one micro-batch are measured", "MICRO_BATCHES * micro_batch}", "micro_batch}"),
    ),
    *of(
        "examples/setup_environment.sh",
        "tests/setup/test_setup_environment.py::test_a_gpu_machine_without_a_compiler_is_warned",
        ("a missing compiler is not said", "! command -v gcc clang >/dev/null", "false"),
    ),
    *of(
        "toolkits/model_checkpoints_convertor/llava/verify_conversion.py",
        "tests/conversion/test_verify.py::test_processes_get_the_accelerators_environment",
        (
            "the verifier keeps the accelerator's environment",
            "os.environ | device.backend().environment(nodes=1)",
            "os.environ",
        ),
    ),
    *of(
        "toolkits/model_checkpoints_convertor/llava/verify_worker.py",
        "tests/conversion/test_verify.py::test_a_worker_sets_its_device_before_anything_else",
        ("every process of the verifier is on the first GPU", "torch.get_device_module(here).set_device(here)", "pass"),
    ),
]

FEATURE_CACHE = [
    *of(
        OF_FEATURES,
        f"{CACHED}::test_other_weights_are_refused_and_those_of_a_run_are_the_same",
        ("features of another tower are read", "told.update(value.view(-1).view(torch.uint8).numpy())", "pass"),
        (
            "a checkpoint saved in bf16 is another tower",
            "value = weights[name].to(dtype).contiguous()",
            "value = weights[name].contiguous()",
        ),
    ),
    *of(
        CONFIG,
        f"{CACHED}::test_other_weights_are_refused_and_those_of_a_run_are_the_same",
        (
            "a resumed run is judged by the tower it started from",
            "    if has_checkpoint(arguments.load) and not arguments.lora_rank:\n        step",
            "    if False:\n        step",
        ),
    ),
    *of(
        OF_FEATURES,
        f"{CACHED}::test_a_tower_that_is_trained_is_refused",
        ("features stand still while the tower learns", "if not arguments.freeze_vision_tower:", "if False:"),
    ),
    *of(
        OF_FEATURES,
        f"{CACHED}::test_random_weights_and_several_folders_are_refused",
        ("one folder's features for a list of folders", "if is_blend(arguments.train_dataset_path):", "if False:"),
    ),
    *of(
        FEATURES,
        f"{CACHED}::test_another_dataset_is_refused",
        ("features of another dataset are read", 'own = {"dataset": self.dataset, "weights', 'own = {"weights'),
    ),
    *of(
        FEATURES,
        f"{CACHED}::test_other_images_or_another_dtype_are_refused",
        ("features of other images are read", "return {**self.images, **self.architecture, **own}", "return own"),
        ("features of EXIF-turned images are read", '"resample", "apply_exif_orientation")', '"resample")'),
        (
            "features of whole images for tiles",
            '"image_tiles": f"{config.tile_columns}x{config.tile_rows}"',
            '"image_tiles": "1x1"',
        ),
        ("features of another dtype are read", ', "dtype": self.dtype}', "}"),
    ),
    *of(
        FEATURES,
        f"{CACHED}::test_an_incomplete_cache_is_refused",
        ("a shard that is cut off is read", "data.stat().st_size != rows * self._row_bytes", "False"),
    ),
    *of(
        FEATURES,
        f"{CACHED}::test_records_of_every_place_are_found",
        (
            "a record's features are its neighbour's",
            "read = os.preadv(shard.file.fileno(), [view], first * self",
            "read = os.preadv(shard.file.fileno(), [view], 0 * self",
        ),
        ("a bad image is no reason to leave a record out", "if str(own) in shard.unusable:", "if False:"),
    ),
    *of(
        CONFIG,
        f"{CACHED}::test_images_are_not_decoded",
        (
            "the option reaches no loader",
            "feature_cache=None if arguments.feature_cache is None",
            "feature_cache=None if True",
        ),
    ),
    *of(
        CONFIG,
        f"{CACHED}::test_other_images_or_another_dtype_are_refused",
        ("nobody looks at the cache", "    if arguments.feature_cache is not None:", "    if False:"),
    ),
    *of(
        "megatron_patch/step_flop.py",
        "tests/training/test_throughput.py::test_an_image_whose_features_are_cached_costs_no_tower",
        ("a tower that does not run counts as work", "seen = work.images - work.cached", "seen = work.images"),
    ),
    *of(
        "megatron_patch/training/forward_step.py",
        f"{CACHED}::test_the_run_is_the_one_without[one process]",
        ("cached features are left behind", 'features=batch["features"] if first else None', "features=None"),
    ),
    *of(
        "toolkits/multimodal_data_preprocessing/cache_tower_features.py",
        f"{CACHED}::test_an_interrupted_cache_goes_on",
        ("shards of something else are kept", "if (partial / KEY).is_file():", "if False:"),
        ("finished shards are made again", "if shard_rows(partial, name) is None]", "if True]"),
    ),
    *of(
        "toolkits/multimodal_data_preprocessing/cache_tower_features.py",
        f"{CACHED}::test_a_disk_that_is_too_small_is_refused",
        ("a disk that is too small is filled", "if needed > free:", "if False:"),
    ),
]

EVALUATION = [
    *of(
        "megatron_patch/evaluation/metrics/vqa_accuracy.py",
        f"{OF_METRICS}::test_the_vqa_normaliser",
        ("articles stay", "if word not in ARTICLES", "if True"),
        ("a mark beside a space parts words", 'f"{mark} " in answer or f" {mark}" in answer', "False"),
        ("the period of a number goes", r'"\.(?!\d)"', r'"\."'),
        ("numbers stay words", "NUMBERS.get(word, word)", "word"),
        ("contractions stay", "CONTRACTIONS.get(word, word)", "word"),
    ),
    *of(
        "megatron_patch/evaluation/metrics/vqa_accuracy.py",
        f"{OF_METRICS}::test_vqa_accuracy_leaves_one_person_out",
        ("nobody is left out", "(sum(same) - one) / 3", "sum(same) / 3"),
    ),
    *of(
        "megatron_patch/evaluation/metrics/text.py",
        (f"{OF_METRICS}::test_anls_reference_values", f"{OF_METRICS}::test_relaxed_accuracy"),
        ("half of the characters are enough", "if distance < ANLS_THRESHOLD", "if distance <= ANLS_THRESHOLD"),
        ("case counts for ANLS", "answer.lower().split()", "answer.split()"),
        ("the bound is outside", "<= TOLERANCE * abs(wanted)", "< TOLERANCE * abs(wanted)"),
        ("a percentage is its number", "Fraction(text) / (100 if percent else 1)", "Fraction(text)"),
        ("a comma ends a number", '.replace(",", "")', ""),
    ),
    *of(
        "megatron_patch/evaluation/metrics/text.py",
        f"{OF_METRICS}::test_exact_match_is_to_the_letter_and_word_match_is_not",
        ("a final period counts", '.rstrip(".")', ""),
        ("space around an answer counts", "answer.strip() in {", "answer in {"),
    ),
    *of(
        "megatron_patch/evaluation/metrics/choice.py",
        f"{OF_METRICS}::test_the_letter_that_an_answer_means",
        ("the article is a letter", "(?![AI] [a-z])", ""),
        (
            "two letters are the first",
            "return found.pop() if len(found) == 1 else None",
            "return min(found, default=None)",
        ),
        ("a choice within another is meant too", "if len(found) == 1), None)", "if found), None)"),
    ),
    *of(
        "megatron_patch/evaluation/metrics/yes_no.py",
        f"{OF_METRICS}::test_what_pope_takes_an_answer_for",
        ("`not` is yes", '{"no", "not"}', '{"no"}'),
        ("an empty answer is yes", 'return ""', 'return "yes"'),
    ),
    *of(
        "megatron_patch/evaluation/metrics/yes_no.py",
        (
            f"{OF_METRICS}::test_mme_figures_are_the_published_ones",
            f"{OF_METRICS}::test_pope_figures_are_those_of_scikit_learn",
        ),
        ("one right question makes an image right", "sum(map(all, by_image", "sum(map(any, by_image"),
        ("recall is precision", "_ratio(hits, true_yes)", "_ratio(hits, said_yes)"),
    ),
    *of(
        "megatron_patch/evaluation/metrics/__init__.py",
        f"{OF_METRICS}::test_circular_accuracy_wants_every_rotation",
        ("one rotation is enough", "min(each) == 1", "max(each) == 1"),
    ),
    *of(
        "megatron_patch/evaluation/metrics/captions.py",
        (
            f"{OF_METRICS}::test_a_caption_metric_without_its_library_is_refused",
            f"{OF_METRICS}::test_cider_without_java_is_refused",
        ),
        ("a metric begins without its library", "if metric in PACKAGES and", "if False and"),
        ("CIDEr begins without Java", 'if metric == "cider" and', "if False and"),
    ),
    *of(
        "megatron_patch/evaluation/question.py",
        (
            f"{OF_METRICS}::test_rotations_keep_what_is_right",
            f"{OF_EVALUATION}::test_swapping_leaves_no_image_in_its_place",
        ),
        ("the right letter stays where it was", "LETTERS[(right - turn) % count]", "LETTERS[right]"),
        ("images stay in their place", "order[1:] + order[:1]", "order"),
    ),
    *of(
        "megatron_patch/evaluation/question.py",
        f"{OF_EVALUATION}::test_swapping_one_image_is_refused",
        ("one image is swapped for itself", "if len(images) < 2:", "if False:"),
    ),
    *of(
        "megatron_patch/evaluation/source.py",
        (
            f"{OF_READERS}::test_a_missing_image_is_named_with_its_record",
            f"{OF_READERS}::test_a_missing_key_is_named_with_file_and_record",
        ),
        ("an image that is not there is asked about", "if (place / name).is_file():", "if True:"),
        ("a value of another kind passes", "if not isinstance(value, kinds):", "if False:"),
    ),
    *of(
        "megatron_patch/evaluation/source.py",
        f"{OF_READERS}::test_images_may_lie_elsewhere",
        ("--images goes nowhere", "[self._images] if self._images is not None else", "[] if False else"),
    ),
    *of(
        "megatron_patch/evaluation/source.py",
        f"{OF_READERS}::test_the_file_itself_is_data_too_and_two_files_are_not",
        ("one of two files is taken", "if len(found) > 1:", "if False:"),
    ),
    *of(
        "megatron_patch/evaluation/benchmarks/__init__.py",
        (f"{OF_READERS}::test_an_id_stands_once", f"{OF_READERS}::test_videos_of_seed_are_left_out_and_counted"),
        ("two questions share an id", "if times > 1:", "if False:"),
        ("a benchmark without questions runs", "if not questions:", "if False:"),
    ),
    *of(
        "megatron_patch/evaluation/benchmarks/mmbench.py",
        f"{OF_READERS}::test_rotations_in_a_file_of_mmbench_belong_together",
        ("rotations are questions of their own", 'if rotated else ""', 'if False else ""'),
    ),
    *of(
        "megatron_patch/evaluation/run.py",
        f"{OF_EVALUATION}::test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes",
        ("half a batch is kept", "if kept + len(batch) > len(lines):", "if kept >= len(lines):"),
        ("what a kill left stays", "opened.truncate(lines[kept - 1][1] if kept else 0)", "None"),
    ),
    *of(
        "megatron_patch/evaluation/run.py",
        f"{OF_EVALUATION}::test_parts_and_their_merge_are_the_whole",
        (
            "parts are merged in their own order",
            "range(number - 1, len(batches), count), mine",
            "range(len(mine)), mine",
        ),
        ("a part that is cut off is merged", "if len(lines) != wanted:", "if False:"),
        ("parts of two numbers are merged", "if len(counts) != 1:", "if not counts:"),
    ),
    *of(
        "megatron_patch/evaluation/run.py",
        f"{OF_EVALUATION}::test_answers_to_other_questions_are_refused",
        ("answers to other questions are kept", 'if (line.get("id"), line.get("prompt")) !=', "if False and () !="),
        ("more answers than questions", "if len(lines) > len(questions):", "if False:"),
    ),
    *of(
        "megatron_patch/evaluation/run.py",
        (
            f"{OF_EVALUATION}::test_other_settings_in_the_same_folder_are_refused",
            f"{OF_EVALUATION}::test_new_weights_in_the_same_folder_are_refused",
            f"{OF_EVALUATION}::test_a_foreign_folder_is_left_alone",
            f"{OF_EVALUATION}::test_a_part_that_another_process_writes_is_refused",
        ),
        ("settings are not compared", "    if names:", "    if False:"),
        ("new weights are not seen", "path.stat().st_mtime_ns) for", "0) for"),
        ("a foreign folder is filled", "(output.is_dir() and all(", "(output.is_dir() or all("),
        ("two processes write one file", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_UN"),
    ),
    *of(
        "megatron_patch/evaluation/run.py",
        f"{OF_EVALUATION}::test_another_metric_only_scores",
        ("answered questions are asked again", "return file.is_file() and len(", "return False and len("),
    ),
    *of(
        "examples/llava_mcore/evaluate_llava.py",
        (
            f"{OF_EVALUATION}::test_choices_are_asked_in_every_rotation",
            f"{OF_EVALUATION}::test_images_are_swapped_for_the_control",
            f"{OF_EVALUATION}::test_a_part_that_is_none_is_refused",
        ),
        ("--circular goes nowhere", "    if arguments.circular:", "    if False:"),
        (
            "choices are rotated that are none",
            "if not any(question.choices for",
            "if False and any(question.choices for",
        ),
        ("--swap-images goes nowhere", "    if arguments.swap_images:", "    if False:"),
    ),
    *of(
        "megatron_patch/evaluation/report.py",
        f"{OF_EVALUATION}::test_an_image_that_cannot_be_read_counts_as_wrong_and_is_said",
        ("a bad image ends the contact sheet", "with suppress(RecordError):", "with suppress():"),
    ),
]

ADAPTERS = "tests/model/test_adapters.py::test_logits_loss_and_gradients_equal_transformers"
ADAPTED, ADAPTED_CUT = f"{ADAPTERS}[one process]", f"{ADAPTERS}[TP2+SP]"
OF_LORA = "tests/training/test_lora.py"
LORA_OPTIONS, LORA_HELD = (
    f"{OF_LORA}::test_options_reach_the_model",
    f"{OF_LORA}::test_a_checkpoint_holds_what_is_trained_alone",
)
LORA_EXPORTS = f"{OF_LORA}::test_peft_and_the_merged_export_answer_alike"
LORA = [
    *of(
        "megatron_patch/lora.py",
        ADAPTED,
        ("rsLoRA is scaled as LoRA", "(math.sqrt(self.rank) if self.rslora else self.rank)", "self.rank"),
    ),
    *of(
        "megatron_patch/lora.py",
        "tests/training/test_throughput.py::test_adapters_cost_their_products_and_what_lies_above_them",
        ("targets are not looked at", "if self.targets == (ALL,) or one.target in self.targets)", "if True)"),
    ),
    *of(
        "megatron_patch/model/adapters.py",
        ADAPTED,
        ("nothing is scaled", "self._across_ranks(narrow) * self.lora.scaling", "self._across_ranks(narrow)"),
        (
            "q, k and v stand behind each other",
            "blocks = groups if megatron.endswith",
            "blocks = 1 if megatron.endswith",
        ),
        (
            "the tower's heads are the decoder's groups",
            "else self._geometry.tower.heads",
            "else self._geometry.language.groups",
        ),
    ),
    *of(
        "megatron_patch/model/adapters.py",
        ADAPTED_CUT,
        ("A of a part of the tokens is not summed", "weight.sequence_parallel = config.sequence_parallel", "pass"),
        (
            "narrow products of sequence parallelism stay apart",
            "(False, True): gather_from_sequence",
            "(False, True): copy_to_tensor_model_parallel_region, (9, 9): gather_from_sequence",
        ),
        (
            "row-parallel products are cut, not summed",
            "(True, True): reduce_scatter_to_seq",
            "(True, True): gather_from_sequence_parallel_region, (9, 9): reduce_scatter_to_seq",
        ),
    ),
    *of(
        "megatron_patch/model/adapters.py",
        f"{OF_LORA}::test_dropout_is_of_training_alone",
        ("nothing is dropped", "if not self.training or self.lora.dropout == 0:", "if True:"),
        ("validation drops too", "if not self.training or self.lora.dropout == 0:", "if self.lora.dropout == 0:"),
    ),
    *of(
        "megatron_patch/model/llava.py",
        f"{OF_LORA}::test_everything_frozen_but_adapters_learns",
        (
            "a recomputed layer's input asks for no gradient",
            "            embedded.requires_grad_()",
            "            pass",
        ),
    ),
    *of(
        "megatron_patch/model/llava.py",
        LORA_HELD,
        (
            "a checkpoint of adapters holds the base",
            "for name, value in state.items() if name in trained}",
            "for name, value in state.items()}",
        ),
    ),
    *of(
        "megatron_patch/model/llava.py",
        ADAPTED,
        (
            "no gradient passes through a tower with adapters",
            "return adapted or not self.frozen.vision_tower",
            "return not self.frozen.vision_tower",
        ),
    ),
    *of(
        "megatron_patch/training/adapters.py",
        LORA_OPTIONS,
        ("LORA_ALPHA goes nowhere", "        arguments.lora_alpha,", "        None,"),
        ("LORA_DROPOUT goes nowhere", "        arguments.lora_dropout,", "        0.0,"),
        ("LORA_TARGETS goes nowhere", "        arguments.lora_targets,", '        ("all",),'),
        ("LORA_PARTS goes nowhere", "        arguments.lora_parts,", '        ("language_model",),'),
        ("LORA_RSLORA goes nowhere", "        arguments.lora_rslora,", "        False,"),
    ),
    *of(
        "megatron_patch/lora.py",
        LORA_OPTIONS,
        ("the default of LORA_ALPHA is LORA_RANK", "2.0 * rank if alpha", "1.0 * rank if alpha"),
    ),
    *of(
        "megatron_patch/step_flop.py",
        LORA_OPTIONS,
        ("parts with adapters are not frozen", "dict.fromkeys(lora.parts, True) if lora else {}", "{}"),
    ),
    *of(
        "megatron_patch/step_flop.py",
        "tests/training/test_throughput.py::test_adapters_cost_their_products_and_what_lies_above_them",
        ("adapters cost nothing", "return self.lora.parameters(geometry, part) if self.lora else 0", "return 0"),
        (
            "nothing passes through frozen layers with adapters",
            "or (self.lora is not None and part in self.lora.parts)",
            "or False",
        ),
    ),
    *of(
        "megatron_patch/memory.py",
        "tests/launchers/test_plan.py::test_local_layers_keep_no_inputs_of_their_matrices",
        (
            "local layers are planned as Transformer Engine's",
            'if device == "gpu" and frozen.learns',
            "if frozen.learns",
        ),
    ),
    *of(
        "megatron_patch/memory.py",
        "tests/launchers/test_plan.py::test_adapters_are_planned",
        ("no memory for adapters", "strict=True) if not is_frozen) + adapters", "strict=True) if not is_frozen)"),
        ("both matrices are cut", "(cut / sizes.tensor + whole)", "(cut + whole) / sizes.tensor"),
    ),
    *of(
        "megatron_patch/training/adapters.py",
        f"{OF_LORA}::test_a_resume_on_another_base_is_refused",
        ("another base is taken", "if saved is not None and sha256 != saved.sha256:", "if False:"),
    ),
    *of(
        "megatron_patch/checkpoint_files.py",
        f"{OF_LORA}::test_a_resume_on_another_base_is_refused",
        ("the hash is of names alone", "hashlib.sha256(data).hexdigest()", "len(data)"),
    ),
    *of(
        "megatron_patch/training/adapters.py",
        f"{OF_LORA}::test_a_resume_with_other_adapters_is_refused",
        (
            "other numbers are taken",
            '        if told:\n            raise UserError(\n                f"{arguments.load}: the run cannot',
            '        if False:\n            raise UserError(\n                f"{arguments.load}: the run cannot',
        ),
        (
            "whole weights go on from adapters",
            "    if lora is None:\n        if saved is not None:",
            "    if lora is None:\n        if False:",
        ),
        (
            "a projector that is no longer trained is taken",
            "if saved is not None and saved.trained != trained:",
            "if False:",
        ),
    ),
    *of(
        "megatron_patch/training/config.py",
        f"{OF_LORA}::test_adapters_that_do_not_fit_the_run_are_refused",
        ("peft's folder is not looked at", "if lora is not None and arguments.lora_adapter is not None:", "if False:"),
    ),
    *of(
        RULES,
        f"{OF_LORA}::test_a_checkpoint_of_adapters_is_no_start",
        ("a run begins with adapters as if they were weights", "    if folder.lora is not None:", "    if False:"),
    ),
    *of(
        RULES,
        f"{OF_ARGUMENTS}::test_rules_between_training_arguments",
        ("LORA_ALPHA without LORA_RANK passes", "            if values[name] != default:", "            if False:"),
        (
            "adapters beside nothing pass",
            'values["LORA_RANK"] != "0" and values["PRETRAIN_CHECKPOINT_PATH"] == "none"',
            "False",
        ),
        (
            "targets that nothing has pass",
            "if lora is not None and (problem := lora.problem(geometry)):",
            "if False and (problem := lora.problem(geometry)):",
        ),
    ),
    *of(
        "megatron_patch/conversion/adapters.py",
        LORA_EXPORTS,
        (
            "the export leaves the adapters out",
            "return box.float() + self._last[1]",
            "return box.float() + 0 * self._last[1]",
        ),
        (
            "the export takes the base's projector",
            "return self._own.reader if key in self._own.trained else self._base",
            "return self._base",
        ),
        (
            "peft looks for layers that are not there",
            'modules = {"language_model": "language_model."',
            'modules = {"language_model": "language."',
        ),
    ),
    *of(
        "megatron_patch/conversion/layouts.py",
        LORA_EXPORTS,
        ("a merged export says that it is of adapters", "PROVENANCE, CONFIG, LORA) and", "PROVENANCE, CONFIG) and"),
    ),
    *of(
        "megatron_patch/checkpoint_files.py",
        f"{OF_LORA}::test_an_export_without_its_base_is_refused",
        ("BASE_CKPT_PATH goes nowhere", "(folder or Path(record.base)) / record", "Path(record.base) / record"),
    ),
    *of(
        "megatron_patch/training/load_model.py",
        f"{OF_LORA}::test_the_checkpoint_answers_as_the_merged_export",
        ("inference leaves the adapters out", "    load_adapters(model, checkpoint)\n", "    pass\n"),
    ),
]

OF_PIECES = "tests/training/test_parallelism.py::test_losses_equal_a_single_process[SGD without clipping-FSDP]"
FSDP = [
    *of(
        "megatron_patch/patches/torch_fsdp2.py",
        OF_PIECES,
        ("gradients are means over the ranks", "scaling_factor * mesh.size()", "scaling_factor"),
        ("gate and up are cut apart", "axes[1:] if id(weight) in gated", "axes[0:] if id(weight) in gated"),
    ),
    *of(
        "megatron_patch/patches/torch_fsdp2.py",
        "tests/training/test_resume.py::test_kill_and_resume[FSDP]",
        ("Adam's state is not restored", '"skip_load_to_model_and_opt": False', '"skip_load_to_model_and_opt": True'),
    ),
    *of(
        "megatron_patch/patches/torch_fsdp2.py",
        "tests/patches/test_torch_fsdp2.py::test_hybrid_shares_weights_out_within_a_node",
        ("hybrid is full", 'if get_args().fsdp != "hybrid" or group.size()', "if True or group.size()"),
    ),
    *of(
        "megatron_patch/training/pretrain.py",
        "tests/training/test_data_options.py::test_text_alone_on_one_rank_hangs_no_other",
        (
            "text alone asks for no weights of the tower",
            'tower_for_text=args.fsdp != "false",',
            "tower_for_text=False,",
        ),
    ),
    *of(
        CONFIG,
        "tests/training/test_config.py::test_ways_of_fsdp_are_torchs_own",
        ("grad is full", '"grad": (*_FSDP2, "--torch-fsdp2-no-reshard-after-forward"),', '"grad": _FSDP2,'),
        ("FSDP goes nowhere", "*FSDP_ARGUMENTS[arguments.fsdp],", ""),
    ),
    *of(
        RULES,
        f"{OF_ARGUMENTS}::test_rules_between_training_arguments",
        ("FSDP beside what it cannot have passes", "if values.get(name, right) != right:", "if False:"),
    ),
]

GEOMETRY = "megatron_patch/geometry.py"
TILE_PLAN, OF_TILES = "megatron_patch/tile_plan.py", "tests/test_tile_plan.py"
OF_NEW_MODELS = "tests/model/test_any_resolution.py::test_logits_loss_and_gradients_equal_transformers[one process]"
OF_NEW_RUNS = "tests/training/test_any_resolution.py"
OF_NEW_CONVERSIONS = "tests/conversion/test_any_resolution.py"
OF_ANSWERS = "tests/inference/test_any_resolution.py::test_both_engines_give_transformers_greedy_tokens"
ANY_RESOLUTION = [
    *of(
        "megatron_patch/model_sizes.py",
        "tests/conversion/test_room.py::test_a_model_may_have_the_size_of_its_name",
        ("names of models are no sizes", "and not also_low <= parameters < also_high:", "and True:"),
        ("every larger model is a 7B", '"7B": (8_050_000_000, 8_200_000_000)', '"7B": (7_800_000_000, 8_200_000_000)'),
    ),
    *of(
        TILE_PLAN,
        f"{OF_TILES}::test_as_many_tokens_as_in_transformers",
        (
            "padding's features are not rounded to 7 places (wide)",
            "int(round(height * (columns / width), 7))",
            "int(height * (columns / width))",
        ),
        (
            "padding's features are not rounded to 7 places (tall)",
            "int(round(width * (rows / height), 7))",
            "int(width * (rows / height))",
        ),
        ("features are shrunk later", "if ratio > 1.1 else kept", "if ratio > 1.2 else kept"),
        ("no newline is counted", "shown[0] * (shown[1] + 1)", "shown[0] * shown[1]"),
    ),
    *of(
        TILE_PLAN,
        f"{OF_TILES}::test_of_grids_that_show_as_much_the_smaller_is_taken",
        ("the grid that wastes least is not looked for", "and wasted < least_wasted", "and False"),
    ),
    *of(
        TILE_PLAN,
        f"{OF_TILES}::test_pixels_equal_those_of_transformers",
        ("of equal grids the last is taken", "wasted < least_wasted", "wasted <= least_wasted"),
        (
            "an image is fitted a pixel too small",
            "math.ceil(width * (rows_px / height))",
            "int(width * (rows_px / height))",
        ),
    ),
    *of(
        TILE_PLAN,
        f"{OF_TILES}::test_several_images_of_one_record_are_padded_squares_in_onevision_only",
        ("several images are cut into tiles in OneVision", "return self.several_plain and images > 1", "return False"),
        ("several images are squares in NeXT", "return self.several_plain and images > 1", "return images > 1"),
    ),
    *of(
        TILE_PLAN,
        f"{OF_TILES}::test_candidates_that_no_tile_fills_are_named",
        ("a grid that tiles do not fill passes", "side < side_px or side % side_px", "side < side_px"),
    ),
    *of(
        IMAGE,
        f"{OF_TILES}::test_pixels_equal_those_of_transformers",
        (
            "the base tile comes last",
            "np.concatenate([base[None], tiles.reshape(-1, 3, side, side)])",
            "np.concatenate([tiles.reshape(-1, 3, side, side), base[None]])",
        ),
        (
            "the image lies at the left edge",
            "((columns_px - width) // 2, (rows_px - height) // 2)",
            "(0, (rows_px - height) // 2)",
        ),
    ),
    *of(
        IMAGE,
        f"{OF_TILES}::test_the_size_by_the_header_is_that_of_the_image",
        (
            "images on their side have the header's size",
            "return image.width, image.height",
            "return image.height, image.width",
        ),
        (
            "sizes follow the EXIF tag in any case",
            "elif apply_exif_orientation and image.getexif()",
            "elif image.getexif()",
        ),
    ),
    *of(
        LLAVA,
        OF_NEW_MODELS,
        ("features of the padding are kept", "grid[top : rows * patches - top,", "grid[0 : rows * patches,"),
        ("features are shrunk without mixing", 'mode="bilinear")[0]', 'mode="nearest")[0]'),
        (
            "tiles lie in one row",
            "view(rows, columns, patches, patches, width).transpose(1, 2)",
            "view(rows, columns, patches, patches, width)",
        ),
        ("no newline ends a row", "newline.expand(shown[0], 1, width)", "0 * newline.expand(shown[0], 1, width)"),
        (
            "no newline behind one of several images",
            "newline.expand(newlines, width)",
            "0 * newline.expand(newlines, width)",
        ),
    ),
    *of(
        LLAVA,
        f"{OF_NEW_RUNS}::test_stage_1_trains_the_projector_alone",
        (
            "image_newline is trained with a frozen LLM",
            "(self.image_newline, self.frozen.language_model)",
            "(self.image_newline, False)",
        ),
    ),
    *of(
        "megatron_patch/training/forward_step.py",
        f"{OF_NEW_RUNS}::test_losses_equal_a_single_process[llava_next-TP2 + SP]",
        ("plans are not sent", "send(cu_seqlens), send(plans)", "send(cu_seqlens), plans"),
    ),
    *of(
        CONFIG,
        f"{OF_NEW_RUNS}::test_losses_equal_a_single_process[llava_next-TP2 + SP]",
        ("the loader knows no rule", "any_resolution=geometry.any_resolution,", "any_resolution=None,"),
    ),
    *of(
        COLLATOR,
        f"{OF_NEW_RUNS}::test_losses_equal_a_single_process[llava_next-TP2 + SP]",
        (
            "plans of the first record alone",
            "for row in kept for plan in row.plans",
            "for row in kept[:1] for plan in row.plans",
        ),
    ),
    *of(
        SETTINGS,
        f"{OF_NEW_CONVERSIONS}::test_hub_to_hub",
        (
            "a new model for any resolution is shown crops",
            'ANY_RESOLUTION if self.geometry().any_resolution else "crop"',
            '"crop"',
        ),
    ),
    *of(
        "megatron_patch/conversion/table.py",
        f"{OF_NEW_CONVERSIONS}::test_hub_to_hub",
        ("image_newline is in no table", "if geometry.kind.any_resolution:", "if False:"),
    ),
    *of(
        "megatron_patch/conversion/plan.py",
        f"{OF_NEW_CONVERSIONS}::test_a_new_next_counts_tokens_as_its_processor_does",
        (
            "a new newline is as large as its dimensions are many",
            "drawn / math.sqrt(geometry.language.hidden)",
            "drawn",
        ),
    ),
    *of(
        "megatron_patch/conversion/plan.py",
        f"{OF_NEW_CONVERSIONS}::test_a_whole_llava_has_its_kind_already",
        (
            "MODEL_KIND is ignored for a whole LLaVA",
            "if additions.kind is not None:\n        raise",
            "if False:\n        raise",
        ),
        ("an unknown kind passes", 'check_known("model kind", additions.kind, LLAVA_KINDS)', "pass"),
    ),
    *of(
        "megatron_patch/conversion/hub_files.py",
        f"{OF_NEW_CONVERSIONS}::test_a_processor_with_other_grids_is_refused",
        ("a processor of other grids passes", 'values.get("image_grid_pinpoints", pinpoints) != pinpoints', "False"),
    ),
    *of(
        "megatron_patch/conversion/hub_files.py",
        f"{OF_NEW_CONVERSIONS}::test_a_new_onevision_has_video_token_and_grids",
        ("OneVision gets no <video>", "(IMAGE_TOKEN, VIDEO_MARK) if video_token else (IMAGE_TOKEN,)", "(IMAGE_TOKEN,)"),
    ),
    *of(
        GEOMETRY,
        f"{OF_NEW_CONVERSIONS}::test_ways_of_seeing_that_are_not_built_are_refused",
        ("a model without newline passes", 'if not config.get("use_image_newline_parameter", True):', "if False:"),
        ("an unknown vision_aspect_ratio passes", "if kind.aspect_ratio and most is None:", "if False:"),
    ),
    *of(
        "megatron_patch/inference/chat.py",
        "tests/inference/test_chat.py::test_videos_and_images_of_a_conversation",
        (
            "a video is forgotten after its question",
            "self._videos, self._waiting_videos = videos, []",
            "self._waiting_videos = []",
        ),
        (
            "a reset keeps videos",
            "        self._videos: list[Frames] = []\n",
            '        self._videos = getattr(self, "_videos", [])\n',
        ),
        (
            "a model without videos is noticed with the question",
            'self._engine.prepare(Request(path.name, (Exchange(f"{VIDEO_MARK}\\n?", None),), videos=(frames,)))',
            "pass",
        ),
    ),
    *of(
        "examples/llava_mcore/quickstart/train_tower.py",
        "tests/quickstart/test_quickstart_parts.py::test_the_tower_learns_to_see",
        ("the tower learns in a layer that LLaVA does not see", "FEATURE_LAYER = -2", "FEATURE_LAYER = -1"),
    ),
    *of(
        "megatron_patch/conversion/original_layout.py",
        "tests/conversion/test_original_layout.py::test_onevision_in_the_original_layout",
        (
            "a tower among the tunable parts is told to be set",
            'and "mm_vision_tower" not in (',
            'and "no part" not in (',
        ),
    ),
    *of(
        "megatron_patch/patches/own_optimizer_state.py",
        "tests/training/test_optimizer_state.py::test_boxes_are_the_elements_in_order",
        ("a range within a row begins at the row", "if first > last:", "if False:"),
        ("part of a row is the whole row", "if start % row == 0 and stop % row == 0 and", "if start % row == 0 and"),
    ),
    *of(
        "megatron_patch/patches/own_optimizer_state.py",
        "tests/training/test_optimizer_state.py::test_parts_lie_where_their_parameter_does",
        ("every part is the first of its piece", "begin += count", "begin += 0"),
        ("a piece begins with its parameter", "end - begins)", "end)"),
        ("layers are no dimension", "(0,) * lead + indices, strict", "indices + (0,) * lead, strict"),
    ),
    *of(
        "megatron_patch/patches/own_optimizer_state.py",
        "tests/training/test_optimizer_state.py::test_each_rank_saves_its_own_and_a_run_goes_on",
        ("both halves of a gated MLP are the first", "piece.data.storage_offset() - parameter.storage_offset()", "0"),
        (
            "a second rank's state is a copy of the first's",
            "replica = (*whole.replica_id[:2], self.distributed_optimizer_instance_id)",
            "replica = whole.replica_id",
        ),
        (
            "state of the second parameter is the first's",
            "loaded in state[number].items()",
            "loaded in state[0].items()",
        ),
    ),
    *of(
        "megatron_patch/patches/own_optimizer_state.py",
        "tests/training/test_optimizer_state.py::test_a_state_that_is_another_weights_is_refused",
        (
            "what is loaded is the weight that it is compared with",
            'found["param"] = torch.empty_like(found["param"])',
            'found["param"] = found["param"]',
        ),
    ),
    *of(
        "megatron_patch/patches/exchanged_in_place.py",
        "tests/patches/test_exchanged_in_place.py::test_gradients_and_weights_are_exchanged_without_copies",
        ("gradients are reduced in a copy", "if async_op or not _is_part(output, input):", "if True:"),
        ("weights are gathered in a copy", "if async_op or not _is_part(input, output):", "if True:"),
        ("the first rank sends all", "group_src=rank)", "group_src=0)"),
    ),
    *of(
        "megatron_patch/training/config.py",
        "tests/training/test_config.py::test_ranks_of_gpus_read_a_checkpoint_in_parts",
        (
            "ranks of a CPU read in parts",
            "in_parts = device.backend().READS_IN_PARTS and arguments.use_distributed_optimizer",
            "in_parts = arguments.use_distributed_optimizer",
        ),
        (
            "ranks without a shared optimizer read in parts",
            "in_parts = device.backend().READS_IN_PARTS and arguments.use_distributed_optimizer",
            "in_parts = device.backend().READS_IN_PARTS",
        ),
    ),
    *of(
        "megatron_patch/device/cuda.py",
        "tests/training/test_config.py::test_ranks_of_gpus_read_a_checkpoint_in_parts",
        ("every rank reads all", "READS_IN_PARTS = True", "READS_IN_PARTS = False"),
    ),
    *of(
        "megatron_patch/patches/shifted_optimizer_state.py",
        "tests/training/test_optimizer_state.py::test_a_state_that_is_another_weights_is_refused",
        ("another weight's state is loaded", "and not _close(saved, weight):", "and False:"),
    ),
    *of(
        "megatron_patch/conversion/original_layout.py",
        "tests/conversion/test_original_layout.py::test_grids_that_are_not_built_are_refused",
        (
            "videos pooled in another way pass",
            'check_known("mm_spatial_pool_mode", values.get("mm_spatial_pool_mode") or "bilinear", ("bilinear",))',
            "pass",
        ),
    ),
    *of(
        "megatron_patch/conversion/original_layout.py",
        "tests/conversion/test_original_layout.py::test_next_in_the_original_layout",
        ("an original NeXT is taken for 1.5", 'return "llava_next"', 'return "llava"'),
        ("derived configs have no grids", '"image_grid_pinpoints": config["image_grid_pinpoints"],', ""),
    ),
    *of(
        "megatron_patch/conversion/original_layout.py",
        "tests/conversion/test_original_layout.py::test_onevision_in_the_original_layout",
        ("an original OneVision sees the layer below", "        layer = -1\n", "        layer = -2\n"),
        (
            "an original OneVision has the tiles of its kind",
            'aspect = values.get("image_aspect_ratio") if LLAVA_KINDS[kind].aspect_ratio else None',
            "aspect = None",
        ),
        (
            "derived configs name the layer of the shortened tower",
            '-1 - taken_off if taken_off else config["vision_feature_layer"]',
            'config["vision_feature_layer"]',
        ),
        (
            "derived configs name one number of tiles",
            'config.get("vision_aspect_ratio", geometry.kind.aspect_ratio)',
            "geometry.kind.aspect_ratio",
        ),
        (
            "nothing is said of a video's newline",
            "if LLAVA_KINDS[original.kind].video_token and newline",
            "if False and newline",
        ),
    ),
    *of(
        "megatron_patch/conversion/original_layout.py",
        "tests/conversion/test_original_layout.py::test_siglip_inside_has_lost_its_last_layer",
        (
            "a pooling head that is not there is expected",
            "config.update({flag: any(",
            "config.update({flag: not any(",
        ),
    ),
    *of(
        "megatron_patch/conversion/plan.py",
        "tests/conversion/test_original_layout.py::test_onevision_in_the_original_layout",
        (
            "an original OneVision has no token of videos",
            "video_token = LLAVA_KINDS[original.kind].video_token",
            "video_token = False",
        ),
    ),
    *of(
        LLAVA,
        OF_ANSWERS,
        (
            "the tower sees the first tiles alone",
            "parts = pixels.split(TILES_AT_ONCE)",
            "parts = [pixels[:TILES_AT_ONCE]] * 4",
        ),
    ),
    *of(
        "megatron_patch/inference/prompt.py",
        OF_ANSWERS,
        (
            "prompts count every image alike",
            "config.image_plan(size, len(images)) for size in",
            "config.image_plan((28, 28), len(images)) for size in",
        ),
    ),
    *of(
        "megatron_patch/inference/megatron_engine.py",
        OF_ANSWERS,
        (
            "the Megatron engine is given no plans",
            "self._forward(tokens, pixels.to(self._here), plans)",
            "self._forward(tokens, pixels.to(self._here))",
        ),
    ),
    *of(
        "megatron_patch/model/linear.py",
        CACHED_KEYS,
        (
            "a linear layer of one rank adds the bias that is its caller's to add",
            "(None, layer.bias) if layer.skip_bias_add",
            "(layer.bias, layer.bias) if layer.skip_bias_add",
        ),
        (
            "a linear layer of one rank forgets its bias",
            "else (layer.bias, None)",
            "else (None, None)",
        ),
    ),
    *of(
        "megatron_patch/model/linear.py",
        "tests/inference/test_megatron_engine.py::test_every_family[one process]",
        (
            "a linear layer of one rank multiplies by its own weight where it is given the embedding's",
            "layer.weight if weight is None else weight\n",
            "layer.weight\n",
        ),
    ),
    *of(
        "megatron_patch/model/linear.py",
        "tests/inference/test_megatron_engine.py::test_more_processes[TP2]",
        (
            "the layers of two tensor-parallel ranks multiply and do not add up",
            "if mpu.get_tensor_model_parallel_world_size() > 1:",
            "if False:",
        ),
    ),
    *of(
        "megatron_patch/model/linear.py",
        OF_LINEAR,
        ("gradients of trained weights miss their buffer", "if trained or (frozen and", "if trained or (True and"),
        ("activations that are to be offloaded stay", "frozen and not module.config.cpu_offloading", "frozen"),
        ("frozen linear layers are Megatron's", "if trained or (frozen and", "if trained or (False and"),
    ),
    *of(
        LLAVA,
        OF_LINEAR,
        ("frozen parts keep Megatron's linear layers", "multiply_alone(module, trained=False)", "pass"),
    ),
    *of(
        "Apptainer.def",
        "tests/setup/test_containers.py::test_an_apptainer_image_runs_a_launcher_in_the_folder_of_its_user",
        (
            "an Apptainer image leaves the folder of its user",
            "    shift",
            "    shift; cd /workspace/llava-megatron",
        ),
        (
            "an Apptainer image cuts arguments at their spaces",
            '$script" "$@"',
            '$script" $@',
        ),
    ),
    *of(
        "examples/llava_mcore/lmms_eval/model_folder.py",
        "tests/evaluation/test_lmms_eval_task.py",
        (
            "lmms-eval is given a tokenizer with a BOS of its own",
            'tokenizer["post_processor"] = None',
            'tokenizer["post_processor"]',
        ),
        (
            "lmms-eval is given an export without chat template",
            "for name in (TOKENIZER, CHAT_TEMPLATE):",
            "for name in (TOKENIZER,):",
        ),
        (
            "a model folder of lmms-eval is written over",
            "if arguments.out.exists():",
            "if False:",
        ),
    ),
    *of(
        "megatron_patch/inference/transformers_engine.py",
        "tests/inference/test_any_resolution.py::test_a_next_trained_on_single_tiles_is_not_shown_tiles",
        (
            "transformers shows tiles to a model that never saw any",
            "folder.settings.image_aspect_ratio != ANY_RESOLUTION:",
            "False:",
        ),
    ),
    *of(
        RULES,
        f"{OF_ARGUMENTS}::test_images_of_any_resolution_are_for_models_that_have_a_rule",
        (
            "anyres passes for LLaVA-1.5",
            "    if geometry.any_resolution is None:\n        yield",
            "    if False:\n        yield",
        ),
        ("tiles beside anyres pass", '(grid(values["IMAGE_TILES"]) or (1, 1)) != (1, 1):', "False:"),
        (
            "a cache beside anyres passes",
            '    if _sees_any_resolution(values, folder):\n        yield "FEATURE_CACHE"',
            '    if False:\n        yield "FEATURE_CACHE"',
        ),
    ),
]

VIDEO, OF_VIDEO = "megatron_patch/data/video.py", "tests/data/preparation/test_video.py"
LLAVA_VIDEO = "megatron_patch/data/preparation/sources/llava_video.py"
RECORD, WORKERS = "megatron_patch/data/record.py", "megatron_patch/data/preparation/workers.py"
OF_VIDEOS = "tests/data/loading/test_videos.py"
DISAGREEING = f"{OF_VIDEOS}::test_what_does_not_agree_is_left_out"
IN_ORDER = f"{OF_VIDEOS}::test_placeholders_plans_and_pixels_are_in_the_order_of_the_marks"
BROKEN_VIDEOS, ALL_KINDS = (
    f"{OF_VIDEO}::{name}"
    for name in ("test_what_is_broken_is_rejected_by_name", "test_records_of_all_kinds_stand_in_the_shards")
)
OF_VIDEO_LINES = "tests/inference/test_prompt.py::test_lines_with_videos"
VIDEOS = [
    *of(
        TILE_PLAN,
        f"{OF_TILES}::test_as_many_tokens_for_a_video_as_in_transformers",
        ("a video has no newline", "frames * side * side + 1,", "frames * side * side,"),
        ("odd sides of frames are cut short", "math.ceil(patches / 2)", "patches // 2"),
    ),
    *of(
        TILE_PLAN,
        f"{OF_TILES}::test_images_have_no_frames",
        ("images are videos", "if any(self.shown) and not any(self.grid)", "if any(self.shown)"),
    ),
    *of(
        LLAVA,
        f"{OF_TILES}::test_features_of_frames_are_shrunk_as_in_transformers",
        ("frames keep all their features", "if not rows and any(shown):", "if False:"),
        ("frames are shrunk without mixing", 'mode="bilinear").permute', 'mode="nearest").permute'),
    ),
    *of(
        LLAVA,
        OF_NEW_MODELS,
        ("placeholders of videos are text", "if self.geometry.video_token_id is not None:", "if False:"),
    ),
    *of(
        GEOMETRY,
        OF_NEW_MODELS,
        ("no model knows <video>", "if kind.video_token else None", "if False else None"),
    ),
    *of(
        CONVERSATION,
        DISAGREEING,
        ("marks and numbers of tokens need not agree", "if found != len(counts):", "if False:"),
        ("a text may hold placeholders", "if mark_id in piece_ids:", "if False:"),
    ),
    *of(
        CONVERSATION,
        IN_ORDER,
        (
            "videos take the place of images",
            "next(left[is_video]) for is_video in self",
            "next(left[0]) for is_video in self",
        ),
    ),
    *of(
        CONVERSATION,
        f"{OF_VIDEOS}::test_a_single_video_stands_in_front_and_stays_so_where_images_come_first",
        ("videos stay behind where images come first", "self.without_marks(exchange.question)", "exchange.question"),
    ),
    *of(
        RECORD,
        DISAGREEING,
        ("an answer may hold a mark", "if mark in answer:", "if False:"),
        ("frames may be more than there are", "if sum(frames) > len(images):", "if False:"),
        ("a video may have no frame", "type(count) is int and count > 0", "type(count) is int"),
    ),
    *of(
        RECORD,
        f"{OF_VIDEOS}::test_video_is_a_word_like_any_other_to_models_that_know_none",
        (
            "<video> is a mark in every record",
            '{VIDEO_MARK: ("video", videos)} if videos else',
            '{VIDEO_MARK: ("video", videos)} if True else',
        ),
    ),
    *of(
        RECORD,
        IN_ORDER,
        ("frames come before the images", "initial=len(images) - sum(frames)", "initial=0"),
    ),
    *of(
        RECORD,
        f"{OF_VIDEOS}::test_a_single_video_stands_in_front_and_stays_so_where_images_come_first",
        ("a video beside an image goes in front", "if count == 1 and images + videos == 1 and", "if count == 1 and"),
    ),
    *of(
        ENCODER,
        IN_ORDER,
        ("frames are cropped", 'config.side_px, "stretch"', 'config.side_px, "crop"'),
        (
            "images come before frames",
            "[plan.frames > 0 for plan in plans]",
            "sorted(plan.frames > 0 for plan in plans)",
        ),
    ),
    *of(
        ENCODER,
        f"{OF_VIDEOS}::test_a_broken_frame_is_found_with_and_without_pixels",
        (
            "later stages do not look at frames",
            "for data in (*record.images, *itertools.chain(*record.videos)):",
            "for data in record.images:",
        ),
    ),
    *of(
        ENCODER,
        f"{OF_VIDEOS}::test_a_model_without_videos_refuses_them_and_says_which_takes_them",
        ("videos are for every model", "if not videos or config.sees_videos:", "if True:"),
    ),
    *of(
        "megatron_patch/data/loading/config.py",
        f"{OF_VIDEOS}::test_a_model_without_videos_refuses_them_and_says_which_takes_them",
        ("videos are for models shown one tile", "is not None and self.sizes_matter", "is not None"),
    ),
    *of(
        "megatron_patch/data/loading/inspection.py",
        f"{OF_VIDEOS}::test_inspection_tells_of_frames",
        ("the contact sheet shows one frame", "if pixels and record.encoded.plans[0].frames:", "if False:"),
        ("figures leave videos out", "len(frames) for frames in record.videos", "len(frames) for frames in ()"),
    ),
    *of(
        CONFIG,
        f"{OF_NEW_RUNS}::test_losses_equal_a_single_process[llava_onevision-TP2 + SP]",
        ("training knows no videos", "video_token_id=geometry.video_token_id,", "video_token_id=None,"),
    ),
    *of(
        VIDEO,
        f"{OF_VIDEO}::test_frames_are_those_of_the_original",
        ("the last frame is left out", "np.linspace(0, total - 1,", "np.linspace(0, total - 2,"),
        ("frames of short videos are repeated", "min(self.frames, total)", "self.frames"),
        ("--fps gives more than --frames", "if len(regular) <= self.frames:", "if True:"),
        ("--fps is passed over", "if self.fps is not None and fps:", "if False:"),
    ),
    *of(
        VIDEO,
        f"{OF_VIDEO}::test_samplings_that_mean_nothing_are_refused",
        ("a sampling may hold anything", "        if problems:", "        if False:"),
    ),
    *of(
        VIDEO,
        f"{OF_VIDEO}::test_a_folder_of_frames_is_taken_as_it_is",
        ("f10 comes before f2", "names.sort(key=_by_number)", "names.sort()"),
    ),
    *of(
        VIDEO,
        f"{OF_VIDEO}::test_frames_are_turned_upright",
        ("frames lie as the file has them", "if frame.rotation:", "if False:"),
    ),
    *of(
        VIDEO,
        f"{OF_VIDEO}::test_quality_is_that_of_the_option",
        ("the quality is Pillow's own", '{"quality": sampling.quality} if', "{} if"),
    ),
    *of(
        VIDEO,
        f"{OF_VIDEO}::test_a_header_that_tells_another_number_of_frames_is_not_believed",
        ("the header's number of frames is believed", "if decoded != total:", "if False:"),
    ),
    *of(
        VIDEO,
        f"{OF_VIDEO}::test_a_damaged_frame_is_no_frame_nor_is_one_made_of_it",
        ("damaged frames are taken", "            if damaged:", "            if False:"),
        ("what follows a damaged frame is taken", "or (damaged and not frame.key_frame)", "or False"),
        ("a key frame repairs nothing", "(damaged and not frame.key_frame)", "damaged"),
    ),
    *of(
        VIDEO,
        f"{OF_VIDEO}::test_without_pyav_folders_do_and_files_are_refused_before_anything_is_made",
        ("a missing decoder passes", 'if find_spec("av") is None:', "if False:"),
    ),
    *of(
        LLAVA_VIDEO,
        f"{OF_VIDEO}::test_without_pyav_folders_do_and_files_are_refused_before_anything_is_made",
        ("nobody looks for a decoder before the start", "        self._check_first()", "        pass"),
    ),
    *of(
        VIDEO,
        BROKEN_VIDEOS,
        ("a folder without frames is a video", "    if not names:", "    if False:"),
    ),
    *of(
        "megatron_patch/data/preparation/sources/image_folders.py",
        BROKEN_VIDEOS,
        ("a video may lie anywhere", 'if name.startswith("/") or (', "if False and ("),
    ),
    *of(
        WORKERS,
        BROKEN_VIDEOS,
        ("frames are not checked", "for number, data in enumerate(frames, 1):", "for number, data in ():"),
    ),
    *of(
        WORKERS,
        ALL_KINDS,
        ("a sample does not tell of its frames", "        if counts:", "        if False:"),
        ("a record with a video is text alone", "not sample.images and not sample.videos", "not sample.images"),
    ),
    *of(
        LLAVA_VIDEO,
        ALL_KINDS,
        ("<image> does not stand for a video", "        if not found.images:", "        if False:"),
    ),
    *of(
        PIPELINE,
        ALL_KINDS,
        ("names of videos are lost", "if record.video_names is not None:", "if False:"),
    ),
    *of(
        WORKERS,
        f"{OF_VIDEO}::test_the_token_limit_counts_frames",
        ("frames count nothing", "self._limit.video_tokens(count) for", "1 for"),
        ("a limit without <video> passes", "if frames and not self._encoder.marks_in(VIDEO_MARK):", "if False:"),
    ),
    *of(
        LLAVA_VIDEO,
        f"{OF_VIDEO}::test_workers_parts_and_resume_give_the_same_bytes",
        ("other frames may be resumed with", ', "frames": asdict(self._sampling)}', "}"),
    ),
    *of(
        "megatron_patch/data/preparation/sources/llava.py",
        f"{OF_VIDEO}::test_other_converters_leave_videos_out_and_name_this_one",
        (
            "a video becomes text alone",
            'if isinstance(video := record.get("video"), str | list) and video:',
            "if False:",
        ),
    ),
    *of(
        "examples/llava_mcore/run_inference_llava.py",
        f"{OF_RUN}::test_one_prompt_on_the_command_line",
        ("--video is passed over", "tuple(arguments.image), videos=videos)", "tuple(arguments.image))"),
    ),
    *of(
        "megatron_patch/launch/asking.py",
        "tests/launchers/test_asking.py",
        ("a missing video passes", "if not video.exists():", "if False:"),
    ),
    *of(
        f"{INFERENCE}/prompt_file.py",
        OF_VIDEO_LINES,
        ("lines give all frames", "FrameSampling() if count is None else FrameSampling(count)", "FrameSampling(99)"),
        ("lines lose their videos", "system, _videos(record, folders, of_videos)))", "system))"),
    ),
    *of(
        f"{INFERENCE}/prompt.py",
        OF_VIDEO_LINES,
        ("every model is asked about videos", "check_videos(len(request.videos), config)", "pass"),
    ),
    *of(
        f"{INFERENCE}/transformers_engine.py",
        f"{OF_ANSWERS}[llava_onevision]",
        ("frames are tiles of an image", "((plans[:, 2] == 0) & (plans[:, 6] > 0))", "(plans[:, 2] < 0)"),
    ),
]

STORE, STORED_DATA = "megatron_patch/object_storage.py", "megatron_patch/launch/stored_data.py"
OF_URLS, OF_STORED = "tests/test_object_storage.py", "tests/data/loading/test_object_storage.py"
OF_STORED_RUNS, OF_UPLOAD = "tests/training/test_object_storage.py", "tests/data/preparation/test_upload.py"
NOT_STARTED = f"{OF_STORED_RUNS}::test_what_cannot_be_read_is_refused_before_anything_starts"
STORED = [
    *of(
        STORE,
        f"{OF_STORED}::test_no_record_is_skipped_for_what_the_store_does",
        ("a store that refuses makes bad records", "class StorageError(Exception):", "class StorageError(ValueError):"),
    ),
    *of(
        STORE,
        f"{OF_STORED}::test_an_outage_changes_nothing",
        ("an outage stops the run", "if waited + delay > _patience_s or", "if True or"),
        ("every request tells of the outage", "if now - _told >= TOLD_EVERY_S:", "if True:"),
    ),
    *of(
        STORE,
        f"{OF_STORED}::test_patience_ends",
        ("patience never ends", "if waited + delay > _patience_s or", "if"),
    ),
    *of(
        STORE,
        f"{OF_STORED}::test_an_orphan_does_not_wait",
        ("an orphan asks for twenty minutes", "_patience_s or os.getppid() != parent:", "_patience_s:"),
    ),
    *of(
        STORE,
        f"{OF_STORED}::test_a_wrong_key_is_refused_and_not_named",
        ("403 is asked for again", "if isinstance(error, PermissionError) or status in (401, 403):", "if False:"),
        ("MSC tells its own story", ".setLevel(logging.CRITICAL)", ".setLevel(logging.WARNING)"),
    ),
    *of(
        STORE,
        f"{OF_STORED}::test_what_is_no_dataset",
        ("a missing bucket is an absent file", 'if code == "NoSuchBucket":', "if False:"),
    ),
    *of(
        STORE,
        f"{OF_STORED}::test_objects",
        ("a range begins at the object's start", "Range(offset=start, size=size)", "Range(offset=0, size=size)"),
    ),
    *of(
        STORE,
        f"{OF_URLS}::test_credentials_of_a_url_are_not_shown",
        ("a signature is shown", 'text.partition("?")[0].partition("://")', 'text.partition("://")'),
        ("a key is shown", "{host.rpartition('@')[2]}", "{host}"),
    ),
    *of(
        STORE,
        f"{OF_URLS}::test_urls_that_can_be_read",
        ("a URL with a key is asked for", "if (problem := url_problem(url)) is not None:", "if False:"),
    ),
    *of(
        STORE,
        f"{OF_URLS}::test_what_is_wrong_with_the_profile_is_said_without_its_secrets",
        (
            "the profile's error is quoted",
            "return f\"MSC's configuration cannot be used ({kind}",
            "return f\"MSC's configuration cannot be used ({error} {kind}",
        ),
    ),
    *of(
        STORE,
        f"{OF_URLS}::test_calls_run_together_and_keep_their_order",
        ("one request at a time", "for _ in range(min(threads, len(futures))):", "for _ in range(1):"),
    ),
    *of(
        "megatron_patch/data/loading/dataset.py",
        f"{OF_STORED}::test_requests_are_under_way_together",
        ("a batch reads record after record", "return at_once(calls) if self.stored else calls", "return calls"),
        ("all threads of a batch ask for an index", "with self._asking:", "if True:"),
    ),
    *of(
        "megatron_patch/data/loading/dataset.py",
        f"{OF_STORED}::test_a_missing_shard_is_found_at_the_start",
        (
            "a shard without its index passes",
            'return self._stored_sizes.get(name) if f"{name}.idx" in self._stored_sizes else None',
            "return self._stored_sizes.get(name)",
        ),
    ),
    *of(
        LOADER,
        f"{OF_STORED}::test_one_rank_looks_for_all",
        ("every rank looks at the labels", "if data_parallel_rank == 0 or not dataset.stored:", "if True:"),
    ),
    *of(
        LOADER,
        f"{OF_STORED}::test_no_record_is_skipped_for_what_the_store_does[1]",
        (
            "a worker's traceback is the message",
            "str(error).rstrip().splitlines()[-1].removeprefix",
            "str(error).removeprefix",
        ),
    ),
    *of(
        "megatron_patch/data/loading/blend.py",
        f"{OF_STORED}::test_blends_name_urls_and_lie_in_a_store",
        ("a folder of a blend is no URL", "if is_url(path) or is_url(name):", "if is_url(path):"),
    ),
    *of(
        "megatron_patch/data/loading/lengths.py",
        f"{OF_STORED}::test_lengths_are_measured_once_and_lie_beside_the_data",
        ("lengths beside a bucket are not fetched", "            _fetch(dataset, file)\n", "            pass\n"),
        ("lengths are not put beside a bucket", "        _publish(dataset, file)\n", "        pass\n"),
    ),
    *of(
        CONFIG,
        f"{OF_CONFIG}::test_what_does_not_fit_is_refused",
        (
            "a checkpoint goes to a folder msc:",
            "    for folder_name in filter(None, (arguments.save, arguments.load)):",
            "    for folder_name in ():",
        ),
    ),
    *of(
        STORED_DATA,
        NOT_STARTED,
        ("the launcher does not ask the store", "if is_url(path) and (found :=", "if False and (found :="),
    ),
    *of(
        STORED_DATA,
        f"{OF_STORED_RUNS}::test_a_split_that_is_absent_is_refused",
        ("any split of a stored folder passes", "if found is not None and split not in found:", "if False:"),
    ),
    *of(
        ROWS,
        NOT_STARTED,
        ("a refusal shows the key of a URL", "{quoted(without_credentials(self[name]))}", "{quoted(self[name])}"),
    ),
    *of(
        "megatron_patch/launch/rules.py",
        f"{OF_STORED_RUNS}::test_checkpoints_are_not_kept_in_object_storage",
        (
            "a run writes into a folder msc:",
            'return "it is in object storage: only data',
            'return None and "it is in object storage: only data',
        ),
    ),
    *of(
        "megatron_patch/data/preparation/upload.py",
        f"{OF_UPLOAD}::test_an_object_of_another_size_is_seen",
        ("an upload is not looked at again", "if there.get(name) != sizes[name]]:", "if False]:"),
    ),
    *of(
        "megatron_patch/data/preparation/upload.py",
        f"{OF_UPLOAD}::test_what_the_store_refuses_is_no_dataset",
        (
            "split.yaml is sent among the first",
            "names = sorted(sizes.keys() - {LAST}, key",
            "names = sorted(sizes.keys(), key",
        ),
    ),
    *of(
        "megatron_patch/data/preparation/upload.py",
        f"{OF_UPLOAD}::test_every_file_arrives_and_the_last_makes_the_dataset",
        ("an upload goes over a dataset that is there", "    if LAST in present:", "    if False:"),
    ),
    *of(
        "toolkits/multimodal_data_preprocessing/command_line.py",
        f"{OF_UPLOAD}::test_a_target_that_cannot_be_is_refused_before_anything_is_made",
        (
            "the target is looked at after the conversion",
            "        if arguments.upload is not None:\n",
            "        if False:\n",
        ),
    ),
    *of(
        "toolkits/multimodal_data_preprocessing/command_line.py",
        f"{OF_UPLOAD}::test_a_part_is_not_uploaded",
        ("a part is uploaded", "if arguments.upload is not None and options.part is not None:", "if False:"),
    ),
]

OF_READMES = "tests/launchers/test_readme.py"
READ_OPTIONS = f"{OF_READMES}::test_programs_of_the_readmes_have_the_options_that_are_named"
OF_GPUS = f"{OF_COMMANDS}::test_a_job_takes_the_gpus_that_it_is_given"
OF_FILE_VALUES = "tests/launchers/test_run_file.py::test_what_is_wrong_with_a_file_is_refused"
OF_RESTARTS = "tests/launchers/test_start.py::test_a_run_that_has_saved_starts_again_after_a_death"
OF_FRESH = "tests/training/test_fresh_optimizer.py::test_a_run_goes_on_without_its_optimizer"
OF_FRESH += "[saving0-going_on0-it was saved with SAVE_OPTIM=false]"
OF_KEPT_OPTIMIZER = f"{OF_ARGUMENTS}::test_a_run_that_starts_again_by_itself_keeps_its_optimizer"

JOBS = [
    *of(
        "README.md",
        READ_OPTIONS,
        (
            "a README misspells an option of a program",
            "    --image-root images --output",
            "    --image-rot images --output",
        ),
    ),
    *of(
        "examples/llava_mcore/README.md",
        READ_OPTIONS,
        (
            "a README names an option that is not there in a form",
            "    --vision-model CLIP_FOLDER",
            "    --vision CLIP_FOLDER",
        ),
    ),
    *of(
        "README.md",
        f"{OF_READMES}::test_launchers_of_a_readme_are_accepted[README.md]",
        ("a README misspells an option of a launcher", "--card H200x8 --propose", "--card H200x8 --proposal"),
        ("a README has two arguments in the wrong order", "dsw 7B 16 256", "dsw 16 7B 256"),
        ("a README calls a program that nobody has", "bash examples/doctor.sh\n", "doctor.sh\n"),
    ),
    *of(
        "megatron_patch/device/cuda.py",
        OF_GPUS,
        ("a job takes other GPUs than nvidia-smi shows", ', "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}', "}"),
        ("a GPU that is not there is left out in silence", "if int(entry) >= found if", "if False if"),
        ("a UUID of nobody is left out in silence", "else uuids and not any(", "else uuids and any("),
        ("a GPU twice is no GPU", "if entries.count(entry) > 1:", "if False:"),
        ("two choices of GPUs, and one is not taken", "visible is not None and visible != chosen:", "False:"),
    ),
    *of(
        "megatron_patch/launch/machine.py",
        OF_GPUS,
        ("all GPUs are taken whatever is chosen", '        **job.device.choice(call["GPUS"]),\n', "\n"),
        ("a chosen GPU is idle", "if chosen and processes != len(chosen):", "if False:"),
        ("GPUs that are not chosen are counted", 'kind.count(call["GPUS"])', "kind.count()"),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        OF_RESTARTS,
        ("a run that dies at its start does so again and again", "if _progress(arguments) == before:", "if False:"),
        ("restarts have no end", 'else "MAX_RESTARTS are used up"', "else None"),
        ("a wrong call is repeated", "in (WRONG_INPUT, ROLL_BACK) or", "in (ROLL_BACK,) or"),
        ("a run goes on after its last rollback", "in (WRONG_INPUT, ROLL_BACK) or", "in (WRONG_INPUT,) or"),
        ("a bad loss is repeated", "any(map(_has_said_why, tails)):", "False:"),
        (
            "a run dies although it may start again",
            '            _start_again(arguments, "restarts")',
            "            pass",
        ),
    ),
    *of(
        "megatron_patch/launch/processes.py",
        "tests/launchers/test_start.py::test_a_run_that_was_asked_to_end_does_not_start_again",
        ("a run that is told to end starts again", "        asked.append(number)", "        pass"),
    ),
    *of(
        RULES,
        f"{OF_ARGUMENTS}::test_what_a_cluster_says_must_fit_together",
        ("each node starts again by itself", 'in ("dlc", "multinode"):', "in ():"),
    ),
    *of(
        "megatron_patch/launch/machine.py",
        OF_RESTARTS,
        ("nobody may start again", 'if call["MAX_RESTARTS"] == "0" or call["ENV"] != DSW:', "if True:"),
    ),
    *of(
        "megatron_patch/training/fresh_optimizer.py",
        OF_FRESH,
        ("the warm-up begins anew", "opt_param_scheduler.step(result[0] * s", "opt_param_scheduler.step(0 * s"),
        ("a checkpoint without an optimizer cannot be resumed", "and not _has_optimizer(folder):", "and False:"),
        (
            "nothing is said of a fresh optimizer",
            "    if folder is not None and settings.no_load_optim:",
            "    if False:",
        ),
    ),
    *of(
        TRAINING,
        OF_FRESH,
        ("the optimizer is saved unasked", '["--no-save-optim"] if call["SAVE_OPTIM"] == "false" else []', "[]"),
    ),
    *of(
        TRAINING,
        OF_KEPT_OPTIMIZER,
        ("the optimizer is loaded unasked", '["--no-load-optim"] if call["LOAD_OPTIM"] == "false" else []', "[]"),
    ),
    *of(
        RULES,
        OF_KEPT_OPTIMIZER,
        ("a rollback loses Adam's moments", '        if again and values[name] == "false":', "        if False:"),
    ),
    *of(
        TRAINING,
        f"{OF_COMMANDS}::test_debug_tells_more_and_where",
        ("DEBUG tells no more", '(DEBUG if call["DEBUG"] == "true" else {})', "{}"),
        (
            "DEBUG wins over what is set",
            "variables[name] = call.environment.get(name) or value",
            "variables[name] = value",
        ),
        ("nobody knows where DEBUG tells it", '    if call["DEBUG"] == "true":', "    if False:"),
    ),
    *of(
        TRAINING,
        f"{OF_ARGUMENTS}::test_the_interval_of_fp8_scales_is_refused_by_name",
        (
            "a word without effect is taken",
            'if (name := word.partition("=")[0]) in WITHOUT_EFFECT:',
            "if (name := word) in ():",
        ),
        ("a variable without effect is taken", 'if call.environment.get("FP8_INTERVAL"):', "if False:"),
    ),
    *of(
        "megatron_patch/launch/rules.py",
        f"{OF_ARGUMENTS}::test_nemos_checkpoint_is_refused_with_the_way_to_go",
        ("NeMo's folder is a checkpoint that lacks a file", "set(NEMO) & set(os.listdir(path))", "set() & set(NEMO)"),
        ("NeMo's archive does not exist", 'if path.endswith(".nemo") or ', "if "),
    ),
    *of(
        "megatron_patch/launch/rules.py",
        f"{OF_ARGUMENTS}::test_checkpoint_that_is_not_finished_is_refused_by_what_is_missing",
        ("another program's checkpoint only lacks a file", "return found and f", "return found or f"),
    ),
    *of(
        "megatron_patch/launch/run_file.py",
        OF_FILE_VALUES,
        ("MindSpeed's file is a list of unknown names", "    if MINDSPEED & values.keys():", "    if False:"),
        ("a name in small letters is like no other", "get_close_matches(name.upper(), ", "get_close_matches(name, "),
    ),
    *of(
        "megatron_patch/launch/completion.py",
        "tests/launchers/test_completion.py",
        ("every word is the first argument", "command.arguments[len(before)]", "command.arguments[0]"),
        ("words that do not begin so are shown", "if word.startswith(begun)]", "if True]"),
        ("NAME=VALUE is three words", 'word in ("=", ":") or', "False or"),
        ("a preset is any text", 'if row.name == "PRESET":', "if False:"),
        ("templates are any text", "if said.startswith(KNOWN) else ()", "if False else ()"),
        ("the job behind a plan is not looked at", ") in STAGES:  # the job", ") in ():  # the job"),
        ("the value of an option is an option", "if action is not None and action.nargs != 0:", "if False:"),
    ),
    *of(
        "megatron_patch/launch/run_file.py",
        OF_GPUS,
        ("a run goes on on the GPUs of its start alone", '"MASTER_PORT", "GPUS")', '"MASTER_PORT")'),
    ),
]

PLAN, MEMORY = "megatron_patch/launch/plan.py", "megatron_patch/memory.py"
LIMITS, OF_QUICKSTART = "megatron_patch/data/preparation/workers.py", "tests/quickstart/test_quickstart_parts.py"
TILES = [
    *of(
        PLAN,
        f"{OF_PLAN}::test_tiles_of_any_resolution_are_planned",
        ("a plan forgets the tiles", "        image=image,\n", "        image=None,\n"),
    ),
    *of(
        RULES,
        f"{OF_PLAN}::test_tiles_of_any_resolution_are_planned",
        (
            "the size that is given is not looked at",
            "        return geometry.any_resolution.plan(size)\n",
            "        return geometry.any_resolution.plan(PHOTO)\n",
        ),
    ),
    *of(
        RULES,
        f"{OF_PLAN}::test_fixed_tiles_are_planned",
        (
            "the plan leaves the thumbnail out",
            "whole_image(geometry.tower.image_tokens, fixed_tiles(*tiles))",
            "whole_image(geometry.tower.image_tokens, tiles[0] * tiles[1])",
        ),
    ),
    *of(
        RULES,
        f"{OF_PLAN}::test_an_image_that_leaves_no_room_is_told_before_a_run",
        (
            "nobody tells of photographs that do not fit",
            'if tokens >= call.int("DECODER_SEQ_LEN"):',
            "if False:",
        ),
    ),
    *of(
        PLAN,
        f"{OF_PLAN}::test_a_wrong_plan_is_refused",
        ("an image without pixels is planned", "and int(height) and int(width)):", "):"),
    ),
    *of(
        MEMORY,
        f"{OF_PLAN}::test_a_frozen_tower_of_any_resolution_sees_32_tiles_at_once",
        ("all tiles are before a frozen tower", "if chunked else sizes.images", "if False else sizes.images"),
        ("a trained tower forgets tiles", "is not None and not learns\n", "is not None\n"),
    ),
    *of(
        STEP_TIME,
        OF_STEP_TIME,
        ("an image leaves no room", "self.image is not None and self.image.tokens >= self.longest:", "False:"),
        ("tiles take no time to cut", "IMAGE_S * (1 + TILE_SHARE * (plan.tiles - 1))", "IMAGE_S"),
        ("each tile is an image to read", "work.images / plan.tiles / plan.data", "work.images / plan.data"),
    ),
    *of(
        "megatron_patch/length_mix.py",
        OF_STEP_TIME,
        ("the tower sees one tile", "source.images * tiles,", "source.images,"),
    ),
    *of(
        LIMITS,
        f"{OF_PIPELINE}::test_lengths_are_those_of_training_at_any_resolution",
        ("limits count one tile", "counts = self._limit.tokens_of(images)", "counts = None"),
        ("limits count images as they lie", "image_size(data, self.apply_exif_orientation)", "image_size(data, False)"),
        (
            "limits count every image alone",
            "self.any_resolution.plan(size, len(sizes))",
            "self.any_resolution.plan(size)",
        ),
    ),
    *of(
        LIMITS,
        f"{OF_PIPELINE}::test_a_model_of_one_tile_counts_as_image_tokens_does",
        (
            "a resume counts by another rule",
            'return plain | {"any_resolution": str(self.any_resolution)} | exif',
            "return plain | exif",
        ),
    ),
    *of(
        "toolkits/multimodal_data_preprocessing/command_line.py",
        f"{OF_PIPELINE}::test_wrong_words_end_with_code_2_before_anything_is_created",
        ("--model and --image-tokens pass together", "    if by_model and (named :=", "    if False and (named :="),
        ("--model alone limits nothing", "if len(absent) == len(values) and not by_model:", "if True:"),
    ),
    *of(
        LENGTHS,
        f"{OF_BALANCE}::test_tiles_of_any_resolution_are_balanced",
        ("equal work counts one tile an image", "text.tiles // self._encoder.config.tiles", "len(text.plans)"),
    ),
    *of(
        "examples/llava_mcore/quickstart.sh",
        f"{OF_QUICKSTART}::test_one_quickstart_does_not_go_on_in_the_others_folder",
        ("one quickstart goes on in the other's folder", "if [[ -e $folder/.steps/$other ]]; then", "if false; then"),
    ),
    *of(
        "examples/llava_mcore/quickstart/compare_scores.py",
        f"{OF_QUICKSTART}::test_scores_are_put_beside_each_other",
        (
            "whatever the scores, it is a success",
            "if others and first < max(others)",
            "if False and first < max(others)",
        ),
        (
            "answers that are not there are no error",
            "    except OSError as error:\n        raise UserError(f",
            "    except OSError as error:\n        raise SystemExit(f",
        ),
    ),
    *of(
        "examples/llava_mcore/quickstart/make_digit_rows.py",
        f"{OF_QUICKSTART}::test_rows_of_digits_are_wide_and_tall_and_share_no_original",
        (
            "held-out pictures show digits of the training",
            'write_rows(folder / "heldout", held_out,',
            'write_rows(folder / "heldout", train,',
        ),
    ),
]

MUTANTS = [
    *(*MODEL, *CONVERSION, *LABELS_AND_MASKS, *IMAGES, *DATA_OPTIONS, *RECORDS, *PATCHES, *RUNS, *OFFLOAD),
    *(*LAUNCHERS, *TOOLS, *FEATURE_CACHE, *EVALUATION, *LORA, *FSDP, *ANY_RESOLUTION, *VIDEOS, *STORED, *JOBS, *TILES),
]
