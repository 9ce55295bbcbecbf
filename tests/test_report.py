"""The report page: its data come back as they were, and a real browser shows all of it and asks for nothing."""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from made_up_result import BARE, TITLE, example
from tying.errors import TyingError
from tying.report import ReportData, report
from tying.report.data import Budget, Layer, Measures
from tying.report.page import render

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TEXTS = (
    TITLE,
    "10 times smaller, accuracy −0.50 points",
    "at most 1.00 points of accuracy lost",
    "the budget was kept",
    "Unique values",
    "4.16 kB",
    "410 µs (400 µs to 440 µs)",
    "fc1.weight: 64 inputs",
    "24 pruned: not read at all",
    "an output of the model",
    "one seed only",
    "tying compress --seed 0",
    "Definitions",
)


@pytest.fixture(scope="module")
def page() -> str:
    return render(example())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        remedy = "no Chromium on this machine; run: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(remedy)
        pytest.skip(remedy)
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


LOOK = """
const [dark, done] = arguments, all = [...document.images], end = Date.now() + 5000;
const drawnFrom = i => dark ? i.parentElement.querySelector("source").srcset : i.src;
const answer = () => all.every(i => i.complete && i.currentSrc === drawnFrom(i)) || Date.now() > end
    ? done(all.map(i => [i.currentSrc === drawnFrom(i) ? i.naturalWidth : 0, i.getAttribute("alt")]))
    : setTimeout(answer, 5);
answer();
"""
"""Waits until the pictures of the paper asked for have come, whole or broken; width and words of each."""


def check_page(browser: Any, path: Path, texts: tuple[str, ...] = TEXTS) -> None:
    """The law: every picture shows on both papers and has words, no script errs, nothing is asked of a network."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    for scheme in ("light", "dark"):
        _emulate(browser, scheme, width=1200)
        pictures = browser.execute_async_script(LOOK, scheme == "dark")
        assert pictures, "a page without pictures"
        assert all(width > 0 for width, _ in pictures), f"a picture is missing on {scheme} paper"
        assert all(alt for _, alt in pictures), "a picture has no words for those who cannot see it"
    body = browser.execute_script(
        "document.querySelectorAll('details').forEach(d => d.open = true); return document.body.innerText"
    )
    shown = re.sub(r"\s+", " ", body)
    missing = [text for text in texts if text not in shown]
    assert not missing, f"texts are missing: {missing}"
    assert browser.execute_script("return document.documentElement.lang") == "en"
    _emulate(browser, "light", width=400)
    overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0, f"the page is {overflow} pixels too wide for a telephone"
    assert not (asked := _asked(browser)), f"the page asks a network: {asked}"
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, f"the console has errors: {errors}"


def _emulate(browser: Any, scheme: str, width: int) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _asked(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("file:", "data:", "about:"))]


def test_a_browser_shows_all_of_the_page(browser: Any, page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    check_page(browser, path)
    assert browser.execute_script("return document.images.length") == 6


OPEN = ("<meta http-equiv", "<meta name=off")
"""Lifts the page's own ban on scripts and addresses, so that the twin is stopped by the law alone."""
QUIET = "<script>fetch('http://127.0.0.1:9/', {mode: 'no-cors'}).catch(() => null)</script>"

TWINS = {
    "picture cut short": ("on light paper", lambda html: _cut_first(html, 'src="data:image/svg+xml;base64,')),
    "dark picture cut short": ("on dark paper", lambda html: _cut_first(html, 'srcset="data:image/svg+xml;base64,')),
    "script throws": ("console", lambda html: _append(html.replace(*OPEN), "<script>throw Error('x')</script>")),
    "script where none may be": ("console", lambda html: _append(html, "<script>console.info('x')</script>")),
    "asks a network": ("asks a network", lambda html: _append(html.replace(*OPEN), QUIET)),
    "no alt": ("no words", lambda html: re.sub(r' alt="[^"]+"', "", html, count=1)),
    "empty alt": ("no words", lambda html: re.sub(r' alt="[^"]+"', ' alt=""', html, count=1)),
    "a text gone": ("texts are missing", lambda html: html.replace("one seed only", "")),
    "no pictures": ("without pictures", lambda html: re.sub(r"<img[^>]*>", "", html)),
    "too wide": ("too wide", lambda html: html.replace("<main>", '<main><p style="width:3000px">wide</p>')),
}


