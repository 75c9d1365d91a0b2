"""The commands on a tiny model, and two on a real one."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from command_line import ASK_KEYS, COMPRESS_KEYS, TEXT, Running, call, run

import kvzip.bench.measure
from kvzip.cli import demo
from kvzip.loading import load
from kvzip.recipes import RECIPES

# ---- the commands, on a tiny model


def test_compress_prints_a_summary(tiny, monkeypatch, capsys, tmp_path):
    (tmp_path / "my text.txt").write_text(TEXT)
    code, out, err = call(monkeypatch, capsys, tmp_path, "compress", "my text.txt", "-m", tiny, "--budget", "900")
    assert (code, err) == (0, "")
    assert re.search(r"^Context +544 tokens", out, re.MULTILINE)
    assert re.search(r"^Loss +\S+ nats a token \(95 %: below \S+\), \d+ % of 12 tokens agree$", out, re.MULTILINE)
    assert "kvzip ask 'my text.kvz'" in out
    assert not any(line != line.rstrip() for line in out.splitlines())
    assert (tmp_path / "my text.kvz").exists()


def test_the_loss_is_measured_unless_told_not_to(tiny, monkeypatch, capsys, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    found = []
    for more in ([], ["--no-certificate"]):
        compress = ("compress", "text.txt", "-m", tiny, "-r", "0.5", "--json", *more)
        loss = json.loads(call(monkeypatch, capsys, tmp_path, *compress)[1])["loss"]
        code, out, _ = call(monkeypatch, capsys, tmp_path, "inspect", "text.kvz", "--json")
        assert code == 0 and json.loads(out)["loss"] == loss
        found.append((loss, call(monkeypatch, capsys, tmp_path, "inspect", "text.kvz", "--no-text")[1]))
    (loss, shown), (nothing, without) = found
    assert loss["kl"] > 0 and "nats a token" in shown
    assert nothing is None and "nats a token" not in without


def test_compress_reads_stdin_and_replaces_its_own_file(forks, tiny, tmp_path):
    for budget in ("8KiB", "16KiB"):
        running = Running(forks, ["compress", "-", "-m", tiny, "--budget", budget, "--json"], tmp_path)
        done = running.finish(TEXT.encode())
        found = json.loads(done.stdout)
        assert done.stderr == ""
        assert found["path"] == "stdin.kvz"
        assert found["kv_nbytes"] <= int(budget[:-3]) * 1024
    assert os.listdir(tmp_path) == ["stdin.kvz"]


def test_ask_streams_answers_and_prints_json(tiny_kvz, monkeypatch, capsys, tmp_path):
    ask = lambda *args: call(monkeypatch, capsys, tmp_path, "ask", tiny_kvz, *args, "-n", "8")  # noqa: E731
    code, one, err = ask("Who?")
    assert (code, err) == (0, "")
    code, two, _ = ask("Who?", "When?")
    assert two.startswith(f"Who?\n{one}\nWhen?\n")
    code, out, err = ask("Who?", "When?", "--json")
    found = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert [row["question"] for row in found] == ["Who?", "When?"]
    assert all(row.keys() >= ASK_KEYS and row["num_new_tokens"] == 8 for row in found)
    batched = json.loads(ask("Who?", "When?", "--json", "--batch")[1])
    assert [row["answer"] for row in batched] == [row["answer"] for row in found]
    assert ask("Who?", "When?", "--batch")[1].startswith("Who?\n")


def test_questions_from_stdin_and_from_a_file(forks, tiny_kvz, tmp_path):
    (tmp_path / "more.txt").write_text("Where?\n")
    args = ["ask", tiny_kvz, "-", "--questions-file", "more.txt", "-n", "4", "--json"]
    done = Running(forks, args, tmp_path).finish(b"Who?\n\nWhen?")
    assert [row["question"] for row in json.loads(done.stdout)] == ["Who?", "When?", "Where?"]


def test_a_seed_makes_sampling_repeatable(tiny_kvz, monkeypatch, capsys, tmp_path):
    def sample(*args: str) -> list[str]:
        options = ["-n", "12", "-t", "1.5", "--top-p", "0.99", "--json", *args]
        return [row["answer"] for row in json.loads(call(monkeypatch, capsys, tmp_path, "ask", tiny_kvz, *options)[1])]

    first = sample("Who?", "Who?", "--seed", "1")
    assert first[0] == first[1] == sample("Who?", "--seed", "1")[0]
    assert sample("Who?", "--seed", "2")[0] != first[0]


def test_chat_serves_lines(forks, tiny_kvz, tmp_path):
    def chat(file, stdin: str) -> subprocess.CompletedProcess:
        return Running(forks, ["chat", file, "-n", "6"], tmp_path).finish(stdin.encode())

    lines = [
        "Who?",
        "/stats",
        "When?",
        "/rewind",
        "/save talk.kvz",
        "/nonsense",
        "/help",
        "/reset",
        "/rewind 5",
        "/quit",
        "no",
    ]
    done = chat(tiny_kvz, "\n".join(lines))
    assert done.returncode == 1  # two of the lines were refused
    assert done.stdout.count("turn remembered") == 1 and "0 turns remembered" in done.stdout
    assert "/rewind [N]" in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 2 and "'/nonsense'" in errors[0] and "can't rewind 5 turns" in errors[1]
    again = chat("talk.kvz", "/stats\nWhen?\n/stats")
    assert (again.returncode, again.stderr) == (0, "")
    assert re.findall(r"Conversation +(\d) turn", again.stdout) == ["1", "2"]
    straight = chat(tiny_kvz, "Who?\nWhen?").stdout
    assert straight.splitlines()[-1] == again.stdout.splitlines()[-4]


def test_inspect_needs_no_model(tiny_kvz, tmp_path, monkeypatch, capsys):
    inspect = lambda *args: call(monkeypatch, capsys, tmp_path, "inspect", *args)  # noqa: E731
    found = json.loads(inspect(tiny_kvz, "--json")[1])
    assert len(found["pairs_per_head"]) == 3 and found["context_len"] == 544
    assert "lamp" in inspect(tiny_kvz)[1]
    assert "lamp" not in inspect(tiny_kvz, "--no-text")[1]
    code, out, err = inspect(tiny_kvz, "-m", "no/model")
    assert code == 0 and "What was kept" in out and "lamp" not in out
    assert err.count("\n") == 1 and "tokenizer of 'no/model' is not on this machine" in err


def test_inspect_writes_a_page(tiny_kvz, tmp_path, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, tmp_path, "inspect", tiny_kvz, "--html", "page.html")
    assert (code, out, err) == (0, "wrote page.html\n", "")
    assert "<html" in (tmp_path / "page.html").read_text()
    code, _, err = call(monkeypatch, capsys, tmp_path, "inspect", tiny_kvz, "--html", "no/page.html")
    assert code == 1 and "does not exist" in err


def test_models_lists_and_pulls(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "cache"))
    rows = json.loads(call(monkeypatch, capsys, tmp_path, "models", "--json")[1])
    assert {row["name"] for row in rows} >= {"smollm2-135m"} and not any(row["is_cached"] for row in rows)
    assert "smollm2-135m" in call(monkeypatch, capsys, tmp_path, "models")[1]
    code, _, err = call(monkeypatch, capsys, tmp_path, "models", "pull", "smolm2")
    assert code == 1 and "did you mean 'smollm2-135m'" in err


def test_methods_are_listed_with_needs_and_options(tmp_path, monkeypatch, capsys):
    rows = json.loads(call(monkeypatch, capsys, tmp_path, "methods", "--json")[1])
    found = {(row["kind"], row["name"]): row for row in rows}
    assert len(found) == len(rows) and {row["kind"] for row in rows} == {
        "recipe",
        "method",
        "scorer",
        "budget",
        "transform",
        "fetch",
    }
    pyramid = found["method", "pyramidkv"]
    assert pyramid["composition"] == "window:window_size=8+pyramid" and pyramid["needs"] == ["window_queries"]
    assert pyramid["options"]["window_size"]["default"] == "8" and pyramid["options"]["beta"]["default"] == "20"
    assert found["method", "kvzip"]["query_agnostic"] and not found["method", "snapkv"]["query_agnostic"]
    assert all(row["description"] and row["source"] for row in rows)
    decide = {(row["kind"], row["name"]) for row in rows if row["decides_count"]}
    assert decide == {("method", "refreekv"), ("method", "leankv"), ("budget", "threshold")}
    code, shown, _ = call(monkeypatch, capsys, tmp_path, "methods")
    assert code == 0 and all(row["name"] in shown for row in rows)


def test_a_method_that_decides_how_much_to_keep_takes_no_ratio(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    args = ["compress", "text.txt", "-m", tiny, "--method", "refreekv:whole_layers=0,threshold=0.2"]
    code, out, _ = call(monkeypatch, capsys, tmp_path, *args, "--json")
    made = json.loads(out)
    assert code == 0 and made["keep_ratio_asked"] is None and 0 < made["keep_ratio"] < 1
    assert "asked" not in call(monkeypatch, capsys, tmp_path, *args)[1]
    code, _, err = call(monkeypatch, capsys, tmp_path, *args, "-r", "0.3")
    assert code == 1 and err.count("\n") == 1 and "decides itself how much to keep: leave it out" in err


@pytest.mark.parametrize(
    ("kind", "method"),
    [("head", "kvzip-head"), ("baklava", "baklava"), ("duo", "duo-attention"), ("kvsharer", "kvzip+kvsharer")],
)
def test_calibrate_serves_the_methods_that_need_it(tiny, tmp_path, monkeypatch, capsys, kind, method):
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    compress = ["compress", "text.txt", "-m", tiny, "--method", method, "-r", "0.5"]
    code, _, err = call(monkeypatch, capsys, tmp_path, *compress)
    assert code == 1 and f"kvzip calibrate --method {kind}" in err
    args = ["calibrate", "--method", kind, "-m", tiny, "--text", "text.txt"]
    code, out, err = call(monkeypatch, capsys, tmp_path, *args)
    assert (code, err) == (0, "") and Path(out.strip()).is_file()
    made = json.loads(call(monkeypatch, capsys, tmp_path, *args, "--json")[1])
    assert made["method"] == kind and made["path"] == out.strip() and made["model"]
    assert call(monkeypatch, capsys, tmp_path, *compress)[0] == 0


def test_distill_serves_kvzip_fast(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    compress = ["compress", "text.txt", "-m", tiny, "--method", "kvzip-fast", "-r", "0.5"]
    code, _, err = call(monkeypatch, capsys, tmp_path, *compress)
    assert code == 1 and "kvzip distill -m MODEL" in err and err.count("\n") == 1
    args = ["distill", "-m", tiny, "--text", "text.txt", "--text", "other.txt", "--seed", "1"]
    made = json.loads(call(monkeypatch, capsys, tmp_path, *args, "--json")[1])
    assert made["source"] == "text.txt, other.txt" and made["seed"] == 1 and Path(made["path"]).is_file()
    assert 0 < made["num_held_out"] < made["num_tokens"] and set(made["overlap"]) == {"0.5", "0.3"}
    code, out, err = call(monkeypatch, capsys, tmp_path, *args)
    assert (code, err) == (0, "") and made["path"] in out
    assert f"{made['rank_correlation']:.3f} with the scores of a replay" in out and "overlap at 0.3" in out
    assert call(monkeypatch, capsys, tmp_path, *compress)[0] == 0


def test_what_can_not_be_distilled_is_refused(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "short.txt").write_text("Short.")
    for name, reason in (("short.txt", "give at least 200"), ("missing.txt", "missing.txt")):
        code, out, err = call(monkeypatch, capsys, tmp_path, "distill", "-m", tiny, "--text", name)
        assert code == 1 and not out and reason in err and err.count("\n") == 1


def test_what_can_not_be_calibrated_is_refused(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "short.txt").write_text("Short.")
    code, _, err = call(monkeypatch, capsys, tmp_path, "calibrate", "--method", "baklawa", "-m", tiny)
    assert code == 1 and "did you mean 'baklava'" in err
    args = ["calibrate", "--method", "duo", "-m", tiny, "--text", "short.txt"]
    code, _, err = call(monkeypatch, capsys, tmp_path, *args)
    assert code == 1 and "give more than 320" in err and err.count("\n") == 1


# ---- the demo


def test_the_questions_of_the_demo_can_be_answered_from_the_text():
    text, quizzes = " ".join(demo.load_text().split()), demo.load_quizzes()
    assert 1300 <= len(text.split()) <= 1800
    assert len(quizzes) >= 6
    assert all(any(phrase.lower() in text.lower() for phrase in quiz.expect) for quiz in quizzes)
    lines = (Path(kvzip.__file__).parent / "data" / "lighthouse.questions.txt").read_text().splitlines()
    assert lines == [quiz.question for quiz in quizzes]


def test_the_demo_runs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_text", lambda: TEXT)
    code, out, err = call(monkeypatch, capsys, tmp_path, "demo", "-m", tiny)
    assert (code, err) == (0, "")
    assert "reopened in" in out and f"of {len(demo.load_quizzes())} right" in out
    assert os.listdir(tmp_path) == []


# ---- eval


def test_eval_measures_writes_a_page_and_goes_on(tiny, tmp_path, monkeypatch, capsys):
    args = (
        "eval", "-m", tiny, "--tasks", "niah", "--methods", "kvzip", "--keep-ratios", "0.5", "--limit", "2",
        "--context-len", "200", "--json", "rows.jsonl", "--report", "page.html", "--pictures", "png",
    )  # fmt: skip
    code, out, err = call(monkeypatch, capsys, tmp_path, *args)
    assert (code, err) == (0, "")
    methods = ("full", "kvzip", "random", "streaming-llm")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["niah", m] for m in methods]
    assert "<h2>niah</h2>" in (tmp_path / "page.html").read_text()
    assert sorted(p.name for p in (tmp_path / "png").iterdir()) == [
        "niah-curves.png", "niah-kept.png", "niah-needles.png",
    ]  # fmt: skip
    rows = (tmp_path / "rows.jsonl").read_bytes()
    assert str(tmp_path).encode() not in rows
    assert call(monkeypatch, capsys, tmp_path, *args)[:2] == (0, out)
    assert (tmp_path / "rows.jsonl").read_bytes() == rows
    code, out, err = call(monkeypatch, capsys, tmp_path, *args, "--seed", "3")
    assert (code, out) == (1, "") and "holds a run of other settings" in err and err.count("\n") == 1
    code, out, err = call(monkeypatch, capsys, tmp_path, "eval", "--compare", "rows.jsonl", "rows.jsonl")
    assert (code, err) == (0, "") and out.count("+0.0 ± 0.0") == len(methods)


def test_eval_takes_a_text_and_questions(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    (tmp_path / "q.txt").write_text("Who jumps?\tfox\n\nOver whom?\n")
    args = ("eval", "-m", tiny, "--tasks", "text", "--data", "t.txt", "--keep-ratios", "1,0.2", "--json", "r.jsonl")
    code, _, err = call(
        monkeypatch, capsys, tmp_path, *args, "--questions", "q.txt", "--reconstruction", "--multi-turn"
    )
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    (asked,) = [row for row in rows if row["kind"] == "asked"]
    assert [q["text"] for q in asked["questions"]] == ["Who jumps?", "Over whom?"]
    full, *others = [row for row in rows if row["kind"] == "row"]
    assert asked["questions"][0]["gold"] == "fox" and asked["questions"][1]["gold"] == full["answers"][1]["answer"]
    assert all(0 <= row["reconstruction"] <= 1 for row in others) and len(others) == 6
    code, out, err = call(monkeypatch, capsys, tmp_path, *args[:-2])
    assert (code, out) == (1, "") and "the text has 0 sentences with a rare name" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["--tasks", "nia"], 1, "did you mean 'niah'"),
        (["--methods", "kvzi"], 1, "did you mean 'kvzip'"),
        (["--keep-ratios", "0.5,x"], 2, "keep ratio 'x' is not a number"),
        (["--keep-ratios", "1.2"], 1, "1.2 is out of range"),
        (["--limit", "0"], 2, "limit"),
        (["--json", "none/rows.jsonl"], 1, "'none' does not exist"),
        (["--report", "none/page.html"], 1, "'none' does not exist"),
        (["--tasks", "squad", "--data", "none.json"], 1, "none.json can't be read"),
        (["--tasks", "squad,gsm8k", "--data", "x"], 2, "2 of the tasks read a file"),
        (["--tasks", "retr-kv", "--data", "x"], 2, "0 of the tasks read a file"),
        (["--compare", "none.jsonl", "x"], 1, "none.jsonl is not a result file"),
    ],
)
def test_eval_refuses_bad_input(tiny, tmp_path, monkeypatch, capsys, args, code, reason):
    found = call(monkeypatch, capsys, tmp_path, "eval", "-m", tiny, "--context-len", "200", *args)
    assert found[0] == code and reason in found[2].replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_eval_lists_its_tasks(tmp_path, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, tmp_path, "eval", "--list")
    assert (code, err) == (0, "") and all(name in out for name in ("retr-kv", "squad", "gsm8k"))
    code, out, err = call(monkeypatch, capsys, tmp_path, "eval")
    assert code == 2 and "--model" in err


# ---- a real model


@pytest.mark.real
def test_from_a_text_to_an_answer(forks, tmp_path):
    (tmp_path / "light.txt").write_text("\n\n".join(demo.load_text().split("\n\n")[3:6]))
    done = run("compress", "light.txt", "-m", "smollm2-135m", "-r", "0.6", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.stderr == "" and found.keys() >= COMPRESS_KEYS
    assert found["keep_ratio"] == pytest.approx(0.6, abs=1e-4)
    assert found["kv_nbytes"] < 0.65 * found["full_kv_nbytes"]
    done = Running(forks, ["ask", "light.kvz", "Who was born at Saffron Walden?", "-n", "16"], tmp_path).finish()
    assert done.stderr == "" and "Winstanley" in done.stdout
    done = Running(forks, ["inspect", "light.kvz"], tmp_path).finish()
    assert done.stderr == "" and "Winstanley" in done.stdout


@pytest.mark.real
def test_the_full_cache_answers_every_question_of_the_demo():
    """Else the comparison of the demo would mean nothing."""
    full, quizzes = load("qwen2.5-coder-0.5b").prefill(demo.load_text()).compress(1.0), demo.load_quizzes()
    answers = full.ask_many([quiz.question for quiz in quizzes], max_new_tokens=demo.MAX_NEW_TOKENS)
    assert not [answer for quiz, answer in zip(quizzes, answers, strict=True) if not quiz.is_right(answer)]


def test_what_is_kept_is_searched_for(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 4)
    args = ["compress", "text.txt", "-m", tiny, "--json"]
    code, out, _ = call(monkeypatch, capsys, tmp_path, *args, "--keep-ratio", "auto", "--max-loss", "0.5")
    found = json.loads(out)
    assert code == 0 and found["loss"]["kl_bound"] <= 0.5 and "with a loss of at most 0.5" in found["chosen"]
    code, out, _ = call(monkeypatch, capsys, tmp_path, *args, "--max-bytes", f"{found['full_kv_nbytes'] // 3}B")
    small = json.loads(out)
    assert code == 0 and small["kv_nbytes"] <= found["full_kv_nbytes"] // 3 and "the best of 12" in small["chosen"]
    code, out, _ = call(monkeypatch, capsys, tmp_path, "inspect", "text.kvz")
    assert code == 0 and "Chosen" in out
    code, out, _ = call(monkeypatch, capsys, tmp_path, *args, "--method", "kvzip:small")
    found = json.loads(out)
    assert code == 0 and found["keep_ratio_asked"] is None and found["budget_asked"] == "8x"
    assert found["keep_ratio"] >= RECIPES["kvzip:small"].size.least - 0.001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-r", "much"], "keep ratio 'much' is no number: give 0 < r <= 1"),
        (["-r", "2"], "keep ratio 2.0 is out of range"),
        (["-r", "0.3", "--max-loss", "0.1"], "keep_ratio 0.3 can't be asked beside max_loss"),
        (["--max-loss", "-1"], "max_loss -1.0 is out of range: give nats a token above 0"),
        (["--max-bytes", "1KB"], "max_bytes '1KB' is too small"),
        (["--max-bytes", "plenty"], "'plenty' is not an amount"),
        (["--method", "kvzip:huge"], "unknown recipe 'kvzip:huge': "),
        (["--max-loss", "0.1", "--no-certificate"], "the search goes by the certificate"),
    ],
)
def test_what_a_search_can_not_do(options, message, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, err = call(monkeypatch, capsys, tmp_path, "compress", "text.txt", "-m", tiny, *options)
    assert code == 1 and message in err and out == "" and not (tmp_path / "text.kvz").exists()


@pytest.mark.parametrize("busy", [0.0, 1000.0, None])
def test_a_busy_machine_is_named_and_written_down(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path, busy: float | None
) -> None:
    monkeypatch.setattr(kvzip.bench.measure, "busy_cores", lambda: busy)
    words = ("bench", "decode", "-m", tiny, "--context-len", "64", "--runs", "1", "--json", "found.json")
    for more in ((), ("--quiet",)):
        code, _, err = call(monkeypatch, capsys, tmp_path, *words, *more)
        assert code == 0 and ("1000.0 of" in err) is (busy == 1000.0 and not more)
        assert json.loads((tmp_path / "found.json").read_text())["busy_cores"] == busy
