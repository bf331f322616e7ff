"""report.html: one file, nothing from outside, sortable, every number with its protocol; also in a browser."""

import html as entities
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from prunekit.compress.reporting.page import html, links
from prunekit.compress.reporting.plots import draw
from prunekit.compress.reporting.summary import summarise
from prunekit.compress.reporting.tables import explanation

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

CHECK = """
const found = {};
const table = document.querySelector("#results table"), heads = [...table.tHead.rows[0].cells];
const column = heads.findIndex(head => head.textContent.startsWith("perplexity"));
const read = () => [...table.querySelector("tbody.rows").rows].map(row => Number(row.cells[column].dataset.v));
const button = heads[column].querySelector("button");
const step = () => { button.click(); return [heads[column].getAttribute("aria-sort"), read()]; };
found.orders = [[null, read()], step(), step(), step()];
found.firstRow = table.querySelector("tbody tr").textContent.trim().startsWith("dense");
const number = table.querySelector("tbody.rows td button");
number.focus();
found.focused = document.activeElement === number;
number.click();
found.protocol = document.querySelector(".protocol:popover-open")?.textContent ?? "nothing is open";
found.width = [document.documentElement.scrollWidth, document.documentElement.clientWidth, innerWidth];
found.requests = performance.getEntriesByType("resource").map(entry => entry.name);
const report = document.createElement("pre");
report.id = "found";
report.textContent = JSON.stringify(found);
parent.document.body.append(report);
"""
PHONE = 375
"""Pixels; narrower than Chromium's own windows get, so the page is shown in a frame."""


class Outside(HTMLParser):
    """Collects whatever a browser would fetch, or run, that is not in the file."""

    def __init__(self):
        super().__init__()
        self.found, self.tags, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        known = dict(attributes)
        self.ids += [known["id"]] if "id" in known else []
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = known.get(name)
            plain_link = tag == "a" and name == "href" and (value or "").startswith("https://")
            if value and not plain_link and not value.startswith(("#", "data:,")):
                self.found.append(f"<{tag} {name}={value}>")


def outside(page: str) -> list[str]:
    parser = Outside()
    parser.feed(page)
    styles = re.findall(r"@import[^;]*|url\((?!#)[^)]*\)", page)
    return parser.found + styles + [tag for tag in parser.tags if tag in ("iframe", "object", "embed", "base")]


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def page(made, make_study):
    """A study's page with a few figures; what users write in it looks like HTML."""
    if not made:
        evil = "<script>alert(1)</script> & </style>"
        source = "A paper, arXiv 2502.15618, https://example.org/paper"
        published = [{"where": {}, "metric": "perplexity.perplexity", "value": 20.0, "source": source}]
        failed = ({"prune.use": evil, "prune.ratio": 0.9, "seed": 0}, "failed", None, None, evil)
        source = make_study(["flap", "pp"], published=published, extra=[failed])
        plots = draw(summarise(make_study(["flap", "pp"], only=["perplexity"])))
        made["page"] = html(summarise(source), plots)
    return made["page"]


def test_the_page_is_one_file_and_asks_for_nothing(page):
    assert outside(page) == []
    parser = Outside()
    parser.feed(page)
    assert len(parser.ids) == len(set(parser.ids))
    assert parser.tags.count("svg") == 2 and parser.tags.count("script") == 1 and parser.tags.count("h1") == 1
    assert "default-src 'none'" in page  # browsers refuse what should ever slip in


@pytest.mark.parametrize(
    "slip",
    [
        '<img src="https://example.org/x.png">', '<script src="//example.org/x.js"></script>',
        "<style>@import 'x.css';</style>", '<p style="background: url(https://example.org/x)">', '<link href="a.css">',
    ],
)  # fmt: skip
def test_the_check_finds_what_slips_in(page, slip):
    assert outside(page.replace("</main>", slip + "</main>"))


def test_what_users_write_stays_text(page):
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;/style&gt;" in page
    assert '<a href="https://arxiv.org/abs/2502.15618">arXiv 2502.15618</a>' in page
    assert links("see <b> https://example.org/a, now") == (
        'see &lt;b&gt; <a href="https://example.org/a">https://example.org/a</a>, now'
    )


