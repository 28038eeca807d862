"""Text <-> tokens: byte-level BPE as a tiktoken.Encoding, learned here or as published with Qwen2.5.

An encoded folder holds its tokeniser as tokenizer.json: {"pattern", "ranks", "specials"}.
"""
import base64
import json
import os
import re
import unicodedata
from collections import Counter

import tiktoken

from files.atomic import read_json
from files.fields import check_fields, list_of, one_line, short, text


def load_tokenizer(path):
    """The tokenizer.json that prepare.py wrote, as a tiktoken.Encoding with the three special tokens of the
    monologue."""
    saved = read_json(path, LARGEST)
    try:
        check_fields(saved, {"ranks": ("an object", lambda x: isinstance(x, dict)), "pattern": text(2000),
                             "specials": list_of(text(100), 10_000)})
        ranks = {base64.b64decode(b, validate=True): r for b, r in saved["ranks"].items()}
        return make_tokenizer(ranks, saved["pattern"], saved["specials"])
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: not a tokeniser that prepare.py wrote ({one_line(e)})") from None


def dump_tokenizer(saved):
    """What get_tokenizer returns -> the text of a tokenizer.json."""
    ranks = {base64.b64encode(b).decode(): r for b, r in saved["ranks"].items()}
    return json.dumps({**saved, "ranks": ranks})


MONOLOGUE = ("<wait>", "<asr>", "<answer>")  # our special tokens
LARGEST = 24_000_000  # bytes of a vocabulary's file


def make_tokenizer(ranks, pattern, specials=(), ours=MONOLOGUE):
    """A byte-level BPE of ranks {bytes: rank}. After its words come its special tokens, in order, and then
    ours. ValueError for what tiktoken would not survive."""
    names = [*specials, *ours]
    if any(type(r) is not int for r in ranks.values()) or sorted(ranks.values()) != list(range(len(ranks))) \
            or {bytes([b]) for b in range(256)} - {*ranks}:
        raise ValueError("its ranks are not 0, 1, 2, ... with every byte among them")
    if not all(isinstance(name, str) and name for name in names) or len({*names}) < len(names):
        raise ValueError("its special tokens are not names, each another one")
    # Patterns that look around can take tiktoken forever, or end the process. Published ones do it once.
    easy, _, end = pattern.partition(r"|\s+(?!\S)")
    if re.search(r"\(\?(?!i?:)|\\[1-9gkKG]|[+*?]\+|\{[\d,]+\}\+", easy) or end not in ("", r"|\s+"):
        raise ValueError(f"its pattern is of a kind that cannot be trusted: {short(pattern)}")
    specials = {name: len(ranks) + i for i, name in enumerate(names)}
    kind = "own" if pattern == PATTERN else "published"
    tokenizer = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    encode("it is  late\n\n1!aa, 你好€ ", tokenizer)  # panics if the pattern matches no letter at all
    return tokenizer


def encode(text, tokenizer):
    """The tokens of a text, without special ones. ValueError where tiktoken panics."""
    try:
        return tokenizer.encode_ordinary(text)
    except BaseException as e:  # its panic is no Exception
        if type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"its pattern cannot split {short(text)}") from None


PATTERN = r" ?[^\s]+|\s+"  # of our own tokenisers: BPE merges within a word and the space before it
# Thai to Burmese, Khmer, Chinese and Japanese: scripts that put no space between words
NO_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u9fff\uf900-\ufaff\uff00-\uffef"
                       "\U00020000-\U0003ffff]")


def words_of(text):
    """The words of a text as our own tokenisers see them, each with a space before it."""
    return re.findall(PATTERN, " " + unicodedata.normalize("NFC", text))


def encode_words(text, tokenizer):
    """The tokens of each word of a text: a list of lists. Every word gets a space before it, the first one
    too, so that it has the same tokens at any place. Only for a published vocabulary, text in a script
    without spaces stays as it is written, as in what that vocabulary was made from."""
    as_written = tokenizer.name == "published" and NO_SPACES.search(text)
    words = unicodedata.normalize("NFC", text).split()
    return [encode(w if as_written and i == 0 else " " + w, tokenizer) for i, w in enumerate(words)]


def get_tokenizer(name, words, vocab_size):
    """What the tokenizer.json of an encoded folder holds: {"pattern", "ranks", "specials"}. name is "bytes",
    "bpe" (learned from words {word: how often}), or a folder with a published vocabulary."""
    if name == "bytes":
        return {"pattern": PATTERN, "ranks": train_bpe({}, 256), "specials": []}
    if name == "bpe":
        return {"pattern": PATTERN, "ranks": train_bpe(words, vocab_size), "specials": []}
    path = os.path.join(name, "tokenizer.json")
    if os.path.isfile(path) and "ranks" in (saved := read_json(path)):  # of another encoded folder
        load_tokenizer(path)
        return {**saved, "ranks": {base64.b64decode(b): r for b, r in saved["ranks"].items()}}
    return read_published_bpe(name)


