"""What mkdocs does besides: pages of files outside docs/, API pages, formulas, and a check of all links."""

from __future__ import annotations

import ast
import html
import os
import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OUTSIDE = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "compress/bundled/README.md": "bundled.md",
}
"""Pages outside docs/ and where they are on the site."""
LANGUAGES = {".yaml": "yaml", ".py": "python", ".toml": "toml", ".txt": "text", ".jsonl": "text", ".md": "markdown"}
"""Files that are shown with their source, on a page of their own; a browser would save them instead."""
ASSETS = ("iframe-worker.js", "site.css")
API = {
    "api/compress.md": ("Prune, measure, export", "compress", ""),
    "api/roles.md": ("Roles", "registry", "roles"),
    "api/sites.md": ("Sites", "registry", "sites"),
    "api/tensors.md": ("Statistics and tensors", "registry", "tensors"),
    "api/registry.md": ("Catalog, components and errors", "registry", "catalog component errors text"),
    "api/checks.md": ("Checks", "registry/checks", ""),
    "api/strategies.md": ("Built-in strategies and parts", "strategies", ""),
    "api/evaluators.md": ("Built-in evaluators", "evaluators", ""),
}
"""A page -> its title, the package whose public names it describes, and the modules that these are from, else all."""


def on_startup(command: str, dirty: bool) -> None:
    """Link the package to where its docstrings are read: the checkout has no folder of that name."""
    package = ROOT / "build" / "api" / "prunekit"
    package.mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", "compress", "registry", "strategies", "evaluators"):
        if not (package / name).is_symlink():
            (package / name).symlink_to(ROOT / name)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    for name in ASSETS:
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(ROOT / "tools" / "site" / name)))
    pages = {uri: (ROOT / name).read_text(encoding="utf-8") for name, uri in OUTSIDE.items()}
    read = [ROOT / name for name in OUTSIDE] + [DOCS / page.src_uri for page in files.documentation_pages()]
    waiting = [path for page in read for path in targets(page)]
    while waiting:
        path = waiting.pop()
        uri = place(path)
        if uri.startswith("source/") and uri not in pages:
            pages[uri] = source_page(path)
            waiting += shown(path) if path.is_dir() else []
    pages |= {uri: api_page(*what) for uri, what in API.items()}
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the checkout into links between pages of the site."""
    uri = page.file.src_uri
    if uri.startswith(("results/", "benchmarks/", "changelog")):
        page.meta["search"] = {"boost": 0.3}  # pages that explain come first
    names = {uri: name for name, uri in OUTSIDE.items()}
    origin = ROOT / names[uri] if uri in names else DOCS / uri
    pieces = [part if code else LINK.sub(lambda link: moved(link, origin, uri), part) for code, part in parts(markdown)]
    return "".join(pieces)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas as MathML, which browsers show without a script."""
    return FORMULA.sub(mathml, html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Let long names in tables break after an underscore."""
    return CELL.sub(lambda cell: NAME.sub(lambda name: name[0].replace("_", "_<wbr>"), cell[0]), output)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site with a link that leads nowhere, or a page that loads something from elsewhere."""
    site = Path(config.site_dir)
    pages = {path: Found.of(path) for path in sorted(site.rglob("*.html"))}
    wrong = [f"{path.relative_to(site)}: {problem}" for path in pages for problem in problems(path, pages, site)]
    if wrong:
        raise PluginError("\n".join(["the site has wrong links:", *wrong]))


LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
CELL = re.compile(r"<td.*?</td>", re.DOTALL)
NAME = re.compile(r"<code>\w+</code>")
BLOCK = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)$)", re.MULTILINE | re.DOTALL)


def parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """The page in pieces: whether it is a block of code, and its text."""
    for index, part in enumerate(BLOCK.split(markdown)):
        yield index % 2 == 1, part


def targets(page: Path) -> list[Path]:
    """Files and folders of the checkout that a page links to."""
    texts = (part for code, part in parts(page.read_text(encoding="utf-8")) if not code)
    paths = [target(found[2], page) for text in texts for found in LINK.finditer(text)]
    return [path for path in paths if path]


