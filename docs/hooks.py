"""What the site's build needs beyond docs/: pages from the repository, and links that lead there.

On a code host a link such as ``../benchmarks/results/speed_avx2.md`` leads out of ``docs/``. The
site has no such folder. So the pages in ``OUTSIDE`` are built as if they lay in ``docs/``, links to
them are rewritten, and links to any other file of the repository become plain text. A link to a
file that isn't there is a warning, which fails the build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md", "benchmarks/results/*.[mp][dn]*")

log = logging.getLogger("mkdocs.hooks.links")

# Code is matched first, so that `net[0](x)` isn't taken for a link.
_LINK = re.compile(
    r"(?P<code>^ *```.*?^ *```|`[^`\n]*`)"
    r"|(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\]\([^)]*\))*\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)",
    re.DOTALL | re.MULTILINE,
)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and images of the repository that lie outside of docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links that leave docs/, or lead into it."""
    outside = page.file.generated_by is not None
    folder = posixpath.dirname(page.file.src_uri)
    in_repository = folder if outside else posixpath.join("docs", folder)

    def rewrite(match: re.Match[str]) -> str:
        target = match["target"]
        if match["code"] or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(in_repository, target))
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which isn't there", page.file.src_uri, target)
        uri = path.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return match["text"].removeprefix("!").strip("[]")
        return f"{match['text']}({posixpath.relpath(uri, folder or '.')}{match['anchor'] or ''})"

    return _LINK.sub(rewrite, markdown)
