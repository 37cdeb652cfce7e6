"""How the pages look: widths, colors and names. Writes screenshots."""

from pathlib import Path

import pytest

from tests.serving.browser import chat

WIDTHS = (320, 390, 1100)


@pytest.mark.slow
def test_no_width_scrolls_sideways(tab, backend):
    backend.text = f"{'word' * 100}\n\n```\n{'x' * 500}\n```\n\n{'| a ' * 40}|\n{'|---' * 40}|\n\n`{'y' * 300}`"
    chat(tab, backend.url, "z" * 400)
    for width in WIDTHS:
        tab.resize(width, 700)
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.run("document.querySelector('#messages').scrollWidth") <= width
    tab.resize(390, 700)
    tab.click("#menu")
    assert tab.run("document.querySelector('#sidebar').getBoundingClientRect().width") == 390
    tab.press("Escape")
    assert not tab.run("document.querySelector('#sidebar').checkVisibility()")
    backend.metrics = f'nextllm_slots{{model="{"m" * 300}"}} 4.0\n'
    tab.open(f"{backend.url}/status")
    tab.until("document.querySelector('section')")
    for width in WIDTHS:
        tab.resize(width, 700)
        assert tab.run("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_everything_has_a_name_and_enough_contrast(tab, backend):
    chat(tab, backend.url)
    unnamed = """[...document.querySelectorAll('button, input, select, textarea, a')].filter((each) =>
        !(each.innerText || each.textContent || each.ariaLabel || each.labels?.length)).map((each) => each.outerHTML)"""
    assert tab.run(unnamed) == []
    contrast = """(() => {
        const shine = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).map((x) => x / 255)
                .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const back = shine(getComputedStyle(document.body).backgroundColor);
        return ['.note', '.content', '#status, footer a'].map((name) => {
            const front = shine(getComputedStyle(document.querySelector(name)).color);
            return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
        });
    })()"""
    for scheme in ("light", "dark"):
        tab.prefer(scheme)
        assert min(tab.run(contrast)) > 4.5


@pytest.mark.slow
def test_the_theme_is_the_systems_or_the_chosen_one(tab, backend):
    back = "getComputedStyle(document.body).backgroundColor"
    tab.open(f"{backend.url}/")
    light = tab.run(back)
    tab.prefer("dark")
    dark = tab.run(back)
    assert light != dark
    tab.run("""document.querySelector('#theme').value = 'light';
        document.querySelector('#theme').dispatchEvent(new Event('change'))""")
    assert tab.run(back) == light
    tab.open(f"{backend.url}/status")
    assert tab.run(back) == light
    assert tab.run("document.querySelector('#theme').value") == "light"
    tab.run("localStorage.clear()")


@pytest.mark.slow
def test_screenshots(tab, backend, tmp_path):
    backend.text = (Path(__file__).parent / "page_answer.md").read_text(encoding="utf-8")
    chat(tab, backend.url, "How do I read the last line of a large file in Python?")
    sizes = []
    for scheme in ("light", "dark"):
        tab.prefer(scheme)
        tab.screenshot(tmp_path / f"{scheme}.png")
        sizes.append((tmp_path / f"{scheme}.png").stat().st_size)
    assert min(sizes) > 10_000
