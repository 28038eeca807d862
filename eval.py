"""Does it hear, speak, take turns? Conversations frame by frame through engine.py, and recordings of any other system.

    python eval.py --checkpoint out/tiny                         answers, hearing, and FLEXI's scenarios, 200 items each
    python eval.py --checkpoint out/tiny --smoke                 the scenarios with 20 items
    python eval.py --checkpoint out/tiny --keep out/talks        also keep every conversation of the scenarios as a folder
    python eval.py --folder out/talks                            score such a folder, whatever system has spoken there
    python eval.py --checkpoint out/tiny --asr 'mycmd {wav}'     another recogniser: it prints the words it hears
    python eval.py --codec out/codec/checkpoint.pt               the codec alone: how far off, how well understood

Answers, to requests that were never trained on (FLM-Audio, section 4):

    text        the monologue is the right answer, word for word
    spoken      the reply, as the recogniser hears it: share of right words (1 - word error rate), and all words right;
                against the right answer, and against what the model itself has written
    in time     the reply begins at most 0.4 s after the user's end; early: before it
    kept on     of an answer of six words or more, the last word that was written is the last that is heard
    hearing     ASR style: the clip is heard, the text channel writes down what was said

Turns: turns.py. What recogniser.py makes of the originals and of their codec reconstructions is printed as the ceiling.
"""
import argparse
import json
import os
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from tqdm import tqdm

from chat import DuplexModel
from files.atomic import replace_when_done
from files.audio import SAMPLE_RATE, read_audio, write_audio
from live.transcript import Transcript
from files.manifest import read_manifest
from mimi import FRAME, Mimi, log_spectral_distance, mel_filters
from evals.recogniser import get_recogniser
from streams import DELAYED, LISTEN, ROWS, SPEAK, TEXT
from toy.world import KIND_PROPORTIONS
from evals.turns import LEAD, Reply, World, first, run_scenarios, keep_talk, read_talks, report_turns, score_all, share_line, silence, speech, wilson, words_of

KINDS = ("repeat", "count", "next", "opposite")  # of requests that are asked for their answers: no chants, no stories
LISTEN_ON = 2.5  # seconds that a recording goes on after the expected answer


# ---------------------------------------------------------------------------------------------------------------------
# measures


def word_errors(found, right):
    """Words to insert, delete or exchange."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(found, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


class Proportions:
    """Named counts of hits, printed as shares with their 95% intervals."""

    def __init__(self):
        self.hits, self.n = Counter(), Counter()

    def add(self, name, hit, of=1):
        self.hits[name] += hit
        self.n[name] += of

    def add_right(self, name, found, right):
        """How many of the right words (or letters) were found: 1 - error rate."""
        self.add(name, max(0, len(right) - word_errors(found, right)), len(right))

    def share(self, name):
        return self.hits[name] / max(1, self.n[name])

    def line(self, name):
        return share_line(self.share(name), *wilson(self.hits[name], self.n[name]), self.n[name])


def converse_all(duplex, sounds, seed, what, rows=50):
    """Many conversations, up to `rows` side by side, cut to the length of their sounds (N,): [(text tokens (T,), sound said (N,)), ...]
    Those of similar length should be neighbours. On a CPU each core has its own."""
    cores = os.cpu_count() if duplex.device.type == "cpu" else 1
    rows = max(1, min(rows, -(-len(sounds) // cores)))
    some = [sounds[i:i + rows] for i in range(0, len(sounds), rows)]
    padded = [torch.stack([F.pad(x, (0, max(map(len, part)) - len(x))) for x in part]) for part in some]
    bar = tqdm(total=sum(-(-x.shape[1] // FRAME) for x in padded), desc=f"{what}, {len(sounds)}", unit="frame", leave=False)
    with ThreadPoolExecutor(cores, initializer=one_thread, initargs=(duplex,)) as pool:
        talks = pool.map(lambda x, i: duplex.converse(x, seed + i, each=lambda t, text: bar.update()), padded, range(0, len(sounds), rows))
        out = [(t[:-(-len(x) // FRAME)], y[:len(x)]) for part, (text, said) in zip(some, talks) for x, t, y in zip(part, text, said)]
    bar.close()
    return out


def one_thread(duplex):
    if duplex.device.type == "cpu":
        torch.set_num_threads(1)


def written(duplex, text):
    """The monologue of text tokens (T,): [(second, text), ...]"""
    transcript = Transcript(duplex)
    for t, token in enumerate(text.tolist()):
        transcript.add(t, token)
    return [(piece["time"], piece["text"]) for piece in transcript.pieces]


# ---------------------------------------------------------------------------------------------------------------------
# answers


def answers(duplex, recogniser, items, seed, shares, name):
    """Each item's request, spoken to the model after a second of silence. Returns the conversations."""
    items = sorted(items, key=lambda d: len(d["turns"][1]["starts"]))
    users, replies = ([read_audio(d["turns"][i]["path"]) for d in items] for i in (0, 1))
    sounds = [torch.cat([silence(LEAD), u, silence(len(r) / SAMPLE_RATE + LISTEN_ON)]) for u, r in zip(users, replies)]
    talks = converse_all(duplex, sounds, seed, name)
    languages = len({d.get("lang") for d in items})
    for d, user, reply, (text, said) in zip(items, users, replies, talks):
        right, end = d["turns"][1]["text"].split(), LEAD + len(user) / SAMPLE_RATE
        wrote, heard, spans = words_of(written(duplex, text)), recogniser.hear(said), speech(said)
        shares.add(f"{name} text", wrote == right)
        shares.add(f"{name} text, {d['kind']}", wrote == right)
        if languages > 1:
            shares.add(f"{name} text, {d['lang']}", wrote == right)
        shares.add_right(f"{name} spoken words", heard, right)
        shares.add(f"{name} spoken exactly", heard == right)
        shares.add_right(f"{name} spoken as written", heard, wrote)
        onset = first(a for a, _ in spans)
        shares.add(f"{name} in time", onset is not None and end <= onset <= end + 0.4)
        shares.add(f"{name} early", onset is not None and onset < end)
        if len(right) >= 6:
            shares.add(f"{name} kept on", bool(heard) and heard[-1:] == wrote[-1:])
    return list(zip(items, sounds, talks))


