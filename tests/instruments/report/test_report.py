import json
import re
import shutil
import subprocess
import time

import pyarrow.parquet as pq
import pytest
from plotly.offline import get_plotlyjs

from r3hf_ray.errors import ConfigError
from r3hf_ray.instruments.report.figures import CHAPTERS, MAX_POINTS, series, thinned
from r3hf_ray.instruments.report.report import write_report
from r3hf_ray.instruments.report.sampled import MAX_DUMPS
from r3hf_ray.instruments.report.summary import duration, tiles, verdict
from r3hf_ray.records.jsonl import JsonlLog
from r3hf_ray.records.metrics import METRICS, read_metrics
from r3hf_ray.records.samples import write_samples

ATTACK = "</script><script>alert('gotcha')</script><img src=x onerror=alert(1)>&\u2028"


@pytest.fixture
def page_of(read_page):
    def report(folder):
        path = write_report(folder)
        assert path == folder / "report.html"
        return read_page(path)

    return report


def test_untrusted_text_stays_text(page_of, tmp_path, make_run):
    folder = make_run(tmp_path / "toy", texts=(ATTACK, " b"), event_text=ATTACK, name_of_event=ATTACK)
    (folder / "config.toml").write_text(f"[data]\nsource = {json.dumps(ATTACK)}\n")
    with JsonlLog(folder / "metrics.jsonl") as log:
        log.write({"train/global_step": 6, "attempt": 0, ATTACK: 1.0})
    page = page_of(folder)
    assert len(page.scripts) == 3 and not any("gotcha" in script for script in page.scripts[1:])
    assert not any(tag == "img" or name.startswith("on") for tag, attributes in page.tags for name in attributes)
    assert page.data["responses"][0]["responses"][0]["text"][0] == ATTACK
    assert sum(ATTACK in text for text in page.texts) >= 3


def test_scripts_of_the_page_and_no_other_may_run(page_of, tmp_path, make_run):
    page = page_of(make_run(tmp_path / "toy"))
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and policy.count("'sha256-") == 2
    assert "unsafe" not in policy[policy.index("script-src") :]


def test_nothing_is_loaded(page_of, tmp_path, make_run):
    page = page_of(make_run(tmp_path / "toy"))
    loads = [a[name] for _, a in page.tags for name in ("src", "href", "data", "action") if name in a]
    assert loads and all(target.startswith("#") for target in loads)
    text = (tmp_path / "toy" / "report.html").read_text().replace(get_plotlyjs(), "")
    text = text.replace("http://www.w3.org/2000/svg", "")  # a namespace, not an address
    assert not re.search(r"https?://|@import|url\(", text)


def test_a_damaged_line_is_refused_with_its_place(tmp_path, make_run):
    folder = make_run(tmp_path / "toy")
    lines = (folder / "events.jsonl").read_text().splitlines()
    (folder / "events.jsonl").write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]) + "\n")
    with pytest.raises(ConfigError, match=r"events\.jsonl:2: is no JSON object"):
        write_report(folder)


def test_every_metric_is_in_the_table_and_every_curve_has_all_its_numbers(page_of, tmp_path, make_run):
    folder = make_run(tmp_path / "toy")
    page, rows = page_of(folder), read_metrics(folder)
    assert set(METRICS) <= set(page.texts)
    figures = [figure for chapter in CHAPTERS.values() for figure in chapter["figures"]]
    charts = page.data["charts"]
    assert [chart["title"] for chart in charts] == [figure["title"] for figure in figures]
    assert len([tag for tag, a in page.tags if a.get("class") == "plot"]) == len(charts)
    for figure, chart in zip(figures, charts, strict=True):
        lines = [*figure.get("stacked", ()), *figure["lines"]]
        for (metric, label, *band), drawn in zip(lines, chart["series"], strict=True):
            steps, values = series(rows, metric)
            assert (drawn["label"], drawn["x"], drawn["y"]) == (label, steps, pytest.approx(values, rel=1e-4))
            assert bool(drawn["low"]) is bool(drawn["high"]) is bool(band)


def test_figures_name_metrics_that_exist():
    figures = [figure for chapter in CHAPTERS.values() for figure in chapter["figures"]]
    lines = [line for figure in figures for line in (*figure["lines"], *figure.get("stacked", ()))]
    assert {name for metric, _, *band in lines for name in (metric, *band)} <= set(METRICS)


