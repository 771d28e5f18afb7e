"""What a tokenizer returns: ids and mask, by key or attribute, ready to be unpacked into `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class BatchEncoding(Mapping[str, Any]):
    """A mapping; `.to(device)` moves its tensors. data: "input_ids" and "attention_mask", lists or tensors [B, T]."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = dict(data)

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.data[name] = value

    def __getattr__(self, name: str) -> Any:
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(f"this encoding has no {name!r}; it has {', '.join(self.__dict__.get('data', ()))}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return repr(self.data)

    def pop(self, name: str, *default: Any) -> Any:
        """As of a dict."""
        return self.data.pop(name, *default)

    def to(self, device: Any, **options: Any) -> BatchEncoding:
        """Move the tensors; itself."""
        self.data = {k: v.to(device, **options) if hasattr(v, "to") else v for k, v in self.data.items()}
        return self
