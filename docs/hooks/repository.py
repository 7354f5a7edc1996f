"""A hook of mkdocs: the link to the repository, and its own Markdown files as pages.

README, CONTRIBUTING, SECURITY and CHANGELOG stand at the repository's root, where people look for
them; pages of the site are made from them, with links that lead to pages again.
"""

import re
import subprocess
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

REPOSITORY = Path(__file__).parents[2]
ROOT_PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository, and the pages that are made from them."""
_HOSTS = {"github.com": "GitHub", "gitlab.com": "GitLab", "bitbucket.org": "Bitbucket"}
_LINK = re.compile(r"(?<!!)\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\(([^)\s]+)\)")
_STYLE = "friendly"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link to the repository that this clone came from, if it has a public address."""
    config.repo_url = web_address(_remote())
    if config.repo_url is not None:
        host = urlsplit(config.repo_url).hostname or ""
        config.repo_name = _HOSTS.get(host, host)
    config.edit_uri = None
    return config


def _remote() -> str:
    """Return the address of the remote that this clone came from; nothing where there is none."""
    command = ["git", "config", "--get", "remote.origin.url"]
    try:
        asked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return asked.stdout.strip()


def web_address(remote: str) -> str | None:
    """Return the web page of a remote of git, or None where it is no http(s) or ssh address.

    User names, passwords and tokens are left out.
    """
    by_ssh = re.fullmatch(r"(?:ssh://)?git@([\w.-]+\.\w+)(?::\d+/|[:/])/?(.+)", remote)
    if by_ssh:
        host, path = by_ssh[1], by_ssh[2]
    else:
        address = urlsplit(remote)
        if address.scheme not in ("http", "https") or "." not in (address.hostname or ""):
            return None
        port = f":{address.port}" if address.port else ""
        host, path = f"{address.hostname}{port}", address.path
    return f"https://{host}/{path.strip('/').removesuffix('.git')}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files of the repository's root, and the colours of code."""
    for name, page in ROOT_PAGES.items():
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    colours = HtmlFormatter(style=_STYLE).get_style_defs(".highlight")
    files.append(File.generated(config, "code.css", content=colours))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links lead to pages of the site."""
    names = {made: name for name, made in ROOT_PAGES.items()}
    source = page.file.src_uri
    return with_site_links(markdown, names.get(source, f"docs/{source}"), source)


def with_site_links(markdown: str, path: str, page: str) -> str:
    """Return a page whose links to other files of the repository are links of the site.

    Pictures and code are left alone; a link to a file that the site does not have becomes its text.

    Args:
        markdown: the text.
        path: the file that it is from, below the repository.
        page: its page, below ``docs``.
    """
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [_relinked(part, PurePosixPath(path), PurePosixPath(page)) for part in parts[::2]]
    if path.startswith("docs/"):
        return "".join(parts)
    return re.sub(r"(!\[[^\]]*\]\()docs/", r"\1", "".join(parts))


def _relinked(text: str, path: PurePosixPath, page: PurePosixPath) -> str:
    def link(found: re.Match[str]) -> str:
        shown, address = found.groups()
        if re.match(r"[a-z]+:|#|/", address):
            return found[0]
        file, hash_, anchor = address.partition("#")
        target = normpath(path.parent / file)
        made = ROOT_PAGES.get(target) or (target[5:] if target.startswith("docs/") else None)
        if made is None:
            return shown
        return f"[{shown}]({'../' * (len(page.parts) - 1)}{made}{hash_}{anchor})"

    return _LINK.sub(link, text)
