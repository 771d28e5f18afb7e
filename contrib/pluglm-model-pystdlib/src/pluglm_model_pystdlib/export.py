"""Write a trained run as the checkpoint that this package ships: `python -m pluglm_model_pystdlib.export --help`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

# What a chat turn looks like to a model that has only ever seen source code: a docstring, to be followed by code.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}\n\n"
    '{% else %}"""{{ message.content }}"""\n\n{% endif %}'
    "{% endfor %}"
)
# A small model repeats itself sooner or later; without a wish of the user's it stops before that is all one sees.
DEMO_NEW_TOKENS = 64
END_OF_TEXT = "<|endoftext|>"


def config_of(shape: dict[str, Any], end: int) -> dict[str, Any]:
    """config.json of a Llama with these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "dtype": "bfloat16",
        "bos_token_id": end, "eos_token_id": end,
    }  # fmt: skip


def export(run: Path, corpus: Path, package: Path, *, draft: bool = False) -> Path:
    """Write `<package>/checkpoint` (bfloat16 weights, config, tokenizer) and `<package>/heldout.json`.

    Args:
        run: folder of `train fit`. corpus: folder of `train prepare`. package: where this module lies.
        draft: write `<package>/draft` instead, the small model that guesses for the other one, and its record.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    target = package / ("draft" if draft else "checkpoint")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in load_file(str(run / "weights.safetensors")).items()
    }
    save_file(weights, str(target / "model.safetensors"), {"format": "pt"})
    tokenizer.save(str(target / "tokenizer.json"), pretty=False)
    files: dict[str, Any] = {
        "config.json": config_of(facts["shape"], end),
        "generation_config.json": {
            "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "max_new_tokens": DEMO_NEW_TOKENS,
        },
        "tokenizer_config.json": {
            "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
            "chat_template": CHAT_TEMPLATE,
        },
    }  # fmt: skip
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not draft:
        shutil.copy(corpus / "heldout.json", package / "heldout.json")
    record = {k: v for k, v in facts.items() if k not in ("log", "corpus", "out")}
    record |= {name: Path(record[name]).name for name in ("embed_from", "start_from", "teacher") if record.get(name)}
    record |= {"log": facts["log"], "corpus": json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))}
    (target if draft else package).joinpath("training.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    return target


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder that `train fit` wrote")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that `train prepare` wrote")
    parser.add_argument("--package", type=Path, default=Path(__file__).parent, help="where to put it")
    parser.add_argument("--draft", action="store_true", help="as the draft model")
    args = parser.parse_args()
    print(export(args.run, args.corpus, args.package, draft=args.draft))


if __name__ == "__main__":
    main()
