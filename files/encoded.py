"""Encoded data: what `python prepare.py encode` writes and train.py reads.

    meta.json         version; fingerprints of the codec, the tokeniser and the manifest; the codes of silence
    codec.pt          a copy of the codec, so that the folder can be moved
    tokenizer.json    see tokenizer.py
    00000.npy         codes (frames, K) of SHARD lines of the manifest, int16, one clip after another
    00000.jsonl       those lines: tokens, and the place of each clip's codes {"shard", "offset", "frames"}
    index.npy         for each line of all shards, where it is and what it is good for: a row of LINE

There may be thousands of shards and millions of lines. Only the index is held in memory, 48 bytes a line.
Lines and codes are read from the disk when they are asked for, and no file stays open.
"""
import hashlib
import json
import os

import numpy as np

from files.atomic import read_array, read_json, replace_when_done
from files.checkpoint import is_safetensors, load_checkpoint
from files.fields import SECONDS, check_fields, list_of, one_line, parse_json, short, text, whole
from files.manifest import spoken_parts
from files.tokenizer import load_tokenizer

VERSION = 4  # of this format
SHARD = 500  # lines
ENCODED = r"(meta|tokenizer)\.json|codec\.pt|index\.npy|\d{5}\.(npy|jsonl)"  # the names in the folder

LINE = np.dtype([
    ("shard", "<u4"), ("byte", "<u8"), ("size", "<u4"),  # where the line is in the .jsonl
    ("split", "S5"), ("kind", "S12"),  # "" if the manifest has no kind
    ("turns", "<u2"), ("role", "S6"),  # the number of turns, and who has the first: user, model or either
    ("frames", "<u4"),  # that its longest clip and the text of that take in ASR style
    ("annotated", "?"), ("interjections", "?"), ("sentences", "?")])  # has sentences: a recorded conversation

# What the files may say: see files/fields.py.
FRAMES = whole(0, 1 << 22)
META = {"version": whole(VERSION, VERSION), "codec_sha256": text(64), "tokenizer_sha256": text(64),
        "codebooks": whole(1, 256), "codebook_size": whole(2, 1 << 15),
        "silence": list_of(list_of(whole(0, 1 << 15), 256), 1000, least=1),
        "shards": list_of(list_of(whole(0, 1 << 50)))}
PLACE = {"shard": whole(), "offset": whole(0, 1 << 40), "frames": FRAMES}
OBJECTS = list_of(("an object", lambda x: isinstance(x, dict)), 10_000)


def write_index(folder, shards):
    """Write folder/index.npy from the number of shards that are there. Returns the number of frames of codes
    in them."""
    parts, total = [np.zeros(0, LINE)], 0
    for shard in range(shards):
        total += len(np.load(os.path.join(folder, f"{shard:05}.npy"), mmap_mode="r"))
        rows, byte = [], 0
        with open(os.path.join(folder, f"{shard:05}.jsonl"), "rb") as f:
            for text in f:
                d = json.loads(text)
                turns = d.get("turns", [])
                kind, role = str(d.get("kind", "")).encode(), turns[0]["role"].encode() if turns else b""
                frames = max((max(c["frames"], c["speech"] + len(t["tokens"])) for t in turns
                              for c in t["copies"]), default=0)
                rows.append((shard, byte, len(text), d["split"].encode(), kind, len(turns), role, frames,
                             d["annotated"], bool(d.get("interjections")), "sentences" in d))
                byte += len(text)
        parts.append(np.array(rows, LINE))
    with replace_when_done(os.path.join(folder, "index.npy")) as temporary, open(temporary, "wb") as f:
        np.save(f, np.concatenate(parts), allow_pickle=False)
    return total


