"""Metrics against reference values, and against implementations written here from the published definitions."""

import importlib.util
import math
import string
from collections import Counter
from decimal import Decimal
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from megatron_patch.errors import UserError
from megatron_patch.evaluation.metrics import METRICS, captions, find_metric
from megatron_patch.evaluation.metrics.choice import chosen_letter, multiple_choice
from megatron_patch.evaluation.metrics.text import anls, edit_distance, exact_match, relaxed_accuracy, word_match
from megatron_patch.evaluation.metrics.vqa_accuracy import normalize, vqa_accuracy
from megatron_patch.evaluation.metrics.yes_no import mme_answer, mme_figures, pope_answer, pope_figures
from megatron_patch.evaluation.question import Question, rotations

UNHURRIED = settings(deadline=None, max_examples=60)  # no deadline: others use the machine too

# ---------------------------------------------------------------- VQA accuracy


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("Two dogs, on a mat.", "2 dogs on mat"),
        ("", ""),
        ("The", ""),
        ("Yes.", "yes"),
        ("3.5", "3.5"),
        ("1,000 people", "1000 people"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("t-shirt - blue", "tshirt blue"),  # beside a space once, a mark goes everywhere
        ("none", "0"),
        ("TEN\tcats\n", "10 cats"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("100%", "100%"),
        ("what?", "what"),
    ],
)
def test_the_vqa_normaliser(answer, normalized):
    assert normalize(answer) == normalized