def read_published_bpe(folder):
    """Qwen2.5's tokeniser, or any byte-level BPE in the same files: tokenizer.json, or vocab.json with
    merges.txt (and tokenizer_config.json, which names the special tokens). Raises ValueError or OSError with
    the file's name."""
    def read(name):
        path = os.path.join(folder, name)
        if name.endswith(".json"):
            return read_json(path, LARGEST)
        if os.path.getsize(path) > LARGEST:
            raise ValueError(f"{path}: is larger than {LARGEST} bytes")
        with open(path, encoding="utf-8") as f:
            return f.read().split("\n")
    have = [n for n in ("tokenizer.json", "vocab.json") if os.path.isfile(os.path.join(folder, n))]
    if not have:
        raise FileNotFoundError(f"{folder}: holds neither tokenizer.json nor vocab.json; "
                                "--tokenizer is bytes, bpe or a folder with one of them")
    path = os.path.join(folder, have[0])
    try:
        if have[0] == "tokenizer.json":
            saved = read("tokenizer.json")
            vocab, merges = saved["model"]["vocab"], saved["model"]["merges"]
            added = {t["id"]: t["content"] for t in saved["added_tokens"]}
            split = next(p for p in saved["pre_tokenizer"]["pretokenizers"] if p["type"] == "Split")
            pattern = split["pattern"]["Regex"]
        else:
            vocab, pattern = read("vocab.json"), QWEN_PATTERN
            merges = [line for line in read("merges.txt") if line and not line.startswith("#version")]
            named = os.path.isfile(os.path.join(folder, "tokenizer_config.json"))
            added = read("tokenizer_config.json")["added_tokens_decoder"] if named else {}
            added = {int(i): t["content"] for i, t in added.items()}
        vocab = {t: i for t, i in vocab.items() if i not in added}
        # tiktoken merges by the rank of the result: the same as by the list of merges if results are numbered
        # in its order
        for i, merge in enumerate(merges):
            if vocab["".join(merge.split(" ") if isinstance(merge, str) else merge)] != 256 + i:
                raise ValueError(f"merge {i} does not give token {256 + i}")
        ranks = {bytes(BYTES[c] for c in token): i for token, i in vocab.items()}
        specials = [added[i] for i in sorted(added)]
        if sorted(added) != list(range(len(vocab), len(vocab) + len(added))):
            raise ValueError("its special tokens do not follow its words")
        saved = {"pattern": pattern, "ranks": ranks, "specials": specials}
        make_tokenizer(**saved, ours=())
        return saved
    except (KeyError, TypeError, AttributeError, StopIteration, ValueError, OverflowError) as e:
        reason = f"{type(e).__name__}: {one_line(e)}"
        raise ValueError(f"{path}: not a byte-level BPE that can be read ({reason})") from None


def dump_published(saved):
    """What get_tokenizer returns, with our special tokens, as published vocabularies are written: {name of a
    file: its text}."""
    letters = {b: c for c, b in BYTES.items()}
    write = lambda token: "".join(letters[b] for b in token)
    ranks = dict(sorted(saved["ranks"].items(), key=lambda pair: pair[1]))
    merges = [[write(part) for part in last_merge(token, ranks)] for token in ranks if ranks[token] >= 256]
    flags = {name: False for name in ("single_word", "lstrip", "rstrip", "normalized")}
    added = [{"id": i, "content": name, **flags, "special": True}
             for i, name in enumerate([*saved["specials"], *MONOLOGUE], len(ranks))]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": saved["pattern"]}, "behavior": "Isolated", "invert": False}
    tokenizer = {"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"},
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, by_bytes]},
                 "decoder": by_bytes,
                 "model": {"type": "BPE", "vocab": {write(t): i for t, i in ranks.items()}, "merges": merges}}
    return {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
            "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})}


def last_merge(token, ranks):
    """The two parts that byte-pair encoding joins last."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
# Published vocabularies write a byte as a letter: those that look like one as themselves, the others from
# U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
INVISIBLE = sorted({*range(256)} - {*VISIBLE})
BYTES = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(INVISIBLE)}


def train_bpe(words, vocab_size):
    """Byte-pair encoding of words {word: how often it occurs}: {bytes: rank}. Merges the most frequent pair
    until the vocabulary is full or each word is one token."""
    splits = {w: [bytes([b]) for b in w.encode()] for w in words}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter()
        for w, parts in splits.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[w]
        if not pairs:
            break
        a, b = max(pairs, key=lambda p: (pairs[p], p))
        ranks[a + b] = len(ranks)
        for parts in splits.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (a, b):
                    parts[i:i + 2] = [a + b]
                i += 1
    return ranks