def read_encoded(folders):
    """Open one folder, or several with commas between them, as EncodedData. Raises ValueError or OSError if
    one is not there, is of another version, or was made with another codec or tokeniser than the first
    one."""
    metas, indexes, shards = [], [], []
    for folder in folders.split(","):
        try:
            meta, index = read_folder(folder)
        except FileNotFoundError as e:
            name = e.filename or str(e).split(":")[0]
            raise FileNotFoundError(f"{name}: not there; `python prepare.py encode` makes it") from None
        metas.append(meta)
        for name in ("codec", "tokenizer"):
            if meta[name + "_sha256"] != metas[0][name + "_sha256"]:
                raise ValueError(f"{folder}: was encoded with another {name} than {folders.split(',')[0]}")
        index["shard"] += len(shards)
        indexes.append(index)
        shards += [(os.path.join(folder, f"{i:05}"), len(shards)) for i in range(len(meta["shards"]))]
    return EncodedData(metas[0], np.concatenate(indexes), shards)


def read_folder(folder):
    """meta.json with the paths of the codec and the tokeniser and its "text_size"; and the index. All files
    are there."""
    meta = read_json(os.path.join(folder, "meta.json"))
    if isinstance(meta, dict) and meta.get("version") != VERSION:
        raise ValueError(f"{folder}: is of version {short(meta.get('version'))}, not {VERSION}; "
                         "run `python prepare.py encode` again")
    try:
        check_fields(meta, META, what="meta.json")
        check_silence(meta)
    except ValueError as e:
        raise ValueError(f"{folder}: is not what `python prepare.py encode` writes ({e})") from None
    for name, file in (("codec", "codec.pt"), ("tokenizer", "tokenizer.json")):
        meta[name] = os.path.join(folder, file)
        if sha256(meta[name]) != meta[name + "_sha256"]:
            raise ValueError(f"{folder}: was encoded with another {name} than {meta[name]} now is; "
                             "encode it again")
    sizes = meta["codebooks"], meta["codebook_size"]
    if not is_safetensors(meta["codec"]):
        c = load_checkpoint(meta["codec"], "codec", mmap=True)["config"]
        if (c.get("codebooks"), c.get("codebook_size")) != sizes:
            raise ValueError(f"{folder}: holds other codes than those of its codec; encode it again")
    meta["text_size"] = load_tokenizer(meta["tokenizer"]).n_vocab
    sizes = []  # of the shards' lines, in bytes
    for shard in range(len(meta["shards"])):
        path = os.path.join(folder, f"{shard:05}")
        os.stat(path + ".npy")
        sizes.append(os.stat(path + ".jsonl").st_size)
    path = os.path.join(folder, "index.npy")
    index = read_array(path, "encode it again")
    if index.dtype != LINE or index.ndim != 1 or index.size and index["shard"].max() >= len(sizes):
        raise ValueError(f"{path}: is of another version; encode it again")
    check_index(index, np.array(sizes, np.uint64), folder)
    return meta, index


def check_silence(meta):
    for frame in meta["silence"]:
        if len(frame) != meta["codebooks"] or max(frame) >= meta["codebook_size"]:
            raise ValueError("its silence is no frames of its codes")


def check_index(index, sizes, folder):
    """ValueError unless all lines are within their files (of these sizes), and long enough for their
    turns."""
    beyond = index["byte"] + index["size"] > sizes[index["shard"]] if len(index) else ()
    for i in np.flatnonzero(beyond)[:1]:
        shard, byte = index["shard"][i], index["byte"][i]
        raise ValueError(f"{folder}/{shard:05}.jsonl from byte {byte}: damaged, not a line; encode it again")
    too_short = index["turns"].astype(int) * 16 > index["size"]
    if index["size"].sum(dtype=np.uint64) > sizes.sum() or too_short.any():
        raise ValueError(f"{folder}/index.npy: damaged; encode it again")


