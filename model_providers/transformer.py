# SPDX-License-Identifier: Apache-2.0
"""Decoder-only language models on Megatron-core's GPTModel, shared by every family.

`LanguageModel` adds what GPTModel lacks: rotary angles of our own, embeddings of media in this rank's slice of the
sequence, and log-probabilities of response tokens only, computed in chunks that are recomputed in the backward, so that
peak memory does not grow with prompt length times vocabulary.

Shapes: types.py.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_rl.errors import raise_all
from megatron_rl.runtime.chunks import LOGIT_CHUNK
from megatron_rl.runtime.device import Backend
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.types import FORBIDDEN_BIAS
from model_providers.attention.core import BatchLayout, core_attention
from model_providers.deepstack import place_embeddings
from model_providers.last_layer import LastLayer
from model_providers.layer import Layer, first_row
from model_providers.rotary import Rotary, set_attention_factor
from model_providers.shape import TransformerShape
from model_providers.weight_map import canonical_name, padded_vocab


@dataclass(frozen=True, slots=True)
class TokenPolicy:
    """What sampling does to the logits, so that trainer and engine score the same distribution."""

    temperature: float = 1.0
    forbidden: tuple[int, ...] = ()
    """Placeholder tokens: FORBIDDEN_BIAS is added to their logits on both sides."""


class RMSNorm(torch.nn.Module):
    """[..., hidden_size] -> [..., hidden_size]: RMS norm that Megatron-core's local spec can use under sequence
    parallelism (its own torch norm refuses)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused_by_us: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(variance + self.eps)).to(x.dtype)


def _leave_uninitialised(weight: Tensor) -> Tensor:
    return weight


def transformer_config(
    shape: TransformerShape, backend: Backend, mesh: ParallelMesh, recompute: str
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_groups,
        kv_channels=shape.head_dim,
        tensor_model_parallel_size=mesh.trainer.tensor,
        pipeline_model_parallel_size=mesh.trainer.pipeline,
        virtual_pipeline_model_parallel_size=mesh.trainer.virtual if mesh.trainer.virtual > 1 else None,
        context_parallel_size=mesh.trainer.context,
        cp_comm_type=mesh.context_comm,
        sequence_parallel=mesh.trainer.tensor > 1,
        params_dtype=backend.dtype,
        pipeline_dtype=backend.dtype,
        bf16=backend.dtype == torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default is refused together with variable_seq_lengths
        num_moe_experts=shape.num_experts or None,
        expert_model_parallel_size=mesh.trainer.expert,
        expert_tensor_parallel_size=1,
        moe_router_topk=shape.experts_per_token or 2,
        moe_router_pre_softmax=not shape.renormalized_routing,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",  # an auxiliary loss would move the policy away from its objective
        moe_aux_loss_coeff=0.0,
        moe_grouped_gemm=backend.fused_kernels and shape.num_experts > 0,
        calculate_per_token_loss=True,
        # Weights come from a checkpoint, so initialisation does nothing; but it must run, for it also marks the tensor
        # parallel parameters, and without the marks gradient norms count replicas.
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=backend.fused_kernels,
        bias_dropout_fusion=backend.fused_kernels,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        recompute_granularity=None if recompute == "none" else recompute,
        # Megatron-core's own choice is core attention, from which a flash kernel keeps next to nothing. A feed-forward
        # network without experts is recomputed by our layer.
        recompute_modules=["moe"] if shape.num_experts else [],
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
    )


def _block_spec(config: TransformerConfig, backend: Backend, chunk: int | None) -> TransformerBlockSubmodules:
    """Megatron-core's layer with our core attention; local modules on a CPU, Transformer Engine's on a GPU."""
    if backend.layer_spec == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
            config.num_moe_experts, config.moe_grouped_gemm, config.qk_layernorm
        )
        norm: type = TENorm
    else:
        layer = get_gpt_layer_local_spec(config.num_moe_experts, normalization="RMSNorm")
        norm = RMSNorm
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    layer.module = Layer
    layer.submodules.self_attention.submodules.core_attention = core_attention(backend.attention_kernel)
    num_here = get_num_layers_to_build(config, chunk)
    layers = [layer] * num_here
    if get_transformer_layer_offset(config, chunk) + num_here == config.num_layers:
        layers[-1] = _last_layer(layer, backend)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _last_layer(layer: ModuleSpec, backend: Backend) -> ModuleSpec:
    last = copy.deepcopy(layer)
    last.module = LastLayer
    last.submodules.self_attention.submodules.core_attention = core_attention(backend.attention_kernel, last_layer=True)
    return last


