"""A browser, and a server for its pages."""

from collections.abc import Iterator

import pytest

from tests.serving.browser import PROGRAM, Tab, open_tab


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Tab]:
    if PROGRAM is None:
        pytest.skip("apt-get install chromium")
    with open_tab(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab) -> Iterator[Tab]:
    """The tab, whose page may ask for what is its own only, opens no dialogs and has no errors."""
    browser.open("about:blank")
    browser.requests, browser.dialogs, browser.problems = [], [], []
    browser.resize(1100, 760)
    browser.prefer("light")
    yield browser
    assert browser.dialogs == []
    assert browser.problems == []
    assert {"/".join(request.split("/")[:3]) for request in browser.requests} <= {browser.run("location.origin")}


@pytest.fixture
def backend():
    """A server whose model says what a test wants."""
    pytest.importorskip("starlette", reason="pip install '.[serve]'")
    from tests.serving.fake import Backend, running

    backend = Backend()
    with running(backend.app()) as backend.url:
        yield backend
        backend.go_on.set()
