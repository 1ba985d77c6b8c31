"""The documentation's site: built strictly, loading nothing from elsewhere, shown by a browser without complaint."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import browser
import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as built: any link or anchor that leads nowhere, any page left out of the navigation, fails it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr  # mkdocs --quiet would count no warning, and so refuse nothing
    return out


def test_every_page_is_there(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.with_suffix(".html").name).is_file()


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text()):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag) or 'rel="canonical"' in tag, tag
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", sheet.read_text()), sheet


@pytest.fixture
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("page", ["index.html", "methods.html", "quickstart.html"])
def test_a_browser_shows_it(address, page):
    dom, console = browser.visit(f"{address}/{page}")
    assert not console
    assert 'class="md-nav__link' in dom
    assert re.search(r"<h1[^>]*>\s*\w+", dom)
