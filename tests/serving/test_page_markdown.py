"""What a model writes, as the chat page shows it: Markdown is rendered, and nothing of it runs."""

import json
import urllib.request

import pytest

from tests.serving.browser import READY, chat

ATTACKS = """<script>alert(1)</script>

<img src=x onerror=alert(2)> <svg onload="alert(3)"> <a href="javascript:alert(4)" onclick="alert(5)">a</a>

[a](javascript:alert(6)) [b](JaVaScRiPt:alert(7)) [c]( javascript:alert(8)) <javascript:alert(9)>
[d](data:text/html,<script>alert(10)</script>) ![e](x" onerror="alert(11)) [f](https://e.com"onmouseover="alert(12))
[<img src=x onerror=alert(13)>](https://e.com/<script>) **<script>alert(14)</script>** `<script>alert(15)</script>`
[vbscript](vbscript:msgbox(1)) [j](java\nscript:alert(16)) [k](&#106;avascript:alert(17)) <https://e.com/"onclick=x>

# <iframe src="javascript:alert(18)"></iframe>

> <style>* {display: none}</style> <base href="https://evil.example"> <meta http-equiv="refresh" content="0">

- <form action="https://evil.example"><button>x</button></form>

| <script>alert(19)</script> | b |
|---|---|
| <img src="https://evil.example/x.png"> | [g](javascript:alert(20)) |

```html" onclick="alert(21)
</code></pre><script>alert(22)</script>
```
![i](https://evil.example/pixel.png)
<!-- ]]> <noscript><p title="</noscript><img src=x onerror=alert(23)>"> {{constructor.constructor('alert(24)')()}}
```
<script>alert(25)</script>"""
ALLOWED = {
    "H3", "P", "STRONG", "CODE", "PRE", "DIV", "SPAN", "BUTTON", "A", "BLOCKQUOTE", "UL", "LI", "TABLE", "THEAD",
    "TBODY", "TR", "TH", "TD",
}  # fmt: skip


def test_nothing_that_a_model_or_a_user_writes_runs(tab, backend):
    backend.text = ATTACKS
    chat(tab, backend.url, ATTACKS.partition("\n")[0])
    tab.open(f"{backend.url}/")  # from the storage
    tab.until(READY)
    names = tab.run("[...new Set([...document.querySelectorAll('.content *')].map((each) => each.tagName))]")
    assert set(names) <= ALLOWED
    attributes = tab.run("""[...new Set([...document.querySelectorAll('.content *')]
        .flatMap((each) => each.getAttributeNames()))]""")
    assert set(attributes) <= {"class", "href", "rel", "target", "tabindex", "type"}
    links = tab.run("[...document.querySelectorAll('.content a')].map((each) => [each.protocol, each.rel])")
    assert links
    assert all(link == ["https:", "noopener noreferrer"] for link in links)
    assert tab.text("title") in ("", "nextllm chat")
    assert all(f"alert({number})" in tab.text("#messages") for number in (1, 2, 3, 15, 22, 25))
    tab.run("document.querySelectorAll('.content *').forEach((each) => each.dispatchEvent(new Event('error')))")