def ceiling(codec, recogniser, items, shares, name):
    """What the recogniser makes of the originals, and of them after the codec."""
    for turn in (t for d in items for t in d["turns"]):
        sound = read_audio(turn["path"])
        understood(recogniser, sound, turn["text"], shares, f"{name} {turn['role']} original")
        understood(recogniser, reconstruct(codec, sound), turn["text"], shares, f"{name} {turn['role']} codec")


@torch.inference_mode()
def hearing(duplex, items, shares, name):
    """ASR style: each clip into the listening rows, nothing on the speaking ones; the text is what the model has understood."""
    sounds = [read_audio(d["turns"][0]["path"]) for d in items]
    N = max(map(len, sounds)) // FRAME * FRAME + 40 * FRAME
    codes = duplex.codec.encode(torch.stack([F.pad(x, (6 * FRAME, N - len(x))) for x in sounds])[:, None].to(duplex.device))
    v, state = duplex.vocab, duplex.model.init_cache(len(items))
    late, silent = DELAYED.to(duplex.device), codes.new_full(codes.shape[:2], v.empty)
    text, before, pieces = codes.new_full((len(items),), v.wait), silent, []
    for t, now in enumerate(codes.unbind(-1)):
        spoken = torch.tensor([6 <= t < 6 - (-len(x) // FRAME) for x in sounds], device=duplex.device)
        now = torch.where(spoken[:, None], now, silent)  # the clip and nothing else, as in post-training
        column = torch.empty(len(items), ROWS, dtype=torch.long, device=duplex.device)
        column[:, TEXT], column[:, SPEAK], column[:, LISTEN] = text, silent, torch.where(late, before, now)
        text, before = duplex.model.text_logits(duplex.model.hidden_step(column, state))[:, :v.text_size].argmax(-1), now
        pieces.append(text)
    for d, tokens in zip(items, torch.stack(pieces, 1).cpu()):
        right, found = d["turns"][0]["text"].split(), words_of(written(duplex, tokens))
        shares.add_right(f"{name} words heard", found, right)
        shares.add_right(f"{name} letters heard", "".join(found), "".join(right))


def understood(recogniser, sound, text, shares, label):
    heard, right = recogniser.hear(sound), text.split()
    shares.add_right(f"{label} words", heard, right)
    shares.add(f"{label} exactly", heard == right)


def reconstruct(codec, x):
    device = next(codec.parameters()).device
    return codec.decode(codec.encode(x[None, None].to(device)))[0, 0, :len(x)].cpu()


# ---------------------------------------------------------------------------------------------------------------------
# the codec alone


def codec_quality(codec, recogniser, dialogues, n, seed):
    """Held-out speech through the codec: how far its log-mel spectrum is off, and how much of it is still understood."""
    print(f"\nHeld-out speech through the codec, seed {seed}: words understood / clips understood entirely")
    for split, role, who in (("seen", "user", "users heard in training"), ("new", "user", "new users"),
                             ("seen", "model", "the model's voice")):
        clips = {t["path"]: t["text"] for d in dialogues if d["split"] == split for t in d["turns"] if t["role"] == role}
        clips = random.Random(seed).sample(sorted(clips.items()), min(n, len(clips)))
        shares, off = Proportions(), 0.0
        for path, text in tqdm(clips, who, unit="clip", leave=False):
            sound = read_audio(path)
            heard = reconstruct(codec, sound)
            off += log_spectral_distance(sound, heard, MEL_1024) / len(clips)
            understood(recogniser, sound, text, shares, "original")
            understood(recogniser, heard, text, shares, "codec")
        print(f"  {who:24} {len(clips):4} clips   log-mel distance {off:5.2f} dB   "
              + "   ".join(f"{v} {shares.share(v + ' words'):.3f} / {shares.share(v + ' exactly'):.3f}" for v in ("original", "codec")))


MEL_1024 = mel_filters(1024)


# ---------------------------------------------------------------------------------------------------------------------
# all of it


def report(shares, seed):
    print(f"\nHeld out, seed {seed}, 95% intervals in brackets")
    for name, who in (("seen", "voices heard in training"), ("new", "new voices")):
        print(f"\n  {who}")
        kinds = sorted(n for n in shares.n if n.startswith(f"{name} text, "))
        for label in (f"{name} text", *kinds, *(f"{name} {x}" for x in ("spoken words", "spoken exactly", "spoken as written",
                                                                      "in time", "early", "kept on", "words heard", "letters heard"))):
            print(f"    {label[len(name) + 1:]:24} {shares.line(label)}")
        for kind in ("user", "model"):
            ceiling = [f"{version} {shares.share(f'{name} {kind} {version} words'):.3f} / "
                       f"{shares.share(f'{name} {kind} {version} exactly'):.3f}" for version in ("original", "codec")]
            print(f"    the recogniser's ceiling, words / exactly, {kind}'s speech: {',  '.join(ceiling)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="out/tiny")
    parser.add_argument("--codec", help="measure this codec alone instead of a model")
    parser.add_argument("--folder", help="score the conversations in this folder instead: ours (--keep) or Full-Duplex-Bench's")
    parser.add_argument("--data", default="data/toy", help="folder with the manifest of the held-out items")
    parser.add_argument("--items", type=int, default=200, help="for each of seen voices, new voices, and each scenario")
    parser.add_argument("--smoke", action="store_true", help="20 items a scenario")
    parser.add_argument("--keep", help="write every conversation of the scenarios into this folder")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--tts", help="another synthesiser for the scenarios, as for prepare.py")
    parser.add_argument("--asr", help="another recogniser: a command with {wav} that prints the words")
    parser.add_argument("--asr-minutes", type=float, help="train the default recogniser so long, if it is not there yet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        if args.folder:
            return report_turns(score_all(read_talks(args.folder)), os.path.basename(os.path.normpath(args.folder)))
        recogniser = get_recogniser(args.asr, args.data, "out/recogniser", args.asr_minutes, args.device)
        dialogues = list(read_manifest(os.path.join(args.data, "manifest.jsonl")))
        if args.codec:
            return codec_quality(Mimi.load(args.codec, args.device), recogniser, dialogues, args.items, args.seed)
        evaluate(DuplexModel.load(args.checkpoint, args.device), recogniser, dialogues, args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


def evaluate(duplex, recogniser, dialogues, args):
    rng, shares, talks = random.Random(args.seed), Proportions(), []
    for name in ("seen", "new"):
        items = [d for d in dialogues if d["split"] == name and d["kind"] in KINDS]
        items = rng.sample(items, min(args.items, len(items)))
        talks += answers(duplex, recogniser, items, args.seed, shares, name)
        hearing(duplex, items, shares, name)
        ceiling(duplex.codec, recogniser, items[:50], shares, name)

    def run(items, what):
        out = []
        for item, (text, said) in zip(items, converse_all(duplex, [item.sound for item in items], args.seed, what)):
            out.append(Reply(speech(said), written(duplex, text)))
            if args.keep:
                keep_talk(args.keep, item, said, out[-1].written)
        return out

    table = score_all(run_scenarios(run, World(dialogues, args.tts, args.seed), 20 if args.smoke else args.items))
    folder = os.path.join(args.checkpoint, "samples")
    kinds = {d["kind"]: (d, heard, text, said) for d, heard, (text, said) in reversed(talks)}  # the first of each
    print("\nThree of the conversations (left the user, right the model):")
    for kind in [k for k in KIND_PROPORTIONS if k in kinds][:3]:
        d, heard, text, said = kinds[kind]
        path = os.path.join(folder, f"{kind}.wav")
        write_audio(path, torch.stack([heard, said]))
        print(f"  user: {d['turns'][0]['text']}\n    model: {' '.join(words_of(written(duplex, text)))}\n    {path}")
    report(shares, args.seed)
    report_turns(table, args.checkpoint)
    path = os.path.join(args.checkpoint, "eval.json")
    with replace_when_done(path) as temporary, open(temporary, "w") as f:
        json.dump({"seed": args.seed, "shares": {k: [shares.hits[k], shares.n[k]] for k in shares.n}, "turns": table}, f, indent=1)
    print(f"\nWrote {path} and {folder}/" + (f" and {args.keep}/" if args.keep else ""))


if __name__ == "__main__":
    main()