def test_versions_settings_and_events_are_told_and_secrets_are_not(page_of, tmp_path, make_run):
    folder = make_run(tmp_path / "toy")
    text = page_of(folder).texts
    assert {"2.13.0", "steps", "6"} <= set(text) and any("slow disk" in part for part in text)
    assert "hunter2" not in (folder / "report.html").read_text()


def test_responses_carry_the_numbers_of_the_samples(page_of, tmp_path, make_run):
    data = page_of(make_run(tmp_path / "toy")).data
    assert [dump["step"] for dump in data["responses"]] == [2, 6]
    response = data["responses"][1]["responses"][0]
    assert response["text"] == ["Stir", " well", "\n", "<eos>"]
    assert response["reward"] == [0.25, -0.5, 0.75, -1.0] and response["total"] == -0.5
    assert response["gold"] is None and response["value"] == [0.5] * 4


def test_every_method_has_a_row_for_the_chosen_responses(page_of, tmp_path, make_run):
    page = page_of(make_run(tmp_path / "toy"))
    cards = page.data["answers"]
    assert [card["label"].split(",")[0] for card in cards] == ["Step 6", "Step 6", "Step 2", "Step 2"]
    for card in cards:
        assert [row["title"] for row in card["rows"]] == ["r3hf", "segment", "uniform", "terminal"]
        assert card["texts"][0]["text"] == ["Stir", " well", "\n", "<eos>"]
    assert {"r3hf", "segment", "uniform", "terminal"} <= set(page.texts)  # and what each does, without the script
    assert not any("Underlines are the truth" in text for text in page.texts)


def test_the_truth_is_explained_where_it_is_known(page_of, tmp_path, make_run, token_rows):
    folder = make_run(tmp_path / "toy")
    write_samples(folder, 6, [row | {"gold_credit": 1.0 - row["position"]} for row in token_rows(6)])
    page = page_of(folder)
    assert page.data["answers"][0]["texts"][0]["marks"] == [1, 0, -1, -1]
    assert any("Underlines are the truth" in text for text in page.texts)
    assert [a["class"] for tag, a in page.tags if tag == "span" and "-mark" in a.get("class", "")] == [
        "tok plus-mark",
        "tok minus-mark",
    ]


STEP = "a token's reward is the step the line takes there"


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ("", [STEP + "."], ["summed over spans"]),
        ('mode = "r3hf"', [STEP + "."], ["summed over spans"]),
        ('mode = "segment"', [STEP + ", summed over spans."], []),
        ('mode = "terminal"', [], [STEP]),
        ('mode = "uniform"', [], [STEP]),
        ('mode = "abc"', [], [STEP]),
        ('mode = "mine:paid"', [], [STEP]),
        ("beta_c = 0.5", [], [STEP]),
        ('eos_jump = "spread"', [], [STEP]),
    ],
)
def test_what_a_tokens_reward_is_depends_on_the_method(page_of, tmp_path, make_run, settings, said, unsaid):
    folder = make_run(tmp_path / "toy")
    (folder / "config.toml").write_text(f"[reward]\n{settings}\n")
    text = " ".join(" ".join(page_of(folder).texts).split())
    assert "score of everything up to that token" in text
    assert all(words in text for words in said) and not any(words in text for words in unsaid)


def test_steps_are_divided_by_the_spread_and_belong_to_one_model(page_of, tmp_path, make_run):
    folder = make_run(tmp_path / "toy")
    with JsonlLog(folder / "events.jsonl") as log:
        log.write({"time": 1e9 + 8, "event": "calibrated", "mean": 0.5, "std": 2.0})
    assert f"{STEP}, divided by the spread of scores" in " ".join(" ".join(page_of(folder).texts).split())
    (folder / "config.toml").write_text('[model]\ncost = "costs"\n')
    text = " ".join(" ".join(page_of(folder).texts).split())
    assert STEP not in text and "the first reward model's score of everything" in text


