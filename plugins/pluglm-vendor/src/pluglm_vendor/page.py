"""What is shown before anybody is asked: source, files and digests, imports, findings, requirements, licence.

Nothing of it is trusted text: control characters of a foreign file are written out, so that none reaches the terminal.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pluglm_vendor.bundle import Bundle
from pluglm_vendor.needs import Need
from pluglm_vendor.reading import Reading

NO_SANDBOX = (
    "Consent means: this code may do everything that you may do, from the moment it is used. The list above is what "
    "its text shows, not all it could do; pluglm governs which code runs, and is no sandbox."
)


NOT_READ = "Nobody can read what is in there; consent means trust in who published it."


@dataclass(frozen=True)
class Page:
    """All that is known of what was fetched.

    Attributes:
        name: what users will type. replaced: the version that is installed and would give way, or None.
    """

    bundle: Bundle
    name: str
    reading: Reading
    needs: Sequence[Need]
    replaced: str | None

    def lines(self) -> Iterator[str]:
        """For people."""
        bundle, binaries = self.bundle, self.bundle.binaries
        yield f"source    {bundle.source}"
        yield f"commit    {bundle.commit or 'none: a folder, as it is now'}"
        yield f"plugin    {bundle.distribution(self.name)} {bundle.version}, {bundle.use(self.name)}"
        yield from (f"{word:<9} {plain(text)}" for word, text in bundle.details().items())
        if self.replaced is not None:
            yield f"replaces  {bundle.distribution(self.name)} {self.replaced}"
        yield f"digest    {bundle.digest}"
        yield "files"
        for path, digest in bundle.table.items():
            unread = " (binary; cannot be read: trust the publisher)" if path in binaries else ""
            yield f"  {digest}  {len(bundle.files[path]):>7}  {path}{unread}"
        for path, data in sorted(bundle.papers.items()):
            yield f"  {hashlib.sha256(data).hexdigest()}  {len(data):>7}  {path} (not run)"
        if bundle.left_out:
            yield f"not taken {', '.join(plain(name) for name in bundle.left_out)}"
        yield f"licence   {self._licence()}"
        yield "imports"
        yield from (f"  {plain(name)}{_presence(name)}" for name in self.reading.imports)
        yield "requires"
        yield from (f"  {text}" for text in bundle.runtime)
        yield from (f"  {plain(n.text)} (installed: {n.installed}; {n.status})" for n in self.needs)
        yield "worth a look"
        yield from (f"  {plain(f.place)}: {plain(f.what)}: {f.why}" for f in self.reading.findings)
        if not self.reading.findings:
            yield "  nothing that its text shows"
        yield ""
        yield NO_SANDBOX
        if binaries:
            yield f"{len(binaries)} {'file is' if len(binaries) == 1 else 'files are'} compiled. {NOT_READ}"

    def facts(self) -> dict[str, Any]:
        """For programs."""
        bundle = self.bundle
        return {
            "source": bundle.source, "repo": bundle.repo, "commit": bundle.commit, "name": self.name,
            "distribution": bundle.distribution(self.name), "version": bundle.version, "replaces": self.replaced,
            "digest": bundle.digest,
            **bundle.details(),
            "files": {
                p: {"sha256": d, "bytes": len(bundle.files[p]), **({"binary": True} if p in bundle.binaries else {})}
                for p, d in bundle.table.items()
            },
            "not_taken": list(bundle.left_out), "licence": self._licence(), "imports": list(self.reading.imports),
            "requires": [
                {"requirement": n.text, "installed": n.installed, "status": n.status} for n in self.needs
            ],
            "findings": [asdict(finding) for finding in self.reading.findings],
        }  # fmt: skip

    def _licence(self) -> str:
        """The first line that says something of the first licence file."""
        for name, data in sorted(self.bundle.papers.items()):
            if name.startswith("LICENSE"):
                text = data.decode("utf-8", "replace")
                first = next((line.strip() for line in text.splitlines() if line.strip()), "an empty file")
                return f"{name}: {plain(first)[:100]}"
        return "no licence file: ask its author before you pass it on"


def _presence(name: str) -> str:
    """A note where a package is not installed. Looks for a top-level name, which imports nothing."""
    if name in sys.stdlib_module_names:
        return ""
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    return "" if found else " (not installed here)"


def plain(text: str) -> str:
    """`text` with every character that is not printable written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
