"""Tokenisers: learned, published, damaged."""
import json
import random
import unicodedata
from collections import Counter

import pytest

from corpora.readers import sentences_of
from prepare import tokens_of
from files.tokenizer import BYTES, PATTERN, QWEN_PATTERN, get_tokenizer, make_tokenizer, train_bpe


def test_bpe_makes_words_whole_and_text_round_trips():
    words = Counter({" repeat": 3, " cat": 3, " red": 4, " moon": 3, " opposite": 1, " of": 1})
    ranks = train_bpe(words, 400)
    t = make_tokenizer(ranks, PATTERN)
    assert len(t.encode_ordinary(" repeat cat red")) == 3
    for text in (" repeat cat", "Grüße, 世界!\n\t two  spaces", ""):
        assert t.decode(t.encode_ordinary(text)) == text


TEXTS = ["repeat cat", "Grüße, 世界! 你好吗？", "don't 12 3\n\t two  spaces", "# the 你好你好", "cafe\u0301",
         "𝄞 \u200b"]


def publish(folder, kind):
    """A small byte-level BPE in the files of Qwen2.5: merges for ' the', '你' and '# '."""
    letters = {b: c for c, b in BYTES.items()}
    word = lambda data: "".join(letters[b] for b in data)
    merges = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b"\xe4", b"\xbd"), (b"\xe4\xbd", b"\xa0"),
              (b"#", b" ")]
    merges = [(word(a), word(b)) for a, b in merges]
    vocab = [letters[b] for b in sorted(letters, key=letters.get)] + [a + b for a, b in merges]
    vocab = {t: i for i, t in enumerate(vocab)}
    added = [(len(vocab) + i, name) for i, name in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])]
    if kind == "tokenizer.json":
        split = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]}
        (folder / kind).write_text(json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
            "pre_tokenizer": split, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": False, "vocab": vocab, "merges": [" ".join(m) for m in merges]},
            "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False, "special": True} for i, name in added]}))
    else:
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        config = {"added_tokens_decoder": {i: {"content": c} for i, c in added}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", ["bytes", "bpe", "tokenizer.json", "vocab.json"])
def test_every_tokeniser_gives_back_every_text(name, tmp_path):
    words = Counter(" ".join(TEXTS[:2]).split())
    saved = get_tokenizer(name if "." not in name else publish(tmp_path, name), words, 300)
    t = make_tokenizer(**saved)
    for text in TEXTS:
        assert t.decode(t.encode_ordinary(text)) == text
        decoded = t.decode(tokens_of({"text": text}, t)["tokens"])
        assert decoded.split() == unicodedata.normalize("NFC", text).split()
    if "." in name:
        assert t.encode_ordinary("the the") == [saved["ranks"][b"t"], saved["ranks"][b"he"], 258]
        assert t.encode_ordinary("你") == [260] and saved["ranks"][b"# "] == 261
        assert t.encode("<|im_start|><wait>", allowed_special="all") == [263, 265]


@pytest.mark.parametrize("text", ["你好吗？世界！", "今天 你好， 世界", "3月你好", "AI你好 the", "ありがとう", "สวัสดี", "𠮷野家"])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_published_vocabulary_gets_text_without_spaces_as_it_is_written(name, text, tmp_path):
    t = make_tokenizer(**get_tokenizer(publish(tmp_path, name), {}, 0))
    assert tokens_of({"text": text}, t)["tokens"] == t.encode_ordinary(text)
    turn = {"text": text, "starts": [float(i) for i in range(len(text.split()))]}
    assert tokens_of(turn, t)["tokens"] == t.encode_ordinary(text) and tokens_of(turn, t)["starts"][0] == 0


@pytest.mark.parametrize("name", ["bytes", "bpe", "tokenizer.json", "vocab.json"])
def test_every_other_word_has_a_space_before_it(name, tmp_path):
    words = Counter([" the", " the", " 你好"])
    t = make_tokenizer(**get_tokenizer(name if "." not in name else publish(tmp_path, name), words, 300))
    texts = ["the other, the", "Grüße", "안녕 하세요"] + (["你好 你好"] if "." not in name else [])
    for text in texts:
        assert tokens_of({"text": text}, t)["tokens"] == t.encode_ordinary(" " + text)
    assert name != "bpe" or len(tokens_of({"text": "你好 你好"}, t)["tokens"]) == 2


def test_words_of_conversations_are_joined_as_they_are_written():
    words = [(w, i, i + 1, "SPEAKER_MAIN") for i, w in enumerate(["你", "好", "，", "Anna", "and", "我", "们"])]
    assert [s["text"] for s in sentences_of(words)] == ["你好， Anna and 我们"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_the_same_tokens_as_the_tokenizers_library(name, tmp_path):
    (tmp_path / "theirs").mkdir()
    path = publish(tmp_path / "theirs", "tokenizer.json") + "/tokenizer.json"
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(path)
    ours = make_tokenizer(**get_tokenizer(publish(tmp_path, name), {}, 0))
    rng, parts = random.Random(0), ["the", " the", " ", "你", "好", "#", "e\u0301", "'s", "7", "\n", "t", "h"]
    for _ in range(2000):
        text = "".join(rng.choice(parts) for _ in range(12))
        assert ours.encode_ordinary(unicodedata.normalize("NFC", text)) == theirs.encode(text).ids


@pytest.mark.parametrize("change, says", [
    (lambda f: (f / "vocab.json").unlink(), "holds neither"),
    (lambda f: (f / "vocab.json").write_text("[]"), "vocab.json: not a byte-level BPE"),
    (lambda f: (f / "vocab.json").write_text('{"a": 0}'), "vocab.json: not a byte-level BPE"),
    (lambda f: (f / "merges.txt").write_text("h e\nĠ t\n"), "merge 0 does not give token 256"),
    (lambda f: (f / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"900": {"content": ""}}}'),
     "do not follow"),
])
def test_a_damaged_vocabulary_is_one_clear_error(change, says, tmp_path):
    publish(tmp_path, "vocab.json")
    change(tmp_path)
    with pytest.raises((ValueError, OSError), match=says):
        get_tokenizer(str(tmp_path), {}, 0)
