"""A program: write a Llama checkpoint (safetensors) as a GGUF file. Needs numpy and gguf, not torch.

    python write_gguf.py FOLDER OUT bf16|q8_0|q4_0

Every matrix is written in the type asked for, the tied head included, rounded by gguf's own code; norms are float32. The
file has no vocabulary: what is measured takes and gives token ids. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
FILE_TYPES = {"bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}


def gguf_name(name: str) -> str:
    """A checkpoint's name of a weight in llama.cpp's words. Raises KeyError for one that is not of this shape."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order: it rotates neighbours, Transformers the two halves of a head."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def read(file: np.memmap, facts: dict[str, Any], start: int) -> np.ndarray:
    """One tensor of a safetensors file as float32."""
    begin, end = (start + offset for offset in facts["data_offsets"])
    raw = file[begin:end]
    if facts["dtype"] == "BF16":
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif facts["dtype"] == "F32":
        values = raw.view("<f4")
    else:
        raise SystemExit(f"weights of {facts['dtype']} are not written here: bfloat16 or float32 are.")
    return values.reshape(facts["shape"])


def add_facts(writer: gguf.GGUFWriter, config: dict[str, Any], kind: str) -> None:
    """The shape, as llama.cpp asks for it."""
    rope = config.get("rope_parameters") or {}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_theta") or rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_tokenizer_model("no_vocab")


def main(folder: str, out: str, kind: str) -> None:
    """Write the file."""
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    if config["model_type"] != "llama" or not config["tie_word_embeddings"]:
        raise SystemExit("this writes Llama checkpoints with a tied head.")
    path = Path(folder) / "model.safetensors"
    file = np.memmap(path, dtype=np.uint8, mode="r")
    length = int.from_bytes(file[:8].tobytes(), "little")
    header = json.loads(file[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    matrix_type = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(out, "llama")
    add_facts(writer, config, kind)
    for name, facts in header.items():
        shape, to = tuple(facts["shape"]), gguf.GGMLQuantizationType.F32
        if len(shape) == 2:
            to, shape = matrix_type, gguf.quant_shape_to_byte_shape(shape, matrix_type)
        size = int(np.prod(shape)) * (1 if len(shape) == 2 else 4)
        kept = np.dtype(np.float32) if len(shape) == 1 else np.dtype(np.uint8)
        writer.add_tensor_info(gguf_name(name), shape, kept, size, raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, facts in header.items():
        values = read(file, facts, 8 + length)
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        writer.write_tensor_data(values if values.ndim == 1 else gguf.quantize(values, matrix_type))
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
