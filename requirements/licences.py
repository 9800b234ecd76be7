"""Licences of what Trimtab needs, as the installed packages give them: ``make licences``.

Exit code 1 where one is not known, or would bind a program that only imports it.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata

from packaging.requirements import Requirement

_BINDS = re.compile(r"\b(A?GPL|GNU (Affero )?General Public)", re.IGNORECASE)


def needed(name: str, extras: frozenset[str] = frozenset(), found: dict[str, str] | None = None) -> dict[str, str]:
    """Package -> licence, of one package and of all that it needs and that is installed."""
    found = {} if found is None else found
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return found  # an extra that is not installed here
    seen = found.get(package.name)
    found[package.name] = licence(package)
    for line in package.requires or () if seen is None or extras else ():
        requirement = Requirement(line)
        applies = [not requirement.marker or requirement.marker.evaluate({"extra": e}) for e in ("", *extras)]
        if any(applies) and (requirement.name not in found or requirement.extras):
            needed(requirement.name, frozenset(requirement.extras), found)
    return found


def licence(package: metadata.Distribution) -> str:
    """By the expression, else the classifiers, else the first line of the text that stands in its place."""
    about = package.metadata
    classes = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    texts = [about.get("License-Expression"), ", ".join(classes), (about.get("License") or "").strip().split("\n")[0]]
    return next((text for text in texts if text), "unknown")


if __name__ == "__main__":
    extras = metadata.metadata("trimtab").get_all("Provides-Extra") or []
    table = needed("trimtab", frozenset(extras))
    for name, words in sorted(table.items(), key=lambda row: row[0].lower()):
        print(f"{name:32} {metadata.version(name):16} {words}")
    doubtful = [name for name, words in table.items() if words == "unknown" or _BINDS.search(words)]
    print(f"{len(table)} packages; to be looked at: {', '.join(doubtful) or 'none'}")
    sys.exit(bool(doubtful))
