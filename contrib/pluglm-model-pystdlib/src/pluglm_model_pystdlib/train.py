"""Train the model that this package ships: `python -m pluglm_model_pystdlib.train prepare|fit|export --help`.

The steps can run on several machines: `prepare` reads the standard library of the interpreter it runs under,
`fit` needs torch and the prepared folder, `export` writes the checkpoint in the Llama layout and measures it.
Matrices inside the blocks are trained with Muon (Jordan et al. 2024), the rest with AdamW (Loshchilov & Hutter 2019);
the learning rate is constant after warm-up and falls linearly to zero over the last part of the run
("warmup-stable-decay", Hu et al. 2024, "MiniCPM", section 4).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pluglm.contracts import AttentionRequest, ForwardInput, ForwardOutput, ModelDescription, ModelParts
from pluglm.manager import Manager
from pluglm.weights import export_weights
from pluglm_model_pystdlib.export import config_of
from pluglm_model_pystdlib.muon import Muon


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-shaped decoder, in the names its config.json uses."""

    vocab_size: int = 6144
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


def build(shape: Shape, device: str) -> tuple[nn.Module, ModelDescription]:
    """The Llama that pluglm builds for this config, with fresh weights: it is trained in the code that runs it."""
    manager = Manager.installed()
    llama, _ = manager.registry.find("architecture", "llama")
    sdpa, _ = manager.registry.find("attention", "sdpa")
    config = config_of(asdict(shape), end=0)
    description: ModelDescription = manager.call(llama, "pluglm_describe_model", config=config)
    request = AttentionRequest(description.attention, device, "float32")
    attention = manager.call(sdpa, "pluglm_build_attention", request=request)
    parts = ModelParts(description, attention, {}, device, "float32")
    model: nn.Module = manager.call(llama, "pluglm_build_model", config=config, parts=parts)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            # Residual outputs start small (Radford et al. 2019, section 2.3).
            residual = name.endswith((".o.weight", ".down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.num_hidden_layers) if residual else 0.02)
    return model, description


def loaded(checkpoint: Path) -> nn.Module:
    """The module of a checkpoint, in float32."""
    import pluglm

    return pluglm.load(checkpoint, dtype="float32", offline=True).model.module


def begin_with(model: nn.Module, checkpoint: Path) -> None:
    """Token vectors [V, C] become those of a wider model [V, C'], seen along its C principal directions.

    The table is most of a small model with a large vocabulary, and what it says of the tokens need not be learnt twice.
    """
    from safetensors.torch import load_file

    table = load_file(str(checkpoint / "model.safetensors"))["model.embed_tokens.weight"].float()
    own = model.get_parameter("embed.weight")
    directions = torch.linalg.svd(table - table.mean(0), full_matrices=False).Vh[: own.shape[1]]
    with torch.no_grad():
        seen = table @ directions.T
        # As small as fresh ones: at full length a token would foretell nothing but itself.
        own.copy_(seen * (0.03 / seen.std()))


def batches(ids: np.ndarray[Any, Any], *, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless [batch, length + 1] windows; each epoch is cut at a fresh random phase and shuffled."""
    rng = np.random.default_rng(seed)
    while True:
        phase = int(rng.integers(length))
        starts = rng.permutation(np.arange(phase, len(ids) - length - 1, length))
        for i in range(0, len(starts) - batch + 1, batch):
            yield torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts[i : i + batch]]).astype(np.int64))


def learning_rate(step: int, progress: float, *, warmup: int, decay: float) -> float:
    """Factor on the peak rate: linear warm-up over `warmup` steps, constant, linear fall over the last `decay` share.

    progress: share of the run that is over, in [0, 1].
    """
    return min(1.0, (step + 1) / warmup, max(0.0, 1.0 - progress) / decay)


def fit(args: argparse.Namespace) -> None:
    """Train; write `weights.safetensors` (float32) and `run.json` (arguments, versions, loss curve) into `--out`.

    The run ends at `--steps`, or earlier at `--time-limit-s`; the learning rate follows whichever is nearer its end.
    """

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    shape = Shape(**json.loads(args.shape))
    ids = np.fromfile(args.corpus / "train.bin", dtype=np.uint16)
    model, description = build(shape, device.type)
    if args.embed_from is not None:
        begin_with(model, args.embed_from)
    if args.start_from is not None:
        model.load_state_dict(loaded(args.start_from).state_dict())
    model = model.to(device)
    teacher = None if args.teacher is None else loaded(args.teacher).to(device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    optimizers = [
        Muon(matrices, lr=args.lr, weight_decay=args.weight_decay),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    forward: Callable[[ForwardInput], ForwardOutput] = torch.compile(model) if args.compile else model
    short = batches(ids, batch=args.batch, length=args.length, seed=args.seed)
    # Positions past --length are learnt last, while the rate falls: long windows cost more and teach little early on.
    full = batches(
        ids,
        batch=max(1, args.batch * args.length // shape.max_position_embeddings),
        length=shape.max_position_embeddings,
        seed=args.seed + 1,
    )
    log, started, tokens, progress, step = [], time.perf_counter(), 0, 0.0, 0
    args.out.mkdir(parents=True, exist_ok=True)
    while progress < 1.0:
        elapsed = time.perf_counter() - started
        progress = max((step + 1) / args.steps, elapsed / args.time_limit_s)
        window = next(short if progress < 1.0 - args.decay / 2 else full).to(device)
        scale = learning_rate(step, progress, warmup=args.warmup, decay=args.decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
        loss_sum = 0.0
        for part in torch.split(window, args.micro_batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                positions = torch.arange(part.shape[1] - 1, device=device)[None]
                inputs = ForwardInput(part[:, :-1], positions, None, dense=True)
                logits = forward(inputs).logits
                with torch.no_grad():
                    taught = None if teacher is None else teacher(inputs).logits
            # A draft model is to say what its model says, and not what stands in the text (Hinton et al. 2015).
            target = part[:, 1:].flatten() if taught is None else taught.flatten(0, 1).float().softmax(-1)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), target) * (len(part) / len(window))
            torch.autograd.backward(loss)
            loss_sum += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += window[:, 1:].numel()
        if step % args.log_every == 0 or progress >= 1.0:
            row = {
                "step": step,
                "loss": round(loss_sum, 4),
                "tokens": tokens,
                "progress": round(progress, 4),
                "s": round(time.perf_counter() - started, 1),
            }
            log.append(row)
            print(json.dumps(row), flush=True)
            write_run(args, model, description, shape, log)
        step += 1


def write_run(
    args: argparse.Namespace, model: nn.Module, description: ModelDescription, shape: Shape, log: list[dict[str, float]]
) -> None:
    """What is needed to go on with a stopped run's result, and to say where it came from."""
    from safetensors.torch import save_file

    weights = {name: tensor.float().cpu().contiguous() for name, tensor in export_weights(model, description.weights)}
    save_file(weights, str(args.out / "weights.safetensors"))
    run = {k: (str(v) if isinstance(v, Path) else v) for k, v in vars(args).items() if not callable(v)}
    run |= {"shape": asdict(shape), "torch": torch.__version__, "log": log}
    (args.out / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(required=True)
    p = steps.add_parser("prepare", help="corpus, tokenizer and split from this interpreter's standard library")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--vocab-size", type=int, default=Shape.vocab_size)
    p.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use instead of fitting one")
    p.set_defaults(run=run_prepare)
    p = steps.add_parser("write", help="a corpus of what a model goes on with after beginnings from another corpus")
    p.add_argument("--corpus", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--model", type=Path, required=True, help="the checkpoint that writes")
    p.add_argument("--begin", type=int, default=64, help="tokens of the corpus that a text begins with")
    p.add_argument("--tokens", type=int, default=192, help="that the model adds, the likeliest each time")
    p.add_argument("--batch", type=int, default=96)
    p.add_argument("--texts", type=int, default=9600)
    p.add_argument("--seed", type=int, default=20261123)
    p.set_defaults(run=run_write)
    p = steps.add_parser("fit", help="train; on a GPU where there is one")
    p.add_argument("--corpus", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--shape", default="{}", help="JSON of Shape fields that differ from the defaults")
    p.add_argument("--embed-from", type=Path, help="a checkpoint of the same tokenizer: begin with its token vectors")
    p.add_argument("--start-from", type=Path, help="a checkpoint of the same shape to go on with")
    p.add_argument("--teacher", type=Path, help="a checkpoint of the same tokenizer whose guesses are the targets")
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--batch", type=int, default=12, help="windows a step")
    p.add_argument("--micro-batch", type=int, default=12, help="windows a forward pass")
    p.add_argument("--length", type=int, default=512, help="tokens a window")
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--warmup", type=int, default=50, help="steps")
    p.add_argument("--decay", type=float, default=0.4, help="share of the steps over which the rate falls to zero")
    p.add_argument("--time-limit-s", type=float, default=math.inf, help="end no later than this")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    p.add_argument("--seed", type=int, default=20261121)
    p.add_argument("--log-every", type=int, default=20)
    p.set_defaults(run=fit)
    args = parser.parse_args()
    args.run(args)


def run_prepare(args: argparse.Namespace) -> None:
    from pluglm_model_pystdlib.corpus import prepare

    print(json.dumps(prepare(args.out, vocab_size=args.vocab_size, like=args.tokenizer), indent=1))


def run_write(args: argparse.Namespace) -> None:
    from pluglm_model_pystdlib.written import write

    write(
        args.model, args.corpus, args.out,
        begin=args.begin, tokens=args.tokens, batch=args.batch, texts=args.texts, seed=args.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