def _append(html: str, what: str) -> str:
    return html.replace("</body>", f"{what}</body>")


def _cut_first(html: str, opening: str) -> str:
    start = html.index(opening) + len(opening)
    end = html.index('"', start)
    return html[: start + 4 * ((end - start) // 8)] + html[end:]


@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_page_is_caught(browser: Any, page: str, tmp_path: Path, twin: str) -> None:
    said, break_it = TWINS[twin]
    broken = break_it(page)
    assert broken != page
    path = tmp_path / "broken.html"
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(AssertionError, match=said):
        check_page(browser, path)


def test_the_page_is_the_same_every_time(page: str) -> None:
    assert render(ReportData.from_json(example().to_json())) == page


def test_a_page_of_almost_nothing_still_says_what_is_known(tmp_path: Path) -> None:
    html = report(BARE, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "2 times smaller" in html
    assert "<img" not in html
    assert "Latency" not in html


def test_a_page_where_nothing_was_found_says_so() -> None:
    same = Measures(parameters=10, stored_ratio=1.0)
    html = render(ReportData("same", same, same, Budget("ratio", 24, 1.0, kept=False)))
    assert "No smaller network was found" in html
    assert "times smaller" not in html


def test_whatever_carries_the_data_can_be_reported(tmp_path: Path) -> None:
    class Result:
        data = BARE

    assert report(Result(), tmp_path / "page.html") == tmp_path / "page.html"
    BARE.save(tmp_path / "result.json")
    for kept in (tmp_path, tmp_path / "result.json", str(tmp_path)):
        again = report(kept, tmp_path / "again.html")
        assert again.read_bytes() == (tmp_path / "page.html").read_bytes()


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget("max_drop", 0.01, -0.002, True), ("at most 1.00\u202fpoints", "nothing lost", "was kept")),
        (Budget("ratio", 24, 23.1, False), ("at least 24× fewer parameters", "23.1× fewer:", "was not kept")),
        (Budget("bytes", 20_000, 19_500, True), ("at most 20\u202fkB", "19.5\u202fkB", "was kept")),
    ],
)
def test_the_page_says_whether_the_budget_was_kept(budget: Budget, words: tuple[str, ...]) -> None:
    html = render(dataclasses.replace(BARE, budget=budget))
    assert all(text in html for text in words)


@pytest.mark.parametrize(
    ("labels", "grid"),
    [((-1, -1, -1, -1), (2, 2)), ((0, 0, 0, 0), (2, 2)), ((0,), None), ((0, 1, 0, -1) * 3, (3, 2, 2))],
    ids=["all pruned", "all one", "one group", "three channels"],
)
def test_layers_of_every_kind_are_drawn(labels: tuple[int, ...], grid: tuple[int, ...] | None) -> None:
    html = render(dataclasses.replace(BARE, layers=(Layer("fc1.weight", "inputs", labels, grid),)))
    assert html.count("<img") == 1


def test_a_failed_write_leaves_the_old_page(tmp_path: Path) -> None:
    with pytest.raises(TyingError, match=r"path: expected a place to write a file, got .*gone/page\.html"):
        report(BARE, tmp_path / "gone" / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {missing!r}")
        return real(name, *args, **kwargs)

    import sys

    for loaded in [name for name in sys.modules if name.startswith(("tying.report.pictures", missing))]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TyingError, match=r'pip install "tying\[report\]"'):
        report(BARE, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
