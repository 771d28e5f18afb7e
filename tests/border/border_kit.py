"""What the tests at the border share: a tiny checkpoint, wheels of third-party plugins, and scenes played elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

HERE = Path(__file__).parent
SOURCES = HERE / "plugins"
DISTRIBUTIONS = sorted(folder.name for folder in SOURCES.iterdir())
PROMPT = [3, 17, 5, 40, 8, 2, 29]
LIMIT_S = 300


def write_llama(folder: Path) -> Path:
    """A checkpoint of a random Llama with grouped heads; sizes differ from each other."""
    V, C, F, L, H, K, D = 53, 24, 44, 2, 6, 3, 8
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,), "lm_head.weight": (V, C)}
    for i in range(L):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (m * D, C) for n, m in (("q", H), ("k", K), ("v", K))}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (C, H * D), f"{layer}.mlp.down_proj.weight": (C, F)}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (F, C) for n in ("gate", "up")}
        shapes |= {f"{layer}.{n}_layernorm.weight": (C,) for n in ("input", "post_attention")}
    config = {
        "model_type": "llama", "vocab_size": V, "hidden_size": C, "intermediate_size": F, "num_hidden_layers": L,
        "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D, "max_position_embeddings": 96,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1000.0, "tie_word_embeddings": False,
        "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    return write_checkpoint(folder, config, shapes)


def write_tiny(folder: Path) -> Path:
    """A checkpoint for acme-architecture."""
    V, C, L, P = 31, 20, 2, 64
    shapes = {"embed": (V, C), "places": (P, C), "head": (V, C)}
    for i in range(L):
        layer = {"qkv": (3 * C, C), "out": (C, C), "up": (2 * C, C), "down": (C, 2 * C)}
        shapes |= {f"layer.{i}.{name}": shape for name, shape in layer.items()}
    config = {"model_type": "acme-tiny", "vocab": V, "width": C, "heads": 4, "depth": L, "places": P}
    return write_checkpoint(folder, config, shapes)


def write_checkpoint(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """config.json and model.safetensors with random weights, the same each time."""
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(7)
    weights = {}
    for name, shape in shapes.items():
        weights[name] = (random.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.1)).astype(np.float32)
        if len(shape) == 1:
            weights[name] += 1
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def play(scenes: Mapping[str, Mapping[str, Any]], **environment: str) -> dict[str, Any]:
    """Play scenes in one fresh process; results by name."""
    done = run([sys.executable, str(HERE / "scenes.py")], input=json.dumps(scenes), environment=environment)
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def scene(do: str, sites: Iterable[Path], **arguments: Any) -> dict[str, Any]:
    """One scene for `play`."""
    return {"do": do, "sites": [str(site) for site in sites], "with": arguments}


def run(
    command: Sequence[str], *, environment: Mapping[str, str] = {}, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run to success. The environment is that of the tests, with two threads and no PYTHONPATH but a given one."""
    import os

    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        env={**inherited, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "default", **environment}, **more,
    )  # fmt: skip
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def build(folders: Sequence[Path]) -> list[Path]:
    """One wheel for each folder of sources, by hatchling, in one process."""
    done = run([sys.executable, str(HERE / "wheels.py"), *map(str, folders)])
    wheels = [Path(line) for line in done.stdout.splitlines() if line.endswith(".whl")]
    assert len(wheels) == len(folders), done.stdout + done.stderr
    return wheels


def unpack(wheel: Path, site: Path) -> Path:
    """Install a wheel of pure Python by hand: for the many broken ones, where pip would take a second each."""
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def sources(distribution: str, place: Path) -> Path:
    """A copy of a plugin's sources, outside the repository."""
    ignored = shutil.ignore_patterns("__pycache__", "dist", "pluglm.json")
    return Path(shutil.copytree(SOURCES / distribution, place / distribution, ignore=ignored))