def check_encoded(line, row, text_size):
    """ValueError unless a line has the turns that its row of the index says, with tokens of the vocabulary,
    and places of codes as training reads them."""
    tokens = list_of(whole(0, text_size - 1))
    check_fields(line, {"split": text(5)}, dict.fromkeys(("turns", "interjections", "sentences"), OBJECTS))
    if ("sentences" in line) != row["sentences"] or len(line.get("turns", ())) != row["turns"]:
        raise ValueError("its turns are not those of the index")
    for turn in line.get("turns", ()):
        check_fields(turn, {"role": text(6), "tokens": tokens, "copies": OBJECTS},
                     {"echoes": OBJECTS, "starts": list_of(FRAMES), "voice": text(1000)})
    for part in line.get("interjections", ()):
        check_fields(part, {"at": SECONDS, "tokens": tokens, "copies": OBJECTS})
    for sentence in line.get("sentences", ()):
        check_fields(sentence, {"frame": FRAMES, "tokens": tokens}, {"cut": FRAMES})
    for part in spoken_parts(line):
        for copy in part["copies"]:
            check_fields(copy, {**PLACE, "speech": FRAMES, "late": whole(0, 10_000)})
        if not part["copies"] or len(part.get("starts", part["tokens"])) != len(part["tokens"]):
            raise ValueError("a turn needs copies, and a start for each token")
    for place in places(line):
        check_fields(place, PLACE)


class EncodedData:
    """Lines and codes of one or several encoded folders.

    meta: of the first folder, with "text_size", the tokeniser's vocabulary, and the paths "codec" and
    "tokenizer". index (lines,): an array of LINE, whose columns group the lines without reading them.

        data = read_encoded("data/toy/encoded,data/mixed/encoded")
        dialogues = np.flatnonzero((data.index["split"] == b"train") & (data.index["turns"] > 1))
        line = data.line(rng.choice(dialogues))
        codes = data.codes(line["turns"][0]["copies"][0])  # (frames, K)

    It has no open files: it can be pickled, and used from several threads and processes.
    """

    def __init__(self, meta, index, shards):
        """shards: for each (its path without ending, the number of its folder's first shard)"""
        self.meta, self.index, self.shards = meta, index, shards

    def __len__(self):
        return len(self.index)

    def line(self, i):
        """The i-th line as `prepare.py encode` wrote it, but with shards numbered through all folders."""
        shard, byte, size = (int(self.index[i][name]) for name in ("shard", "byte", "size"))
        path, first = self.shards[shard]
        with open(path + ".jsonl", "rb") as f:
            f.seek(byte)
            text = f.read(size)
        try:
            line = parse_json(text)
            check_encoded(line, self.index[i], self.meta["text_size"])
            for place in places(line):
                place["shard"] += first
                if place["shard"] >= len(self.shards):
                    raise ValueError("there is no such shard")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}.jsonl from byte {byte}: damaged, not a line; encode it again "
                             f"({one_line(e)})") from None
        return line

    def where(self, place):
        """A name for the codes at a place, for messages."""
        return f"{self.shards[place['shard']][0]}.npy from frame {place['offset']}"

    def codes(self, place):
        """The codes at a place {"shard", "offset", "frames"} of a line: (frames, K) int16. Raises ValueError
        if damaged."""
        K, size, n = self.meta["codebooks"], self.meta["codebook_size"], place["frames"]
        with open(self.shards[place["shard"]][0] + ".npy", "rb") as f:
            f.seek(8)
            header = 10 + int.from_bytes(f.read(2), "little")  # bytes, as NumPy's format says
            begin = header + place["offset"] * K * 2
            there = begin + n * K * 2 <= os.fstat(f.fileno()).st_size  # if not, nothing is allocated for them
            f.seek(begin)
            codes = np.fromfile(f, "<i2", n * K if there else 0)
        if not there or codes.size and not 0 <= codes.min() <= codes.max() < size:
            raise ValueError(f"{self.where(place)}: damaged, not {n} frames of codes below {size}; "
                             "encode it again")
        return codes.reshape(n, K)


def places(line):
    """Of all codes of a line."""
    if "turns" not in line:
        return [line["listen"], line["speak"]]
    return [place for part in spoken_parts(line) for place in [*part["copies"], *part.get("echoes", ())]]


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
