"""README is the site's first page, and files of the repository that pages link to are published beside them."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"\]\(([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the first page, and what the pages link to outside docs/, under its path in the repository."""
    docs = Path(config.docs_dir)
    root = docs.parent
    files.append(File.generated(config, "index.md", content=_at_home((root / "README.md").read_text())))
    for page in (root / "README.md", *docs.rglob("*.md")):
        for target in _LINK.findall(page.read_text()):
            path = (page.parent / target).resolve()
            if path.is_file() and path.is_relative_to(root) and not path.is_relative_to(docs):
                name = path.relative_to(root).as_posix()
                if name not in files.src_uris:
                    files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links out of docs/ point to where `on_files` published the files."""
    return _at_home(markdown.replace("](../", "](")) if page.file.src_uri.count("/") == 0 else markdown


def _at_home(page: str) -> str:
    """Return a page of the repository root with its links as they are from the folder docs/."""
    return page.replace("](docs/", "](")
