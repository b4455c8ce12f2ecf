import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from laid.data.questions import TEMPLATES, with_article
from laid.models.prompts import OFFICIAL_PROMPT
from laid.toy.tokenizer import SPECIAL_TOKENS, build_tokenizer, save_tokenizer

CATEGORIES = ("circle", "star", "hexagon", "orange", "arrow")
SENTENCES = [OFFICIAL_PROMPT, *(t.format(anchor="a thing", target="an object") for t in TEMPLATES.values())]
SENTENCES += ["system user assistant You are a helpful assistant.", "yes no Yes No"]


def tokenizer():
    return build_tokenizer(SENTENCES, [w for c in CATEGORIES for w in with_article(c).split()])


TOKENIZER = tokenizer()


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_every_category_and_answer_is_one_token_in_and_outside_a_sentence():
    for word in CATEGORIES:
        assert len(ids(word)) == len(ids(" " + word)) == 1, word
    assert len(ids("yes")) == len(ids("no")) == 1
    lengths = {len(ids(f"is there {with_article(c)}?")) for c in CATEGORIES}
    assert len(lengths) == 1  # questions differ in tokens, never in length


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(ids(text)) == unicodedata.normalize("NFC", text)


def test_special_tokens_are_single_and_never_made_of_pieces():
    for token in SPECIAL_TOKENS:
        assert ids(token) == [TOKENIZER.convert_tokens_to_ids(token)]
        assert ids(f"a{token}b")[1] == TOKENIZER.convert_tokens_to_ids(token)
    assert len({TOKENIZER.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}) == len(SPECIAL_TOKENS)
    assert TOKENIZER.eos_token == "<|im_end|>" and TOKENIZER.pad_token == "<|endoftext|>"


def test_the_same_words_give_the_same_bytes_and_loading_gives_the_same_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    for name in ("a", "b"):
        save_tokenizer(tokenizer(), tmp_path / name)
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "For the image with a star, is there an orange?<|im_end|>\n\u00e9\u4e2d"
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids(text)
    assert loaded.chat_template == TOKENIZER.chat_template


IMAGE = {"type": "image"}
CONVERSATIONS = [
    ([{"role": "user", "content": "hi"}], True),
    ([{"role": "user", "content": [IMAGE, {"type": "text", "text": "what?"}]}], True),
    ([{"role": "user", "content": [{"type": "text", "text": "one "}, IMAGE, IMAGE, {"type": "text", "text": "two"}]}], False),
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            {"role": "user", "content": [{"image_url": "x.png"}, {"image": "y.png"}]},
        ],
        True,
    ),
]  # fmt: skip


def test_chat_template_by_hand():
    render = TOKENIZER.apply_chat_template
    assert render(CONVERSATIONS[1][0], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    assert render(CONVERSATIONS[3][0], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        f"<|im_start|>user\n{block}{block}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_says_what_the_published_one_says(shared):
    from laid.io import read_json

    published = read_json(shared / "qwen2_5_vl/Qwen2.5-VL-7B-Instruct/chat_template.json")["chat_template"]
    for messages, generation in CONVERSATIONS:
        ours, theirs = (
            TOKENIZER.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=generation
            )
            for template in (None, published)
        )
        assert ours == theirs