def test_dumps_of_an_older_version_have_a_report_without_methods(page_of, tmp_path, make_run):
    folder = make_run(tmp_path / "toy")
    for path in (folder / "samples").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["prompt_score", "gold_credit"]), path)
    page = page_of(folder)
    assert page.data["answers"] == [] and not any(a.get("id") == "answers" for _, a in page.tags)
    assert len(page.data["responses"]) == 2


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
def test_a_browser_draws_every_row_of_every_card(page_of, tmp_path, make_run):
    folder = make_run(tmp_path / "toy", texts=(ATTACK, " b", "\n", " c", "<eos>"))
    cards = page_of(folder).data["answers"]
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--window-size=1300,900"]
    drawn = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{folder}/report.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    body = drawn[drawn.index('<div id="answers"') : drawn.index('<div id="tip"')]
    lines = [len(card["rows"]) * len(card["texts"][0]["text"]) for card in cards]
    assert body.count('class="tok') == sum(lines)
    assert body.count('class="own"') >= len(cards) and body.count("<polyline") >= len(cards)
    assert "<img" not in body and "&lt;img src=x onerror=alert(1)&gt;" in body
    assert "+4.00" in body and body.count("score so far") >= len(cards)  # the sum that terminal pays


def test_first_and_last_dump_are_always_among_those_shown(page_of, tmp_path, token_rows):
    for step in range(5, 105, 5):
        write_samples(tmp_path, step, token_rows(step))
    steps = [dump["step"] for dump in page_of(tmp_path).data["responses"]]
    assert len(steps) == MAX_DUMPS and steps[0] == 5 and steps[-1] == 100


def test_an_empty_folder_has_a_report(page_of, tmp_path):
    assert any("No step has finished yet" in text for text in page_of(tmp_path).texts)


def test_a_restart_is_marked_at_its_step(page_of, tmp_path, make_run):
    data = page_of(make_run(tmp_path / "toy", name_of_event="restart")).data
    assert data["charts"] and all(chart["events"] == [3] for chart in data["charts"])


def test_events_that_are_left_out_are_counted(page_of, tmp_path):
    with JsonlLog(tmp_path / "events.jsonl") as log:
        for number in range(450):
            log.write({"event": "warning" if number % 2 else "checkpoint", "step": number})
    texts = page_of(tmp_path).texts
    assert "All events (the last 400 of 450)" in texts and "Incidents (225)" in texts


@pytest.mark.slow
def test_a_long_run_with_long_responses_takes_less_than_10_seconds(page_of, tmp_path, token_rows):
    with JsonlLog(tmp_path / "metrics.jsonl") as log:
        for step in range(1, 3001):
            log.write({"train/global_step": step, "attempt": 0} | dict.fromkeys(METRICS, 1.0 / step))
    for step in (1, 1000, 2000, 3000):
        write_samples(tmp_path, step, token_rows(step, tuple(f" w{i}" for i in range(2500))))
    start = time.process_time()  # CPU time: the machine may be busy
    page = page_of(tmp_path)
    assert time.process_time() - start < 10
    assert max(len(line["x"]) for chart in page.data["charts"] for line in chart["series"]) <= MAX_POINTS + 1


def test_thinning_keeps_first_and_last():
    points = list(range(2501))
    assert thinned(points)[0] == 0 and thinned(points)[-1] == 2500 and len(thinned(points)) <= MAX_POINTS + 1
    assert thinned([]) == [] and thinned([7]) == [7] and thinned(list(range(1000))) == list(range(1000))


def test_verdict_and_tiles_tell_a_fall():
    def row(step, gold):
        return {"train/global_step": step, "eval/heldout/gold/mean": gold, "eval/heldout/gold/sem": 0.1}

    rows = [row(0.0, 2.0), row(40.0, -1.5)]
    assert verdict(rows) == "Over 40 steps held-out gold reward fell from 2.00 to -1.50."
    gold = tiles(rows, [])[0]
    assert (gold.value, gold.tone) == ("2.00 → −1.50", "bad")
    assert tiles([row(0.0, 2.0), row(40.0, 2.1)], [])[0].tone == ""


DURATIONS = [(3.21, "3.2 s"), (48.4, "48 s"), (59.7, "1m 00s"), (220.0, "3m 40s"), (7500.0, "2h 05m")]


@pytest.mark.parametrize(("seconds", "text"), DURATIONS)
def test_duration(seconds, text):
    assert duration(seconds) == text
