"""A hook of MkDocs: files outside docs/ that pages link to (examples, changelog, log) are part of the site.

Links in the repository's files are written as they work in the repository. Here those that leave docs/, or come from
outside of it, are rewritten to where the files are in the site.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "dev/LOG.md")
EXAMPLES = "examples"
_LINK = re.compile(r"(\]\()(?!https?://|mailto:|#)([^)#\s]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages and examples from outside docs/."""
    examples = (path for path in sorted((ROOT / EXAMPLES).rglob("*")) if path.is_file())
    names = [*PAGES, *(str(path.relative_to(ROOT)) for path in examples if "__pycache__" not in path.parts)]
    for name in names:
        if (ROOT / name).exists():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Rewrite links so that they lead to the same file in the site."""
    here = PurePosixPath(page.file.src_uri)
    inside = (ROOT / config.config_file_path).parent / "docs" / here
    in_repository = PurePosixPath("docs") / here if inside.exists() else here

    def moved(match: re.Match[str]) -> str:
        target = _normal(in_repository.parent / match[2])
        in_site = target.relative_to("docs") if target.parts[:1] == ("docs",) else target
        return match[1] + _relative(in_site, here.parent)

    return _LINK.sub(moved, markdown)


def _normal(path: PurePosixPath) -> PurePosixPath:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return PurePosixPath(*parts)


def _relative(target: PurePosixPath, folder: PurePosixPath) -> str:
    return str(PurePosixPath(*[".."] * len(folder.parts)) / target)
