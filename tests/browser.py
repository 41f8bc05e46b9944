"""A real browser, for tests of pages: the Chromium or Chrome of this machine, without a window."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "google-chrome", "chromium-browser", "google-chrome-stable", "chrome")


def browser() -> str:
    """The program's path. That there is none is a failure of the set-up, not a reason to skip."""
    found = [path for name in NAMES if (path := shutil.which(name))]
    assert found, f"no browser is installed ({', '.join(NAMES)}); apt-get install chromium brings one"
    return found[0]


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[tuple[Page, list[str]]]:
    """A local page as the browser shows it; and, as they happen, the addresses that it asks for and what the browser
    complains of. Nothing but the page itself can be reached."""
    events: list[str] = []
    with (
        sync_playwright() as playwright,
        contextlib.closing(playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])) as program,
    ):
        page = program.new_context(offline=True, viewport=dict(width=1200, height=900)).new_page()
        page.on("request", lambda request: events.append(request.url))
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.goto(path.as_uri())
        yield page, events
