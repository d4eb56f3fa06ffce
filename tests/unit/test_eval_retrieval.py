"""Retrieval tasks: texts that hold their answers, exact lengths, and scores that count what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoTokenizer

from oryx_megatron.data.tokenizer import write_manifest
from oryx_megatron.errors import ConfigError
from oryx_megatron.eval.export import ExportCodec
from oryx_megatron.eval.grid import plot_cells, run_grid, write_cells
from oryx_megatron.eval.retrieval import (
    IGNORED,
    AssociativeRecall,
    ByteCodec,
    Needle,
    PhoneBook,
    Pieces,
    RetrievalBatch,
    WordCodec,
    retrieval_task,
    score,
)
from oryx_megatron.eval.text import _PlainTextCodec
from oryx_megatron.hf.tokenizer import export_tokenizer
from oryx_megatron.modes import ModePlan

TASKS = [AssociativeRecall(vocab_size=64, pairs=6), Needle(ByteCodec()), PhoneBook(ByteCodec())]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_texts_are_exact_and_a_function_of_the_seed(task) -> None:
    one, two, other = task.sample(400, 9, 1), task.sample(400, 9, 1), task.sample(400, 9, 2)
    assert one.tokens.shape == one.labels.shape == (9, 400)
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.labels, two.labels)
    assert not torch.equal(one.tokens, other.tokens)
    asked = torch.zeros_like(one.labels, dtype=torch.bool)
    for row, start, stop in one.answers.tolist():
        asked[row, start:stop] = True
    assert torch.equal(asked, one.labels != IGNORED)


def test_recall_asks_for_the_value_of_each_key_once() -> None:
    batch = TASKS[0].sample(60, 50, 0)
    for row in range(50):
        tokens, labels = batch.tokens[row].tolist(), batch.labels[row].tolist()
        pairs = dict(zip(tokens[0:12:2], tokens[1:12:2]))
        assert len(pairs) == 6
        assert all(key < 32 <= value for key, value in pairs.items())
        queries = [(t, label) for t, label in zip(tokens, labels) if label != IGNORED]
        assert sorted(queries) == sorted(pairs.items())
        # Keys stand nowhere else: nothing answers a query but the pair itself.
        assert sum(token in pairs for token in tokens) == 12


def test_recall_queries_come_early_more_often() -> None:
    batch = AssociativeRecall(vocab_size=512, pairs=4, power=0.1).sample(208, 300, 0)
    places = batch.answers[:, 1].numpy() - 8
    assert np.median(places) < 60
    assert places.max() > 180


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0, None])
def test_needle_stands_at_its_depth_and_is_asked_for_at_the_end(depth: float | None) -> None:
    batch = Needle(ByteCodec(), depth=depth).sample(700, 20, 3)
    assert len(batch.answers) == 20
    depths = []
    for row, start, stop in batch.answers.tolist():
        text = bytes(batch.tokens[row].tolist()).decode()
        answer = bytes(batch.labels[row, start:stop].tolist()).decode()
        assert text.endswith(answer)  # teacher forcing: the answer follows the question
        question = text[: -len(answer)].rsplit("Question: ", 1)[1]
        fact = f"{question}{answer}."
        assert text.count(fact) == 1
        assert text.count("secret number") == 2
        depths.append(text.index(fact) / 640)
        assert "\n" in text[text.index(fact) :][: len(fact) + 1]
    if depth is not None:
        assert max(abs(d - depth) for d in depths) < 0.15
    else:
        assert min(depths) < 0.3 < 0.7 < max(depths)


def test_several_needles_and_questions() -> None:
    task = Needle(ByteCodec(), needles=6, questions=3)
    batch = task.sample(900, 10, 3)
    assert len(batch.answers) == 30
    for row, start, stop in batch.answers.tolist():
        text = bytes(batch.tokens[row].tolist()).decode()
        answer = bytes(batch.labels[row, start:stop].tolist()).decode()
        asked = text[: start + 1].rsplit("Question: ", 1)[1]
        assert text[start + 1 :].startswith(answer)
        facts, exam = text.split("Question: ", 1)
        assert facts.count(f"{asked}{answer}.\n") == 1
        assert facts.count("secret number") == 6
        assert exam.count("secret number") == 3
        assert exam.count(asked) == 1


def test_words_as_tokens() -> None:
    codec = WordCodec()
    batch = Needle(codec, needles=3).sample(100, 4, 0)
    assert batch.tokens.max() < codec.vocab_size
    assert (batch.answers[:, 2] - batch.answers[:, 1] == 5).all()
    assert codec.encode("The secret number of Lima is 12.\n")[-4:] == [1, 2, 10, 12]
    assert len(codec.encode("Question: The secret number of Lima is 12")) == 5
    assert len(Needle(codec, needles=2, questions=9).sample(120, 2, 0).answers) == 18
    for length in (50, 51, 90):
        task = Needle(codec, needles=2)
        full = replace(task, questions=task.most_questions(length))
        assert full.sample(length, 2, 0).tokens.shape == (2, length)
        with pytest.raises(ConfigError, match="is too small"):
            replace(full, questions=full.questions + 1).sample(length, 2, 0)
    for task in (AssociativeRecall(64), PhoneBook(codec)):
        assert task.sample(200, 2, 0).tokens.max() < codec.vocab_size


def test_phone_book_lists_the_asked_entry_once() -> None:
    batch = PhoneBook(ByteCodec()).sample(900, 20, 4)
    assert len(batch.answers) == 20
    for row, start, stop in batch.answers.tolist():
        text = bytes(batch.tokens[row].tolist()).decode()
        answer = bytes(batch.labels[row, start:stop].tolist()).decode()
        entry = text.rsplit("\n", 1)[1]
        assert entry.endswith(answer)
        assert text.count(entry.split(":")[0] + ":") == 2
        assert entry + "\n" in text
        assert len(text.splitlines()) > 25


def test_lengths_are_exact_with_tokens_of_any_length() -> None:
    class Words(ByteCodec):
        def encode(self, text: str) -> list[int]:
            return [hash_of(word) for word in text.split()]

    def hash_of(word: str) -> int:
        return sum(word.encode()) % 251

    for task in (Needle(Words()), PhoneBook(Words())):
        for length in (37, 38, 39, 40, 200):
            assert task.sample(length, 20, length).tokens.shape == (20, length)


def test_answers_can_be_tokenised_with_what_stands_before_them() -> None:
    """A tokenizer that joins `is 1` across the border must not make the answer unfindable."""

    class Pairs(ByteCodec):
        def encode(self, text: str) -> list[int]:
            data = text.encode()
            return [data[i] * 256 + (data[i + 1] if i + 1 < len(data) else 0) for i in range(0, len(data), 2)]

    batch = Needle(Pairs()).sample(300, 8, 0)
    assert batch.tokens.shape == (8, 300)
    assert (batch.answers[:, 2] > batch.answers[:, 1]).all()


def test_score_counts_whole_answers_and_tokens() -> None:
    labels = torch.tensor([[IGNORED, 5, 6, IGNORED], [7, IGNORED, IGNORED, 8]])
    batch = RetrievalBatch(torch.zeros_like(labels), labels, torch.tensor([[0, 1, 3], [1, 0, 1], [1, 3, 4]]))
    result = score(torch.tensor([[9, 5, 9, 9], [7, 9, 9, 8]]), batch)
    assert (result.answers, result.exact, result.tokens, result.right_tokens) == (3, 2, 4, 3)
    assert result.accuracy == pytest.approx(2 / 3)
    assert (result + result).token_accuracy == pytest.approx(0.75)


def test_grid_scores_by_plan_and_writes_json_and_plot(tmp_path: Path) -> None:
    """A made-up model that knows the answer exactly where it attends."""

    def predict(tokens: torch.Tensor, plan: ModePlan) -> torch.Tensor:
        known = truth[tokens.shape[1]]
        rows = [next(i for i, text in enumerate(known.tokens) if torch.equal(text, row)) for row in tokens]
        return torch.where(torch.from_numpy(plan.is_attention()), known.labels[rows], -1)

    task = AssociativeRecall(vocab_size=64, pairs=4)
    truth = {length: task.sample(length, 30, 5) for length in (40, 80)}
    seen = []
    cells = run_grid(
        predict, [task], [40, 80], ["attention", "recurrent", "last:20"], chunk=8, examples=30, batch_size=7, seed=5,
        on_cell=seen.append,
    )  # fmt: skip
    assert cells == seen
    by = {(cell.length, cell.plan): cell for cell in cells}
    assert by[40, "attention"].accuracy == 1
    assert by[80, "recurrent"].accuracy == 0
    assert 0 < by[80, "last:20"].accuracy < by[40, "last:20"].accuracy < 1
    assert by[80, "last:20"].attention_share == 0.25
    assert by[40, "attention"].answers == 120
    write_cells(cells, tmp_path / "r.json", model="made up")
    assert json.loads((tmp_path / "r.json").read_text())["cells"][0]["accuracy"] == 1
    plot_cells(cells, tmp_path / "r.png", "made up")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.png"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AssociativeRecall(64, pairs=20).sample(50, 1, 0), "20 pairs need a length of at least 60"),
        (lambda: AssociativeRecall(16, pairs=8).sample(50, 1, 0), "vocabulary of at least 32"),
        (lambda: Needle(ByteCodec()).sample(30, 1, 0), "length 30 is too small"),
        (lambda: Needle(ByteCodec(), needles=99).sample(900, 1, 0), "1 questions about 99 needles"),
        (lambda: PhoneBook(ByteCodec()).sample(20, 1, 0), "length 20 is too small"),
        (lambda: retrieval_task("nedle", ByteCodec()), "known: mqar, needle, phonebook"),
        (lambda: run_grid(lambda t, p: t, [TASKS[0]], [60], ["prefix:61"], chunk=8), "61 tokens are more than the 60"),
    ],
)
def test_bad_input_gets_one_line(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "<s> $A </s>", "$A"])
def test_a_text_that_continues_is_not_ended(tmp_path: Path, template: str) -> None:
    """Begun as in training, by a run's tokenizer and by an export's; pieces of a text are neither begun nor ended."""
    ends = ["<s>", "</s>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=ends, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([], trainer)
    around = tokenizers.processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.post_processor = around
    (tmp_path / "t").mkdir()
    (tmp_path / "hf").mkdir()
    backend.save(str(tmp_path / "t" / "tokenizer.json"))
    tokenizer = write_manifest(tmp_path / "t", eod="</s>", source="a test")
    export_tokenizer(tokenizer, tmp_path / "hf", 64)
    model = SimpleNamespace(config=SimpleNamespace(eos_token_id=1))
    exported = _PlainTextCodec(AutoTokenizer.from_pretrained(tmp_path / "hf"), model, split=False)
    for text, letters in (("", []), ("an é", ["a", "n", "Ġ", "Ã", "©"]), ("<s>x</s>", ["<s>", "x", "</s>"])):
        plain = [backend.token_to_id(letter) for letter in letters]
        assert Pieces(tokenizer).encode(text) == plain
        assert ExportCodec(exported.tokenizer).encode(text) == plain
        begun = [0, *plain] if template.startswith("<s>") else plain
        for codec in (tokenizer, exported):
            assert codec.encode_open(text) == begun
            assert codec.decode([*begun, 1]) == text.replace("<s>", "").replace("</s>", "")