@pytest.mark.parametrize(("people", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_one_person_out(people, accuracy):
    """The published example: n of ten people give min(1, n / 3), averaged over the ten subsets of nine."""
    references = ["two"] * people + [f"other {n}" for n in range(10 - people)]
    assert vqa_accuracy("2.", references) == pytest.approx(accuracy, abs=1e-12)


PEOPLE = st.sampled_from(["yes", "Yes.", "no", "the yes", "2", "two", "", "a dog", "dogs, cats", "1,000", "t-shirt"])


@UNHURRIED
@given(PEOPLE, st.lists(PEOPLE, min_size=10, max_size=10))
def test_vqa_accuracy_is_the_published_formula(answer, references):
    same = sum(_vqa_plain(reference) == _vqa_plain(answer) for reference in references)
    # Of ten subsets, `same` lack one of the matches.
    expected = (same * min(1, (same - 1) / 3) + (10 - same) * min(1, same / 3)) / 10
    assert vqa_accuracy(answer, references) == pytest.approx(max(0, expected), abs=1e-12)


@UNHURRIED
@given(st.text(alphabet="aAn the12,.-/'?!()\n one two", max_size=30))
def test_the_normaliser_is_that_of_the_published_steps(text):
    assert normalize(text) == _vqa_plain(text)


def _vqa_plain(text: str) -> str:
    """The steps of the evaluation page: strip, marks (beside a space: removed; else a space), periods, words."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    digit_comma_digit = any(
        text[n] == "," and text[n - 1].isdigit() and text[n + 1].isdigit() for n in range(1, len(text) - 1)
    )
    removed = {
        mark for mark in ';/[]"{}()=+\\_-><@`,?!' if digit_comma_digit or f"{mark} " in text or f" {mark}" in text
    }
    kept = ""
    for mark in text:
        if mark in ';/[]"{}()=+\\_-><@`,?!':
            kept += "" if mark in removed else " "
        else:
            kept += mark
    kept = "".join(mark for n, mark in enumerate(kept) if mark != "." or (n + 1 < len(kept) and kept[n + 1].isdigit()))
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    numbers = {word: number for number, word in enumerate(words)} | {"none": 0}
    words = [str(numbers.get(word, word)) for word in kept.lower().split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


# ---------------------------------------------------------------- texts and numbers


def test_exact_match_is_to_the_letter_and_word_match_is_not():
    assert exact_match(" odd ", ["odd"]) == 1 and exact_match("Odd", ["odd"]) == 0 == exact_match("odd.", ["odd"])
    assert word_match("Odd.", ["odd"]) == 1 == word_match("b", ["a", "B."]) and word_match("oddly", ["odd"]) == 0
    assert exact_match("", ["odd"]) == 0 == word_match("", ["odd"])


def test_anls_reference_values():
    assert anls("1988", ["1998"]) == 0.75
    assert anls("1988", ["none of it", "1988"]) == 1  # the best of the references
    assert anls("Coca  Cola ", ["coca cola"]) == 1  # neither case nor white space
    assert anls("ab", ["ac"]) == 0  # exactly the threshold: 1 - 0.5 is not above it
    assert anls("", ["abc"]) == 0 and anls("abc", ["", "abd"]) == pytest.approx(2 / 3)


SHORT = st.text(alphabet="abcAB 1", max_size=8)


@UNHURRIED
@given(SHORT, st.lists(SHORT, min_size=1, max_size=3))
def test_anls_is_the_published_formula(answer, references):
    @cache
    def distance(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        if one[0] == other[0]:
            return distance(one[1:], other[1:])
        return 1 + min(distance(one[1:], other), distance(one, other[1:]), distance(one[1:], other[1:]))

    best = 0.0
    for reference in references:
        one, other = (" ".join(text.lower().split()) for text in (answer, reference))
        assert edit_distance(one, other) == distance(one, other)
        share = distance(one, other) / max(len(one), len(other), 1)
        best = max(best, 1 - share if share < 0.5 else 0.0)
    assert anls(answer, references) == pytest.approx(best)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("105", "100", True),
        ("106", "100", False),
        ("95", "100", True),
        ("94.99", "100", False),
        ("1.05", "1", True),  # in floats 1.05 - 1 is above 0.05
        ("5%", "0.05", True),
        ("0.05", "5%", True),
        ("5", "5%", False),
        ("1,050", "1000", True),
        ("-105", "-100", True),
        ("105", "-100", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("0.0", "0", True),
        ("Blue ", "blue", True),
        ("blue", "blues", False),
        ("", "blue", False),
        ("", "0", False),
        ("100 dogs", "100", False),
        (".5", "0.5", True),
        ("nan", "nan", True),
        ("inf", "100", False),
    ],
)
def test_relaxed_accuracy(answer, reference, right):
    assert relaxed_accuracy(answer, [reference]) == right


def test_relaxed_accuracy_takes_any_reference():
    assert relaxed_accuracy("7", ["blue", "7.1"]) == 1


NUMBER = st.decimals(min_value=-10_000, max_value=10_000, places=3)


@UNHURRIED
@given(NUMBER, NUMBER | st.sampled_from([Decimal("0.05"), Decimal("-0.05"), Decimal("0.049")]), st.booleans())
def test_relaxed_accuracy_is_within_five_percent(wanted, offset, relative):
    answer = wanted + wanted * offset if relative else offset
    within = abs(answer - wanted) <= Decimal("0.05") * abs(wanted)
    assert relaxed_accuracy(f"{answer:,f}", [f"{wanted:f}"]) == within


# ---------------------------------------------------------------- multiple choice

ANIMALS = ("a cat", "a dog", "a black dog", "two dogs")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *((form, "B") for form in ("B", "b", "(B)", "B.", "B)", "[B]", "**B**", "B: a cat", "(B) a cat", "B. a cat")),
        *((form, "B") for form in ("Answer: b", "answer is (B).", "The answer is B, I think", "Option B")),
        ("a dog", "B"),
        ("A dog.", "B"),  # the article, not the letter
        ("I think it is C", "C"),
        ("two dogs", "D"),
        ("There are two dogs", "D"),
        ("A", "A"),
        ("", None),
        ("E", None),  # no such choice
        ("a fish", None),
        ("A cat or a dog", None),
        ("B or C", None),
        ("be", None),
    ],
)
def test_the_letter_that_an_answer_means(answer, letter):
    assert chosen_letter(answer, ANIMALS) == letter


FORMS = ("{}", "({})", "{}.", "{})", "[{}]", "Answer: {}", "The answer is {}.", "option ({})", "{}. it is so", " {}\n")


@UNHURRIED
@given(st.integers(2, 8), st.data())
def test_letters_are_found_in_every_form(count, data):
    choices = [f"thing {number} {'x' * number}" for number in range(count)]
    number = data.draw(st.integers(0, count - 1))
    letter = string.ascii_uppercase[number]
    for form in FORMS:
        assert chosen_letter(form.format(letter), choices) == letter
    assert chosen_letter(choices[number], choices) == letter
    assert multiple_choice(letter, [letter], choices) == 1 and multiple_choice("", [letter], choices) == 0


@UNHURRIED
@given(st.text(max_size=40), st.integers(2, 5))
def test_any_answer_is_a_choice_or_none(text, count):
    letters = string.ascii_uppercase[:count]
    assert chosen_letter(text, list("vwxyz"[:count])) in (None, *letters)


def test_rotations_keep_what_is_right():
    question = Question("7", "Which?", ("C",), (b"",), ("one", "two", "three"), "Say it.", "task")
    turned = rotations(question)
    assert [one.id for one in turned] == ["7#0", "7#1", "7#2"] and {one.group for one in turned} == {"7"}
    for one in turned:
        assert one.choices["ABC".index(one.references[0])] == "three" and sorted(one.choices) == ["one", "three", "two"]
    assert turned[1].prompt == "Which?\nA. two\nB. three\nC. one\nSay it."
    assert rotations(turned[0]) == [turned[0]] and rotations(Question("1", "?", ("x",)))[0].group == ""


def test_circular_accuracy_wants_every_rotation():
    metric = find_metric("multiple_choice")
    questions = [
        turned
        for name in "pq"
        for turned in rotations(Question(name, "?", ("A",), choices=("one", "two"), task=f"task {name}"))
    ]
    scores, table = metric(questions, ["A", "B", "A", "A"])
    assert scores == [1, 1, 1, 0]
    assert table["all"] == {"questions": 4, "accuracy": 75.0, "circular_accuracy": 50.0}
    assert table["task q"] == {"questions": 2, "accuracy": 50.0, "circular_accuracy": 0.0}
    plain = [Question("1", "?", ("A",), choices=("one", "two"))]
    assert metric(plain, ["A"])[1] == {"all": {"questions": 1, "accuracy": 100.0}}


# ---------------------------------------------------------------- yes and no


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        *((form, "no") for form in ("No.", "no, there is none", "NO!", "There is not. Yes")),
        *((form, "yes") for form in ("Yes", "Yes, there is. No doubt", "a dog", "nothing")),
        *((form, "") for form in ("", " . ")),
    ],
)
def test_what_pope_takes_an_answer_for(answer, said):
    assert pope_answer(answer) == said


@UNHURRIED
@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1, max_size=40))
def test_pope_figures_are_those_of_scikit_learn(pairs):
    given_, labels = zip(*pairs, strict=True)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, given_, pos_label="yes", average="binary", zero_division=0
    )
    found = pope_figures([f"{answer.title()}." for answer in given_], labels)
    expected = [accuracy_score(labels, given_), precision, recall, f1, given_.count("yes") / len(pairs)]
    assert list(found.values()) == pytest.approx(expected)


def test_an_empty_answer_is_wrong_for_pope():
    scores, table = METRICS["pope"](
        [Question(str(n), "?", (label,)) for n, label in enumerate(["yes", "no"])], ["", ""]
    )
    assert scores == [0, 0] and table["all"]["accuracy"] == 0 == table["all"]["yes_share"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [("Yes", "yes"), ("yes, it is", "yes"), ("No.", "no"), ("Not so", "no"), ("Maybe", ""), ("", "")],
)
def test_what_mme_takes_an_answer_for(answer, said):
    assert mme_answer(answer) == said


@UNHURRIED
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_mme_figures_are_the_published_ones(images):
    right = [hit for image in images for hit in image]
    names = [str(n) for n, image in enumerate(images) for _ in image]
    accuracy = 100 * accuracy_score([True] * len(right), right)
    plus = 100 * Counter(images)[True, True] / len(images)
    assert mme_figures(right, names) == pytest.approx(
        {"accuracy": accuracy, "accuracy_plus": plus, "score": accuracy + plus}
    )


def test_mme_adds_its_tasks_up():
    questions = [
        Question(f"{task}{image}{n}", "?", (label,), task=task, group=f"{task}/{image}")
        for task in ("existence", "OCR", "code_reasoning")
        for image in "xy"
        for n, label in enumerate(("yes", "no"))
    ]
    answers = ["Yes", "No"] * 2 + ["Yes", "Yes", "Yes", "No"] + ["No", "Yes"] * 2
    scores, table = METRICS["mme"](questions, answers)
    assert sum(scores) == 7
    assert table["existence"] == {"questions": 4, "accuracy": 100, "accuracy_plus": 100, "score": 200}
    assert table["OCR"] == {"questions": 4, "accuracy": 75, "accuracy_plus": 50, "score": 125}
    assert table["all"] == {"questions": 12, "perception": 325, "cognition": 0}


# ---------------------------------------------------------------- captions

GIVEN = ["a red seven on a black ground", "two dogs run over green grass"]
TRUTH = [
    ["a red seven on black ground", "the red number seven on a black ground"],
    ["two brown dogs run over the green grass", "dogs on grass", "two dogs running over grass"],
]


@pytest.mark.parametrize("metric", captions.PACKAGES)
def test_a_caption_metric_without_its_library_is_refused(metric, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"metric {metric} needs .* -m pip install {captions.PACKAGES[metric]}$"):
        find_metric(metric)


def test_cider_without_java_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="Java program"):
        find_metric("cider")
    assert find_metric("bleu") is METRICS["bleu"]


def test_bleu_is_the_published_formula():
    """Needs sacrebleu, which requirements.txt leaves out."""
    pytest.importorskip("sacrebleu")

    def grams(text: str, n: int) -> Counter:
        words = text.split()
        return Counter(tuple(words[place : place + n]) for place in range(len(words) - n + 1))

    logarithms = []
    for n in range(1, 5):
        pairs = [(grams(text, n), [grams(one, n) for one in truth]) for text, truth in zip(GIVEN, TRUTH, strict=True)]
        hits = sum(min(count, max(one[gram] for one in truth)) for mine, truth in pairs for gram, count in mine.items())
        logarithms.append(math.log(hits / sum(mine.total() for mine, _ in pairs)))
    lengths = [len(text.split()) for text in GIVEN]
    nearest = [
        min((abs(len(one.split()) - length), len(one.split())) for one in truth)[1]
        for length, truth in zip(lengths, TRUTH, strict=True)
    ]
    brevity = min(1.0, math.exp(1 - sum(nearest) / sum(lengths)))
    assert captions.bleu(GIVEN, TRUTH) == pytest.approx(100 * brevity * math.exp(sum(logarithms) / 4), abs=1e-6)


@pytest.mark.slow
def test_cider_tells_right_captions_from_swapped_ones():
    """Needs pycocoevalcap and Java."""
    pytest.importorskip("pycocoevalcap")
    assert captions.cider([truth[0] for truth in TRUTH], TRUTH) > 10 * captions.cider(GIVEN[::-1], TRUTH)


def test_unknown_metrics_are_refused():
    with pytest.raises(UserError, match=r"metric is 'accuracy'; wanted one of exact_match, .*cider"):
        find_metric("accuracy")
