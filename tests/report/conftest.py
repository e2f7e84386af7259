import os
import shutil

import pytest
from made_runs import make_paper

LOCAL = "file:", "http://127.0.0.1:"


@pytest.fixture(scope="session")
def whole_paper(tmp_path_factory):
    """An output folder with two finished seeds of every run; their means are the published numbers."""
    out = tmp_path_factory.mktemp("paper")
    make_paper(out)
    return out


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium without a window, one for all tests."""
    reason = "needs playwright (pip install playwright; it need not download a browser)"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open a file, or a page served here, in a new window: ``visit(path, **options)`` with options of
    ``Browser.new_context``.

    At the end there must have been no word on the console, no error, and no request but for local files, or
    to the server.
    """
    contexts, requests, said = [], [], []

    def open_page(path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.route(lambda url: not url.startswith(LOCAL), lambda route: route.abort())
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda line: said.append(f"{line.type}: {line.text}"))
        page.set_default_timeout(10_000)
        page.goto(path if isinstance(path, str) else path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said
    assert requests and all(url.startswith((*LOCAL, "data:", "blob:")) for url in requests)