def test_numbers_lead_to_their_protocol_without_a_script(page):
    targets = set(re.findall(r'popovertarget="([^"]+)"', page))
    assert targets and all(f'<div popover class="protocol" id="{target}"' in page for target in targets)
    assert page.count("strangers own: score") and "a plugin" in page
    assert "<dt>Not pruned</dt><dd>layer 0</dd>" in page  # what the pipeline says, not what happens to keep all units


def test_on_a_phone_the_settings_are_in_one_cell(page):
    assert '<th scope="row">PP<span class="folded">40%</span></th>' in page
    assert '<th scope="col" class="setting" title="prune.use">strategy<span class="folded">ratio</span></th>' in page
    assert "table:not(.plain) :is(td.setting, th.setting:not(:first-child)) { display: none; }" in page


def test_what_numbers_do_not_say_is_below_the_table(make_study):
    lines = " ".join(explanation(summarise(make_study(["pp", "flap"], seeds=(0, 1)))))
    assert "The standard error of zero-shot is up to 1.4 points, which ± over seeds does not contain." in lines
    assert "Parameters of PP are those that a batch uses; all weights stay in memory." in lines


def browse(page: str, tmp_path, *options: str) -> tuple[str, str]:
    """The DOM after the page's scripts, and the console's messages."""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
        "--virtual-time-budget=2000", *options, "--dump-dom", (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_it_sorts_and_explains_and_is_quiet(page, tmp_path):
    checked = entities.escape(page.replace("</body>", f"<script>{CHECK}</script></body>"))
    head = '<!doctype html><link rel="icon" href="data:,">'
    frame = f'{head}<iframe width={PHONE} height=800 srcdoc="{checked}"></iframe>'
    dom, console = browse(frame, tmp_path)
    assert console == ""
    found = json.loads(entities.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
    (_, planned), ascending, descending, again = found["orders"]
    assert len(planned) == 4 and planned != sorted(planned)
    assert ascending == ["ascending", sorted(planned)]
    assert descending == ["descending", sorted(planned, reverse=True)]
    assert again == [None, planned]
    assert found["firstRow"] and found["focused"]
    assert "ids sha256" in found["protocol"] and "FLAP (20%), perplexity: " in found["protocol"]
    content, room, window = found["width"]
    assert content == room and window == PHONE  # tables scroll in boxes of their own
    assert found["requests"] == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_browser_would_report_an_error_or_a_request(page, tmp_path):
    slip = '<img src="https://example.org/x.png"><script>undefinedName.call();</script>'
    _, console = browse(page.replace("</main>", slip + "</main>"), tmp_path)
    assert "example.org" in console and "undefinedName" in console


def test_notes_and_values_of_protocols_are_listed_once(make_study):
    source = make_study(["pp", "flap"], [0.4], seeds=(0, 1))
    for trial, seconds, sites in zip(source.trials, (0.61, 0.62, 0.63, 0.64), (14, 7, 8, 14), strict=True):
        note = f"prr: no time saved: a batch takes {seconds} s pruned and 0.5 s dense, so there is no PRR"
        trial.result.notes[:] = ["another" if trial.number == 3 else note]
        trial.metric("overlap").protocol["sites"] = sites
    made = html(summarise(source), [])
    assert made.count("so there is no PRR") == 1
    assert "(PP; FLAP: 3 of 4 trials, 2 with other numbers)" in made and "(FLAP: 1 of 4 trials)" in made
    section = made[made.index('<section id="protocol">') : made.index('<section id="every">')]
    assert "<dt>sites</dt><dd>14 / 7 / 8</dd>" in section


def test_rankings_are_tables_with_intervals_and_few_sentences(make_study):
    made = html(summarise(make_study(["pp", "flap"])), [])
    section = made[made.index('<section id="ranking">') : made.index('<section id="protocol">')]
    assert section.count("<table") == 2 and section.count("<p") == 1 and "6.1% to 7.2% (30 windows)" in section
    lead = entities.unescape(re.search(r'<p class="lead">(.*?)</p>', made)[1])
    assert lead.count(". ") <= 4
