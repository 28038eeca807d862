"""ASR style: what a model writes of what it hears, on the toy world's clips or on a test set of one's own.

    python eval.py --checkpoint out/small --hear data/test      every recording of data/test/manifest.jsonl

Each clip goes into the listening rows and nothing into the speaking ones; the monologue that follows is the
transcript. Corpus WER, with case and punctuation removed; CER where words are not separated by spaces.
"""
import json
import os
import re
import unicodedata

import torch
from tqdm import tqdm

from evals.conversations import written
from evals.turns import words_of
from files.atomic import replace_when_done
from files.audio import read_audio
from files.manifest import clip_key, read_manifest, seconds_of
from files.tokenizer import NO_SPACES
from mimi import FRAME
from streams import DELAYED, FRAME_RATE, LISTEN, ROWS, SPEAK, TEXT

BEFORE, AFTER = 6, 40  # frames before a clip, and at least after it, until the transcript is complete
BATCH = 25


@torch.inference_mode()
def transcribe(duplex, clips):
    """Clips [(N,), ...] of similar length, in one batch -> their transcripts, lists of words."""
    frames = [-(-len(x) // FRAME) for x in clips]
    T = BEFORE + max(frames) + max(AFTER, max(frames) // 2)
    wav = torch.zeros(len(clips), 1, T * FRAME)
    for row, x in zip(wav, clips):
        row[0, BEFORE * FRAME:BEFORE * FRAME + len(x)] = x
    codes = duplex.codec.encode(wav.to(duplex.device))  # (B, K, T)
    ends = torch.tensor([BEFORE + n for n in frames], device=duplex.device)
    empty, text, transcripts = duplex.vocab.empty, codes.new_full((len(clips),), duplex.vocab.wait), []
    cache, delayed = duplex.model.init_cache(len(clips)), DELAYED.to(duplex.device)
    last = silent = codes.new_full(codes.shape[:2], empty)
    for t, frame in enumerate(codes.unbind(-1)):
        # the clip alone, as in post-training
        frame = frame.where(((t >= BEFORE) & (t < ends))[:, None], silent)
        column = codes.new_empty(len(clips), ROWS)
        column[:, TEXT], column[:, SPEAK], column[:, LISTEN] = text, silent, torch.where(delayed, last, frame)
        logits = duplex.model.text_logits(duplex.model.hidden_step(column, cache))
        text, last = logits[:, :duplex.vocab.text_size].argmax(-1), frame
        transcripts.append(text)
    return [words_of(written(duplex, tokens)) for tokens in torch.stack(transcripts, 1).cpu()]


def hearing(duplex, clips, scores, label):
    """clips: [(samples (N,), what is said), ...]. Returns the transcripts, normalised words."""
    order = sorted(range(len(clips)), key=lambda i: len(clips[i][0]))
    found = [None] * len(clips)
    for begin in tqdm(range(0, len(order), BATCH), f"{label} hearing", unit="batch", leave=False):
        some = order[begin:begin + BATCH]
        for i, words in zip(some, transcribe(duplex, [clips[i][0] for i in some])):
            right, found[i] = normalise(clips[i][1]), normalise(" ".join(words))
            scores.add_errors(f"{label} hearing 1 - WER", found[i], right)
            scores.add_errors(f"{label} hearing 1 - CER", "".join(found[i]), "".join(right))
    return found


def normalise(text):
    """Lower-case words without punctuation but with apostrophes; in scripts without spaces, characters."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = "".join(c if c.isalnum() or c == "'" or unicodedata.category(c)[0] == "M" else " " for c in text)
    text = re.sub(NO_SPACES, lambda found: f" {found[0]} ", text)
    return [word for word in (word.strip("'") for word in text.split()) if word]


def hear_test_set(duplex, data, split, scores, out):
    """Every recording of data/manifest.jsonl, of one split or of all, that somebody else than the model says;
    the transcripts go to the file `out`, as JSON lines."""
    turns = [t for d in read_manifest(os.path.join(data, "manifest.jsonl")) if split in (None, d["split"])
             for t in d.get("turns", ()) if t.get("role") != "model" and normalise(t["text"])]
    turns = list({clip_key(t): t for t in turns}.values())
    if not turns:
        where = f" of the split {split}" if split else ""
        raise ValueError(f"{data}: holds no recording with a text{where}")
    longest = (duplex.model.config.context - BEFORE - AFTER) / 1.5 / FRAME_RATE
    fits = [t for t in turns if seconds_of(*clip_key(t)) <= longest]
    if len(fits) < len(turns):
        print(f"{len(turns) - len(fits)} recordings are left out, longer than the {longest:.0f} s that the "
              "model was trained on")
    fits.sort(key=lambda t: (seconds_of(*clip_key(t)), str(clip_key(t))))
    with replace_when_done(out) as temporary, open(temporary, "w", encoding="utf-8") as f:
        for begin in range(0, len(fits), 20 * BATCH):  # not all of the audio at once
            some = fits[begin:begin + 20 * BATCH]
            audio = [read_audio(t["path"], start=t.get("start", 0.0), end=t.get("end")) for t in some]
            clips = [(x, t["text"]) for x, t in zip(audio, some)]
            for t, found in zip(some, hearing(duplex, clips, scores, "test set")):
                f.write(json.dumps({"audio": t["path"], "text": t["text"], "heard": " ".join(found)},
                                   ensure_ascii=False) + "\n")
    return len(fits)
