"""Contracts that cross the plugin border: Protocols and frozen dataclasses, one idea a module. Imports no torch."""

from pluglm.contracts.attention import AttentionBackend, AttentionRequest, AttentionSpec, MaskSpec
from pluglm.contracts.cache import OPERATIONS, Cache, CacheLayout, CacheRequest, Step
from pluglm.contracts.constraint import GRAMMAR_KINDS, Constraint, ConstraintRequest, Grammar, Matcher
from pluglm.contracts.decoding import (
    STAGES,
    DecodingRequest,
    DecodingStrategy,
    FinishReason,
    GenerationConfig,
    GenerationOutput,
    LogitsProcessor,
    Placed,
    StoppingCriterion,
    Streamer,
    TokenSelector,
)
from pluglm.contracts.model import (
    EncoderDecoderModule,
    EncoderInput,
    EncoderOutput,
    ForwardInput,
    ForwardOutput,
    ModelDescription,
    ModelModule,
    ModelParts,
)
from pluglm.contracts.packed import (
    BlockedEmbedding,
    BlockedLinear,
    GroupedLinear,
    GroupedWeight,
    RowBlocks,
    TableReader,
)
from pluglm.contracts.program import (
    Attention,
    Branch,
    DecoderProgram,
    Embedding,
    Experts,
    FeedForward,
    Head,
    LatentAttention,
    Layer,
    Norm,
    Part,
    Rope,
    StateSpace,
)
from pluglm.contracts.quantizer import (
    PublishedQuantizer,
    Quantizer,
    QuantizerRequest,
    TableQuantizer,
    UnpackingQuantizer,
)
from pluglm.contracts.runtime import (
    KERNEL_OPS,
    Decoded,
    DecodeRun,
    DecodesAhead,
    Draw,
    Executor,
    ExecutorRequest,
    KernelRequest,
)
from pluglm.contracts.slots import CrossSlot, KVSlot, LatentSlot, SharedSlot, Slot, StateSlot
from pluglm.contracts.text import Checkpoint, Message, Source, SourceRequest, Tokenizer, TokenizerRequest
from pluglm.contracts.views import DenseView, KeyInfo, KVView, LatentView, PagedView, QuantizedView
from pluglm.contracts.weights import (
    Chain,
    Split,
    SplitGroups,
    Stack,
    Transform,
    Transpose,
    WeightMap,
    WeightRule,
    rules,
)

__all__ = [
    "GRAMMAR_KINDS", "KERNEL_OPS", "OPERATIONS", "STAGES", "Attention", "AttentionBackend", "AttentionRequest",
    "AttentionSpec", "BlockedEmbedding", "BlockedLinear", "Branch", "Cache", "CacheLayout", "CacheRequest",
    "Chain", "Checkpoint", "Constraint", "ConstraintRequest", "CrossSlot", "DecodeRun", "Decoded",
    "DecoderProgram", "DecodesAhead", "DecodingRequest", "DecodingStrategy", "DenseView", "Draw", "Embedding",
    "EncoderDecoderModule", "EncoderInput", "EncoderOutput", "Executor", "ExecutorRequest", "Experts",
    "FeedForward", "FinishReason", "ForwardInput", "ForwardOutput", "GenerationConfig", "GenerationOutput",
    "Grammar", "GroupedLinear", "GroupedWeight", "Head", "KVSlot", "KVView", "KernelRequest", "KeyInfo",
    "LatentAttention", "LatentSlot", "LatentView", "Layer", "LogitsProcessor", "MaskSpec", "Matcher", "Message",
    "ModelDescription", "ModelModule", "ModelParts", "Norm", "PagedView", "Part", "Placed",
    "PublishedQuantizer", "QuantizedView", "Quantizer", "QuantizerRequest", "Rope", "RowBlocks", "SharedSlot",
    "Slot", "Source", "SourceRequest", "Split", "SplitGroups", "Stack", "StateSlot", "StateSpace", "Step",
    "StoppingCriterion", "Streamer", "TableQuantizer", "TableReader", "TokenSelector", "Tokenizer",
    "TokenizerRequest", "Transform", "Transpose", "UnpackingQuantizer", "WeightMap", "WeightRule", "rules",
]  # fmt: skip