class LanguageModel(GPTModel):
    """GPTModel whose forward takes a BatchLayout and, on the last stage, returns log-probabilities [R] in fp32.

    The layout travels as `packed_seq_params`; position ids are this rank's own, [3, 1, T], so that a response can
    continue at any position. `chunk` numbers the parts of a stage under virtual pipeline parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: TransformerShape,
        backend: Backend,
        mesh: ParallelMesh,
        tokens: TokenPolicy,
        chunk: int | None = None,
    ):
        super().__init__(
            config,
            _block_spec(config, backend, chunk),
            vocab_size=padded_vocab(shape.vocab_size, mesh.trainer.tensor),
            max_sequence_length=shape.max_positions,
            pre_process=mesh.is_first_stage and chunk in (None, 0),
            post_process=mesh.is_last_stage and chunk in (None, mesh.trainer.virtual - 1),
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="none",  # the angles are ours
            vp_stage=chunk,
        )
        self.rotary = Rotary(shape.rope)
        self.row_width = shape.hidden_size * (1 + shape.deepstack_levels)
        self.tokens = tokens
        self.real_vocab_size = shape.vocab_size
        self._first_expert = mesh.expert_rank * (shape.num_experts // mesh.trainer.expert)
        if self.post_process:
            # _postprocess gathers the rows itself, before it repeats those that predict several tokens.
            self.output_layer.sequence_parallel = False

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, packed_seq_params: BatchLayout, **inputs: Any
    ) -> tuple[Any, ...]:
        """Megatron-core's (decoder input, rotary angles, ...), both of them ours."""
        inputs["decoder_input"] = self._embed(input_ids, position_ids, packed_seq_params) if self.pre_process else None
        made = super()._preprocess(input_ids, position_ids, packed_seq_params=packed_seq_params, **inputs)
        return made[0], self.rotary(position_ids), *made[2:]

    def _embed(self, input_ids: Tensor, position_ids: Tensor, layout: BatchLayout) -> Tensor:
        """Token embeddings [T/tp, 1, H] with the media rows of this rank's slice overwritten."""
        hidden = self.embedding(input_ids=input_ids, position_ids=position_ids)
        assert layout.media_embeds is None or layout.media_embeds.shape[1] == self.row_width
        first = first_row(hidden, self.pg_collection.tp, self.config)
        hidden = place_embeddings(hidden, layout, first, recomputed=self.config.recompute_granularity == "full")
        # Full recomputation differentiates only through inputs that need a gradient; with a frozen embedding nothing
        # upstream asks for one, and the layers would silently not be trained.
        return hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.requires_grad_()

    def _postprocess(self, hidden_states: Tensor, packed_seq_params: BatchLayout, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        predicting = hidden_states[:, 0]
        if self.config.sequence_parallel:
            # The output layer, its own sequence parallelism off, sums the gradient of its input over the ranks; so the
            # gather's backward has to split it, not to sum again.
            predicting = gather_from_sequence_parallel_region(predicting, tensor_parallel_output_grad=False)
        rows = predicting.index_select(0, packed_seq_params.predictors)
        chunks = zip(rows.split(LOGIT_CHUNK), packed_seq_params.targets.split(LOGIT_CHUNK), strict=True)
        logprobs = [checkpoint(self._logprobs, h, t, use_reentrant=False) for h, t in chunks]
        return torch.cat(logprobs)

    def _logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """fp32 [R] of `targets` int64 [R], predicted from `hidden` [R, H]; R of one chunk."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden.unsqueeze(1), weight=weight, runtime_gather_output=False)
        logits = (logits.float() + self._logit_bias(logits.shape[-1], logits.device)) / self.tokens.temperature
        return -vocab_parallel_cross_entropy(logits, targets.unsqueeze(1)).squeeze(1)

    def _logit_bias(self, num_columns: int, device: torch.device) -> Tensor:
        """[V/tp]: bias of this rank's vocabulary columns, -inf on padding, FORBIDDEN_BIAS on placeholder tokens."""
        ids = torch.arange(num_columns, device=device) + self.pg_collection.tp.rank() * num_columns
        bias = torch.zeros(num_columns, device=device)
        bias[torch.isin(ids, torch.tensor(self.tokens.forbidden, dtype=ids.dtype, device=device))] = FORBIDDEN_BIAS
        return bias.masked_fill(ids >= self.real_vocab_size, float("-inf"))

    def named_weights(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of this stage under the names of the weight table (global indices, fused norm names)."""
        offset = get_transformer_layer_offset(self.config, self.vp_stage)
        return {canonical_name(name, offset, self._first_expert): param for name, param in self.named_parameters()}


class ChunkedStage(torch.nn.ModuleList):
    """The chunks of one pipeline stage under virtual pipeline parallelism, in the order in which data passes them."""

    @property
    def chunks(self) -> list[LanguageModel]:
        return cast(list[LanguageModel], list(self))

    @property
    def config(self) -> TransformerConfig:
        return self.chunks[0].config

    def named_weights(self) -> dict[str, torch.nn.Parameter]:
        return {name: param for chunk in self.chunks for name, param in chunk.named_weights().items()}

    def sharded_state_dict(self) -> dict[str, Any]:
        return {str(index): chunk.sharded_state_dict() for index, chunk in enumerate(self.chunks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        for index, chunk in enumerate(self):
            chunk.load_state_dict(state[str(index)])


def build_language_model(
    shape: TransformerShape, backend: Backend, mesh: ParallelMesh, tokens: TokenPolicy, recompute: str = "none"
) -> LanguageModel | ChunkedStage:
    """This rank's stage, uninitialised, on its device."""
    raise_all([problem.told("parallel.", {}) for problem in mesh.trainer.deepstack_problems(shape)], "model")
    with backend.mcore_scope():
        config = transformer_config(shape, backend, mesh, recompute)
        set_attention_factor(config, shape.rope)
        chunks = [LanguageModel(config, shape, backend, mesh, tokens, chunk) for chunk in mesh.chunks]
        model = chunks[0] if len(chunks) == 1 else ChunkedStage(chunks)
        if backend.fused_kernels:
            model.cuda(torch.cuda.current_device())
        for name, param in model.named_parameters():
            if ".mlp.experts." in name:
                # Megatron-core 0.16 says so only with several expert parallel ranks; without it the gradients of
                # whole experts on several tensor parallel ranks, each with its own tokens, are never summed.
                param.allreduce = False  # type: ignore[union-attr]
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
    return model