def target(link: str, page: Path) -> Path | None:
    """The file or folder of the checkout that a page's link leads to; None for every other link."""
    path = (page.parent / link).resolve()
    return path if not re.match(r"[a-z]+:", link) and path.exists() else None


def place(path: Path) -> str:
    """Where the site has a file or folder of the checkout."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir() and (path / "README.md").is_file():
        return place(path / "README.md")
    if name in OUTSIDE:
        return OUTSIDE[name]
    if path.is_dir() or (path.suffix in LANGUAGES and not (path.suffix == ".md" and path.is_relative_to(DOCS))):
        return f"source/{name}.md"
    return path.relative_to(DOCS).as_posix()


def moved(found: re.Match[str], page: Path, uri: str) -> str:
    """A link of a page as it must be on the site; one to nothing in the checkout stays, and mkdocs reports it."""
    path = target(found[2], page)
    return found[1] + between(uri, place(path)) + found[3] if path else found[0]


def between(uri: str, other: str) -> str:
    """The relative link from one page of the site to another."""
    return posixpath.relpath(other, posixpath.dirname(uri) or ".")


def source_page(path: Path) -> str:
    """A page with the source of a file, or with links to what a folder has."""
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        return head + "".join(f"- [{each.name}]({between(place(path), place(each))})\n" for each in shown(path))
    return f"{head}````{LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8')}\n````\n"


def shown(folder: Path) -> list[Path]:
    """The files and folders of a folder that have a page."""
    pages = [path for path in folder.iterdir() if path.suffix in LANGUAGES or path.is_dir()]
    return sorted(path for path in pages if path.name[0] not in "._")


def api_page(title: str, package: str, modules: str) -> str:
    """A page with the docstrings of a package's public names, under the modules that they are from."""
    lines = [f"# {title}"]
    for module, names in public(ROOT / package).items():
        if names and (not modules or module.partition(".")[0] in modules.split()):
            path = ROOT / package / module.replace(".", "/")
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            name = module.rpartition(".")[2] or package.rpartition("/")[2]
            lines += [f"## {name.replace('_', ' ').capitalize()}", about.partition("\n\n")[0]]
            lines += [f"::: prunekit.{package.replace('/', '.')}.{name}" for name in names]
    return "\n\n".join(lines)


def public(package: Path) -> dict[str, list[str]]:
    """The names of a package's ``__all__`` by the module that each is from, and the checks of modules of checks."""
    module = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    listed = next(
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    found = {"": [node.name for node in module.body if isinstance(node, ast.FunctionDef) and node.name in listed]}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found.setdefault(node.module, []).extend(name.name for name in node.names if name.name in listed)
    for path in sorted(package.glob("*.py")) if package.name == "checks" else ():
        functions = re.findall(r"^def (check_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        checks = [name for name in functions if name not in listed]
        prefix = "" if path.stem == "__init__" else f"{path.stem}."
        found.setdefault(prefix[:-1], []).extend(prefix + name for name in checks)
    return found


def mathml(found: re.Match[str]) -> str:
    """A formula of a page as MathML."""
    return str(convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline"))


class Found(HTMLParser):
    """What a page of the site links to and loads, and the places in it that have a name."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()

    @classmethod
    def of(cls, path: Path) -> Found:
        """Read a page."""
        found = cls()
        found.feed(path.read_text(encoding="utf-8"))
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser for every element."""
        values = {key: value or "" for key, value in attrs}
        self.names.update(values[key] for key in ("id", "name") if key in values)
        if "href" in values:
            (self.loads if tag == "link" else self.links).append(values["href"])
        if "src" in values:
            self.loads.append(values["src"])


def problems(path: Path, pages: dict[Path, Found], site: Path) -> Iterator[str]:
    """What is wrong with a page's links."""
    elsewhere = re.compile(r"(?:[a-z]+:)?//")
    yield from (f"loads {target}" for target in pages[path].loads if elsewhere.match(target))
    for target in (target for target in pages[path].links + pages[path].loads if not re.match(r"[a-z]+:|//", target)):
        name, _, anchor = unquote(target).partition("#")
        place = site / name[1:] if name[:1] == "/" else path.parent / name if name else path
        place = Path(os.path.normpath(place))
        if not place.exists() or (anchor and place in pages and anchor not in pages[place].names):
            yield f"links to {target}"
