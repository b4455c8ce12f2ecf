import math

import pytest
import torch

from laid.errors import LaidError
from laid.evaluation.scoring import (
    answer_tokens,
    official_bootstrap,
    probability_listed,
    probability_yes,
    spoken_answer,
    words,
)  # fmt: skip
from laid.models.processing import Processor

# Worked by hand after the official scorer (vhs_benchmark, utils.py: `label in nltk.word_tokenize(response.lower())`),
# and compared once with nltk 3.10's word tokenizer.
RESPONSES = {
    "yes": "yes",
    "Yes.": "yes",
    "YES!": "yes",
    "Yes, there is a dog in the image.": "yes",
    "  yes\n": "yes",
    '"Yes"': "yes",
    "'yes'": "yes",
    "(yes)": "yes",
    "**Yes**": "yes",
    "Answer:yes": "yes",
    "Yes\u2014it does": "yes",
    "Yes...": "yes",
    "\u201cYes\u201d": "yes",
    "No": "no",
    "No.": "no",
    "no,it is not": "no",
    "No image contains a truck.": "no",
    "There is no dog.": "no",
    "Oh no! There it is.": "no",
    "Is there a dog? No": "no",
    "Yes and no": "both",
    "No, wait: yes.": "both",
    "": "none",
    "I cannot tell.": "none",
    "nothing": "none",
    "Nope": "none",
    "yesterday": "none",
    "know": "none",
    "yes/no": "none",
    "no-one": "none",
    "non": "none",
    "The answer is 1.": "none",
    "yes.no": "none",
    "**No.**": "no",
    "<answer>no</answer>": "no",
    "<b>No.</b>": "none",
    "No.#": "none",
    "...Yes": "yes",
    "\u201cNo.\u201d": "no",
    "The answer is 'No'.": "no",
    "''yes''": "yes",
    "no'd": "no",
    "\\boxed{no}": "no",
    "{'answer': 'no'}": "no",
    "A. Yes\nB. No": "both",
    "Don't know; cannot say": "none",
    "no\u3002": "none",
}


@pytest.mark.parametrize("text", RESPONSES)
def test_what_a_response_says(text):
    assert spoken_answer(text) == RESPONSES[text]


def test_words_are_lower_case_tokens():
    assert words("Yes, 3,400 (three thousand) dogs... 10:30!") == [
        "yes", ",", "3,400", "(", "three", "thousand", ")", "dogs", "10:30", "!",
    ]  # fmt: skip


def test_share_of_yes_by_hand():
    """Two spellings of yes with logits ln 2 and ln 1, one of no with ln 1: 3 parts of 4."""
    logits = torch.tensor([[math.log(2.0), 50.0, 0.0, 0.0], [0.0, -50.0, -60.0, 0.0]])
    found = probability_yes(logits, yes=[0, 2], no=[3])
    torch.testing.assert_close(found, torch.tensor([0.75, 0.5]), rtol=1e-5, atol=1e-6)
    softmax = logits[:, [0, 2, 3]].softmax(-1)[:, :2].sum(-1)
    torch.testing.assert_close(found, softmax)
    assert probability_yes(torch.tensor([[900.0, -900.0]], dtype=torch.bfloat16), [0], [1]).tolist() == [1.0]


def test_share_of_yes_among_listed_tokens_by_hand():
    listed = [
        ("Yes", 0.3),
        ("The", 0.25),
        (" no", 0.1),
        ("\u0120yes", 0.1),
        ("\u2581No", 0.1),
        ("nope", 0.05),
    ]
    assert probability_listed((token, math.log(p)) for token, p in listed) == pytest.approx(0.4 / 0.6)
    assert probability_listed([("no", -9999.0), ("yes", -0.1)]) == 1.0
    assert probability_listed([("The", -0.1)]) is probability_listed([]) is None


def test_answer_tokens_are_whole_words(family):
    tokenizer = Processor.load(family["small"]).tokenizer
    yes, no = answer_tokens(tokenizer)
    assert {tokenizer.decode(i).strip().lower() for i in yes} == {"yes"}
    assert {tokenizer.decode(i).strip().lower() for i in no} == {"no"}
    assert tokenizer("yes", add_special_tokens=False)["input_ids"][0] in yes
    assert not set(yes) & set(no)


def test_answer_tokens_of_the_published_tokenizer(shared):
    tokenizer = Processor.load(shared / "qwen2_5_vl/Qwen2.5-VL-7B-Instruct").tokenizer
    yes, no = answer_tokens(tokenizer)
    assert sorted(tokenizer.decode(i) for i in yes) == sorted(["yes", "Yes", " yes", " Yes", "YES"])
    assert sorted(tokenizer.decode(i) for i in no) == sorted(["no", "No", " no", " No", "NO"])


def test_a_tokenizer_without_such_words_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({c: k for k, c in enumerate("yesno YESNO")}, unk_token="e"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    with pytest.raises(LaidError, match="no single token for 'yes'"):
        answer_tokens(PreTrainedTokenizerFast(tokenizer_object=letters))


def test_bootstrap_of_the_official_runner():
    """100 resamples, mean and standard deviation: near the share and its standard error, and the same every time."""
    said = ["yes"] * 60 + ["no"] * 20 + ["both"] * 10 + ["none"] * 10
    answers = [{"label": "yes", "answer": word} for word in said]
    found = official_bootstrap(answers)
    for name, share in (("accuracy", 0.7), ("compliance", 0.9)):
        error = math.sqrt(share * (1 - share) / 100)
        assert found[name][0] == pytest.approx(share, abs=3 * error / 10)
        assert found[name][1] == pytest.approx(error, rel=0.25)
    assert found == official_bootstrap(answers) != official_bootstrap(answers, seed=1)
    assert official_bootstrap(answers[:60]) == {"accuracy": (1.0, 0.0), "compliance": (1.0, 0.0)}
