"""What MkDocs needs beside the pages in docs/: README.md as the first page, and the source files that pages link to.

On GitHub a page in docs/ links to `../tvq_pod/nn/vq.py`. In the site that link leads to a copy of the file as plain
text, so the site is complete without GitHub. mkdocs.yml names this file under `hooks`.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
AT_THE_TOP = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files, config):
    """Adds the pages of the repository's top folder, and a copy of each source file that a page links to."""
    texts = {page: _from_the_top((ROOT / name).read_text()) for name, page in AT_THE_TOP.items()}
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    texts |= {file.src_uri: file.content_string for file in files.documentation_pages() if file.src_uri not in texts}
    outside = {
        name for page, text in texts.items() for _, link, _ in LINK.findall(text) if (name := _outside(page, link))
    }
    for name in sorted(outside):
        files.append(File.generated(config, _copy_of(name), content=_text(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Sends links that leave docs/ to what `on_files` has added."""

    def inside(link):
        name = _outside(page.file.src_uri, link[2])
        target = name and (AT_THE_TOP.get(name) or _copy_of(name))
        return (
            link[1] + (posixpath.relpath(target, posixpath.dirname(page.file.src_uri)) if target else link[2]) + link[3]
        )

    return LINK.sub(inside, markdown)


def _from_the_top(text: str) -> str:
    """A page of the repository's top folder, as if it stood in docs/."""

    def moved(link):
        path = link[2]
        if "://" not in path:
            path = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
        return link[1] + path + link[3]

    return LINK.sub(moved, text)


def _outside(page: str, link: str) -> str:
    """The path, from the repository's top, of what a link leads to outside of docs/; "" if it leads elsewhere."""
    if "://" in link:
        return ""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return path if not path.startswith("docs/") and (ROOT / path).exists() else ""


def _copy_of(name: str) -> str:
    return f"code/{name}.txt"


def _text(path: pathlib.Path) -> str:
    """A source file, or the names in a folder. Pages with colors take 30 times as long to make."""
    if path.is_dir():
        return "".join(f"{entry.name}\n" for entry in sorted(path.iterdir()) if "__pycache__" not in entry.name)
    return path.read_text()
