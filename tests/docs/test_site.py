"""The built site: nothing overflows or is fetched from elsewhere, and its search finds names."""

import functools
import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

WIDTH = 375
"""Of a small phone, in CSS pixels."""

FRAMES = """<!doctype html><iframe id="frame" style="border:0;height:800px;width:%dpx"></iframe>
<script>
const frame = document.getElementById("frame"), found = {};
async function look(page) {
  await new Promise((done) => { frame.onload = done; frame.src = page; });
  const view = frame.contentWindow, root = frame.contentDocument.documentElement;
  const images = [...frame.contentDocument.querySelectorAll(".rst-content img")];
  found[page] = {
    over: root.scrollWidth - view.innerWidth,
    fetched: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    unseen: images.filter((i) => !(i.complete && i.naturalWidth)).map((i) => i.src),
    widest: Math.max(0, ...images.map((image) => image.getBoundingClientRect().right)),
  };
}
(async () => {
  for (const page of %s) await look(page);
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


class Loads(HTMLParser):
    """The addresses that a page loads by itself, and its ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        is_link = tag == "a" or given.get("rel") == "canonical"
        for name in ("src", "srcset", "data", "poster", *(() if is_link else ("href",))):
            self.loaded += [given[name] or ""] if name in given else []
        self.loaded += re.findall(r"url\(([^)]*)\)", given.get("style") or "")
        self.ids += [given["id"] or ""] if "id" in given else []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as ``make docs`` builds it: a warning, such as a broken link, is an error."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    names = ("COUNT", "KEY_0", "VALUE_0")
    remote = ("1", "remote.origin.url", "git@git.example.org:them/superbert.git")
    environment = {
        **os.environ,
        **{f"GIT_CONFIG_{name}": value for name, value in zip(names, remote, strict=True)},
    }
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> list[str]:
    """The site's pages, by their addresses below it."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    assert len(found) > 40
    return found


@pytest.mark.long
def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    elsewhere = re.compile(r"\s*['\"]?(?:[a-z]+:)?//", re.IGNORECASE)
    for page in pages(site):
        loaded = Loads((site / page).read_text(encoding="utf-8")).loaded
        assert loaded
        assert not [address for address in loaded if elsewhere.match(address)], page
    styles = list(site.rglob("*.css"))
    assert len(styles) > 3
    for path in styles:
        addresses = re.findall(r"(?:url\(|@import\s+)([^);]*)", path.read_text(encoding="utf-8"))
        assert not [address for address in addresses if elsewhere.match(address)], path
    for path in site.rglob("*.js"):
        code = re.sub(r"/\*.*?\*/|(?<![:'\"])//[^\n]*", "", path.read_text(), flags=re.DOTALL)
        quoted = re.findall(r"['\"`]((?:https?:)?//[\w.-]+[^'\"`]*)['\"`]", code)
        assert not [text for text in quoted if "www.w3.org" not in text], path  # names of XML


def test_pages_link_to_the_repository(site: Path) -> None:
    """To that of the remote that the fixture gives to git; without one there is no link."""
    for page in pages(site):
        text = (site / page).read_text(encoding="utf-8")
        links = re.findall(r'<a href="https://git\.example\.org/them/superbert"[^>]*>([^<]*)', text)
        assert [link.strip() for link in links] == ["git.example.org"], page


def test_ids_are_unique(site: Path) -> None:
    """Of two elements of one id, links reach the first alone."""
    for page in pages(site):
        ids = Loads((site / page).read_text(encoding="utf-8")).ids
        assert len(ids) == len(set(ids)), [page, *sorted(i for i in ids if ids.count(i) > 1)]


@pytest.mark.long
def test_on_a_phone_pages_fit_and_fetch_nothing_from_elsewhere(site: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    shown = [page for page in pages(site) if page not in ("404.html", "search.html")]
    (site / "frames.htm").write_text(FRAMES % (WIDTH, json.dumps(shown)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    with Server(site) as server:
        address = server.address
        command = [browser, *flags, f"{address}/frames.htm"]
        with (tmp_path / "browser.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            found: dict[str, Any] = json.loads(server.posted.get(timeout=120))
        finally:
            process.kill()
            process.wait()
    assert found.keys() == set(shown)
    assert {page: own["over"] for page, own in found.items() if own["over"] > 0} == {}
    assert {page: own["unseen"] for page, own in found.items() if own["unseen"]} == {}
    assert {page: own["widest"] for page, own in found.items() if own["widest"] > WIDTH} == {}
    fetched = {name for own in found.values() for name in own["fetched"]}
    assert any(name.endswith("tables.css") for name in fetched)
    assert not {name for name in fetched if not name.startswith(address)}


class Server:
    """A web server for this machine, of a folder; a context.

    Attributes:
        address: where it is.
        posted: what pages sent to it.
    """

    def __init__(self, folder: Path) -> None:
        self.posted: queue.Queue[str] = queue.Queue()
        handler = functools.partial(_Handler, self.posted, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, posted: "queue.Queue[str]", *arguments: Any, **options: Any) -> None:
        self._posted = posted
        super().__init__(*arguments, **options)

    def do_POST(self) -> None:
        self._posted.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


SEARCH = """
const fs = require("fs"), path = require("path"), folder = process.argv[1];
const lunr = require(path.join(folder, "lunr.js"));
const data = JSON.parse(fs.readFileSync(path.join(folder, "search_index.json"), "utf8"));
lunr.tokenizer.separator = new RegExp(data.config.separator);  // as worker.js does
const index = lunr(function () {
  this.field("title");
  this.field("text");
  this.ref("location");
  data.docs.forEach((page) => this.add(page));
});
const found = {};
for (const query of process.argv.slice(2)) found[query] = index.search(query).map((r) => r.ref);
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def search(site: Path) -> dict[str, list[str]]:
    """What the site's own search finds for each query, best first."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    command = [node, "-e", SEARCH, str(site / "search"), *QUERIES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


QUERIES = {
    "freeze_encoder": "api/recipe/",
    "freeze": "adapters/",
    "lora_rank": "api/recipe/",
    "sampling_alpha": "task-schedule/",
    "GradScaler": "pcgrad-loop/ migrating/",
    "DDP": "pcgrad-processes/ migrating/",
    "DistributedDataParallel": "pcgrad-processes/ migrating/",
    "pc_backward": "pcgrad-loop/ pcgrad-trainers/ migrating/",
    "flash_attn_varlen_func": "api/kernels/",
    "TorchJD": "migrating/",
    "CONTRIBUTING": "contributing/",
}
"""What people look for, and pages one of which has it."""


@pytest.mark.parametrize(("query", "page"), QUERIES.items())
def test_search_finds_names(search: dict[str, list[str]], query: str, page: str) -> None:
    assert {address.partition("#")[0] for address in search[query]} & set(page.split())