def test_a_script_that_reached_the_page_would_not_run(tab, backend):
    """The policy that the server sends stops what the renderer would let through."""
    for path in ("/", "/status", "/page/chat.js"):
        with urllib.request.urlopen(backend.url + path) as response:
            policy = response.headers["Content-Security-Policy"]
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert {"default-src 'self'", "base-uri 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    tab.open(f"{backend.url}/")
    tab.run("document.body.insertAdjacentHTML('beforeend', '<img src=/nothing onerror=\"window.ran = 1\">')")
    tab.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert tab.run("fetch('http://127.0.0.2:1').then(() => 'sent', (error) => 'refused')") == "refused"
    tab.until("performance.getEntriesByName(location.origin + '/nothing').length")
    assert tab.run("window.ran") is None
    assert len(tab.problems) >= 3
    tab.problems.clear()


MARKDOWN = {
    "headings": ("# a\n### b #\n####### c", "<h3>a</h3><h5>b</h5><p>####### c</p>"),
    "emphasis": (
        "**a *b* c** ***d*** _e_ ~~f~~",
        "<p><strong>a <em>b</em> c</strong> <strong><em>d</em></strong> <em>e</em> <del>f</del></p>",
    ),
    "none": ("2 * 3 * 4, snake_case_name, \\*a\\*, **", "<p>2 * 3 * 4, snake_case_name, *a*, **</p>"),
    "code": ("`a` ``b`c`` `**d**` `e", "<p><code>a</code> <code>b`c</code> <code>**d**</code> `e</p>"),
    "quote": ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    "list": (
        "3. a\n   - b\n   - c\n\n   d\n4. e\n\n- f\nrest",
        '<ol start="3"><li><p>a</p><ul><li><p>b</p></li><li><p>c</p></li></ul><p>d</p></li><li><p>e</p></li></ol>'
        "<ul><li><p>f\nrest</p></li></ul>",
    ),
    "rule": ("a\n\n---\n* * *", "<p>a</p><hr><hr>"),
    "table": (
        "| a | b \\| c |\n|:--|--:|\n| `d` |\n\ne | f",
        '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th>b | c</th></tr></thead><tbody><tr><td>'
        "<code>d</code></td></tr></tbody></table></div><p>e | f</p>",
    ),
    "link": (
        "[a **b**](https://e.com/x_(y)) https://e.com/z.",
        '<p><a href="https://e.com/x_(y)" target="_blank" rel="noopener noreferrer">a <strong>b</strong></a> '
        '<a href="https://e.com/z" target="_blank" rel="noopener noreferrer">https://e.com/z</a>.</p>',
    ),
    "link in link": (
        "[https://a.com](https://b.com)",
        '<p><a href="https://b.com" target="_blank" rel="noopener noreferrer">https://a.com</a></p>',
    ),
    "fence": (
        "~~~py x\n  a\n```\n~~~\nb",
        '<div class="code"><div class="code-bar"><span>py</span><button type="button" class="copy">Copy</button></div>'
        '<pre tabindex="0"><code>  a\n```</code></pre></div><p>b</p>',
    ),
    "open fence": (
        "- a\n  ```\n  b",
        '<ul><li><p>a</p><div class="code"><div class="code-bar"><span></span><button type="button" class="copy">Copy'
        '</button></div><pre tabindex="0"><code>b</code></pre></div></li></ul>',
    ),
    "nothing": (" \n\n", ""),
}
LONG = (
    "> " * 3000, "- " * 3000, "[" * 50_000, "*a " * 99_999, "**a" * 99_999, "_" * 50_000, "`" * 20_000,
    "` `` " * 10_000,
    "[a](https://e.com/" * 3000, "| " * 20_000 + "\n|" + " " * 50_000, "![a](" * 10_000, "\\" * 20_000, "1. " * 5000,
    "#" * 20_000 + " " * 20_000, "https://e.com/" + "." * 20_000, "\n".join("  " * i + "- a" for i in range(300)),
)  # fmt: skip


def test_markdown(tab, backend):
    tab.open(f"{backend.url}/")
    cases = {name: text for name, (text, _) in MARKDOWN.items()}
    render = """import('/page/markdown.js').then(({ renderMarkdown }) => {
        const html = (text) => { const node = document.createElement('div'); node.append(...renderMarkdown(text));
                                 return node.innerHTML; };
        return Object.fromEntries(Object.entries(%s).map(([name, text]) => [name, html(text)])); })"""
    assert tab.run(render % json.dumps(cases)) == {name: html for name, (_, html) in MARKDOWN.items()}
    tab.run(render % json.dumps(dict(enumerate(LONG))))  # takes no time that grows with the square of the length


@pytest.mark.slow
def test_code_is_copied(tab, backend):
    backend.text = "```py\na = 1\nb = '<'\n```"
    chat(tab, backend.url)
    tab.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    tab.click("button.copy")
    assert tab.run("window.copied") == "a = 1\nb = '<'"
    assert tab.text("button.copy") == "Copied"
